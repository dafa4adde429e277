"""`ochat chat`: a conversation in the terminal, or one question."""

import sys

from ochat.data.conversation import Message
from ochat.log import console
from ochat.serving.chat import Chat, Sampling

HELP = "/condition NAME changes the class, /reset forgets the conversation, /exit leaves"


def run_terminal(chat: Chat, *, condition: str, sampling: Sampling, message: str | None = None) -> None:
    """Answer `message` and return; without one, read turns from stdin until it ends."""
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
        elif command.startswith("/"):
            console.print(HELP, highlight=False)
        elif line.strip():
            history.append(Message(role="user", content=line))
            answer = _answer(chat, history, condition, sampling)
            history.append(Message(role="assistant", content=answer))


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
