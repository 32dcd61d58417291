"""How a whole model calls its language model for a sample with images: made once, kept in a file."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import nn

from lrcompress.errors import InputError
from lrcompress.model.carried import replaced, tensors_in
from lrcompress.model.samples import Sample

Call = tuple[list[Any], dict[str, Any]]
"""Arguments and keyword arguments."""


class _Called(Exception):
    def __init__(self, call: Call) -> None:
        self.call = call


class Looks:
    """Calls of `decoder`, the module that holds the blocks, by the model around it, which sees the images.

    What a tower makes of an image is not computed again for every block: a call's tensors lie in a file of `folder`
    where one is named, and are made anew where that is gone.
    """

    def __init__(self, decoder: nn.Module, device: torch.device) -> None:
        self._decoder, self._device = decoder, device
        self.folder: Path | None = None
        self._kept: dict[Sample, tuple[Path, Any]] = {}

    def call(self, sample: Sample, whole: Callable[[], Any]) -> Any:
        """What the decoder puts out for the sample; whole() runs all of the model on it."""
        args, kwargs = self._read(sample) or self._watched(sample, whole)
        return self._decoder(*args, **kwargs)

    def forget(self) -> None:
        """Make every call anew: the model around the decoder has changed."""
        self._kept.clear()

    def _read(self, sample: Sample) -> Call | None:
        path, empty = self._kept.get(sample, (None, None))
        if path is None or not path.is_file():
            return None
        tensors = load_file(path, device=str(self._device))
        args, kwargs = replaced(empty, (tensors[str(place)] for place in range(len(tensors))))
        return args, kwargs

    def _watched(self, sample: Sample, whole: Callable[[], Any]) -> Call:
        def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            raise _Called((list(args), dict(kwargs)))

        handle = self._decoder.register_forward_pre_hook(stop, with_kwargs=True)
        found: Call | None = None
        try:
            with torch.no_grad():
                whole()
        except _Called as called:
            found = called.call
        finally:
            handle.remove()
        if found is None:
            raise InputError("the model never called its language model for a sample with images: calibrate on text")
        if self.folder is not None and self.folder.is_dir():
            known = self._kept.get(sample)
            path = self.folder / (f"seen-{len(self._kept):05d}.safetensors" if known is None else known[0].name)
            tensors = list(tensors_in(found))
            path.write_bytes(save({str(i): t.detach().cpu().contiguous().clone() for i, t in enumerate(tensors)}))
            empty = replaced(found, (tensor.to("meta") for tensor in tensors))
            self._kept[sample] = path, empty
        return found
