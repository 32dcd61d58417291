"""How to train: what a command line or a recipe asked for, checked."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from lrcompress.errors import InputError, nearest
from lrcompress.formats.base import spec_numbers
from lrcompress.formats.coded import Coded
from lrcompress.formats.quantized import Quantized
from lrcompress.formats.table import Table
from lrcompress.protocols import Spec
from lrcompress.training.choices import CHOICES, is_low_rank_component
from lrcompress.training.optimizers import OPTIMIZERS

AUTO = "auto"
DISTILLATIONS = ("none", "logits", "features")

RATES = {
    "factors": 3e-4,
    "lrc": 3e-4,
    "singular-values": 1e-2,
    "principal": 3e-4,
    "norms": 3e-3,
    "scales": 2e-3,
    "all": 1e-4,
}
"""Learning rates of adamw by what is trained, for models of about 100 M parameters; larger ones take smaller."""

LOW_SHARE = 0.1
"""Of the stored numbers, in weights that lost half of their rank, from which these alone are trained."""

PAIR_RATES = {"lora-pro": 1e-4, "scaled": 3e-4}
"""Learning rates of the other optimisers: lora-pro's is a step of the weight's entries, not of the factors'."""


@dataclass(frozen=True)
class Settings:
    """One of steps, tokens and minutes may be given; without them the rows are read once.

    lr: the highest learning rate, None for the default of what is trained. batch: rows of one process's forward pass;
    accumulate: forward passes per step. train and distill: `settled` replaces auto. dtype: of computations; auto is
    float32 on a CPU and bfloat16 elsewhere. gradient_checkpointing: keep what enters a block, and compute the rest
    again on the way back.
    """

    train: str = AUTO
    optimizer: str = "adamw"
    distill: str = AUTO
    lr: float | None = None
    steps: int | None = None
    tokens: int | None = None
    minutes: float | None = None
    batch: int = 4
    accumulate: int = 1
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    load_4bit: bool = False
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        for option, name, known in (
            ("train", self.train, [*CHOICES, AUTO]),
            ("optimizer", self.optimizer, list(OPTIMIZERS)),
            ("distill", self.distill, [*DISTILLATIONS, AUTO]),
        ):
            if name not in known:
                raise InputError(f"--{option} {name!r} is unknown: {nearest(name, known)}")
        given = [f"--{k} {v}" for k in ("steps", "tokens", "minutes") if (v := getattr(self, k)) is not None]
        if len(given) > 1:
            raise InputError(f"{' and '.join(given)}: give one of them")
        for key in ("steps", "tokens", "minutes", "lr", "batch", "accumulate"):
            value = getattr(self, key)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise InputError(f"--{key} {value} must be above zero")
        if self.dtype not in ("auto", "float32", "bfloat16"):
            raise InputError(f"--compute-dtype {self.dtype!r} cannot be trained in: auto, float32, bfloat16")
        if self.load_4bit and self.train in ("principal", "all"):
            raise InputError(f"--load-4bit quantises what is frozen, --train {self.train} trains it: leave one out")

    def settled(self, stored: Mapping[str, Spec]) -> "Settings":
        """With what auto stands for in a checkpoint of such weights.

        That is scales against the dense model's logits where weights have integer codes; else, on the text, the factors
        of weights that lost half of their rank, where these hold LOW_SHARE of all numbers, for they move the loss most
        in a given time (docs/healing.md); else all factors.
        """
        formats = {spec.parameters.get("base", {}).get("format", spec.format) for spec in stored.values()}
        coded = bool(formats & {Coded.name, Table.name, Quantized.name})
        low = filter(is_low_rank_component, stored.values())
        few = sum(map(spec_numbers, low)) < LOW_SHARE * sum(map(spec_numbers, stored.values()))
        chosen = "scales" if coded else "factors" if few else "lrc"
        train = chosen if self.train == AUTO else self.train
        distill = ("logits" if train == "scales" else "none") if self.distill == AUTO else self.distill
        return replace(self, train=train, distill=distill)

    @property
    def rate(self) -> float:
        """The learning rate."""
        return self.lr or PAIR_RATES.get(self.optimizer, RATES[self.train])
