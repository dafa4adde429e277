"""Rows of every format become Conversations; what is wrong with a row is said with its place."""

import pytest

from ochat.config import SourceConfig
from ochat.data.conversation import Conversation, Message, parse_conversation
from ochat.errors import DataError

EXPECTED = (Message(role="user", content="Hi", weight=0.0), Message(role="assistant", content="Hello", weight=1.0))
SHAREGPT = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}
OPENAI = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
OPENCHAT = {"items": [{"role": "user", "content": "Hi", "weight": 0.0}, {"role": "assistant", "content": "Hello"}]}


def parse(row: object, **source: object) -> Conversation:
    return parse_conversation(row, SourceConfig(name="chats", path="chats.jsonl", **source), "chats.jsonl:7")


def refused(row: object, **source: object) -> str:
    with pytest.raises(DataError) as raised:
        parse(row, **source)
    text = str(raised.value)
    assert text.startswith("chats.jsonl:7")
    assert "\n" not in text
    return text


def items(**changes: object) -> dict[str, object]:
    return {"items": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello", **changes}]}


@pytest.mark.parametrize(("row", "name"), [(SHAREGPT, "sharegpt"), (OPENAI, "openai"), (OPENCHAT, "openchat")])
def test_every_format_gives_the_same_conversation(row: object, name: str) -> None:
    assert parse(row).messages == EXPECTED
    assert parse(row, format=name) == parse(row)


@pytest.mark.parametrize("name", ["human", "user"])
def test_role_names_of_all_formats_are_known(name: str) -> None:
    row = {"conversations": [{"from": "system", "value": "S"}, {"from": name, "value": "Hi"}]}
    assert [m.role for m in parse(row).messages] == ["system", "user"]


@pytest.mark.parametrize("name", ["gpt", "chatgpt", "assistant"])
def test_only_the_assistant_is_trained_unless_the_row_says_otherwise(name: str) -> None:
    row = {"conversations": [{"from": "human", "value": "Hi"}, {"from": name, "value": "Hello"}]}
    assert [m.weight for m in parse(row).messages] == [0.0, 1.0]


def test_a_messages_own_weight_wins() -> None:
    row = {
        "items": [{"role": "user", "content": "a", "weight": 0.5}, {"role": "assistant", "content": "b", "weight": 0}]
    }
    assert [m.weight for m in parse(row).messages] == [0.5, 0.0]


def test_a_null_weight_is_no_weight() -> None:
    assert parse(items(weight=None)).messages[1].weight == 1.0


def test_the_rows_condition_wins_over_the_sources() -> None:
    assert parse(OPENAI, condition="GPT3").condition == "GPT3"
    assert parse({**OPENAI, "condition": "GPT4"}, condition="GPT3").condition == "GPT4"


def test_an_empty_condition_of_the_row_means_unconditioned_and_null_means_the_sources() -> None:
    assert parse({**OPENAI, "condition": ""}, condition="GPT3").condition == ""
    assert parse({**OPENAI, "condition": None}, condition="GPT3").condition == "GPT3"


def test_a_condition_loses_the_spaces_around_it() -> None:
    assert parse({**OPENAI, "condition": " GPT4 Correct\n"}).condition == "GPT4 Correct"


def test_the_rows_system_text_becomes_the_first_message() -> None:
    first, *rest = parse({**OPENAI, "system": "Be brief."}).messages
    assert first == Message(role="system", content="Be brief.", weight=0.0)
    assert tuple(rest) == EXPECTED


@pytest.mark.parametrize("system", ["", None])
def test_an_empty_system_text_is_no_message(system: object) -> None:
    assert parse({**OPENAI, "system": system}).messages == EXPECTED


def test_a_system_message_is_never_trained_and_a_weight_that_asks_for_it_is_refused() -> None:
    system = {"role": "system", "content": "Be brief."}
    assert [m.weight for m in parse({"messages": [system, *OPENAI["messages"]]}).messages] == [0.0, 0.0, 1.0]
    assert parse({"messages": [{**system, "weight": 0}, *OPENAI["messages"]]}).messages[0].weight == 0.0
    with pytest.raises(
        DataError, match=r"chats.jsonl:7: message 1: a system message has weight 1; it is never trained"
    ):
        parse({"messages": [{**system, "weight": 1.0}, *OPENAI["messages"]]})


@pytest.mark.parametrize("content", ["", " ", "\n\nx ", "<|end_of_turn|>", "a\u0000b", "\ufeff", "é\u0301"])
def test_contents_stay_as_they_were_written(content: str) -> None:
    assert parse(items(content=content)).messages[1].content == content


def test_the_source_is_named_and_the_reward_taken_from_its_field() -> None:
    conversation = parse({**OPENAI, "score": -3}, reward_field="score")
    assert (conversation.source, conversation.reward) == ("chats", -3.0)
    assert parse({**OPENAI, "score": -3}).reward is None


def str_or_huge(value: object) -> str:
    return str(value) if value != 10**400 else "huge"


# --- refused rows


@pytest.mark.parametrize("row", ["text", 3, None, True])
def test_a_row_that_is_no_object_is_refused(row: object) -> None:
    assert f"expected a JSON object, found {type(row).__name__}" in refused(row)


@pytest.mark.parametrize("value", [[], "text", None, {"role": "user"}])
def test_a_row_without_messages_is_refused(value: object) -> None:
    assert "`items` must be a list with at least one message" in refused({"items": value})


def test_a_row_of_unknown_keys_lists_them_and_the_known_ones() -> None:
    text = refused({"conversation": [], "id": 3})
    assert "the keys `conversation`, `id`" in text
    assert "`conversations` (sharegpt)" in text


def test_an_empty_row_has_none_of_the_keys() -> None:
    assert "the keys none" in refused({})


def test_a_row_of_two_formats_is_refused_unless_the_source_says_which() -> None:
    row = {**SHAREGPT, **OPENAI}
    assert "several formats at once (sharegpt, openai)" in refused(row)
    assert parse(row, format="openai").messages == EXPECTED


def test_a_configured_format_that_the_row_does_not_have_is_refused() -> None:
    assert "format 'openchat' needs the key `items`, found `messages`" in refused(OPENAI, format="openchat")


def test_an_unknown_role_is_quoted_with_the_known_ones_and_the_messages_number() -> None:
    text = refused({"conversations": [{"from": "human", "value": "Hi"}, {"from": "human-2", "value": "Ho"}]})
    assert text.startswith("chats.jsonl:7: message 2 has role 'human-2'. Known roles: system, user, human,")


@pytest.mark.parametrize("role", [None, 3, ["user"], "Users", ""])
def test_a_role_that_is_no_known_word_is_refused(role: object) -> None:
    assert f"message 2 has role {role!r}" in refused(items(role=role))


@pytest.mark.parametrize("content", [None, 3, [], ["Hi"], {"text": "Hi"}])
def test_a_content_that_is_no_text_is_refused(content: object) -> None:
    assert f"message 2: `content` must be text, found {type(content).__name__}" in refused(items(content=content))


@pytest.mark.parametrize(
    ("item", "found"), [({"role": "user"}, "`role`"), ({}, "none"), ("Hi", "str"), (None, "NoneType")]
)
def test_a_message_without_its_keys_is_refused(item: object, found: str) -> None:
    assert f"message 1: needs `role` and `content`, found {found}" in refused({"messages": [item]})


# 1e39 is a finite double, and infinite in the float32 that the weights are stored in; 10**400 is in no float.
@pytest.mark.parametrize("weight", [float("nan"), float("inf"), -0.1, True, "1", [1], 1e39, 10**400], ids=str_or_huge)
def test_a_weight_that_is_no_finite_number_of_at_least_0_is_refused(weight: object) -> None:
    text = refused(items(weight=weight))
    assert "message 2: `weight` is" in text
    assert "expected a finite number" in text
    assert len(text) < 200
    assert refused({**OPENAI, "weight": weight}).startswith("chats.jsonl:7: `weight` is")


@pytest.mark.parametrize("reward", [float("nan"), float("-inf"), None, False, "1", 1e39, 10**400], ids=str_or_huge)
def test_a_reward_that_is_no_finite_number_is_refused(reward: object) -> None:
    assert "`score` is" in refused({**OPENAI, "score": reward}, reward_field="score")


def test_a_missing_reward_is_refused() -> None:
    assert "source 'chats' takes its rewards from `score`, missing here" in refused(OPENAI, reward_field="score")


@pytest.mark.parametrize("key", ["system", "condition"])
def test_a_system_text_or_condition_that_is_no_text_is_refused(key: str) -> None:
    assert f"`{key}` must be text, found int" in refused({**OPENAI, key: 4})


def test_a_content_with_half_a_surrogate_pair_is_refused() -> None:
    # JSON may spell "\\ud83d" alone (a smiley cut in two); no tokenizer takes it.
    assert "message 2" in refused(items(content="cut \ud83d"))


def test_a_condition_is_cleaned_and_checked_like_a_content() -> None:
    source = SourceConfig(name="chats", path="chats.jsonl", condition="Code")
    assert parse_conversation({**OPENAI, "condition": "GPT4"}, source, "f:1", clean=str.lower).condition == "gpt4"
    assert parse_conversation(OPENAI, source, "f:1", clean=str.lower).condition == "code"
    assert "`condition` has half a character (U+D83D) at 3" in refused({**OPENAI, "condition": "cut\ud83d"})


def test_a_system_text_has_two_names_and_two_that_differ_are_refused() -> None:
    expected = parse({**OPENAI, "system": "Be brief."})
    assert expected.messages[0].content == "Be brief."
    assert parse({**OPENAI, "system_prompt": "Be brief."}) == expected
    assert parse({**OPENAI, "system": "Be brief.", "system_prompt": "Be brief."}) == expected
    assert parse({**OPENAI, "system": "Be brief.", "system_prompt": ""}) == expected
    text = refused({**OPENAI, "system": "Be brief.", "system_prompt": "Be kind."})
    assert "`system` and `system_prompt` differ. Keep one of them." in text
