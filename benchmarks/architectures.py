"""Sends a tiny random model of every type that transformers knows through the whole way: makes docs/architectures.md.

    python -m benchmarks.architectures [--only TYPE ...] [--processes 2] [--output docs/architectures.md]

Exit code 1 where a type is wrong, so that a new release of transformers is tried by running it
(recipes/ci/architectures.yml, once a week).

A type is right where the compressed folder loads, with nothing missing, as the class that its config names, computes
what that class computes with every compressed weight multiplied out and put in place, and holds every other tensor bit
for bit. Every type runs in a process of its own, for at most LIMIT seconds of a core.
"""

import argparse
import contextlib
import json
import os
import re
import resource
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from benchmarks.tiny import VOCABULARY, tiny_config
from benchmarks.toys import tokenizer_of
from lrcompress.errors import InputError, LrcompressError
from lrcompress.kernels.native import FOLDER
from lrcompress.model.experts import is_fused
from lrcompress.model.skeleton import find_blocks, language_model, library_errors, text_config
from lrcompress.model.surgery import dense_parts, stored_layers
from lrcompress.model.targets import find_sites
from lrcompress.pipeline import compress
from lrcompress.recipe import make_recipe

LIMIT = 90
"""Seconds of a core that a type may take."""

WEIGHTS_ALONE: dict[str, Any] = {"method": {"name": "ecsq", "metric": "plain"}, "bpw": 6}
"""What a refusal to walk through a model's blocks names as the way out."""

TOLERANCE = 3e-4
"""Of the largest logit: what float32 sums in another order may differ by."""

METHODS: dict[str, dict[str, Any]] = {
    "lord": {"method": {"name": "lord", "metric": "input"}, "ratio": 0.3},
    "auto": {"method": "auto", "bpw": 6},
}

IDS = torch.arange(2, 34)[None]


@dataclass
class Verdict:
    """right, wrong, refused or not built, and why; `share`: of a model of the default config that are targets."""

    mapping: str
    kind: str
    method: str
    verdict: str
    reason: str = ""
    difference: float | None = None
    targets: int = 0
    share: float | None = None


class Refused(LrcompressError):
    """What lrcompress said about a model that it does not take."""


class Wrong(LrcompressError):
    """What a result does not do."""


def main() -> None:
    """Try every type, write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=[], help="model types")
    parser.add_argument("--mapping", choices=["causal", "images"], help="one of the two mappings")
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--output", type=Path, default=Path("docs/architectures.md"))
    arguments = parser.parse_args()
    wanted = [
        (mapping, kind, name)
        for mapping, kinds in mappings().items()
        for kind, name in kinds.items()
        if mapping in (arguments.mapping or mapping) and (not arguments.only or kind in arguments.only)
    ]
    start = time.perf_counter()
    torch.set_num_threads(1)
    tried("causal", "llama", "LlamaForCausalLM", ["lord"])  # imports what every forked process would import again
    with ThreadPoolExecutor(arguments.processes) as pool:
        found = [v for part in pool.map(lambda one: apart(*one, arguments.methods), wanted) for v in part]
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(table(found, time.perf_counter() - start), encoding="utf8")
    print(json.dumps({method: counts(found, method) for method in arguments.methods}))
    if any(one.verdict == "wrong" for one in found):
        raise SystemExit(1)


def mappings() -> dict[str, dict[str, str]]:
    """Model type to class name: of causal language models, and of those that read images or sound beside text."""
    causal = dict(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    return {"causal": causal, "images": dict(modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES)}


def apart(mapping: str, kind: str, name: str, methods: list[str]) -> list[Verdict]:
    """The verdicts on one type, found in a forked process."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        status = 1
        try:
            resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + LIMIT, resource.RLIM_INFINITY))
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
                os.dup2(nowhere.fileno(), 2)
                found = [asdict(one) for one in tried(mapping, kind, name, methods)]
            os.write(writing, json.dumps(found).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    found = [Verdict(**one) for one in json.loads(said)] if said else []
    if not found:
        found = [Verdict(mapping, kind, method, "wrong", f"crashed, or took more than {LIMIT} s") for method in methods]
    for one in found:
        print(
            mapping, kind, one.method, one.verdict, one.reason, one.difference, one.targets, file=sys.stderr, flush=True
        )
    return found


def tried(mapping: str, kind: str, name: str, methods: list[str]) -> list[Verdict]:
    """The verdicts on one type, in this process."""
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory(prefix="architectures-") as temporary:
        folder = Path(temporary)
        os.environ["LRCOMPRESS_CACHE"] = str(cache_for(folder))
        try:
            with library_errors("no such model"):
                build(kind, name, folder / "dense")
        except LrcompressError as error:
            return [Verdict(mapping, kind, method, "not built", words(error)) for method in methods]
        share = default_share(kind, name)
        found = []
        for method in methods:
            one = Verdict(mapping, kind, method, "right", share=share)
            try:
                with library_errors("stopped"):
                    one.difference, one.targets = check(folder / "dense", folder / method, METHODS[method])
            except Refused as error:
                one.verdict, one.reason = "refused", words(error)
                if "metric=plain" in str(error):
                    one.verdict, more = cured(folder, method)
                    one.reason += more
            except LrcompressError as error:
                one.verdict, one.reason = "wrong", words(error) + place(error.__cause__)
            found.append(one)
        return found


def cache_for(folder: Path) -> Path:
    """A cache of a type's own, but for the compiled kernels, which are the same for all of them."""
    kernels = Path(tempfile.gettempdir()) / f"architectures-kernels-{os.getuid()}"
    kernels.mkdir(exist_ok=True)
    (folder / "cache").mkdir()
    (folder / "cache" / FOLDER).symlink_to(kernels)
    return folder / "cache"


def cured(folder: Path, method: str) -> tuple[str, str]:
    """The verdict on a model that was refused, and what is to be said where the way out was tried that was named."""
    try:
        with library_errors("stopped"):
            check(folder / "dense", folder / f"{method}-alone", WEIGHTS_ALONE)
    except LrcompressError as error:
        return "wrong", f"; and by its weights alone: {words(error)}"
    return "refused", "; by its weights alone it is right"


def place(error: BaseException | None) -> str:
    """Where an error came up, nothing for none."""
    if error is None:
        return ""
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f" [{Path(where.filename).name}:{where.lineno}]"


def build(kind: str, name: str, folder: Path) -> None:
    """A tiny random checkpoint of the type that computes logits from text, with a tokenizer."""
    cls, config = getattr(transformers, name), tiny_config(CONFIG_MAPPING[kind])
    if getattr(cls, "config_class", None) is type(text_config(config)) is not type(config):
        config = text_config(config)
    torch.manual_seed(0)
    model = cls._from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # larger than the usual initialisation, so that layers matter
            if parameter.dim() > 1 and parameter.is_floating_point():
                parameter.mul_(3)
        logits = run(model)
    if not torch.isfinite(logits).all():
        raise ValueError("the dense model's logits are not finite")
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)


