"""Which format a row has, and how each becomes messages. docs/formats.md shows a row of each.

Lists of messages   sharegpt, openai (also as a bare list), openchat
Question, answer    alpaca, dolly, orca: one user turn, one assistant turn
Pairs               history
Refused by name     message trees, preference pairs, text dialogues
"""

from collections.abc import Callable, Mapping
from typing import Any

from ochat.data.keys import INPUT_KEYS, LIST_KEYS, MESSAGE_KEYS, ROW_KEYS, check_spelling, nearest
from ochat.data.messages import TOOL_HINT, Message, is_given, message, names, own_weight, read_message
from ochat.data.problems import RowError

Row = Mapping[str, Any]
# (row, where, weight of an assistant's message that has none) -> messages
Reader = Callable[[Row, str, float | None], list[Message]]

HUMAN = "\n\nHuman:"
PREFERENCES = (frozenset({"chosen", "rejected"}), frozenset({"preferred_output", "non_preferred_output"}))
# Where rows of a history have their last question or answer, outside of the pairs.
LAST_TURN = ("query", "question", "prompt", "instruction", "input", "response", "answer", "output", "completion")


def _message_list(list_key: str, role_key: str, content_key: str) -> Reader:
    def read(row: Row, where: str, weight: float | None) -> list[Message]:
        items = row[list_key]
        if not isinstance(items, list) or not items:
            raise RowError(
                f"{where}: `{list_key}` must be a list with at least one message. Drop the row or fill it.",
                "no messages",
            )
        places = (f"{where}: message {n}" for n in range(1, len(items) + 1))
        return [read_message(i, role_key, content_key, at, weight) for i, at in zip(items, places, strict=True)]

    return read


def _question_answer(question_key: str, answer_key: str) -> Reader:
    def read(row: Row, where: str, weight: float | None) -> list[Message]:
        check_spelling(row, (*INPUT_KEYS, "history"), where)
        question = _text(row, question_key, where)
        # As Alpaca writes it: the instruction, an empty line, the input. No preamble; the template is preamble enough.
        if more := _input(row, where):
            question = f"{question}\n\n{more}"
        before = _pairs(row, where, weight) if row.get("history") else []
        answer = _text(row, answer_key, where)
        return [*before, message("user", question), message("assistant", answer, default_weight=weight)]

    return read


def _input(row: Row, where: str) -> str:
    """What the question is about: `input` as Alpaca calls it or `context` as Dolly does, in whichever format."""
    texts = {key: _text(row, key, where) for key in INPUT_KEYS if row.get(key) not in (None, "")}
    if len(set(texts.values())) > 1:
        found = " and ".join(f"`{key}`" for key in texts)
        raise RowError(f"{where}: {found} differ. Join them, or keep one of them.", "two inputs")
    return next(iter(texts.values()), "")


def _history(row: Row, where: str, weight: float | None) -> list[Message]:
    """A chat that is all history. A turn beside the pairs would be its last one, under a name that is not known."""
    if besides := [key for key in LAST_TURN if row.get(key) not in (None, "")]:
        found = " and ".join(f"`{key}`" for key in besides)
        raise RowError(
            f"{where}: has {found} beside `history`. If that is the last turn, call it `question` and `response`; "
            f"if it is no part of the chat, drop it.",
            "turn beside the history",
        )
    return _pairs(row, where, weight)


def _pairs(row: Row, where: str, weight: float | None) -> list[Message]:
    """Pairs {"user": ..., "bot": ...} or ["question", "answer"]; a pair's weight is its answer's."""
    pairs = row["history"]
    if not isinstance(pairs, list) or not pairs:
        raise RowError(f"{where}: `history` must be a list with at least one pair.", "no messages")
    messages = []
    for n, pair in enumerate(pairs, 1):
        at = f"{where}: pair {n}"
        if isinstance(pair, list) and len(pair) == 2:
            pair = {"user": pair[0], "bot": pair[1]}
        if not isinstance(pair, dict):
            raise RowError(f"{at}: needs `user` and `bot`, found {type(pair).__name__}.", "malformed message")
        check_spelling(pair, MESSAGE_KEYS, at)
        messages.append(message("user", _text(pair, "user", at)))
        messages.append(message("assistant", _text(pair, "bot", at), own_weight(pair, at), at, default_weight=weight))
    return messages


