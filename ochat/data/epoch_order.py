"""Which items an epoch trains, and in which order they come before they are packed."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def epoch_items(
    source_ids: NDArray[np.integer], repeat: Sequence[float], *, seed: int, epoch: int
) -> NDArray[np.int64]:
    """The items of an epoch; an item comes as often as it is to be trained.

    source_ids  of each item [N]
    repeat      of each source [S]: how often it is trained in an epoch; 0.25 trains a quarter, another one next time

    Each source's items, shuffled once, are a tape without end of which an epoch takes the next stretch. So after k
    epochs no item is ahead of another of its source by more than one, whatever the number.
    """
    if all(times == 1 for times in repeat):
        return np.arange(len(source_ids))
    stretches = []
    for source, times in enumerate(repeat):
        tape = np.random.default_rng([seed, source]).permutation(np.flatnonzero(source_ids == source))
        start, stop = round(epoch * times * len(tape)), round((epoch + 1) * times * len(tape))
        stretches.append(tape[np.arange(start, stop) % max(1, len(tape))])
    return np.concatenate(stretches)


def interleaved(
    source_ids: NDArray[np.integer], supervised: NDArray[np.integer], rng: np.random.Generator
) -> NDArray[np.int64]:
    """A random order [N] in which every source's share of the supervised tokens is nearly the same all along.

    supervised  tokens of each item [N]

    Each source is shuffled; an item then comes when its source has had as large a part of its own tokens as the
    others of theirs.
    """
    order = rng.permutation(len(source_ids))
    if (source_ids == source_ids[0]).all():
        return order
    order = order[np.argsort(source_ids[order], kind="stable")]
    ids = source_ids[order]
    tokens = np.maximum(supervised[order], 1).astype(np.float64)  # one without any takes its place all the same
    so_far = np.cumsum(tokens)
    starts = np.flatnonzero(np.diff(ids, prepend=-1))
    before = np.repeat(so_far[starts] - tokens[starts], np.diff(starts, append=len(ids)))
    total = np.repeat(np.add.reduceat(tokens, starts), np.diff(starts, append=len(ids)))
    # Where in its own stretch an item comes: by chance, or a source of one item would always come half-way.
    phase = rng.random(int(ids[-1]) + 1)[ids]
    return order[np.argsort((so_far - tokens * phase - before) / total, kind="stable")]
