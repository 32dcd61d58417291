"""The shared folder of a merge: what it holds, and what is said of it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrcompress.adapters.shared import FILES, SCHEMA, SHARED, Element, combined
from lrcompress.adapters.tasks import Task
from lrcompress.checkpoint.writer import ShardedWriter, copy_files_beside
from lrcompress.linalg.truncation import product_energy
from lrcompress.report.summary import versions
from lrcompress.stages.workspace import write_json


def task_errors(
    tasks: Mapping[str, Task], members: Mapping[str, list[str]], kept: Mapping[str, list[Element]]
) -> dict[str, float]:
    """Squared error of every task, of the factors as `extract` writes them."""
    lost = dict.fromkeys(tasks, 0.0)
    for module, names in members.items():
        for i, name in enumerate(names):
            left, right = tasks[name].factors(module)
            if kept[module]:
                most = tasks[name].rank(module) if tasks[name].kind == "model" else None
                own, other = combined(kept[module], i, most)
                left, right = torch.cat([left, -own.double()], dim=1), torch.cat([right, other.double()])
            lost[name] += product_energy(left, right)
    return lost


def carried(tasks: Mapping[str, Task], places: Mapping[str, dict[str, str]]) -> dict[str, Tensor]:
    """Meta tensors of what is kept as it is, by its place."""
    return {places[task][name]: meta for task, held in tasks.items() for name, meta in held.others.items()}


def make_report(
    tasks: Mapping[str, Task],
    members: Mapping[str, list[str]],
    kept: Mapping[str, list[Element]],
    norms: Mapping[str, float],
    asked: Mapping[str, Any],
    output: Path,
    carried: int,
) -> dict[str, Any]:
    """What was merged, how much of it is kept, and every task's error."""
    lost = task_errors(tasks, members, kept)
    errors = {name: lost[name] ** 0.5 / norms[name] for name in tasks}
    separate = {name: sum(task.bytes(module) for module in task.shapes) for name, task in tasks.items()}
    shared = sum(t.nbytes for elements in kept.values() for e in elements for t in (e.left, e.right, e.coefficients))
    return {
        "schema": SCHEMA,
        "output": str(output),
        "asked": dict(asked),
        "bytes": {"separate": sum(separate.values()), "shared": shared, "carried": carried},
        "ratio": 1 - shared / sum(separate.values()),
        "relative_error": (sum(error**2 for error in errors.values()) / len(errors)) ** 0.5,
        "tasks": [
            {"name": name, "adapter": task.label, "bytes": separate[name], "relative_error": errors[name]}
            for name, task in tasks.items()
        ],
        "modules": [
            {"name": module, "tasks": len(names), "elements": len(kept[module]),
             "ranks": [e.left.shape[1] for e in kept[module]]}
            for module, names in members.items()
        ],
        "versions": versions(),
    }  # fmt: skip


def write(
    tasks: Mapping[str, Task],
    members: Mapping[str, list[str]],
    kept: Mapping[str, list[Element]],
    places: Mapping[str, dict[str, str]],
    report: dict[str, Any],
    folder: Path,
) -> None:
    """shared.json says what belongs to whom, shared.safetensors holds the elements, and what is kept as it is."""
    tensors: dict[str, Tensor] = {}
    for module, elements in kept.items():
        for j, element in enumerate(elements):
            tensors |= {f"{module}|{j}|left": element.left, f"{module}|{j}|right": element.right}
            tensors[f"{module}|{j}|coefficients"] = element.coefficients
    errors = {task["name"]: task["relative_error"] for task in report["tasks"]}
    others = carried(tasks, places)
    writer = ShardedWriter(folder, [*tensors.items(), *others.items()], 2**63, stem=SHARED)
    writer.write(tensors.items())
    for place in others:
        owner, name = place.split("|", 1)
        writer.write([(place, tasks[owner].tensor(name))])
    writer.close()
    entries = {
        name: {**task.entry(), "tensors": places[name], "relative_error": errors[name]} for name, task in tasks.items()
    }
    held = {module: {"tasks": names, "shape": tasks[names[0]].shapes[module]} for module, names in members.items()}
    write_json(folder / f"{SHARED}.json", {"schema": SCHEMA, "tasks": entries, "modules": held})
    first = next(iter(tasks.values()))
    if first.kind == "model":
        (folder / FILES).mkdir()
        copy_files_beside(first.folder, folder / FILES, code=True)


def card(report: dict[str, Any]) -> str:
    """README.md of the shared folder."""
    rows = "\n".join(f"| {task['name']} | {task['relative_error']:.4f} |" for task in report["tasks"])
    return f"""---
tags: [lrcompress, lora]
---
# {len(report["tasks"])} adapters of one base, held together

Written by `lrcompress merge`: {report["bytes"]["shared"]} bytes instead of {report["bytes"]["separate"]}.
`lrcompress extract path/of/this/folder --task NAME -o OUT` gives one back as an adapter that PEFT loads.

| task | relative error of its updates |
|---|---|
{rows}
"""