@cache
def tokenizer() -> Any:
    """One trained on real English text, a part of what every Python carries."""
    from pydoc_data.topics import topics

    return tokenizer_of("\n\n".join(topics[key] for key in sorted(topics))[:100_000])


def run(model: nn.Module) -> torch.Tensor:
    """Logits of a text, by the language model inside where the whole asks for an image."""
    with torch.no_grad():
        model = language_model(model, find_blocks(model))
        logits: torch.Tensor = model(input_ids=IDS, use_cache=False).logits
        return logits


def check(dense: Path, folder: Path, recipe: dict[str, Any]) -> tuple[float, int]:
    """Compress, load, compare; the largest difference of logits relative to the largest, and the number of targets."""
    data = {"model": str(dense), "output": str(folder), **recipe}
    data["calibration"] = {"source": "python-docs", "samples": 2, "seqlen": 32}
    try:
        report = compress(make_recipe(data)).report
    except InputError as error:
        raise Refused(str(error)) from error
    loaded, expected = loaded_as_named(folder), loaded_as_named(dense)
    stored = stored_layers(loaded)
    compressed = {target["name"] for target in report["targets"] if target["format"] != "dense"}
    if compressed != set(stored):
        raise Wrong(f"{len(compressed)} weights are reported as compressed, {len(stored)} are stored so")
    check_rest(expected, loaded, set(stored))
    for name, layer in stored.items():
        put(expected, name, layer)
    one, two = run(expected), run(loaded)
    difference = float((one - two).abs().max() / one.abs().max())
    if not difference <= TOLERANCE:
        raise Wrong(f"logits differ by {difference:.1e} of the largest")
    return difference, len(report["targets"])


def loaded_as_named(folder: Path) -> nn.Module:
    """The model of a folder in the class that its config names, nothing missing."""
    named = json.loads((folder / "config.json").read_text())["architectures"][0]
    model, info = getattr(transformers, named).from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    for problem in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if info[problem]:
            raise Wrong(f"loads as {named} with {len(info[problem])} {problem}: {sorted(map(str, info[problem]))[0]}")
    model.eval()
    return model  # type: ignore[no-any-return]


def check_rest(dense: nn.Module, loaded: nn.Module, stored: set[str]) -> None:
    """Wrong where a tensor that belongs to no compressed layer is not the dense one."""
    found = loaded.state_dict()
    for name, tensor in dense.state_dict().items():
        kept = name in found and name.rpartition(".")[0] not in stored
        stood_for = kept and not found[name].numel()  # of experts that are linear layers now
        if kept and not stood_for and not torch.equal(found[name], tensor):
            raise Wrong(f"{name} is not what it was")


