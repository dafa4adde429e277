"""Replies inside a row of token weights: runs of non-zero weights. A role prefix, weight 0, stands between any two.

    weights 0 0 1 1 0 .5 -> reply 0 at 2..3, reply 1 at 5
n  tokens of a conversation
"""

import numpy as np
from numpy.typing import NDArray


def reply_starts(token_weights: NDArray[np.float32]) -> NDArray[np.intp]:
    """Where each reply begins."""
    supervised = token_weights != 0
    begins = supervised.copy()
    begins[1:] &= ~supervised[:-1]
    return np.flatnonzero(begins)


def per_message_weights(token_weights: NDArray[np.float32]) -> NDArray[np.float32]:
    """The weights [n] with each reply's divided by its length, so that a reply counts its weight once."""
    supervised = np.flatnonzero(token_weights)
    reply = np.searchsorted(reply_starts(token_weights), supervised, side="right") - 1
    result = token_weights.copy()
    result[supervised] /= np.bincount(reply)[reply]
    return result
