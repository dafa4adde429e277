"""Token ids read as text again: turns, prefixes and characters, for every template."""

from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ochat.data.conversation import Conversation, Message, Role
from ochat.data.inspect_tokens import Token, TokenReader, Turn, glyphs, weight_level
from ochat.data.template import CONDITION, TEMPLATES, get_template
from ochat.data.tokenize import ChatTokenizer, adds_dummy_prefix, load_tokenizer
from tests.experiment import TOKENIZERS

FAMILIES = {"mini-mistral": "openchat-3.5", "mini-llama3": "openchat-3.6"}
PAIRS = [(folder, name) for folder in FAMILIES for name in TEMPLATES]
ON_LLAMA = ("openchat-3.6", "llama3-instruct", "chatml", "gemma-it")
REAL_PAIRS = [("llama-3" if name in ON_LLAMA else "mistral-v0.1-eot", name) for name in TEMPLATES]
CONDITIONS = ("", "GPT4", "GPT4 Correct")


def text_of(tokens: tuple[Token, ...]) -> str:
    return "".join(token.text for token in tokens if token.kind == "content")


def read_chat(family: str, *messages: Message, condition: str = "GPT4") -> tuple[Turn, ...]:
    template = get_template(FAMILIES[family])
    tokenizer = load_tokenizer(str(TOKENIZERS / family), template)
    chat = Conversation(messages=messages, condition=condition, source="s")
    item = ChatTokenizer(tokenizer, template).tokenize([chat])[0]
    reader = TokenReader(tokenizer, ChatTokenizer(tokenizer, template), CONDITIONS)
    return reader.read(item.input_ids, item.token_weights)


# --- turns


PREFIX_LIKE = [text for name in TEMPLATES for text in get_template(name).prefixes.values()]
PREFIX_LIKE += ["GPT4 User:", "GPT4 Correct Assistant:", "\n<|im_start|>user\n", "\n<|user|>\n", "User: Human: "]
TEXTS = st.text(max_size=8) | st.builds(str.__add__, st.sampled_from(PREFIX_LIKE), st.sampled_from(["", "sat", "\n"]))
# Text of a system message without prefix may not spell one: its ids would be the same.
MESSAGES = st.builds(Message, role=st.sampled_from(["user", "assistant"]), content=TEXTS,
                     weight=st.sampled_from([0.0, 0.5, 1.0]))  # fmt: skip
SYSTEM = st.lists(st.builds(Message, role=st.just("system"), content=st.sampled_from(["", "Be brief."])), max_size=1)
CHATS = st.tuples(SYSTEM, st.lists(MESSAGES, min_size=1, max_size=5)).map(lambda both: (*both[0], *both[1]))


@cache
def load(folder: Path, name: str) -> tuple[ChatTokenizer, TokenReader, bool]:
    template = get_template(name)
    tokenizer = load_tokenizer(str(folder), template)
    ours = ChatTokenizer(tokenizer, template)
    return ours, TokenReader(tokenizer, ours, CONDITIONS), adds_dummy_prefix(tokenizer)


def check_turns(folder: Path, name: str, messages: tuple[Message, ...], condition: str) -> None:
    tokenizer, reader, dummy_prefix = load(folder, name)
    prefixes = tokenizer.template.prefixes
    messages = tuple(message for message in messages if message.role in prefixes)
    (item,) = tokenizer.tokenize([Conversation(messages=messages, condition=condition)])
    turns = reader.read(item.input_ids, item.token_weights)

    def expected(message: Message) -> tuple[Role, str | None, str]:
        written = condition if CONDITION in prefixes[message.role] else None
        # SentencePiece puts a space before every piece, and spells spaces "\u2581".
        spaced = " " + message.content.replace("\u2581", " ") if dummy_prefix and message.content else message.content
        return message.role, written, spaced

    assert [(turn.role, turn.condition, text_of(turn.tokens)) for turn in turns] == [expected(m) for m in messages]
    assert [token.id for turn in turns for token in turn.tokens] == item.input_ids.tolist()
    weights = [{token.weight for token in turn.tokens if token.kind == "content"} for turn in turns]
    assert all(found <= {m.weight} for found, m in zip(weights, messages, strict=True))
    assert all(token.weight == 0 for turn in turns for token in turn.tokens if token.kind == "prefix")


@pytest.mark.parametrize(("folder", "name"), PAIRS)
@settings(max_examples=40, deadline=None)
@given(messages=CHATS, condition=st.sampled_from(CONDITIONS))
def test_turns_are_read_back_with_role_condition_and_text(
    folder: str, name: str, messages: tuple[Message, ...], condition: str
) -> None:
    check_turns(TOKENIZERS / folder, name, messages, condition)


@pytest.mark.parametrize(("folder", "name"), REAL_PAIRS)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(messages=CHATS, condition=st.sampled_from(CONDITIONS))
def test_turns_are_read_back_from_the_ids_of_the_real_tokenizers(
    real_tokenizers: Path, folder: str, name: str, messages: tuple[Message, ...], condition: str
) -> None:
    check_turns(real_tokenizers / folder, name, messages, condition)


