"""Chats of mixed quality about sums: an expert that is always right, and a source that often forgets to carry.

A SumsConfig enters; two ShareGPT JSONL files leave, `expert.jsonl` and `suboptimal.jsonl`, and the sums that are in
neither. Everything is a pure function of the config. scripts/demo and the ablation call it.

Answers are written last digit first, each digit with its place, since a model that writes from left to right must know
a carry before it needs it: 347 + 586 = 933 is answered "ones 3, tens 3, hundreds 9".
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

EXPERT_FILE = "expert.jsonl"
SUBOPTIMAL_FILE = "suboptimal.jsonl"
PLACES = ("ones", "tens", "hundreds", "thousands", "ten thousands", "hundred thousands")

# One independent random stream for each use, so a larger corpus keeps the same held-out sums.
HELD_OUT_STREAM, EXPERT_STREAM, SUBOPTIMAL_STREAM = 0, 1, 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Sum:
    """Two numbers to add."""

    a: int
    b: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SumsConfig:
    """What the corpus holds.

    num_conversations   of both sources together
    expert_fraction     share of them that the expert answers
    error_rate          share of the sub-optimal source's answers that are wrong because they forget to carry. It counts
                        over all its answers, and exactly: a wrong answer is given to a sum that needs a carry, a right
                        one to any sum
    num_digits          of each number: 3 means 100..999
    carry_only          ask only sums that need a carry, in both files and in the held-out sums
    num_held_out        sums kept for the test: neither a + b nor b + a is asked in either file
    """

    num_conversations: int
    expert_fraction: float = 0.1
    error_rate: float = 0.6
    num_digits: int = 3
    carry_only: bool = False
    num_held_out: int = 200
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """The files that were written, and the sums that are in neither."""

    expert: Path
    suboptimal: Path
    num_expert: int
    num_suboptimal: int
    held_out: tuple[Sum, ...]


def question(problem: Sum) -> str:
    """Return the user's message, such as "What is 347 + 586?"."""
    return f"What is {problem.a} + {problem.b}?"


def correct_answer(problem: Sum) -> str:
    """Return the expert's message, such as "ones 3, tens 3, hundreds 9" for 347 + 586 = 933."""
    return spell(str(problem.a + problem.b))


def careless_answer(problem: Sum) -> str:
    """Return the answer of one who adds each column mod 10 and never carries.

    347 + 586 gives 823, written "ones 3, tens 2, hundreds 8". Every column keeps its digit: 500 + 500 gives 000.
    """
    return spell("".join(str((a + b) % 10) for a, b in reversed(_columns(problem))))


def spell(digits: str) -> str:
    """Write digits, given in reading order, last first and by place: "933" is "ones 3, tens 3, hundreds 9"."""
    return ", ".join(f"{place} {digit}" for place, digit in zip(PLACES, reversed(digits), strict=False))


def needs_carry(problem: Sum) -> bool:
    """Return whether the careless answer is wrong, that is whether a column adds up to 10 or more."""
    return any(a + b >= 10 for a, b in _columns(problem))


def parse_answer(text: str) -> str | None:
    """Return the number in reading order ("933" for "ones 3, tens 3, hundreds 9"), or None where it is no answer."""
    digits = "".join(re.findall(r"[0-9]", text))[::-1]
    return digits if digits and text.strip() == spell(digits) else None


def is_correct(problem: Sum, text: str) -> bool:
    """Return whether the text is the exact answer: every digit right, no digit more."""
    return parse_answer(text) == str(problem.a + problem.b)


def held_out_sums(config: SumsConfig) -> tuple[Sum, ...]:
    """Return the sums of the test, all different (b + a counts as a + b): the ones `write_corpus` never asks."""
    rng = np.random.default_rng([config.seed, HELD_OUT_STREAM])
    chosen: dict[tuple[int, int], Sum] = {}
    for problem in _draw_sums(config, rng, carry_only=config.carry_only):
        if len(chosen) == config.num_held_out:
            break
        chosen.setdefault(_unordered(problem), problem)
    return tuple(chosen.values())


