"""One message of a chat row: whose it is, what it says, how much it counts.

role     any of ROLE_NAMES, capitalised or not
content  text, or a list of typed text parts, which are joined without anything in between
weight   the first of WEIGHT_KEYS that is given; else 1 for an assistant, 0 for the rest

Tool calls, tool results and pictures are refused: a chat without them would be half of what was said.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from ochat.data.keys import MESSAGE_KEYS, WEIGHT_KEYS, check_spelling
from ochat.data.problems import RowError

# Weights and rewards are stored in float32: what is finite there.
MAX_NUMBER = float(np.finfo(np.float32).max)

Role = Literal["system", "user", "assistant"]
ROLES: tuple[Role, ...] = get_args(Role)
ROLE_NAMES: Mapping[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "developer": "system",
}
TOOL_ROLES = frozenset({"tool", "tool_call", "tool_response", "function", "function_call", "observation", "ipython"})
TOOL_KEYS = ("tool_calls", "tool_call", "tool_call_id", "function_call", "function_calls", "tools", "functions")
MAX_SHOWN = 60
TOOL_HINT = "Tools are not supported: drop the row, or set data.on_error=skip to leave such rows out"


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn. `weight` multiplies the loss of its content and end-of-turn; 0 is context, never trained."""

    role: Role
    content: str
    weight: float = 0.0


def read_message(
    item: object, role_key: str, content_key: str, where: str, default_weight: float | None = None
) -> Message:
    """One item of a row's list of messages.

    default_weight  an assistant's weight when the message has none of its own
    """
    if not isinstance(item, dict):
        found = type(item).__name__
        raise RowError(f"{where}: needs `{role_key}` and `{content_key}`, found {found}.", "malformed message")
    for key in TOOL_KEYS:
        if is_given(item.get(key)):
            raise RowError(f"{where} has `{key}`. {TOOL_HINT}.", "tool call")
    if role_key not in item or content_key not in item:
        raise RowError(f"{where}: needs `{role_key}` and `{content_key}`, found {names(item)}.", "malformed message")
    role = _role(item[role_key], where)
    content = _content(item[content_key], content_key, where)
    check_spelling(item, MESSAGE_KEYS, where)
    return message(role, content, own_weight(item, where), where, default_weight)


def message(
    role: Role, content: str, weight: float | None = None, where: str = "", default_weight: float | None = None
) -> Message:
    """A message with the weight it was given, or the usual one of its role."""
    if weight is None:
        usual = 1.0 if default_weight is None else default_weight
        return Message(role=role, content=content, weight=usual if role == "assistant" else 0.0)
    if role == "system" and weight > 0:
        raise RowError(
            f"{where}: a system message has weight {weight:g}; it is never trained. Set it to 0.", "bad weight"
        )
    return Message(role=role, content=content, weight=weight)


def _role(name: object, where: str) -> Role:
    role = ROLE_NAMES.get(name.lower()) if isinstance(name, str) else None
    if role is None:
        known = f"{where} has role {shown(name)}. Known roles: {', '.join(ROLE_NAMES)}."
        if isinstance(name, str) and name.lower() in TOOL_ROLES:
            raise RowError(f"{known} {TOOL_HINT}.", "tool call")
        raise RowError(f"{known} Rename it in the file, or drop the row.", "unknown role")
    return role


def _content(content: object, key: str, where: str) -> str:
    if isinstance(content, str):
        return content
    if not (isinstance(content, list) and content and all(isinstance(part, dict) for part in content)):
        raise RowError(f"{where}: `{key}` must be text, found {type(content).__name__}.", "content is no text")
    texts = []
    for n, part in enumerate(content, 1):
        kind = part.get("type")
        text = part.get("value") if part.get("text") is None else part["text"]
        if kind != "text" or not isinstance(text, str):
            hint = TOOL_HINT if isinstance(kind, str) and "tool" in kind else "Only text can be trained: drop the row"
            reason = "tool call" if hint is TOOL_HINT else "part that is no text"
            raise RowError(f"{where}: part {n} of `{key}` is of type {shown(kind)}, expected 'text'. {hint}.", reason)
        texts.append(text)
    return "".join(texts)


def is_given(value: object) -> bool:
    """Whether there are tools in it; some data sets write that there are none as text."""
    return bool(value) and value not in ("[]", "{}", "null", "None")


def own_weight(item: Mapping[str, Any], where: str) -> float | None:
    """The weight that a message or row states under any of WEIGHT_KEYS; None when it states none."""
    given = {key: item[key] for key in WEIGHT_KEYS if item.get(key) is not None}
    if not given:
        return None
    numbers = {
        key: float(value) if key == "train" and isinstance(value, bool) else number(value, key, where, minimum=0.0)
        for key, value in given.items()
    }
    if len(set(numbers.values())) > 1:
        found = " and ".join(f"`{key}` {value:g}" for key, value in numbers.items())
        raise RowError(f"{where} has {found}. They mean the same: keep one.", "bad weight")
    return next(iter(numbers.values()))


def number(value: object, key: str, where: str, minimum: float = -MAX_NUMBER) -> float:
    """A weight or reward; RowError unless it is a finite number of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not minimum <= value <= MAX_NUMBER:
        bound = f" of at least {minimum:g}" if minimum == 0 else ""
        raise RowError(
            f"{where}: `{key}` is {shown(value)}, expected a finite number{bound} (in float32).", f"bad {key}"
        )
    return float(value)


def names(row: Mapping[str, Any]) -> str:
    """The keys of a row, the first few, as an error message shows them."""
    return ", ".join(f"`{shown(str(key))[1:-1]}`" for key in list(row)[:8]) or "none"


def shown(value: object) -> str:
    """A value of a chat file as an error message shows it: on one line, escaped, and not at a length of megabytes."""
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 4]}...{text[-1]}"
