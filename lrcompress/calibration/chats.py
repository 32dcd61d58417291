"""Chats as records keep them, and the text that a model's chat template makes of them."""

import json
from dataclasses import dataclass
from typing import Any

from lrcompress.errors import InputError

TEXT = "text"
"""The field of a record that is read where none is named."""
CHATS = ("messages", "conversations")
"""Fields of a chat that are read where a record has no text."""
ASKED, ADDED, ANSWERED, EARLIER = "instruction", "input", "output", "history"
"""Fields of an Alpaca record: what is asked for, what it is about, the answer, pairs of earlier ones."""
SYSTEM, TOOLS = "system", "tools"
"""Fields beside a chat: what the model is told first, the tools that it may call."""

_SHAREGPT = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant",
    "bing": "assistant", "bard": "assistant", "model": "assistant", "function_call": "assistant", "system": "system",
    "tool": "tool", "observation": "tool",
}  # fmt: skip
"""Who speaks in a ShareGPT record, and the role that this is."""


@dataclass(frozen=True)
class Chat:
    """Messages with `role` and `content`, as chat templates read them, and the tools that they may call."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None = None


def chat_of(record: dict[str, Any], field: str) -> Chat | None:
    """The chat that a record holds in `field`, or, where that is `text`, in a field that is usual; None for none.

    InputError, without a word on where, for a chat that cannot be understood.
    """
    for name in CHATS if field == TEXT else (field,):
        if isinstance(record.get(name), list):
            messages = [_message(turn) for turn in record[name]]
            break
    else:
        if field != TEXT or not isinstance(record.get(ASKED), str) or not isinstance(record.get(ANSWERED), str):
            return None
        messages = _alpaca(record)
    if not messages:
        raise InputError("a chat has no messages")
    told = record.get(SYSTEM)
    if isinstance(told, str) and told.strip() and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": told})
    return Chat(messages, _tools(record.get(TOOLS)))


def _message(turn: Any) -> dict[str, Any]:
    """A message of a chat in either notation; what a column of a table fills up with nothing is left out."""
    if isinstance(turn, dict) and isinstance(turn.get("role"), str):
        return {"content": None} | {key: value for key, value in turn.items() if value is not None}
    if isinstance(turn, dict) and isinstance(turn.get("value"), str) and "from" in turn:
        if not isinstance(turn["from"], str) or turn["from"] not in _SHAREGPT:
            raise InputError(f"a chat has a turn of {turn['from']!r} (known: {', '.join(_SHAREGPT)})")
        return {"role": _SHAREGPT[turn["from"]], "content": turn["value"]}
    known = ", ".join(map(str, turn)) if isinstance(turn, dict) else type(turn).__name__
    raise InputError(f"a chat has a turn without role and content, or from and value (it has: {known})")


def _alpaca(record: dict[str, Any]) -> list[dict[str, Any]]:
    earlier, added = record.get(EARLIER) or [], record.get(ADDED) or ""
    if not isinstance(earlier, list) or not all(isinstance(p, list | tuple) and len(p) == 2 for p in earlier):
        raise InputError(f"{EARLIER!r} holds no pairs of a question and an answer")
    asked = f"{record[ASKED]}\n{added}" if added else record[ASKED]
    pairs = [*earlier, (asked, record[ANSWERED])]
    return [
        {"role": role, "content": said}
        for pair in pairs
        for role, said in zip(("user", "assistant"), pair, strict=True)
    ]


def _tools(value: Any) -> list[Any] | None:
    """A list, which some data sets write as JSON."""
    try:
        found = json.loads(value) if isinstance(value, str) and value.strip() else value
    except ValueError as error:
        raise InputError(f"{TOOLS!r} is no JSON ({error})") from error
    if found and not isinstance(found, list):
        raise InputError(f"{TOOLS!r} is no list")
    return found or None


def rendered(chat: Chat, tokenizer: Any, opening: str) -> str:
    """The chat as the tokenizer's template writes it, without the `opening` that blocks of tokens begin with anyway."""
    text: str = tokenizer.apply_chat_template(chat.messages, tools=chat.tools, tokenize=False)
    return text.removeprefix(opening)
