"""What is beyond model.max_length: cut without half an end-of-turn, or cut between turns."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ochat.config import DataConfig, SourceConfig
from ochat.data.conversation import Conversation, Message
from ochat.data.items import build_items, settle
from ochat.data.overlong import split_turns, truncate, whole_turns
from ochat.data.records import Record
from ochat.data.template import get_template
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


def build(tokenizer: ChatTokenizer, messages: list[dict[str, str]], *, max_length: int, overlong: str):
    source = SourceConfig(name="chats", path="chats.jsonl", condition="GPT4")
    data = DataConfig(prepared_dir="p", sources=(source,), overlong=overlong)
    records = [Record(number=1, row=json.dumps({"messages": messages}).encode())]
    chunk = build_items(records, source, data, source_id=0, tokenizer=tokenizer, max_length=max_length)
    batch, counts = settle(chunk, {}, drop_duplicates=False)
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
    assert (rows, counts.dropped) == ([], {"no reply": 1})


TURNS = st.lists(
    st.tuples(st.sampled_from(["user", "assistant"]), st.sampled_from(["", "a", "a b c", "d " * 30])),
    min_size=1,
    max_size=12,
)


@settings(max_examples=50)
@given(turns=TURNS, system=st.booleans(), limit=st.integers(20, 80))
def test_parts_hold_every_turn_once_in_order_and_fit_unless_one_exchange_does_not(
    tokenizer: ChatTokenizer, turns: list[tuple[str, str]], system: bool, limit: int
) -> None:
    head = [("system", "S")] if system else []
    whole = chat(*head, *turns)
    parts = split_turns(whole, tokenizer, limit)
    assert [m for part in parts for m in part.messages[len(head) :]] == list(whole.messages[len(head) :])
    assert all(part.messages[: len(head)] == whole.messages[: len(head)] for part in parts)
    assert all(part.messages[-1].role == "assistant" for part in parts[:-1])
    for part in parts:
        replies = sum(m.role == "assistant" for m in part.messages)
        assert length(tokenizer, part) <= limit or replies <= 1
