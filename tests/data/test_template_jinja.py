"""The generated chat template gives plain `transformers` the ids of our training path.

One string can do so only for contents without control strings and, for openchat-3.6, only where the content cannot
merge with the newlines before it.
"""

from functools import cache
from pathlib import Path

import jinja2
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from ochat.data.conversation import Conversation, Message
from ochat.data.template import get_template, to_jinja
from ochat.data.tokenize import ChatTokenizer, adds_dummy_prefix, load_tokenizer

FIXTURES = Path(__file__).parents[1] / "fixtures" / "tokenizers"
PAIRS = [("mini-mistral", "openchat-3.5"), ("mini-mistral", "openchat-3.2"), ("mini-llama3", "openchat-3.6")]
PAIRS += [("mini-mistral", "openchat-3.6")]  # whose control tokens have to be added
REAL_PAIRS = [("mistral-v0.1-eot", "openchat-3.5"), ("llama-3", "openchat-3.6")]

fragments = st.sampled_from(
    [" ", "  ", "\n", "\n\n", "\t", "▁", "GPT4 Correct User:", "'s", "{{ x }}", "123", "🙂", "<|", "|>"]
)
text = st.lists(st.text(max_size=8) | fragments, max_size=6).map("".join)
roles = st.sampled_from(["user", "assistant", "system"])
chats = st.lists(st.tuples(roles, text), min_size=1, max_size=4)
conditions = st.sampled_from(["GPT4 Correct", "GPT4", "Code", "it's \\ {{ 1 }}"])


@cache
def load(folder: Path, name: str) -> tuple[PreTrainedTokenizerFast, ChatTokenizer]:
    template = get_template(name)
    tokenizer = load_tokenizer(str(folder), template)
    tokenizer.chat_template = to_jinja(template, dummy_prefix=adds_dummy_prefix(tokenizer))
    return tokenizer, ChatTokenizer(tokenizer, template)


def of_jinja(tokenizer: PreTrainedTokenizerFast, chat: list[tuple[str, str]], **arguments: object) -> list[int]:
    messages = [{"role": role, "content": content} for role, content in chat]
    ids: list[int] = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **arguments)["input_ids"]
    return ids


def of_training(ours: ChatTokenizer, chat: list[tuple[str, str]], condition: str) -> list[int]:
    messages = tuple(Message(role=role, content=content) for role, content in chat)
    ids: list[int] = ours.tokenize([Conversation(messages=messages, condition=condition)])[0].input_ids.tolist()
    return ids


def can_be_one_string(tokenizer: PreTrainedTokenizerFast, name: str, chat: list[tuple[str, str]]) -> bool:
    control = tokenizer.get_added_vocab()
    contents = [content for _, content in chat]
    if any(token in content for content in contents for token in control):
        return False
    return name != "openchat-3.6" or not any(content[:1].isspace() for content in contents)


def check_equal(folder: Path, name: str, chat: list[tuple[str, str]], condition: str) -> None:
    tokenizer, ours = load(folder, name)
    chat = [(role, c.lstrip() if name == "openchat-3.6" else c) for role, c in chat]
    if can_be_one_string(tokenizer, name, chat):
        assert of_jinja(tokenizer, chat, condition=condition) == of_training(ours, chat, condition)


@pytest.mark.parametrize(("folder", "name"), PAIRS)
@settings(max_examples=40, deadline=None)
@given(chat=chats, condition=conditions)
def test_one_string_gives_the_training_ids(folder: str, name: str, chat: list[tuple[str, str]], condition: str) -> None:
    check_equal(FIXTURES / folder, name, chat, condition)


@pytest.mark.parametrize(("folder", "name"), REAL_PAIRS)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(chat=chats, condition=conditions)
def test_one_string_gives_the_training_ids_of_the_real_tokenizers(
    real_tokenizers: Path, folder: str, name: str, chat: list[tuple[str, str]], condition: str
) -> None:
    check_equal(real_tokenizers / folder, name, chat, condition)


@pytest.mark.parametrize(("folder", "name"), PAIRS)
def test_one_string_cannot_keep_a_typed_control_token_plain(folder: str, name: str) -> None:
    tokenizer, ours = load(FIXTURES / folder, name)
    plain, typed = [("user", "a b")], [("user", f"a {ours.template.end_of_turn} b")]
    assert of_jinja(tokenizer, plain, condition="GPT4") == of_training(ours, plain, "GPT4")
    assert of_jinja(tokenizer, typed, condition="GPT4") != of_training(ours, typed, "GPT4")


def test_one_string_merges_a_newline_with_the_header_of_openchat_3_6(real_tokenizers: Path) -> None:
    tokenizer, ours = load(real_tokenizers / "llama-3", "openchat-3.6")
    chat = [("user", "\nHi")]
    assert of_jinja(tokenizer, chat, condition="GPT4") != of_training(ours, chat, "GPT4")


def test_without_the_literal_space_a_sentencepiece_prefix_runs_into_its_content() -> None:
    tokenizer, ours = load(FIXTURES / "mini-mistral", "openchat-3.5")
    chat = [("user", "Hello")]
    bare = to_jinja(ours.template, dummy_prefix=False)
    assert of_jinja(tokenizer, chat, condition="GPT4") == of_training(ours, chat, "GPT4")
    assert of_jinja(tokenizer, chat, condition="GPT4", chat_template=bare) != of_training(ours, chat, "GPT4")


@pytest.mark.parametrize(("folder", "name"), PAIRS)
def test_without_a_condition_the_default_one_is_filled_in(folder: str, name: str) -> None:
    tokenizer, ours = load(FIXTURES / folder, name)
    chat = [("user", "Hi"), ("assistant", "Hello")]
    expected = of_training(ours, chat, ours.template.default_condition)
    assert of_jinja(tokenizer, chat) == of_jinja(tokenizer, chat, condition="") == expected
    assert of_jinja(tokenizer, chat, condition="GPT3") != expected


@pytest.mark.parametrize(("folder", "name"), PAIRS)
@pytest.mark.parametrize("condition", ["", "Code"])
def test_the_generation_prompt_is_the_servers_prompt(folder: str, name: str, condition: str) -> None:
    tokenizer, ours = load(FIXTURES / folder, name)
    conversation = Conversation(messages=(Message(role="user", content="Hi"),), condition=condition)
    expected = ours.prompt_ids(conversation)
    assert of_jinja(tokenizer, [("user", "Hi")], condition=condition, add_generation_prompt=True) == expected
    assert of_jinja(tokenizer, [("user", "Hi")], condition=condition) != expected


@pytest.mark.parametrize(("folder", "name"), PAIRS)
def test_an_unknown_role_is_an_error(folder: str, name: str) -> None:
    tokenizer, _ = load(FIXTURES / folder, name)
    with pytest.raises(jinja2.TemplateError, match="role must be one of: system, user, assistant"):
        of_jinja(tokenizer, [("tool", "Hi")])
