"""Every item once an epoch, none cut, no row over its capacity; the same plan for the same seed."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ochat.data.packing import plan
from ochat.errors import DataError

LENGTHS = np.random.default_rng(0).lognormal(5.5, 1.0, 3000).clip(2, 2048).astype(np.int32)


def make(lengths, *, row_tokens=2048, rows_per_step=4, seed=0, epoch=0):
    return plan(lengths, row_tokens=row_tokens, rows_per_step=rows_per_step, seed=seed, epoch=epoch)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=300), st.integers(50, 80), st.integers(1, 7))
def test_every_item_is_in_exactly_one_row_and_no_row_overflows(lengths, row_tokens, rows_per_step):
    made = make(lengths, row_tokens=row_tokens, rows_per_step=rows_per_step)

    assert sorted(np.concatenate(made.rows).tolist()) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= row_tokens for row in made.rows)
    assert made.num_steps == -(-len(made.rows) // rows_per_step)


def test_fill_is_the_share_of_slots_that_hold_a_token():
    assert make([3, 5], row_tokens=8).fill == 1.0
    assert make([5, 5], row_tokens=8).fill == 10 / 16


def test_chat_lengths_fill_their_rows():
    assert make(LENGTHS).fill > 0.97


def test_a_seed_and_an_epoch_fix_the_plan():
    digest = make(LENGTHS, seed=3, epoch=1).digest()

    assert make(LENGTHS, seed=3, epoch=1).digest() == digest
    assert make(LENGTHS, seed=3, epoch=2).digest() != digest
    assert make(LENGTHS, seed=4, epoch=1).digest() != digest


def test_an_item_longer_than_a_row_is_refused_with_the_fix():
    with pytest.raises(DataError, match=r"item 1 has 9 tokens, a row only 8. Raise batch.micro_batch_tokens"):
        make([3, 9], row_tokens=8)


def test_no_items_is_an_error_not_an_empty_run():
    with pytest.raises(DataError, match="nothing to train on"):
        make([])
