"""Token ids as a person reads them: the text each token stands for, its weight, and where turns and prefixes are.

Called by inspect.py; inspect_terminal.py and inspect_html.py draw what leaves here. n tokens of a conversation.
"""

import codecs
import math
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from ochat.data.conversation import Role
from ochat.data.template import CONDITION
from ochat.data.tokenize import ChatTokenizer

NUM_LEVELS = 5

Kind = Literal["control", "prefix", "content"]
# Ids before a content -> whose it is, and under which condition. A system message without prefix has none: ().
_Openings = dict[tuple[int, ...], tuple[Role, str | None]]

_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
# Control and format characters could move a terminal's cursor or turn the reading direction; odd spaces hide.
_UNSEEN = frozenset({"Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp", "Zs"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """One token of a conversation.

    raw     the bytes it stands for
    text    the characters that are complete with it; "" when it holds only a part of one
    weight  loss weight of predicting it as trained, the source's included; 0 = context
    kind    control: one of the tokenizer's special tokens; prefix: what stands before a message's content, the
            separator after the turn before it included
    """

    id: int
    raw: bytes
    text: str
    weight: float
    kind: Kind


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """A message with what stands before it and its end-of-turn.

    role       None when nothing that the template writes begins it
    condition  None when the template writes none before this role
    """

    tokens: tuple[Token, ...]
    role: Role | None
    condition: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Glyphs:
    """A run of characters to draw. mark: what stands for something unseen; newline: a real line break follows."""

    text: str
    mark: bool = False
    newline: bool = False


class TokenReader:
    """A tokenizer's tables, turned around: ids to bytes, and ids to the openings that ChatTokenizer writes.

    A message without prefix (a system message of openchat-3.5) whose content spells a prefix is read as one: the ids
    are the same.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, chat_tokenizer: ChatTokenizer, conditions: Iterable[str]
    ) -> None:
        self._tokenizer = tokenizer
        self._added = {number: added.content for number, added in tokenizer.added_tokens_decoder.items()}
        self._control_ids = {number for number, added in tokenizer.added_tokens_decoder.items() if added.special}
        newline = tokenizer.backend_tokenizer.encode("\n", add_special_tokens=False).ids
        self._alphabet = _byte_alphabet() if newline[-1:] == self._ids_of("\u010a") else None
        self._num_bos = len(chat_tokenizer.bos_ids)
        self._end_of_turn = chat_tokenizer.end_of_turn_ids
        self._first, self._later = (
            _openings(chat_tokenizer, tuple(conditions), first=first) for first in (True, False)
        )

    def read(self, input_ids: NDArray[np.integer], token_weights: NDArray[np.floating]) -> tuple[Turn, ...]:
        """The turns of a conversation; BOS is in the first. token_weights float [n] as trained."""
        ids, weights = input_ids.tolist(), token_weights.tolist()
        turns = []
        for start, end in self._turns(ids):
            openings, first = (self._later, start) if start else (self._first, self._num_bos)
            found = next((known for known in openings if tuple(ids[first : first + len(known)]) == known), ())
            role, condition = openings.get(found, (None, None))
            past = first + len(found)
            kinds: list[Kind] = ["prefix" if first <= at < past else "content" for at in range(start, end)]
            tokens = self._tokens(ids[start:end], weights[start:end], kinds)
            turns.append(Turn(tokens=tokens, role=role, condition=condition))
        return tuple(turns)

    def _tokens(self, ids: Sequence[int], weights: Sequence[float], kinds: Sequence[Kind]) -> tuple[Token, ...]:
        """A turn's tokens. A character of several tokens is the text of the last: F0 9F 98 80 -> "" "" "" 😀."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        tokens = []
        for number, weight, kind in zip(ids, weights, kinds, strict=True):
            raw = self._raw(number)
            shown_kind: Kind = "control" if number in self._control_ids else kind
            tokens.append(Token(id=number, raw=raw, text=decoder.decode(raw), weight=weight, kind=shown_kind))
        return tuple(tokens)

    def ends_turn(self, input_ids: NDArray[np.integer]) -> bool:
        """Whether the last token completes an end-of-turn."""
        return tuple(input_ids[-len(self._end_of_turn) :].tolist()) == self._end_of_turn

    def _turns(self, ids: Sequence[int]) -> Iterator[tuple[int, int]]:
        start, size = 0, len(self._end_of_turn)
        for end in range(size, len(ids) + 1):
            if tuple(ids[end - size : end]) == self._end_of_turn:
                yield start, end
                start = end
        if start < len(ids):
            yield start, len(ids)

    def _ids_of(self, piece: str) -> list[int]:
        number = self._tokenizer.backend_tokenizer.token_to_id(piece)
        return [] if number is None else [number]

    def _raw(self, number: int) -> bytes:
        """The bytes of a token: of a byte-level alphabet, or of SentencePiece with its bytes as <0x0A>."""
        if number in self._added:
            return self._added[number].encode()
        piece: str = self._tokenizer.backend_tokenizer.id_to_token(number)
        if self._alphabet is not None:
            return bytes(self._alphabet[letter] for letter in piece)
        if byte := _BYTE_PIECE.fullmatch(piece):
            return bytes.fromhex(byte[1])
        return piece.replace("\u2581", " ").encode()


def _openings(tokenizer: ChatTokenizer, conditions: Sequence[str], *, first: bool) -> _Openings:
    """Longest first: of two that fit, the longer is meant."""
    openings = {
        tokenizer.opening_ids(role, condition, first=first): (role, condition if CONDITION in text else None)
        for condition in conditions
        for role, text in tokenizer.template.prefixes.items()
    }
    return dict(sorted(openings.items(), key=lambda entry: -len(entry[0])))


def _byte_alphabet() -> dict[str, int]:
    """The letters by which byte-level vocabularies spell bytes: printable Latin-1 as it is, the others from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


def glyphs(token: Token) -> Iterator[Glyphs]:
    """What to draw for a token: its text, with a mark for whatever could not be seen."""
    if not token.text:
        yield Glyphs(text=f"‹{token.raw.hex(' ').upper()}›", mark=True)
    run = ""
    for letter in token.text:
        if letter == " " or unicodedata.category(letter) not in _UNSEEN:
            run += letter
            continue
        if run:
            yield Glyphs(text=run)
            run = ""
        sign = {"\n": "↵", "\t": "⇥"}.get(letter, f"‹U+{ord(letter):04X}›")
        yield Glyphs(text=sign, mark=True, newline=letter == "\n")
    if run:
        yield Glyphs(text=run)


def weight_level(weight: float, highest: float) -> int:
    """0 for context, else 1 .. NUM_LEVELS in half decades below the highest weight: 1 -> 5, 0.1 -> 3, 0.01 -> 1."""
    if weight == 0:
        return 0
    return min(NUM_LEVELS, max(1, NUM_LEVELS + round(2 * math.log10(weight / highest))))
