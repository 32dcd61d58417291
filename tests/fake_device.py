"""A device like Apple's, to be imported in a process of its own: torch.device("fake"), on which float64 is an error.

Its tensors hold ones of the CPU, which do the work; as on a real device, what lies here and what lies there do not mix.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("fake")
FAKE = torch.device("fake", 0)
aten = torch.ops.aten

UNKNOWN = {aten._linalg_eigh.default, aten._linalg_svd.default}
"""What MPS has not in torch 2.13."""


class OnDevice(torch.Tensor):
    """A tensor of the device; `held` is its twin on the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "OnDevice":
        if held.dtype in (torch.float64, torch.complex128):
            raise TypeError("the fake device has no float64")
        found = torch.Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, device=FAKE
        )
        found.held = held
        return found

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op in UNKNOWN:
            raise NotImplementedError(f"{op} is not known on the fake device")
        return ACROSS.get(op, _run)(op, *args, **(kwargs or {}))

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def tolist(self) -> Any:
        return self.held.tolist()

    __torch_function__ = torch._C._disabled_torch_function_impl


def _held(value: Any) -> Any:
    return value.held if isinstance(value, OnDevice) else value


def _inside(op: Any, value: Any) -> Any:
    """An argument as the CPU's operator takes it; numbers and indices of the CPU may be among them."""
    if isinstance(value, Tensor) and not isinstance(value, OnDevice) and value.dim() and "index" not in str(op):
        raise RuntimeError(f"{op}: a tensor of the CPU among those of the device")
    return torch.device("cpu") if isinstance(value, torch.device) else _held(value)


def _run(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Any operator: the CPU's on the twins."""
    mine = {id(leaf.held): leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, OnDevice)}
    args, kwargs = pytree.tree_map(lambda value: _inside(op, value), (args, kwargs))
    found = op(*args, **kwargs)
    return pytree.tree_map(lambda t: mine[id(t)] if id(t) in mine else OnDevice(t) if type(t) is Tensor else t, found)


def _copy(op: Any, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    _held(target).copy_(_held(source))
    return target


def _to_copy(op: Any, source: Tensor, **kwargs: Any) -> Tensor:
    here = torch.device(kwargs.pop("device", None) or source.device).type == "fake"
    found = aten._to_copy(_held(source), **kwargs)
    return OnDevice(found) if here else found


def _item(op: Any, tensor: Tensor) -> Any:
    return op(_held(tensor))


ACROSS: dict[Any, Callable[..., Any]] = {
    aten.copy_.default: _copy,
    aten._to_copy.default: _to_copy,
    aten._local_scalar_dense.default: _item,
}


def _factory(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """What makes a tensor of numbers, here."""
    return lambda *size, dtype=None, **_: OnDevice(make(*size, dtype=dtype))


library = torch.library.Library("aten", "IMPL")
for name, make in {
    "empty.memory_format": torch.empty,
    "empty_strided": torch.empty_strided,
    "eye": torch.eye,
    "eye.m": torch.eye,
    "arange": torch.arange,
    "arange.start": torch.arange,
    "arange.start_step": torch.arange,
}.items():
    library.impl(name, _factory(make), "PrivateUse1")
library.impl("_to_copy", lambda source, **kwargs: _to_copy(None, source, **kwargs), "PrivateUse1")
