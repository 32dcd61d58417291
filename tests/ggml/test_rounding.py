"""Rounding onto block types: the compiled code and the plain one, the loss against gguf's own rounding, exact cases."""

import gguf
import pytest
import torch
from gguf.quants import quantize

from lrcompress.ggml.plain import round_in_strips
from lrcompress.ggml.rounding import make_metric, round_weight
from lrcompress.ggml.types import BLOCK_TYPES
from lrcompress.ggml.vectors import Vectors, Weighing
from lrcompress.kernels.native import library
from lrcompress.linalg.two_sided import unit_factor

KINDS = list(BLOCK_TYPES)
ROWS, COLUMNS = 6, 512


def problem(rows: int = ROWS, columns: int = COLUMNS) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight with some large entries, and Grams of correlated inputs and outputs."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=draw) * torch.randn(columns, generator=draw).exp()

    def gram(size: int) -> torch.Tensor:
        mix = torch.randn(size, size // 3, generator=draw) * torch.randn(size, 1, generator=draw).exp()
        return (mix @ mix.T + torch.eye(size) * 0.1).double()

    return weight, gram(columns), gram(rows)


def loss(error: torch.Tensor, inputs: torch.Tensor, outputs: torch.Tensor | None = None) -> float:
    error = error.double()
    left = error if outputs is None else outputs @ error
    return float(((left @ inputs) * error).sum())


@pytest.mark.parametrize("name", KINDS)
def test_compiled_and_plain_code_find_the_same(name: str) -> None:
    if library("blocks") is None:
        pytest.skip("no compiler")
    kind = BLOCK_TYPES[name]
    weight, inputs, outputs = problem()
    order = outputs.diagonal().argsort(descending=True, stable=True)
    # Where neighbours say nearly the same, feedback makes errors of float32 large, and an entry moves eight numbers.
    damping = 0.01 if kind.book is None else 1.0
    metric = make_metric(inputs, outputs[order][:, order], kind.run, damping, 0.1)
    plain = kind.pack(round_in_strips(kind, weight[order][:1], metric, 0)).reshape(1, -1)
    compiled = round_weight(kind, weight, inputs, outputs, damping=damping, rounds=1, passes=0)[order]
    # Sums are added up in another order: a scale may be a float16 further, and all that follows with it.
    assert (plain[0] == compiled[0]).double().mean() > 0.9
    metric = make_metric(inputs, None, kind.run, 0.01, 0.1)
    plain = kind.pack(round_in_strips(kind, weight, metric, 2)).reshape(ROWS, -1)
    compiled = round_weight(kind, weight, inputs, rounds=1, passes=2)
    both = [loss(kind.dense(packed) - weight, inputs) for packed in (plain, compiled)]
    assert both[0] == pytest.approx(both[1], rel=0.1)


@pytest.mark.parametrize("name", KINDS)
def test_every_side_of_the_metric_lowers_its_loss(name: str) -> None:
    kind = BLOCK_TYPES[name]
    weight, inputs, outputs = problem()
    plain, one, both = (
        loss(kind.dense(round_weight(kind, weight, *grams)) - weight, inputs, outputs)
        for grams in ((None, None), (inputs, None), (inputs, outputs))
    )
    assert both < one < plain


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4"])
def test_the_loss_is_below_that_of_gguf(name: str) -> None:
    kind = BLOCK_TYPES[name]
    weight, inputs, _ = problem()
    theirs = torch.from_numpy(quantize(weight.numpy(), gguf.GGMLQuantizationType[name]))
    ours = round_weight(kind, weight, inputs)
    assert loss(kind.dense(ours) - weight, inputs) < 0.6 * loss(kind.dense(theirs) - weight, inputs)
    plain = round_weight(kind, weight)
    assert (kind.dense(plain) - weight).norm() < (kind.dense(theirs) - weight).norm()


@pytest.mark.parametrize("name", KINDS)
def test_more_passes_and_rounds_never_raise_the_loss(name: str) -> None:
    if library("blocks") is None:
        pytest.skip("no compiler")
    kind = BLOCK_TYPES[name]
    weight, inputs, outputs = problem()
    found = [
        loss(
            kind.dense(round_weight(kind, weight, inputs, outputs, damping=0, output_damping=0, rounds=r, passes=p))
            - weight,
            inputs,
            outputs,
        )
        for r, p in ((1, 4), (2, 4), (4, 4))
    ]
    assert found[2] <= found[1] * 1.0001 <= found[0] * 1.0002


@pytest.mark.parametrize("name", KINDS)
def test_rows_of_zeros_and_of_one_number_are_kept(name: str) -> None:
    kind = BLOCK_TYPES[name]
    weight = torch.zeros(3, COLUMNS)
    weight[1] = 0.5
    weight[2, 7] = -3.0
    dense = kind.dense(round_weight(kind, weight))
    assert bool((dense[0] == 0).all())
    torch.testing.assert_close(dense[1], weight[1], rtol=0.02, atol=0)
    if kind.book is None:
        torch.testing.assert_close(dense[2], weight[2], rtol=0.02, atol=0.03)  # IQ4_NL has no zero
    assert (dense[2] - weight[2]).norm() < weight[2].norm()


BOOKS = [name for name in KINDS if BLOCK_TYPES[name].book is not None]


@pytest.mark.parametrize("name", BOOKS)
def test_eight_neighbours_get_nearly_the_best_entries_and_signs_of_all(name: str) -> None:
    """Against all of them; groups of four that have nothing to do with each other but for the sum of their signs."""
    kind = BLOCK_TYPES[name]
    assert kind.book is not None
    book, draw, scale = kind.book(), torch.Generator().manual_seed(0), 0.7
    vectors = Vectors(book, torch.tensor(kind.levels[book.base :]))
    target = torch.randn(30, 8, generator=draw) * 2
    gram = torch.zeros(8, 8, dtype=torch.float64)
    groups = [slice(start, start + book.width) for start in range(0, 8, book.width)]
    for group in groups:
        mix = torch.randn(book.width, book.width, generator=draw).double() * 0.4 + torch.eye(book.width)
        gram[group, group] = mix @ mix.T
    weighing = Weighing(*(part.float() for part in unit_factor(gram, 0.0)))
    sizes = torch.full((30,), scale)
    found = vectors.nearest(target, sizes, weighing)
    signs = 1 - 2 * (torch.arange(2**book.width)[:, None] >> torch.arange(book.width) & 1)
    best = torch.empty(len(groups), 2, 30)  # by the parity of the signs
    for index, group in enumerate(groups):
        own = weighing.part(group.start, group.stop)
        for parity, sign in enumerate((1, -1)):
            every = (vectors.entries[:, None] * signs[signs.prod(1) == sign]).flatten(0, 1) * scale
            best[index, parity] = torch.stack([own.loss(every - row).min() for row in target[:, group]])
    if book.even:
        least = best.sum(0).min(0).values if len(groups) > 1 else best[0, 0]
        assert bool(((found < 0).sum(1) % 2 == 0).all())
    else:
        least = best.min(1).values.sum(0)
    loss = weighing.loss(found * scale - target)
    assert bool((loss >= least * 0.999).all())
    assert float(loss.mean()) <= 1.3 * float(least.mean())
