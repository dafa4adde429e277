"""Row 2 of the scoreboard: how evenly a step's rows cost, mean / max of tokens + sum len^2 / 57,000.

    python -m scripts.bench.row2_packing_balance

The mean over full steps. No packer can do better than the bound: some row must hold the step's longest conversation.
"""

from scripts.bench.lengths import length_sets, tiled
from scripts.bench.packed import Worth, worth
from scripts.bench.packers import PACKERS, PEERS

LONG_ROWS = (40960, 81920)
ROWS_PER_STEP = (8, 64, 512)
GOAL_LONG = 0.996
GOAL_CHAT = 0.945  # at 8192 x 8
GOAL_HEAVY = 0.99  # at 8192 x 8, of the bound


def main() -> None:
    chat = _measure("lognormal_chat", 8192, 8)["ours"].balance
    heavy = _measure("heavy_tail", 8192, 8)["ours"].of_bound
    cells = [(name, tokens, rows) for name in length_sets() for tokens in LONG_ROWS for rows in ROWS_PER_STEP]
    measured = [_measure(*cell) for cell in cells]
    worst = {side: min(cell[side].balance for cell in measured if side in cell) for side in PACKERS}
    peer = max(PEERS, key=lambda side: worst[side])
    missed = [cell for cell, sides in zip(cells, measured, strict=True) if sides["ours"].balance < GOAL_LONG]
    print("  worst at >= 40960: " + ", ".join(f"{side} {100 * value:.2f} %" for side, value in worst.items()))
    print("  below the goal: " + (", ".join(f"{name} {tokens} x {rows}" for name, tokens, rows in missed) or "none"))
    print(
        f"row 2: ours {100 * worst['ours']:.2f} % (8192 x 8: chat {100 * chat:.2f} %, heavy tail {100 * heavy:.2f} % "
        f"of the bound), peer {100 * worst[peer]:.2f} % ({peer}), ratio {worst['ours'] / worst[peer]:.3f}, "
        f"goal {100 * GOAL_LONG:.1f} % ({100 * GOAL_CHAT:.1f} %, {100 * GOAL_HEAVY:.0f} % of the bound)"
    )


def _measure(name: str, row_tokens: int, rows_per_step: int) -> dict[str, Worth]:
    """Each packer's worth in a cell, printed; without those that cannot pack so many."""
    lengths = tiled(length_sets()[name], row_tokens * rows_per_step)
    packed = {side: pack(lengths, row_tokens, rows_per_step, 0) for side, pack in PACKERS.items()}
    measured = {side: worth(p, lengths, row_tokens, rows_per_step) for side, p in packed.items() if p is not None}
    mine = measured["ours"]
    sides = " | ".join(
        f"{side} {100 * measured[side].balance:.2f} %" if side in measured else f"{side} -" for side in PACKERS
    )
    print(
        f"  {name:14} {row_tokens:5} x {rows_per_step:3}: {sides} | bound {100 * mine.bound:.2f} %, "
        f"ours {100 * mine.of_bound:.2f} % of it",
        flush=True,
    )
    return measured


if __name__ == "__main__":
    main()
