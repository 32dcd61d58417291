"""The words that the parts share: a site, its cost curve, a stored weight's spec, and what a part must offer."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from lrcompress.errors import InputError
from lrcompress.grams import add, add_gram, no_rest, symmetric
from lrcompress.precision import exact, wide, widened


@dataclass(frozen=True)
class Site:
    """A weight to be compressed: `shape` is (out_features, in_features) whatever the layout on disk."""

    name: str
    shape: tuple[int, int]
    block: int
    group: str
    """Sites of one group read the same input and share one Gram."""
    bias: bool
    conv1d: bool = False
    """The weight lies transposed, (in, out), as in GPT-2's Conv1D."""
    kind: str = ""
    """Name inside the block, such as self_attn.q_proj: the row of the final table."""
    stored: "Spec | None" = None
    """How a weight lies that is compressed already and compressed further; its last level keeps it so."""
    itemsize: int | None = None
    """Bytes of a number of the weight where it stays dense, if not of the checkpoint's dtype."""
    by_outputs: bool = False
    """Statistics are of its outputs W x (without bias): fewer than its inputs, and all that the method asks for."""
    lookup: bool = False
    """The matrix of the input embeddings: a row is what a token is looked up as."""
    head: str | None = None
    """The output head that multiplies by the weight: a row makes a token's logit. Its own name but where `lookup`."""

    known_rank: int | None = None
    """The rank that it will be stored at, where that is decided before it is decomposed."""

    @property
    def of_tokens(self) -> bool:
        """Whether rows are tokens of the vocabulary, of which none is compared with another."""
        return self.lookup or self.head is not None

    def dense_bytes(self, element_size: int) -> int:
        """Bytes of the dense weight in a checkpoint of `element_size` bytes a number."""
        return self.shape[0] * self.shape[1] * (self.itemsize or element_size)


@dataclass(frozen=True)
class Spec:
    """How one weight is stored; with a dtype it determines every tensor's name and shape."""

    format: str
    shape: tuple[int, int]
    bias: bool = False
    added_bias: bool = False
    """The bias did not exist in the dense layer, so its bytes count."""
    conv1d: bool = False
    parameters: dict[str, Any] = field(default_factory=dict)
    """What the format declares, such as {"rank": 300}."""

    @property
    def rank(self) -> int:
        """Rank of a dense weight, or of the low-rank part of a stored one: 0 where it has none."""
        full = min(self.shape) if self.format == "dense" else 0
        return int(self.parameters.get("correction", self.parameters).get("rank", full))

    @property
    def owner(self) -> str | None:
        """Module that stores what this weight shares with it, None where everything is its own."""
        return self.parameters.get("shared")

    def following(self, owner: str) -> "Spec":
        """The spec of a weight like this one that finds what is shared in module `owner`."""
        return replace(self, parameters={**self.parameters, "shared": owner})

    def alone(self) -> "Spec":
        """The spec of the same weight with nothing shared."""
        return replace(self, parameters={k: v for k, v in self.parameters.items() if k != "shared"})

    def as_json(self) -> dict[str, Any]:
        """A JSON object; inverse of `from_json`."""
        data = asdict(self)
        parameters = data.pop("parameters")
        return {**{k: v for k, v in data.items() if v is not False}, "shape": list(self.shape), **parameters}

    @classmethod
    def from_json(cls, name: str, data: dict[str, Any]) -> "Spec":
        """Read a manifest entry of module `name`; a malformed one is an InputError."""
        try:
            rest = dict(data)
            shape = tuple(rest.pop("shape"))
            spec = cls(
                format=rest.pop("format"),
                shape=shape,  # type: ignore[arg-type]
                bias=rest.pop("bias", False),
                added_bias=rest.pop("added_bias", False),
                conv1d=rest.pop("conv1d", False),
                parameters=rest,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"manifest entry of {name} is malformed ({error}): write the checkpoint again") from error
        if len(shape) != 2 or not all(type(n) is int and 0 < n < 2**31 for n in shape):
            raise InputError(f"manifest entry of {name} has shape {shape}: two positive numbers are needed")
        if not all(type(flag) is bool for flag in (spec.bias, spec.added_bias, spec.conv1d)):
            raise InputError(f"manifest entry of {name} has a bias or layout that is neither true nor false")
        if not isinstance(spec.format, str):
            raise InputError(f"manifest entry of {name} has format {spec.format!r}: a name is needed")
        return spec


@dataclass
class Curve:
    """The choices for one site, cheapest first; the last one keeps the weight dense.

    ranks: (levels,) int64, the rank (or the format's own step) of each level; the last is the full rank.
    bytes: (levels,) int64, strictly increasing, everything that counts included.
    errors: (levels,) float64, squared error in the method's metric, or None before a decomposition.
    spectrum: (min(out, in),) float64, the weight's own singular values, descending, or None.
    """

    name: str
    ranks: Tensor
    bytes: Tensor
    dense_bytes: int
    errors: Tensor | None = None
    spectrum: Tensor | None = None


@dataclass
class Lookups:
    """What a text says of the matrix that its tokens are looked up in.

    counts: (vocabulary,) wide, how often each token was, with gradients a time whose gradient is of mean squared
    size being one; gradients: (width, width) wide second moment of the loss's gradients at the rows, None where none
    were gathered.
    """

    counts: Tensor
    gradients: Tensor | None = None


