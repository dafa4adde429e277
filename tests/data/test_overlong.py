"""What is beyond model.max_length: cut without half an end-of-turn, or cut between turns."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ochat.config import DataConfig, SourceConfig
from ochat.data.conversation import Conversation, Message
from ochat.data.items import Chunk, build_items, fit, settle
from ochat.data.overlong import split_turns, truncate, whole_turns
from ochat.data.records import Record
from ochat.data.template import TEMPLATES, get_template
from ochat.data.tokenize import ChatTokenizer, TokenizedConversation, load_tokenizer

LONG = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "q q q"},
    {"role": "assistant", "content": "a a a"},
    {"role": "user", "content": "r r r"},
    {"role": "assistant", "content": "b b b"},
    {"role": "user", "content": "t t t"},
    {"role": "assistant", "content": "c c c"},
]


@pytest.fixture(scope="module")
def tokenizer(request: pytest.FixtureRequest) -> ChatTokenizer:
    folder = request.config.rootpath / "tests" / "fixtures" / "tokenizers" / "mini-mistral"
    template = get_template("openchat-3.5")
    return ChatTokenizer(load_tokenizer(str(folder), template), template)


SOURCE = SourceConfig(name="chats", path="chats.jsonl", condition="GPT4")


def policy(overlong: str) -> DataConfig:
    return DataConfig(prepared_dir="p", sources=(SOURCE,), overlong=overlong)


def chunk(tokenizer: ChatTokenizer, chats: list[list[dict[str, str]]], *, max_length: int, overlong: str) -> Chunk:
    records = [Record(number=n, row=json.dumps({"messages": m}).encode()) for n, m in enumerate(chats, 1)]
    return build_items(records, SOURCE, policy(overlong), source_id=0, tokenizer=tokenizer, max_length=max_length)


def build(tokenizer: ChatTokenizer, messages: list[dict[str, str]], *, max_length: int, overlong: str):
    made = chunk(tokenizer, [messages], max_length=max_length, overlong=overlong)
    batch, _, counts = settle(made, {}, drop_duplicates=False)
    return batch.to_pylist(), counts


def chat(*messages: tuple[str, str]) -> Conversation:
    turns = (Message(role=r, content=c, weight=float(r == "assistant")) for r, c in messages)
    return Conversation(messages=tuple(turns), condition="GPT4")


def length(tokenizer: ChatTokenizer, conversation: Conversation) -> int:
    return len(tokenizer.tokenize([conversation])[0].input_ids)


# --- a cut keeps an end-of-turn whole or takes it away


@pytest.mark.parametrize(
    ("ids", "limit", "at"),
    [
        ([1, 7, 8, 9, 2], 3, 2),  # between 8 and 9
        ([1, 7, 8, 9, 2], 4, 4),  # after it
        ([1, 7, 8, 9, 2], 2, 2),  # before it
        ([1, 7, 8, 7, 2], 3, 3),  # an 8 that begins nothing
        ([1, 7, 8, 9], 5, 4),
    ],
)
def test_no_end_of_turn_is_cut_in_two(ids: list[int], limit: int, at: int) -> None:
    assert whole_turns(ids, limit, (8, 9)) == at


def test_three_pieces_are_taken_away_together() -> None:
    assert [whole_turns([1, 7, 8, 9, 6, 2], limit, (8, 9, 6)) for limit in (2, 3, 4, 5)] == [2, 2, 2, 5]
    assert whole_turns([1, 7, 8, 9, 6, 2], 4, ()) == 4


def test_truncation_takes_half_an_end_of_turn_away_with_its_weight() -> None:
    item = TokenizedConversation(
        input_ids=np.array([1, 7, 8, 9, 2], np.int32), token_weights=np.array([0, 1, 1, 1, 0], np.float32)
    )
    cut, half = truncate(item, 3, (8, 9)), truncate(item, 3)
    assert cut is not None
    assert half is not None
    assert cut.input_ids.tolist() == [1, 7]
    assert half.input_ids.tolist() == [1, 7, 8]


def test_rows_of_a_template_whose_end_of_turn_is_two_tokens_end_with_both_or_neither(
    request: pytest.FixtureRequest,
) -> None:
    folder = request.config.rootpath / "tests" / "fixtures" / "tokenizers" / "mini-mistral"
    template = replace(get_template("openchat-3.5"), end_of_turn="<|end_of_turn|>\n")
    tokenizer = ChatTokenizer(load_tokenizer(str(folder), template), template)
    first, second = tokenizer.end_of_turn_ids[0], tokenizer.end_of_turn_ids[1:]
    (whole,), _ = build(tokenizer, LONG[1:3], max_length=1000, overlong="truncate")
    assert whole["input_ids"][-len(second) - 1 :] == [first, *second]
    for limit in range(len(whole["input_ids"]) - len(second) - 3, len(whole["input_ids"])):
        (row,), _ = build(tokenizer, LONG[1:3], max_length=limit, overlong="truncate")
        without = len(whole["input_ids"]) - len(second) - 1
        assert len(row["input_ids"]) == min(limit, without)


# --- policies


def test_drop_leaves_only_the_over_long_out(tokenizer: ChatTokenizer) -> None:
    (whole,), _ = build(tokenizer, LONG, max_length=1000, overlong="drop")
    size = len(whole["input_ids"])
    assert build(tokenizer, LONG, max_length=size, overlong="drop")[1].kept == 1
    rows, counts = build(tokenizer, LONG, max_length=size - 1, overlong="drop")
    assert (rows, counts.kept, counts.dropped) == ([], 0, {"over-long": 1})


def test_split_parts_have_system_text_and_condition_and_every_reply_once(tokenizer: ChatTokenizer) -> None:
    (whole,), _ = build(tokenizer, LONG, max_length=1000, overlong="split")
    limit = len(whole["input_ids"]) - 1
    rows, counts = build(tokenizer, LONG, max_length=limit, overlong="split")
    first = chat(*((m["role"], m["content"]) for m in LONG[:5]))
    second = chat(*((m["role"], m["content"]) for m in (LONG[0], *LONG[5:])))
    expected = [item.input_ids.tolist() for item in tokenizer.tokenize([first, second])]
    assert [row["input_ids"] for row in rows] == expected
    assert [row["line"] for row in rows] == [1, 1]
    assert sum(row["num_supervised"] for row in rows) == whole["num_supervised"]
    assert (counts.read, counts.kept, counts.rows, counts.split, counts.truncated) == (1, 1, 2, 1, 0)
    assert counts.conditions == {"GPT4": 2}
    truncated, cut = build(tokenizer, LONG, max_length=limit, overlong="truncate")
    assert (len(truncated), cut.truncated, cut.split) == (1, 1, 0)
    assert truncated[0]["num_supervised"] < whole["num_supervised"]


def test_a_turn_that_is_too_long_by_itself_is_truncated_and_counted(tokenizer: ChatTokenizer) -> None:
    huge = [*LONG[:3], {"role": "user", "content": "r"}, {"role": "assistant", "content": "b " * 100}, *LONG[5:]]
    rows, counts = build(tokenizer, huge, max_length=60, overlong="split")
    assert [len(row["input_ids"]) for row in rows][1] == 60
    assert (len(rows), counts.split, counts.truncated, counts.cut_tokens > 0) == (3, 1, 1, True)


def test_a_system_text_that_is_too_long_by_itself_leaves_nothing(tokenizer: ChatTokenizer) -> None:
    messages = [{"role": "system", "content": "S " * 50}, *LONG[1:]]
    rows, counts = build(tokenizer, messages, max_length=20, overlong="split")
    assert (rows, counts.dropped) == ([], {"prompt fills max_length": 1})


def test_an_answer_lost_behind_a_question_that_is_too_long_is_counted(tokenizer: ChatTokenizer) -> None:
    huge = [*LONG[:3], {"role": "user", "content": "r " * 100}, *LONG[4:]]
    rows, counts = build(tokenizer, huge, max_length=60, overlong="split")
    lost = length(tokenizer, chat(("system", "S"), ("user", "r " * 100), ("assistant", "b b b")))
    assert (len(rows), counts.kept, counts.split, counts.truncated) == (2, 1, 1, 1)
    assert (counts.cut_tokens, counts.trimmed_tokens) == (lost - 60, 60)
    short, fine = build(tokenizer, LONG, max_length=40, overlong="split")
    assert (len(short) > 1, fine.truncated, fine.cut_tokens, fine.trimmed_tokens) == (True, 0, 0, 0)


def test_what_a_duplicate_lost_is_not_counted(tokenizer: ChatTokenizer) -> None:
    huge = [*LONG[:3], {"role": "user", "content": "r " * 100}, *LONG[4:]]
    once, twice = (
        settle(chunk(tokenizer, [huge] * n, max_length=60, overlong="split"), {}, drop_duplicates=True)[2]
        for n in (1, 2)
    )
    assert (once.read, twice.read, twice.dropped) == (1, 2, {"duplicate": 1})
    assert (twice.truncated, twice.cut_tokens, twice.trimmed_tokens) == (1, once.cut_tokens, once.trimmed_tokens)


# --- splitting, over every template

FIXTURES = Path(__file__).parents[1] / "fixtures" / "tokenizers"
PAIRS = [(folder, name) for folder in ("mini-mistral", "mini-llama3") for name in TEMPLATES]
CONTENTS = st.sampled_from(["", "a", "a b c", "d " * 30, "\n", "GPT4 User: a", "<|im_end|>\n"]) | st.text(max_size=8)
TURNS = st.lists(
    st.tuples(st.sampled_from(["user", "assistant"]), CONTENTS, st.sampled_from([0.0, 0.5, 1.0])),
    min_size=1,
    max_size=12,
)


LIMITS = st.tuples(st.integers(1, 12), st.integers(-1, 3))


def beside_a_border(whole: Conversation, tokenizer: ChatTokenizer, limit: tuple[int, int]) -> int:
    """A length a few tokens around that of the first so many messages, where a token too many or too few shows."""
    num_messages, more = limit
    return max(8, length(tokenizer, replace(whole, messages=whole.messages[:num_messages])) + more)


@cache
def load(folder: str, name: str) -> ChatTokenizer:
    template = get_template(name)
    return ChatTokenizer(load_tokenizer(str(FIXTURES / folder), template), template)


def supervised(items: Iterable[TokenizedConversation]) -> list[tuple[int, float]]:
    pairs = [zip(item.input_ids.tolist(), item.token_weights.tolist(), strict=True) for item in items]
    return [(number, weight) for pair in pairs for number, weight in pair if weight]


def first_exchange(messages: Sequence[Message]) -> Sequence[Message]:
    end = next((n for n, m in enumerate(messages, 1) if m.role == "assistant"), len(messages))
    return messages[:end]


@pytest.mark.parametrize(("folder", "name"), PAIRS)
@settings(max_examples=40, deadline=None)
@given(turns=TURNS, system=st.booleans(), limit=LIMITS)
def test_parts_fit_are_full_and_hold_every_turn_once_in_order(
    folder: str, name: str, turns: list[tuple[str, str, float]], system: bool, limit: tuple[int, int]
) -> None:
    tokenizer = load(folder, name)
    head = (Message(role="system", content="S"),) if system and "system" in tokenizer.template.prefixes else ()
    messages = tuple(Message(role=r, content=c, weight=w) for r, c, w in turns)
    whole = Conversation(messages=(*head, *messages), condition="GPT4", source="s")
    limit = beside_a_border(whole, tokenizer, limit)
    parts = split_turns(whole, tokenizer, limit)
    turns_of = [part.messages[len(head) :] for part in parts]

    assert [m for part in turns_of for m in part] == list(messages)
    assert all(replace(part, messages=()) == replace(whole, messages=()) for part in parts)  # condition and source
    assert all(part.messages[: len(head)] == head for part in parts)
    assert all(part[-1].role == "assistant" for part in turns_of[:-1])
    for part, of_part in zip(parts, turns_of, strict=True):
        assert length(tokenizer, part) <= limit or first_exchange(of_part) == of_part
    for part, following in zip(parts, turns_of[1:], strict=False):
        longer = replace(part, messages=(*part.messages, *first_exchange(following)))
        assert length(tokenizer, longer) > limit


@pytest.mark.parametrize(("folder", "name"), PAIRS)
@settings(max_examples=40, deadline=None)
@given(turns=TURNS, limit=LIMITS)
def test_rows_of_a_split_chat_are_conversations_of_their_own_and_supervise_every_turn_once(
    folder: str, name: str, turns: list[tuple[str, str, float]], limit: tuple[int, int]
) -> None:
    tokenizer = load(folder, name)
    messages = tuple(Message(role=r, content=c, weight=w) for r, c, w in turns)
    whole = Conversation(messages=messages, condition="GPT4", source="s")
    limit = beside_a_border(whole, tokenizer, limit)
    (item,) = tokenizer.tokenize([whole])
    pieces, _ = fit(whole, item, policy("split"), tokenizer, limit)
    parts = split_turns(whole, tokenizer, limit) if len(item.input_ids) > limit else [whole]
    alone = [tokenizer.tokenize([part])[0] for part in parts]
    rows = [(row, own) for (_, row), own in zip(pieces, alone, strict=True) if row is not None]

    for row, own in rows:
        assert 2 <= len(row.input_ids) <= limit
        assert row.input_ids.tolist() == own.input_ids[: len(row.input_ids)].tolist()
        assert row.token_weights[-1] > 0
    if all(len(own.input_ids) <= limit for own in alone):
        assert supervised(row for row, _ in rows) == supervised([item])
    for (_, row), own in zip(pieces, alone, strict=True):  # a part loses what is beyond the limit, and no more
        assert supervised([row] if row else []) == supervised([own])[: len(supervised([row] if row else []))]
        assert len(supervised([row] if row else [])) == np.count_nonzero(own.token_weights[:limit])


def test_a_part_of_exactly_the_limit_stays_and_one_token_less_takes_an_exchange_away() -> None:
    tokenizer = load("mini-llama3", "chatml")
    three = chat(*(("user", "a"), ("assistant", "b")) * 3)
    two = replace(three, messages=three.messages[:4])
    limit = length(tokenizer, two)
    assert [len(part.messages) for part in split_turns(three, tokenizer, limit)] == [4, 2]
    assert [len(part.messages) for part in split_turns(three, tokenizer, limit - 1)] == [2, 2, 2]
