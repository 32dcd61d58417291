"""Files that loaded tensors still lie in: a file that is mapped stays in memory as long as one tensor of it is used."""

from pathlib import Path

from torch import Tensor, nn

WORTH = 0.5
"""From this part of its files' bytes on a model is left lying in them."""


def leave_files(model: nn.Module) -> None:
    """Copy the tensors of `model` that lie in mapped safetensors files out of those of which they are a small part.

    Where numbers were converted as they were loaded only integers lie there, and would keep all of it in memory.
    """
    ranges = mapped_files()
    inside: dict[Path, list[tuple[nn.Module, str, Tensor]]] = {}
    for module in model.modules():
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            place = next((path for start, stop, path in ranges if start <= tensor.data_ptr() < stop), None)
            if place is not None:
                inside.setdefault(place, []).append((module, name, tensor))
    for path, found in inside.items():
        # Not what is mapped: another model of this process may lie in the same file.
        if sum(tensor.nbytes for _, _, tensor in found) < WORTH * path.stat().st_size:
            for module, name, tensor in found:
                _copy(module, name, tensor)


def _copy(module: nn.Module, name: str, tensor: Tensor) -> None:
    """A buffer is another tensor then: one that is a view of the file's bytes keeps those, whatever its data are."""
    if isinstance(tensor, nn.Parameter):
        tensor.data = tensor.data.clone()
    else:
        setattr(module, name, tensor.clone())


def mapped_files() -> list[tuple[int, int, Path]]:
    """First address, the one behind the last, and path of every mapped safetensors file; none where a system does not
    tell."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf8").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        parts = line.split(maxsplit=5)
        if len(parts) == 6 and parts[5].endswith(".safetensors"):
            start, stop = (int(address, 16) for address in parts[0].split("-"))
            found.append((start, stop, Path(parts[5])))
    return found
