"""LoRA adapters as PEFT saves them, read, checked and written without it; names and matching are those of peft 0.21."""

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrcompress.checkpoint.reader import CheckpointReader, read_json
from lrcompress.errors import InputError

CONFIG, STEM = "adapter_config.json", "adapter_model"
PREFIX = "base_model.model."

VARIANTS = ("use_dora", "use_qalora", "use_bdlora", "kasa_config", "monteclora_config", "arrow_config",
            "target_parameters")  # fmt: skip
"""Entries of the config that make an adapter compute something else than the scaled product of two matrices."""

HARMLESS_INITIALISATIONS = ("gaussian", "eva", "orthogonal")
"""Those that leave the base alone when an adapter is loaded."""


@dataclass(frozen=True)
class Lora:
    """The update `scaling` B A of one module; A (r, ...) and B (..., r) lie under the names `right` and `left`."""

    rank: int
    scaling: float
    left: str
    right: str
    shape: tuple[int, int] | None
    """(out, in) of a linear layer's weight, None for other layers, and for linear ones that must stay as they are."""


@dataclass(frozen=True)
class Adapter:
    """label: as the user named it; modules: every module with an update, in the order of their names.

    tied: linear modules whose factors are those of an embedding, transposed: PEFT holds both as one, so that one update
    is what both get.
    """

    label: str
    folder: Path
    config: dict[str, Any]
    reader: CheckpointReader
    modules: dict[str, Lora]
    tied: dict[str, str]

    @property
    def linear(self) -> dict[str, Lora]:
        """The updates of linear layers, by module."""
        return {name: lora for name, lora in self.modules.items() if lora.shape is not None}

    @property
    def kept(self) -> dict[str, tuple[int, float]]:
        """Rank and scaling of the updates of other layers, which stay as they are, by module."""
        moved, modules = self.tied.values(), self.modules.items()
        return {name: (lora.rank, lora.scaling) for name, lora in modules if lora.shape is None and name not in moved}

    @property
    def twins(self) -> dict[str, tuple[str, float]]:
        """The embedding that a linear module is tied to, with its scaling where the module's is 1, by module."""
        modules = self.modules
        return {name: (twin, modules[twin].scaling / modules[name].scaling) for name, twin in self.tied.items()}

    @property
    def others(self) -> list[str]:
        """Tensors that are no factor of a linear layer's update: of convolutions, embeddings, biases, whole modules."""
        factors = {name for module in self.linear for name in self._factor_names(module)}
        return [name for name in self.reader.names() if name not in factors]

    def _factor_names(self, module: str) -> list[str]:
        """The tensors that a module's update lies in, those of an embedding tied to it among them."""
        loras = [self.modules[name] for name in (module, self.tied.get(module)) if name is not None]
        return [name for lora in loras for name in (lora.left, lora.right)]

    def carried(self, name: str) -> Tensor:
        """A tensor of `others` for an adapter whose linear updates have scaling 1: a bias of a factor B is scaled."""
        tensor = self.reader.tensor(name)
        for lora in self.linear.values():
            if name == lora.left.removesuffix("weight") + "bias":
                return (lora.scaling * tensor.double()).to(tensor.dtype)
        return tensor

    def factors(self, module: str) -> tuple[Tensor, Tensor]:
        """left (out, r) and right (r, in), float64: their product is what the adapter adds to a linear weight."""
        lora = self.modules[module]
        return lora.scaling * self.reader.tensor(lora.left).double(), self.reader.tensor(lora.right).double()

    def bytes(self, module: str) -> int:
        """Stored bytes of a module's factors, and of their copy where an embedding is tied to it."""
        metas = [self.reader.meta(name) for name in self._factor_names(module)]
        return sum(meta.numel() * meta.itemsize for meta in metas)


def open_adapter(label: str) -> Adapter:
    """A folder that PEFT saved; InputError where it is no LoRA adapter whose updates are products of two factors."""
    folder = Path(label).expanduser()
    config = _read_config(folder, label)
    path = folder / f"{STEM}.safetensors"
    if not path.is_file():
        pickled = (folder / f"{STEM}.bin").exists()
        cure = "pickled weights are not read, save it with safetensors" if pickled else "save it again"
        raise InputError(f"adapter {label} has no {path.name}: {cure}")
    reader = CheckpointReader(folder, path.name)
    modules = {}
    for name in reader.names():
        if name.endswith((".lora_A.weight", ".lora_embedding_A")):
            module, lora = _lora(label, config, reader, name)
            modules[module] = lora
    if not modules:
        raise InputError(f"adapter {label} holds no update of a module: is it an adapter that PEFT saved?")
    tied, apart = _tied(config, reader, modules)
    modules |= {name: replace(modules[name], shape=None) for name in apart}
    return Adapter(label, folder, config, reader, modules, tied)


