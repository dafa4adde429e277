"""Which conversations share a row, and which rows make a step: a pure function of lengths and a seed.

No rank and no world size in here: 1, 2 and 8 GPUs see the same steps.

    lengths 5 3 2 4, rows of 8 tokens:   row 0 |5 5 5 5 5 3 3 3|   row 1 |4 4 4 4 2 2 . .|
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ochat.errors import DataError

OPEN_ROWS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class PackingPlan:
    """rows: per row of the epoch, the items in it; `rows_per_step` make a step, the last step may have fewer."""

    rows: tuple[NDArray[np.int64], ...]
    rows_per_step: int
    row_tokens: int
    fill: float

    @property
    def num_steps(self) -> int:
        return -(-len(self.rows) // self.rows_per_step)

    def digest(self) -> str:
        """A hash of the whole plan: equal plans feed equal steps."""
        state = hashlib.sha256(f"{self.rows_per_step} {self.row_tokens}".encode())
        for row in self.rows:
            state.update(len(row).to_bytes(8, "little") + row.tobytes())
        return state.hexdigest()


def plan(
    lengths: Sequence[int] | NDArray[np.integer], *, row_tokens: int, rows_per_step: int, seed: int, epoch: int
) -> PackingPlan:
    """Pack every item of an epoch, each exactly once, none cut.

    lengths     tokens of each item [N]
    row_tokens  capacity of a row

    The items come in a shuffled stream; each goes into the fullest open row that has room. A row is closed when a new
    one is needed and OPEN_ROWS are open, so no item waits long. Raises DataError for an item longer than a row.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if len(sizes) == 0:
        raise DataError("nothing to train on: the prepared dataset has no items. See the counts of `ochat prepare`.")
    if sizes.max() > row_tokens:
        raise DataError(
            f"item {int(sizes.argmax())} has {int(sizes.max())} tokens, a row only {row_tokens}. "
            f"Raise batch.micro_batch_tokens, or lower model.max_length and prepare again."
        )
    order = np.random.default_rng([seed, epoch]).permutation(len(sizes))
    rows = _best_fit(order, sizes, row_tokens)
    return PackingPlan(
        rows=tuple(rows),
        rows_per_step=rows_per_step,
        row_tokens=row_tokens,
        fill=float(sizes.sum() / (len(rows) * row_tokens)),
    )


def _best_fit(order: NDArray[np.int64], sizes: NDArray[np.int64], row_tokens: int) -> list[NDArray[np.int64]]:
    closed: list[list[int]] = []
    open_rows: list[list[int]] = []
    room = np.zeros(0, dtype=np.int64)
    for item in order.tolist():
        fits = np.where(room >= sizes[item], room, row_tokens + 1)
        if len(fits) and fits.min() <= row_tokens:
            best = int(fits.argmin())
            open_rows[best].append(item)
            room[best] -= sizes[item]
            continue
        if len(open_rows) == OPEN_ROWS:
            fullest = int(room.argmin())
            closed.append(open_rows.pop(fullest))
            room = np.delete(room, fullest)
        open_rows.append([item])
        room = np.append(room, row_tokens - sizes[item])
    return [np.array(row, dtype=np.int64) for row in closed + open_rows]
