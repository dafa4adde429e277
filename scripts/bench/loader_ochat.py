"""Our side of row 7: the loader over a prepared dataset, timed.

python loader_ochat.py FOLDER ROW_TOKENS      FOLDER/prepared is the dataset
stdin   a line: make one batch
stdout  first {"open_s": s, "memory_mib": m}, then {"seconds": s, "num_tokens": n} for each batch
"""

import sys
import time
from pathlib import Path

import torch

from ochat.config import Config
from ochat.data.loader import Loader
from ochat.data.store import TRAIN_SPLIT, PreparedSplit
from scripts.bench.loader_openchat import anonymous_mib, answer


def main(folder: Path, row_tokens: int) -> None:
    torch.set_num_threads(1)
    config = Config.model_validate(
        {
            "run": {"name": "bench"},
            "model": {"name_or_path": "none", "template": "openchat-3.5", "max_length": 8192},
            "data": {"prepared_dir": str(folder), "sources": ({"name": "chats", "path": "none", "weight": 0.5},)},
            "batch": {"micro_batch_tokens": row_tokens, "global_batch_tokens": row_tokens},
        }
    )
    before, began = anonymous_mib(), time.perf_counter()
    loader = Loader(config, PreparedSplit(folder / "prepared" / TRAIN_SPLIT))
    answer({"open_s": time.perf_counter() - began, "memory_mib": anonymous_mib() - before})
    loader.epoch_plan(0)
    steps = iter(loader)
    for _ in sys.stdin:
        began = time.perf_counter()
        step = next(steps)
        answer({"seconds": time.perf_counter() - began, "num_tokens": step.num_tokens})


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
