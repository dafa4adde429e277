"""One chat row of any supported format becomes a `Conversation`, or a DataError that says where and why not.

ShareGPT   {"conversations": [{"from": "human", "value": "Hi"}, ...]}
OpenAI     {"messages": [{"role": "user", "content": "Hi"}, ...]}
OpenChat   {"items": [{"role": "user", "content": "Hi", "weight": 0.0}, ...], "condition": "GPT4", "system": "..."}

Content is never changed here: it reaches the tokenizer as it was written.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from ochat.config import SourceConfig
from ochat.errors import DataError

# Weights and rewards are stored in float32: what is finite there.
MAX_NUMBER = float(np.finfo(np.float32).max)

Role = Literal["system", "user", "assistant"]
ROLES: tuple[Role, ...] = get_args(Role)
ROLE_NAMES: Mapping[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
}
# format -> (key of the list, key of a message's role, key of its content)
FORMATS: Mapping[str, tuple[str, str, str]] = {
    "sharegpt": ("conversations", "from", "value"),
    "openai": ("messages", "role", "content"),
    "openchat": ("items", "role", "content"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn. `weight` multiplies the loss of its content and end-of-turn; 0 is context, never trained."""

    role: Role
    content: str
    weight: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """A chat, the class it was labelled with, and the source it came from."""

    messages: tuple[Message, ...]
    condition: str = ""
    source: str = ""
    reward: float | None = None


def parse_conversation(row: object, source: SourceConfig, where: str) -> Conversation:
    """Turn one decoded JSON row into a Conversation; a row's own condition, system message and weights win.

    where  "file:line", heads every error message
    """
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected a JSON object, found {type(row).__name__}.")
    list_key, role_key, content_key = FORMATS[_format_of(row, source, where)]
    items = row[list_key]
    if not isinstance(items, list) or not items:
        raise DataError(f"{where}: `{list_key}` must be a list with at least one message. Drop the row or fill it.")
    messages = [_message(item, role_key, content_key, f"{where}: message {n}") for n, item in enumerate(items, 1)]
    if system := _text(row, "system", where):
        messages.insert(0, Message(role="system", content=system))
    condition = _text(row, "condition", where)
    return Conversation(
        messages=tuple(messages),
        condition=(source.condition if condition is None else condition).strip(),
        source=source.name,
        reward=_reward(row, source, where),
    )


def _format_of(row: Mapping[str, Any], source: SourceConfig, where: str) -> str:
    if source.format != "auto":
        if FORMATS[source.format][0] not in row:
            raise DataError(
                f"{where}: format {source.format!r} needs the key `{FORMATS[source.format][0]}`, found {_keys(row)}."
            )
        return source.format
    found = [name for name, (key, _, _) in FORMATS.items() if key in row]
    if len(found) != 1:
        known = ", ".join(f"`{key}` ({name})" for name, (key, _, _) in FORMATS.items())
        problem = f"several formats at once ({', '.join(found)})" if found else f"the keys {_keys(row)}"
        raise DataError(
            f"{where}: cannot tell the format from {problem}. Known keys: {known}. Set the source's `format`."
        )
    return found[0]


def _keys(row: Mapping[str, Any]) -> str:
    shown = ", ".join(f"`{key}`" for key in list(row)[:8])
    return shown or "none"


def _message(item: object, role_key: str, content_key: str, where: str) -> Message:
    if not isinstance(item, dict) or role_key not in item or content_key not in item:
        found = _keys(item) if isinstance(item, dict) else type(item).__name__
        raise DataError(f"{where}: needs `{role_key}` and `{content_key}`, found {found}.")
    name, content = item[role_key], item[content_key]
    role = ROLE_NAMES.get(name) if isinstance(name, str) else None
    if role is None:
        known = ", ".join(ROLE_NAMES)
        raise DataError(f"{where} has role {name!r}. Known roles: {known}. Rename it in the file, or drop the row.")
    if not isinstance(content, str):
        raise DataError(f"{where}: `{content_key}` must be text, found {type(content).__name__}.")
    _check_characters(content, content_key, where)
    weight = item.get("weight")
    if weight is None:
        return Message(role=role, content=content, weight=1.0 if role == "assistant" else 0.0)
    number = _number(weight, "weight", where, minimum=0.0)
    if role == "system" and number > 0:
        raise DataError(f"{where}: a system message has weight {number:g}; it is never trained. Set it to 0.")
    return Message(role=role, content=content, weight=number)


def _text(row: Mapping[str, Any], key: str, where: str) -> str | None:
    value = row.get(key)
    if value is not None and not isinstance(value, str):
        raise DataError(f"{where}: `{key}` must be text, found {type(value).__name__}.")
    if value is not None:
        _check_characters(value, key, where)
    return value


def _check_characters(text: str, key: str, where: str) -> None:
    """JSON can spell half of a character ("\\ud83d" alone), which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as exc:
        half = f"U+{ord(text[exc.start]):04X}"
        raise DataError(
            f"{where}: `{key}` has half a character ({half}) at {exc.start}. Delete it, or drop the row."
        ) from exc


def _reward(row: Mapping[str, Any], source: SourceConfig, where: str) -> float | None:
    if source.reward_field is None:
        return None
    if source.reward_field not in row:
        raise DataError(
            f"{where}: source {source.name!r} takes its rewards from `{source.reward_field}`, missing here."
        )
    return _number(row[source.reward_field], source.reward_field, where)


def _number(value: object, key: str, where: str, minimum: float = -MAX_NUMBER) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not minimum <= value <= MAX_NUMBER:
        bound = f" of at least {minimum:g}" if minimum == 0 else ""
        raise DataError(f"{where}: `{key}` is {str(value)[:40]}, expected a finite number{bound} (in float32).")
    return float(value)
