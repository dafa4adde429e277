"""Our side of row 7: the loader over a prepared dataset, timed.

python loader_ochat.py FOLDER ROW_TOKENS      FOLDER/prepared is the dataset
stdin   a line: make one batch
stdout  first {"open_s": s, "memory_mib": m, "dataset_s": s}, then {"seconds": s, "num_tokens": n} for each batch

open_s is all there is before the first batch, the epoch's plan included, and dataset_s the part of it before that. The
compiled packer is loaded before. Batches are made while one waits, not ahead.
"""

import sys
import time
from pathlib import Path

import torch

from ochat.config import Config
from ochat.data.loader import Loader
from ochat.data.packing import plan
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
    plan([8], [8.0], [0], 8, 1, seed=0, epoch=0)
    before, began = anonymous_mib(), time.perf_counter()
    split = PreparedSplit(folder / "prepared" / TRAIN_SPLIT)
    dataset_s = time.perf_counter() - began
    loader = Loader(config, split)
    open_s = time.perf_counter() - began
    answer({"open_s": open_s, "memory_mib": anonymous_mib() - before, "dataset_s": dataset_s})
    for index, _ in enumerate(sys.stdin):
        began = time.perf_counter()
        step = loader.step(0, index)
        answer({"seconds": time.perf_counter() - began, "num_tokens": step.num_tokens})


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
