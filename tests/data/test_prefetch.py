"""Made ahead by one thread: the same items, the same errors, and no thread left behind."""

import subprocess
import sys
import threading
import time
import weakref

import pytest

from ochat.data.prefetch import prefetched
from tests.conftest import ROOT


def num_threads():
    return sum(thread.name.startswith("ochat-prefetch") for thread in threading.enumerate())


def counted(made, number=100):
    for item in range(number):
        made.append(item)
        yield item


def wait_for(made, number):
    deadline = time.monotonic() + 5
    while len(made) < number and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.02)  # for one too many
    return len(made)


@pytest.mark.parametrize("depth", [1, 2, 5])
@pytest.mark.parametrize("items", [[], [0], [None, 0, None], list(range(50))])
def test_the_same_items_in_the_same_order(items, depth):
    assert list(prefetched(iter(items), depth)) == items


@pytest.mark.parametrize("depth", [1, 3])
def test_so_many_are_made_ahead_and_no_more(depth):
    made = []
    items = prefetched(counted(made), depth)

    assert made == [], "nothing before it is asked for"
    assert [next(items), wait_for(made, 1 + depth)] == [0, 1 + depth]
    assert [next(items), wait_for(made, 2 + depth)] == [1, 2 + depth]
    items.close()


def test_they_are_made_by_one_thread_which_is_not_the_callers():
    def thread_ids():
        for _ in range(20):
            yield threading.get_ident()

    assert len(idents := set(prefetched(thread_ids(), 4))) == 1
    assert threading.get_ident() not in idents


@pytest.mark.parametrize("error", [ValueError("broken"), KeyboardInterrupt()])
def test_an_error_is_raised_where_its_item_would_have_come(error):
    def breaking():
        yield from range(3)
        raise error

    items = prefetched(breaking(), 2)

    assert [next(items) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(type(error)):
        next(items)
    assert num_threads() == 0


@pytest.mark.parametrize("taken", [1, 3])
def test_a_consumer_that_stops_ends_the_thread(taken):
    made = []
    items = prefetched(counted(made), 2)
    for _ in range(taken):
        next(items)
    assert num_threads() == 1

    items.close()

    assert num_threads() == 0
    assert len(made) <= taken + 2


def test_an_item_given_away_is_not_held_when_the_next_has_come():
    class Item:
        pass

    items = prefetched((Item() for _ in range(5)), 2)
    first = weakref.ref(next(items))
    next(items)

    assert first() is None
    items.close()


def test_a_process_that_fails_in_the_midst_of_it_ends():
    program = (
        "import itertools; from ochat.data.prefetch import prefetched\n"
        "items = prefetched(itertools.count(), 2)\n"
        "next(items)\n"
        "raise KeyboardInterrupt"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)

    assert "KeyboardInterrupt" in done.stderr
