"""How alike steps are in their mix of classes: the spread over steps of the expert share of the weight.

    python -m scripts.bench.class_mix [--seeds N]

6,000 expert conversations at weight 1.0 and 64,000 others at 0.1; 40 to 95 % of each one's tokens are supervised. The
spread is the standard deviation over all steps but the last, the mean of several seeds.
"""

import argparse
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scripts.bench.lengths import length_sets
from scripts.bench.packed import worth
from scripts.bench.packers import original, ours

NUM_EXPERT, NUM_OTHER = 6_000, 64_000
OTHER_WEIGHT = 0.1
ROWS_PER_STEP = 8
GOAL_RATIO, GOAL_FILL = 0.5, 0.999


@dataclass(frozen=True, slots=True, kw_only=True)
class Chats:
    """Per conversation [N]: tokens, of these supervised, 1 for an expert's, and weight of all its tokens."""

    lengths: NDArray[np.int32]
    supervised: NDArray[np.int32]
    expert: NDArray[np.int32]
    weight: NDArray[np.float64]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    seeds = parser.parse_args().seeds
    at_8192 = []
    for name in ("lognormal_chat", "heavy_tail"):
        for row_tokens in (8192, 40960):
            figures = np.mean([_measure(_chats(name, seed), row_tokens, seed) for seed in range(seeds)], axis=0)
            mixed, unpacked, unmixed, peer, fill = figures
            print(
                f"  {name:14} {row_tokens:5} x {ROWS_PER_STEP}: spread ours {mixed:.4f} | shuffle {unpacked:.4f}, "
                f"ratio {mixed / unpacked:.3f} | ours without sources {unmixed:.4f}, ratio {mixed / unmixed:.3f} | "
                f"original {peer:.4f}, ratio {mixed / peer:.3f} | fill ours {100 * fill:.3f} %",
                flush=True,
            )
            if row_tokens == 8192:
                at_8192.append((mixed / unpacked, mixed, unpacked, fill))
    ratio, mixed, unpacked, _ = max(at_8192)
    print(
        f"class mix: ours {mixed:.4f} (fill {100 * min(fill for *_, fill in at_8192):.3f} %), peer {unpacked:.4f} "
        f"(plain shuffle), ratio {ratio:.3f}, goal {GOAL_RATIO:.2f} at fill {100 * GOAL_FILL:.1f} %"
    )


def mix_spread(steps: NDArray[np.int64], weight: NDArray[np.float64], expert: NDArray[np.int32]) -> float:
    """Standard deviation over steps, the last aside, of the expert share of the weight; step -1 is none."""
    trained = steps >= 0
    steps, weight, expert = steps[trained], weight[trained], expert[trained]
    return float((np.bincount(steps, weight * expert) / np.bincount(steps, weight))[:-1].std())


def _chats(name: str, seed: int) -> Chats:
    rng = np.random.default_rng(seed)
    lengths = rng.choice(length_sets()[name], NUM_EXPERT + NUM_OTHER)
    supervised = (lengths * rng.uniform(0.4, 0.95, len(lengths))).astype(np.int32)
    expert = (np.arange(len(lengths)) < NUM_EXPERT).astype(np.int32)
    return Chats(
        lengths=lengths,
        supervised=supervised,
        expert=expert,
        weight=np.where(expert, 1.0, OTHER_WEIGHT) * supervised.astype(np.float64),
    )


def _measure(chats: Chats, row_tokens: int, seed: int) -> tuple[float, ...]:
    """Spread of ours, of a shuffle cut into steps, of ours without sources and of the original; our fill."""
    lengths = chats.lengths
    mixed = ours(lengths, row_tokens, ROWS_PER_STEP, seed, sources=chats.expert, supervised=chats.supervised)
    unmixed = ours(lengths, row_tokens, ROWS_PER_STEP, seed)
    peer = original(lengths, row_tokens, ROWS_PER_STEP, seed)
    order = np.random.default_rng(seed).permutation(len(lengths))
    shuffled = np.empty(len(lengths), np.int64)
    shuffled[order] = (np.cumsum(lengths[order], dtype=np.int64) - 1) // (row_tokens * ROWS_PER_STEP)
    of_packers = [packed.steps(ROWS_PER_STEP) for packed in (mixed, unmixed, peer)]
    spreads = [mix_spread(steps, chats.weight, chats.expert) for steps in (of_packers[0], shuffled, *of_packers[1:])]
    return *spreads, worth(mixed, lengths, row_tokens, ROWS_PER_STEP).fill


if __name__ == "__main__":
    main()
