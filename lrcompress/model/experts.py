"""Mixture-of-experts layers as one linear layer per expert and projection, and back.

transformers 5 holds the experts of a layer in three-dimensional parameters and multiplies all of them in one call. As
linear layers they are weights like any other: they have inputs of their own, formats, and names on disk.
"""

import copy
from collections.abc import Collection, Iterable, Iterator

import torch
from torch import Tensor, nn

from lrcompress.meta import on_meta
from lrcompress.model.skeleton import Renaming, tied_names

INTERLEAVED, FLAGS = "is_concatenated", ("is_transposed", "has_bias", "has_gate")


def is_fused(module: nn.Module) -> bool:
    """Whether `module` holds experts as transformers' `use_experts_implementation` describes them, and nothing else."""
    if not all(hasattr(module, flag) for flag in (INTERLEAVED, *FLAGS)) or getattr(
        module, "has_post_expert_norm", False
    ):
        return False
    names = {_first(module), "down_proj"}
    wanted = names | {f"{name}_bias" for name in names} if module.has_bias else names
    own = dict(module.named_parameters())
    return own.keys() == wanted and all(own[name].dim() == 3 for name in names) and not list(module.named_buffers())


def _first(module: nn.Module) -> str:
    return "gate_up_proj" if module.has_gate else "up_proj"


class Expert(nn.Module):
    """One expert: gate_proj (where it has a gate) and up_proj (inner, hidden), down_proj (hidden, inner)."""

    def __init__(self, hidden: int, inner: int, fused: nn.Module) -> None:
        super().__init__()
        options = {"bias": bool(fused.has_bias), "dtype": fused.down_proj.dtype}
        if fused.has_gate:
            self.gate_proj = nn.Linear(hidden, inner, **options)  # type: ignore[arg-type]
        self.up_proj = nn.Linear(hidden, inner, **options)  # type: ignore[arg-type]
        self.down_proj = nn.Linear(inner, hidden, **options)  # type: ignore[arg-type]


