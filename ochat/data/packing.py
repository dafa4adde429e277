"""Which conversations share a row, and which rows make a step: a pure function of lengths, sources and a seed.

No rank and no world size in here: 1, 2 and 8 GPUs see the same steps.

    lengths 5 3 2 4, rows of 8 tokens:   row 0 |5 5 5 5 5 3 3 3|   row 1 |4 4 4 4 2 2 . .|
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ochat.data.epoch_order import interleaved
from ochat.data.packer import pack
from ochat.errors import DataError

# The length at which a 7-8B model's attention costs as much as all the rest of it: parameters / (layers x hidden).
ATTENTION_LENGTH = 57_000


class Rows(Sequence[NDArray[np.int64]]):
    """Rows of items, kept as one flat array: a million small ones would be slow to make and large to hold."""

    def __init__(self, items: NDArray[np.int64], ends: NDArray[np.int64]) -> None:
        self.items, self.ends = items, ends

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: int) -> NDArray[np.int64]: ...
    @overload
    def __getitem__(self, index: slice) -> list[NDArray[np.int64]]: ...
    def __getitem__(self, index: int | slice) -> NDArray[np.int64] | list[NDArray[np.int64]]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        return self.items[self.ends[index - 1] if index else 0 : self.ends[index]]

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        return iter(np.split(self.items, self.ends[:-1])) if len(self) else iter(())


@dataclass(frozen=True, slots=True, kw_only=True)
class PackingPlan:
    """The rows of an epoch.

    rows      per row, the items in it; `rows_per_step` make a step, in the last step some may be empty
    num_rows  those that are not
    fill      tokens of all items / tokens the `num_rows` rows could hold
    """

    rows: Rows
    rows_per_step: int
    row_tokens: int
    num_rows: int
    fill: float

    @property
    def num_steps(self) -> int:
        return len(self.rows) // self.rows_per_step

    def step(self, index: int) -> list[NDArray[np.int64]]:
        """The rows of a step."""
        return self.rows[index * self.rows_per_step : (index + 1) * self.rows_per_step]

    def digest(self) -> str:
        """A hash of the whole plan: equal plans feed equal steps."""
        state = hashlib.sha256(f"{self.rows_per_step} {self.row_tokens}".encode())
        state.update(self.rows.items.tobytes())
        state.update(self.rows.ends.tobytes())
        return state.hexdigest()


def plan(
    lengths: ArrayLike,
    costs: ArrayLike,
    source_ids: ArrayLike,
    row_tokens: int,
    rows_per_step: int,
    seed: int,
    epoch: int,
    *,
    supervised: ArrayLike | None = None,
) -> PackingPlan:
    """Pack every item of an epoch, each exactly once, none cut.

    lengths     tokens of each item [N]
    costs       compute of each item [N], in tokens: see `compute_costs`; evened out over the rows of a step
    source_ids  of each item [N], from 0
    row_tokens  capacity of a row
    supervised  tokens of each item [N] by which sources are mixed alike in every step; None: all of its tokens

    The order of the items is random, another one every epoch, and the same on every machine. See packer.py for how
    rows are filled. Raises DataError for an item longer than a row, and for no items at all.
    """
    sizes, sources = np.asarray(lengths), np.asarray(source_ids)
    if len(sizes) == 0:
        raise DataError(
            f"nothing to train on: epoch {epoch} has no items. "
            f"See the counts of `ochat prepare`; if it kept some, raise data.sources.*.repeat."
        )
    if sizes.max() > row_tokens or sizes.min() < 1:
        item = int(sizes.argmax()) if sizes.max() > row_tokens else int(sizes.argmin())
        raise DataError(
            f"item {item} has {int(sizes[item])} tokens, a row holds 1 to {row_tokens}. "
            f"Raise batch.micro_batch_tokens, or lower model.max_length and prepare again."
        )
    rng = np.random.default_rng([seed, epoch])
    mixed_by = sizes if supervised is None else np.asarray(supervised)
    items, ends = pack(
        interleaved(sources, mixed_by, rng),
        sizes,
        np.asarray(costs, dtype=np.float64),
        sources,
        mixed_by,
        row_tokens=row_tokens,
        rows_per_step=rows_per_step,
        seed=int(rng.integers(2**62)),
    )
    num_rows = len(ends)
    empty = -num_rows % rows_per_step
    return PackingPlan(
        rows=Rows(items, np.concatenate([ends, np.full(empty, len(items))])),
        rows_per_step=rows_per_step,
        row_tokens=row_tokens,
        num_rows=num_rows,
        fill=float(sizes.sum(dtype=np.int64) / (num_rows * row_tokens)),
    )


def compute_costs(lengths: NDArray[np.integer]) -> NDArray[np.float64]:
    """What an item [N] costs to train, in tokens of a model without attention: tokens + tokens^2 / 57,000."""
    sizes = lengths.astype(np.float64)
    return sizes + sizes**2 / ATTENTION_LENGTH
