"""Several adapters, or low-rank models, of one base as a smaller basis and coefficients (RMM, arXiv 2510.14163).

Every module has a basis of its own, closed form and without data. Tasks count alike, however large their updates are.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrcompress.adapters.merged import card, carried, make_report, write
from lrcompress.adapters.shared import Element
from lrcompress.adapters.tasks import Task, open_task
from lrcompress.budget import parse_size
from lrcompress.errors import InputError
from lrcompress.foreign.opening import short_name
from lrcompress.formats.low_rank import LowRank
from lrcompress.linalg.common_basis import common_basis
from lrcompress.linalg.ranks import NOISE, ranks_for_error, ranks_within
from lrcompress.linalg.truncation import Spectrum, product_energy
from lrcompress.report.progress import Reporter
from lrcompress.stages.workspace import new_folder, write_json


@dataclass(frozen=True)
class Room:
    """How much is kept: elements of every module's basis, bytes of all of it, or the relative error of all tasks."""

    basis: int | None = None
    size: str | None = None
    error: float | None = None

    def check(self, tasks: int) -> None:
        """InputError unless exactly one is given, in its range."""
        given = [f"--{key}" for key in ("basis", "size", "error") if getattr(self, key) is not None]
        if len(given) != 1:
            raise InputError(f"give one of --basis, --size and --error, not {' and '.join(given) or 'none'}")
        if self.basis is not None and not 1 <= self.basis < tasks:
            raise InputError(f"--basis {self.basis}: {tasks} tasks have a smaller basis with 1 to {tasks - 1} elements")
        if self.error is not None and not 0.0 < self.error < 1.0:
            raise InputError(f"--error {self.error:g} is outside (0, 1): it is relative to the updates' norm")


def merge(
    labels: Sequence[str],
    output: Path,
    room: Room,
    *,
    dry_run: bool = False,
    overwrite: bool = False,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Write the adapters' shared basis; returns the report, with every task's error as `extract` will give it back."""
    reporter = reporter or Reporter(quiet=True)
    if len(labels) < 2:
        raise InputError("merge takes two adapters or more: name their folders")
    room.check(len(labels))
    tasks = dict(zip(_task_names(labels), [open_task(label) for label in labels], strict=True))
    _check_one_base(tasks, reporter)
    norms = {name: _norm(task) for name, task in tasks.items()}
    members = _members(tasks)
    with reporter.phase("decompose", len(members)) as tick:
        bases = {}
        for module, names in members.items():
            bases[module] = _basis(module, [(tasks[name], norms[name]) for name in names])
            tick()
    places = _places(tasks)
    others = _bytes(carried(tasks, places))
    kept = _kept(tasks, members, bases, room, others)
    report = make_report(tasks, members, kept, norms, asdict(room), output, others)
    if report["bytes"]["shared"] >= report["bytes"]["separate"]:
        raise InputError(
            f"the basis would have {report['bytes']['shared']} bytes, the adapters' factors have "
            f"{report['bytes']['separate']}: these tasks have too little in common for that, allow a larger --error"
        )
    if not dry_run:
        with new_folder([task.folder for task in tasks.values()], output, overwrite=overwrite) as folder:
            write(tasks, members, kept, places, report, folder)
            write_json(folder / "report.json", report)
            (folder / "README.md").write_text(card(report), encoding="utf8")
    return report


def _task_names(labels: Sequence[str]) -> list[str]:
    """The folders' names; InputError where two are the same."""
    names = [short_name(label) for label in labels]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"two adapters are called {twice}: tasks are named by their folders, rename one")
    return names


def _check_one_base(tasks: Mapping[str, Task], reporter: Reporter) -> None:
    """InputError where the tasks cannot belong to one model; a warning where they say that they do not."""
    if len({task.kind for task in tasks.values()}) > 1:
        raise InputError("adapters and whole models cannot be merged with each other: give the one or the other")
    shapes: dict[str, tuple[str, tuple[int, int]]] = {}
    for name, task in tasks.items():
        if not task.shapes:
            raise InputError(f"{task.label} has no factorised weight or linear update: there is nothing to merge")
        for module, own in task.shapes.items():
            first, shape = shapes.setdefault(module, (name, own))
            if shape != own:
                raise InputError(f"{module} is {shape} in {first} and {own} in {name}: their bases differ")
    bases = {task.base for task in tasks.values()}
    if len(bases) > 1:
        reporter.warn(f"the tasks name different bases ({', '.join(sorted(bases))}): they should be one model")


def _norm(task: Task) -> float:
    total = sum(product_energy(*task.factors(module)) for module in task.shapes)
    return total**0.5 if total > 0 else 1.0


def _members(tasks: Mapping[str, Task]) -> dict[str, list[str]]:
    """Module to the tasks that update it."""
    found: dict[str, list[str]] = {}
    for name, task in tasks.items():
        for module in task.shapes:
            found.setdefault(module, []).append(name)
    return found


