"""The generated chat template gives plain `transformers` the ids of our training path.

One string can do so only for contents without control strings, and only where the content cannot merge with the prefix
before it: `in_jinja_class` says where, docs/templates.md has the table.
"""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import jinja2
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from ochat.data.conversation import Conversation, Message
from ochat.data.template import TEMPLATES, get_template, in_jinja_class, to_jinja
from ochat.data.tokenize import ChatTokenizer, adds_dummy_prefix, load_tokenizer

FIXTURES = Path(__file__).parents[1] / "fixtures" / "tokenizers"
CONDITIONED = [("mini-mistral", "openchat-3.5"), ("mini-mistral", "openchat-3.2"), ("mini-llama3", "openchat-3.6")]
CONDITIONED += [("mini-mistral", "openchat-3.6")]  # whose control tokens have to be added
PAIRS = [(folder, name) for folder in ("mini-mistral", "mini-llama3") for name in TEMPLATES]
TEXT_PAIRS = [pair for pair in PAIRS if pair[1] != "openchat-1"]  # whose class has no text after a prefix
REAL_PAIRS = [("mistral-v0.1-eot", name) for name in ("openchat-3.5", "openchat-3.2", "openchat-1", "zephyr", "chatml")]
REAL_PAIRS += [("llama-3", name) for name in ("openchat-3.6", "llama3-instruct", "chatml", "gemma-it", "opencoder")]
# Contents that are not in the class, and differ there.
OUTSIDE = [
    ("mistral-v0.1-eot", "openchat-1", "1"),
    ("llama-3", "openchat-3.6", "\nHi"),
    ("llama-3", "llama3-instruct", "\nHi"),
    ("llama-3", "chatml", "\nHi"),
    ("llama-3", "gemma-it", "\nHi"),
    ("llama-3", "zephyr", "\nHi"),
    ("llama-3", "opencoder", "(a)"),
    ("llama-3", "openchat-3.5", "(a)"),
]

fragments = st.sampled_from(
    [" ", "  ", "\n", "\n\n", "\t", "▁", "GPT4 Correct User:", "'s", "{{ x }}", "123", "🙂", "<|", "|>"]
)
text = st.lists(st.text(max_size=8) | fragments, max_size=6).map("".join)
# Golden conversations in the class, of 150; most others spell an added token of the tokenizer.
GOLDEN_IN_CLASS = {
    ("mistral-v0.1-eot", "openchat-3.5"): 133,
    ("mistral-v0.1-eot", "openchat-3.2"): 133,
    ("mistral-v0.1-eot", "zephyr"): 133,
    ("mistral-v0.1-eot", "chatml"): 131,
    ("llama-3", "openchat-3.6"): 120,
    ("llama-3", "llama3-instruct"): 120,
    ("llama-3", "chatml"): 119,
    ("llama-3", "gemma-it"): 120,
}
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


def spells_a_token(tokenizer: PreTrainedTokenizerFast, chat: list[tuple[str, str]]) -> bool:
    return any(token in content for _, content in chat for token in tokenizer.get_added_vocab())


def in_class(tokenizer: PreTrainedTokenizerFast, name: str, chat: list[tuple[str, str]]) -> bool:
    conversation = Conversation(messages=tuple(Message(role=role, content=content) for role, content in chat))
    return in_jinja_class(get_template(name), conversation, dummy_prefix=adds_dummy_prefix(tokenizer))


