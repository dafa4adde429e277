"""Templates as text: what stands before and after every message, and with which weight."""

import pytest

from ochat.data.conversation import Conversation, Message
from ochat.data.template import TEMPLATES, get_template, prefix, render, render_prompt
from ochat.errors import TemplateError

CHAT = (
    Message(role="system", content="Be brief."),
    Message(role="user", content="Hi", weight=0.25),
    Message(role="assistant", content=" Hello\n", weight=2.0),
)
EOT = "<|end_of_turn|>"


def pieces(name: str, condition: str, messages: tuple[Message, ...] = CHAT) -> list[tuple[str, str, float]]:
    segments = render(get_template(name), Conversation(messages=messages, condition=condition))
    return [(s.text, s.kind, s.weight) for s in segments]


def prompt(name: str, condition: str, *messages: Message) -> list[str]:
    conversation = Conversation(messages=messages, condition=condition)
    return [s.text for s in render_prompt(get_template(name), conversation)]


@pytest.mark.parametrize("name", ["openchat-3.5", "openchat-3.2"])
def test_openchat_3_5_and_3_2_write_the_condition_before_the_role(name: str) -> None:
    assert pieces(name, "GPT4 Correct") == [
        ("Be brief.", "content", 0.0),
        (EOT, "markup", 0.0),
        ("GPT4 Correct User:", "markup", 0.0),
        ("Hi", "content", 0.25),
        (EOT, "markup", 0.25),
        ("GPT4 Correct Assistant:", "markup", 0.0),
        (" Hello\n", "content", 2.0),
        (EOT, "markup", 2.0),
    ]


def test_openchat_3_6_writes_roles_as_headers_and_the_system_unconditioned() -> None:
    def header(text: str) -> tuple[str, str, float]:
        return (f"<|start_header_id|>{text}<|end_header_id|>\n\n", "markup", 0.0)

    assert pieces("openchat-3.6", "GPT3") == [
        header("System"),
        ("Be brief.", "content", 0.0),
        ("<|eot_id|>", "markup", 0.0),
        header("GPT3 User"),
        ("Hi", "content", 0.25),
        ("<|eot_id|>", "markup", 0.25),
        header("GPT3 Assistant"),
        (" Hello\n", "content", 2.0),
        ("<|eot_id|>", "markup", 2.0),
    ]


WRITTEN = {
    "openchat-1": ["Be brief.", EOT, "Human: ", "Hi", EOT, "Assistant: ", " Hello\n", EOT],
    "opencoder": ["Be brief.", EOT, "User:", "Hi", EOT, "Assistant:", " Hello\n", EOT],
    "chatml": ["<|im_start|>system\n", "Be brief.", "<|im_end|>", "\n<|im_start|>user\n", "Hi", "<|im_end|>",
               "\n<|im_start|>assistant\n", " Hello\n", "<|im_end|>"],
    "zephyr": ["<|system|>\n", "Be brief.", "</s>", "\n<|user|>\n", "Hi", "</s>",
               "\n<|assistant|>\n", " Hello\n", "</s>"],
    "llama3-instruct": ["<|start_header_id|>system<|end_header_id|>\n\n", "Be brief.", "<|eot_id|>",
                        "<|start_header_id|>user<|end_header_id|>\n\n", "Hi", "<|eot_id|>",
                        "<|start_header_id|>assistant<|end_header_id|>\n\n", " Hello\n", "<|eot_id|>"],
}  # fmt: skip


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("condition", ["", "GPT4"])
def test_templates_of_others_are_written_as_their_authors_do_and_know_no_condition(name: str, condition: str) -> None:
    segments = pieces(name, condition)
    assert [text for text, _, _ in segments] == WRITTEN[name]
    end = get_template(name).end_of_turn
    learned = {"Be brief.": 0.0, "Hi": 0.25, " Hello\n": 2.0}
    weight = 0.0
    for text, kind, found in segments:
        weight = learned[text] if kind == "content" else weight
        assert found == (weight if kind == "content" or text == end else 0.0), text