@pytest.mark.parametrize("folder", FAMILIES)
def test_a_separator_belongs_to_the_prefix_after_it_and_a_typed_one_to_its_content(folder: str) -> None:
    tokenizer, reader, _ = load(TOKENIZERS / folder, "chatml")
    typed = (Message(role="user", content="\n<|im_start|>user\n"), Message(role="assistant", content="sat"))
    (item,) = tokenizer.tokenize([Conversation(messages=typed)])
    user, assistant = reader.read(item.input_ids, item.token_weights)
    kinds = [token.kind for token in assistant.tokens]

    assert text_of(user.tokens).lstrip(" ") == "\n<|im_start|>user\n"
    assert kinds[: kinds.index("content")].count("control") == 1
    assert "".join(t.text for t in assistant.tokens[: kinds.index("content")]).strip(" ").startswith("\n<|im_start|>")


# --- text


@pytest.mark.parametrize("family", FAMILIES)
@settings(deadline=None, max_examples=40)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30))
def test_the_text_shown_can_be_read_again(family: str, text: str):
    turns = read_chat(family, Message(role="user", content=text), Message(role="assistant", content="ok"))
    template = get_template(FAMILIES[family])
    tokenizer = load_tokenizer(str(TOKENIZERS / family), template)
    encoded = tokenizer.backend_tokenizer
    encoded.encode_special_tokens = True
    expected = encoded.decode(encoded.encode(text, add_special_tokens=False).ids, skip_special_tokens=False)
    shown = text_of(turns[0].tokens)

    assert shown.removeprefix(" " if family == "mini-mistral" else "") == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_a_character_of_several_tokens_is_the_text_of_the_last_and_bytes_before(family: str):
    turns = read_chat(family, Message(role="assistant", content="😀"))
    tokens = [token for token in turns[0].tokens if token.kind == "content" and token.raw != b" "]

    assert b"".join(token.raw for token in tokens) == "😀".encode()
    assert [token.text for token in tokens] == ["", "", "", "😀"]
    assert next(glyphs(tokens[0])).text == "‹F0›"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("condition", ["", "GPT4", "GPT4 Correct"])
def test_prefix_tokens_are_the_ids_before_the_content(family: str, condition: str):
    hello = (Message(role="user", content="sat"), Message(role="assistant", content="GPT4 User: sat"))
    turns = read_chat(family, *hello, condition=condition)
    spaced = f"{condition} " if condition else ""

    assert [turn.condition for turn in turns] == [condition, condition]
    for turn, role in zip(turns, ("User", "Assistant"), strict=True):
        assert f"{spaced}{role}" in "".join(token.text for token in turn.tokens if token.kind == "prefix")
    assert "User: sat" in text_of(turns[1].tokens)  # typed, so not a prefix


def test_of_two_prefixes_that_fit_the_longer_is_taken():
    template = get_template("openchat-3.5")
    tokenizer = load_tokenizer(str(TOKENIZERS / "mini-mistral"), template)
    chat = Conversation(
        messages=(Message(role="assistant", content="sat"),), condition="sat Assistant: red", source="s"
    )
    item = ChatTokenizer(tokenizer, template).tokenize([chat])[0]
    reader = TokenReader(tokenizer, ChatTokenizer(tokenizer, template), ["sat", "sat Assistant: red"])

    assert reader.read(item.input_ids, item.token_weights)[0].condition == "sat Assistant: red"


def test_an_added_token_that_is_not_special_is_plain_pieces_when_typed():
    template = get_template("openchat-3.5")
    tokenizer = load_tokenizer(str(TOKENIZERS / "mini-mistral"), template)
    tokenizer.add_tokens(["walls!"])
    chat = Conversation(messages=(Message(role="assistant", content="walls!"),), condition="", source="s")
    item = ChatTokenizer(tokenizer, template).tokenize([chat])[0]
    (turn,) = TokenReader(tokenizer, ChatTokenizer(tokenizer, template), [""]).read(item.input_ids, item.token_weights)

    content = [token.text for token in turn.tokens if token.kind == "content"]
    assert "".join(content).strip() == "walls!"
    assert len(content) > 1
    assert (turn.tokens[-1].text, turn.tokens[-1].kind) == ("<|end_of_turn|>", "control")


def test_a_typed_control_string_is_content_and_the_real_one_is_control():
    turns = read_chat("mini-mistral", Message(role="assistant", content="<|end_of_turn|>"))

    assert len(turns) == 1
    assert [token.text for token in turns[0].tokens if token.kind == "control"] == ["<s>", "<|end_of_turn|>"]
    assert "<|end_of_turn|>" in text_of(turns[0].tokens)


def test_what_cannot_be_seen_gets_a_mark():
    token = Token(id=1, raw=b"", text="a \n\t\x1b\u202e\u00a0é", weight=0.0, kind="content")

    assert [(g.text, g.mark, g.newline) for g in glyphs(token)] == [
        ("a ", False, False), ("↵", True, True), ("⇥", True, False), ("‹U+001B›", True, False),
        ("‹U+202E›", True, False), ("‹U+00A0›", True, False), ("é", False, False),
    ]  # fmt: skip


@pytest.mark.parametrize(("weight", "level"), [(0, 0), (1.0, 5), (0.33, 4), (0.1, 3), (0.01, 1), (1e-9, 1), (2.0, 5)])
def test_levels_are_half_decades_below_the_highest(weight: float, level: int):
    assert weight_level(weight, 1.0) == level
