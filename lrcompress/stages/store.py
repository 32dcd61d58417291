"""Writing the checkpoint: what was decomposed, at the planned levels, block by block."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from lrcompress.budget import parse_size
from lrcompress.calibration.gradients import CHUNK
from lrcompress.checkpoint.folder import read_config_file
from lrcompress.checkpoint.manifest import make_manifest
from lrcompress.checkpoint.multiplied import Multiplied
from lrcompress.checkpoint.shards import NAMED
from lrcompress.checkpoint.writer import ShardedWriter, copy_files_beside, write_tensors
from lrcompress.errors import InputError
from lrcompress.finite import all_finite
from lrcompress.formats import DENSE, possible_places, restored, stored_tensors
from lrcompress.model.device import decomposition_device
from lrcompress.model.experts import experts_of, stand_ins
from lrcompress.model.surgery import put
from lrcompress.processes import processes
from lrcompress.protocols import Site, Spec
from lrcompress.report.progress import Reporter
from lrcompress.side_by_side import side_by_side
from lrcompress.stages.allocate import Plan
from lrcompress.stages.opened import Opened
from lrcompress.stages.profile import STORED, Artefacts, HiddenWalk, decomposition_cost, double_bytes
from lrcompress.stages.workspace import write_json

LENGTH = "length"
"""The parameter of a spec that encoding finds."""

STREAMS = ("stream", "table.stream")
"""What the stored tensor of that length is called."""

LOUD_LOSS = 5.0
"""Held-out perplexity above this many times the dense one is worth a warning."""


def store(opened: Opened, plan: Plan, artefacts: Artefacts, folder: Path, scratch: Path, reporter: Reporter) -> None:
    """Config and tokenizer first, then every tensor in one stream; continues where an earlier run stopped."""
    team = processes()
    if team.first:
        write_side_files(opened, plan, folder)
    layout = Layout(opened, plan)
    journal = scratch / f"journal-{team.rank}.json"
    limit = parse_size(opened.request.recipe.shard_size)
    writer = ShardedWriter(folder, layout.planned, limit, _read_journal(journal), rank=team.rank, size=team.size)
    if team.size > 1:
        _encode_apart(opened, plan, artefacts, scratch, reporter)
    check = HeldOutCheck(opened, scratch) if team.first else None
    with ThreadPoolExecutor(1) as disk, reporter.phase("write", len(opened.blocks)) as tick:
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
    if check is not None:
        check.judge(reporter)


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
    with reporter.phase("encode", len(mine)) as tick:
        for place in mine:
            encoder.put_by(owners[place])
            tick()
    processes().wait()


def _read_journal(path: Path) -> int:
    return int(json.loads(path.read_text())["done"]) if path.exists() else 0


def encode_site(opened: Opened, site: Site, spec: Spec, artefact: dict[str, Tensor]) -> dict[str, Tensor]:
    """State dict of a compressed site on the CPU, in the written dtype; one that stays as it is, from the files."""
    if site.stored is not None and spec == site.stored:
        assert isinstance(opened.reader, Multiplied)
        return as_stored(opened, site, opened.reader.stored(site.name))
    return as_stored(opened, site, opened.request.method.encode(spec, artefact, dense_bias(opened, site)))


def as_encoded(spec: Spec, stored: dict[str, Tensor]) -> Spec:
    """`spec` with the length that a stream of entropy-coded numbers turned out to have."""
    if LENGTH not in spec.parameters:
        return spec
    stream = next(stored[name] for name in STREAMS if name in stored)
    return replace(spec, parameters={**spec.parameters, LENGTH: len(stream)})


def dense_bias(opened: Opened, site: Site) -> Tensor | None:
    """The bias, float32, of the layer that is compressed."""
    key = opened.walker.names.get(site.name + ".bias")
    return opened.reader.tensor(key).float() if key else None


def as_stored(opened: Opened, site: Site, raw: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a method encoded, on the CPU, in the written dtype, with the empty weight."""
    dtype = opened.dtype
    stored = {k: t.to(dtype) if t.is_floating_point() else t for k, t in raw.items()}
    stored["weight"] = torch.empty(0, dtype=dtype)
    for name, tensor in stored.items():
        if tensor.is_floating_point() and not all_finite(tensor):
            raise ArithmeticError(f"{site.name}: {name} does not fit into {dtype}")
    return {k: t.cpu() for k, t in stored.items()}


