"""Conversations become token ids with a loss weight each.

Every segment is encoded by itself and the ids are joined, because BPE(A) + BPE(B) is not BPE(A + B). Markup may become
control tokens; contents are encoded with special tokens switched off, so a typed "<|end_of_turn|>" stays plain pieces.

N  tokens of a conversation
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

from ochat.data.conversation import Conversation, Role
from ochat.data.template import Segment, Template, opening, prefix, render, render_prompt
from ochat.errors import TemplateError, first_line
from ochat.hub_names import located

# Normalizers as tokenizer.json has them: SentencePiece's way to write a text before it is cut into pieces.
SENTENCEPIECE_SPELLING = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": "\u2581"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
    ],
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizedConversation:
    """input_ids int32 [N]; token_weights float32 [N]: mask x message weight, 0 = context."""

    input_ids: NDArray[np.int32]
    token_weights: NDArray[np.float32]


def load_tokenizer(name_or_path: str, template: Template) -> PreTrainedTokenizerFast:
    """Load a tokenizer and add the control tokens of the template that it lacks (their ids follow its last one)."""
    # Not AutoTokenizer: in transformers 5 it rebuilds Llama-type tokenizers and gets leading spaces wrong (FACTS: 92 of
    # 511 strings). PreTrainedTokenizerFast takes tokenizer.json as it is.
    source = located(name_or_path)
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(source)
    except Exception as exc:  # the tokenizers library raises nothing narrower over a damaged file
        raise TemplateError(
            f"{name_or_path}: no tokenizer to be read there ({first_line(exc)}). It needs tokenizer.json."
        ) from exc
    if tokenizer.bos_token_id is None and template.bos == "required":
        raise TemplateError(
            f"{name_or_path}: the tokenizer has no bos_token, which template {template.name!r} begins with."
        )
    missing = [token for token in template.control_tokens if not _is_special(tokenizer, token)]
    if missing:
        tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in missing], special_tokens=True)
    return tokenizer


def _is_special(tokenizer: PreTrainedTokenizerFast, token: str) -> bool:
    return any(added.special and added.content == token for added in tokenizer.added_tokens_decoder.values())


def tokenizer_hash(tokenizer: PreTrainedTokenizerFast) -> str:
    """SHA-256 over everything that decides ids, control tokens included."""
    state = tokenizer.backend_tokenizer.to_str() + f"\n{tokenizer.bos_token_id}"
    return hashlib.sha256(state.encode()).hexdigest()


def adds_dummy_prefix(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether every encoded text gets a space in front, as SentencePiece does it."""
    first = tokenizer.backend_tokenizer.encode("a", add_special_tokens=False).tokens[0]
    return bool(first.startswith("\u2581"))


