"""`ochat chat` as a conversation: commands, conditions, and ways to end it."""

import io
import sys
from dataclasses import dataclass, field

import pytest

from ochat.checkpoint import CheckpointCard
from ochat.data.conversation import Message
from ochat.errors import OchatError
from ochat.serving.chat import Sampling
from ochat.serving.terminal import run_terminal

CARD = CheckpointCard(
    format_version=1, base_model="base", template="openchat-3.5", conditions=("GPT4", "GPT3"), default_condition="GPT4",
    max_length=128, step=1, dataset_fingerprint="", config={},
)  # fmt: skip


@dataclass
class Parrot:
    """Answers "CONDITION: number of messages"; "stop" is interrupted, "long" refused."""

    card: CheckpointCard = CARD
    asked: list[str] = field(default_factory=list)

    def reply(self, messages: list[Message], *, condition: str, sampling: Sampling) -> str:
        self.asked.append(messages[-1].content)
        if messages[-1].content == "stop":
            raise KeyboardInterrupt
        if messages[-1].content == "long":
            raise OchatError("the conversation is too long.")
        return f"{condition}: {len(messages)}"


def talk(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], typed: str, condition: str = ""):
    """(answers, everything else that was said) to what is typed."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    run_terminal(Parrot(), condition=condition, sampling=Sampling())
    captured = capsys.readouterr()
    return captured.out.splitlines(), captured.err


def test_the_condition_is_shown_and_changes_are_confirmed(monkeypatch, capsys):
    answers, said = talk(monkeypatch, capsys, "a\n/condition GPT3\nb\n/condition\nc\n")

    assert answers == ["GPT4: 1", "GPT3: 3", "GPT4: 5"]
    assert "Conditions: 'GPT4' (default), 'GPT3'." in said
    shown = [line.partition(";")[0] for line in said.splitlines() if line.startswith("answering")]
    assert shown == ["answering as 'GPT4'", "answering as 'GPT3'", "answering as 'GPT4'"]


def test_a_condition_of_no_training_is_warned_of(monkeypatch, capsys):
    assert "warning: the model was not trained under 'GPT5'" in talk(monkeypatch, capsys, "/condition GPT5\n")[1]
    assert "warning: the model was not trained under 'GPT5'" in talk(monkeypatch, capsys, "", "GPT5")[1]
    assert "warning" not in talk(monkeypatch, capsys, "/condition GPT3\n", " GPT4 ")[1]


def test_an_unknown_command_lists_the_known_ones_and_is_no_message(monkeypatch, capsys):
    answers, said = talk(monkeypatch, capsys, "/help\na\n")

    assert "no command /help: /condition NAME changes the class, /reset" in said
    assert answers == ["GPT4: 1"]


@pytest.mark.parametrize("command", ["/exit", "/quit"])
def test_what_leaves_leaves(monkeypatch, capsys, command: str):
    assert talk(monkeypatch, capsys, f"a\n{command}\nb\n")[0] == ["GPT4: 1"]
    assert talk(monkeypatch, capsys, "a\n\nb")[0] == ["GPT4: 1", "GPT4: 3"]


def test_a_reset_is_confirmed_and_forgets(monkeypatch, capsys):
    answers, said = talk(monkeypatch, capsys, "a\n/reset\nb\n")

    assert answers == ["GPT4: 1", "GPT4: 1"]
    assert "the conversation is forgotten" in said


@pytest.mark.parametrize(("question", "said"), [("stop", "stopped; the question is"), ("long", "/reset forgets this")])
def test_a_question_without_an_answer_is_forgotten_and_the_talk_goes_on(monkeypatch, capsys, question: str, said: str):
    answers, heard = talk(monkeypatch, capsys, f"a\n{question}\nb\n")

    assert answers == ["GPT4: 1", "GPT4: 3"]
    assert said in heard


def test_an_interrupt_at_the_prompt_ends_it(monkeypatch):
    class Interrupted(io.StringIO):
        def readline(self, size: int | None = -1) -> str:
            raise KeyboardInterrupt

    monkeypatch.setattr(sys, "stdin", Interrupted("a\n"))
    parrot = Parrot()
    run_terminal(parrot, condition="", sampling=Sampling())

    assert parrot.asked == []