class Encoder:
    """The stored tensors of one block's sites, encoded once and kept while the block is being written.

    Sites that share are encoded all at once, when the first of them is asked for, into a scratch file; without it, as
    after an interruption, they are encoded again. They come with what they share, whoever stores it.
    """

    def __init__(self, opened: Opened, plan: Plan, artefacts: Artefacts, scratch: Path) -> None:
        self._opened, self._plan, self._artefacts, self._scratch = opened, plan, artefacts, scratch
        self._sites = {site.name: site for site in opened.sites}
        self._encoded: dict[str, dict[str, Tensor]] = {}

    def __call__(self, name: str) -> dict[str, Tensor]:
        """State dict of a compressed site, in the written dtype."""
        if name not in self._encoded:
            family = self._plan.family(name)
            if len(family) > 1:
                self._encoded[name] = self._shared(name, family)
            else:
                self._encoded[name] = self._alone(name)
        return self._encoded[name]

    def prepare(self, sites: Sequence[Site]) -> None:
        """Encode those of `sites` that are compressed, and share nothing, small ones side by side."""
        compressed = [site for site in sites if self._plan.specs[site.name].format != DENSE]
        alone = [site for site in compressed if len(self._plan.family(site.name)) == 1]
        device = self._opened.request.device
        encoded = side_by_side(lambda site: self._alone(site.name), alone, double_bytes, device)
        self._encoded |= {site.name: tensors for site, tensors in zip(alone, encoded, strict=True)}

    def put_by(self, owner: str) -> None:
        """Encode a weight, and those that share with it, for the encoders of other processes."""
        family = self._plan.family(owner)
        if len(family) > 1:
            self._shared(owner, family)
        elif not self._alone_path(owner).exists():
            write_tensors(self._alone_path(owner), self._alone(owner))

    def _alone_path(self, name: str) -> Path:
        return self._scratch / f"encoded-{name}.safetensors"

    def _alone(self, name: str) -> dict[str, Tensor]:
        if self._alone_path(name).exists():
            with safe_open(self._alone_path(name), framework="pt") as file:
                return {key: file.get_tensor(key).clone() for key in file.keys()}
        artefact = self._artefact(name)
        stored = {key.removeprefix(STORED): tensor.cpu() for key, tensor in artefact.items() if key.startswith(STORED)}
        return stored or encode_site(self._opened, self._sites[name], self._plan.specs[name], artefact)

    def _artefact(self, name: str) -> dict[str, Tensor]:
        device = decomposition_device(self._opened.request.device)
        return {key: tensor.to(device) for key, tensor in self._artefacts.load(self._sites[name]).items()}

    def _shared(self, name: str, family: list[str]) -> dict[str, Tensor]:
        path = self._scratch / f"shared-{family[0]}.safetensors"
        if not path.exists():
            write_tensors(path, self._encode_together(family))
        spec = self._plan.specs[name]
        with safe_open(path, framework="pt") as file:
            stored, found = set(file.keys()), {}
            for key in stored_tensors(spec.alone(), self._opened.dtype):
                possible = possible_places(key, f"{name}|", f"{family[0]}|")
                found[key] = file.get_tensor(next(place for place in possible if place in stored)).clone()
            return found

    def _encode_together(self, family: list[str]) -> dict[str, Tensor]:
        sites = [self._sites[name] for name in family]
        raw = self._opened.request.method.encode_together(
            [self._plan.specs[name] for name in family],
            [self._artefact(name) for name in family],
            [dense_bias(self._opened, site) for site in sites],
        )
        encoded = [as_stored(self._opened, site, part) for site, part in zip(sites, raw, strict=True)]
        return {f"{site.name}|{k}": t for site, part in zip(sites, encoded, strict=True) for k, t in part.items()}


def stand_ins_of(opened: Opened, plan: Plan) -> dict[str, list[str]]:
    """Modules whose experts are stored as linear layers, with the fused weights that an empty tensor stands for."""
    return stand_ins(opened.skeleton, [name for name, spec in plan.specs.items() if spec.format != DENSE])


