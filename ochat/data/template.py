"""Conversation templates: data, how a conversation becomes segments of text, and the same as a Jinja template.

BOS, then for each message: role prefix, content, end-of-turn. Prefixes and end-of-turns are markup and may hold control
tokens; content never does, whatever it spells. Strings only: token ids are tokenize.py's business. docs/templates.md
says how to add a template, and for which contents the Jinja's one string has the training ids.

    openchat-3.5, condition "GPT4":   GPT4 User:|Hi|<|end_of_turn|>|GPT4 Assistant:|Hello|<|end_of_turn|>
    loss weight                       0         |0 |0             |0              |1    |1
"""

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from ochat.data.conversation import ROLES, Conversation, Message, Role
from ochat.errors import TemplateError

CONDITION = "{condition} "


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """How one family of models writes a conversation.

    prefixes           role -> text before a message; "{condition} " vanishes when the condition is empty. A role that
                       is not there is refused
    end_of_turn        text after a message, learned with it
    separator          text between an end-of-turn and the next prefix, never learned: one piece with that prefix
    bos                whether the BOS token comes first; "optional" is when the tokenizer has one
    default_condition  what an empty condition means at inference; in training empty stays empty
    control_tokens     texts that must each be one special token of the tokenizer
    """

    name: str
    prefixes: Mapping[Role, str]
    end_of_turn: str
    default_condition: str
    control_tokens: tuple[str, ...]
    separator: str = ""
    bos: Literal["required", "optional", "never"] = "required"
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A piece of text that is tokenised by itself."""

    text: str
    kind: Literal["markup", "content"]
    weight: float


_END_OF_TURN = "<|end_of_turn|>"
_HEADERS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_CONDITIONED: Mapping[Role, str] = {
    "system": "",
    "user": "{condition} User:",
    "assistant": "{condition} Assistant:",
}


def _per_role(text: str) -> Mapping[Role, str]:
    return {role: text.replace("{role}", role) for role in ROLES}


TEMPLATES: Mapping[str, Template] = {
    template.name: template
    for template in (
        Template(
            name="openchat-3.6",
            prefixes={
                "system": "<|start_header_id|>System<|end_header_id|>\n\n",
                "user": "<|start_header_id|>{condition} User<|end_header_id|>\n\n",
                "assistant": "<|start_header_id|>{condition} Assistant<|end_header_id|>\n\n",
            },
            end_of_turn="<|eot_id|>",
            default_condition="GPT4 Correct",
            control_tokens=_HEADERS,
            aliases=("openchat_3.6",),
        ),
        Template(
            name="openchat-3.5",
            prefixes=_CONDITIONED,
            end_of_turn=_END_OF_TURN,
            default_condition="GPT4 Correct",
            control_tokens=(_END_OF_TURN,),
            aliases=("openchat_v3.2_mistral", "openchat_3.5"),
        ),
        Template(
            name="openchat-3.2",
            prefixes=_CONDITIONED,
            end_of_turn=_END_OF_TURN,
            default_condition="GPT4",
            control_tokens=(_END_OF_TURN,),
            aliases=("openchat_v3.2",),
        ),
        Template(
            name="openchat-1",
            prefixes={"system": "", "user": "Human: ", "assistant": "Assistant: "},
            end_of_turn=_END_OF_TURN,
            default_condition="",
            control_tokens=(_END_OF_TURN,),
            aliases=("openchat", "openchat_8192"),
        ),
        Template(
            name="opencoder",
            prefixes={"system": "", "user": "User:", "assistant": "Assistant:"},
            end_of_turn=_END_OF_TURN,
            default_condition="",
            control_tokens=(_END_OF_TURN,),
            bos="never",
            aliases=("opencoderplus",),
        ),
        Template(
            name="chatml",
            prefixes=_per_role("<|im_start|>{role}\n"),
            end_of_turn="<|im_end|>",
            separator="\n",
            default_condition="",
            control_tokens=("<|im_start|>", "<|im_end|>"),
            bos="optional",  # Qwen's tokenizers have none
        ),
        Template(
            name="zephyr",
            prefixes=_per_role("<|{role}|>\n"),  # plain text in zephyr's own tokenizer too, not control tokens
            end_of_turn="</s>",
            separator="\n",
            default_condition="",
            control_tokens=("</s>",),
        ),
        Template(
            name="llama3-instruct",
            prefixes=_per_role("<|start_header_id|>{role}<|end_header_id|>\n\n"),
            end_of_turn="<|eot_id|>",
            default_condition="",
            control_tokens=_HEADERS,
        ),
        Template(
            name="gemma-it",
            prefixes={"user": "<start_of_turn>user\n", "assistant": "<start_of_turn>model\n"},
            end_of_turn="<end_of_turn>",
            separator="\n",
            default_condition="",
            control_tokens=("<start_of_turn>", "<end_of_turn>"),
        ),
    )
}


def get_template(name: str) -> Template:
    """The template of that name or alias; TemplateError lists the nearest."""
    by_name = {alias: t for t in TEMPLATES.values() for alias in (t.name, *t.aliases)}
    if name not in by_name:
        near = difflib.get_close_matches(name, by_name, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise TemplateError(f"model.template: no template is called {name!r}.{hint} Known: {', '.join(TEMPLATES)}.")
    return by_name[name]


def prefix(template: Template, role: Role, condition: str) -> str:
    """The markup before a message of `role`; TemplateError if the template has no such role."""
    if role not in template.prefixes:
        raise TemplateError(
            f"template {template.name!r} has no {role} role. It knows: {', '.join(template.prefixes)}. "
            f"Remove {role} messages, move their text into the first user message, or choose another model.template."
        )
    return template.prefixes[role].replace(CONDITION, f"{condition} " if condition else "")


def writes_condition(template: Template) -> bool:
    """Whether any prefix has a place for the condition; without one, classes differ by weight only."""
    return any(CONDITION in text for text in template.prefixes.values())


def opening(template: Template, role: Role, condition: str, *, first: bool) -> str:
    """All markup before a message: its prefix, after the separator unless it is the first of its conversation."""
    return ("" if first else template.separator) + prefix(template, role, condition)


def render(template: Template, conversation: Conversation) -> Iterator[Segment]:
    """The whole conversation as training sees it; BOS is left to the tokenizer."""
    for n, message in enumerate(conversation.messages):
        if text := opening(template, message.role, conversation.condition, first=n == 0):
            yield Segment(text=text, kind="markup", weight=0.0)
        yield Segment(text=message.content, kind="content", weight=message.weight)
        yield Segment(text=template.end_of_turn, kind="markup", weight=message.weight)


def render_prompt(template: Template, conversation: Conversation) -> Iterator[Segment]:
    """The conversation as a prompt to be continued: default condition filled in, the last end-of-turn left open.

    A conversation that ends with a user gets an assistant prefix; one that ends with an assistant is continued there.
    """
    messages = conversation.messages
    if not messages:
        raise TemplateError("a prompt needs at least one message.")
    if messages[-1].role != "assistant":
        messages = (*messages, Message(role="assistant", content=""))
    condition = conversation.condition or template.default_condition
    *segments, _ = render(template, Conversation(messages=messages, condition=condition))
    yield from segments


def to_jinja(template: Template, *, dummy_prefix: bool) -> str:
    """The same template for `tokenizer.apply_chat_template`, with `condition` as an optional argument.

    dummy_prefix  whether the tokenizer puts a space before every text it encodes, as SentencePiece does. Pieces that
                  are encoded one by one all get theirs; in one string, content after a prefix needs a literal space.
    """
    lines = [] if template.bos == "never" else ["{{ bos_token }}"]
    if writes_condition(template):
        default = f"default({_quote(template.default_condition)}, true)"
        lines.append(f"{{% set condition = (condition | {default} | trim) %}}")
    lines.append("{% for message in messages %}")
    if template.separator:
        lines.append(f"{{% if not loop.first %}}{{{{ {_quote(template.separator)} }}}}{{% endif %}}")
    keyword = "if"
    for role, text in template.prefixes.items():
        lines.append(f"{{% {keyword} message['role'] == {_quote(role)} %}}")
        lines.append(f"{{{{ {_jinja_prefix(text)} }}}}")
        if dummy_prefix and text and not text.endswith(template.control_tokens):
            lines.append("{% if message['content'] %}{{ ' ' }}{% endif %}")
        keyword = "elif"
    roles = ", ".join(template.prefixes)
    lines.append(f"{{% else %}}{{{{ raise_exception('role must be one of: {roles}') }}}}{{% endif %}}")
    lines += [f"{{{{ message['content'] + {_quote(template.end_of_turn)} }}}}", "{% endfor %}"]
    opening = f"{_quote(template.separator)} + " if template.separator else ""
    opening += _jinja_prefix(template.prefixes["assistant"])
    lines.append(f"{{% if add_generation_prompt %}}{{{{ {opening} }}}}{{% endif %}}")
    return "".join(lines)


def in_jinja_class(template: Template, conversation: Conversation, *, dummy_prefix: bool) -> bool:
    """Whether the Jinja's one string has the training ids, for contents that spell no added token of the tokenizer.

    One string can differ where content follows text: BPE may merge across that border. docs/templates.md has the table.
    """
    return all(
        _stays_apart(prefix(template, m.role, conversation.condition), m.content, template, dummy_prefix)
        for m in conversation.messages
    )


def _stays_apart(before: str, content: str, template: Template, dummy_prefix: bool) -> bool:
    if not content or not before or before.endswith(template.control_tokens):
        return True
    if before.endswith(" "):  # "Human: " leaves a lone space, which may merge with whatever follows
        return False
    if dummy_prefix:  # the literal space begins a word, and no piece spans the border of a word
        return True
    if before.endswith("\n"):
        return not content[0].isspace()
    # After the colon of "User:": byte-level tokenizers split before a space or a digit, some also before a letter.
    return content[0] == " " or content[0].isdecimal()


def _jinja_prefix(text: str) -> str:
    before, conditioned, after = text.partition(CONDITION)
    if not conditioned:
        return _quote(text)
    return f"{_quote(before)} + (condition + ' ' if condition else '') + {_quote(after)}"


def _quote(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"
