"""From the configured weights or rewards to one factor per item, applied when rows are made, never on disk.

So sweeping weights, rewards or beta never tokenises anything again.
"""

import numpy as np
from numpy.typing import NDArray

from ochat.config import Config
from ochat.data.store import PreparedSplit
from ochat.errors import DataError


def item_weights(config: Config, split: PreparedSplit) -> NDArray[np.float64]:
    """The factor [N] by which each item's token weights are multiplied.

    weight                 that number
    reward, reward_field   exp((r - highest r) / beta): the best item or source has 1; reward_clip bounds r first
    """
    if len(split) == 0:
        raise DataError("nothing to train on: the prepared dataset is empty. `ochat prepare` says what was left out.")
    sources, source_id = config.data.sources, split.column("source_id")
    if config.loss.beta is None:
        per_source = np.array([1.0 if s.weight is None else s.weight for s in sources])
        return np.asarray(per_source[source_id], dtype=np.float64)
    per_source = np.array([np.nan if s.reward is None else s.reward for s in sources], dtype=np.float64)
    low, high = np.array([s.reward_clip or (-np.inf, np.inf) for s in sources], dtype=np.float64).T
    of_rows = np.clip(split.column("reward"), low[source_id], high[source_id])
    rewards = np.where(np.isnan(per_source[source_id]), of_rows, per_source[source_id])
    if np.isnan(rewards).any():
        names = sorted({sources[i].name for i in source_id[np.isnan(rewards)]})
        raise DataError(f"source {', '.join(names)}: items without a reward. Run `ochat prepare` again.")
    return np.asarray(np.exp((rewards - rewards.max()) / config.loss.beta), dtype=np.float64)


def weight_sums(config: Config, split: PreparedSplit) -> NDArray[np.float64]:
    """The sum of its tokens' loss weights [N] of each item, as trained: factor x token or reply weights."""
    per_message = config.loss.weighting == "message"
    return item_weights(config, split) * split.column("reply_weight_sum" if per_message else "weight_sum")


def epoch_weight_sums(config: Config, split: PreparedSplit) -> NDArray[np.float64]:
    """The same [N] as often as an epoch trains the item, on average over epochs."""
    repeat = np.array([source.repeat for source in config.data.sources])
    return np.asarray(weight_sums(config, split) * repeat[split.column("source_id")], dtype=np.float64)
