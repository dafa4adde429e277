"""Every item once an epoch, none cut, no row over its capacity; full rows, and nobody favoured."""

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ochat.data.packer import pack
from ochat.data.packing import compute_costs, plan
from ochat.errors import DataError
from tests.conftest import ROOT


def chats(num, *, longest=8192, mean_log=6.1, spread=1.0, seed=0):
    return np.random.default_rng(seed).lognormal(mean_log, spread, num).clip(2, longest).astype(np.int32)


def make(lengths, *, row_tokens=2048, rows_per_step=4, seed=0, epoch=0, sources=None, **options):
    lengths = np.asarray(lengths)
    sources = np.zeros(len(lengths), np.int32) if sources is None else sources
    return plan(lengths, compute_costs(lengths), sources, row_tokens, rows_per_step, seed, epoch, **options)


def row_of(made, num_items):
    rows = np.full(num_items, -1)
    for index, row in enumerate(made.rows):
        rows[row] = index
    return rows


small = {
    "lengths": st.lists(st.integers(1, 50), min_size=1, max_size=300),
    "row_tokens": st.integers(50, 120),
    "rows_per_step": st.integers(1, 7),
    "num_sources": st.integers(1, 4),
    "seed": st.integers(0, 2**31),
}


def check_whole(made, lengths):
    """Each item once, no row over its capacity, and only the last step has empty rows."""
    items, ends = made.rows.items, made.rows.ends
    tokens = np.concatenate([[0], np.cumsum(np.asarray(lengths)[items], dtype=np.int64)])
    starts = np.concatenate([[0], ends[:-1]])

    assert sorted(items.tolist()) == list(range(len(lengths)))
    assert (tokens[ends] - tokens[starts]).max() <= made.row_tokens
    assert (ends > starts).tolist() == [True] * made.num_rows + [False] * (len(ends) - made.num_rows)
    assert len(ends) == made.num_steps * made.rows_per_step
    assert made.num_steps == -(-made.num_rows // made.rows_per_step)


@settings(max_examples=300, deadline=None)
@given(**small)
@example(lengths=[50], row_tokens=50, rows_per_step=3, num_sources=1, seed=0)
@example(lengths=[50] * 40, row_tokens=99, rows_per_step=4, num_sources=2, seed=0)
@example(lengths=[1] * 300, row_tokens=50, rows_per_step=1, num_sources=1, seed=0)
def test_every_item_is_in_exactly_one_row_and_no_row_overflows(lengths, row_tokens, rows_per_step, num_sources, seed):
    rng = np.random.default_rng(seed)
    sources = rng.integers(num_sources, size=len(lengths))
    supervised = rng.integers(np.asarray(lengths) + 1) * rng.integers(2, size=len(lengths))  # half have none
    options = {"row_tokens": row_tokens, "rows_per_step": rows_per_step, "sources": sources, "seed": seed}

    check_whole(make(lengths, supervised=supervised, **options), lengths)


@pytest.mark.parametrize("rows_per_step", [1, 3, 4096])
@pytest.mark.parametrize("num_sources", [1, 2, 200])
@pytest.mark.parametrize("row_tokens", [1, 2, 3, 5000])
def test_no_shape_is_too_odd_to_end(row_tokens, num_sources, rows_per_step):
    """The narrowest rows have less room than the gaps of the first group are given."""
    rng = np.random.default_rng(0)
    sources = np.where(np.arange(800) == 7, num_sources - 1, rng.integers(max(1, num_sources - 1), size=800))
    for longest in (row_tokens, max(1, row_tokens // 2)):
        for lengths in (np.full(800, longest), rng.integers(1, longest + 1, 800)):
            options = {"row_tokens": row_tokens, "rows_per_step": rows_per_step, "sources": sources}
            check_whole(make(lengths, **options), lengths)


@pytest.mark.parametrize("row_tokens", [1, 4096])
def test_more_rows_than_a_heap_could_number_are_packed_in_groups(row_tokens):
    lengths = np.ones((1 << 20) + 10, np.int32)
    made = make(lengths, row_tokens=row_tokens)

    check_whole(made, lengths)
    assert made.num_rows == -(-len(lengths) // row_tokens)


def test_items_that_teach_nothing_have_a_row_all_the_same():
    """A source none of whose tokens are supervised has no part of the mix."""
    lengths, sources = chats(3000), np.arange(3000) % 3
    for untaught in (sources == 1, np.full(3000, True)):
        made = make(lengths, row_tokens=8192, sources=sources, supervised=np.where(untaught, 0, lengths))

        check_whole(made, lengths)
        assert made.fill > 0.99


@settings(max_examples=100, deadline=None)
@given(**{**small, "lengths": st.lists(st.integers(1, 12), min_size=1, max_size=9), "row_tokens": st.integers(12, 20)})
def test_few_items_take_at_most_a_row_more_than_the_best_packing(lengths, row_tokens, rows_per_step, num_sources, seed):
    made = make(lengths, row_tokens=row_tokens, rows_per_step=rows_per_step, seed=seed)

    assert made.num_rows <= fewest_rows(sorted(lengths, reverse=True), row_tokens) + 1


def fewest_rows(lengths, row_tokens):
    """Brute force: every item into every row that has room, or a new one."""
    best = len(lengths)

    def put(index, rooms):
        nonlocal best
        if len(rooms) >= best:
            return
        if index == len(lengths):
            best = len(rooms)
            return
        for row in range(len(rooms)):
            if rooms[row] >= lengths[index] and rooms[row] not in rooms[:row]:
                put(index + 1, [*rooms[:row], rooms[row] - lengths[index], *rooms[row + 1 :]])
        put(index + 1, [*rooms, row_tokens - lengths[index]])

    put(0, [])
    return best


@pytest.mark.parametrize("rows_per_step", [1, 8, 64])
@pytest.mark.parametrize("row_tokens", [8192, 40960])
def test_rows_are_full_and_time_does_not_know_length(row_tokens, rows_per_step):
    lengths = chats(40_000)
    made = make(lengths, row_tokens=row_tokens, rows_per_step=rows_per_step)
    full = made.rows[: (made.num_steps - 1) * rows_per_step]

    assert sum(lengths[row].sum() for row in full) >= 0.999 * len(full) * row_tokens
    assert abs(np.corrcoef(lengths, displacement(made, lengths))[0, 1]) < 0.05


def displacement(made, lengths):
    """Steps an item comes later than in the shuffled stream, which is the stream of equal items with this seed."""
    stream = np.random.default_rng([0, 0]).permutation(len(lengths))
    before = np.empty(len(lengths))
    before[stream] = np.cumsum(lengths[stream]) - lengths[stream]
    return row_of(made, len(lengths)) // made.rows_per_step - before / (made.row_tokens * made.rows_per_step)


@pytest.mark.parametrize("num_sources", [1, 3])
def test_no_place_in_a_step_predicts_length(num_sources):
    """The original gives rank 0 the longest: 17 times the squared length of rank 7."""
    lengths = chats(60_000).astype(np.float64)
    sources = np.random.default_rng(1).integers(num_sources, size=60_000)
    made = make(lengths.astype(np.int32), row_tokens=8192, rows_per_step=8, sources=sources)
    place = row_of(made, len(lengths)) % 8
    full = row_of(made, len(lengths)) < (made.num_steps - 1) * 8
    squares = [(lengths[(place == p) & full] ** 2).sum() for p in range(8)]

    assert max(squares) / min(squares) < 1.1
    by_length = np.sort(lengths[full])
    unfair = [(part**2).sum() for part in np.array_split(by_length, 8)]
    assert max(unfair) / min(unfair) > 100


def test_the_rows_of_a_step_cost_alike():
    lengths = chats(40_000)
    made = make(lengths, row_tokens=40960, rows_per_step=8)
    costs = np.array([compute_costs(lengths[row]).sum() for row in made.rows]).reshape(-1, 8)[:-1]
    shuffled = np.random.default_rng(0).permutation(costs.ravel()).reshape(-1, 8)

    assert (costs.mean(1) / costs.max(1)).mean() > 0.996
    assert (shuffled.mean(1) / shuffled.max(1)).mean() < (costs.mean(1) / costs.max(1)).mean()


def expert_shares(step, sources, weight):
    """Per step but the last, the first source's share of the weight."""
    total = np.bincount(step, weight)
    return (np.bincount(step, weight * (sources == 0)) / total)[:-1]


@pytest.mark.parametrize(("rows_per_step", "bound"), [(8, 0.4), (64, 0.5)])
def test_every_step_holds_nearly_the_same_mix_of_sources(rows_per_step, bound):
    """At 64 rows a group is one step: what closes its gaps evens it out, there is nothing to deal."""
    lengths = chats(30_000)
    rng = np.random.default_rng(0)
    sources = np.repeat([0, 1], [2_600, 27_400])
    supervised = (lengths * rng.uniform(0.4, 0.95, len(lengths))).astype(np.int64) + 1
    weight = np.where(sources == 0, 1.0, 0.1) * supervised
    mixed = make(lengths, row_tokens=8192, rows_per_step=rows_per_step, sources=sources, supervised=supervised)
    plain = make(lengths, row_tokens=8192, rows_per_step=rows_per_step)

    spread = expert_shares(row_of(mixed, len(lengths)) // rows_per_step, sources, weight).std()
    assert spread < bound * expert_shares(row_of(plain, len(lengths)) // rows_per_step, sources, weight).std()


@pytest.mark.parametrize("rows_per_step", [1, 2])
def test_no_step_predicts_the_mix_of_the_next(rows_per_step):
    """Dealt to steps oddest first, rows would come in waves: at one row a step 77 %, 59 %, ... 0 % experts."""
    lengths = chats(40_000)
    sources = np.repeat([0, 1], [4_000, 36_000])
    made = make(lengths, row_tokens=8192, rows_per_step=rows_per_step, sources=sources)
    shares = expert_shares(row_of(made, len(lengths)) // rows_per_step, sources, lengths)

    def foresight(shares):
        return np.corrcoef(shares[:-1], shares[1:])[0, 1]

    assert abs(foresight(shares)) < 0.15
    assert foresight(np.sort(shares)) > 0.5


def test_a_cost_too_high_to_count_is_the_highest():
    """More sixteenths of a token than 31 bits hold."""
    lengths = chats(400, longest=1000)

    def digest(cost):
        costs = np.where(np.arange(400) == lengths.argmax(), cost, lengths)
        return plan(lengths, costs, np.zeros(400, np.int32), 2048, 8, 0, 0).digest()

    assert digest(2e8) == digest(1e12) == digest(1e8)
    assert digest(1e8) != digest(lengths.max())


def test_fill_is_the_share_of_slots_that_hold_a_token():
    assert make([3, 5], row_tokens=8).fill == 1.0
    assert make([5, 5], row_tokens=8).fill == 10 / 16


def test_a_seed_and_an_epoch_fix_the_plan():
    lengths = chats(3000, longest=2048)
    digest = make(lengths, seed=3, epoch=1).digest()

    assert make(lengths, seed=3, epoch=1).digest() == digest
    assert make(lengths, seed=3, epoch=2).digest() != digest
    assert make(lengths, seed=4, epoch=1).digest() != digest


def test_the_plan_is_the_same_on_every_machine():
    """Recorded: another digest means that runs saved before cannot be continued. Change it knowingly."""
    lengths = (np.arange(1, 2001) * 7919) % 900 + 20
    made = make(lengths, row_tokens=4096, rows_per_step=4, seed=1, epoch=2, sources=np.arange(2000) % 3)

    assert made.digest()[:16] == "3e8db8354bc8f5de"


def test_the_widest_types_change_nothing():
    lengths, sources = chats(2000, longest=2048), np.arange(2000) % 2
    wide = make(lengths.astype(np.int64), sources=sources.astype(np.int64))

    assert wide.digest() == make(lengths.astype(np.int16), sources=sources.astype(np.int8)).digest()


@pytest.mark.parametrize(
    ("lengths", "rows_per_step", "num_rows"),
    [
        ([10, 10, 10], 8, 1),  # fewer items than rows
        ([7], 4, 1),  # one item
        ([100] * 12, 4, 12),  # all as long as a row
        ([50] * 12, 4, 6),  # all equal, two a row
        ([60] * 5, 2, 5),  # no two fit; the original drops the last
    ],
)
def test_edges(lengths, rows_per_step, num_rows):
    made = make(lengths, row_tokens=100, rows_per_step=rows_per_step)

    assert made.num_rows == num_rows
    assert sorted(np.concatenate(list(made.rows)).tolist()) == list(range(len(lengths)))


def test_where_the_original_drops_or_cuts_ours_packs_or_refuses(shared: Path):
    """Its own edge cases: eleven calls of its allocator."""
    cases = json.loads((shared / "golden/multipack_edge_cases.json").read_text())["cases"]
    dropped = 0
    for case in cases:
        lengths, options = case["lengths"], {"row_tokens": case["capacity"], "rows_per_step": case["ranks"]}
        if not lengths or max(lengths) > case["capacity"] or min(lengths) < 1:
            with pytest.raises(DataError, match=r"nothing to train on|a row holds 1 to"):
                make(lengths, **options)
            continue
        made = make(lengths, **options)
        packed = [i for rank in case["batches_per_rank"] for batch in rank for i in batch]
        dropped += len(lengths) - len(packed)
        assert sorted(np.concatenate(list(made.rows)).tolist()) == list(range(len(lengths))), case["name"]
    assert dropped > 0, "the cases show what the original loses"


def test_an_item_longer_than_a_row_is_refused_with_the_fix():
    with pytest.raises(DataError, match=r"item 1 has 9 tokens, a row holds 1 to 8. Raise batch.micro_batch_tokens"):
        make([3, 9], row_tokens=8)


def test_an_item_without_tokens_is_refused():
    with pytest.raises(DataError, match=r"item 0 has 0 tokens"):
        make([0, 3], row_tokens=8)


def test_no_items_is_an_error_not_an_empty_run():
    with pytest.raises(DataError, match=r"nothing to train on: epoch 3 has no items.*raise data.sources.\*.repeat"):
        make([], epoch=3)


def test_rows_are_a_sequence():
    made = make([3, 5, 8, 2], row_tokens=8, rows_per_step=2)

    assert [row.tolist() for row in made.rows] == [made.rows[i].tolist() for i in range(len(made.rows))]
    assert made.rows[-1].tolist() == made.rows[3].tolist() == []
    assert [row.tolist() for row in made.step(1)] == [row.tolist() for row in made.rows[2:4]]
    with pytest.raises(IndexError):
        made.rows[4]


def test_other_threads_run_while_an_epoch_is_packed():
    """The loader plans the next epoch in a thread beside the training."""
    lengths = chats(1_000_000)
    sources = np.zeros(len(lengths), np.int32)
    arrays = (np.random.default_rng(0).permutation(len(lengths)), lengths, compute_costs(lengths), sources, lengths)
    thread = threading.Thread(target=pack, args=arrays, kwargs={"row_tokens": 8192, "rows_per_step": 8, "seed": 0})
    pack(*(array[:9] % 9 for array in arrays[:1]), *(array[:9] for array in arrays[1:]),
         row_tokens=8192, rows_per_step=8, seed=0)  # compiles  # fmt: skip
    ticks = [time.perf_counter()]
    thread.start()
    while thread.is_alive():
        time.sleep(0.001)
        ticks.append(time.perf_counter())

    assert np.diff(ticks).max() < 0.5 * (ticks[-1] - ticks[0])


@pytest.mark.slow
@pytest.mark.parametrize("num_sources", [1, 2])
def test_ten_million_items_are_planned_in_less_than_a_gigabyte(num_sources):
    """The whole process: libraries, lengths, costs, sources and the plan."""
    program = (
        "import resource, numpy as np\n"
        "from ochat.data.packing import compute_costs, plan\n"
        "lengths = np.random.default_rng(0).lognormal(6.1, 1.0, 20_000).clip(2, 8192).astype(np.int32)\n"
        f"lengths, sources = np.tile(lengths, 500), np.arange(10_000_000, dtype=np.int32) % {num_sources}\n"
        "made = plan(lengths, compute_costs(lengths), sources, 8192, 8, 0, 0)\n"
        "print(len(made.rows.items), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    num_items, peak_bytes = map(int, done.stdout.split())

    assert num_items == 10_000_000
    assert 300e6 < peak_bytes < 1e9
