"""Rows of every format, small: how each becomes messages, and what is refused by name."""

import pytest

from ochat.config import SourceConfig
from ochat.data.conversation import Conversation, Message, parse_conversation
from ochat.data.formats import FORMATS
from ochat.data.keys import ROW_KEYS, nearest
from ochat.data.problems import RowError

HI, HELLO = Message(role="user", content="Hi"), Message(role="assistant", content="Hello", weight=1.0)
TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
ROWS = {
    "sharegpt": {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
    "openai": {"messages": TURNS},
    "openchat": {"items": TURNS},
    "alpaca": {"instruction": "Hi", "input": "", "output": "Hello"},
    "dolly": {"instruction": "Hi", "context": "", "response": "Hello", "category": "open_qa"},
    "orca": {"id": "flan.1", "system_prompt": "", "question": "Hi", "response": "Hello"},
    "history": {"task": "GR", "id": 1, "history": [{"user": "Hi", "bot": "Hello"}]},
}


def parse(row: object, **source: object) -> Conversation:
    return parse_conversation(row, SourceConfig(name="chats", path="chats.jsonl", **source), "chats.jsonl:7")


def refused(row: object, reason: str, **source: object) -> str:
    with pytest.raises(RowError) as raised:
        parse(row, **source)
    text = str(raised.value)
    assert text.startswith("chats.jsonl:7")
    assert "\n" not in text
    assert raised.value.reason == reason
    return text


def messages(*changes: dict[str, object]) -> dict[str, object]:
    """The two turns with changes to each."""
    return {"messages": [{**turn, **change} for turn, change in zip(TURNS, changes, strict=False)]}


# --- formats


def test_there_is_a_row_of_every_format() -> None:
    assert list(ROWS) == list(FORMATS)


@pytest.mark.parametrize("name", ROWS)
def test_every_format_is_known_by_its_keys_and_by_its_name(name: str) -> None:
    assert parse(ROWS[name]).messages == (HI, HELLO)
    assert parse(ROWS[name], format=name).messages == (HI, HELLO)
    other = "openai" if name != "openai" else "sharegpt"
    refused(ROWS[name], "unknown format", format=other)


@pytest.mark.parametrize("name", ROWS)
def test_condition_and_system_text_of_a_row_count_in_every_format(name: str) -> None:
    chat = parse({**ROWS[name], "condition": "Code", "system": "Be brief."}, condition="GPT4")
    assert chat.condition == "Code"
    assert chat.messages == (Message(role="system", content="Be brief."), HI, HELLO)
    assert parse(ROWS[name], condition="GPT4").condition == "GPT4"


@pytest.mark.parametrize("name", ROWS)
def test_a_rows_weight_is_that_of_its_replies(name: str) -> None:
    assert [m.weight for m in parse({**ROWS[name], "weight": 0.25}).messages] == [0.0, 0.25]
    assert "`weight` is -1" in refused({**ROWS[name], "weight": -1}, "bad weight")


def test_a_messages_weight_wins_over_its_rows() -> None:
    assert [m.weight for m in parse({**messages({}, {"weight": 0.5}), "weight": 0.25}).messages] == [0.0, 0.5]


def test_a_bare_list_is_openai() -> None:
    assert parse(TURNS) == parse({"messages": TURNS}) == parse(TURNS, format="openai")
    refused(TURNS, "no object", format="sharegpt")


@pytest.mark.parametrize(("name", "key"), [("alpaca", "input"), ("dolly", "context")])
def test_the_input_of_an_instruction_follows_an_empty_line_and_spaces_stay(name: str, key: str) -> None:
    assert parse({**ROWS[name], key: "  x = 1\n"}).messages[0].content == "Hi\n\n  x = 1\n"
    assert parse({**ROWS[name], key: None}).messages[0].content == "Hi"


@pytest.mark.parametrize("name", ["alpaca", "dolly", "orca"])
@pytest.mark.parametrize("key", ["input", "context"])
def test_what_a_question_is_about_is_never_left_out(name: str, key: str) -> None:
    # {"instruction", "input", "response"} has the question of Alpaca and the answer of Dolly.
    row = {k: v for k, v in ROWS[name].items() if k not in ("input", "context")}
    assert parse({**row, key: "x"}).messages[0].content == "Hi\n\nx"
    assert parse({**row, "input": "x", "context": "x"}).messages[0].content == "Hi\n\nx"
    assert "`input` and `context` differ" in refused({**row, "input": "x", "context": "y"}, "two inputs")


def test_a_misspelt_input_is_named_and_does_not_vanish() -> None:
    assert "Did you mean `input`?" in refused({"instruction": "Hi", "inptu": "x", "output": "y"}, "misspelt key")
    assert parse({**ROWS["openai"], "inptu": "x"}).messages == (HI, HELLO)  # there it is nobody's input


@pytest.mark.parametrize("beside", [{"query": "c", "response": "d"}, {"prompt": "c", "answer": "d"}])
def test_a_history_with_its_last_turn_beside_it_is_not_half_read(beside: dict[str, str]) -> None:
    text = refused({"history": [["a", "b"]], **beside}, "turn beside the history")
    assert " and ".join(f"`{key}`" for key in beside) in text
    assert "call it `question` and `response`" in text
    named = parse({"history": [["a", "b"]], "question": "c", "response": "d"})
    assert [m.content for m in named.messages] == ["a", "b", "c", "d"]
    assert parse({"history": [["a", "b"]], **dict.fromkeys(beside)}).messages[0].content == "a"


def test_an_instruction_keeps_its_history() -> None:
    row = {**ROWS["alpaca"], "history": [["a", "b"], ["c", "d"]]}
    assert [m.content for m in parse(row).messages] == ["a", "b", "c", "d", "Hi", "Hello"]
    assert [m.weight for m in parse(row).messages] == [0.0, 1.0] * 3


def test_a_pair_of_a_history_without_an_answer_is_refused() -> None:
    assert "pair 1: `bot` must be text" in refused({"history": [{"user": "Hi"}]}, "content is no text")
    text = refused({"history": [["a", "b", "c"]]}, "malformed message")
    assert "pair 1: needs `user` and `bot`, found list" in text


def test_a_null_is_a_key_the_row_does_not_have() -> None:
    # Arrow gives every row every key.
    row = {**ROWS["openai"], "conversations": None, "condition": None, "system": None, "tools": None}
    row["messages"] = [{**turn, "weight": None, "tool_calls": None, "name": None} for turn in TURNS]
    assert parse(row).messages == (HI, HELLO)


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("Human", "user"),
        ("USER", "user"),
        ("prompter", "user"),
        ("GPT", "assistant"),
        ("bing", "assistant"),
        ("bard", "assistant"),
        ("model", "assistant"),
        ("System", "system"),
        ("developer", "system"),
    ],
)
def test_roles_have_many_names_capitalised_or_not(name: str, role: str) -> None:
    row = {"conversations": [{"from": name, "value": "x"}]}
    assert [m.role for m in parse(row).messages] == [role]


