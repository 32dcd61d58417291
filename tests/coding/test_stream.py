"""Coding of integer codes: round trips, equal bytes from C and numpy, damage, length."""

import contextlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lrcompress import coding
from lrcompress.coding import rans, stream
from lrcompress.errors import InputError
from lrcompress.kernels.native import library

WAYS = ["native", "plain"]


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    """Both ways of coding, one after the other."""
    if request.param == "plain":
        monkeypatch.setattr(rans, "library", lambda name: None)
    elif library("rans") is None:
        pytest.skip("no C compiler")
    return request.param


def laplace(rows: int, columns: int, scale: float, octaves: float = 3, seed: int = 0) -> Tensor:
    """Codes whose sizes vary by row and column over some octaves."""
    g = torch.Generator().manual_seed(seed)
    energy = [torch.exp2(octaves * (torch.rand(n, generator=g) - 0.5)) for n in (rows, columns)]
    u = torch.rand(rows, columns, generator=g) - 0.5
    drawn = -u.sign() * torch.log1p(-2 * u.abs().clamp(max=0.4999999))
    return (drawn * scale * energy[0][:, None] * energy[1]).round().int()


def outliers() -> Tensor:
    codes = laplace(40, 50, 1.0)
    codes[3, 7], codes[5, 5], codes[39, 49] = 2**31 - 1, -(2**31), 100_000
    return codes


ODD = {
    "zeros": torch.zeros(5, 70, dtype=torch.int64),
    "one row": laplace(1, 333, 2),
    "one column": laplace(333, 1, 2),
    "one value": torch.full((9, 9), -7),
    "a large value": torch.full((3, 40), 123_456),
    "1 x 1": torch.tensor([[3]]),
    "signs": laplace(64, 64, 1).sign() * 2 + 1,
    "outliers": outliers(),
    "-128": torch.full((4, 4), -128),
    "extremes of 8 bits": torch.tensor([[-128, 127] * 20]),
    "extremes of 16 bits": torch.tensor([[-32768, 32767] * 20]),
    "extremes of 32 bits": torch.tensor([[-(2**31), 2**31 - 1] * 20]),
    "zero rows": laplace(60, 60, 3) * (torch.arange(60) % 3 == 0)[:, None],
    "columns": torch.arange(70)[None].repeat(37, 1),
    "unsigned": torch.arange(256, dtype=torch.uint8).reshape(16, 16),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_codes_come_back(name, way):
    codes = ODD[name]
    back = coding.decode(coding.encode(codes), tuple(codes.shape))
    assert torch.equal(back.long(), codes.long())
    low, high = int(codes.min()), int(codes.max())
    fits = [
        t for t in (torch.int8, torch.int16, torch.int32) if torch.iinfo(t).min <= low and high <= torch.iinfo(t).max
    ]
    assert back.dtype == fits[0]


@pytest.mark.parametrize("name", ODD)
def test_both_ways_write_the_same_bytes(name, monkeypatch):
    if library("rans") is None:
        pytest.skip("no C compiler")
    native = coding.encode(ODD[name])
    monkeypatch.setattr(rans, "library", lambda name: None)
    assert torch.equal(native, coding.encode(ODD[name]))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 40), st.integers(1, 90), st.floats(0.02, 3e5), st.floats(0, 6), st.integers(0, 999), st.booleans()
)
def test_any_codes_come_back_from_either_way(rows, columns, scale, octaves, seed, plainly):
    codes = laplace(rows, columns, scale, octaves, seed)
    with pytest.MonkeyPatch.context() as patch:
        if plainly:
            patch.setattr(rans, "library", lambda name: None)
        made = coding.encode(codes)
    with pytest.MonkeyPatch.context() as patch:
        if not plainly:
            patch.setattr(rans, "library", lambda name: None)
        assert torch.equal(coding.decode(made, (rows, columns)).int(), codes)


