"""Row 3 of the scoreboard: seconds to plan 1M conversations, against the original's sampler.

    python -m scripts.bench.row3_packing_time [--repeats N]

Ours is all of `plan`, the peer's all of `generate_batches`, which gives one rank's rows; both compiled before, one
thread, taking turns, every repeat another epoch. With two sources ours also counts supervised tokens and evens out
the mix: for information.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np

from ochat.data.packing import compute_costs, plan
from scripts.bench.lengths import length_sets
from scripts.bench.packers import openchat_sampler

COPIES = 50  # of 20,000 lengths
GOALS = {8: 4.0, 512: 10.0}  # by rows a step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    chats = length_sets()["lognormal_chat"]
    for side in _sides(chats, 8192, 8).values():
        side(0)
    ratios: dict[int, list[float]] = {rows: [] for rows in GOALS}
    for row_tokens in (8192, 40960):
        for rows_per_step in GOALS:
            ratios[rows_per_step].append(_measure(np.tile(chats, COPIES), row_tokens, rows_per_step, repeats))
    ours = ", ".join(f"{min(ratios[rows]):.1f}x at {rows} rows" for rows in GOALS)
    print(
        f"row 3: ours {ours}, peer 1.0x, ratio as ours, goal " + ", ".join(f"{g:.0f}x at {r}" for r, g in GOALS.items())
    )


def _sides(lengths: np.ndarray, row_tokens: int, rows_per_step: int) -> dict[str, Callable[[int], object]]:
    """What plans an epoch, by side."""
    one, costs = np.zeros(len(lengths), np.int32), compute_costs(lengths)
    rng = np.random.default_rng(0)
    two = (rng.random(len(lengths)) < 0.1).astype(np.int32)
    supervised = (lengths * rng.uniform(0.4, 0.95, len(lengths))).astype(np.int32)
    weights = np.ones(len(lengths), np.float32)
    sampler = openchat_sampler().MultipackDistributedSampler(lengths, weights, row_tokens, rows_per_step, 0, 0)
    return {
        "ours": lambda epoch: plan(lengths, costs, one, row_tokens, rows_per_step, 0, epoch),
        "peer": sampler.generate_batches,
        "ours, two sources": lambda epoch: plan(
            lengths, costs, two, row_tokens, rows_per_step, 0, epoch, supervised=supervised
        ),
    }


def _measure(lengths: np.ndarray, row_tokens: int, rows_per_step: int, repeats: int) -> float:
    """How many times faster ours is by medians; all of a cell's times are printed."""
    sides = _sides(lengths, row_tokens, rows_per_step)
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for repeat in range(repeats):
        for side, pack in sides.items():
            began = time.perf_counter()
            pack(repeat)
            seconds[side].append(time.perf_counter() - began)
    median = {side: statistics.median(times) for side, times in seconds.items()}
    print(f"  {row_tokens} x {rows_per_step}, {len(lengths):,} conversations:")
    for side, times in seconds.items():
        print(
            f"    {side}: median {median[side]:.3f} s, least {min(times):.3f} s, "
            f"all {' '.join(f'{t:.3f}' for t in times)}"
        )
    ratio = median["peer"] / median["ours"]
    print(
        f"    ratio {ratio:.2f} by medians, {min(seconds['peer']) / min(seconds['ours']):.2f} by the least", flush=True
    )
    return ratio


if __name__ == "__main__":
    main()