def write_corpus(folder: Path, config: SumsConfig) -> Corpus:
    """Write `expert.jsonl` and `suboptimal.jsonl` into the folder, one ShareGPT conversation a line; return both paths.

    A sum may be asked more than once, in one file and in both. A sum of the test is asked in neither.
    """
    held_out = held_out_sums(config)
    forbidden = {_unordered(problem) for problem in held_out}
    num_expert = round(config.num_conversations * config.expert_fraction)
    corpus = Corpus(
        expert=folder / EXPERT_FILE,
        suboptimal=folder / SUBOPTIMAL_FILE,
        num_expert=num_expert,
        num_suboptimal=config.num_conversations - num_expert,
        held_out=held_out,
    )
    folder.mkdir(parents=True, exist_ok=True)
    _write_conversations(corpus.expert, _expert_chats(config, forbidden, corpus.num_expert))
    _write_conversations(corpus.suboptimal, _suboptimal_chats(config, forbidden, corpus.num_suboptimal))
    return corpus


def read_texts(path: Path) -> Iterator[str]:
    """Yield every message of a ShareGPT JSONL file, in order: what a tokenizer is trained on."""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            yield from (message["value"] for message in json.loads(line)["conversations"])


def _expert_chats(config: SumsConfig, forbidden: set[tuple[int, int]], count: int) -> Iterator[tuple[Sum, str]]:
    rng = np.random.default_rng([config.seed, EXPERT_STREAM])
    allowed = (p for p in _draw_sums(config, rng, carry_only=config.carry_only) if _unordered(p) not in forbidden)
    return ((problem, correct_answer(problem)) for problem in islice(allowed, count))


def _suboptimal_chats(config: SumsConfig, forbidden: set[tuple[int, int]], count: int) -> Iterator[tuple[Sum, str]]:
    rng = np.random.default_rng([config.seed, SUBOPTIMAL_STREAM])
    # 10 answers, error rate 0.6: exactly 6 are careless, at places drawn without replacement
    careless = rng.permutation(count) < round(count * config.error_rate)
    any_sum = _draw_sums(config, rng, carry_only=config.carry_only)
    carry_sum = _draw_sums(config, rng, carry_only=True)
    for is_careless in careless.tolist():
        source = carry_sum if is_careless else any_sum
        problem = next(p for p in source if _unordered(p) not in forbidden)
        yield problem, careless_answer(problem) if is_careless else correct_answer(problem)


def _draw_sums(config: SumsConfig, rng: np.random.Generator, *, carry_only: bool) -> Iterator[Sum]:
    """Yield sums without end, both numbers uniform over those of `num_digits` digits."""
    low, high = 10 ** (config.num_digits - 1), 10**config.num_digits
    while True:
        a, b = rng.integers(low, high, size=2).tolist()
        problem = Sum(a=a, b=b)
        if not carry_only or needs_carry(problem):
            yield problem


def _write_conversations(path: Path, chats: Iterator[tuple[Sum, str]]) -> None:
    with path.open("w", encoding="utf-8") as lines:
        for number, (problem, answer) in enumerate(chats):
            messages = [{"from": "human", "value": question(problem)}, {"from": "gpt", "value": answer}]
            lines.write(json.dumps({"id": f"{path.stem}-{number}", "conversations": messages}) + "\n")


def _columns(problem: Sum) -> list[tuple[int, int]]:
    """Return the digits to add in each column, last column first: 347 + 586 is (7, 6), (4, 8), (3, 5)."""
    a, b = str(problem.a), str(problem.b)
    width = max(len(a), len(b))
    return [(int(x), int(y)) for x, y in zip(a.zfill(width)[::-1], b.zfill(width)[::-1], strict=True)]


def _unordered(problem: Sum) -> tuple[int, int]:
    return min(problem.a, problem.b), max(problem.a, problem.b)
