"""Keys of chat rows that mean something here, and the guard against misspelling one: `condtion` would train
unconditioned without a word.

Other keys are the user's own and are ignored.
"""

import difflib
from collections.abc import Iterable
from functools import lru_cache

from ochat.data.problems import RowError

LIST_KEYS = ("conversations", "messages", "items")
INPUT_KEYS = ("input", "context")
# `train` may be true or false; all are multiplied with the source's weight.
WEIGHT_KEYS = ("weight", "loss_weight", "loss_scale", "train")
ROW_KEYS = (*LIST_KEYS, *WEIGHT_KEYS, "condition", "system")
MESSAGE_KEYS = WEIGHT_KEYS
# Near one of ours, and common in public data sets: never a mistake.
COMMON_KEYS = frozenset(
    {"conversation", "conversation_id", "message", "message_id", "item", "item_id", "trait", "content", "contents"}
)


def check_spelling(keys: Iterable[object], ours: tuple[str, ...], where: str) -> None:
    """Raise RowError when a key is nearly, but not, one of ours."""
    for key in keys:
        if isinstance(key, str) and (meant := nearest(key, ours)):
            raise RowError(
                f"{where}: the key `{key}` is unknown. Did you mean `{meant}`? Correct it; if it is yours, rename it.",
                "misspelt key",
            )


@lru_cache(4096)
def nearest(key: str, ours: tuple[str, ...]) -> str | None:
    """The key of ours that `key` seems to be a misspelling of.

    The first letter must agree and the length nearly so: `height` is no misspelt `weight`, `conversation_hash` no
    misspelt `conversations`.
    """
    if key in ours or key in COMMON_KEYS:
        return None
    near = [o for o in ours if o[0] == key[:1].lower() and abs(len(o) - len(key)) <= 2]
    return next(iter(difflib.get_close_matches(key.lower(), near, n=1, cutoff=0.8)), None)
