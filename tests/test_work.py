"""How often the costly parts run, and that peak memory does not know how many blocks there are."""

import collections
import subprocess
import sys

import pytest

from lrcompress.methods.cospadi import Cospadi
from lrcompress.methods.spectral import SpectralMethod
from lrcompress.protocols import InputStatistics
from tests.conftest import compress_tiny
from tests.test_benchmarks import benchmark

GROUPS, WEIGHTS, BLOCKS, SAMPLES = 4, 7, 3, 4


@pytest.mark.parametrize(
    ("changes", "owner", "passes"),
    [
        ({"method": "lord"}, SpectralMethod, 1),
        ({"method": "lord", "allocator": "marginal_error"}, SpectralMethod, 1),
        ({"method": "lord", "max_loss": "90%", "ratio": None}, SpectralMethod, 1),
        ({"method": "welore"}, SpectralMethod, 1),
        ({"method": "cospadi"}, Cospadi, 1),
        ({"method": {"name": "lord", "propagation": "sequential"}}, SpectralMethod, 1),
        ({"method": {"name": "lord", "propagation": "sequential"}, "allocator": "marginal_error"}, SpectralMethod, 2),
    ],
)
def test_every_weight_is_decomposed_once_a_pass_and_every_input_summed_once(
    llama, tmp_path, monkeypatch, changes, owner, passes
):
    decomposed, summed = collections.Counter(), collections.Counter()
    decompose, update = owner.decompose, InputStatistics.update

    def counted_decompose(self, site, weight, statistics):
        decomposed[site.name] += 1
        return decompose(self, site, weight, statistics)

    def counted_update(self, rows, *args, **options):
        summed[rows.shape[-1]] += 1
        update(self, rows, *args, **options)

    monkeypatch.setattr(owner, "decompose", counted_decompose)
    monkeypatch.setattr(InputStatistics, "update", counted_update)
    compress_tiny(llama, tmp_path / "out", **changes)
    assert len(decomposed) == WEIGHTS * BLOCKS
    assert set(decomposed.values()) == {passes}
    assert sum(summed.values()) == GROUPS * BLOCKS * SAMPLES * passes


def test_a_dictionary_is_learnt_once_a_weight(llama, tmp_path, monkeypatch):
    """Storing and judging the same block encode it once."""
    calls, encode = collections.Counter(), Cospadi.encode

    def counted(self, spec, artefact, bias):
        calls["encode"] += 1
        return encode(self, spec, artefact, bias)

    monkeypatch.setattr(Cospadi, "encode", counted)
    report = compress_tiny(llama, tmp_path / "out", method="cospadi").report
    assert sum(calls.values()) == sum(target["format"] != "dense" for target in report["targets"])


def peak(model, output, *arguments):
    """Bytes resident at most in a process of its own, as the system counts them."""
    code = "import resource, sys; from lrcompress.cli import app; import lrcompress.cli.app as cli; " \
           "sys.argv[0] = 'lrcompress'; cli.app(standalone_mode=False); " \
           "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"  # fmt: skip
    command = [sys.executable, "-c", code, "compress", str(model), "-o", str(output), "--samples", "2",
               "--seqlen", "128", "--quiet", *arguments]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1]) * 1024


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ["--method", "lord", "--ratio", "0.2"],
        ["--method", "auto", "--ratio", "0.2"],
        ["--method", "eora", "--base", "rtn:4:64", "--ratio", "0.6"],
        ["--method", "cospadi", "--ratio", "0.2", "--set", "rounds=1"],
    ],
    ids=lambda arguments: arguments[1],
)
def test_peak_memory_does_not_grow_with_depth(tmp_path, arguments):
    generate = benchmark("memory").generate
    shallow, deep = (generate(tmp_path / str(n), 384, 1536, n, 2000, shard_bytes=10**7) for n in (6, 24))
    first, second = (peak(model, tmp_path / f"out-{model.name}", *arguments) for model in (shallow, deep))
    assert second < 1.05 * first
