"""How many steps a run has: its epochs, up to a limit of steps."""

from collections.abc import Callable
from dataclasses import dataclass

from ochat.config import TrainingConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """epoch_steps: steps of each epoch that is at least begun; total_steps: of the whole run."""

    epoch_steps: tuple[int, ...]
    total_steps: int


def make_schedule(training: TrainingConfig, steps_of_epoch: Callable[[int], int]) -> Schedule:
    """steps_of_epoch: of an epoch as packed, or as estimated."""
    limit = training.max_steps
    epoch_steps: list[int] = []
    for epoch in range(training.num_epochs):
        if limit is not None and sum(epoch_steps) >= limit:
            break
        epoch_steps.append(steps_of_epoch(epoch))
    total = sum(epoch_steps) if limit is None else min(limit, sum(epoch_steps))
    return Schedule(epoch_steps=tuple(epoch_steps), total_steps=total)
