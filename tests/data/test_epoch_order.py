"""What an epoch trains, and that its sources come evenly mixed."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ochat.data.epoch_order import epoch_items, interleaved

SOURCES = np.repeat([0, 1, 2], [10, 7, 1])


def items(repeat, epoch, seed=0, sources=SOURCES):
    return epoch_items(sources, repeat, seed=seed, epoch=epoch)


def test_without_repeats_an_epoch_is_every_item_once():
    assert items([1, 1, 1], epoch=3).tolist() == list(range(18))


def test_a_whole_number_repeats_every_item_as_often():
    counts = np.bincount(items([3, 1, 2], epoch=1), minlength=18)

    assert counts.tolist() == [3] * 10 + [1] * 7 + [2]


def test_a_fraction_rotates_so_that_consecutive_epochs_cover_all():
    epochs = [items([0.5, 1, 1], epoch) for epoch in range(2)]
    halves = [set(epoch[epoch < 10].tolist()) for epoch in epochs]

    assert [len(half) for half in halves] == [5, 5]
    assert halves[0] | halves[1] == set(range(10))
    assert halves[0] & halves[1] == set()


@settings(deadline=None)
@given(st.integers(1, 40), st.floats(0.05, 4), st.integers(1, 12), st.integers(0, 5))
def test_after_any_number_of_epochs_no_item_is_ahead_by_more_than_one(num_items, times, num_epochs, seed):
    sources = np.zeros(num_items, np.int32)
    trained = np.concatenate([items([times], epoch, seed, sources) for epoch in range(num_epochs)])
    counts = np.bincount(trained, minlength=num_items)

    assert counts.max() - counts.min() <= 1
    assert counts.sum() == round(num_epochs * times * num_items)


def test_another_seed_takes_another_part():
    assert set(items([0.5, 1, 1], 0, seed=1)) != set(items([0.5, 1, 1], 0, seed=2))
    assert set(items([0.5, 1, 1], 0, seed=1)) == set(items([0.5, 1, 1], 0, seed=1))


def test_sources_of_one_size_do_not_take_the_same_part():
    """Files that are parallel line by line would always meet."""
    half = items([0.5, 0.5], 0, sources=np.repeat([0, 1], 20))

    assert {item % 20 for item in half[half < 20]} != {item % 20 for item in half[half >= 20]}


def test_a_source_without_items_repeats_nothing():
    assert items([1, 2], epoch=0, sources=np.zeros(3, np.int32)).tolist() in [[a, b, c] for a in range(3)
        for b in range(3) for c in range(3) if len({a, b, c}) == 3]  # fmt: skip


def mixed(num=(600, 6400), seed=0):
    rng = np.random.default_rng(seed)
    sources = np.repeat([0, 1], num)
    supervised = rng.lognormal(6, 1, sum(num)).astype(np.int64) + 1
    return sources, supervised, rng


def test_the_order_is_a_permutation_and_another_one_each_time():
    sources, supervised, rng = mixed()
    first, second = interleaved(sources, supervised, rng), interleaved(sources, supervised, rng)

    assert sorted(first.tolist()) == list(range(7000))
    assert first.tolist() != second.tolist()


def test_each_sources_share_of_the_tokens_is_the_same_all_along():
    sources, supervised, rng = mixed()

    def furthest(order):
        so_far = np.cumsum(np.where(sources[order] == 0, supervised[order], 0)) / supervised[sources == 0].sum()
        return np.abs(so_far - np.cumsum(supervised[order]) / supervised.sum()).max()

    # Two items of the rarer source, at the most, against the walk of a plain shuffle.
    assert (
        furthest(interleaved(sources, supervised, rng))
        < 2 * supervised[sources == 0].max() / supervised[sources == 0].sum()
    )
    assert furthest(rng.permutation(7000)) > 0.02


def test_within_a_source_the_order_is_uniform():
    """The mean place of every item over many epochs is the middle."""
    sources, supervised = np.repeat([0, 1], [5, 15]), np.arange(1, 21)
    places = np.zeros(20)
    rng = np.random.default_rng(0)
    for _ in range(2000):
        places[interleaved(sources, supervised, rng)] += np.arange(20)

    assert places / 2000 == pytest.approx(np.full(20, 9.5), abs=0.7)


def test_a_source_of_one_item_comes_anywhere():
    sources, supervised = np.repeat([0, 1], [1, 99]), np.ones(100, np.int64)
    rng = np.random.default_rng(0)
    places = [int(np.flatnonzero(interleaved(sources, supervised, rng) == 0)[0]) for _ in range(400)]

    assert np.histogram(places, bins=4, range=(0, 100))[0] == pytest.approx([100] * 4, abs=35)
