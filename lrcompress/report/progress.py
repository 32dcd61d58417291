"""Progress of long phases: a bar with time left on a terminal, log lines elsewhere. Everything goes to stderr."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LOG_EVERY_SECONDS = 10.0


class Reporter:
    """Shows phases and messages; `quiet` keeps warnings only."""

    def __init__(self, *, quiet: bool = False, verbose: bool = False) -> None:
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self.quiet, self.verbose = quiet, verbose
        self.seconds: dict[str, float] = {}
        self.warnings: list[str] = []

    def silence(self) -> None:
        """From now on nothing is shown: another process speaks."""
        self.quiet = self.console.quiet = True

    def say(self, message: str) -> None:
        """A line for the user, left out when quiet."""
        if not self.quiet:
            self.console.print(message, markup=False)

    def detail(self, message: str) -> None:
        """A line that only --verbose shows."""
        if self.verbose:
            self.say(message)

    def warn(self, message: str) -> None:
        """A line that is always shown, and kept for the report."""
        self.warnings.append(message)
        self.console.print(f"warning: {message}", style="yellow", markup=False)

    @contextmanager
    def timed(self, key: str) -> Iterator[None]:
        """Add the time spent inside to `seconds[key]`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[key] = self.seconds.get(key, 0.0) + time.perf_counter() - start

    @contextmanager
    def phase(self, title: str, total: int) -> Iterator[Callable[[], None]]:
        """A phase of `total` steps; call what it yields once a step."""
        if self.quiet:
            yield lambda: None
        elif self.console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
            with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=self.console) as bar:
                task = bar.add_task(title, total=total)
                yield lambda: bar.advance(task)
        else:
            yield _LogLines(self, title, total)


def skip(tick: Callable[[], None], steps: int) -> None:
    """Count `steps` that an earlier run has done."""
    for _ in range(steps):
        tick()


class _LogLines:
    def __init__(self, reporter: Reporter, title: str, total: int) -> None:
        self._reporter, self._title, self._total = reporter, title, total
        self._done, self._start, self._last = 0, time.perf_counter(), time.perf_counter()

    def __call__(self) -> None:
        self._done += 1
        now = time.perf_counter()
        if self._done < self._total and now - self._last < LOG_EVERY_SECONDS:
            return
        self._last, spent = now, now - self._start
        left = spent / self._done * (self._total - self._done)
        self._reporter.say(f"{self._title}: {self._done}/{self._total}, {spent:.0f} s, {left:.0f} s left")