def _basis(module: str, members: Sequence[tuple[Task, float]]) -> tuple[Tensor, list[Spectrum]]:
    """The basis of a module's updates, each divided by its task's norm; factors in float32."""
    pairs = [(task.factors(module), norm) for task, norm in members]
    lefts, rights = [left / norm for (left, _), norm in pairs], [right for (_, right), _ in pairs]
    coefficients, elements = common_basis(lefts, rights)
    coefficients = coefficients * torch.tensor([norm for _, norm in members], dtype=torch.float64)[:, None]
    return coefficients, [Spectrum(e.left.float(), e.right.float(), e.energies) for e in elements]


def _kept(
    tasks: Mapping[str, Task],
    members: Mapping[str, list[str]],
    bases: Mapping[str, tuple[Tensor, list[Spectrum]]],
    room: Room,
    others: int,
) -> dict[str, list[Element]]:
    """The elements that are kept of every module, in the dtypes that hold all of its tasks' factors.

    `others` bytes are kept beside them as they are.
    """
    energies = {m: [element.energies for element in elements] for m, (_, elements) in bases.items()}
    if room.basis is not None:
        ranks = {m: _basis_ranks(values, room.basis, _largest(tasks, members[m], m)) for m, values in energies.items()}
    else:
        ranks = _ranks(tasks, members, energies, room, others)
    found = {}
    for module, (coefficients, elements) in bases.items():
        dtypes = _dtypes(tasks, members[module], module)
        found[module] = [
            _element(element, coefficients[:, j], rank, dtypes)
            for j, (element, rank) in enumerate(zip(elements, ranks[module], strict=True)) if rank
        ]  # fmt: skip
    return found


def _basis_ranks(energies: Sequence[Tensor], count: int, largest: int) -> list[int]:
    """Of the first `count` elements as many components as an adapter has, noise left out."""
    real = [int((values > NOISE * energies[0][:1].sum()).sum()) for values in energies]
    return [min(rank, largest) if j < count else 0 for j, rank in enumerate(real)]


def _ranks(
    tasks: Mapping[str, Task],
    members: Mapping[str, list[str]],
    energies: Mapping[str, list[Tensor]],
    room: Room,
    others: int,
) -> dict[str, list[int]]:
    """Components of every element by their energies, over all modules."""
    flat, costs = [], []
    for module, values in energies.items():
        flat += values
        costs += len(values) * [_component_bytes(tasks, members[module], module)]
    if room.size is not None:
        numbers = sum(4 * len(names) ** 2 for names in members.values())  # coefficients, if all elements are used
        budget = parse_size(room.size) - numbers - others
        if budget < min(costs):
            raise InputError(
                f"--size {room.size}: coefficients and what is kept as it is have {numbers + others} bytes, a "
                f"component has {min(costs)}: ask for more"
            )
        found = iter(ranks_within(flat, costs, budget, least=0))
    else:
        assert room.error is not None
        found = iter(ranks_for_error(flat, costs, room.error, least=0))
    return {module: [next(found) for _ in values] for module, values in energies.items()}


def _largest(tasks: Mapping[str, Task], names: Sequence[str], module: str) -> int:
    return max(tasks[name].rank(module) for name in names)


def _dtypes(tasks: Mapping[str, Task], names: Sequence[str], module: str) -> tuple[torch.dtype, torch.dtype]:
    """The dtypes of B and A that hold those of all tasks."""
    left, right = tasks[names[0]].dtypes(module)
    for name in names[1:]:
        own = tasks[name].dtypes(module)
        left, right = torch.promote_types(left, own[0]), torch.promote_types(right, own[1])
    return left, right


def _component_bytes(tasks: Mapping[str, Task], names: Sequence[str], module: str) -> int:
    shape, dtypes = tasks[names[0]].shapes[module], _dtypes(tasks, names, module)
    return sum(size * dtype.itemsize for size, dtype in zip(shape, dtypes, strict=True))


def _element(element: Spectrum, coefficients: Tensor, rank: int, dtypes: tuple[torch.dtype, torch.dtype]) -> Element:
    stored = LowRank.encode(element.left[:, :rank], element.right[:rank], None)
    return Element(stored["B.weight"].to(dtypes[0]), stored["A.weight"].to(dtypes[1]), coefficients.float())


def _places(tasks: Mapping[str, Task]) -> dict[str, dict[str, str]]:
    """Task to where each of its other tensors lies: what the first task has too, equal, lies there."""
    (first, held), *rest = tasks.items()
    found = {first: {name: f"{first}|{name}" for name in held.others}}
    for task, other in rest:
        same = {
            name for name in other.others if name in held.others and torch.equal(held.tensor(name), other.tensor(name))
        }
        found[task] = {name: f"{first if name in same else task}|{name}" for name in other.others}
    return found


def _bytes(metas: Mapping[str, Tensor]) -> int:
    return sum(meta.numel() * meta.itemsize for meta in metas.values())
