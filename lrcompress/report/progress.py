"""Progress of long phases: a bar with time left on a terminal, log lines elsewhere. Everything goes to stderr."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

LOG_EVERY_SECONDS = 10.0

LONG = 3.0
"""Minutes from which on a time is told in minutes."""


class Reporter:
    """Shows phases and messages; `quiet` keeps warnings only."""

    def __init__(self, *, quiet: bool = False, verbose: bool = False) -> None:
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self.quiet, self.verbose = quiet, verbose
        self.seconds: dict[str, float] = {}
        self.warnings: list[str] = []
        self.expected: dict[str, float] = {}
        self.predicted, self.measured = 0.0, 0.0

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

    def expect(self, seconds: Mapping[str, float]) -> None:
        """The phases that the run will have, in their order, and roughly how long each takes: a phase that is among
        them then tells what is left of the whole run."""
        self.expected = dict(seconds)

    def expect_no(self, *titles: str) -> None:
        """Such phases will not take what was predicted, or are left out."""
        self.expected = {title: seconds for title, seconds in self.expected.items() if title not in titles}

    @contextmanager
    def phase(self, title: str, total: int) -> Iterator["Steps"]:
        """A phase of `total` steps; call what it yields once a step."""
        steps = Steps(self, title, total)
        if self.quiet:
            steps.show = lambda: None
            yield steps
        elif self.console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            with Progress(*columns, TextColumn("{task.fields[left]}"), console=self.console) as bar:
                task = bar.add_task(title, total=total, left="")
                steps.show = lambda: bar.update(task, completed=steps.done, left=steps.left())
                yield steps
        else:
            yield steps
        self.predicted += self.expected.get(title, 0.0) * steps.part
        self.measured += steps.spent if title in self.expected else 0.0


class Steps:
    """What counts the steps of a phase, and knows how much is left.

    show: tells how far it is, a log line now and then where nothing else is set.
    """

    def __init__(self, reporter: Reporter, title: str, total: int) -> None:
        self._reporter, self._title, self._total = reporter, title, total
        self.done = self._skipped = 0
        self._start = self._last = time.perf_counter()
        self.show: Callable[[], None] = self._log

    def __call__(self) -> None:
        self.done += 1
        self.show()

    def skip(self, steps: int) -> None:
        """Count `steps` that an earlier run has done; how long those of this run take is no matter of theirs."""
        self.done += steps
        self._skipped += steps
        self.show()

    @property
    def spent(self) -> float:
        """Seconds so far."""
        return time.perf_counter() - self._start

    @property
    def part(self) -> float:
        """What this run has done of the phase."""
        return (self.done - self._skipped) / max(self._total, 1)

    def left(self) -> str:
        """How long it will take still: the whole run where that is known, else this phase; "" where nothing is."""
        reporter, titles = self._reporter, list(self._reporter.expected)
        own = None
        if self.done == self._total:
            own = 0.0
        elif self.part > 0:
            own = self.spent / (self.done - self._skipped) * (self._total - self.done)
        if self._title not in titles:
            return f"{duration(own)} left in this step" if own else ""
        ahead = sum(reporter.expected[title] for title in titles[titles.index(self._title) + 1 :])
        predicted = reporter.predicted + reporter.expected[self._title] * self.part
        if own is None or own + ahead == 0 or predicted == 0:
            return ""
        return f"about {duration(own + ahead * (reporter.measured + self.spent) / predicted)} left in all"

    def _log(self) -> None:
        now = time.perf_counter()
        if self.done < self._total and now - self._last < LOG_EVERY_SECONDS:
            return
        self._last, left = now, self.left()
        said = f"{self._title}: {self.done}/{self._total}, {duration(self.spent)}"
        self._reporter.say(f"{said}, {left}" if left else said)


def duration(seconds: float) -> str:
    """In seconds, of some minutes in minutes."""
    return f"{seconds:.0f} s" if seconds < 60 * LONG else f"{seconds / 60:.0f} min"
