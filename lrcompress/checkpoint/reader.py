"""Reading a folder of safetensors a tensor at a time; nothing in it is trusted."""

import json
import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrcompress.checkpoint.fp8 import beside, find_scaled, scale_dtypes
from lrcompress.checkpoint.shards import weight_files
from lrcompress.errors import InputError
from lrcompress.finite import all_finite
from lrcompress.model.device import out_of_memory

DTYPE_NAMES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class CheckpointReader:
    """The tensors of a folder by name, in one or many shards, or in its file `only`; one is open while it is read.

    Weights in fp8 are read as what they stand for, in the dtype that the model is meant to have.
    """

    def __init__(self, folder: Path, only: str | None = None) -> None:
        self.folder = folder
        self._files: dict[str, Path] = {}
        self._meta: dict[str, Tensor] = {}
        self._headers: dict[Path, tuple[dict[str, Any], int]] = {}
        for path in weight_files(folder) if only is None else [folder / only]:
            for name, meta in _header(path).items():
                if name in self._files:
                    raise InputError(
                        f"{path} holds tensor {name}, and so does {self._files[name].name}: "
                        "remove the shards that do not belong to this checkpoint"
                    )
                self._files[name], self._meta[name] = path, meta
        if not self._files:
            raise InputError(f"{folder} holds no tensors")
        self._scaled = find_scaled(folder, self._meta)
        self._hidden = beside(self._scaled, self._files)

    def names(self) -> list[str]:
        """Names of all tensors, sorted."""
        return sorted(self._files.keys() - self._hidden)

    def made(self) -> Collection[str]:
        """Those of the names that are the model's own already, whose tensors are made from what is stored."""
        return ()

    def kept_as(self, name: str) -> list[str]:
        """The stored tensors that a written checkpoint must hold in the place of tensor `name`; none: itself."""
        return []

    def metas(self) -> dict[str, Tensor]:
        """`meta` of every tensor, by name."""
        return {name: self.meta(name) for name in self.names()}

    def meta(self, name: str) -> Tensor:
        """A meta tensor of the shape and dtype that it is read in."""
        return self._as_read(name)

    def _as_read(self, name: str) -> Tensor:
        meta = self._meta[name]
        return meta.to(self._scaled[name].dtype) if name in self._scaled else meta

    def _metas(self) -> list[Tensor]:
        return [self._as_read(name) for name in self._files if name not in self._hidden]

    @property
    def dtype(self) -> torch.dtype:
        """The floating dtype that most of the bytes have as they are read."""
        sizes: dict[torch.dtype, int] = {}
        for meta in self._metas():
            if meta.is_floating_point():
                sizes[meta.dtype] = sizes.get(meta.dtype, 0) + meta.numel() * meta.itemsize
        if not sizes:
            raise InputError(f"{self.folder} holds no floating-point tensor")
        return max(sizes, key=lambda dtype: sizes[dtype])

    @property
    def in_fp8(self) -> bool:
        """Whether weights are stored as fp8 with scales, and read as another dtype."""
        return bool(self._scaled)

    @property
    def numbers(self) -> int:
        """Numbers in all tensors."""
        return sum(meta.numel() for meta in self._metas())

    @property
    def bytes(self) -> int:
        """Bytes of all tensors as they are stored."""
        return sum(meta.numel() * meta.itemsize for meta in self._meta.values())

    def read(self, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """The named tensors, copied out of the files; InputError for a non-finite number that is no lone ±inf."""
        from safetensors import safe_open

        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self._files[name], []).append(name)
        for path, wanted in by_file.items():
            with _reading(path):
                shard = safe_open(path, framework="pt")
            with shard:
                for name in wanted:
                    with _reading(path):
                        tensor = shard.get_tensor(name).clone()
                    if name in self._scaled:
                        tensor = self._scaled[name].multiplied(tensor, self._scale(name))
                    yield name, _finite(name, path, tensor)

    def will_read(self, names: Sequence[str]) -> None:
        """Have the operating system fetch the named tensors from the disk while something else is done."""
        if not hasattr(os, "posix_fadvise"):
            return
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self._files[name], []).append(name)
        for path, wanted in by_file.items():
            with _reading(path), path.open("rb") as file:
                if path not in self._headers:
                    self._headers[path] = read_header(path)
                entries, start = self._headers[path]
                for name in wanted:
                    begin, end = entries[name]["data_offsets"]
                    os.posix_fadvise(file.fileno(), start + begin, end - begin, os.POSIX_FADV_WILLNEED)

    def tensor(self, name: str) -> Tensor:
        """One tensor, checked as in `read`."""
        return next(tensor for _, tensor in self.read([name]))

    def read_slice(self, name: str, index: int) -> Tensor:
        """Element `index` of the first dimension of a tensor, as (1, ...); checked as in `read`."""
        from safetensors import safe_open

        path = self._files[name]
        with _reading(path), safe_open(path, framework="pt") as shard:
            tensor = shard.get_slice(name)[index : index + 1].clone()
        if name in self._scaled:
            scale = self._scale(name)
            tensor = self._scaled[name].multiplied(tensor, scale[index : index + 1] if scale.dim() > 2 else scale)
        return _finite(name, path, tensor)

    def _scale(self, name: str) -> Tensor:
        """The scale of a tensor in fp8, wherever it lies."""
        from safetensors import safe_open

        scale = self._scaled[name].scale
        with _reading(self._files[scale]), safe_open(self._files[scale], framework="pt") as shard:
            tensor: Tensor = shard.get_tensor(scale).clone()
        return tensor


def _finite(name: str, path: Path, tensor: Tensor) -> Tensor:
    bound = tensor.dim() == 0 and bool(tensor.isinf())  # as of a tower that clips at a number that it keeps
    if tensor.is_floating_point() and not bound and not all_finite(tensor):
        raise InputError(f"tensor {name} in {path} has non-finite numbers: the checkpoint is damaged")
    return tensor


def _header(path: Path) -> dict[str, Tensor]:
    """Meta tensors by name; the library checks that offsets and sizes fit the file."""
    from safetensors import safe_open

    found: dict[str, Tensor] = {}
    dtypes = DTYPE_NAMES | scale_dtypes()
    with _reading(path), safe_open(path, framework="pt") as shard:
        for name in shard.keys():
            piece: Any = shard.get_slice(name)
            kind = piece.get_dtype()
            if kind not in dtypes:
                raise InputError(f"tensor {name} in {path} has dtype {kind}: {', '.join(dtypes)} can be read")
            found[name] = torch.empty(piece.get_shape(), dtype=dtypes[kind], device="meta")
    return found


def read_json(path: Path, cure: str = "") -> Any:
    """The value in a file; InputError, which ends in `cure`, where there is none."""
    try:
        return json.loads(path.read_text(encoding="utf8"))
    except (ValueError, RecursionError, OSError) as error:
        raise InputError(f"{path} is not valid JSON ({type(error).__name__}: {error}){cure}") from error


def read_json_object(path: Path, cure: str = "") -> dict[str, Any]:
    """As read_json, for a mapping."""
    found = read_json(path, cure)
    if not isinstance(found, dict):
        raise InputError(f"{path} is no JSON object{cure}")
    return found


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The entries by tensor of a file that the library has checked, and where the tensors begin."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        entries: dict[str, Any] = json.loads(file.read(size))
    return entries, 8 + size


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """What goes wrong with a shard, but for lack of memory, as an InputError."""
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, OSError, RuntimeError) as error:
        if out_of_memory(error):
            raise
        raise InputError(f"{path} is truncated or damaged ({error}): download it again") from error
