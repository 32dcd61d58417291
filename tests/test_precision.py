"""One switch for wide sums and decompositions: what float32 gives is near what float64 does, as arithmetic allows."""

import json
from pathlib import Path

import pytest
import torch

from lrcompress import precision
from lrcompress.bases import parse_base
from lrcompress.errors import InputError
from lrcompress.grams import add
from lrcompress.linalg.dictionary import fitted_dictionary
from lrcompress.linalg.truncation import decompose, leading, retruncate, singular_values
from lrcompress.linalg.whitening import upper_root
from lrcompress.methods import make_method
from lrcompress.precision import VARIABLE, exact, placed, split, wide, widened
from lrcompress.protocols import InputStatistics, Site
from tests.commands import run_code

CPU, EPS = torch.device("cpu"), torch.finfo(torch.float32).eps


@pytest.fixture
def single(monkeypatch):
    monkeypatch.setenv(VARIABLE, "float32")


def random(seed, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_float64_where_it_is_fast(monkeypatch):
    other = torch.device("meta")
    assert wide(CPU) == torch.float64
    assert wide(other) == torch.float32  # has no float64, as it raises
    monkeypatch.setattr(precision, "has_float64", lambda device: True)
    for share, expected in ((1 / 2, torch.float64), (1 / 32, torch.float32)):
        rates = {torch.float32: 1.0, torch.float64: share}
        monkeypatch.setattr(precision, "rate", lambda dtype, device, rates=rates: rates[dtype])
        assert precision._best.__wrapped__(other) == expected


def test_the_environment_decides_and_is_checked(monkeypatch):
    for name in ("float32", "float64"):
        monkeypatch.setenv(VARIABLE, name)
        assert str(wide(CPU)) == f"torch.{name}"
    with pytest.raises(InputError, match="device meta has none"):
        wide(torch.device("meta"))
    monkeypatch.setenv(VARIABLE, "bfloat16")
    with pytest.raises(InputError, match="LRCOMPRESS_WIDE=bfloat16.*float32 or float64"):
        wide(CPU)


@pytest.mark.parametrize("name", ["float32", "float64"])
def test_numbers_go_there_and_back(monkeypatch, name):
    monkeypatch.setenv(VARIABLE, name)
    values = random(0, 50)
    main, rest = split(values, CPU)
    assert main.dtype == wide(CPU)
    assert (rest is None) == (name == "float64")
    torch.testing.assert_close(exact(main, rest), values, rtol=EPS**2, atol=0)
    assert placed(values, CPU).dtype == exact(values).dtype == torch.float64


def test_a_sum_with_its_rest_has_twice_the_digits():
    parts = [torch.rand(200, generator=torch.Generator().manual_seed(i)) for i in range(300)]
    total, rest = torch.zeros(200), torch.zeros(200)
    for part in parts:
        add(total, part, rest)
    whole = torch.stack(parts).double().sum(0)
    assert float(((total.double() + rest) / whole - 1).abs().max()) < 300 * EPS**2


def test_sums_of_whole_numbers_are_exact(single):
    """Where every product is exact, so is the sum of many: float32 alone knows whole numbers up to 2^24."""
    rows = torch.randint(0, 256, (400, 8, 6), generator=torch.Generator().manual_seed(0))
    found, other = InputStatistics.zeros(6), InputStatistics.zeros(6)
    for part in rows[:300]:
        found.update(part.float())
    for part in rows[300:]:
        other.update(part.float())
    found.merge(other)
    flat = rows.flatten(0, 1)
    second = (flat.T @ flat).double()
    assert found.second.dtype == torch.float32
    assert float(second.max()) > 2**24
    assert torch.equal(exact(found.second, found.rest).triu(), second.triu())
    assert torch.equal(found.total, flat.sum(0).double())
    assert torch.equal(found.gram(), (second / len(flat)).float())


def test_a_large_mean_does_not_drown_the_covariance(single):
    rows = 1000 + torch.randint(-1, 2, (300, 8, 6), generator=torch.Generator().manual_seed(0))
    found = InputStatistics.zeros(6)
    for part in rows:
        found.update(part.float())
    expected = torch.cov(rows.flatten(0, 1).T.double(), correction=0)
    assert float((found.gram(centred=True) - expected).abs().max()) < 4 * EPS


def grams(kind, n):
    """Of inputs alike; with one that is a thousand times as large; of fewer rows than inputs, one of them dead."""
    rows = random(1, 8 if kind == "singular" else 40 * n, n) @ (torch.eye(n) + 0.3 * random(2, n, n))
    if kind == "huge":
        rows[:, 3] *= 1e3
    if kind == "singular":
        rows[:, 5] = 0
    return rows.T @ rows / len(rows)


def allowed(weight, gram, rank, lifted):
    """The largest error in the metric of a rank, from the arithmetic.

    The best one where `lifted` of every input's own moment is added; eigenvectors turned at CUT; products rounded.
    """
    n, added = len(gram), torch.diag(gram.diagonal()) * lifted
    values = torch.linalg.eigvalsh(weight @ (gram + added) @ weight.T).clamp_min(0).flip(0)
    rounded = n * EPS * float((weight @ gram * weight).sum().clamp_min(0)) ** 0.5
    tail = float(values[rank:].sum() + min(weight.shape) * EPS**1.5 * values[0])
    return (tail**0.5 + rounded) ** 2


@pytest.mark.parametrize("kind", ["alike", "huge", "singular"])
@pytest.mark.parametrize("shape", [(24, 64), (64, 24), (48, 48)])
@pytest.mark.parametrize("how", ["decompose", "leading", "retruncate"])
def test_truncation_errs_as_little_as_rounding_allows(single, kind, shape, how):
    (m, n), rank = shape, 6
    left, right = random(3, m, min(shape)), random(4, min(shape), n)
    weight, gram = left @ right, grams(kind, n)
    weight = weight.float().double() if how != "retruncate" else weight
    found = {
        "decompose": lambda: decompose(weight.float(), gram.float()),
        "leading": lambda: leading(weight.float(), rank, gram.float()),
        "retruncate": lambda: retruncate(left.float(), right.float(), gram.float()),
    }[how]()
    assert found.left.dtype == found.right.dtype == torch.float32
    assert found.energies.dtype == torch.float64
    error = weight - found.left[:, :rank].double() @ found.right[:rank].double()
    erred = float((error @ gram * error).sum())
    # Subspace iteration and Cholesky's factor of a tall weight come near to the best, not nearer.
    most = (1.02 if how == "leading" else 1.001) * allowed(
        weight, gram, rank, 10 * n * EPS if kind == "singular" else EPS
    )
    assert erred <= most
    predicted = float(found.errors()[rank])
    assert abs(predicted - erred) <= 2 * (most - erred) + 1e-3 * most


def test_singular_values_and_degenerate_metrics(single):
    weight = random(5, 30, 20) * torch.logspace(0, -5, 20, dtype=torch.float64)
    values = torch.linalg.svdvals(weight)
    assert float((singular_values(weight.float()) - values).abs().max()) < 30 * EPS * float(values[0])
    assert float(decompose(weight.float(), torch.zeros(20, 20)).energies.sum()) == 0
    gram = grams("singular", 20).float()
    lifted = upper_root(gram).double()
    assert float((lifted.T @ lifted - gram).abs().max()) <= 10 * 20 * EPS * float(gram.diagonal().max())
    with pytest.raises(ArithmeticError):
        upper_root(torch.diag(torch.tensor([1.0, 1.0])) - 3 * torch.ones(2, 2).fill_diagonal_(0))


@pytest.mark.parametrize("spec", ["gptq:3:16", "sparsegpt:2:4", "rtn:4:16"])
def test_bases_err_as_in_float64(monkeypatch, spec):
    """A rounding that falls the other way is another draw of a rounding error: sums over all of them hardly differ."""
    weight, gram = random(6, 96, 64), grams("huge", 64)
    losses = []
    for name in ("float64", "float32"):
        monkeypatch.setenv(VARIABLE, name)
        found = parse_base(spec).compress(widened(weight), widened(gram))
        assert found.dense.dtype == wide(CPU)
        error = weight - found.dense.double()
        losses.append(float((error @ gram * error).sum()))
    shares = gram.diagonal() / gram.diagonal().sum()
    spread = float((0.8 * 2 * shares.square().sum() / len(weight)) ** 0.5)  # 4/5 of a uniform error's mean square
    assert abs(losses[1] / losses[0] - 1) < 4 * spread


def test_a_dictionary_is_the_best_for_its_codes(single):
    codes = random(7, 60, 12)
    codes[:, 3] = codes[:, 2] + 1e-2 * codes[:, 3]  # nearly the same atom twice
    target = codes @ random(8, 12, 20) + 0.1 * random(9, 60, 20)
    best = torch.linalg.lstsq(codes, target).solution
    found = fitted_dictionary(target.float(), codes.float()).double()
    least, erred = (float((target - codes @ d).square().sum()) for d in (best, found))
    assert erred <= least + 60 * EPS * float(target.square().sum())


@pytest.mark.parametrize("method", ["lord", "welore", "eora", "cospadi"])
def test_what_is_not_finite_is_an_error(single, method):
    made, site = make_method(method, {"metric": "input"}), Site("a", (16, 16), 0, "a", False)
    statistics = InputStatistics.zeros(16)
    statistics.update(torch.randn(40, 16, generator=torch.Generator().manual_seed(0)))
    with pytest.raises(ArithmeticError, match="non-finite"):
        made.decompose(site, torch.full((16, 16), torch.nan), statistics)


def test_every_method_runs_on_a_device_without_float64():
    """Nothing mixes what lies there with what lies on the CPU, and nothing there is float64: that is an error."""
    found = run_code((Path(__file__).parent / "on_fake_device.py").read_text())
    assert found.returncode == 0, found.stderr
    rows = json.loads(found.stdout.splitlines()[-1])
    assert len(rows) > 10
    for row in rows:
        assert row["difference"] < 1e-3, row


def test_a_model_is_compressed_on_a_device_without_float64(llama, tmp_path):
    code = (
        "import sys; from pathlib import Path; import tests.fake_device; from tests.conftest import compress_tiny\n"
        "for device in ('cpu', 'fake'):\n"
        "    made = compress_tiny(Path(sys.argv[1]), Path(sys.argv[2]) / device, device=device, dtype='float32')\n"
        "    print(made.report['held_out']['perplexity'])\n"
    )
    found = run_code(code, llama, tmp_path)
    assert found.returncode == 0, found.stderr
    here, there = map(float, found.stdout.split())
    assert there == pytest.approx(here, rel=1e-4)
