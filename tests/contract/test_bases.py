"""One suite over every registered base, and oracles for those that compensate."""

import pytest
import torch

from lrcompress.bases import BASES, BaseOptions, parse_base
from lrcompress.errors import InputError
from lrcompress.formats import build, stored_tensors
from lrcompress.linalg.compensation import gram_factor, sweep
from lrcompress.linalg.rounding import asymmetric_grid

ALL = ["rtn:2:16", "rtn:3:16", "rtn:4:64", "rtn:8:7", "gptq:2:7", "gptq:3:16", "gptq:4:300",
       "magnitude:2:4", "wanda:2:4", "sparsegpt:2:4"]  # fmt: skip
BLOCKS = ["ggml:Q4_0", "ggml:MXFP4", "ggml:Q3_K", "ggml:IQ2_XS"]
SHAPES = [(12, 40), (20, 37), (5, 3), (9, 200)]
CASES = [(text, shape) for text in ALL for shape in SHAPES] + [
    (text, shape) for text in BLOCKS for shape in [(12, 64), (5, 256)]
]
"""Only whole blocks are blocks; see test_rows_that_are_no_whole_blocks."""


def weight(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05


def gram(features, seed=0, rows=400):
    """Second moment of correlated inputs with a few large ones, as in language models."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(rows, features, generator=generator) @ torch.randn(features, features, generator=generator)
    x = (mixed * torch.logspace(0.5, -1, features)).double()
    return x.T @ x / rows


def error(matrix, dense, metric):
    difference = matrix.double() - dense
    return float(((difference @ metric) * difference).sum())


def test_every_registered_base_is_in_this_suite():
    assert sorted({text.split(":")[0] for text, _ in CASES}) == BASES.names()


@pytest.mark.parametrize(("text", "shape"), CASES)
class TestBase:
    def test_what_is_stored_is_what_it_says(self, text, shape):
        matrix, metric = weight(shape), gram(shape[1])
        before = matrix.clone(), metric.clone()
        made = parse_base(text).compress(matrix, metric)
        assert torch.equal(matrix, before[0])
        assert torch.equal(metric, before[1])
        assert made.spec == parse_base(text).spec(shape)
        layout = stored_tensors(made.spec, torch.float32)
        assert {k: (t.shape, t.dtype) for k, t in layout.items() if k != "weight"} == {
            k: (t.shape, t.dtype) for k, t in made.tensors.items()
        }
        module = build(made.spec, torch.float32)
        module.load_state_dict({**made.tensors, "weight": torch.empty(0)})
        torch.testing.assert_close(module.dense().double(), made.dense, rtol=1e-6, atol=1e-7)

    def test_the_same_input_gives_the_same_bits(self, text, shape):
        first, second = (parse_base(text).compress(weight(shape), gram(shape[1])) for _ in range(2))
        assert all(torch.equal(first.tensors[key], second.tensors[key]) for key in first.tensors)

    @pytest.mark.parametrize("kind", ["zero", "one row", "dead channels", "twice the same channel"])
    def test_singular_grams(self, text, shape, kind):
        metric = gram(shape[1])
        if kind == "zero":
            metric = torch.zeros_like(metric)
        elif kind == "one row":
            metric = gram(shape[1], rows=1)
        elif kind == "dead channels":
            metric[:, ::3] = 0
            metric[::3] = 0
        else:
            metric[1] = metric[0]
            metric[:, 1] = metric[:, 0]
        made = parse_base(text).compress(weight(shape), metric)
        assert torch.isfinite(made.dense).all()
        assert error(weight(shape), made.dense, torch.eye(shape[1], dtype=torch.float64)) < 20 * float(
            weight(shape).square().sum()
        )

    def test_degenerate_weights(self, text, shape):
        for matrix in (torch.zeros(shape), torch.full(shape, 0.5), -torch.full(shape, 0.5), weight(shape) * 1e-30):
            assert torch.isfinite(parse_base(text).compress(matrix, gram(shape[1])).dense).all()
        made = parse_base(text).compress(torch.zeros(shape), gram(shape[1]))
        assert not made.dense.any()

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_non_finite_input_is_an_arithmetic_error(self, text, shape, value):
        matrix, metric = weight(shape), gram(shape[1])
        matrix[1, 1] = value
        with pytest.raises(ArithmeticError):
            parse_base(text).compress(matrix, metric)
        metric[0, 0] = value
        with pytest.raises(ArithmeticError):
            parse_base(text).compress(weight(shape), metric)


@pytest.mark.parametrize("name", BASES.names())
def test_the_registry_entry_is_complete(name):
    cls = BASES.get(name)
    assert cls.paper.startswith("https://")
    assert parse_base(cls.example).text == cls.example


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rtn", "rtn:BITS:GROUP"),
        ("rtn:4", "rtn:BITS:GROUP"),
        ("rtn:5:64", "2, 3, 4, 8 bits"),
        ("rtn:4:0", "such as rtn:4:64"),
        ("gptq:four:64", "gptq:BITS:GROUP"),
        ("gptq:4:64:1", "gptq:BITS:GROUP"),
        ("wanda:4:8", "wanda:2:4 is possible"),
        ("magnitude", "magnitude:2:4 is possible"),
        ("ggml", "write ggml:TYPE"),
        ("ggml:Q4_K_M", "did you mean 'Q4_K'"),
        ("gtpq:4:64", "did you mean 'gptq'"),
        ("/nowhere", "does not exist: give the folder"),
    ],
)
def test_a_malformed_spec_says_what_to_write(text, message):
    with pytest.raises(InputError, match=message):
        parse_base(text)


def test_rows_that_are_no_whole_blocks_get_shorter_ones_or_stay_dense():
    base = parse_base("ggml:q2_k")
    assert base.text == "ggml:Q2_K"
    kinds = [base.spec((4, columns)) for columns in (512, 96, 40)]
    assert [spec.parameters.get("type") for spec in kinds] == ["Q2_K", "Q4_0", None]
    assert kinds[2].format == "dense"


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_rounding_to_nearest_errs_at_most_half_a_step(bits):
    matrix = weight((6, 50))
    made = parse_base(f"rtn:{bits}:8").compress(matrix, None)
    for start in range(0, 50, 8):
        grid = asymmetric_grid(matrix[:, start : start + 8].double(), bits)
        worst = (made.dense[:, start : start + 8] - matrix[:, start : start + 8]).abs().amax(1, keepdim=True)
        # The zero point and the scale are rounded too, which moves the ends of the range.
        assert (worst <= 1.05 * grid.scale).all()
        inside = grid.numbers(torch.arange(2**bits).double())
        assert (grid.rounded(inside) - inside).abs().max() < 1e-12


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("seed", range(3))
def test_gptq_errs_less_than_rounding_to_nearest(bits, act_order, seed):
    matrix, metric = weight((24, 96), seed), gram(96, seed)
    rounded = parse_base(f"rtn:{bits}:16").compress(matrix, metric)
    made = parse_base(f"gptq:{bits}:16", BaseOptions(act_order=act_order)).compress(matrix, metric)
    assert made.spec == rounded.spec
    assert error(matrix, made.dense, metric) < 0.8 * error(matrix, rounded.dense, metric)


@pytest.mark.parametrize("text", ["rtn:2:32", "rtn:3:32", "gptq:2:32"])
def test_the_clip_search_never_errs_more_on_the_weights(text):
    matrix, metric = weight((24, 96)), gram(96) if text.startswith("gptq") else torch.eye(96, dtype=torch.float64)
    whole, searched = (parse_base(text, BaseOptions(clip_search=s)).compress(matrix, metric) for s in (False, True))
    assert error(matrix, searched.dense, metric) <= error(matrix, whole.dense, metric)


def reference(matrix, metric, choose, damping=0.01):
    """OBS as in its derivation: after every column the inverse Hessian of the columns that are left, from scratch."""
    n = len(metric)
    hessian = metric + damping * metric.diagonal().mean() * torch.eye(n, dtype=torch.float64)
    left, chosen = matrix.double().clone(), torch.empty(matrix.shape, dtype=torch.float64)
    for column in range(n):
        inverse = torch.linalg.inv(hessian[column:, column:])
        chosen[:, column] = choose(left, column, inverse)
        difference = (left[:, column] - chosen[:, column]) / inverse[0, 0]
        left[:, column:] -= torch.outer(difference, inverse[0])
    return chosen


@pytest.mark.parametrize("group", [5, 16, 300])
def test_gptq_equals_an_unblocked_reference(group):
    n = 290  # several blocks of 128
    matrix, metric = weight((4, n)), gram(n)
    grids = {}

    def choose(left, column, _):
        if column % group == 0:
            grids["now"] = asymmetric_grid(left[:, column : column + group], 3)
        return grids["now"].rounded(left[:, column : column + 1])[:, 0]

    expected = reference(matrix, metric, choose)
    torch.testing.assert_close(
        parse_base(f"gptq:3:{group}").compress(matrix, metric).dense, expected, rtol=1e-6, atol=1e-8
    )


def test_gptq_in_the_order_of_the_inputs_equals_an_unblocked_reference():
    n, group = 40, 7
    shuffled = torch.randperm(n, generator=torch.Generator().manual_seed(2))
    matrix, metric = weight((4, n)), gram(n)[shuffled][:, shuffled]
    order = metric.diagonal().argsort(descending=True)
    grids = [asymmetric_grid(matrix[:, i : i + group].double(), 3) for i in range(0, n, group)]

    def choose(left, column, _):
        return grids[int(order[column]) // group].rounded(left[:, column : column + 1])[:, 0]

    expected = torch.empty(4, n, dtype=torch.float64)
    expected[:, order] = reference(matrix[:, order], metric[order][:, order], choose)
    made = parse_base(f"gptq:3:{group}", BaseOptions(act_order=True)).compress(matrix, metric)
    torch.testing.assert_close(made.dense, expected, rtol=1e-6, atol=1e-8)


def test_sparsegpt_equals_an_unblocked_reference():
    n = 150
    matrix, metric = weight((4, n)), gram(n)
    kept = {}

    def choose(left, column, inverse):
        if column % 4 == 0:
            # What a column's removal costs once those before it are fixed: w² over its own entry of the inverse.
            width = min(4, n - column)
            entries = torch.tensor(
                [float(torch.linalg.inv(torch.linalg.inv(inverse)[i:, i:])[0, 0]) for i in range(width)]
            )
            cost = left[:, column : column + width] ** 2 / entries
            kept["now"] = torch.zeros(4, width, dtype=torch.bool).scatter(1, cost.topk(2, dim=1).indices, True)
        return left[:, column] * kept["now"][:, column % 4]

    expected = reference(matrix, metric, choose)
    made = parse_base("sparsegpt:2:4").compress(matrix, metric)
    torch.testing.assert_close(made.dense, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_two_of_four_err_less_the_more_they_know(seed):
    matrix, metric = weight((24, 96), seed), gram(96, seed)
    errors = [error(matrix, parse_base(f"{n}:2:4").compress(matrix, metric).dense, metric)
              for n in ("magnitude", "wanda", "sparsegpt")]  # fmt: skip
    assert errors[1] <= errors[0] * 1.02
    assert errors[2] < 0.8 * errors[1]


def test_wanda_keeps_the_best_of_every_four_by_the_diagonal():
    matrix, metric = weight((3, 8)), gram(8)
    made = parse_base("wanda:2:4").compress(matrix, metric)
    for row in range(3):
        for start in (0, 4):
            scores = matrix[row, start : start + 4].abs() * metric.diagonal()[start : start + 4].sqrt()
            assert set((made.dense[row, start : start + 4] != 0).nonzero().flatten().tolist()) == set(
                scores.topk(2).indices.tolist()
            )


def test_a_sweep_does_not_depend_on_its_block():
    matrix, metric = weight((6, 50)), gram(50)
    factor = gram_factor(metric)
    results = [sweep(matrix, factor, block, lambda w, c: (w[:, c] * 40).round() / 40) for block in (1, 7, 50, 64)]
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=1e-9)


def test_an_indefinite_gram_is_an_arithmetic_error():
    with pytest.raises(ArithmeticError, match="not positive semidefinite"):
        gram_factor(torch.diag(torch.tensor([1.0, -50.0, 1.0], dtype=torch.float64)))
