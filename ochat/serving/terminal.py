"""`ochat chat`: a conversation in the terminal, or one question."""

import sys

from ochat.data.conversation import Message
from ochat.errors import OchatError
from ochat.log import console
from ochat.serving.chat import Chat, Sampling

HELP = "/condition NAME changes the class, /reset forgets the conversation, /exit leaves"


def run_terminal(chat: Chat, *, condition: str, sampling: Sampling, message: str | None = None) -> None:
    """Answer `message` and return; without one, read turns from stdin until it ends."""
    _warn_of_unknown(chat, condition)
    if message is not None:
        _answer(chat, [Message(role="user", content=message)], condition, sampling)
        return
    known = ", ".join(map(repr, chat.card.conditions))
    console.print(f"conditions {known}, default {chat.card.default_condition!r}. {HELP}", highlight=False)
    history: list[Message] = []
    while (line := _read_line()) is not None:
        command, _, argument = line.partition(" ")
        if command == "/exit":
            return
        if command == "/reset":
            history = []
        elif command == "/condition":
            condition = argument.strip()
            _warn_of_unknown(chat, condition)
        elif command.startswith("/"):
            console.print(HELP, highlight=False)
        elif line.strip():
            question = Message(role="user", content=line)
            try:
                answer = _answer(chat, [*history, question], condition, sampling)
            except OchatError as exc:
                console.print(f"{exc} /reset forgets this one.", highlight=False)
            else:
                history += [question, Message(role="assistant", content=answer)]


def _warn_of_unknown(chat: Chat, condition: str) -> None:
    """A mistyped class is answered as a class the model has never seen, which nobody means."""
    if condition and condition.strip() not in chat.card.conditions:
        known = ", ".join(map(repr, chat.card.conditions))
        console.print(f"warning: the model was not trained under {condition!r}. Trained: {known}.", highlight=False)


def _answer(chat: Chat, messages: list[Message], condition: str, sampling: Sampling) -> str:
    answer = chat.reply(messages, condition=condition, sampling=sampling)
    sys.stdout.write(answer + "\n")
    sys.stdout.flush()
    return answer


def _read_line() -> str | None:
    if sys.stdin.isatty():
        console.print("> ", end="")
    line = sys.stdin.readline()
    return line.rstrip("\n") if line else None
