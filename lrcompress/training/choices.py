"""Which tensors of a loaded checkpoint are trained, by name of the choice."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lrcompress.checkpoint.reader import CheckpointReader
from lrcompress.errors import InputError
from lrcompress.formats import StoredLinear
from lrcompress.formats.coded import CodedWeight
from lrcompress.formats.low_rank import LowRank
from lrcompress.formats.pivoted import Pivoted
from lrcompress.formats.quantized import Quantized
from lrcompress.formats.sum import Sum
from lrcompress.linalg.eigen import eigh
from lrcompress.linalg.truncation import retruncate
from lrcompress.model.skeleton import find_blocks
from lrcompress.model.surgery import stored_layers
from lrcompress.precision import widened
from lrcompress.protocols import Spec
from lrcompress.training.parametrised import Entries, Fractions, SingularValues, Stored
from lrcompress.training.trainable import Grids, Made, Pair, Plain, Trainable, parametrise

PRINCIPAL_SHARE = 0.05
"""LIFT trains the largest entries after rank reduction, this share of them (arXiv 2506.00772)."""

PRINCIPAL_RANK = 1 / 8
"""Rank that a dense weight is reduced to before its largest entries are looked for, of its full rank."""


def choose(model: nn.Module, what: str, reader: CheckpointReader) -> Trainable:
    """Set up `model`, loaded from the files of `reader`, so that only what `what` names is trained, in float32."""
    model.requires_grad_(False)
    found = Trainable(model)
    CHOICES[what](found, reader)
    if not found.count:
        raise InputError(f"--train {what} finds nothing to train in this checkpoint: {NOTHING[what]}")
    return found


def _train(found: Trainable, reader: CheckpointReader, name: str) -> None:
    """Mark the parameter `name` as trained, with a float32 master copy."""
    parameter = found.model.get_parameter(name)
    parameter.data = parameter.data.float()
    found.stored[name] = Plain(parameter, reader.meta(name).dtype)
    parameter.requires_grad_(True)


def _train_factors(found: Trainable, reader: CheckpointReader, layers: dict[str, StoredLinear]) -> None:
    for stem, layer in layers.items():
        for name in layer.factor_names():
            _train(found, reader, f"{stem}.{name}")
        if (pair := layer.factor_pair()) is not None:
            left, right = (layer.get_parameter(name) for name in (pair.left, pair.right))
            found.pairs.append(Pair(left, right, pair.pivoted))


def _factors(found: Trainable, reader: CheckpointReader) -> None:
    _train_factors(found, reader, stored_layers(found.model))


def is_low_rank_component(spec: Spec) -> bool:
    """WeLore's rule (arXiv 2407.11239): where half of its rank or more has gone; of factors that are its own."""
    own = spec.format in (LowRank.name, Pivoted.name) and spec.owner is None
    return own and 2 * spec.rank <= min(spec.shape)


def _low_rank_components(found: Trainable, reader: CheckpointReader) -> None:
    layers = stored_layers(found.model)
    _train_factors(found, reader, {name: layer for name, layer in layers.items() if is_low_rank_component(layer.spec)})


def _singular_values(found: Trainable, reader: CheckpointReader) -> None:
    layers = stored_layers(found.model)
    followed = {layer.spec.owner for layer in layers.values()}
    for stem, layer in layers.items():
        pair = layer.factor_pair()
        if pair is None:
            if isinstance(layer, Sum):
                _train(found, reader, f"{stem}.scale")  # of the components of a correction in codes
            continue
        left, right = (layer.get_parameter(name) for name in (pair.left, pair.right))
        left.data, right.data = left.data.float(), right.data.float()
        if pair.pivoted:
            unfolded = torch.cat([torch.eye(len(right), dtype=left.dtype, device=left.device), left.detach()])
            spectrum = retruncate(unfolded, right.detach())
            made = SingularValues(spectrum.left[: len(right)].float(), spectrum.right.float())
        elif stem in followed:  # others multiply by the right factor too: its own singular values move, as it lies
            spectrum = retruncate(torch.eye(len(right), dtype=right.dtype, device=right.device), right.detach())
            made = SingularValues(spectrum.left.float(), spectrum.right.float())
        else:
            spectrum = retruncate(left.detach(), right.detach())
            balanced = LowRank.encode(spectrum.left, spectrum.right, None)
            left.data = balanced["B.weight"].to(left.device, left.dtype)
            made = SingularValues(None, balanced["A.weight"].to(right.dtype))
            found.stored[f"{stem}.{pair.left}"] = Plain(left, reader.meta(f"{stem}.{pair.left}").dtype)
        _parametrise(found, reader, f"{stem}.{pair.right}", made)


