"""Calibration text that the model writes itself."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrcompress.model.generation import written
from lrcompress.model.limits import check_tokens, known_tokens
from lrcompress.model.skeleton import auto_class, library_errors, read_config


@torch.no_grad()
def sample_from_model(
    folder: Path, tokenizer: Any, samples: int, seqlen: int, seed: int, *, trust_remote_code: bool = False
) -> Tensor:
    """(samples, seqlen) tokens drawn from the dense model at temperature 1 and nothing else, from one token on.

    No setting of the folder's generation config counts, and no token is forbidden: behind an end of text the model
    writes on as it will. Needs the whole model in memory.
    """
    auto = auto_class(read_config(folder, trust_remote_code=trust_remote_code))
    start = tokenizer.bos_token_id
    start = (tokenizer.eos_token_id if start is None else start) or 0
    ids = torch.full((samples, 1), start, dtype=torch.int64)
    with library_errors("the model cannot write text of its own", "use shorter blocks or a text file"):
        model = auto.from_pretrained(folder, use_safetensors=True, trust_remote_code=trust_remote_code).eval()
        check_tokens(ids, known_tokens(model), str(folder))
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            made = written(model, ids, seqlen - 1, draw=True)
    return made[:, :seqlen].to(torch.int64)
