"""The steps a rank gets: who computes what, with which weights, over which denominator."""

import numpy as np
import pytest

from ochat.data.loader import Loader
from ochat.data.prepare import prepare
from ochat.data.replies import per_message_weights
from ochat.data.store import PreparedSplit
from ochat.errors import ConfigError
from tests.experiment import make_experiment


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experiment")
    prepare(make_experiment(folder))
    return folder


def loader(folder, *overrides, rank=0, world_size=1):
    config = make_experiment(folder, *overrides)
    return Loader(config, PreparedSplit(folder / "prepared/train"), rank=rank, world_size=world_size)


def weight_by_source(steps):
    totals = np.zeros(2)
    for batch in (b for step in steps for b in step.batches):
        source = np.repeat(batch.source_ids.numpy(), np.diff(batch.cu_seqlens.numpy()))
        totals += np.bincount(source, batch.loss_weights.numpy(), minlength=2)
    return totals


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_together_see_the_same_rows_in_the_same_steps(folder, world_size):
    alone = [step.batches for step in loader(folder).epoch(0)]
    ranks = [list(loader(folder, rank=r, world_size=world_size).epoch(0)) for r in range(world_size)]

    for index, batches in enumerate(alone):
        together = [batch for rank in ranks for batch in rank[index].batches]
        assert [b.input_ids.tolist() for b in together] == [b.input_ids.tolist() for b in batches]


def test_every_rank_has_as_many_micro_batches_also_in_the_last_step(folder):
    ranks = [list(loader(folder, rank=r, world_size=4).epoch(0)) for r in range(4)]

    assert len(loader(folder).plan(0).rows) % 4  # the last step is a partial one
    assert {len(step.batches) for steps in ranks for step in steps} == {1}
    assert len({len(steps) for steps in ranks}) == 1


def test_the_source_weight_multiplies_its_tokens_and_no_others(folder):
    low = weight_by_source(loader(folder).epoch(0))
    high = weight_by_source(loader(folder, "data.sources.1.weight=0.2").epoch(0))

    assert high[1] == pytest.approx(2 * low[1], rel=1e-6)
    assert high[0] == low[0]


def test_epoch_denominators_add_up_to_the_epochs_weight(folder):
    """A partial last step counts as its fraction: D x (rows / rows per step), summed, is all the weight there is."""
    steps = list(loader(folder).epoch(0))
    rows = [sum(b.loss_weights.sum() > 0 for b in step.batches) for step in steps]

    assert len({step.loss_denominator for step in steps}) == 1
    total = sum(step.loss_denominator * int(n) / 4 for step, n in zip(steps, rows, strict=True))
    assert total == pytest.approx(weight_by_source(steps).sum(), rel=1e-6)


def test_step_denominators_are_each_steps_own_weight(folder):
    for step in loader(folder, "loss.normalization=step").epoch(0):
        assert step.loss_denominator == pytest.approx(weight_by_source([step]).sum(), rel=1e-6)


def test_message_weighting_counts_each_reply_once(folder):
    made = loader(folder, "loss.weighting=message")
    replies = made._split.column("num_replies")
    source_id = made._split.column("source_id")

    totals = weight_by_source(made.epoch(0))

    assert totals == pytest.approx([replies[source_id == 0].sum(), 0.1 * replies[source_id == 1].sum()], rel=1e-5)


def test_message_weights_divide_each_reply_by_its_length():
    weights = np.array([0, 0, 1, 1, 0, 0.5, 0.5, 0.5, 0.5, 0, 2], np.float32)

    assert per_message_weights(weights).tolist() == [0, 0, 0.5, 0.5, 0, 0.125, 0.125, 0.125, 0.125, 0, 2]


def test_starting_at_a_step_gives_the_steps_from_there(folder):
    full, late = list(loader(folder).epoch(1)), list(loader(folder).epoch(1, start=2))

    assert [s.index for s in late] == [s.index for s in full[2:]]
    assert all(
        a.batches[0].input_ids.tolist() == b.batches[0].input_ids.tolist() for a, b in zip(full[2:], late, strict=True)
    )


def test_a_number_of_processes_that_cannot_share_lists_those_that_can(folder):
    with pytest.raises(ConfigError, match=r"4 rows .* which 3 processes cannot share. Use 1, 2, 4 processes"):
        loader(folder, world_size=3)


def test_rewards_become_weights_by_the_exponential(folder):
    rewarded = loader(
        folder, "data.sources.0.weight=null", "data.sources.1.weight=null", "data.sources.0.reward=1.0",
        "data.sources.1.reward=0.0", "loss.beta=0.43429448",
    )  # fmt: skip

    # (1 - 0) / beta = ln 10, as in the paper
    assert weight_by_source(rewarded.epoch(0)) == pytest.approx(weight_by_source(loader(folder).epoch(0)), rel=1e-5)


def test_the_best_source_is_the_one_that_weighs_most_per_item(folder):
    assert loader(folder).best_source() == 0
    assert loader(folder, "data.sources.1.weight=3").best_source() == 1