@dataclass
class InputStatistics:
    """Exact sums over the rows x of a layer's input: they add up across batches and processes.

    count: sum of the rows' weights w; total: (in,) `exact` sum of w x; second: (in, in) wide sum of w x xᵀ, in its
    upper triangle: what is below means nothing. With `of_outputs` it is the (out, out) sum of w y yᵀ, y = W x.
    rest: what rounding took from `second` where that is float32, to be added to it.
    gradients: wide second moment of the loss's gradient at the layer's output (out, out), or its diagonal (out,),
    where it was asked for.
    drift: (in, in) wide sum of w (d - x) xᵀ, where every row x has a counterpart d, the dense model's.
    lookups: of the input embeddings, which have no inputs; where a head multiplies by the same matrix, the others are
    the head's.
    rows: how many there were, whatever their weights; share: the part of the block's tokens that they count for, less
    than 1 for an expert's. reached: False where the loss has no gradient at the layer, so that `gradients` are made up.
    """

    count: float
    total: Tensor
    second: Tensor
    gradients: Tensor | None = None
    rest: Tensor | None = None
    drift: Tensor | None = None
    rows: int = 0
    share: float = 1.0
    of_outputs: bool = False
    reached: bool = True
    lookups: Lookups | None = None

    @classmethod
    def zeros(cls, features: int, device: torch.device | str = "cpu", outputs: int | None = None) -> "InputStatistics":
        """No rows seen yet; of `outputs` outputs where that is given."""
        size, device = features if outputs is None else outputs, torch.device(device)
        second = torch.zeros(size, size, dtype=wide(device), device=device)
        total = exact(second.new_zeros(features))
        return cls(0.0, total, second, rest=no_rest(second), of_outputs=outputs is not None)

    @classmethod
    def of(cls, site: Site, device: torch.device | str = "cpu") -> "InputStatistics":
        """No rows seen yet, of what is gathered for `site`."""
        return cls.zeros(site.shape[1], device, site.shape[0] if site.by_outputs else None)

    def update(
        self,
        rows: Tensor,
        weights: Tensor | None = None,
        dense: Tensor | None = None,
        outputs: Tensor | None = None,
    ) -> None:
        """Add `rows` (..., in), each counted `weights` (rows,) times (once if None); dense: their counterparts.

        outputs: (..., out) W x of every row, for statistics of outputs, whose products are summed in the wide dtype,
        others in float32 within a call.
        """
        rows = rows.detach().flatten(0, -2).float()
        if dense is not None:
            away = dense.detach().flatten(0, -2).float() - rows
            away = away if weights is None else away * weights[:, None]
            self.drift = (0.0 if self.drift is None else self.drift) + widened(away.T @ rows)
        self.rows += rows.shape[0]
        if weights is None:
            self.count += rows.shape[0]
            self.total += exact(rows.sum(0))
        else:
            self.count += float(weights.sum())
            self.total += exact(weights @ rows)
        if outputs is not None:
            # Rounded sums have directions that W has not, and its own weakest ones would drown in them.
            rows = widened(outputs.detach().flatten(0, -2))
        add_gram(self.second, rows if weights is None else rows * weights.sqrt()[:, None], self.rest)

    def merge(self, other: "InputStatistics") -> None:
        """Add the sums of another batch or process."""
        self.count += other.count
        self.rows += other.rows
        self.total += other.total
        add(self.second, other.second, self.rest)
        if self.rest is not None and other.rest is not None:
            self.rest += other.rest
        if other.drift is not None:
            self.drift = other.drift if self.drift is None else self.drift + other.drift

    def gradient_squares(self) -> Tensor:
        """(out,) mean squared gradient of every output; ValueError where none were gathered."""
        if self.gradients is None:
            raise ValueError("the metric needs the gradients of the loss")
        return self.gradients if self.gradients.dim() == 1 else self.gradients.diagonal()

    def mean(self) -> Tensor:
        """(in,) mean input, `exact`."""
        return self.total / self.count

    def mean_output(self, weight: Tensor) -> Tensor:
        """(out,) mean of W x, `exact`, for W (out, in)."""
        return exact(weight) @ self.mean()

    def gram(self, *, centred: bool = False) -> Tensor:
        """(in, in) second moment per row, or the covariance; ValueError where there are only those of outputs."""
        if self.of_outputs:
            raise ValueError("only the second moment of outputs was gathered")
        return self._moment(self.mean() if centred else None)

    def output_moment(self, weight: Tensor, *, centred: bool = False) -> Tensor:
        """(out, out) second moment per row of W x, or the covariance, for the weight W (out, in) that gave them."""
        assert self.of_outputs
        return self._moment(self.mean_output(weight) if centred else None)

    def _moment(self, mean: Tensor | None) -> Tensor:
        moment = exact(symmetric(self.second), None if self.rest is None else symmetric(self.rest)) / self.count
        if mean is not None:
            moment -= torch.outer(mean, mean)
            moment.diagonal().clamp_(min=0)  # rounding, where a number is always the same
        return moment.to(self.second.device, wide(self.second.device))


class TensorSource(Protocol):
    """A checkpoint that is read a tensor at a time."""

    def names(self) -> list[str]:
        """Names of all tensors."""
        ...

    def made(self) -> Collection[str]:
        """Those of the names that are the model's own already, whose tensors are made from what is stored."""
        ...

    def meta(self, name: str) -> Tensor:
        """A meta tensor of the stored shape and dtype."""
        ...

    def read(self, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """The named tensors, copied out of the files, each file opened once."""
        ...

    def will_read(self, names: Sequence[str]) -> None:
        """A hint that these tensors are the next."""
        ...


class Allocator(Protocol):
    """How many bytes for which weight."""

    name: ClassVar[str]
    needs_errors: ClassVar[bool]
    needs_spectrum: ClassVar[bool]
    needs_sensitivity: ClassVar[bool]
    """Errors are scaled by what cutting each weight was measured to cost (stages/sensitivity.py)."""

    def allocate(self, curves: Sequence[Curve], budget: int) -> dict[str, int]:
        """Level per site name, the sum of bytes at most `budget`; InputError where that is impossible."""
        ...
