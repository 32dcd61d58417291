"""Small decompositions at the same time, a thread each: LAPACK makes little of several threads for one of them."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

AT_ONCE = 1 << 25
"""Bytes that may be worked on at the same time: one that has more is worked on alone, by all threads."""


def is_small(bytes_: int) -> bool:
    """Whether two of them may be worked on at the same time."""
    return 2 * bytes_ <= AT_ONCE


def workers_for(sizes: Sequence[int], device: torch.device) -> int:
    """How many of the small ones among items of `sizes` bytes are worked on at the same time."""
    small = [size for size in sizes if is_small(size)]
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    return min(threads, len(small), AT_ONCE // max(small)) if small else 1


def side_by_side(
    work: Callable[[Item], Result], items: Sequence[Item], bytes_of: Callable[[Item], int], device: torch.device
) -> list[Result]:
    """work(item) of all items, in their order; several at a time where they are small and `device` is the CPU."""
    workers = workers_for([bytes_of(item) for item in items], device)
    if workers == 1:
        return [work(item) for item in items]
    small = [place for place, item in enumerate(items) if is_small(bytes_of(item))]
    threads = torch.get_num_threads() // workers
    # A thread takes over the number only at its first large operation: it is told, so that all its operations have it.
    with _threads_each(threads), ThreadPoolExecutor(workers, "", torch.set_num_threads, (threads,)) as pool:
        started = {place: pool.submit(torch.no_grad()(work), items[place]) for place in small}
        try:
            done = {place: future.result() for place, future in started.items()}
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [done[place] if place in done else work(item) for place, item in enumerate(items)]


@contextmanager
def _threads_each(threads: int) -> Iterator[None]:
    """While open, operations take so many threads, those of threads that begin meanwhile too."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
