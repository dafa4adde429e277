"""Row 1 of the scoreboard: how full rows are, what is dropped or cut, and whether the random order is kept.

    python -m scripts.bench.row1_packing_fill [--seed N]

Every cell is a set of lengths x tokens a row x rows a step, each packer once; lengths too few for 20 full steps are
repeated. The last step counts for neither side. r is the correlation of length and displacement.
"""

import argparse

import numpy as np

from scripts.bench.lengths import length_sets, real_lengths, tiled
from scripts.bench.packed import Worth, worth
from scripts.bench.packers import PACKERS, PEERS

ROW_TOKENS = (8192, 40960, 81920)
ROWS_PER_STEP = (1, 8, 64, 512)
GOAL = 0.999
MOST_CORRELATION = 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    seed = parser.parse_args().seed
    cells = [(name, tokens, rows) for name in length_sets() for tokens in ROW_TOKENS for rows in ROWS_PER_STEP]
    measured = [_measure(length_sets()[name], name, tokens, rows, seed) for name, tokens, rows in cells]
    print("  real data sets, for information:")
    for name, lengths in real_lengths().items():
        for row_tokens in (8192, 40960):
            _measure(lengths, name, row_tokens, 8, seed)
    ours = [cell["ours"] for cell in measured]
    worst = {side: min(cell[side].fill for cell in measured if side in cell) for side in PACKERS}
    peer = max(PEERS, key=lambda side: worst[side])
    print("  worst fill: " + ", ".join(f"{side} {100 * value:.2f} %" for side, value in worst.items()))
    print(
        f"row 1: ours {100 * worst['ours']:.3f} % ({sum(w.dropped for w in ours)} dropped, {sum(w.cut for w in ours)} "
        f"cut, |r| <= {max(abs(w.correlation) for w in ours):.3f}), peer {100 * worst[peer]:.3f} % ({peer}), "
        f"ratio {worst['ours'] / worst[peer]:.4f}, goal {100 * GOAL:.1f} %, 0, 0, < {MOST_CORRELATION}"
    )


def _measure(lengths: np.ndarray, name: str, row_tokens: int, rows_per_step: int, seed: int) -> dict[str, Worth]:
    """Each packer's worth in a cell, printed; without those that cannot pack so many."""
    enough = tiled(lengths, row_tokens * rows_per_step)
    measured = {}
    line = f"  {name:14} {row_tokens:5} x {rows_per_step:3}, {len(enough):7} sequences"
    for side, pack in PACKERS.items():
        packed = pack(enough, row_tokens, rows_per_step, seed)
        if packed is None:
            line += f" | {side} -"
            continue
        w = measured[side] = worth(packed, enough, row_tokens, rows_per_step)
        line += f" | {side} {100 * w.fill:.3f} % r {w.correlation:+.3f}"
        line += f" dropped {w.dropped}" if w.dropped else ""
        line += f" cut {w.cut}" if w.cut else ""
    print(line, flush=True)
    return measured


if __name__ == "__main__":
    main()