class ChatTokenizer:
    """A tokenizer bound to a template. Holds two encoders: one that knows control tokens, one that cannot make them."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, template: Template) -> None:
        self.template = template
        has_bos = template.bos != "never" and tokenizer.bos_token_id is not None
        self.bos_ids: list[int] = [tokenizer.bos_token_id] if has_bos else []
        self._markup = _encoder(tokenizer)
        self._content = _plain_encoder(tokenizer)
        self._spell = _take_over_spelling(self._content)
        self._control_ids = frozenset(tokenizer.added_tokens_decoder)
        self._markup_ids: dict[str, list[int]] = {}
        self._safe_conditions: set[str] = set()
        self.end_of_turn_ids = tuple(self._encode_markup(template.end_of_turn))
        for token in template.control_tokens:
            if len(self._encode_markup(token)) != 1:
                raise TemplateError(f"control token {token!r} of template {template.name!r} is not one token here.")

    def tokenize(self, conversations: Sequence[Conversation]) -> list[TokenizedConversation]:
        """Encode whole conversations for training. TemplateError as from `check`."""
        rendered = []
        for conversation in conversations:
            self.check_condition(conversation.condition)
            rendered.append(tuple(render(self.template, conversation)))
        return self._join(rendered)

    def prompt_ids(self, conversation: Conversation) -> list[int]:
        """Encode a prompt to be continued: default condition filled in, last end-of-turn left open."""
        self.check_condition(conversation.condition)
        segments = tuple(render_prompt(self.template, conversation))
        return self._join([segments])[0].input_ids.tolist()

    def opening_ids(self, role: Role, condition: str, *, first: bool) -> tuple[int, ...]:
        """The ids before a message's content, as `tokenize` writes them; `first` of its conversation, after BOS."""
        text = opening(self.template, role, condition, first=first)
        return tuple(self._encode_markup(text)) if text else ()

    def _join(self, rendered: Sequence[Sequence[Segment]]) -> list[TokenizedConversation]:
        contents = [self._spell(s.text) for segments in rendered for s in segments if s.kind == "content"]
        encoded = iter(self._content.encode_batch_fast(contents, add_special_tokens=False))
        result = []
        for segments in rendered:
            ids, lengths = [*self.bos_ids], [len(self.bos_ids)]
            for segment in segments:
                piece = next(encoded).ids if segment.kind == "content" else self._encode_markup(segment.text)
                ids += piece
                lengths.append(len(piece))
            weights = np.array([0.0, *(s.weight for s in segments)], dtype=np.float32)
            result.append(
                TokenizedConversation(
                    input_ids=np.array(ids, dtype=np.int32), token_weights=np.repeat(weights, lengths)
                )
            )
        return result

    def _encode_markup(self, text: str) -> list[int]:
        if text not in self._markup_ids:
            self._markup_ids[text] = self._markup.encode(text, add_special_tokens=False).ids
        return self._markup_ids[text]

    def check(self, conversation: Conversation) -> None:
        """Refuse a conversation that the template cannot write: its condition, or a role that it lacks."""
        self.check_condition(conversation.condition)
        for message in conversation.messages:
            prefix(self.template, message.role, conversation.condition)

    def check_condition(self, condition: str) -> None:
        """Refuse a condition that adds a control id or a line to any prefix: a class is a word, never a turn."""
        if condition in self._safe_conditions:
            return
        if "\n" in condition or "\r" in condition:
            raise TemplateError(f"condition {condition!r} has more than one line. Name the class with plain words.")
        for role in self.template.prefixes:
            plain = self._encode_markup(prefix(self.template, role, ""))
            marked = self._encode_markup(prefix(self.template, role, condition))
            if [i for i in plain if i in self._control_ids] != [i for i in marked if i in self._control_ids]:
                raise TemplateError(
                    f"condition {condition!r} spells a control token of the tokenizer. Name the class with plain words."
                )
        self._safe_conditions.add(condition)


def _encoder(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    encoder = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    # A tokenizer.json may carry these from whoever saved it; both would change ids without a word.
    encoder.no_truncation()
    encoder.no_padding()
    return encoder


def _plain_encoder(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """An encoder that makes no added token of any text, but for runs of white space, which are text."""
    encoder = _encoder(tokenizer)
    encoder.encode_special_tokens = True
    # That switch is for special tokens only; an ordinary added token (Qwen's <tool_call>) has to become one here.
    ordinary = [t.content for t in tokenizer.added_tokens_decoder.values() if not t.special]
    markup = [text for text in ordinary if text.replace("\u2581", " ").strip()]
    encoder.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in markup])
    return encoder


def _take_over_spelling(encoder: Tokenizer) -> Callable[[str], str]:
    """How to write a text for the encoder, which is kept from doing it itself where Python does the same faster.

    The library tracks where every character came from, which is a seventh of the time of SentencePiece tokenizers.
    """
    # It cuts ordinary added tokens out of a text first, and writes what is between them as texts of their own.
    all_special = all(token.special for token in encoder.get_added_tokens_decoder().values())
    if not all_special or json.loads(encoder.to_str())["normalizer"] != SENTENCEPIECE_SPELLING:
        return str
    encoder.normalizer = None
    return _sentencepiece_spelling


def _sentencepiece_spelling(text: str) -> str:
    return "\u2581" + text.replace(" ", "\u2581") if text else ""
