"""Memory of `ochat prepare` over a million chats, and how long its result takes to be opened.

    python -m scripts.bench.prepare_memory [--chats N] [--num-proc P] [--array]

The chats are real ones from ../shared (else made-up words), cut to 4 turns of at most 600 characters, over and over
with a number of their own, so that no two are the same. --array writes them as one .json array instead of .jsonl.

Memory is Pss, summed over the process and its workers, the peak of samples half a second apart: a page that k processes
share counts 1/k in each. "Of files" are pages of mapped files, which the kernel takes back when it needs them; the rest
nothing but the process can give back.
"""

import argparse
import gzip
import itertools
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.bench.peers import ROOT, SHARED

CHATS = SHARED / "data/mixed_quality"
TOKENIZER = SHARED / "tokenizers/mistral-v0.1-eot"
MADE_UP_TOKENIZER = ROOT / "tests/fixtures/tokenizers/mini-mistral"
MAX_TURNS, MAX_CHARACTERS = 4, 600
SAMPLE_SECONDS = 0.5
GOAL_GIB = 4.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chats", type=int, default=1_000_000)
    parser.add_argument("--num-proc", type=int, default=2)
    parser.add_argument("--array", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        chats = folder / ("chats.json" if arguments.array else "chats.jsonl")
        write_chats(chats, arguments.chats, as_array=arguments.array)
        config = write_config(folder, chats)
        print(f"  {arguments.chats:,} chats, {chats.stat().st_size / 1e6:,.0f} MB of {chats.suffix}, load {load()}")
        first = measure("prepare", config, f"data.num_proc={arguments.num_proc}")
        counts = json.loads((folder / "prepared/manifest.json").read_text())["counts"]["chats"]
        size = sum(file.stat().st_size for file in (folder / "prepared/train").iterdir())
        print(
            f"  prepare: {first.seconds:.0f} s ({first.core_seconds:.0f} s on cores), {arguments.num_proc} processes, "
            f"{arguments.chats / first.seconds:,.0f} chats/s, {counts['tokens'] / first.seconds:,.0f} tokens/s, "
            f"load {load()}; {first.memory}; dataset {counts['tokens']:,} tokens, {size / 1e9:.2f} GB"
        )
        assert counts["read"] == counts["kept"] == arguments.chats, "some chats were lost: no result"
        assert "duplicate" not in counts["noticed"], "some chats are the same: no result"
        for title, command in (("again, nothing changed", "prepare"), ("inspect", "inspect")):
            result = measure(command, config)
            print(f"  {title}: {result.seconds:.1f} s ({result.core_seconds:.1f} s on a core); {result.memory}")
        opened = open_loader(folder)
        print(
            f"  loader: opens the dataset in {opened['dataset_s']:.3f} s, is ready with its plan in "
            f"{opened['open_s']:.3f} s, {opened['memory_mib']:.0f} MiB that no file backs"
        )
    print(f"{arguments.chats:,} conversations: peak {first.memory.total:.2f} GiB, goal <= {GOAL_GIB:.0f} GiB")


def write_chats(path: Path, num_chats: int, *, as_array: bool = False) -> None:
    """ShareGPT rows, one a line; as an array they have brackets around and commas between."""
    before, between, after = ("[", ",\n", "]\n") if as_array else ("", "\n", "\n")
    with path.open("w", encoding="utf-8") as file:
        file.write(before)
        for number, turns in zip(range(num_chats), itertools.cycle(_conversations()), strict=False):
            first = {**turns[0], "value": f"{number}: {turns[0]['value']}"}
            file.write(between if number else "")
            file.write(json.dumps({"conversations": [first, *turns[1:]]}))
        file.write(after)


def _conversations() -> Iterator[list[dict[str, str]]]:
    files = sorted(CHATS.glob("*.jsonl.gz"))
    for lines in itertools.zip_longest(*(gzip.decompress(file.read_bytes()).splitlines() for file in files)):
        for line in filter(None, lines):
            turns = json.loads(line)["conversations"][:MAX_TURNS]
            if any(turn["from"] == "gpt" and turn["value"].strip() for turn in turns):
                yield [{"from": turn["from"], "value": turn["value"][:MAX_CHARACTERS]} for turn in turns]
    rng = random.Random(0)
    for _ in range(0 if files else 10_000):
        words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(1, 8))) for _ in range(400)]
        yield [{"from": speaker, "value": " ".join(words[:100])} for speaker in ("human", "gpt") * 2]


def write_config(folder: Path, chats: Path) -> Path:
    tree = {
        "run": {"name": "bench"},
        "model": {
            "name_or_path": str(TOKENIZER if TOKENIZER.is_dir() else MADE_UP_TOKENIZER),
            "template": "openchat-3.5",
            "max_length": 8192,
        },
        "data": {
            "prepared_dir": str(folder / "prepared"),
            "sources": [{"name": "chats", "path": str(chats), "condition": "GPT4"}],
        },
        "batch": {"micro_batch_tokens": 81_920, "global_batch_tokens": 81_920},
    }
    path = folder / "bench.yaml"
    path.write_text(json.dumps(tree))
    return path


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """GiB: the peak of the sum, and the peak of each part, which need not be at the same time."""

    total: float
    own: float
    of_files: float

    def __str__(self) -> str:
        return f"peak {self.total:.2f} GiB (own {self.own:.2f}, of files {self.of_files:.2f})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Wall time, and the time that all its processes together were on a core."""

    seconds: float
    core_seconds: float
    memory: Memory


def measure(*command: object) -> Measured:
    """Run an `ochat` command; wall time and memory of it and its descendants."""
    words = [Path(sys.executable).parent / "ochat", *command]
    began, on_cores = time.perf_counter(), _core_seconds()
    process = subprocess.Popen(
        [str(word) for word in words], env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    total = own = of_files = 0.0
    while not _ended(process, SAMPLE_SECONDS):
        parts = [_pss(pid) for pid in _tree(process.pid)]
        total = max(total, sum(part["Pss"] for part in parts) / 2**20)
        own = max(own, sum(part["Pss_Anon"] for part in parts) / 2**20)
        of_files = max(of_files, sum(part["Pss_File"] for part in parts) / 2**20)
    assert process.stderr is not None
    assert process.returncode == 0, process.stderr.read().decode()
    return Measured(
        seconds=time.perf_counter() - began,
        core_seconds=_core_seconds() - on_cores,
        memory=Memory(total=total, own=own, of_files=of_files),
    )


def _core_seconds() -> float:
    """Of all children that have ended, and theirs."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def _ended(process: subprocess.Popen[Any], seconds: float) -> bool:
    with suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    return process.returncode is not None


def _tree(root: int) -> list[int]:
    """A process and all its descendants."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(stat.parent.name))
    found = [root]
    for pid in found:
        found += children.get(pid, [])
    return found


def _pss(pid: int) -> dict[str, int]:
    """KiB of the fields that begin with Pss; nothing for a process that has ended."""
    fields = {"Pss": 0, "Pss_Anon": 0, "Pss_File": 0}
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
            name, _, value = line.partition(":")
            if name in fields:
                fields[name] = int(value.split()[0])
    return fields


def open_loader(folder: Path) -> dict[str, float]:
    """What the loader of row 7 says about opening the dataset of `folder`."""
    command = [sys.executable, str(ROOT / "scripts/bench/loader_ochat.py"), str(folder), "81920"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment())
    assert process.stdout is not None
    answer: dict[str, float] = json.loads(process.stdout.readline())
    process.kill()
    process.wait()
    return answer


def load() -> str:
    return f"{os.getloadavg()[0]:.1f}"


if __name__ == "__main__":
    main()
