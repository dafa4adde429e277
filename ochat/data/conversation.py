"""One chat row of any supported format becomes a `Conversation`, or a RowError that says where and why not.

    {"messages": [{"role": "user", "content": "Hi"}, ...], "condition": "GPT4", "system": "...", "weight": 0.5}

The list of messages is formats.py's business; here is what every format shares. Content reaches the tokenizer as it
was written, unless the caller brings a function that cleans it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ochat.config import SourceConfig
from ochat.data.formats import read_messages
from ochat.data.messages import ROLE_NAMES, ROLES, Message, Role, number, own_weight
from ochat.data.problems import RowError

__all__ = ["ROLES", "ROLE_NAMES", "Conversation", "Message", "Role", "parse_conversation"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """A chat, the class it was labelled with, and the source it came from."""

    messages: tuple[Message, ...]
    condition: str = ""
    source: str = ""
    reward: float | None = None


def parse_conversation(
    row: object, source: SourceConfig, where: str, clean: Callable[[str], str] | None = None
) -> Conversation:
    """Turn one decoded row into a Conversation; a row's own condition, system message and weights win.

    where  "file:line", heads every error message
    clean  applied to every text before it is checked; None leaves texts as they are
    """
    if isinstance(row, list) and source.format in ("auto", "openai"):
        row = {"messages": row}
    if not isinstance(row, dict):
        raise RowError(f"{where}: expected a JSON object, found {type(row).__name__}.", "no object")
    messages = read_messages(row, source.format, where, own_weight(row, where))
    # Some data sets have the system text in both places.
    if (system := _system(row, where)) and (messages[0].role, messages[0].content) != ("system", system):
        messages.insert(0, Message(role="system", content=system))
    condition = _text(row, "condition", where)
    condition = (source.condition if condition is None else condition).strip()
    if clean is not None:
        messages = [replace(m, content=clean(m.content)) for m in messages]
        condition = clean(condition)
    for n, message in enumerate(messages, 1):
        _check_characters(message.content, f"message {n}", where)
    _check_characters(condition, "`condition`", where)
    return Conversation(
        messages=tuple(messages), condition=condition, source=source.name, reward=_reward(row, source, where)
    )


def _system(row: Mapping[str, Any], where: str) -> str | None:
    """`system`, or `system_prompt` as Orca and others call it."""
    system, prompt = _text(row, "system", where), _text(row, "system_prompt", where)
    if system and prompt and system != prompt:
        raise RowError(f"{where}: `system` and `system_prompt` differ. Keep one of them.", "two system texts")
    return system or prompt


def _text(row: Mapping[str, Any], key: str, where: str) -> str | None:
    value = row.get(key)
    if value is not None and not isinstance(value, str):
        raise RowError(f"{where}: `{key}` must be text, found {type(value).__name__}.", f"bad {key}")
    return value


def _check_characters(text: str, what: str, where: str) -> None:
    """JSON can spell half of a character ("\\ud83d" alone), which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as exc:
        half = f"U+{ord(text[exc.start]):04X}"
        raise RowError(
            f"{where}: {what} has half a character ({half}) at {exc.start}. Delete it, drop the row, or set "
            f"data.hygiene=clean.",
            "half a character",
        ) from exc


def _reward(row: Mapping[str, Any], source: SourceConfig, where: str) -> float | None:
    if source.reward_field is None:
        return None
    if source.reward_field not in row:
        raise RowError(
            f"{where}: source {source.name!r} takes its rewards from `{source.reward_field}`, missing here.",
            "no reward",
        )
    return number(row[source.reward_field], source.reward_field, where)
