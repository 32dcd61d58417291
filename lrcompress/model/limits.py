"""What a model can read: the tokens of its vocabulary, the positions of its context."""

from typing import Any

from torch import Tensor, nn

from lrcompress.errors import InputError

_CONTEXT_KEYS = ("max_position_embeddings", "max_seq_len", "n_positions", "n_ctx")
"""What configs call the number of positions."""


def known_tokens(model: nn.Module) -> int:
    """Rows of the model's input embeddings: it reads the tokens below this number."""
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    return int(embeddings.weight.shape[0])


def check_tokens(ids: Tensor, known: int, label: str) -> None:
    """InputError where ids of any shape hold a token that model `label`, which knows `known` of them, has no row for.

    Read past the end an accelerator would fail for good.
    """
    largest = int(ids.max()) if ids.numel() else -1
    if largest >= known:
        raise InputError(
            f"the tokenizer of {label} makes token {largest}, the model knows {known}: "
            "its tokenizer files belong to another model"
        )


def guard_tokens(model: nn.Module, label: str) -> None:
    """From now on the model refuses tokens that it does not know as `check_tokens` does, whoever made them."""
    known = known_tokens(model)

    def check(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for given in (*args, *kwargs.values()):
            if isinstance(given, Tensor):
                check_tokens(given, known, label)

    model.get_input_embeddings().register_forward_pre_hook(check, with_kwargs=True)  # type: ignore[operator]


def longest_context(config: Any) -> int | None:
    """Positions that a model of this config was made for, None where it names no number."""
    language = config.get_text_config() if hasattr(config, "get_text_config") else config
    named = (getattr(language, key, None) for key in _CONTEXT_KEYS)
    return next((value for value in named if isinstance(value, int) and value > 0), None)
