"""Everything a run needs before its first step, found or refused: data, steps, and where to begin."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from ochat.backend import Backend
from ochat.checkpoint import default_condition
from ochat.config import Config, TrainingConfig
from ochat.data.loader import Loader
from ochat.data.prepare import open_prepared
from ochat.data.store import Manifest
from ochat.data.template import get_template
from ochat.data.tokenize import load_tokenizer
from ochat.errors import CheckpointError
from ochat.training.ranks import of_rank_0
from ochat.training.state import CHECKPOINTS_NAME, TrainerState, list_checkpoints, read_state, training_recipe

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """epoch_steps: steps of each epoch that is at least begun; total_steps: of the whole run."""

    epoch_steps: tuple[int, ...]
    total_steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """checkpoint: the one to continue, None at the beginning; state: where that stands.

    supervised_tokens_per_step: the mean over the first epoch, all ranks.
    """

    tokenizer: PreTrainedTokenizerFast
    manifest: Manifest
    loader: Loader
    schedule: Schedule
    checkpoint: Path | None
    state: TrainerState
    supervised_tokens_per_step: float


def set_up(config: Config, backend: Backend, prepare_command: str) -> Setup:
    """Read what the run stands on. Every rank calls it; raises OchatError subclasses before anything is built."""
    template = get_template(config.model.template)
    tokenizer = load_tokenizer(config.tokenizer_name_or_path, template)
    manifest, split = open_prepared(config, template, tokenizer, prepare_command)
    loader = Loader(config, split, rank=backend.rank, world_size=backend.world_size)
    schedule = make_schedule(config.training, lambda epoch: loader.plan(epoch).num_steps)
    recipe = training_recipe(
        config, dataset_fingerprint=manifest.fingerprint, world_size=backend.world_size, dtype=str(backend.dtype)
    )
    fresh = TrainerState(
        step=0, epoch=0, epoch_step=0, num_tokens=0, plan_digest=loader.plan(0).digest(), recipe=recipe
    )
    checkpoint = _newest_checkpoint(config)
    return Setup(
        tokenizer=tokenizer,
        manifest=manifest,
        loader=loader,
        schedule=schedule,
        checkpoint=checkpoint,
        state=_state_to_continue(checkpoint, fresh, schedule, loader) if checkpoint else fresh,
        supervised_tokens_per_step=float(split.column("num_supervised").sum()) / schedule.epoch_steps[0],
    )


def make_schedule(training: TrainingConfig, steps_of_epoch: Callable[[int], int]) -> Schedule:
    """Epochs up to the limit of steps. steps_of_epoch: of an epoch as packed, or as estimated."""
    limit = training.max_steps
    epoch_steps: list[int] = []
    for epoch in range(training.num_epochs):
        if limit is not None and sum(epoch_steps) >= limit:
            break
        epoch_steps.append(steps_of_epoch(epoch))
    total = sum(epoch_steps) if limit is None else min(limit, sum(epoch_steps))
    return Schedule(epoch_steps=tuple(epoch_steps), total_steps=total)


def how_to_go_on(training: TrainingConfig, schedule: Schedule) -> str:
    """What to raise to have more steps than the schedule."""
    if training.max_steps is not None and schedule.total_steps == training.max_steps:
        return f"To go on, raise training.max_steps (now {training.max_steps})"
    return f"To go on, raise training.num_epochs (now {training.num_epochs})"


def absent_sources(config: Config, manifest: Manifest, best_source: int) -> dict[str, str]:
    """Name of each source of which nothing is trained -> what follows from that, in a sentence."""
    best, default = config.data.sources[best_source].name, default_condition(config, manifest, best_source)
    return {
        source.name: f"source {source.name}: nothing is kept of {manifest.counts[source.name]['read']:,} conversations "
        f"read, so its class {source.condition!r} is not learned; by default the exported model will answer as "
        f"{default!r}, the class of {best}."
        for source in config.data.sources
        if not manifest.counts[source.name]["kept"]
    }


def _newest_checkpoint(config: Config) -> Path | None:
    # Rank 0 looks, all follow: on a lagging shared file system each would find its own.
    checkpoints = of_rank_0(list_checkpoints(config.run_dir / CHECKPOINTS_NAME))
    if checkpoints and config.checkpoint.resume == "never":
        raise CheckpointError(
            f"{config.run_dir} already has checkpoints. Set checkpoint.resume=auto to continue it, or another run.name."
        )
    return checkpoints[-1] if checkpoints else None


def _state_to_continue(checkpoint: Path, fresh: TrainerState, schedule: Schedule, loader: Loader) -> TrainerState:
    state = read_state(checkpoint, fresh.recipe)
    if state.step > schedule.total_steps:
        raise CheckpointError(
            f"{checkpoint}: has done {state.step} steps, the configuration asks for {schedule.total_steps} in all. "
            f"Raise training.num_epochs or training.max_steps, or start another run.name."
        )
    if state.epoch_step and state.plan_digest != loader.plan(state.epoch).digest():
        raise CheckpointError(
            f"{checkpoint}: this ochat packs epoch {state.epoch} otherwise than the one that saved it. "
            f"Continue with that version, or start another run.name."
        )
    return state
