"""Plan x dataset x rank -> the steps a rank computes, each with the denominator all ranks share.

A step is `rows_per_step` rows; rank r of W takes its share of them, in order, as micro-batches. So the steps, their
rows and their loss are the same for every number of ranks that divides `rows_per_step`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from ochat.config import Config
from ochat.data.batch import PackedBatch, collate
from ochat.data.packing import PackingPlan, plan
from ochat.data.replies import per_message_weights
from ochat.data.store import PreparedSplit
from ochat.data.weights import item_weights, weight_sums
from ochat.errors import ConfigError, DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainStep:
    """One optimizer step of one rank.

    index             of the step in the epoch, from 0
    batches           this rank's micro-batches; as many on every rank
    loss_denominator  what the weighted loss sum over all ranks is divided by
    num_tokens        non-padding tokens of the step, over all ranks
    fill              num_tokens / tokens the step's rows could hold
    """

    index: int
    epoch: int
    batches: tuple[PackedBatch, ...]
    loss_denominator: float
    num_tokens: int
    fill: float


class Loader:
    """The training data of one rank."""

    def __init__(self, config: Config, split: PreparedSplit, *, rank: int = 0, world_size: int = 1) -> None:
        if config.rows_per_step % world_size:
            fits = [n for n in range(1, config.rows_per_step + 1) if config.rows_per_step % n == 0]
            raise ConfigError(
                f"batch: a step has {config.rows_per_step} rows (global_batch_tokens / micro_batch_tokens), which "
                f"{world_size} processes cannot share. Use {', '.join(map(str, fits))} processes, or change batch."
            )
        self._config, self._split, self._rank, self._world_size = config, split, rank, world_size
        self._weights = item_weights(config, split)
        self._source_id = split.column("source_id")
        self._weight_sums = weight_sums(config, split)
        if not self._weight_sums.sum() > 0:
            raise DataError("nothing to train on: the weight of every conversation is 0. Raise a source's weight.")
        self.plan = cache(self._plan)

    def _plan(self, epoch: int) -> PackingPlan:
        return plan(
            self._split.lengths,
            row_tokens=self._config.batch.micro_batch_tokens,
            rows_per_step=self._config.rows_per_step,
            seed=self._config.run.seed,
            epoch=epoch,
        )

    def epoch(self, epoch: int, start: int = 0) -> Iterator[TrainStep]:
        """The steps of an epoch from `start` on."""
        plan = self.plan(epoch)
        mean_row_weight = float(self._weight_sums.sum()) / len(plan.rows)
        for index in range(start, plan.num_steps):
            rows = plan.rows[index * plan.rows_per_step : (index + 1) * plan.rows_per_step]
            items = np.concatenate(rows)
            if self._config.loss.normalization == "epoch":
                denominator = mean_row_weight * plan.rows_per_step
            else:
                # A step may hold nothing but a source of weight 0; then the sum above the line is 0 too.
                denominator = float(self._weight_sums[items].sum()) or 1.0
            num_tokens = int(self._split.lengths[items].sum())
            yield TrainStep(
                index=index,
                epoch=epoch,
                batches=tuple(self._batch(rows, position) for position in self._my_rows()),
                loss_denominator=denominator,
                num_tokens=num_tokens,
                fill=num_tokens / (plan.rows_per_step * plan.row_tokens),
            )

    def best_source(self) -> int:
        """The source whose items weigh most on average: the expert."""
        num_items = np.bincount(self._source_id, minlength=len(self._config.data.sources))
        means = np.bincount(self._source_id, self._weights, minlength=len(num_items)) / np.maximum(num_items, 1)
        return int(means.argmax())

    def _my_rows(self) -> range:
        share = self._config.rows_per_step // self._world_size
        return range(self._rank * share, (self._rank + 1) * share)

    def _batch(self, rows: tuple[NDArray[np.int64], ...], position: int) -> PackedBatch:
        items = rows[position] if position < len(rows) else np.zeros(0, np.int64)
        input_ids, token_weights = self._split.tokens(items)
        if self._config.loss.weighting == "message":
            token_weights = per_message_weights(token_weights)
        lengths = self._split.lengths[items]
        token_weights *= np.repeat(self._weights[items].astype(np.float32), lengths)
        return collate(input_ids, token_weights, lengths, self._source_id[items])