def small_parts(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(stream, "PART", 600)


def test_rows_alone(way, monkeypatch):
    small_parts(monkeypatch)
    codes = laplace(61, 43, 2.0)
    made = coding.encode(codes, threads=2)
    for rows in (slice(0, 61), slice(10, 20), slice(60, 61), slice(-5, None), slice(7, 7), slice(50, 10)):
        assert torch.equal(coding.decode(made, (61, 43), rows=rows, threads=2).int(), codes[rows])
    with pytest.raises(InputError, match="step 1"):
        coding.decode(made, (61, 43), rows=slice(0, 10, 2))


def test_rows_alone_need_no_other_part_whole(way, monkeypatch):
    small_parts(monkeypatch)
    codes = laplace(61, 43, 2.0)
    made = coding.encode(codes)
    made[-1] ^= 1
    assert torch.equal(coding.decode(made, (61, 43), rows=slice(0, 13)).int(), codes[:13])
    with pytest.raises(InputError, match="checksum"):
        coding.decode(made, (61, 43), rows=slice(50, 61))


def changed(data: bytes, kind: str, at: int, what: bytes) -> bytes:
    at %= len(data)
    if kind == "flip":
        return data[:at] + bytes(a ^ b for a, b in zip(data[at:], what, strict=False)) + data[at + len(what) :]
    if kind == "cut":
        return data[:at]
    if kind == "drop":
        return data[:at] + data[at + len(what) :]
    return data[:at] + what + data[at:]


damage = st.lists(
    st.tuples(
        st.sampled_from(["flip", "cut", "drop", "insert"]), st.integers(0, 2**20), st.binary(min_size=1, max_size=8)
    ),
    min_size=1,
    max_size=3,
)
STREAM = {octaves: bytes(coding.encode(laplace(13, 47, 9.0 * octaves, octaves)).tolist()) for octaves in (1, 6)}


@pytest.mark.parametrize("blind", [False, True], ids=["checksums", "no checksums"])
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damage_is_an_input_error(blind, data):
    octaves, plainly = data.draw(st.sampled_from([1, 6])), data.draw(st.booleans())
    made = STREAM[octaves]
    for kind, at, what in data.draw(damage):
        made = changed(made, kind, at, what) or b"\0"
    if made == STREAM[octaves]:
        return
    with pytest.MonkeyPatch.context() as patch:
        if plainly:
            patch.setattr(rans, "library", lambda name: None)
        if blind:  # what the checks behind the checksums are for
            patch.setattr(stream, "_same", lambda data, checksum: True)
            patch.setattr(stream, "MAGIC", made[:4])
        given_bytes = torch.frombuffer(bytearray(made), dtype=torch.uint8)
        if not blind:
            with pytest.raises(InputError, match=r"\A[^\n]+\Z"):
                coding.decode(given_bytes, (13, 47))
            return
        with contextlib.suppress(InputError):
            assert coding.decode(given_bytes, (13, 47)).shape == (13, 47)


def test_what_cannot_be_coded_is_refused():
    for codes in (torch.zeros(3), torch.zeros(2, 2), torch.zeros(0, 3, dtype=torch.int8), torch.ones(2, 2) > 0):
        with pytest.raises(InputError, match="matrix of integers"):
            coding.encode(codes)
    with pytest.raises(InputError, match="32 bits"):
        coding.encode(torch.tensor([[2**31]]))
    with pytest.raises(InputError, match=r"shape \(2, 3\)"):
        coding.decode(coding.encode(torch.ones(2, 3, dtype=torch.int8)), (3, 2))


def entropy(values: np.ndarray) -> float:
    counts = np.unique(values, return_counts=True)[1]
    return float(-(counts * np.log2(counts / counts.sum())).sum())


@pytest.mark.parametrize("scale", [0.2, 1.0, 3.0, 60.0])
def test_length_is_near_the_entropy_in_classes(scale):
    codes = laplace(576, 576, scale)
    made = coding.encode(codes)
    size = codes.abs().double()
    sums = size.mean(1).clamp_min(1e-9).log2()[:, None] + size.mean(0).clamp_min(1e-9).log2()
    kind = (2 * sums).round().long().numpy()
    flat = codes.numpy()
    ideal = sum(entropy(flat[kind == each]) for each in np.unique(kind))
    energies = sum(entropy(np.round(4 * np.log2(size.mean(axis).numpy() + 1e-9))) for axis in (0, 1))
    assert 8 * len(made) < 1.02 * ideal + energies
    assert math.isclose(coding.estimated_bits(codes), 8 * len(made), rel_tol=0.005)
    assert coding.coded_bytes(codes) == round(coding.estimated_bits(codes) / 8)