class LinearExperts(nn.Module):
    """The experts of `fused`, a layer's fused module, as submodules 0, 1, ...; called as that is, with equal results.

    `fused` itself stays, on the meta device and no submodule, for its activation and for the way back.
    """

    def __init__(self, fused: nn.Module) -> None:
        super().__init__()
        self.fused = (fused.to("meta"),)
        count, rows, columns = fused.down_proj.shape  # type: ignore[misc,union-attr]
        inner, hidden = (rows, columns) if fused.is_transposed else (columns, rows)
        self.count = int(count)  # type: ignore[call-overload]
        with on_meta():
            for index in range(self.count):
                self.add_module(str(index), Expert(hidden, inner, fused))  # type: ignore[arg-type]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Tokens (tokens, hidden), the experts each is sent to (tokens, k) and their weights to (tokens, hidden)."""
        output = torch.zeros_like(hidden_states)
        for index in top_k_index.unique().tolist():
            if index < self.count:  # a larger one stands for no expert
                tokens, places = torch.where(top_k_index == index)
                result = self._expert(index, hidden_states[tokens]) * top_k_weights[tokens, places, None]
                output.index_add_(0, tokens, result.to(output.dtype))
        return output

    def _expert(self, index: int, x: Tensor) -> Tensor:
        fused, expert = self.fused[0], self.get_submodule(str(index))
        up = expert.up_proj(x)  # type: ignore[operator]
        if not fused.has_gate:
            inner = fused.act_fn(up)  # type: ignore[operator]
        else:
            gate = expert.gate_proj(x)  # type: ignore[operator]
            inner = fused._apply_gate(_join(gate, up, fused))  # type: ignore[operator]
        result: Tensor = expert.down_proj(inner)  # type: ignore[operator]
        return result

    def mark(self, names: Iterable[str]) -> None:
        """Register empty buffers under these names of fused weights, as a stored format has it for its weight."""
        for name in names:
            self.register_buffer(name, torch.empty(0, dtype=self.fused[0].get_parameter(name).dtype))

    def fused_weights(self) -> list[str]:
        """Names of the fused parameters that are no biases."""
        return [name for name, parameter in self.fused[0].named_parameters() if parameter.dim() == 3]

    def fused_shapes(self) -> dict[str, torch.Size]:
        """Shape of every fused parameter by its name."""
        return {name: parameter.shape for name, parameter in self.fused[0].named_parameters()}

    def tensors_of(self, name: str) -> list[str]:
        """Names, in an expert, of the tensors that fused parameter `name` holds."""
        leaf = "bias" if name.endswith("_bias") else "weight"
        stem = name.removesuffix("_bias")
        return [f"{part}.{leaf}" for part in (("gate_proj", "up_proj") if stem == "gate_up_proj" else (stem,))]

    def fusable(self) -> bool:
        """Whether every expert is linear layers with a bias where the fused module has one."""
        layers = [layer for name, layer in self.named_modules() if name.count(".") == 1]
        return all(type(layer) is nn.Linear and (layer.bias is not None) == self.fused[0].has_bias for layer in layers)

    @torch.no_grad()
    def as_fused(self) -> nn.Module:
        """The fused module with these weights."""
        fused = copy.deepcopy(self.fused[0])
        for name in self.fused_shapes():
            slices = [
                self.join(name, {key: expert.get_parameter(key) for key in self.tensors_of(name)})
                for expert in self.children()
            ]
            setattr(fused, name, nn.Parameter(torch.stack(slices)))
        return fused.train(self.training)

    def split(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """One expert's tensors, by their names in it, from its slice of fused parameter `name`."""
        tensor = tensor.T if self.fused[0].is_transposed and tensor.dim() == 2 else tensor
        keys = self.tensors_of(name)
        if len(keys) == 1:
            parts: Iterable[Tensor] = [tensor]
        else:
            parts = tensor.chunk(2) if self.fused[0].is_concatenated else (tensor[::2], tensor[1::2])
        return {key: part.contiguous() for key, part in zip(keys, parts, strict=True)}

    def join(self, name: str, tensors: dict[str, Tensor]) -> Tensor:
        """One expert's slice of fused parameter `name`: the inverse of `split`."""
        parts = [tensors[key] for key in self.tensors_of(name)]
        if len(parts) == 1:
            tensor = parts[0]
        else:
            tensor = torch.cat(parts) if self.fused[0].is_concatenated else torch.stack(parts, 1).flatten(0, 1)
        return (tensor.T if self.fused[0].is_transposed and tensor.dim() == 2 else tensor).contiguous()


def _join(gate: Tensor, up: Tensor, fused: nn.Module) -> Tensor:
    """The output of both projections as `fused` lays it out, (rows, 2 inner)."""
    return torch.cat([gate, up], -1) if fused.is_concatenated else torch.stack([gate, up], -1).flatten(-2)


def linearise(model: nn.Module, only: Collection[str] | None = None) -> dict[str, LinearExperts]:
    """Put LinearExperts in the place of every fused module, or of those named in `only`; returns them by name.

    Those of another module too stay fused: they could not be compressed by themselves.
    """
    tied = {name.rpartition(".")[0] for name in tied_names(model)}
    names = [name for name, module in model.named_modules() if is_fused(module) and name not in tied]
    made = {name: LinearExperts(model.get_submodule(name)) for name in names if only is None or name in only}
    for name, module in made.items():
        model.set_submodule(name, module)
    return made


def fuse(model: nn.Module) -> None:
    """Put fused modules back in the place of LinearExperts, but for those whose experts have more than these hold."""
    for name, module in linear_experts(model).items():
        if module.fusable():
            model.set_submodule(name, module.as_fused())


def linear_experts(model: nn.Module) -> dict[str, LinearExperts]:
    """Name to module of all that `linearise` has made."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LinearExperts)}


def stand_ins(model: nn.Module, compressed: Iterable[str]) -> dict[str, list[str]]:
    """Modules that hold one of the layers `compressed`: the fused weights that an empty tensor must stand for on disk.

    Those stop a load that does not know of linear layers here. In some architectures transformers makes the fused
    weights from tensors that are called like these layers' are: then the empty weights of compressed ones stop it.
    """
    modules, renaming = linear_experts(model), Renaming(model)
    holders = dict.fromkeys(holder for name in compressed if (holder := experts_of(name, modules)) is not None)
    found = {}
    for holder in holders:
        fused = {f"{holder}.{key}": key for key in modules[holder].fused_weights()}
        made = any(renaming(f"{holder}.0.{part}.weight", fused)[0] in fused for part in ("up_proj", "down_proj"))
        found[holder] = [] if made else list(fused.values())
    return found


def experts_of(name: str, modules: Iterable[str]) -> str | None:
    """The one of `modules` that holds the module or tensor `name`."""
    names = set(modules)
    return next((parent for parent in _parents(name) if parent in names), None)


def _parents(name: str) -> Iterator[str]:
    parts = name.split(".")
    return (".".join(parts[:length]) for length in range(1, len(parts)))
