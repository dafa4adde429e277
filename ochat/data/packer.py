"""From a stream of items to full rows: the inner loop of packing, compiled by numba.

Items are taken oldest first, a group of whole steps at a time:

    core   the oldest items, a little less than the group's rows can hold: the long ones, longest first, each to the row
           that costs least so far, the short ones, shortest first, each to the emptiest row
    gaps   what is left of a row is closed exactly by one or two items from further down the stream
    steps  the group's rows are dealt to its steps so that every step holds the same mix of sources

Items that close gaps are early and, were nothing done, mostly short. So the room left for them is steered: the more
short ones come early, the more room, and the longer the next ones. That keeps length and time uncorrelated.

N items of the stream, M rows of a group, S sources. Nothing in here knows a rank; all randomness is `seed`'s. One file,
because numba's cache of a compiled function does not notice a change of what it calls in another one.
"""

import math
from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

GROUP_ITEMS = 512  # fewer in a group, and few combinations close a gap or even out the steps
LONG_SHARE = 0.8  # of a core's tokens is placed by cost, the rest by room
LOOK_AHEAD = (1, 4, 16)  # groups; the next only if nothing in the last one fits
TRIES = 50  # items that are asked whether they leave a gap that another closes
SLACK_PARTS = 2048  # a gap of 1/2048 of a row counts as closed
SORT_BINS = 1024
STEER = 1.2  # by which the room for gaps changes from group to group
MEMORY = 0.8  # of the last group's bias in this one's
COST_UNIT = 16  # costs are counted in 1/16 tokens: whole numbers are the same everywhere, and quick to compare
MOST_EXTRA = 2**31 - 1  # that an item's cost may count
ROW_BITS = 20  # of a heap's entry; the rest is its key


class Stream(NamedTuple):
    """Items in the order they are to be trained. `first` is by source and length, S x (longest + 1)."""

    length: NDArray[np.int32]  # [N], tokens
    extra_cost: NDArray[np.int32]  # [N], beyond its tokens
    source: NDArray[np.int32]  # [N]
    supervised: NDArray[np.int32]  # [N], tokens
    later: NDArray[np.int32]  # [N], the next item of the same source and length
    taken: NDArray[np.bool_]  # [N]
    first: NDArray[np.int32]  # the oldest item of a source and length that may still be there


class Rows(NamedTuple):
    """The rows of a group. Their items are a chain: the last of row r, the one before it, ..., -1."""

    before: NDArray[np.int32]  # [N]
    last: NDArray[np.int32]  # [M]
    room: NDArray[np.int64]  # [M], tokens
    extra_cost: NDArray[np.int64]  # [M]
    mix: NDArray[np.int64]  # [M, S], supervised tokens
    trained: NDArray[np.int64]  # [S], supervised tokens of all rows so far


class Gaps(NamedTuple):
    """What a gap may be and where to look for what closes it; ahead: where the items after the core begin."""

    ahead: int
    group_items: int
    shortest: int
    slack: int


