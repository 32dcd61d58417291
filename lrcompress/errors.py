"""What can go wrong, by exit code. A message says what, where, and the cure, in one line."""


class LrcompressError(Exception):
    """Base of every error that lrcompress raises on purpose."""

    exit_code = 1


class InputError(LrcompressError):
    """Bad usage or bad input: nothing was written (exit code 2)."""

    exit_code = 2


class NumericalError(InputError):
    """Numbers that are not finite, or that no compression can be made from."""


class ResourceError(LrcompressError):
    """Ran out of disk or memory: nothing half-written, resumable (exit code 3)."""

    exit_code = 3


class Interrupted(LrcompressError):
    """Stopped by the user, resumable (exit code 130)."""

    exit_code = 130


def did_you_mean(word: str, known: list[str]) -> str:
    """A question that names the known word nearest to `word`, "" where none is near."""
    import difflib

    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"did you mean {close[0]}?" if close else ""


def nearest(word: str, known: list[str]) -> str:
    """A hint naming the known word nearest to `word`, or all of them."""
    import difflib

    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else "known: " + ", ".join(sorted(known))
