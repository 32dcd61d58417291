"""What ends long work, as errors of ours that say how to go on."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lrcompress.errors import InputError, Interrupted
from lrcompress.model.device import memory_errors
from lrcompress.parallel.processes import peer_lost, several


@contextmanager
def errors_in_words(device: torch.device, resume: str) -> Iterator[None]:
    """Lack of memory, Ctrl-C, numbers not finite, a lost process as errors of ours; `resume` says how to go on."""
    try:
        with memory_errors(f"out of memory on {device}: use fewer --samples or a shorter --seqlen; {resume}"):
            yield
    except KeyboardInterrupt as error:
        raise Interrupted(f"interrupted: {resume}") from error
    except (ArithmeticError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
        raise InputError(str(error)) from error
    except RuntimeError as error:
        if not several() or not peer_lost(error):
            raise
        raise Interrupted(f"another process of this run has ended, see what it says; {resume}") from error
