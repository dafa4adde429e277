"""Conversations longer than model.max_length: cut off, or cut between turns into parts.

n  tokens of a conversation
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ochat.data.conversation import Conversation, Message
from ochat.data.tokenize import ChatTokenizer, TokenizedConversation


def truncate(
    item: TokenizedConversation, max_length: int, end_of_turn: tuple[int, ...] = ()
) -> TokenizedConversation | None:
    """Cut to max_length tokens and to the last supervised one; None when none is left.

    end_of_turn  ids that are kept whole or not at all

    The first token is never predicted, so a weight there supervises nothing.
    """
    is_long = len(item.input_ids) > max_length
    limit = whole_turns(item.input_ids.tolist(), max_length, end_of_turn) if is_long else max_length
    supervised = np.flatnonzero(item.token_weights[1:limit])
    if len(supervised) == 0:
        return None
    end = int(supervised[-1]) + 2
    return TokenizedConversation(input_ids=item.input_ids[:end], token_weights=item.token_weights[:end])


def whole_turns(ids: Sequence[int], max_length: int, end_of_turn: tuple[int, ...]) -> int:
    """Where to cut at or before max_length, so that no end-of-turn is cut in two.

    end_of_turn 8 9, max_length 3:  ids 1 7 8 | 9 2  ->  2
    """
    if len(ids) <= max_length:
        return len(ids)
    whole = list(end_of_turn)
    for cut in range(1, len(whole)):
        start = max_length - cut
        if start >= 0 and list(ids[start : start + len(whole)]) == whole:
            return start
    return max_length


def split_turns(conversation: Conversation, tokenizer: ChatTokenizer, max_length: int) -> list[Conversation]:
    """Parts of at most max_length tokens, each with the condition and the system message; every turn is in one part.

    A cut falls after an assistant's turn only, so that no answer loses its question. What is too long between two such
    places is a part by itself, longer than max_length; `truncate` is for that.

        system S, turns u1 a1 u2 a2 u3 a3  ->  S u1 a1 u2 a2 | S u3 a3
    """
    turns = _turns(conversation, tokenizer)
    num_system = next((n for n, turn in enumerate(turns) if turn.message.role != "system"), len(turns))
    system = turns[:num_system]
    parts: list[list[_Turn]] = []
    length = 0
    for exchange in _exchanges(turns[num_system:]):
        more = sum(turn.after for turn in exchange)
        if parts and length + more <= max_length:
            parts[-1] += exchange
            length += more
        else:
            parts.append([*system, *exchange])
            length = len(tokenizer.bos_ids) + parts[-1][0].first + sum(turn.after for turn in parts[-1][1:])
    return [replace(conversation, messages=tuple(turn.message for turn in part)) for part in parts] or [conversation]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Turn:
    """A message and its tokens: as the first of a conversation, and after another one, where a separator may stand."""

    message: Message
    first: int
    after: int


def _turns(conversation: Conversation, tokenizer: ChatTokenizer) -> list[_Turn]:
    # Pieces are tokenised one by one, so lengths of turns add up to the length of the whole.
    alone = [replace(conversation, messages=(message,)) for message in conversation.messages]
    turns = []
    for message, item in zip(conversation.messages, tokenizer.tokenize(alone), strict=True):
        openings = (tokenizer.opening_ids(message.role, conversation.condition, first=at) for at in (True, False))
        opening, after_another = map(len, openings)
        first = len(item.input_ids) - len(tokenizer.bos_ids)
        turns.append(_Turn(message=message, first=first, after=first - opening + after_another))
    return turns


def _exchanges(turns: Sequence[_Turn]) -> Iterator[Sequence[_Turn]]:
    """Runs of turns that end with an assistant's; the last may end otherwise."""
    begin = 0
    for n, turn in enumerate(turns, 1):
        if turn.message.role == "assistant" or n == len(turns):
            yield turns[begin:n]
            begin = n
