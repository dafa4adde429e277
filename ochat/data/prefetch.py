"""Work ahead: the next items of an iterator are made while the caller is busy with this one."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")


def prefetched(items: Iterator[Item], depth: int) -> Iterator[Item]:
    """The same items in the same order, `depth` of them made ahead by one thread.

    An error of the iterator is raised where its item would have come. The thread ends with the generator.
    """
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ochat-prefetch")
    try:
        ahead = deque(pool.submit(_next_or_none, items) for _ in range(depth))
        while (made := ahead.popleft().result()) is not None:
            ahead.append(pool.submit(_next_or_none, items))
            yield made[0]
    finally:
        pool.shutdown(cancel_futures=True)


def _next_or_none(items: Iterator[Item]) -> tuple[Item] | None:
    # In a tuple, so that an item may be None; and StopIteration cannot pass through a future.
    for item in items:
        return (item,)
    return None