def _tied(
    config: dict[str, Any], reader: CheckpointReader, modules: dict[str, Lora]
) -> tuple[dict[str, str], list[str]]:
    """See Adapter.tied; and linear modules that may be tied to an embedding whose factors differ.

    ensure_weight_tying makes PEFT give both the same rank. It keeps them equal in float32 only: of a base in half
    precision both are trained apart, and neither can be truncated without the other.
    """
    tied: dict[str, str] = {}
    apart: list[str] = []
    embeddings = {name: lora for name, lora in modules.items() if lora.right.endswith(".lora_embedding_A")}
    if not config.get("ensure_weight_tying"):
        return tied, apart
    for twin, embedding in embeddings.items():
        for name, lora in modules.items():
            halves = [(embedding.left, lora.right), (embedding.right, lora.left)]
            if lora.shape is None or any(reader.meta(a).T.shape != reader.meta(b).shape for a, b in halves):
                continue
            if all(torch.equal(reader.tensor(a).T, reader.tensor(b)) for a, b in halves):
                tied[name] = twin
            else:
                apart.append(name)
    return tied, apart


def _read_config(folder: Path, label: str) -> dict[str, Any]:
    if not folder.is_dir():
        raise InputError(f"adapter {label} is no folder: give the folder that PEFT saved")
    path = folder / CONFIG
    if not path.is_file():
        raise InputError(f"{label} has no {CONFIG}: give the folder of an adapter that PEFT saved")
    config = read_json(path)
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "LORA":
        raise InputError(f"adapter {label} is of the kind {kind!r}: only LORA is two factors a weight")
    for key in VARIANTS:
        if config.get(key):
            raise InputError(
                f"adapter {label} has {key} in its config: its update is not the product of two factors alone, "
                "so that a truncation of these is not what it says; merge it, or train a plain LoRA"
            )
    initial = config.get("init_lora_weights", True)
    if isinstance(initial, str) and initial not in HARMLESS_INITIALISATIONS:
        raise InputError(
            f"adapter {label} has init_lora_weights {initial!r}, which changes the base by the adapter's rank when it "
            "is loaded: convert it to a plain LoRA first (path_initial_model_for_weight_conversion of save_pretrained)"
        )
    return config  # type: ignore[no-any-return]


def _lora(label: str, config: dict[str, Any], reader: CheckpointReader, right: str) -> tuple[str, Lora]:
    """The update that the tensor A named `right` belongs to, and its module."""
    stem, leaf = right.rsplit(".lora_", 1)
    if not stem.startswith(PREFIX):
        raise InputError(f"adapter {label} holds {right}, PEFT's names begin with {PREFIX}: save it with PEFT")
    module, left = stem.removeprefix(PREFIX), f"{stem}.lora_{leaf.replace('A', 'B', 1)}"
    if left not in reader.names():
        raise InputError(f"adapter {label} has {right} without {left}: it is damaged")
    a, b = reader.meta(right), reader.meta(left)
    linear = leaf == "A.weight" and a.dim() == b.dim() == 2
    rank = looked_up(config.get("rank_pattern"), module, config.get("r"), label)
    alpha = looked_up(config.get("alpha_pattern"), module, config.get("lora_alpha"), label)
    tied = bool(config.get("ensure_weight_tying"))  # factors of an embedding keep its rank, whatever the config says
    if a.shape[0] != b.shape[1] or (rank != a.shape[0] and not tied):
        raise InputError(
            f"adapter {label} has factors {tuple(a.shape)} and {tuple(b.shape)} for {module}, its config says rank "
            f"{rank:g}: its config and its files do not belong together"
        )
    scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    shape = (int(b.shape[0]), int(a.shape[1])) if linear else None
    return module, Lora(int(a.shape[0]), scaling, left, right, shape)


def looked_up(patterns: Any, module: str, default: Any, label: str) -> float:
    """The value of `module` in a rank_pattern or alpha_pattern: that of the first key which ends its name."""
    found = default
    try:
        for key, value in dict(patterns or {}).items():
            if re.match(rf"(.*\.)?({key})$", module):
                found = value
                break
    except (re.error, TypeError, ValueError) as error:
        raise InputError(f"the patterns of adapter {label} cannot be read ({error})") from error
    if isinstance(found, bool) or not isinstance(found, (int, float)) or not found > 0:
        raise InputError(f"the config of adapter {label} has {found!r} as rank or alpha of {module}")
    return found