@torch.no_grad()
def put(model: nn.Module, name: str, layer: Any) -> None:
    """A compressed layer's weight, multiplied out, in the place of the dense one, or of an expert's slice."""
    weight, bias = dense_parts(layer)
    try:
        target = model.get_submodule(name)
    except AttributeError:
        holder, number, part = name.rsplit(".", 2)
        put_expert(model.get_submodule(holder), int(number), part, weight, bias)
        return
    target.weight = nn.Parameter(weight.T.clone() if layer.spec.conv1d else weight)
    if bias is not None:
        target.bias = nn.Parameter(bias)


def put_expert(fused: Any, number: int, part: str, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """One projection of one expert within fused parameters, laid out as transformers describes them."""
    both = part != "down_proj" and fused.has_gate
    stem = "gate_up_proj" if both else part
    for suffix, value in (("", weight), ("_bias", bias)):
        if value is not None:
            slot = getattr(fused, stem + suffix)[number]
            slot = slot.T if fused.is_transposed and not suffix else slot
            if both:
                half = len(slot) // 2
                first = part == "gate_proj"
                slot = (
                    (slot[:half] if first else slot[half:]) if fused.is_concatenated else slot[0 if first else 1 :: 2]
                )
            slot.copy_(value)


def default_share(kind: str, name: str) -> float | None:
    """Of the parameters of a model of the type's default config, those that are targets."""
    cls = getattr(transformers, name)
    with contextlib.suppress(Exception):
        config = CONFIG_MAPPING[kind]()
        if getattr(cls, "config_class", None) is type(text_config(config)) is not type(config):
            config = text_config(config)
        with torch.device("meta"):
            model = cls._from_config(config)
        experts = [module for module in model.modules() if is_fused(module)]
        targets = sum(p.numel() for module in experts for p in module.parameters() if p.dim() == 3)
        targets += sum(s.shape[0] * s.shape[1] for s in find_sites(model, find_blocks(model), [], []))
        return targets / sum(parameter.numel() for parameter in model.parameters())
    return None


def words(error: BaseException) -> str:
    """What an error says, without the folder that the model lay in, short enough for a table."""
    said = re.sub(r"\S*/architectures-\S*", "FOLDER", " ".join(str(error).split())) or type(error).__name__
    return said.replace("|", "/")[:300]


def counts(found: list[Verdict], method: str) -> dict[str, dict[str, int]]:
    """How many of each verdict, by mapping."""
    by = {
        mapping: Counter(v.verdict for v in found if v.mapping == mapping and v.method == method)
        for mapping in mappings()
    }
    return {mapping: dict(counter) for mapping, counter in by.items() if counter}


def table(found: list[Verdict], seconds: float) -> str:
    """docs/architectures.md."""
    methods = list(dict.fromkeys(one.method for one in found))
    lines = [
        "# Model types", "",
        "Made by `python -m benchmarks.architectures`: a tiny random model of every type that transformers "
        f"{transformers.__version__} has in its causal and its multimodal mapping, compressed on text, loaded as the "
        "class that its config names and compared with the dense model that has the multiplied-out weights in place "
        f"(at most {TOLERANCE:g} of the largest logit); every tensor that was not compressed is compared bit for bit. "
        f"Vocabulary {VOCABULARY}, float32, CPU, torch {torch.__version__}, {seconds / 60:.0f} minutes on "
        f"{os.cpu_count()} cores.", "",
        "What is refused because its blocks cannot be run one by one is compressed by its weights alone, without text: "
        "`--method ecsq --set metric=plain`. The script does that too, and compares it in the same way.", "",
        "Targets: share of the parameters of a model of the type's default config that is compressed by default.", "",
        "| mapping | method | right | wrong | refused | not built |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for mapping in mappings():
        for method in methods:
            counter = Counter(v.verdict for v in found if v.mapping == mapping and v.method == method)
            if counter:
                row = " | ".join(str(counter[verdict]) for verdict in ("right", "wrong", "refused", "not built"))
                lines.append(f"| {mapping} | {method} | {row} |")
    lines += ["", f"| mapping | type | {' | '.join(methods)} | targets | why |", "|---" * (len(methods) + 4) + "|"]
    kinds = dict.fromkeys((one.mapping, one.kind) for one in found)
    for mapping, kind in kinds:
        own = {one.method: one for one in found if (one.mapping, one.kind) == (mapping, kind)}
        share = next((f"{one.share:.0%}" for one in own.values() if one.share is not None), "")
        why = "; ".join(dict.fromkeys(one.reason for one in own.values() if one.reason))
        verdicts = " | ".join(own[method].verdict for method in methods)
        lines.append(f"| {mapping} | `{kind}` | {verdicts} | {share} | {why} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
