"""The training loop, top to bottom."""

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from ochat.backend import Backend, select_backend
from ochat.checkpoint import export_model, make_card
from ochat.config import Config, save_config
from ochat.data.loader import Loader, TrainStep
from ochat.data.prepare import check_prepared
from ochat.data.store import TRAIN_SPLIT, Manifest, PreparedSplit
from ochat.data.template import get_template
from ochat.data.tokenize import load_tokenizer
from ochat.errors import CheckpointError, DataError
from ochat.model import load_model
from ochat.progress import progress_bar
from ochat.training.engine import TrainEngine, build_engine, start_process
from ochat.training.loss import WeightedLoss
from ochat.training.metrics import MetricsLog, Timing, step_metrics
from ochat.training.optim import auto_learning_rate, lr_at
from ochat.training.state import TrainerState, list_checkpoints, read_state, save_checkpoint

log = logging.getLogger(__name__)

EXPORT_NAME = "export"
CHECKPOINTS_NAME = "checkpoints"


def train(config: Config, *, prepare_command: str = "ochat prepare CONFIG") -> Path:
    """Train as configured and return the exported model's folder. Every rank calls it; rank 0 writes.

    prepare_command  named in the error when the prepared dataset is missing or out of date

    Raises OchatError subclasses for whatever the user can mend.
    """
    backend = select_backend(config.engine)
    log.info("backend: %s %s, %s (%s)", backend.device, _dtype_name(backend), backend.attention, backend.reason)
    template = get_template(config.model.template)
    tokenizer = load_tokenizer(config.tokenizer_name_or_path, template)
    try:
        manifest = check_prepared(config, template, tokenizer)
    except DataError as exc:
        raise DataError(f"{exc} Run: {prepare_command}") from exc
    split = PreparedSplit(Path(config.data.prepared_dir) / TRAIN_SPLIT)
    loader = Loader(config, split, rank=backend.rank, world_size=backend.world_size)
    schedule = _Schedule.of(config, loader)
    _refuse_used_run(config)

    start_process(config.engine, backend)
    model = load_model(config.model, tokenizer, backend, seed=config.run.seed)
    peak_lr = _peak_lr(config, model.config, split, schedule)
    engine = build_engine(config, WeightedLoss(model, len(config.data.sources)), backend)
    state = _resume(config, engine, backend, loader, manifest)
    log.info("training %s: %d steps of %d rows x %d tokens, %.2f M parameters, peak learning rate %.3g",
             config.run.name, schedule.total_steps, config.rows_per_step, config.batch.micro_batch_tokens,
             model.num_parameters() / 1e6, peak_lr)  # fmt: skip

    metrics_log = _open_run(config, from_step=state.step) if backend.rank == 0 else None
    with progress_bar("training", total=schedule.total_steps, unit="steps", done=state.step) as bar:
        for step, data_wait_s in _timed(_steps(loader, schedule, state)):
            began = time.perf_counter()
            lr = lr_at(state.step + 1, peak=peak_lr, total_steps=schedule.total_steps, scheduler=config.scheduler)
            result = engine.run_step(step, lr)
            timing = Timing(step_s=time.perf_counter() - began + data_wait_s, data_wait_s=data_wait_s)
            state = _after(state, step, schedule, loader)
            if metrics_log is not None:
                metrics = step_metrics(
                    config, result, step, timing, global_step=state.step, num_tokens=state.num_tokens, lr=lr,
                    epoch_steps=schedule.epoch_steps[step.epoch], world_size=backend.world_size,
                )  # fmt: skip
                if backend.device.type == "cuda":
                    metrics["memory/max_active_gib"] = _max_active_gib()
                metrics_log.write(metrics)
                bar.advance(1, _note(metrics))
            if _is_due(config, state, schedule):
                folder = config.run_dir / CHECKPOINTS_NAME
                keep_last = config.checkpoint.keep_last
                saved = save_checkpoint(folder, engine, state, rank=backend.rank, keep_last=keep_last)
                log.info("saved %s", saved)
    if metrics_log is not None:
        metrics_log.close()
    state_dict = engine.full_state_dict()
    folder = config.run_dir / EXPORT_NAME
    if backend.rank == 0:
        card = make_card(config, manifest, best_source=loader.best_source(), step=state.step)
        export_model(folder, model=model, state_dict=state_dict, tokenizer=tokenizer, card=card)
        log.info("exported %s (default condition %r)", folder, card.default_condition)
    return folder


