"""Text that a model writes by its probabilities alone, whatever its generation config says."""

from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def written(model: Any, ids: Tensor, count: int, *, draw: bool, ends: tuple[int, ...] = ()) -> Tensor:
    """(rows, length + count) ids (rows, length) and what follows: drawn at temperature 1, or each time the likeliest.

    A row is at an end behind a token of `ends` and is filled up with that. `model` is one of transformers'; what its
    generation config says of sampling, penalties, forbidden, forced and last tokens does not count.
    """
    from transformers import GenerationConfig

    plain = GenerationConfig(
        do_sample=draw,
        num_beams=1,
        max_new_tokens=count,
        eos_token_id=list(ends) or None,
        pad_token_id=ends[0] if ends else 0,
        **({"temperature": 1.0, "top_k": 0, "top_p": 1.0} if draw else {}),
    )
    kept, model.generation_config = model.generation_config, GenerationConfig()  # it fills up what `plain` leaves open
    try:
        made: Tensor = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=plain)
    finally:
        model.generation_config = kept
    return made
