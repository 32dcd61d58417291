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
    inside: dict[Path, list[Tensor]] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        place = next((path for start, stop, path in ranges if start <= tensor.data_ptr() < stop), None)
        if place is not None:
            inside.setdefault(place, []).append(tensor)
    for path, tensors in inside.items():
        if sum(t.nbytes for t in tensors) < WORTH * sum(stop - start for start, stop, file in ranges if file == path):
            for tensor in tensors:
                tensor.data = tensor.data.clone()


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