def test_typed_text_parts_are_joined_without_anything_in_between() -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "value": "lo"}]
    assert parse(messages({}, {"content": parts})).messages == (HI, HELLO)


def test_a_part_that_is_no_text_is_refused() -> None:
    image = [{"type": "text", "text": "see"}, {"type": "image_url", "image_url": {"url": "x"}}]
    text = refused(messages({"content": image}), "part that is no text")
    assert "message 1: part 2 of `content` is of type 'image_url', expected 'text'" in text
    refused(messages({"content": [{"type": "tool_call", "value": "{}"}]}), "tool call")


# --- weights of messages


@pytest.mark.parametrize("key", ["weight", "loss_weight", "loss_scale", "train"])
def test_a_weight_has_several_names(key: str) -> None:
    assert [m.weight for m in parse(messages({key: 0.5}, {key: 0})).messages] == [0.5, 0.0]


def test_train_may_be_true_or_false_and_a_weight_may_not() -> None:
    assert [m.weight for m in parse(messages({"train": True}, {"train": False})).messages] == [1.0, 0.0]
    refused(messages({"weight": True}), "bad weight")


def test_two_weights_that_differ_are_refused_and_equal_ones_are_not() -> None:
    assert parse(messages({}, {"weight": 1, "train": True})).messages == (HI, HELLO)
    text = refused(messages({}, {"weight": 0.5, "train": True}), "bad weight")
    assert "message 2 has `weight` 0.5 and `train` 1. They mean the same: keep one." in text


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("key", ["loss_weight", "loss_scale", "train"])
def test_a_rows_weight_has_the_same_names_as_a_messages(name: str, key: str) -> None:
    assert [m.weight for m in parse({**ROWS[name], key: 0.25}).messages] == [0.0, 0.25]
    text = refused({**ROWS[name], key: 0.25, "weight": 1}, "bad weight")
    assert f"`weight` 1 and `{key}` 0.25" in text


def test_the_weight_of_a_pair_is_its_answers_and_wins_over_the_rows() -> None:
    pairs = [{"user": "a", "bot": "b", "weight": 0.5}, {"user": "c", "bot": "d"}]
    assert [m.weight for m in parse({"history": pairs, "weight": 0.25}).messages] == [0.0, 0.5, 0.0, 0.25]
    assert "pair 1: `weight` is -1" in refused({"history": [{**pairs[0], "weight": -1}]}, "bad weight")
    assert "pair 1: the key `wieght`" in refused({"history": [{"user": "a", "bot": "b", "wieght": 1}]}, "misspelt key")


def test_a_null_weight_is_none_and_the_rows_counts() -> None:
    assert [m.weight for m in parse({**messages({}, {"weight": None}), "weight": 0.25}).messages] == [0.0, 0.25]


# --- tools


