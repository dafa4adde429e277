"""`ochat chat`: a conversation in the terminal, or one question."""

import sys

from ochat.data.conversation import Message
from ochat.errors import OchatError
from ochat.log import console
from ochat.serving.chat import Chat, Sampling

HELP = "/condition NAME changes the class, /reset forgets the conversation, /exit (or Ctrl-D) leaves"
EXIT = ("/exit", "/quit")


def run_terminal(chat: Chat, *, condition: str, sampling: Sampling, message: str | None = None) -> None:
    """Answer `message` and return; without one, read turns from stdin until it ends or Ctrl-C is pressed at it."""
    condition = _chosen(chat, condition)
    if message is not None:
        _answer(chat, [Message(role="user", content=message)], condition, sampling)
        return
    _say(f"{HELP}. Conditions: {_known(chat)}.")
    _say(f"answering as {condition!r}" if condition else "answering without a condition")
    history: list[Message] = []
    while (line := _read_line(condition)) is not None:
        command, _, argument = line.partition(" ")
        if command in EXIT:
            return
        if command == "/reset":
            history = []
            _say("the conversation is forgotten")
        elif command == "/condition":
            condition = _chosen(chat, argument)
            _say(f"answering as {condition!r}; conditions: {_known(chat)}")
        elif command.startswith("/"):
            _say(f"no command {command}: {HELP}")
        elif line.strip():
            history += _turn(chat, [*history, Message(role="user", content=line)], condition, sampling)


def _chosen(chat: Chat, condition: str) -> str:
    """The condition that will be answered under, the default one for nothing.

    Warns of one that the model has never seen: a mistyped class, which nobody means.
    """
    condition = condition.strip() or chat.card.default_condition
    if condition not in chat.card.conditions:
        _say(f"warning: the model was not trained under {condition!r}. Trained: {_known(chat)}.")
    return condition


def _known(chat: Chat) -> str:
    default = chat.card.default_condition
    return ", ".join(f"{name!r} (default)" if name == default else repr(name) for name in chat.card.conditions)


def _turn(chat: Chat, messages: list[Message], condition: str, sampling: Sampling) -> list[Message]:
    """The question and its answer; nothing when it could not be answered, or was stopped."""
    try:
        answer = _answer(chat, messages, condition, sampling)
    except OchatError as exc:
        _say(f"{exc} /reset forgets this one.")
    except KeyboardInterrupt:
        _say("stopped; the question is forgotten")
    else:
        return [messages[-1], Message(role="assistant", content=answer)]
    return []


def _answer(chat: Chat, messages: list[Message], condition: str, sampling: Sampling) -> str:
    answer = chat.reply(messages, condition=condition, sampling=sampling)
    sys.stdout.write(answer + "\n")
    sys.stdout.flush()
    return answer


def _read_line(condition: str) -> str | None:
    """What was typed, without its end; None when that is all."""
    shown = sys.stdin.isatty()
    if shown:
        console.print(f"{condition}> ", end="", markup=False, highlight=False)
    try:
        line = sys.stdin.readline()
    except KeyboardInterrupt:
        line = ""
    if not line and shown:
        console.print()
    return line.rstrip("\r\n") if line else None


def _say(text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
