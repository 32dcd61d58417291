"""What ends long work, as errors of ours that say how to go on."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lrcompress.errors import InputError, Interrupted
from lrcompress.model.device import memory_errors


@contextmanager
def errors_in_words(device: torch.device, resume: str) -> Iterator[None]:
    """Lack of memory, Ctrl-C and numbers that are not finite as errors of ours; `resume` says how to go on."""
    try:
        with memory_errors(f"out of memory on {device}: use fewer --samples or a shorter --seqlen; {resume}"):
            yield
    except KeyboardInterrupt as error:
        raise Interrupted(f"interrupted: {resume}") from error
    except (ArithmeticError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
        raise InputError(str(error)) from error
