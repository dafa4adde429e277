"""Any packer's rows, and what they are worth: fill, balance of cost, and how far the random order was kept."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ochat.data.packing import ATTENTION_LENGTH, compute_costs


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """Rows of an epoch in the order they are trained.

    items    conversations, row by row [n]; fewer than there are if the packer dropped some
    tokens   of each that are in the row [n]; fewer than it has if the packer cut it
    ends     where each row ends in `items` [rows]
    stream   all conversations in the random order that the packer was given [N]
    """

    items: NDArray[np.int64]
    tokens: NDArray[np.int64]
    ends: NDArray[np.int64]
    stream: NDArray[np.int64]

    def steps(self, rows_per_step: int) -> NDArray[np.int64]:
        """The step of each conversation [N]; -1 for one that was dropped."""
        step = np.full(len(self.stream), -1)
        row = np.repeat(np.arange(len(self.ends)), np.diff(self.ends, prepend=0))
        step[self.items] = row // rows_per_step
        return step


@dataclass(frozen=True, slots=True, kw_only=True)
class Worth:
    """num_steps     full ones, the last step aside; fill, balance and of_bound are means over these
    fill          tokens / tokens that the rows could hold
    balance       mean cost of a step's rows / its highest
    bound         what balance can be at most while some row must hold the step's longest conversation
    of_bound      balance / bound
    dropped, cut  conversations
    correlation   of a conversation's length and its displacement in steps
    """

    num_steps: int
    fill: float
    balance: float
    bound: float
    of_bound: float
    dropped: int
    cut: int
    correlation: float


def packed_rows(
    rows: Sequence[Any], stream: ArrayLike, lengths: NDArray[np.int32], tokens: NDArray[np.int64] | None = None
) -> Packed:
    """Rows of conversations, none empty, as one flat array; `tokens` only of a packer that cuts."""
    items = np.concatenate([np.asarray(row, np.int64) for row in rows])
    return Packed(
        items=items,
        tokens=lengths[items].astype(np.int64) if tokens is None else tokens,
        ends=np.cumsum([len(row) for row in rows]),
        stream=np.asarray(stream, np.int64),
    )


def worth(packed: Packed, lengths: NDArray[np.int32], row_tokens: int, rows_per_step: int) -> Worth:
    """What a packer's rows of these conversations [N] are worth."""
    starts = np.concatenate([[0], packed.ends[:-1]])
    tokens = np.add.reduceat(packed.tokens, starts)
    assert tokens.max() <= row_tokens, "a row holds more than it can"
    num_steps = (len(packed.ends) - 1) // rows_per_step
    rows = slice(num_steps * rows_per_step)
    cost = np.add.reduceat(compute_costs(packed.tokens), starts)[rows].reshape(num_steps, rows_per_step)
    longest = np.maximum.reduceat(packed.tokens, starts)[rows].reshape(num_steps, rows_per_step).max(1)
    balance = cost.mean(1) / cost.max(1)
    bound = balance_bound(cost.mean(1), longest, row_tokens)
    held = np.unique(packed.items)
    assert len(held) == len(packed.items), "a conversation is trained twice"
    return Worth(
        num_steps=num_steps,
        fill=float(tokens[rows].sum() / (num_steps * rows_per_step * row_tokens)),
        balance=float(balance.mean()),
        bound=float(bound.mean()),
        of_bound=float((balance / bound).mean()),
        dropped=len(lengths) - len(held),
        cut=int((packed.tokens < lengths[packed.items]).sum()),
        correlation=float(
            np.corrcoef(lengths[held], displacement(packed, lengths, row_tokens, rows_per_step)[held])[0, 1]
        ),
    )


def balance_bound(mean_cost: NDArray[Any], longest: NDArray[np.int64], row_tokens: int) -> NDArray[np.float64]:
    """The highest mean / max of a step: its longest conversation's row costs a full row's tokens and that square."""
    return mean_cost / np.maximum(mean_cost, row_tokens + longest.astype(np.float64) ** 2 / ATTENTION_LENGTH)


def displacement(
    packed: Packed, lengths: NDArray[np.int32], row_tokens: int, rows_per_step: int
) -> NDArray[np.float64]:
    """Of each conversation [N]: its step - tokens before it in the stream / tokens a step."""
    before = np.empty(len(lengths))
    in_order = lengths[packed.stream].astype(np.int64)
    before[packed.stream] = np.cumsum(in_order) - in_order
    return packed.steps(rows_per_step) - before / (row_tokens * rows_per_step)
