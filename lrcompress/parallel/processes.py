"""Several processes of one run, as torchrun starts them: who has which samples and weights, and sums over all."""

import heapq
import os
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from lrcompress.errors import InputError

if TYPE_CHECKING:  # the command line asks here before it knows whether torch is needed
    import torch
    from torch import Tensor

PATIENCE = timedelta(days=1)
"""How long a process waits for the others: shares of the work differ. One that dies is noticed at once all the same."""


class Processes:
    """This process and its peers; alone it is process 0 of 1, and nothing is ever waited for.

    All see the same files. Sums go over the network, and one block's stored tensors where propagation is sequential;
    all other factors go through files.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size
        self.traffic = 0
        """Bytes of tensors that this process has given to sums and to the others."""

    @property
    def first(self) -> bool:
        """Whether this is the one that speaks, and that writes what exists once."""
        return self.rank == 0

    def samples(self, count: int) -> range:
        """The numbers of this process's samples among `count`."""
        return range(self.rank, count, self.size)

    def own(self, costs: Sequence[float]) -> list[int]:
        """The places of this process's jobs: the costliest first, each to whoever has least to do so far."""
        loads = [(0.0, rank) for rank in range(self.size)]
        mine = []
        for place in sorted(range(len(costs)), key=lambda place: (-costs[place], place)):
            load, rank = heapq.heappop(loads)
            heapq.heappush(loads, (load + costs[place], rank))
            if rank == self.rank:
                mine.append(place)
        return sorted(mine)

    def add_up(self, tensors: "Sequence[Tensor]") -> None:
        """Replace every tensor by its sum over all processes; their order and shapes must be the same everywhere."""
        if self.size > 1:
            from torch.distributed import all_reduce

            for tensor in tensors:
                all_reduce(tensor)
                self.traffic += tensor.numel() * tensor.itemsize

    def least(self, value: int) -> int:
        """The smallest of all processes' values."""
        return min(self.gather(value))

    def gather(self, value: Any) -> list[Any]:
        """Everyone's value, by rank."""
        if self.size == 1:
            return [value]
        from torch.distributed import all_gather_object

        found: list[Any] = [None] * self.size
        all_gather_object(found, value)
        return found

    def exchange(self, tensors: "dict[str, dict[str, Tensor]]") -> "dict[str, dict[str, Tensor]]":
        """Everyone's tensors, by what they belong to; nothing belongs to two."""
        if self.size > 1:
            self.traffic += sum(t.numel() * t.itemsize for own in tensors.values() for t in own.values())
        return {name: found for part in self.gather(tensors) for name, found in part.items()}

    def wait(self) -> None:
        """Until all are here."""
        self.gather(None)


_current = Processes()


def processes() -> Processes:
    """Those of this run; alone until `join` has been called."""
    return _current


def several() -> bool:
    """Whether this process was started as one of several."""
    size = os.environ.get("WORLD_SIZE", "1")
    return size.isdigit() and int(size) > 1


def refuse_several(what: str) -> None:
    """InputError where this process is one of several."""
    if several():
        raise InputError(
            f"{what} is the work of one process: run it without torchrun, which compress, run and heal know"
        )


def check_samples(samples: int, size: int) -> None:
    """InputError where a process of `size` would have no calibration sample."""
    if samples < size:
        raise InputError(f"{samples} calibration samples are too few for {size} processes: one each at least")


def peer_lost(error: RuntimeError) -> bool:
    """Whether an error of torch's means that another process of this run is gone; gloo raises a bare RuntimeError."""
    from torch.distributed import DistError

    return isinstance(error, DistError) or "/gloo/" in str(error)


def join(device: "torch.device") -> Processes:
    """Find the other processes, where there are any; the groups for `device` are made by accelerate."""
    global _current
    if several() and _current.size == 1:
        from accelerate.state import PartialState

        try:
            state = PartialState(cpu=device.type == "cpu", timeout=PATIENCE)
        except (ValueError, RuntimeError) as error:  # no address, or nobody there
            reason = str(error).splitlines()[0]
            raise InputError(
                f"the environment says WORLD_SIZE={os.environ['WORLD_SIZE']}, the other processes cannot be found "
                f"({reason}): start all of them with torchrun, or unset WORLD_SIZE for one process"
            ) from error
        _current = Processes(state.process_index, state.num_processes)
    return _current
