"""Conversation templates: data, how a conversation becomes segments of text, and the same as a Jinja template.

BOS, then for each message: role prefix, content, end-of-turn. Prefixes and end-of-turns are markup and may hold control
tokens; content never does, whatever it spells. Strings only: token ids are tokenize.py's business.

    openchat-3.5, condition "GPT4":   GPT4 User:|Hi|<|end_of_turn|>|GPT4 Assistant:|Hello|<|end_of_turn|>
    loss weight                       0         |0 |0             |0              |1    |1
"""

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from ochat.data.conversation import Conversation, Message, Role
from ochat.errors import TemplateError

CONDITION = "{condition} "


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """How one family of models writes a conversation.

    prefixes           role -> text before a message; "{condition} " vanishes when the condition is empty
    end_of_turn        text after a message
    default_condition  what an empty condition means at inference; in training empty stays empty
    control_tokens     texts that must each be one special token of the tokenizer
    """

    name: str
    prefixes: Mapping[Role, str]
    end_of_turn: str
    default_condition: str
    control_tokens: tuple[str, ...]
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A piece of text that is tokenised by itself."""

    text: str
    kind: Literal["markup", "content"]
    weight: float


_END_OF_TURN = "<|end_of_turn|>"
_CONDITIONED: Mapping[Role, str] = {
    "system": "",
    "user": "{condition} User:",
    "assistant": "{condition} Assistant:",
}

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
            control_tokens=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
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
    """The markup before a message of `role`."""
    return template.prefixes[role].replace(CONDITION, f"{condition} " if condition else "")


def render(template: Template, conversation: Conversation) -> Iterator[Segment]:
    """The whole conversation as training sees it; BOS is left to the tokenizer."""
    for message in conversation.messages:
        if text := prefix(template, message.role, conversation.condition):
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
    default = f"default({_quote(template.default_condition)}, true)"
    lines = ["{{ bos_token }}"]
    lines += [f"{{% set condition = (condition | {default} | trim) %}}", "{% for message in messages %}"]
    keyword = "if"
    for role, text in template.prefixes.items():
        lines.append(f"{{% {keyword} message['role'] == {_quote(role)} %}}")
        lines.append(f"{{{{ {_jinja_prefix(text)} }}}}")
        if dummy_prefix and text and not text.endswith(template.control_tokens):
            lines.append("{% if message['content'] %}{{ ' ' }}{% endif %}")
        keyword = "elif"
    roles = ", ".join(template.prefixes)
    lines.append(f"{{% else %}}{{{{ raise_exception('role must be one of: {roles}') }}}}{{% endif %}}")
    end = _quote(template.end_of_turn)
    lines += [f"{{{{ message['content'] + {end} }}}}", "{% endfor %}"]
    lines.append(
        f"{{% if add_generation_prompt %}}{{{{ {_jinja_prefix(template.prefixes['assistant'])} }}}}{{% endif %}}"
    )
    return "".join(lines)


def _jinja_prefix(text: str) -> str:
    before, conditioned, after = text.partition(CONDITION)
    if not conditioned:
        return _quote(text)
    return f"{_quote(before)} + (condition + ' ' if condition else '') + {_quote(after)}"


def _quote(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"