def into_class(tokenizer: PreTrainedTokenizerFast, name: str, chat: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """A message outside of the class gets a digit in front, or nothing to say where that does not help."""
    result = []
    for role, content in chat:
        if role not in get_template(name).prefixes:
            continue
        tries = [(role, content), (role, "7" + content), (role, "")]
        result.append(next(message for message in tries if in_class(tokenizer, name, [message])))
    return result


def check_equal(folder: Path, name: str, chat: list[tuple[str, str]], condition: str) -> None:
    tokenizer, ours = load(folder, name)
    chat = into_class(tokenizer, name, chat)
    if chat and not spells_a_token(tokenizer, chat):
        assert of_jinja(tokenizer, chat, condition=condition) == of_training(ours, chat, condition)


@pytest.mark.parametrize(("folder", "name"), PAIRS)
@settings(max_examples=25, deadline=None)
@given(chat=chats, condition=conditions)
def test_one_string_gives_the_training_ids(folder: str, name: str, chat: list[tuple[str, str]], condition: str) -> None:
    check_equal(FIXTURES / folder, name, chat, condition)


@pytest.mark.parametrize(("folder", "name"), REAL_PAIRS)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(chat=chats, condition=conditions)
def test_one_string_gives_the_training_ids_of_the_real_tokenizers(
    real_tokenizers: Path, folder: str, name: str, chat: list[tuple[str, str]], condition: str
) -> None:
    check_equal(real_tokenizers / folder, name, chat, condition)


@pytest.mark.parametrize(("folder", "name"), TEXT_PAIRS)
def test_one_string_cannot_keep_a_typed_control_token_plain(folder: str, name: str) -> None:
    tokenizer, ours = load(FIXTURES / folder, name)
    plain, typed = [("user", "a b")], [("user", f"a {ours.template.end_of_turn} b")]
    assert of_jinja(tokenizer, plain, condition="GPT4") == of_training(ours, plain, "GPT4")
    assert of_jinja(tokenizer, typed, condition="GPT4") != of_training(ours, typed, "GPT4")


# docs/templates.md, as contents: in the class with a dummy prefix, and without one.
@pytest.mark.parametrize(
    ("name", "dummy_prefix", "inside", "outside"),
    [
        *((name, True, ["Hi", " Hi", "\nHi", "7", "(a)", ""], []) for name in TEMPLATES if name != "openchat-1"),
        *((name, False, [" Hi", "7", ""], ["Hi", "\nHi", "(a)"])
          for name in ("openchat-3.5", "openchat-3.2", "opencoder")),
        *((name, False, ["Hi", "7", "(a)", ""], [" Hi", "\nHi", "\tHi"])
          for name in ("openchat-3.6", "llama3-instruct", "chatml", "zephyr", "gemma-it")),
        ("openchat-1", True, [""], ["Hi", "7", " Hi"]),
        ("openchat-1", False, [""], ["Hi", "7", " Hi"]),
    ],
)  # fmt: skip
def test_the_class_is_the_one_of_the_docs(name: str, dummy_prefix: bool, inside: list[str], outside: list[str]) -> None:
    def found(content: str) -> bool:
        conversation = Conversation(messages=(Message(role="user", content=content),), condition="GPT4")
        return in_jinja_class(get_template(name), conversation, dummy_prefix=dummy_prefix)

    assert all(map(found, inside))
    assert not any(map(found, outside))


@pytest.mark.parametrize(("folder", "name", "content"), OUTSIDE)
def test_outside_of_the_class_one_string_differs(real_tokenizers: Path, folder: str, name: str, content: str) -> None:
    tokenizer, ours = load(real_tokenizers / folder, name)
    chat = [("user", content)]
    assert not in_class(tokenizer, name, chat)
    assert of_jinja(tokenizer, chat, condition="GPT4") != of_training(ours, chat, "GPT4")


@pytest.mark.parametrize("name", ["openchat-3.5", "openchat-3.2", "opencoder", "chatml", "zephyr"])
@given(chat=chats)
def test_with_sentencepiece_the_class_is_all_text(name: str, chat: list[tuple[str, str]]) -> None:
    assert in_class(load(FIXTURES / "mini-mistral", name)[0], name, chat)


@pytest.mark.parametrize(("folder", "name"), GOLDEN_IN_CLASS)
def test_golden_conversations_of_the_class_have_the_training_ids(
    shared: Path, real_tokenizers: Path, folder: str, name: str
) -> None:
    tokenizer, ours = load(real_tokenizers / folder, name)
    equal = differ_outside = 0
    for line in (shared / "golden" / "conversations.jsonl").read_text(encoding="utf-8").splitlines():
        items = json.loads(line)["conversation"]["items"]
        chat = [(item["role"], item["content"]) for item in items]
        if not chat or any(role not in ours.template.prefixes for role, _ in chat):
            continue
        same = of_jinja(tokenizer, chat, condition="GPT4") == of_training(ours, chat, "GPT4")
        if in_class(tokenizer, name, chat) and not spells_a_token(tokenizer, chat):
            assert same, line
            equal += 1
        else:
            differ_outside += not same
    assert equal == GOLDEN_IN_CLASS[folder, name]
    assert differ_outside > 0


@pytest.fixture(scope="module")
def starcoder_like(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Byte-level with single digits, GPT-2's splitting and no BOS, as opencoder's own base has it."""
    folder = tmp_path_factory.mktemp("starcoder")
    PreTrainedTokenizerFast.from_pretrained(str(FIXTURES / "mini-llama3")).save_pretrained(str(folder))
    tree = json.loads((folder / "tokenizer.json").read_text())
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    tree["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, byte_level]}
    (folder / "tokenizer.json").write_text(json.dumps(tree))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["bos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(chat=chats, first=st.sampled_from("aZé7 \n\t中"))
def test_opencoder_on_its_kind_of_base_is_exact_after_letters_digits_and_space(
    starcoder_like: Path, chat: list[tuple[str, str]], first: str
) -> None:
    tokenizer, ours = load(starcoder_like, "opencoder")
    chat = [(role, first + content) for role, content in chat]
    if not spells_a_token(tokenizer, chat):
        assert of_jinja(tokenizer, chat) == of_training(ours, chat, "")


def test_chatml_takes_the_beginning_a_tokenizer_has_and_opencoder_none(starcoder_like: Path) -> None:
    chat = [("user", "Hi"), ("assistant", "Hello")]
    for folder, name in (
        (FIXTURES / "mini-llama3", "opencoder"),
        (starcoder_like, "opencoder"),
        (starcoder_like, "chatml"),
    ):
        tokenizer, ours = load(folder, name)
        ids = of_training(ours, chat, "")
        assert ids[0] == tokenizer(ours.template.prefixes["user"], add_special_tokens=False)["input_ids"][0]
    tokenizer, ours = load(FIXTURES / "mini-llama3", "chatml")
    assert of_training(ours, chat, "")[0] == tokenizer.bos_token_id


def test_without_the_literal_space_a_sentencepiece_prefix_runs_into_its_content() -> None:
    tokenizer, ours = load(FIXTURES / "mini-mistral", "openchat-3.5")
    chat = [("user", "Hello")]
    bare = to_jinja(ours.template, dummy_prefix=False)
    assert of_jinja(tokenizer, chat, condition="GPT4") == of_training(ours, chat, "GPT4")
    assert of_jinja(tokenizer, chat, condition="GPT4", chat_template=bare) != of_training(ours, chat, "GPT4")


@pytest.mark.parametrize("folder", ["mini-mistral", "mini-llama3"])
@settings(max_examples=25, deadline=None)
@given(chat=chats)
def test_after_a_control_token_all_text_is_in_the_class_without_a_literal_space(
    folder: str, chat: list[tuple[str, str]]
) -> None:
    # None of the nine opens a content so; a template to come may.
    bare = dict.fromkeys(get_template("chatml").prefixes, "<|im_start|>")
    template = replace(get_template("chatml"), prefixes=bare)
    tokenizer = load_tokenizer(str(FIXTURES / folder), template)
    ours, dummy_prefix = ChatTokenizer(tokenizer, template), adds_dummy_prefix(tokenizer)
    conversation = Conversation(messages=tuple(Message(role=role, content=content) for role, content in chat))
    jinja = to_jinja(template, dummy_prefix=dummy_prefix)
    assert in_jinja_class(template, conversation, dummy_prefix=dummy_prefix)
    if not spells_a_token(tokenizer, chat):
        assert of_jinja(tokenizer, chat, chat_template=jinja) == of_training(ours, chat, "")


@pytest.mark.parametrize(("folder", "name"), CONDITIONED)
def test_without_a_condition_the_default_one_is_filled_in(folder: str, name: str) -> None:
    tokenizer, ours = load(FIXTURES / folder, name)
    chat = [("user", "Hi"), ("assistant", "Hello")]
    expected = of_training(ours, chat, ours.template.default_condition)
    assert of_jinja(tokenizer, chat) == of_jinja(tokenizer, chat, condition="") == expected
    assert of_jinja(tokenizer, chat, condition="GPT3") != expected


@pytest.mark.parametrize(("folder", "name"), TEXT_PAIRS)
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
    with pytest.raises(jinja2.TemplateError, match=r"role must be one of: (system, )?user, assistant"):
        of_jinja(tokenizer, [("tool", "Hi")])
