"""Row 4 of the scoreboard: raw chats -> dataset rows, tokens a second on one core, against the original's functions.

    python -m scripts.bench.row4_prepare [--chats N] [--repeats R]

Both get the same OpenChat lines (real answers from ../shared) and the same Mistral tokenizer, both from JSON bytes to
Arrow columns in memory, one thread each, taking turns. Every repeat has chats of its own, because a tokenizer remembers
whole texts it has seen. The ids must be equal, or there is no result.
"""

import argparse
import gzip
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # before tokenizers is imported: one core a side

from ochat.config import DataConfig, SourceConfig
from ochat.data.items import build_items, settle
from ochat.data.records import Record
from ochat.data.template import get_template
from ochat.data.tokenize import ChatTokenizer, load_tokenizer
from scripts.bench.peers import ROOT, SHARED, openchat_peer
from scripts.bench.side_process import SideProcess

CHATS = SHARED / "data/mixed_quality/alpacaeval_strong.jsonl.gz"
TOKENIZER = SHARED / "tokenizers/mistral-v0.1-eot"
GOAL = 2.0
CHUNK = 256  # records a worker gets at a time, as in ochat prepare


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chats", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        lines = _openchat_lines(arguments.chats * (arguments.repeats + 1))
        path = Path(folder) / "lines.jsonl"
        path.write_bytes(b"\n".join(lines) + b"\n")
        openchat, script = openchat_peer(), ROOT / "scripts/bench/prepare_openchat.py"
        peer = SideProcess([openchat.python, script, path, _older_tokenizer(Path(folder))], openchat.source)
        ours = _Ours(lines)
        rates, num_tokens = [], 0
        for repeat in range(arguments.repeats + 1):
            part = slice(repeat * arguments.chats, (repeat + 1) * arguments.chats)
            (mine, ids), answer = ours.run(part), peer.ask(f"{part.start} {part.stop}")
            assert ids == answer["ids"], "the two sides disagree about ids: no result"
            if repeat == 0:  # warm-up: first calls, imports, page faults
                continue
            tokens = sum(map(len, ids))
            num_tokens += tokens
            rates.append((tokens / mine, tokens / answer["seconds"]))
            print(f"  ours {rates[-1][0]:,.0f} tokens/s, peer {rates[-1][1]:,.0f} tokens/s")
        peer.close()
    mine, theirs = (statistics.median(side) for side in zip(*rates, strict=True))
    print(f"  {arguments.repeats} x {arguments.chats} chats, {num_tokens:,} tokens, ids identical, medians")
    ratio = statistics.median(a / b for a, b in rates)
    print(
        f"row 4: ours {mine:,.0f} tokens/s/core, peer {theirs:,.0f} tokens/s/core, ratio {ratio:.2f}, goal {GOAL:.2f}"
    )


def _openchat_lines(num_chats: int) -> list[bytes]:
    """The first chats in OpenChat's own format, with the weights its pipeline demands."""
    roles = {"human": ("user", 0.0), "gpt": ("assistant", 1.0)}
    lines = []
    with gzip.open(CHATS) as file:
        for line, _ in zip(file, range(num_chats), strict=False):
            turns = json.loads(line)["conversations"]
            items = [{"role": roles[t["from"]][0], "content": t["value"], "weight": roles[t["from"]][1]} for t in turns]
            lines.append(json.dumps({"items": items, "condition": "GPT4"}).encode())
    return lines


def _older_tokenizer(folder: Path) -> Path:
    """The same tokenizer in the file format of the peer's library: merges as "a b" instead of ["a", "b"]."""
    tree = json.loads((TOKENIZER / "tokenizer.json").read_text(encoding="utf-8"))
    tree["model"]["merges"] = [" ".join(pair) for pair in tree["model"]["merges"]]
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer/tokenizer.json").write_text(json.dumps(tree), encoding="utf-8")
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer/tokenizer_config.json").write_text(json.dumps(tokens))
    return folder / "tokenizer"


class _Ours:
    def __init__(self, lines: list[bytes]) -> None:
        template = get_template("openchat-3.5")
        self._tokenizer = ChatTokenizer(load_tokenizer(str(TOKENIZER), template), template)
        self._source = SourceConfig(name="chats", path="lines.jsonl")
        self._data = DataConfig(prepared_dir="none", sources=(self._source,))
        self._records = [Record(number=n, row=line) for n, line in enumerate(lines, 1)]

    def run(self, part: slice) -> tuple[float, list[list[int]]]:
        """Seconds, and the ids of every chat."""
        records = self._records[part]
        began = time.perf_counter()
        seen: dict[bytes, int] = {}
        batches = []
        for i in range(0, len(records), CHUNK):
            chunk = build_items(
                records[i : i + CHUNK],
                self._source,
                self._data,
                source_id=0,
                tokenizer=self._tokenizer,
                max_length=8192,
            )
            batches.append(settle(chunk, seen, drop_duplicates=False)[0])
        seconds = time.perf_counter() - began
        return seconds, [row for batch in batches for row in batch.column("input_ids").to_pylist()]


if __name__ == "__main__":
    main()