class Layout:
    """The order of everything that is written: outside of the blocks first, then block by block."""

    def __init__(self, opened: Opened, plan: Plan) -> None:
        self._opened, self._plan = opened, plan
        self.planned: list[tuple[str, Tensor]] = []
        self._begins: dict[int, int] = {}
        self.ends: dict[int, int] = {}
        self._own: dict[int, list[str]] = {}
        self._stand_ins = stand_ins_of(opened, plan)
        self._empty = {f"{holder}.{key}" for holder, keys in self._stand_ins.items() for key in keys}
        self._compressed = {n: s for n, s in plan.specs.items() if s.format != DENSE}
        embeddings = [site for site in opened.embeddings if site.name in self._compressed]
        self._following = {f"{site.head}.weight": f"{site.name}.weight" for site in embeddings}
        stems = {block + ".": i for i, block in enumerate(opened.blocks)}
        for name in self._names():
            index = next((i for stem, i in stems.items() if name.startswith(stem)), len(stems))
            self._own.setdefault(index, []).append(name)
        for index in [len(stems), *range(len(stems))]:
            self._begins[index] = len(self.planned)
            for name in self._own.get(index, []):
                self.planned += self._plan_tensor(name)
            self.ends[index] = len(self.planned)

    def _names(self) -> list[str]:
        """Names of the dense model's tensors, experts fused as there unless one of theirs is compressed.

        Those follow the empty tensors that stand for the fused ones. A head that follows embeddings has none.
        """
        experts = self._opened.experts
        found: dict[str, None] = {}
        for known in self._opened.walker.names:
            name = self._following.get(known, known)
            holder, kept = experts_of(name, experts), self._opened.reader.kept_as(known)
            if kept:
                self._refuse_compressed(name, kept)
                found |= dict.fromkeys(kept)
            elif holder is None:
                found[name] = None
            elif holder in self._stand_ins:
                found |= dict.fromkeys([*(f"{holder}.{key}" for key in self._stand_ins[holder]), name])
            else:
                found |= dict.fromkeys(f"{holder}.{key}" for key in experts[holder].fused_shapes())
        return list(found)

    def _refuse_compressed(self, name: str, kept: list[str]) -> None:
        """InputError where a weight is compressed that the files keep as another one."""
        module = name.rpartition(".")[0]
        if module in self._compressed:
            raise InputError(
                f"{module} is stored as {kept[0]}, which transformers converts whenever it loads: leave it out "
                f"(--ignore {module})"
            )

    def _key(self, name: str) -> str:
        """What the reader calls a tensor that is written as it is."""
        return self._opened.walker.names.get(name, name)

    def _plan_tensor(self, name: str) -> list[tuple[str, Tensor]]:
        module, _, leaf = name.rpartition(".")
        if name in self._empty:
            return [(name, torch.empty(0, dtype=self._opened.dtype, device="meta"))]
        if module not in self._compressed:
            meta = self._opened.reader.meta(self._key(name))
            return [(name, torch.empty(meta.shape, dtype=self._opened.written_dtype(meta), device="meta"))]
        if leaf != "weight":
            return []
        stored = stored_tensors(self._compressed[module], self._opened.dtype)
        return [(f"{module}.{key}", tensor) for key, tensor in stored.items()]

    def tensors(
        self, block: int, encoder: Encoder, wanted: Callable[[int], bool] = lambda position: True
    ) -> Iterator[tuple[str, Tensor]]:
        """The tensors of a block in the planned order, those whose position in `planned` is wanted."""
        position = self._begins[block]
        for name in self._own.get(block, []):
            module, _, leaf = name.rpartition(".")
            if name in self._empty or module not in self._compressed:
                if wanted(position):
                    yield name, self._kept(name)
                position += 1
            elif leaf == "weight":
                for key in stored_tensors(self._compressed[module], self._opened.dtype):
                    if wanted(position):
                        yield f"{module}.{key}", encoder(module)[key]
                    position += 1

    def _kept(self, name: str) -> Tensor:
        """A tensor of the dense model, or the empty one that stands for experts that are no longer fused."""
        if name in self._empty:
            return torch.empty(0, dtype=self._opened.dtype)
        tensor = self._opened.reader.tensor(self._key(name))
        written = tensor.to(self._opened.written_dtype(tensor))
        if written.dtype != tensor.dtype and not all_finite(written):
            raise InputError(f"{name} does not fit into {written.dtype}: write --dtype bfloat16 or float32")
        return written


