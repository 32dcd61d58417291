"""What a model can read: the tokens of its vocabulary, the positions of its context."""

import inspect
from typing import Any

from torch import Tensor, nn

from lrcompress.errors import InputError

_CONTEXT_KEYS = ("max_position_embeddings", "max_seq_len", "n_positions", "n_ctx")
"""What configs call the number of positions."""
_SPARE_ROWS = 8
"""A table of positions has up to so many rows more than positions."""


def known_tokens(model: nn.Module) -> int:
    """Rows of the model's input embeddings, stored in whatever format: it reads the tokens below this number."""
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    rows = embeddings.num_embeddings if isinstance(embeddings, nn.Embedding) else embeddings.weight.shape[0]
    return int(rows)


def check_tokens(ids: Tensor, known: int, label: str) -> None:
    """InputError where ids of any shape hold a token that model `label`, which knows `known` of them, has no row for.

    Read past the end an accelerator would fail for good.
    """
    largest = int(ids.max()) if ids.numel() else -1
    if largest >= known:
        raise InputError(
            f"the tokenizer of {label} makes token {largest}, the model knows {known}: "
            "its tokenizer files belong to another model, copy its own there"
        )


def guard_tokens(model: nn.Module, label: str) -> None:
    """From now on the model refuses tokens that it does not know as `check_tokens` does, whoever made them."""
    known = known_tokens(model)

    def check(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for given in (*args, *kwargs.values()):
            if isinstance(given, Tensor) and not given.is_floating_point():
                check_tokens(given, known, label)

    model.get_input_embeddings().register_forward_pre_hook(check, with_kwargs=True)  # type: ignore[operator]


def reads_images(model: nn.Module) -> bool:
    """Whether the model takes images beside text."""
    asked: Any = getattr(model, "input_modalities", ())
    arguments = inspect.signature(model.forward).parameters
    return "image" in ([asked] if isinstance(asked, str) else asked) or any(
        "pixel_values" in name for name in arguments
    )


def longest_context(config: Any) -> int | None:
    """Positions that a model of this config was made for, None where it names no number."""
    language = config.get_text_config() if hasattr(config, "get_text_config") else config
    named = (getattr(language, key, None) for key in _CONTEXT_KEYS)
    return next((value for value in named if isinstance(value, int) and value > 0), None)


def length_warning(model: nn.Module, length: int) -> str | None:
    """What to say of blocks of so many tokens where they are longer than the model's context, None where they are not.

    InputError where the model has learnt its positions, and so has none beyond them.
    """
    context = longest_context(model.config)
    if context is None or length <= context:
        return None
    said = f"blocks of {length} tokens are longer than the model's context, {context} positions"
    words = model.get_input_embeddings()  # type: ignore[operator]
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding) and module is not words]
    if any(0 <= table.num_embeddings - context < _SPARE_ROWS for table in tables):
        raise InputError(f"{said}, and it has learnt no others: use a shorter length")
    return f"{said}: what it computes beyond them may be of little use"