@dataclass(frozen=True, slots=True, kw_only=True)
class _Schedule:
    """epoch_steps: steps of each epoch that is at least begun; total_steps: of the whole run."""

    epoch_steps: tuple[int, ...]
    total_steps: int

    @classmethod
    def of(cls, config: Config, loader: Loader) -> "_Schedule":
        limit = config.training.max_steps
        epoch_steps: list[int] = []
        for epoch in range(config.training.num_epochs):
            if limit is not None and sum(epoch_steps) >= limit:
                break
            epoch_steps.append(loader.plan(epoch).num_steps)
        total = sum(epoch_steps) if limit is None else min(limit, sum(epoch_steps))
        return cls(epoch_steps=tuple(epoch_steps), total_steps=total)


def _peak_lr(config: Config, hf_config: PreTrainedConfig, split: PreparedSplit, schedule: _Schedule) -> float:
    if config.optimizer.learning_rate != "auto":
        return config.optimizer.learning_rate
    supervised = float(split.column("num_supervised").sum()) / schedule.epoch_steps[0]
    rate, reason = auto_learning_rate(hf_config.model_type, hf_config.vocab_size, supervised)
    log.info("learning rate auto: %.4g = %s", rate, reason)
    return rate


def _refuse_used_run(config: Config) -> None:
    if config.checkpoint.resume == "never" and list_checkpoints(config.run_dir / CHECKPOINTS_NAME):
        raise CheckpointError(
            f"{config.run_dir} already has checkpoints. Set checkpoint.resume=auto to continue it, or another run.name."
        )


def _resume(config: Config, engine: TrainEngine, backend: Backend, loader: Loader, manifest: Manifest) -> TrainerState:
    """The state of the newest checkpoint, loaded into the engine; or the state of a run that has not begun."""
    checkpoints = list_checkpoints(config.run_dir / CHECKPOINTS_NAME)
    if not checkpoints:
        return TrainerState(
            step=0, epoch=0, epoch_step=0, num_tokens=0, world_size=backend.world_size,
            plan_digest=loader.plan(0).digest(), dataset_fingerprint=manifest.fingerprint,
        )  # fmt: skip
    state = read_state(checkpoints[-1], world_size=backend.world_size, dataset_fingerprint=manifest.fingerprint)
    if state.plan_digest != loader.plan(state.epoch).digest():
        raise CheckpointError(
            f"{checkpoints[-1]}: its packing plan is not this configuration's. "
            f"Restore run.seed and batch as they were (see {config.run_dir}/config.json), or start another run.name."
        )
    engine.load(checkpoints[-1])
    log.info("resumed %s: %d steps done", checkpoints[-1], state.step)
    return state


def _open_run(config: Config, *, from_step: int) -> MetricsLog:
    config.run_dir.mkdir(parents=True, exist_ok=True)
    save_config(config, config.run_dir)
    return MetricsLog(config, from_step=from_step)


def _steps(loader: Loader, schedule: _Schedule, state: TrainerState) -> Iterator[TrainStep]:
    """The steps that are left."""
    done, start = state.step, state.epoch_step
    for epoch in range(state.epoch, len(schedule.epoch_steps)):
        for step in loader.epoch(epoch, start):
            if done == schedule.total_steps:
                return
            done += 1
            yield step
        start = 0


def _timed(steps: Iterator[TrainStep]) -> Iterator[tuple[TrainStep, float]]:
    """Each step with the seconds spent waiting for it."""
    while True:
        began = time.perf_counter()
        step = next(steps, None)
        if step is None:
            return
        yield step, time.perf_counter() - began


def _after(state: TrainerState, step: TrainStep, schedule: _Schedule, loader: Loader) -> TrainerState:
    epoch, epoch_step = step.epoch, step.index + 1
    if epoch_step == schedule.epoch_steps[epoch]:
        epoch, epoch_step = epoch + 1, 0
    return TrainerState(
        step=state.step + 1,
        epoch=epoch,
        epoch_step=epoch_step,
        num_tokens=state.num_tokens + step.num_tokens,
        world_size=state.world_size,
        plan_digest=loader.plan(epoch).digest() if epoch_step == 0 else state.plan_digest,
        dataset_fingerprint=state.dataset_fingerprint,
    )


def _is_due(config: Config, state: TrainerState, schedule: _Schedule) -> bool:
    every_epochs, every_steps = config.checkpoint.save_every_epochs, config.checkpoint.save_every_steps
    by_epoch = every_epochs is not None and state.epoch_step == 0 and state.epoch % every_epochs == 0
    by_step = every_steps is not None and state.step % every_steps == 0
    return by_epoch or by_step or state.step == schedule.total_steps


def _max_active_gib() -> float:
    return torch.cuda.memory_stats()["active_bytes.all.peak"] / 2**30


def _dtype_name(backend: Backend) -> str:
    return str(backend.dtype).removeprefix("torch.")


def _note(metrics: dict[str, float]) -> str:
    loss = metrics.get("train/loss", float("nan"))
    return (
        f"loss {loss:.4f}  lr {metrics['train/learning_rate']:.2e}  {metrics['perf/tokens_per_second']:,.0f} tokens/s"
    )