def test_gemma_it_calls_the_assistant_model_and_refuses_a_system_message() -> None:
    assert pieces("gemma-it", "", CHAT[1:]) == [
        ("<start_of_turn>user\n", "markup", 0.0),
        ("Hi", "content", 0.25),
        ("<end_of_turn>", "markup", 0.25),
        ("\n<start_of_turn>model\n", "markup", 0.0),
        (" Hello\n", "content", 2.0),
        ("<end_of_turn>", "markup", 2.0),
    ]
    with pytest.raises(TemplateError) as raised:
        pieces("gemma-it", "")
    assert "template 'gemma-it' has no system role. It knows: user, assistant. Remove system" in str(raised.value)


def test_a_prompt_opens_the_assistants_turn_after_the_separator_and_leaves_none_at_its_end() -> None:
    hi, sure = Message(role="user", content="Hi"), Message(role="assistant", content="Sure, ")
    begin = ["<|im_start|>user\n", "Hi", "<|im_end|>", "\n<|im_start|>assistant\n"]
    assert prompt("chatml", "", hi) == [*begin, ""]
    assert prompt("chatml", "", hi, sure) == [*begin, "Sure, "]


@pytest.mark.parametrize(
    ("name", "expected"),
    [("openchat-3.5", "User:"), ("openchat-3.6", "<|start_header_id|>User<|end_header_id|>\n\n")],
)
def test_in_training_an_empty_condition_stays_empty_and_leaves_no_space(name: str, expected: str) -> None:
    assert prefix(get_template(name), "user", "") == expected
    assert expected in [text for text, _, _ in pieces(name, "")]
    assert expected not in [text for text, _, _ in pieces(name, "GPT4")]


def test_a_message_that_spells_the_markup_is_content() -> None:
    assert pieces("openchat-3.5", "", (Message(role="user", content=f"User:{EOT}"),)) == [
        ("User:", "markup", 0.0),
        (f"User:{EOT}", "content", 0.0),
        (EOT, "markup", 0.0),
    ]


def test_a_condition_that_spells_the_placeholder_is_not_filled_in_twice() -> None:
    assert prefix(get_template("openchat-3.5"), "user", "{condition}") == "{condition} User:"


@pytest.mark.parametrize(("name", "default"), [("openchat-3.5", "GPT4 Correct"), ("openchat-3.2", "GPT4")])
def test_a_prompt_fills_in_the_default_condition_and_waits_for_the_assistant(name: str, default: str) -> None:
    hi = Message(role="user", content="Hi")
    assert prompt(name, "", hi) == [f"{default} User:", "Hi", EOT, f"{default} Assistant:", ""]
    assert prompt(name, "Code", hi) == ["Code User:", "Hi", EOT, "Code Assistant:", ""]


def test_a_prompt_that_ends_with_the_assistant_is_left_open_there() -> None:
    assert prompt("openchat-3.5", "Code", Message(role="assistant", content="Sure, ")) == ["Code Assistant:", "Sure, "]


def test_a_prompt_needs_a_message() -> None:
    with pytest.raises(TemplateError, match="at least one message"):
        prompt("openchat-3.5", "Code")


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_is_found_by_its_name_and_its_aliases(name: str) -> None:
    template = get_template(name)
    assert template.name == name
    assert all(get_template(alias) is template for alias in template.aliases)


def test_the_originals_names_are_aliases() -> None:
    names = ["openchat_3.6", "openchat_v3.2_mistral", "openchat_3.5", "openchat_v3.2"]
    names += ["openchat", "openchat_8192", "opencoderplus"]
    found = [get_template(name).name for name in names]
    assert found[:4] == ["openchat-3.6", "openchat-3.5", "openchat-3.5", "openchat-3.2"]
    assert found[4:] == ["openchat-1", "openchat-1", "opencoder"]


def test_a_name_or_alias_belongs_to_one_template() -> None:
    names = [name for template in TEMPLATES.values() for name in (template.name, *template.aliases)]
    assert len(TEMPLATES) == 9
    assert len(names) == len(set(names))


def test_an_unknown_template_answers_with_the_nearest_and_all_names() -> None:
    with pytest.raises(TemplateError) as raised:
        get_template("openchat-3,6")
    assert "no template is called 'openchat-3,6'. Did you mean 'openchat-3.6'?" in str(raised.value)
    assert str(raised.value).endswith(f"Known: {', '.join(TEMPLATES)}.")


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_every_end_of_turn_is_a_control_token(template: object) -> None:
    assert template.end_of_turn in template.control_tokens  # type: ignore[attr-defined]