def pack(
    order: NDArray[np.int64],
    length: NDArray[np.integer],
    cost: NDArray[np.floating],
    source: NDArray[np.integer],
    supervised: NDArray[np.integer],
    *,
    row_tokens: int,
    rows_per_step: int,
    seed: int,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The items [N] row by row, and where each row ends [number of rows].

    order       the stream, as items
    length      tokens of each item [N], 1 to row_tokens
    cost        of each item [N], in tokens
    source      of each item [N], from 0
    supervised  tokens of each item [N]
    """
    N, S, longest, mean = len(order), int(source.max()) + 1, int(length.max()), float(length.mean())
    steps_per_group = max(1, math.ceil(GROUP_ITEMS * mean / (row_tokens * rows_per_step)))
    M = steps_per_group * rows_per_step
    # Few large arrays, made here: numpy asks for large pages, and their making takes a fifth of the time otherwise.
    in_stream = np.zeros((6, N), np.int32)
    packed, row_ends = np.empty((2, N), np.int64)
    five = in_stream[:5]
    stream = Stream(*five, np.zeros(N, np.bool_), np.full(S * (longest + 1), -1, np.int32))  # type: ignore[call-arg]
    rows = Rows(
        in_stream[5],
        np.empty(M, np.int32),
        np.empty(M, np.int64),
        np.empty(M, np.int64),
        np.zeros((M, S), np.int64),
        np.zeros(S, np.int64),
    )
    _fill_stream(stream, order, length, cost, source, supervised, S, packed)
    share = np.bincount(source, supervised, minlength=S) / max(1, supervised.sum()) if S > 1 else np.ones(1)
    limits = np.array([row_tokens, rows_per_step, length.min(), longest, length.sum(), seed], np.int64)
    num_rows = _pack(stream, rows, share, order, limits, packed, row_ends)
    return packed, row_ends[:num_rows].copy()


@njit(cache=True, nogil=True)  # the loader plans the next epoch beside the training
def _fill_stream(
    stream: Stream, order: Any, length: Any, cost: Any, source: Any, supervised: Any, num_sources: int, scratch: Any
) -> None:
    N, cheapest, width = len(order), np.inf, len(stream.first) // num_sources
    for item in range(N):
        cheapest = min(cheapest, cost[item] / length[item])
    # Two numbers in one: fetching them in the stream's order, from all over memory, is what takes the time.
    for item in range(N):
        extra = np.int64(min(COST_UNIT * (cost[item] - cheapest * length[item]), MOST_EXTRA))
        scratch[item] = extra << 32 | np.int64(length[item])
    for i in range(N - 1, -1, -1):
        both = scratch[order[i]]
        stream.length[i], stream.extra_cost[i] = both & 0xFFFFFFFF, both >> 32
        shelf = stream.length[i]
        if num_sources > 1:
            stream.source[i], stream.supervised[i] = source[order[i]], supervised[order[i]]
            shelf += stream.source[i] * width
        stream.later[i] = stream.first[shelf]
        stream.first[shelf] = i


@njit(cache=True, nogil=True)
def _pack(stream: Stream, rows: Rows, share: Any, order: Any, limits: Any, packed: Any, row_ends: Any) -> int:
    """Fill `packed` and `row_ends`; returns the number of rows."""
    row_tokens, rows_per_step, shortest, longest, left, seed = limits
    M, mean = len(rows.room), left / len(order)
    heap, state = np.empty(M, np.int64), np.array([seed], np.uint64)
    num_packed, num_rows, oldest = 0, 0, 0
    room_for_gaps, bias = 2.0 * mean, 0.0
    while left > 0:
        while stream.taken[oldest]:
            oldest += 1
        # Towards the end half of what is left, so that there is something to close the gaps with.
        m = min(M, max(1, left // (2 * row_tokens)))
        _clear(rows, m, row_tokens)
        budget = m * row_tokens if left < row_tokens else m * (row_tokens - int(room_for_gaps))
        core, core_end = _oldest_items(stream, oldest, budget, m * row_tokens, longest)
        _place_core(stream, rows, core, m, heap)
        gaps = Gaps(core_end, max(core_end - oldest, 64), shortest, row_tokens // SLACK_PARTS)
        _close_gaps(stream, rows, m, core, share, gaps)
        row_order = np.arange(m)
        _shuffle(row_order, state)
        if len(share) > 1 and m > rows_per_step > 1 and num_rows % rows_per_step == 0:
            row_order = _even_steps(rows, row_order, rows_per_step, state)
        group_start, early = num_packed, 0.0
        for row in row_order:
            item = rows.last[row]
            if item < 0:
                continue
            while item >= 0:
                early += (stream.length[item] - mean) * (group_start - item)
                packed[num_packed] = order[item]
                num_packed += 1
                item = rows.before[item]
            left -= row_tokens - rows.room[row]
            row_ends[num_rows] = num_packed
            num_rows += 1
        bias = MEMORY * bias + early
        room_for_gaps *= STEER if bias > 0 else 1 / STEER
        room_for_gaps = min(max(room_for_gaps, mean / 2), 0.6 * row_tokens)
    return num_rows


@njit(cache=True)
def _clear(rows: Rows, m: int, row_tokens: int) -> None:
    rows.last[:m] = -1
    rows.room[:m] = row_tokens
    rows.extra_cost[:m] = 0
    rows.mix[:m] = 0


@njit(cache=True)
def _place(stream: Stream, rows: Rows, row: int, item: int) -> None:
    stream.taken[item] = True
    rows.before[item] = rows.last[row]
    rows.last[row] = item
    rows.room[row] -= stream.length[item]
    rows.extra_cost[row] += stream.extra_cost[item]
    if len(rows.trained) > 1:
        rows.mix[row, stream.source[item]] += stream.supervised[item]
        rows.trained[stream.source[item]] += stream.supervised[item]


@njit(cache=True)
def _oldest_items(stream: Stream, oldest: int, budget: int, most: int, longest: int) -> tuple[NDArray[np.int32], int]:
    """The oldest items up to `budget` tokens, longest first (to 1/1024 of the longest), and where they end."""
    N, total, end, k = len(stream.length), 0, oldest, 0
    bins, scale = np.zeros(SORT_BINS + 1, np.int64), (SORT_BINS - 1) / longest
    while end < N and total < budget:
        if not stream.taken[end] and total + stream.length[end] <= most:
            total += stream.length[end]
            bins[SORT_BINS - int(stream.length[end] * scale)] += 1
            k += 1
        end += 1
    for b in range(SORT_BINS):
        bins[b + 1] += bins[b]
    ordered, total = np.empty(k, np.int32), 0
    for i in range(oldest, end):
        if not stream.taken[i] and total + stream.length[i] <= most:
            total += stream.length[i]
            b = SORT_BINS - 1 - int(stream.length[i] * scale)
            ordered[bins[b]] = i
            bins[b] += 1
    return ordered, end


@njit(cache=True)
def _place_core(stream: Stream, rows: Rows, core: Any, m: int, heap: Any) -> None:
    """The long items, longest first, each to the row with the least extra cost; the short ones, shortest first, each
    to the row with the most room: rows that hold a costly item get the cheapest. What fits nowhere stays for later.
    """
    total, seen, num_long = 0, 0, 0
    for item in core:
        total += stream.length[item]
    heap[:m] = np.arange(m)  # no cost yet
    full = 1 << 40
    while num_long < len(core) and seen < LONG_SHARE * total:
        item = core[num_long]
        size = stream.length[item]
        while rows.room[_row(heap[0])] < size and heap[0] >> ROW_BITS < full:
            _replace(heap, m, full, _row(heap[0]))
        row = _row(heap[0])
        if rows.room[row] >= size:
            _place(stream, rows, row, item)
            _replace(heap, m, int(rows.extra_cost[row]), row)
        seen += size
        num_long += 1
    for row in range(m):
        heap[row] = (full - rows.room[row] << ROW_BITS) + row
    heap[:m].sort()
    for k in range(len(core) - 1, num_long - 1, -1):
        row = _row(heap[0])
        if rows.room[row] < stream.length[core[k]]:
            break
        _place(stream, rows, row, core[k])
        _replace(heap, m, int(full - rows.room[row]), row)


@njit(cache=True)
def _row(entry: int) -> int:
    return entry & ((1 << ROW_BITS) - 1)


@njit(cache=True)
def _replace(heap: Any, size: int, key: int, row: int) -> None:
    """Put another entry in the place of a heap's least."""
    entry, top = (np.int64(key) << ROW_BITS) + row, 0
    while 2 * top + 2 < size:
        child = 2 * top + 1
        child += heap[child + 1] < heap[child]
        if heap[child] >= entry:
            heap[top] = entry
            return
        heap[top] = heap[child]
        top = child
    if 2 * top + 1 < size and heap[2 * top + 1] < entry:
        heap[top] = heap[2 * top + 1]
        top = 2 * top + 1
    heap[top] = entry


@njit(cache=True)
def _close_gaps(stream: Stream, rows: Rows, m: int, core: Any, share: Any, gaps: Gaps) -> None:
    by_need, calls = np.arange(len(share)), 0
    waiting = _waiting(stream, core, gaps.ahead, 4 * m + TRIES)
    for row in range(m):
        while rows.room[row] > gaps.slack and rows.room[row] >= gaps.shortest:
            if calls == m:  # each has taken two at the most
                waiting, calls = _waiting(stream, core, gaps.ahead, 4 * m + TRIES), 0
            if len(share) > 1:
                by_need = np.argsort(rows.trained - share * rows.trained.sum())
            calls += 1
            if not _close_gap(stream, rows, row, waiting, by_need, gaps):
                break


@njit(cache=True)
def _waiting(stream: Stream, core: Any, ahead: int, num_ahead: int) -> NDArray[np.int32]:
    """The oldest items that have no row yet: those of the core, and some that come after it."""
    waiting, k = np.empty(len(core) + num_ahead, np.int32), 0
    for item in core:
        if not stream.taken[item]:
            waiting[k] = item
            k += 1
    stop = k + num_ahead
    while ahead < len(stream.taken) and k < stop:
        if not stream.taken[ahead]:
            waiting[k] = ahead
            k += 1
        ahead += 1
    return waiting[:k]


@njit(cache=True)
def _close_gap(stream: Stream, rows: Rows, row: int, waiting: Any, by_need: Any, gaps: Gaps) -> bool:
    """Place one or two items that fill the row, or the first waiting one that fits; False if none does."""
    gap, fits = rows.room[row], -1
    for groups in LOOK_AHEAD:
        end = gaps.ahead + groups * gaps.group_items
        item = _match(stream, gap, end, -1, by_need, gaps)
        if item >= 0:
            _place(stream, rows, row, item)
            return True
        tries = 0
        for one in waiting:
            if stream.taken[one] or stream.length[one] > gap:
                continue
            if fits < 0:
                fits = one
            other = _match(stream, gap - stream.length[one], end, one, by_need, gaps)
            if other >= 0:
                _place(stream, rows, row, one)
                _place(stream, rows, row, other)
                return True
            tries += 1
            if tries == TRIES:
                break
    if fits >= 0:
        _place(stream, rows, row, fits)
    return fits >= 0


@njit(cache=True)
def _match(stream: Stream, gap: int, end: int, but: int, by_need: Any, gaps: Gaps) -> int:
    """The oldest item before `end` that closes a gap, of the source that is needed most; -1 for none."""
    width = len(stream.first) // len(by_need)
    for source in by_need:
        for length in range(min(gap, width - 1), max(gap - gaps.slack, gaps.shortest) - 1, -1):
            shelf = source * width + length
            item = stream.first[shelf]
            while 0 <= item < end and stream.taken[item]:
                item = stream.later[item]
            stream.first[shelf] = item
            while 0 <= item < end and (item == but or stream.taken[item]):
                item = stream.later[item]
            if 0 <= item < end:
                return item
    return -1


@njit(cache=True)
def _shuffle(values: Any, state: Any) -> None:
    """Fisher-Yates, by a 64-bit linear congruential generator (Knuth's MMIX constants)."""
    for i in range(len(values) - 1, 0, -1):
        state[0] = state[0] * np.uint64(6364136223846793005) + np.uint64(1442695040888963407)
        j = np.int64((state[0] >> np.uint64(33)) % np.uint64(i + 1))
        values[i], values[j] = values[j], values[i]


@njit(cache=True)
def _even_steps(rows: Rows, order: Any, rows_per_step: int, state: Any) -> NDArray[np.int64]:
    """Deal the rows to steps: the oddest mixes first, each to the step whose mix it mends most. Which step gets the
    oddest, and where a row is in its step, is chance.
    """
    m, S = len(order), rows.mix.shape[1]
    mean = np.zeros(S)
    for row in order:
        mean += rows.mix[row] / m
    odd, oddness = np.zeros((m, S)), np.zeros(m)
    for k in range(m):
        for s in range(S):
            if mean[s] > 0:
                odd[k, s] = rows.mix[order[k], s] / mean[s] - 1
                oddness[k] += odd[k, s] ** 2
    num_steps = -(-m // rows_per_step)
    of_step, filled = np.zeros((num_steps, S)), np.zeros(num_steps, np.int64)
    dealt, steps = np.empty(m, np.int64), np.arange(num_steps)
    _shuffle(steps, state)
    for k in np.argsort(-oddness):
        best, least = steps[0], np.inf
        for step in steps:
            if filled[step] < min(rows_per_step, m - step * rows_per_step):
                worse = (of_step[step] * odd[k]).sum()
                if worse < least:
                    best, least = step, worse
        dealt[best * rows_per_step + filled[best]] = order[k]
        filled[best] += 1
        of_step[best] += odd[k]
    for start in range(0, m, rows_per_step):
        _shuffle(dealt[start : start + rows_per_step], state)
    return dealt
