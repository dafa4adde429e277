"""What a second process gains: `ochat prepare` with data.num_proc 1 and 2 on the same chats, taking turns.

    python -m scripts.bench.prepare_processes [--chats N] [--repeats R]

Starting the command is not counted: what one chat takes is taken off. The datasets must be the same, or there is no
result. Whatever else runs on the machine takes from the second process, so the load is printed, and beside the ratio of
wall times that of core times: what the second process costs in work, which no load changes much.
"""

import argparse
import hashlib
import shutil
import statistics
import tempfile
from pathlib import Path

from scripts.bench.prepare_memory import Measured, load, measure, write_chats, write_config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chats", type=int, default=60_000)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    ratios, costs = [], []
    with tempfile.TemporaryDirectory() as name:
        few, many = Path(name) / "few", Path(name) / "many"
        configs = {folder: _configured(folder, n) for folder, n in ((few, 1), (many, arguments.chats))}
        for _ in range(arguments.repeats):
            before, datasets = load(), set()
            wall, core = {}, {}
            for num_proc in (1, 2):
                start, whole = (_prepare(configs[folder], folder, num_proc) for folder in (few, many))
                wall[num_proc] = whole.seconds - start.seconds
                core[num_proc] = whole.core_seconds - start.core_seconds
                datasets.add(_digest(many))
            assert len(datasets) == 1, "the datasets differ: no result"
            ratios.append(wall[1] / wall[2])
            costs.append(core[2] / core[1])
            print(
                f"  1 process {wall[1]:.1f} s ({core[1]:.1f} s on a core), 2 processes {wall[2]:.1f} s "
                f"({core[2]:.1f} s on cores), ratio {ratios[-1]:.2f}, load {before} before, {load()} after"
            )
    print(
        f"processes: 2 are {statistics.median(ratios):.2f} times as fast as 1 and cost {statistics.median(costs):.2f} "
        f"times the work, datasets identical, goal 1.60"
    )


def _configured(folder: Path, num_chats: int) -> Path:
    folder.mkdir()
    write_chats(folder / "chats.jsonl", num_chats)
    return write_config(folder, folder / "chats.jsonl")


def _prepare(config: Path, folder: Path, num_proc: int) -> Measured:
    shutil.rmtree(folder / "prepared", ignore_errors=True)
    return measure("prepare", config, f"data.num_proc={num_proc}")


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted((folder / "prepared/train").glob("*.arrow")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


if __name__ == "__main__":
    main()
