"""The demo: write the corpus and an untrained base, prepare, train under the deepspeed launcher, ask under each class.

Every number it prints is measured by generating answers. It exits with 1 when C-RLFT did not show: the expert condition
below 95 % or the sub-optimal one above 70 %.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ochat.config import Config, load_config
from ochat.data.conversation import Conversation, Message
from ochat.serving.chat import Chat, Sampling, load_chat
from scripts.sums.base import write_base_model
from scripts.sums.corpus import (
    Sum,
    SumsConfig,
    careless_answer,
    correct_answer,
    is_correct,
    needs_carry,
    parse_answer,
    question,
    read_texts,
    write_corpus,
)
from scripts.sums.curve import draw_loss_curve

CONFIG = "configs/demo-sums.yaml"
EXPERT, SUBOPTIMAL = "GPT4", "GPT3"
SUMS = SumsConfig(num_conversations=32_000)
LIMITS = {EXPERT: (0.95, 1.0), SUBOPTIMAL: (0.0, 0.70)}

console = Console(highlight=False, soft_wrap=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """Shares: exact answers to all sums, to those that need a carry, and answers to these that forget it."""

    exact: float
    exact_with_carry: float
    careless: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where data/ and runs/ go; default: here")
    overrides = _inside(parser.parse_args().folder)
    began = time.monotonic()
    config = load_config(CONFIG, overrides)
    corpus_dir = Path(config.model.name_or_path).parent
    for folder in (corpus_dir, Path(config.data.prepared_dir), config.run_dir):
        shutil.rmtree(folder, ignore_errors=True)

    corpus = write_corpus(corpus_dir, SUMS)
    write_base_model(Path(config.model.name_or_path), [*read_texts(corpus.expert), *read_texts(corpus.suboptimal)])
    _introduce(corpus.num_expert, corpus.num_suboptimal)
    _run("ochat", "prepare", CONFIG, *overrides)
    processes = min(2, os.cpu_count() or 1)
    _run(
        "deepspeed", "--num_accelerators", processes, "--module", "ochat.training.train", "--config", CONFIG, *overrides
    )

    chat = load_chat(config.run_dir)
    answers = {condition: ask(chat, corpus.held_out, condition) for condition in (EXPERT, SUBOPTIMAL)}
    accuracies = {condition: score(corpus.held_out, given) for condition, given in answers.items()}
    _show_answers(corpus.held_out, answers)
    _show_table(len(corpus.held_out), accuracies)
    curve = config.run_dir / "loss.png"
    draw_loss_curve(config.run_dir / "metrics.jsonl", curve)
    _say_next(config, curve, time.monotonic() - began)
    return 0 if all(low <= accuracies[c].exact <= high for c, (low, high) in LIMITS.items()) else 1


def _inside(folder: Path | None) -> list[str]:
    """Overrides that move all the recipe's paths into a folder."""
    if folder is None:
        return []
    data = folder / "data"
    return [
        f"run.output_dir={folder / 'runs'}",
        f"model.name_or_path={data / 'demo-sums/base'}",
        f"data.prepared_dir={data / 'prepared/demo-sums'}",
        f"data.sources.0.path={data / 'demo-sums/expert.jsonl'}",
        f"data.sources.1.path={data / 'demo-sums/suboptimal.jsonl'}",
    ]


def ask(chat: Chat, problems: Sequence[Sum], condition: str) -> list[str]:
    """The model's answer to each sum under a condition, greedy."""
    conversations = [
        Conversation(messages=(Message(role="user", content=question(problem)),), condition=condition)
        for problem in problems
    ]
    return chat.reply_batch(conversations, sampling=Sampling(max_new_tokens=16))


def score(problems: Sequence[Sum], answers: Sequence[str]) -> Accuracy:
    pairs = list(zip(problems, answers, strict=True))
    carries = [(problem, answer) for problem, answer in pairs if needs_carry(problem)]
    return Accuracy(
        exact=sum(is_correct(problem, answer) for problem, answer in pairs) / len(pairs),
        exact_with_carry=sum(is_correct(problem, answer) for problem, answer in carries) / len(carries),
        careless=sum(answer == careless_answer(problem) for problem, answer in carries) / len(carries),
    )


def _introduce(num_expert: int, num_suboptimal: int) -> None:
    example = Sum(a=347, b=586)
    console.print("\n[bold]The corpus[/bold]: sums of mixed quality, in two ShareGPT files")
    console.print(f"  expert      {num_expert:6,} chats  always right                condition {EXPERT}  weight 1.0")
    console.print(
        f"  suboptimal  {num_suboptimal:6,} chats  60 % forget to carry        condition {SUBOPTIMAL}  weight 0.1"
    )
    console.print(f"  asked {question(example)!r}, the expert says {correct_answer(example)!r} (that is 933),")
    console.print(f"  the careless one {careless_answer(example)!r} (that is 823).")
    console.print("  Answers are written last digit first, so that a carry is known before it is needed.\n")


def _run(program: str, *arguments: object) -> None:
    """Run a command of this environment as a user would type it; end the demo if it fails."""
    words = [program, *map(str, arguments)]
    console.print(f"[bold]$ {shlex.join(words)}[/bold]")
    bin_dir = Path(sys.executable).parent
    done = subprocess.run(
        [bin_dir / program, *words[1:]], env={**os.environ, "PATH": f"{bin_dir}:{os.environ['PATH']}"}, check=False
    )
    if done.returncode:
        sys.exit(done.returncode)
    console.print()


def _show_answers(problems: Sequence[Sum], answers: dict[str, list[str]]) -> None:
    console.print("\n[bold]Sums the model has never seen[/bold], asked under each condition")
    shown = [i for i, problem in enumerate(problems) if needs_carry(problem)][:4]
    for i in shown:
        console.print(f"  {question(problems[i])}  right: {problems[i].a + problems[i].b}")
        for condition, given in answers.items():
            verdict = "right" if is_correct(problems[i], given[i]) else "wrong"
            console.print(f"    {condition}  {given[i]!r}  that is {parse_answer(given[i]) or 'no number'}, {verdict}")


def _show_table(num_sums: int, accuracies: dict[str, Accuracy]) -> None:
    table = Table(title=f"{num_sums} held-out sums", title_justify="left")
    table.add_column("condition")
    for heading in ("exact", "exact where a carry is needed", "forgot to carry"):
        table.add_column(heading, justify="right")
    for condition, accuracy in accuracies.items():
        shares = (accuracy.exact, accuracy.exact_with_carry, accuracy.careless)
        table.add_row(condition, *(f"{share:.1%}" for share in shares))
    console.print()
    console.print(table)


def _say_next(config: Config, curve: Path, seconds: float) -> None:
    console.print(f"\nloss curve  {curve}\nmetrics     {config.run_dir / 'metrics.jsonl'}\ntook        {seconds:.0f} s")
    console.print("\nnext, with .venv/bin on your PATH (`source .venv/bin/activate`):")
    console.print(f"  ochat chat {config.run_dir} --message 'What is 258 + 367?' --condition {EXPERT}")
    console.print(f"  ochat chat {config.run_dir} --condition {SUBOPTIMAL}")
    console.print(f"  ochat inspect {CONFIG}   # what was trained, token by token, with its weight")


if __name__ == "__main__":
    sys.exit(main())