def _text(row: Row, key: str, where: str) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        raise RowError(f"{where}: `{key}` must be text, found {type(value).__name__}.", "content is no text")
    return value


# format -> (keys a row of it has, its reader)
FORMATS: Mapping[str, tuple[frozenset[str], Reader]] = {
    "sharegpt": (frozenset({"conversations"}), _message_list("conversations", "from", "value")),
    "openai": (frozenset({"messages"}), _message_list("messages", "role", "content")),
    "openchat": (frozenset({"items"}), _message_list("items", "role", "content")),
    "alpaca": (frozenset({"instruction", "output"}), _question_answer("instruction", "output")),
    "dolly": (frozenset({"instruction", "response"}), _question_answer("instruction", "response")),
    "orca": (frozenset({"question", "response"}), _question_answer("question", "response")),
    "history": (frozenset({"history"}), _history),
}


def read_messages(row: Row, wanted: str, where: str, weight: float | None) -> list[Message]:
    """The messages of a row, without its row-wide system text.

    wanted  a key of FORMATS, or "auto"
    weight  of an assistant's message that has none of its own
    """
    name = _format_of(row, wanted, where)
    check_spelling(row, ROW_KEYS, where)
    if any(is_given(row.get(key)) for key in ("tools", "functions")):
        raise RowError(f"{where}: the row offers tools, which the model would not be shown. {TOOL_HINT}.", "tool call")
    return FORMATS[name][1](row, where, weight)


def _format_of(row: Row, wanted: str, where: str) -> str:
    # Arrow tables give every row every key; a null is a key the row does not have.
    present = {key for key, value in row.items() if value is not None}
    if wanted != "auto":
        if missing := FORMATS[wanted][0] - row.keys():
            keys = " and ".join(f"`{key}`" for key in sorted(missing))
            raise RowError(f"{where}: format {wanted!r} needs the key {keys}, found {names(row)}.", "unknown format")
        return wanted
    found = _fitting(present) or _fitting(set(row))
    # Messages beside two answers to choose from may well end with the question.
    if not found or any(pair <= present for pair in PREFERENCES):
        _refuse_by_name(row, where)
    if len(found) == 1:
        return found[0]
    known = ", ".join(f"{_keys(keys)} ({name})" for name, (keys, _) in FORMATS.items())
    problem = f"several formats at once ({', '.join(found)})" if found else f"the keys {names(row)}"
    near = next((n for key in row if (n := nearest(key, LIST_KEYS)) and n not in row), None) if not found else None
    hint = f" Did you mean `{near}`?" if near else ""
    raise RowError(
        f"{where}: cannot tell the format from {problem}.{hint} Known keys: {known}. Set the source's `format`.",
        "unknown format",
    )


def _keys(keys: frozenset[str]) -> str:
    return " + ".join(f"`{key}`" for key in sorted(keys))


def _fitting(keys: set[str]) -> list[str]:
    fitting = [name for name, (needed, _) in FORMATS.items() if needed <= keys]
    # An instruction may have a history of earlier turns; it is part of that format.
    return [name for name in fitting if name != "history"] or fitting


def _refuse_by_name(row: Row, where: str) -> None:
    """Formats that hold chats in a way which needs a choice that only the user can make."""
    texts = [row[key] for key in ("text", "chosen", "rejected") if isinstance(row.get(key), str)]
    if any(HUMAN in text for text in texts):
        raise RowError(
            f"{where}: is an Anthropic text dialogue (hh-rlhf): one text with `Human:` and `Assistant:` in it. "
            f"Choose a text, cut it at these words, and write the turns as `messages`.",
            "text dialogue",
        )
    if any(pair <= row.keys() for pair in PREFERENCES):
        raise RowError(
            f"{where}: is a preference pair. Write each answer as a chat of its own (`messages`), the better and the "
            f"worse ones into two files: two sources with different `condition` and `weight`. To read only the "
            f"messages beside the pair, if there are any, set the source's `format`.",
            "preference pair",
        )
    if "message_tree_id" in row or (isinstance(row.get("prompt"), dict) and "replies" in row["prompt"]):
        raise RowError(
            f"{where}: is a message tree (OASST). Write one chat per path from the root to a leaf as `messages`, for "
            f"example along the replies of rank 0.",
            "message tree",
        )
