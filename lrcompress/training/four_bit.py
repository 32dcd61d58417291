"""Frozen dense weights in four bits while factors are trained over them, as in QLoRA (arXiv 2305.14314)."""

import importlib.util
from dataclasses import replace

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lrcompress.bases import parse_base
from lrcompress.formats import restored
from lrcompress.training.choices import dense_weights

FALLBACK = "rtn:4:64"
"""The base that stands in for bitsandbytes."""


@torch.no_grad()
def quantise_frozen(model: nn.Module, dtype: torch.dtype) -> int:
    """Put four-bit layers in the place of the blocks' dense linear ones, by bitsandbytes where it is there; how many.

    Only the model in memory changes: what is stored of these weights stays as it is.
    """
    make = _bitsandbytes if importlib.util.find_spec("bitsandbytes") else _round_to_nearest
    names = dense_weights(model)
    for name in names:
        stem = name.removesuffix(".weight")
        layer = model.get_submodule(stem)
        assert isinstance(layer.weight, nn.Parameter)
        weight = layer.weight.T if isinstance(layer, Conv1D) else layer.weight
        bias = layer.bias if isinstance(layer.bias, nn.Parameter) else None
        model.set_submodule(stem, make(weight.detach(), bias, dtype))
    return len(names)


def _round_to_nearest(weight: torch.Tensor, bias: nn.Parameter | None, dtype: torch.dtype) -> nn.Module:
    found = parse_base(FALLBACK).compress(weight.cpu(), None)
    tensors = found.tensors if bias is None else {**found.tensors, "bias": bias.detach()}
    return restored(replace(found.spec, bias=bias is not None), tensors, dtype, weight.device)


def _bitsandbytes(weight: torch.Tensor, bias: nn.Parameter | None, dtype: torch.dtype) -> nn.Module:
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(
        weight.shape[1], weight.shape[0], bias=bias is not None, compute_dtype=dtype, quant_type="nf4"
    )
    layer.weight = bnb.nn.Params4bit(weight.contiguous().cpu(), requires_grad=False, quant_type="nf4")
    if bias is not None:
        layer.bias = bias
    found: nn.Module = layer.to(weight.device)
    return found
