"""Writing safetensors as a stream: headers first, tensors in a planned order, resumable at any tensor.

The library writes a file from tensors that are all in memory; here only one block's are.
"""

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from lrcompress.checkpoint.beside import CODE, files_in_folders, is_beside
from lrcompress.checkpoint.reader import DTYPE_NAMES, read_header
from lrcompress.checkpoint.shards import weight_files
from lrcompress.errors import InputError, ResourceError

_NAMES = {dtype: name for name, dtype in DTYPE_NAMES.items()}
MODEL = "model"


class ShardedWriter:
    """Shards `stem`... of at most `shard_bytes` in `folder`; every name, shape and dtype is known beforehand.

    `done` is how many tensors are written, and safely on disk after `commit`; pass it to continue an interrupted write.
    Of `size` writers the one of this `rank` writes every `size`-th shard, the first one the index too.
    """

    def __init__(
        self,
        folder: Path,
        planned: Sequence[tuple[str, Tensor]],
        shard_bytes: int,
        done: int = 0,
        *,
        stem: str = MODEL,
        rank: int = 0,
        size: int = 1,
    ) -> None:
        self.folder, self.done, self.stem = folder, done, stem
        self._rank, self._size = rank, size
        self._planned = list(planned)
        self._shards = _split(self._planned, shard_bytes)
        self._paths = _paths(folder, stem, len(self._shards))
        self._where = [(s, i) for s, shard in enumerate(self._shards) for i in range(len(shard))]
        self._file: BinaryIO | None = None
        self._open_shard = -1

    @property
    def bytes(self) -> int:
        """Bytes of all planned tensors."""
        return sum(_size(t) for _, t in self._planned)

    def write(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Append tensors, which must come in the planned order with the planned shapes and dtypes.

        Those that are not `wanted` are left out by the caller.
        """
        for name, tensor in tensors:
            self.leave_others(len(self._planned))
            expected, meta = self._planned[self.done]
            if (name, tensor.shape, tensor.dtype) != (expected, meta.shape, meta.dtype):
                raise ValueError(
                    f"planned {expected} {tuple(meta.shape)} {meta.dtype}, "
                    f"got {name} {tuple(tensor.shape)} {tensor.dtype}"
                )
            with disk_errors(self.folder):
                self._seek(self.done).write(_raw(tensor))
            self.done += 1

    def wanted(self, position: int) -> bool:
        """Whether the planned tensor of this position is for this writer."""
        return self._where[position][0] % self._size == self._rank

    def leave_others(self, end: int) -> None:
        """Go past the tensors before position `end` that are for other writers."""
        while self.done < end and not self.wanted(self.done):
            self.done += 1

    def commit(self) -> None:
        """Make everything written so far durable."""
        self.flush()()

    def flush(self) -> Callable[[], None]:
        """Hand everything written so far to the operating system; what is returned waits until it is on the disk.

        That may be called in another thread while more is written.
        """
        if self._file is None:
            return lambda: None
        with disk_errors(self.folder):
            self._file.flush()
            descriptor = os.dup(self._file.fileno())

        def wait() -> None:
            try:
                with disk_errors(self.folder):
                    os.fsync(descriptor)
            finally:
                os.close(descriptor)

        return wait

    def close(self) -> None:
        """Finish: every planned tensor must have been written; writes the index of several shards."""
        self.leave_others(len(self._planned))
        if self.done != len(self._planned):
            raise ValueError(f"{len(self._planned) - self.done} planned tensors were not written")
        self.commit()
        if self._file is not None:
            self._file.close()
            self._file = None
        if len(self._shards) > 1 and self._rank == 0:
            names = {n: p.name for p, shard in zip(self._paths, self._shards, strict=True) for n, _ in shard}
            index = {"metadata": {"total_size": self.bytes}, "weight_map": names}
            with disk_errors(self.folder):
                (self.folder / f"{self.stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")

    def _seek(self, position: int) -> BinaryIO:
        """The file that tensor `position` goes to, opened and cut to where it begins."""
        shard, inside = self._where[position]
        if shard != self._open_shard or self._file is None:
            if self._file is not None:
                self.commit()
                self._file.close()
            header = _header(self._shards[shard])
            offset = len(header) + sum(_size(t) for _, t in self._shards[shard][:inside])
            path = self._paths[shard]
            self._file = path.open("r+b" if inside and path.exists() else "w+b")
            self._open_shard = shard
            if inside == 0:
                self._file.write(header)
            else:
                self._file.truncate(offset)
                self._file.seek(offset)
        return self._file


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """One safetensors file, whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with disk_errors(path.parent):
        with temporary.open("wb") as file:
            file.write(_header(list(tensors.items())))
            for tensor in tensors.values():
                file.write(_raw(tensor))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


def replace_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Put other numbers into named tensors of the folder's files, of the same shapes and dtypes; all else stays.

    Every file is replaced whole or not at all; ValueError, before anything is written, where a tensor does not fit.
    """
    headers = {path: read_header(path) for path in weight_files(folder)}
    where = {name: path for path, (places, _) in headers.items() for name in places}
    for name, tensor in tensors.items():
        entry = headers[where[name]][0][name] if name in where else {}
        if (entry.get("dtype"), entry.get("shape")) != (_NAMES[tensor.dtype], list(tensor.shape)):
            raise ValueError(f"{name} is stored in {folder} as {entry}, got {tuple(tensor.shape)} {tensor.dtype}")
    for path in {where[name]: None for name in tensors}:
        places, start = headers[path]
        temporary = path.with_name(path.name + ".tmp")
        with disk_errors(folder):
            shutil.copyfile(path, temporary)
            with temporary.open("r+b") as file:
                for name in [name for name in tensors if where[name] == path]:
                    file.seek(start + places[name]["data_offsets"][0])
                    file.write(_raw(tensors[name]))
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)


def copy_files_beside(source: Path, folder: Path, *, code: bool) -> None:
    """What belongs to tokenizer, processor and generation, with folders of it such as `additional_chat_templates`.

    No weights, no config, nothing that we wrote about the checkpoint.
    """
    skipped = {"config.json", "report.json", "plan.json", "adapter_config.json"}
    with disk_errors(folder):
        files = [path for path in sorted(source.iterdir()) if path.is_file() and path.name not in skipped]
        wanted = [path for path in files if is_beside(path) or (code and path.suffix == CODE)]
        copy_files(source, [*wanted, *files_in_folders(source)], folder)


def copy_files(source: Path, paths: Iterable[Path], folder: Path) -> None:
    """Files of `source` to where they lie in `folder`; InputError where one cannot be read."""
    for path in paths:
        target = folder / path.relative_to(source)
        target.parent.mkdir(exist_ok=True)
        try:
            shutil.copyfile(path, target)
        except PermissionError as error:
            raise InputError(f"{path} cannot be read ({error.strerror})") from error


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn a full disk, an exceeded quota or a disk that fails into a ResourceError."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise ResourceError(
                f"the disk of {folder} is full: free some room and run again, compress and run with --resume"
            ) from error
        if error.errno in (errno.EIO, errno.EROFS, errno.ENODEV, errno.ESTALE):
            raise ResourceError(
                f"the disk of {folder} fails ({error.strerror}): mend it and run again, compress and run with --resume"
            ) from error
        raise


def _split(planned: Sequence[tuple[str, Tensor]], limit: int) -> list[list[tuple[str, Tensor]]]:
    shards: list[list[tuple[str, Tensor]]] = [[]]
    size = 0
    for name, tensor in planned:
        if shards[-1] and size + _size(tensor) > limit:
            shards.append([])
            size = 0
        shards[-1].append((name, tensor))
        size += _size(tensor)
    return shards


def _paths(folder: Path, stem: str, count: int) -> list[Path]:
    if count == 1:
        return [folder / f"{stem}.safetensors"]
    return [folder / f"{stem}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


def _header(tensors: Sequence[tuple[str, Tensor]]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors:
        end = offset + _size(tensor)
        entries[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.itemsize


def _raw(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, where they lie if it is contiguous on the CPU."""
    flat = tensor.detach().to("cpu").contiguous().flatten()
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")