@pytest.mark.parametrize(
    "row",
    [
        messages({}, {"tool_calls": [{"id": "1"}], "content": None}),
        messages({}, {"function_call": {"name": "f"}}),
        messages({}, {"role": "tool"}),
        messages({}, {"role": "function", "name": "f"}),
        {"conversations": [{"from": "observation", "value": "x"}]},
        messages({}, {"function_calls": "f()"}),
        messages({}, {"tool_call": {"name": "f"}}),
        messages({"role": "system", "tools": '[{"name": "f"}]'}, {}),
        {"messages": TURNS, "tools": [{"type": "function"}]},
        {"messages": TURNS, "functions": '[{"name": "f"}]'},
    ],
)
def test_whatever_has_to_do_with_tools_is_refused_whole(row: object) -> None:
    assert "Tools are not supported: drop the row, or set data.on_error=skip" in refused(row, "tool call")


@pytest.mark.parametrize("tools", [[], "[]", "", None])
def test_an_empty_list_of_tools_is_none(tools: object) -> None:
    assert parse({"messages": TURNS, "tools": tools}).messages == (HI, HELLO)
    assert parse(messages({"tools": tools}, {"tool_calls": tools})).messages == (HI, HELLO)


# --- refused by name

DIALOGUE = "\n\nHuman: Hi\n\nAssistant: Hello"


@pytest.mark.parametrize(
    ("row", "reason", "said"),
    [
        ({"chosen": DIALOGUE, "rejected": DIALOGUE}, "text dialogue", "Anthropic text dialogue (hh-rlhf)"),
        ({"text": DIALOGUE}, "text dialogue", "Anthropic text dialogue (hh-rlhf)"),
        ({"prompt": "Hi", "chosen": "a", "rejected": "b"}, "preference pair", "is a preference pair"),
        ({"chosen": TURNS, "rejected": TURNS}, "preference pair", "is a preference pair"),
        (
            {"input": {"messages": TURNS}, "preferred_output": TURNS, "non_preferred_output": TURNS},
            "preference pair",
            "is a preference pair",
        ),
        ({"message_tree_id": "1", "text": "Hi"}, "message tree", "message tree (OASST)"),
        ({"prompt": {"text": "Hi", "replies": []}}, "message tree", "message tree (OASST)"),
    ],
)
def test_what_needs_a_choice_is_refused_with_the_way_to_make_it(row: object, reason: str, said: str) -> None:
    text = refused(row, reason)
    assert said in text
    assert "`messages`" in text


@pytest.mark.parametrize("pair", [("chosen", "rejected"), ("preferred_output", "non_preferred_output")])
def test_messages_beside_a_preference_pair_are_read_only_when_the_format_is_named(pair: tuple[str, str]) -> None:
    # The list may end with the question: its answer is in the pair.
    row = {**ROWS["sharegpt"], **{key: {"from": "gpt", "value": "x"} for key in pair}}
    assert "set the source's `format`" in refused(row, "preference pair")
    assert parse(row, format="sharegpt").messages == (HI, HELLO)
    assert parse({**row, **dict.fromkeys(pair)}).messages == (HI, HELLO)


def test_a_system_text_that_is_in_both_places_is_there_once() -> None:
    row = {"messages": [{"role": "system", "content": "Be brief."}, *TURNS]}
    once = parse(row)
    assert parse({**row, "system": "Be brief."}) == once
    assert [m.content for m in parse({**row, "system": "Be kind."}).messages[:2]] == ["Be kind.", "Be brief."]


def test_what_a_row_spells_is_shown_escaped_and_short() -> None:
    text = refused({"a\nb\x1b[31m\ud800": 1}, "unknown format")
    assert r"the keys `a\nb\x1b[31m\ud800`" in text
    assert len(refused({"k" * 100_000: 1}, "unknown format")) < 500
    assert len(refused(messages({"role": "x" * 100_000}), "unknown role")) < 500


def test_a_row_without_any_known_key_gets_the_nearest() -> None:
    assert "Did you mean `conversations`?" in refused({"converstions": []}, "unknown format")


# --- misspelt keys


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("condtion", "condition"),
        ("Condition", "condition"),
        ("conditions", "condition"),
        ("sytem", "system"),
        ("weigth", "weight"),
        ("wieght", "weight"),
        ("converstions", "conversations"),
    ],
)
def test_a_misspelt_key_of_ours_is_named(key: str, meant: str) -> None:
    text = refused({**ROWS["openai"], key: "GPT4"}, "misspelt key")
    assert f"the key `{key}` is unknown. Did you mean `{meant}`?" in text


@pytest.mark.parametrize("key", ["weigth", "loss_wieght", "loss_scal", "Train"])
def test_a_misspelt_weight_of_a_message_is_named(key: str) -> None:
    assert "message 2: the key" in refused(messages({}, {key: 0.5}), "misspelt key")


PEOPLES_OWN = """
source id model title idx lang language height conversation_id conversation_hash prompt prompt_id category dataset
timestamp turn score message message_id item conversation system_prompt tags text topic metadata toxic state sentiment
citation connection trial translation overall_sentiment conversation_metadata openai_moderation redacted chosen input
name
"""


@pytest.mark.parametrize("key", PEOPLES_OWN.split())
def test_peoples_own_keys_are_no_mistakes(key: str) -> None:
    assert nearest(key, ROW_KEYS) is None
    assert parse({**ROWS["openai"], key: "x"}).messages[-2:] == (HI, HELLO)
