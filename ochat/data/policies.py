"""What is done about ugly chats, as `data.*` of the configuration says; noticed and counted in any case.

Order: hygiene (while reading), empty_turns, assistant_first, same_role. Duplicates and over-long chats come later:
the first needs all files, the second the tokenizer.

    user "" | assistant "Hi" | assistant "there"     empty_turns: trim, assistant_first: keep, same_role: merge
    assistant "Hi\\n\\nthere"
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from ochat.config import DataConfig
from ochat.data.conversation import Conversation, Message

# A terminal's colours; a byte order mark inside; old newlines; C0 without tab and newline, DEL, C1; half characters.
_UGLY = re.compile("\x1b\\[[0-9;]*[A-Za-z]|\ufeff|\r\n?|[\x00-\x08\x0b-\x1f\x7f-\x9f]|[\ud800-\udfff]")
_INVISIBLE = re.compile(r"[\s\u200b-\u200d\u2060\ufeff]*")
MERGED_WITH = "\n\n"
_UGLY_ASCII = bytes(code for code in range(128) if _UGLY.search(chr(code)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What the policies made of a conversation.

    conversation  None when it is dropped, for the `reason`
    noticed       what was found, whether or not anything was done about it
    """

    conversation: Conversation | None
    reason: str = ""
    noticed: tuple[str, ...] = ()


def is_ugly(text: str) -> bool:
    """Whether `data.hygiene=clean` would change the text."""
    if text.isascii():  # nearly all text; deleting bytes is twenty times faster than searching
        return len(text.encode().translate(None, _UGLY_ASCII)) < len(text)
    return _UGLY.search(text) is not None


def cleaned(text: str) -> str:
    """The text without control characters: newlines are \\n, half a character becomes U+FFFD, the rest vanishes."""
    return _UGLY.sub(_replacement, text)


def _replacement(match: re.Match[str]) -> str:
    found = match[0]
    if found[0] == "\r":
        return "\n"
    return "\ufffd" if "\ud800" <= found <= "\udfff" else ""


def apply_policies(conversation: Conversation, data: DataConfig) -> Verdict:
    """Judge the turns of one conversation."""
    messages: Sequence[Message] = conversation.messages
    noticed = []
    if any(_is_empty(m) for m in messages):
        noticed.append("empty turn")
        if data.empty_turns == "drop":
            return Verdict(conversation=None, reason="empty turn", noticed=tuple(noticed))
        if data.empty_turns == "trim":
            messages = [m for m in messages if not _is_empty(m)]
    if _begins_with_assistant(messages):
        noticed.append("assistant first")
        if data.assistant_first == "drop":
            return Verdict(conversation=None, reason="assistant first", noticed=tuple(noticed))
        if data.assistant_first == "trim":
            messages = _from_first_user(messages)
    if any(a.role == b.role for a, b in pairwise(messages)):
        noticed.append("same role twice")
        if data.same_role == "drop":
            return Verdict(conversation=None, reason="same role twice", noticed=tuple(noticed))
        if data.same_role == "merge":
            messages = _merged(messages)
    if messages is not conversation.messages:
        conversation = replace(conversation, messages=tuple(messages))
    return Verdict(conversation=conversation, noticed=tuple(noticed))


def _is_empty(message: Message) -> bool:
    """Nothing to be seen: no character but spaces, newlines and characters without width."""
    return _INVISIBLE.fullmatch(message.content) is not None


def _begins_with_assistant(messages: Sequence[Message]) -> bool:
    return next((m.role for m in messages if m.role != "system"), "user") == "assistant"


def _from_first_user(messages: Sequence[Message]) -> list[Message]:
    """Without the assistant's turns before the first user; the system message stays."""
    first = next((n for n, m in enumerate(messages) if m.role == "user"), len(messages))
    return [m for n, m in enumerate(messages) if m.role == "system" or n >= first]


def _merged(messages: Sequence[Message]) -> list[Message]:
    """Neighbours of one role and one weight as one turn. Different weights cannot share a turn and stay apart."""
    result: list[Message] = []
    for message in messages:
        last = result[-1] if result else None
        if last is not None and (last.role, last.weight) == (message.role, message.weight):
            result[-1] = replace(last, content=f"{last.content}{MERGED_WITH}{message.content}")
        else:
            result.append(message)
    return result
