"""Golden ids: the original's own tokens with the real tokenizers, and a small committed set that any clone can test."""

import json
from collections.abc import Callable
from functools import cache
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from ochat.config import SourceConfig
from ochat.data.conversation import Conversation, Message, parse_conversation
from ochat.data.overlong import truncate
from ochat.data.replies import reply_starts
from ochat.data.template import get_template, render
from ochat.data.tokenize import ChatTokenizer, load_tokenizer
from ochat.errors import DataError, TemplateError
from tests.data import make_golden_mini

HERE = Path(__file__).parent
FIXTURES = HERE.parent / "fixtures" / "tokenizers"
SOURCE = SourceConfig(name="golden", path="conversations.jsonl")
NO_MESSAGES, ODD_ROLE, CONTROL_CONDITION = 294, 296, 298  # where ours is stricter than the original
STRICTER = {NO_MESSAGES, ODD_ROLE, CONTROL_CONDITION}
REAL = {
    "openchat-3.5": ("mistral-v0.1-eot", "tokenize_openchat_v3.2_mistral.jsonl"),
    "openchat-3.6": ("llama-3", "tokenize_openchat_3.6.jsonl"),
}
TEMPLATES = sorted(REAL)


@cache
def load(folder: Path, template: str) -> tuple[PreTrainedTokenizerFast, ChatTokenizer]:
    tokenizer = load_tokenizer(str(folder), get_template(template))
    return tokenizer, ChatTokenizer(tokenizer, get_template(template))


@cache
def golden_rows(path: Path) -> dict[int, dict[str, object]]:
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return {row["id"]: row for row in rows if "id" in row}


@cache
def conversations(path: Path) -> dict[int, Conversation]:
    rows = golden_rows(path).items()
    return {i: parse_conversation(r["conversation"], SOURCE, f"{path.name}:{i}") for i, r in rows if i not in STRICTER}


@pytest.fixture(params=TEMPLATES)
def real(
    request: pytest.FixtureRequest, shared: Path, real_tokenizers: Path
) -> tuple[PreTrainedTokenizerFast, ChatTokenizer, dict[int, Conversation], dict[int, dict[str, object]]]:
    folder, file = REAL[request.param]
    ours = load(real_tokenizers / folder, request.param)
    return *ours, conversations(shared / "golden" / "conversations.jsonl"), golden_rows(shared / "golden" / file)


def differing(ids_of: Callable[[Conversation], list[int]], chats: dict[int, Conversation], golden: dict) -> set[int]:
    return {i for i, chat in chats.items() if ids_of(chat) != golden[i]["tokens"]}


# --- the original's tokens


def test_every_conversation_has_the_originals_ids_and_weights(real: tuple) -> None:
    _, ours, chats, golden = real
    assert len(chats) == 147
    assert set(golden) - set(chats) == STRICTER
    for (i, chat), item in zip(chats.items(), ours.tokenize(list(chats.values())), strict=True):
        assert item.input_ids.tolist() == golden[i]["tokens"], (i, chat)
        np.testing.assert_array_equal(item.token_weights, np.float32(golden[i]["weights"]), str(i))


def test_every_prompt_has_the_originals_inference_ids(real: tuple) -> None:
    _, ours, chats, golden = real
    ends_with_user = 0
    for i, chat in chats.items():
        expected, prompt = golden[i]["tokens_inference"], ours.prompt_ids(chat)
        if chat.messages[-1].role == "assistant":
            assert prompt == expected, (i, chat)
        else:  # the original leaves the user's turn open; a prompt ends it and opens the assistant's
            ends_with_user += 1
            assert prompt[: len(expected) + 1] == expected + list(ours.end_of_turn_ids), (i, chat)
            assert len(prompt) > len(expected) + 1
    assert ends_with_user == 5


def test_replies_are_the_messages_with_a_weight(real: tuple) -> None:
    _, ours, chats, _ = real
    for chat, item in zip(chats.values(), ours.tokenize(list(chats.values())), strict=True):
        weights = [np.float32(m.weight) for m in chat.messages if m.weight]
        assert item.token_weights[reply_starts(item.token_weights)].tolist() == weights


def test_a_reply_beyond_the_context_leaves_nothing_and_one_before_it_stays(real: tuple) -> None:
    _, ours, chats, golden = real
    tagged = {golden[i]["tag"]: chat for i, chat in chats.items()}
    beyond, before = ours.tokenize([tagged["prompt_longer_than_8192"], tagged["long_260w"]])
    assert truncate(beyond, 8192) is None
    assert truncate(before, 8192) is not None


def test_one_string_instead_of_pieces_gives_other_ids(real: tuple) -> None:
    tokenizer, ours, chats, golden = real

    def as_one_string(chat: Conversation) -> list[int]:
        text = "".join(segment.text for segment in render(ours.template, chat))
        return [*ours.bos_ids, *tokenizer(text, add_special_tokens=False)["input_ids"]]

    assert differing(lambda chat: ours.tokenize([chat])[0].input_ids.tolist(), chats, golden) == set()
    different = {golden[i]["tag"] for i in differing(as_one_string, chats, golden)}
    assert "special_tokens" in different
    assert len(different) > 1