def _parametrise(found: Trainable, reader: CheckpointReader, name: str, made: Stored) -> None:
    module, _, leaf = name.rpartition(".")
    owner = found.model.get_submodule(module)
    parametrise(owner, leaf, made)
    found.stored[name] = Made(owner, leaf, reader.meta(name).dtype)


def _principal(found: Trainable, reader: CheckpointReader) -> None:
    for name in dense_weights(found.model):
        weight = found.model.get_parameter(name)
        weight.data = weight.data.float()
        reduced = _rank_reduced(weight.detach(), max(1, round(PRINCIPAL_RANK * min(weight.shape))))
        count = max(1, round(PRINCIPAL_SHARE * weight.numel()))
        index = reduced.abs().flatten().topk(count, sorted=False).indices.sort().values
        _parametrise(found, reader, name, Entries(weight.detach().clone(), index))


def _rank_reduced(weight: Tensor, rank: int) -> Tensor:
    """The nearest matrix of that rank."""
    tall = widened(weight if weight.shape[0] >= weight.shape[1] else weight.T)
    basis = eigh(tall.T @ tall)[1][:, -rank:]
    reduced = (tall @ basis) @ basis.T
    return reduced if weight.shape[0] >= weight.shape[1] else reduced.T


def dense_weights(model: nn.Module) -> list[str]:
    """Names of the weights of the blocks' linear layers that no format stores."""
    from transformers.pytorch_utils import Conv1D

    blocks = tuple(block + "." for block in find_blocks(model))
    stored = tuple(name + "." for name in stored_layers(model))
    return [
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and name.startswith(blocks) and not f"{name}.".startswith(stored)
    ]


def _norms(found: Trainable, reader: CheckpointReader) -> None:
    stored = tuple(name + "." for name in stored_layers(found.model))
    for stem, module in found.model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if own and all(p.dim() == 1 for p in own.values()) and not f"{stem}.".startswith(stored):
            for name in own:
                _train(found, reader, f"{stem}.{name}")


def _scales(found: Trainable, reader: CheckpointReader) -> None:
    """Where codes are kept, all that is free to train: scales, corrections and biases, by fractions, and the norms."""
    for stem, module in [*found.model.named_modules()]:
        if isinstance(module, CodedWeight):
            module.train_scales()
            found.stored[f"{stem}.scales"] = Grids(module)
        elif isinstance(module, Quantized):
            _fractions(found, reader, f"{stem}.scale")
        elif isinstance(module, Sum) and isinstance(module.base, Quantized):
            for leaf in ("A.weight", "B.weight") if module.bits == 16 else ("scale",):
                _fractions(found, reader, f"{stem}.{leaf}")
        else:
            continue
        if module.bias is not None:
            _train(found, reader, f"{stem}.bias")
    if found.stored:
        _norms(found, reader)
        _copy_outputs_that_are_changed(found.model)


def _copy_outputs_that_are_changed(model: nn.Module) -> None:
    """Some models clip what a layer gives in place (`clip_qkv`): autograd says so."""
    ids = torch.zeros(1, 2, dtype=torch.int64, device=next(model.parameters()).device)
    try:
        # What is trained is float32 by now, whatever the rest is.
        with torch.enable_grad(), torch.autocast(ids.device.type, torch.bfloat16):
            model(input_ids=ids, use_cache=False).logits.sum().backward()
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        for module in model.modules():
            if isinstance(module, CodedWeight):
                module.copies_output = True
    model.zero_grad()


def _fractions(found: Trainable, reader: CheckpointReader, name: str) -> None:
    parameter = found.model.get_parameter(name)
    parameter.data = parameter.data.float()
    _parametrise(found, reader, name, Fractions(parameter.detach().clone()))


def _everything(found: Trainable, reader: CheckpointReader) -> None:
    layers = stored_layers(found.model)
    _train_factors(found, reader, layers)
    stored, present = tuple(name + "." for name in layers), set(reader.names())
    for name, parameter in found.model.named_parameters(remove_duplicate=False):
        # A tied tensor lies in the files under one of its names.
        if not parameter.requires_grad and not name.startswith(stored) and name in present:
            _train(found, reader, name)


Choose = Callable[[Trainable, CheckpointReader], Any]
CHOICES: dict[str, Choose] = {
    "factors": _factors,
    "lrc": _low_rank_components,
    "singular-values": _singular_values,
    "principal": _principal,
    "norms": _norms,
    "scales": _scales,
    "all": _everything,
}
NOTHING = {
    "factors": "its weights are all quantised; use --train norms",
    "lrc": "no factorised weight lost half of its rank; use --train factors",
    "singular-values": "no weight has a low-rank part; use --train factors",
    "principal": "no weight of its blocks is dense; use --train factors",
    "scales": "none of its weights has integer codes with scales; use --train factors",
    "norms": "it has no normalisation with weights; use --train factors",
    "all": "it has no floating-point weights",
}
