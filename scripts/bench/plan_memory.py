"""Memory of a process that plans 10M conversations.

python -m scripts.bench.plan_memory
"""

import resource
from pathlib import Path

import numpy as np

from ochat.data.packing import compute_costs, plan
from scripts.bench.lengths import length_sets

COPIES = 500  # of 20,000 lengths
GOAL_MB = 1000


def main() -> None:
    chats = length_sets()["lognormal_chat"]
    _plan(chats)  # compiles
    before, peak_before = _resident_mb(), _peak_mb()
    lengths = np.tile(chats, COPIES)
    num_rows = _plan(lengths)
    peak = _peak_mb()
    assert peak > peak_before, "the plan left no mark on the peak"
    print(
        f"  {len(lengths):,} conversations, {num_rows:,} rows; before the lengths {before:.0f} MB (libraries, compiler)"
    )
    print(f"  lengths, costs, sources and plan at their peak: {peak - before:.0f} MB, in all {peak:.0f} MB")
    print(f"plan memory: ours {peak:.0f} MB, goal {GOAL_MB} MB, ratio {peak / GOAL_MB:.2f}")


def _plan(lengths: np.ndarray) -> int:
    return plan(lengths, compute_costs(lengths), np.zeros(len(lengths), np.int32), 8192, 8, 0, 0).num_rows


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def _resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


if __name__ == "__main__":
    main()
