"""Writing the checkpoint: what was decomposed, at the planned levels, block by block."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lrcompress.budget import parse_size
from lrcompress.checkpoint.folder import read_config_file
from lrcompress.checkpoint.manifest import make_manifest
from lrcompress.checkpoint.shards import NAMED
from lrcompress.checkpoint.writer import ShardedWriter, copy_files_beside
from lrcompress.formats import DENSE
from lrcompress.parallel.processes import processes
from lrcompress.report.progress import Reporter
from lrcompress.stages.allocate import Plan
from lrcompress.stages.decompose import decomposition_cost
from lrcompress.stages.encode import Encoder
from lrcompress.stages.held_out import HeldOutCheck
from lrcompress.stages.layout import Layout, stand_ins_of
from lrcompress.stages.opened import Opened
from lrcompress.stages.phases import ENCODE, WRITE
from lrcompress.stages.profile import Artefacts
from lrcompress.stages.workspace import write_json


def store(
    opened: Opened, plan: Plan, artefacts: Artefacts, folder: Path, scratch: Path, reporter: Reporter
) -> dict[str, Any] | None:
    """Config and tokenizer first, then every tensor in one stream; continues where an earlier run stopped.

    What the first process finds on held-out text: see HeldOutCheck.judge.
    """
    team = processes()
    if team.first:
        write_side_files(opened, plan, folder)
    layout = Layout(opened, plan)
    journal = scratch / f"journal-{team.rank}.json"
    limit = parse_size(opened.request.recipe.shard_size)
    writer = ShardedWriter(folder, layout.planned, limit, _read_journal(journal), rank=team.rank, size=team.size)
    if team.size > 1:
        _encode_apart(opened, plan, artefacts, scratch, reporter)
    judged = team.first and opened.request.searched is None  # a search measures what is loaded again, on more text
    check = HeldOutCheck(opened, scratch) if judged else None
    with ThreadPoolExecutor(1) as disk, reporter.phase(WRITE, len(opened.blocks)) as tick:
        journalled = disk.submit(lambda: None)
        for block in [len(opened.blocks), *range(len(opened.blocks))]:
            tensors = Encoder(opened, plan, artefacts, scratch)
            if team.size == 1 and (block < len(opened.blocks) or writer.done < layout.ends[block]):
                tensors.prepare(opened.sites_of(block))
            if writer.done < layout.ends[block]:
                writer.write(layout.tensors(block, tensors, writer.wanted))
                writer.leave_others(layout.ends[block])
                durable = writer.flush()
                journalled.result()
                journalled = disk.submit(_journal, journal, durable, writer.done)
            if check is not None:
                check.step(block, tensors, plan)
            if block < len(opened.blocks):
                tick()
        journalled.result()
    writer.close()
    return None if check is None else check.judge(plan, reporter)


def _journal(path: Path, durable: Callable[[], None], done: int) -> None:
    """Note, once they are on the disk, that `done` tensors are; meanwhile the next block is encoded."""
    durable()
    write_json(path, {"done": done})


def _encode_apart(opened: Opened, plan: Plan, artefacts: Artefacts, scratch: Path, reporter: Reporter) -> None:
    """Every process encodes its share of the weights into scratch files, where all processes' encoders find them."""
    sites = {site.name: site for site in opened.sites}
    owners = [name for name, spec in plan.specs.items() if spec.format != DENSE and spec.owner is None]
    costs = [sum(decomposition_cost(sites[name]) for name in plan.family(owner)) for owner in owners]
    mine = processes().own(costs)
    encoder = Encoder(opened, plan, artefacts, scratch)
    with reporter.phase(ENCODE, len(mine)) as tick:
        for place in mine:
            encoder.put_by(owners[place])
            tick()
    processes().wait()


def _read_journal(path: Path) -> int:
    return int(json.loads(path.read_text())["done"]) if path.exists() else 0


def write_side_files(opened: Opened, plan: Plan, folder: Path) -> None:
    """Tokenizer and generation config as they are; config.json with the manifest."""
    recipe = opened.request.recipe
    copy_files_beside(opened.model.folder, folder, code=recipe.trust_remote_code)
    config = read_config_file(opened.model.folder)
    for key in ("torch_dtype", NAMED):
        config.pop(key, None)
    config["dtype"] = str(opened.dtype).removeprefix("torch.")
    method = opened.request.method
    if opened.walker.untied and not opened.skeleton.all_tied_weights_keys:
        untie(config)
    manifest = make_manifest(
        method.name, opened.sites, plan.specs, stand_ins_of(opened, plan), freeze_dense=method.freezes_dense
    )
    config["quantization_config"] = manifest.as_json()
    write_json(folder / "config.json", config)


def untie(config: dict[str, Any]) -> None:
    """Have config.json say that embeddings and head are two matrices: a compressed one has nothing to compare."""
    language = config.get("text_config")
    for part in [config, *([language] if isinstance(language, dict) else [])]:
        part["tie_word_embeddings"] = False