def test_without_neutralising_typed_control_strings_differ_and_nothing_else(real: tuple) -> None:
    tokenizer, ours, chats, golden = real

    def leaking(chat: Conversation) -> list[int]:
        pieces = [segment.text for segment in render(ours.template, chat)]
        return [*ours.bos_ids, *chain.from_iterable(tokenizer(pieces, add_special_tokens=False)["input_ids"])]

    different = differing(leaking, chats, golden)
    control = tokenizer.get_added_vocab()
    assert different == {i for i, c in chats.items() if any(t in m.content for m in c.messages for t in control)}
    assert sum(golden[i]["tag"] == "special_tokens" for i in different) >= 10


# --- where ours is stricter


def golden_row(shared: Path, number: int) -> object:
    return golden_rows(shared / "golden" / "conversations.jsonl")[number]["conversation"]


def test_a_conversation_without_messages_is_refused(shared: Path) -> None:
    with pytest.raises(DataError, match=r"^f:1: `items` must be a list with at least one message"):
        parse_conversation(golden_row(shared, NO_MESSAGES), SOURCE, "f:1")


def test_the_role_tool_call_is_refused(shared: Path) -> None:
    with pytest.raises(DataError, match=r"^f:1: message 2 has role 'tool_call'\. Known roles: system, user"):
        parse_conversation(golden_row(shared, ODD_ROLE), SOURCE, "f:1")


@pytest.mark.parametrize("template", TEMPLATES)
def test_control_strings_in_a_condition_are_refused(shared: Path, real_tokenizers: Path, template: str) -> None:
    _, ours = load(real_tokenizers / REAL[template][0], template)
    chat = parse_conversation(golden_row(shared, CONTROL_CONDITION), SOURCE, "f:1")
    expected = r"^condition '<\|end_of_turn\|><\|eot_id\|>' spells a control token of the tokenizer"
    for encode in (lambda: ours.tokenize([chat]), lambda: ours.prompt_ids(chat)):
        with pytest.raises(TemplateError, match=expected):
            encode()
    plain = Conversation(messages=chat.messages, condition="GPT4")
    assert ours.tokenize([plain])[0].input_ids.tolist()


# --- the model card's token lists


def test_prompts_have_the_ids_of_the_openchat_3_5_model_card(shared: Path, real_tokenizers: Path) -> None:
    _, ours = load(real_tokenizers / "mistral-v0.1-eot", "openchat-3.5")
    cases = json.loads((shared / "golden" / "model_card_token_asserts.json").read_text())["cases"]
    asked = [
        ("", [("user", "Hello")]),
        ("", [("user", "Hello"), ("assistant", "Hi"), ("user", "How are you today?")]),
        ("Code", [("user", "Implement quicksort using C++")]),
    ]
    for case, (condition, turns) in zip(cases, asked, strict=True):
        messages = tuple(Message(role=role, content=content) for role, content in turns)
        assert ours.prompt_ids(Conversation(messages=messages, condition=condition)) == case["tokens"]
        assert ours.prompt_ids(Conversation(messages=messages, condition="GPT3")) != case["tokens"]


# --- the small set of this repository

MINI = json.loads(make_golden_mini.GOLDEN.read_text(encoding="utf-8"))
MINI_CASES = [(template, case["name"]) for template in MINI for case in MINI[template]["cases"]]


def mini(template: str, name: str) -> tuple[ChatTokenizer, Conversation, dict]:
    (case,) = [case for case in MINI[template]["cases"] if case["name"] == name]
    _, ours = load(FIXTURES / MINI[template]["tokenizer"], template)
    return ours, parse_conversation(case["row"], SOURCE, "mini:1"), case


@pytest.mark.parametrize(("template", "name"), MINI_CASES)
def test_every_mini_conversation_has_its_ids_and_weights(template: str, name: str) -> None:
    ours, chat, case = mini(template, name)
    (item,) = ours.tokenize([chat])
    assert item.input_ids.tolist() == case["input_ids"]
    np.testing.assert_array_equal(item.token_weights, np.float32(case["token_weights"]))
    assert ours.prompt_ids(chat) == case["prompt_ids"]


@pytest.mark.parametrize("template", MINI)
def test_mini_conversations_tell_a_leak_from_plain_pieces(template: str) -> None:
    ours, chat, case = mini(template, "control strings of both")
    tokenizer, _ = load(FIXTURES / MINI[template]["tokenizer"], template)
    pieces = [segment.text for segment in render(ours.template, chat)]
    leaking = [*ours.bos_ids, *chain.from_iterable(tokenizer(pieces, add_special_tokens=False)["input_ids"])]
    assert leaking != case["input_ids"]
    assert ours.tokenize([chat])[0].input_ids.tolist() == case["input_ids"]


def test_the_committed_file_is_what_the_generator_makes(tmp_path: Path) -> None:
    make_golden_mini.write(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == make_golden_mini.GOLDEN.read_bytes()


def test_the_generator_uses_nothing_of_ochat() -> None:
    imports = [line for line in Path(make_golden_mini.__file__).read_text().splitlines() if "import" in line]
    assert any("transformers" in line for line in imports)
    assert not any("ochat" in line for line in imports)