class HeldOutCheck:
    """Walks held-out windows through the model as it is written, and compares with the dense one.

    What is outside of the blocks comes first, and is kept: embeddings are read with it, and logits.
    """

    def __init__(self, opened: Opened, scratch: Path) -> None:
        assert opened.calibration is not None
        self._opened = opened
        self._ids = opened.calibration.held_out
        self._before = "less compressed" if isinstance(opened.reader, Multiplied) else "dense"
        self._dense = HiddenWalk(opened, scratch / "hidden").held_out(len(opened.blocks))
        self._outside: dict[str, tuple[Spec, dict[str, Tensor]]] = {}
        self._hidden: list[Tensor] = []

    @torch.no_grad()
    def step(self, block: int, encoder: Encoder, plan: Plan) -> None:
        """Run the windows through one compressed block, or through what comes before all of them."""
        walker, opened = self._opened.walker, self._opened
        beside = opened.embeddings if block == len(opened.blocks) else []
        compressed = [s for s in [*beside, *opened.sites_of(block)] if plan.specs[s.name].format != DENSE]
        stored = {s.name: (plan.specs[s.name], encoder(s.name)) for s in compressed}
        if block == len(opened.blocks):
            self._outside = stored
            with installed(opened, stored):
                self._hidden = [walker.embed(ids) for ids in self._ids]
            return
        with walker.block(block) as module, installed(opened, stored):
            self._hidden = [walker.run(block, module, hidden) for hidden in self._hidden]

    @torch.no_grad()
    def judge(self, reporter: Reporter) -> None:
        """Warn where the compressed model is far worse."""
        if not len(self._ids):
            return
        dense = self._perplexity(self._dense)
        with installed(self._opened, self._outside):
            compressed = self._perplexity(self._hidden)
        reporter.say(
            f"held-out calibration text ({len(self._ids)} windows): "
            f"perplexity {compressed:.4g}, {self._before} {dense:.4g} (x{compressed / dense:.2f})"
        )
        if not compressed <= LOUD_LOSS * dense:
            reporter.warn(
                f"perplexity on held-out calibration text is {compressed:.4g}, {compressed / dense:.3g} times "
                f"that of the {self._before} model: this checkpoint is probably useless; ask for a smaller ratio, "
                "another method, or an activation-aware metric"
            )

    def _perplexity(self, states: list[Tensor]) -> float:
        walker = self._opened.walker
        total = count = 0.0
        for ids, hidden in zip(self._ids, states, strict=True):
            inputs, following = ids[:-1].split(CHUNK), ids[1:].split(CHUNK)
            for read, part, wanted in zip(inputs, hidden[:, :-1].split(CHUNK, dim=1), following, strict=True):
                logits = walker.logits(read, part.to(walker.device, walker.dtype))[0].float()
                total += float(nn.functional.cross_entropy(logits, wanted.to(logits.device), reduction="sum"))
            count += len(ids) - 1
        return math.exp(min(total / count, 700.0))


@contextmanager
def installed(opened: Opened, stored: dict[str, tuple[Spec, dict[str, Tensor]]]) -> Iterator[None]:
    """While open, the loaded model has the named layers in their stored formats, given as spec and tensors.

    A head that follows embeddings is among them.
    """
    walker = opened.walker
    followed = {site.name: [site.head] for site in opened.embeddings if site.head is not None}
    changed = [other for name in stored for other in (name, *followed.get(name, ()))]
    originals = {name: walker.model.get_submodule(name) for name in changed}
    try:
        for name, (spec, tensors) in stored.items():
            put(walker.model, name, restored(spec, tensors, walker.dtype, walker.device), followed.get(name, ()))
        yield
    finally:
        for name, original in originals.items():
            walker.model.set_submodule(name, original)


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
