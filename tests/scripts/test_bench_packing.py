"""What the packing benches measure, on plans small enough to check by hand."""

import numpy as np
import pytest

from scripts.bench.class_mix import mix_spread
from scripts.bench.lengths import tiled
from scripts.bench.packed import Packed, balance_bound, displacement, packed_rows, worth

LENGTHS = np.array([6, 4, 5, 5, 3, 7, 2], np.int32)


def packed(*rows: list[int], stream: list[int] | None = None) -> Packed:
    return packed_rows(rows, stream or [0, 1, 2, 3, 4, 5, 6], LENGTHS)


def test_fill_leaves_the_last_step_out():
    # rows of 10 tokens that hold 10, 9 | 5, 5: with 2 a step the first two count, with 1 a step the first three
    plan = packed([0, 1], [5, 6], [2], [3])
    assert worth(plan, LENGTHS, 10, 2).fill == pytest.approx(19 / 20)
    assert worth(plan, LENGTHS, 10, 1).fill == pytest.approx(24 / 30)


def test_dropped_and_cut_conversations_are_counted():
    whole, short = packed([0, 1], [2, 3], [4, 5], [6]), packed([0, 1], [2, 3], [4, 5])
    assert (worth(whole, LENGTHS, 10, 1).dropped, worth(short, LENGTHS, 10, 1).dropped) == (0, 1)
    kept = np.array([6, 4, 5, 5, 3, 6, 2])
    cut = packed_rows([[0, 1], [2, 3], [4, 5], [6]], range(7), LENGTHS, kept)
    assert (worth(whole, LENGTHS, 10, 1).cut, worth(cut, LENGTHS, 10, 1).cut) == (0, 1)


def test_a_row_above_its_capacity_or_a_conversation_twice_is_no_plan():
    with pytest.raises(AssertionError, match="more than it can"):
        worth(packed([0, 2], [1]), LENGTHS, 10, 1)
    with pytest.raises(AssertionError, match="twice"):
        worth(packed([0, 1], [1, 2], [3]), LENGTHS, 10, 1)


def test_displacement_is_the_step_minus_the_tokens_before_in_steps():
    # 20 tokens a step; the stream 6 5 0 1 2 3 4 has 0 2 9 15 19 24 29 tokens before each of them
    moved = displacement(packed([0, 1], [2, 3], [4, 5], [6], stream=[6, 5, 0, 1, 2, 3, 4]), LENGTHS, 10, 2)
    assert moved == pytest.approx(np.array([0, 0, 0, 0, 1, 1, 1]) - np.array([9, 15, 19, 24, 29, 2, 0]) / 20)


def test_correlation_sees_long_conversations_first():
    lengths = np.random.default_rng(0).integers(1, 11, 500).astype(np.int32)
    in_order, longest_first = np.arange(500), np.argsort(-lengths, kind="stable")
    kept = packed_rows([[i] for i in in_order], in_order, lengths)
    sorted_ = packed_rows([[i] for i in longest_first], in_order, lengths)
    # One conversation a row: steps run ahead of the tokens, evenly, whatever the length.
    assert abs(worth(kept, lengths, 10, 8).correlation) < 0.1
    assert worth(sorted_, lengths, 10, 8).correlation < -0.5


def test_no_step_is_more_even_than_its_longest_conversation_lets_it_be():
    # a row of 8,192 tokens that are one conversation, beside one of many short ones that cost nothing extra
    cost = np.array([8192 + 8192**2 / 57_000, 8192.0])
    longest = np.array([8192])
    assert balance_bound(cost.mean(keepdims=True), longest, 8192) == pytest.approx(cost.mean() / cost.max())
    assert balance_bound(cost.mean(keepdims=True), np.array([2]), 8192) == pytest.approx(1)


def test_spread_is_over_the_share_of_full_steps_and_skips_the_dropped():
    steps, expert = np.array([0, 0, 1, 1, -1, 2]), np.array([1, 0, 1, 0, 1, 1], np.int32)
    weight = np.array([1.0, 1.0, 1.0, 3.0, 100.0, 5.0])  # expert shares: 1/2, 1/4, and the last step's
    assert mix_spread(steps, weight, expert) == pytest.approx(np.std([0.5, 0.25]))
    assert mix_spread(steps, np.array([1.0, 1.0, 2.0, 2.0, 100.0, 5.0]), expert) == pytest.approx(0)


def test_lengths_are_repeated_until_they_fill_twenty_steps():
    enough = tiled(LENGTHS, 20)
    assert enough.sum() > 20 * 20
    assert len(enough) % len(LENGTHS) == 0
    assert len(tiled(np.full(1000, 5, np.int32), 20)) == 1000
