"""The doctor's checks of the run: model, steps, learning rate, tracking, run folder. Facts in, findings out."""

import importlib.util
import json
import math
import netrc
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ochat.backend import Backend
from ochat.config import Config
from ochat.data.schedule import make_schedule
from ochat.doctor_facts import Facts, Finding, Sample, unchecked
from ochat.errors import CheckpointError, ConfigError, DataError, OchatError
from ochat.hub_names import located
from ochat.training.optim import auto_learning_rate
from ochat.training.setup import how_to_go_on
from ochat.training.state import CHECKPOINTS_NAME

FEW_STEPS = 10
WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")
INDEX_NAME = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """supervised_tokens: of a step. estimated: from samples, not from the plan of the prepared dataset."""

    total: int
    per_epoch: int
    supervised_tokens: float
    estimated: bool


def check_backend(facts: Facts) -> Finding:
    name = "backend"
    if isinstance(facts.backend, OchatError) or isinstance(facts.here, OchatError):
        error = facts.backend if isinstance(facts.backend, OchatError) else facts.here
        return Finding(name=name, status="fail", found=str(error), fix="Change the engine section as it says.")
    here = f"this machine: {_describe(facts.here)} ({facts.here.reason})"
    if facts.plan.elsewhere:
        return Finding(
            name=name, status="ok",
            found=f"{here}; planned for {facts.plan.num_processes} GPU(s) in {facts.backend.dtype_name}, taken to be "
            f"Ampere or later",
        )  # fmt: skip
    return Finding(name=name, status="ok", found=f"{here}; {facts.plan.num_processes} process(es)")


def _describe(backend: Backend) -> str:
    return f"{backend.device} {backend.dtype_name}, {backend.attention}"


def check_model(facts: Facts) -> Finding:
    name = "base model"
    settings = facts.config.model
    if isinstance(facts.tokenizer, OchatError) or isinstance(facts.backend, OchatError):
        return unchecked(name, "tokenizer and backend")
    if isinstance(facts.model, OchatError):
        fix = "Set model.name_or_path to a folder or hub name of a Llama or Mistral model; overrides must suit it."
        return Finding(name=name, status="fail", found=str(facts.model), fix=fix)
    found = f"{settings.name_or_path}: {facts.model.config.model_type}, {facts.model.num_parameters():,} parameters"
    if settings.init == "random":
        return Finding(name=name, status="ok", found=f"{found}, drawn at random (model.init)")
    folder = Path(located(settings.name_or_path))
    if missing := folder.is_dir() and _missing_weights(folder):
        return Finding(
            name=name, status="fail", found=f"{found}, but in {folder} there is no {missing}",
            fix="Fetch all of the weights, or set model.init=random for an untrained model.",
        )  # fmt: skip
    return Finding(name=name, status="ok", found=found)


def _missing_weights(folder: Path) -> str:
    """The file of weights that is not there, of those that the index names; empty when all are."""
    if not any(file for pattern in WEIGHT_FILES for file in folder.glob(pattern)):
        return " nor ".join(WEIGHT_FILES)
    index = folder / INDEX_NAME
    named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()) if index.is_file() else set()
    return ", ".join(sorted(name for name in named if not (folder / name).is_file()))


def check_rows(facts: Facts) -> Finding:
    """Every process takes the same number of a step's rows."""
    rows, processes = facts.config.rows_per_step, facts.plan.num_processes
    found = f"a step has {rows} rows of {facts.config.batch.micro_batch_tokens:,} tokens"
    if rows % processes:
        return Finding(
            name="rows per step", status="fail", found=f"{found}, which {processes} processes cannot share",
            fix=f"Use {', '.join(str(n) for n in range(1, rows + 1) if rows % n == 0)} processes, or set "
            f"batch.global_batch_tokens={facts.config.batch.micro_batch_tokens * processes}.",
        )  # fmt: skip
    found = f"{found}: {rows // processes} for each of {processes} process(es)"
    return Finding(name="rows per step", status="ok", found=found)


def count_steps(facts: Facts) -> Steps | None:
    """From the plan training would use, or from the samples; None when neither is to be had."""
    if not isinstance(facts.fresh, OchatError):
        loader = facts.fresh.loader
        return Steps(
            total=loader.schedule.total_steps,
            per_epoch=loader.schedule.epoch_steps[0],
            supervised_tokens=loader.supervised_tokens_per_step(),
            estimated=False,
        )
    samples = [sample for sample in facts.samples.values() if isinstance(sample, Sample)]
    sizes_known = all(sample.num_conversations is not None for sample in samples)
    if len(samples) < len(facts.samples) or not sizes_known or not any(sample.counts.kept for sample in samples):
        return None
    return _estimate_steps(facts.config, samples)


def _estimate_steps(config: Config, samples: list[Sample]) -> Steps:
    """From the samples' mean lengths: packing leaves next to nothing free."""
    tokens, supervised = 0.0, 0.0
    for source, sample in zip(config.data.sources, samples, strict=True):
        chats = source.repeat * (sample.num_conversations or 0) / max(1, sample.counts.read)
        tokens += chats * sample.counts.tokens
        supervised += chats * sample.counts.supervised_tokens
    per_epoch = max(1, math.ceil(tokens / config.batch.global_batch_tokens))
    return Steps(
        total=make_schedule(config.training, lambda epoch: per_epoch).total_steps,
        per_epoch=per_epoch,
        supervised_tokens=supervised / per_epoch,
        estimated=True,
    )


def check_schedule(facts: Facts) -> Iterator[Finding]:
    """How many steps, and the learning rate that follows from them."""
    steps = count_steps(facts)
    yield _check_steps(facts, steps)
    yield _check_learning_rate(facts, steps)


def _check_steps(facts: Facts, steps: Steps | None) -> Finding:
    name = "steps"
    if isinstance(facts.fresh, DataError) and not isinstance(facts.manifest, OchatError):
        return Finding(
            name=name, status="fail", found=str(facts.fresh), fix="Correct weights or rewards in data.sources."
        )
    if steps is None:
        return unchecked(name, "chat files that can be read and counted, or a prepared dataset")
    found = (
        f"{steps.total:,} steps ({steps.per_epoch:,} an epoch, training.num_epochs={facts.config.training.num_epochs}, "
        f"max_steps={facts.config.training.max_steps}), {steps.supervised_tokens:,.0f} supervised tokens a step"
    )
    if steps.estimated:
        found = f"about {found}; an estimate from the samples, exact once prepared"
    if steps.total < FEW_STEPS:
        fix = "Lower batch.global_batch_tokens or raise training.num_epochs."
        return Finding(name=name, status="warn", found=f"{found}: fewer than {FEW_STEPS} updates", fix=fix)
    return Finding(name=name, status="ok", found=found)


def _check_learning_rate(facts: Facts, steps: Steps | None) -> Finding:
    name = "learning rate"
    configured, scheduler = facts.config.optimizer.learning_rate, facts.config.scheduler
    warmup = f", warm-up {scheduler.warmup_ratio:.0%} of the steps"
    if configured != "auto":
        return Finding(name=name, status="ok", found=f"peak {configured:.3g}, as configured; {scheduler.type}{warmup}")
    if isinstance(facts.model, OchatError) or steps is None:
        return unchecked(name, "for `auto` the base model's shape and the supervised tokens of a step")
    model = facts.model.config
    try:
        rate, reason = auto_learning_rate(model.model_type, model.vocab_size, steps.supervised_tokens)
    except ConfigError as exc:
        return Finding(name=name, status="fail", found=str(exc), fix="Set optimizer.learning_rate to a number.")
    about = "about " if steps.estimated else ""
    return Finding(name=name, status="ok", found=f"auto: peak {about}{rate:.3g} = {reason}; {scheduler.type}{warmup}")


def check_wandb(facts: Facts) -> Finding:
    name = "W&B"
    settings = facts.config.tracking.wandb
    if settings is None:
        return Finding(name=name, status="ok", found="off (tracking.wandb); metrics.jsonl and the console only")
    if importlib.util.find_spec("wandb") is None:
        return Finding(name=name, status="fail", found="wandb is not installed", fix="pip install wandb")
    if settings.mode == "offline":
        return Finding(
            name=name, status="ok", found=f"offline into {facts.config.run_dir}; `wandb sync` sends it later"
        )
    if _has_wandb_key():
        return Finding(name=name, status="ok", found=f"online, project {settings.project}; a key is there, not tried")
    return Finding(
        name=name, status="fail", found=f"online, project {settings.project}, but this account has no key",
        fix="Run `wandb login`, or set tracking.wandb.mode=offline.",
    )  # fmt: skip


def _has_wandb_key() -> bool:
    """Where wandb itself looks; the environment belongs to it, not to our configuration."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    path = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").partition("://")[2].partition("/")[0]
    try:
        return path.is_file() and netrc.netrc(path).authenticators(host) is not None
    except netrc.NetrcParseError:
        return False


def check_run_folder(facts: Facts) -> Finding:
    """What training would do with the run folder: the words are those of training's own refusal."""
    name, run_dir = "run folder", facts.config.run_dir
    if isinstance(facts.setup, CheckpointError):
        return Finding(name=name, status="fail", found=str(facts.setup), fix="Do as it says, or set another run.name.")
    if isinstance(facts.setup, OchatError):
        begun = (run_dir / CHECKPOINTS_NAME).is_dir()
        found = "holds checkpoints; whether they fit is not known before preparing" if begun else "fresh"
        status = "warn" if begun else "ok"
        fix = f"Run: {facts.plan.prepare_command}" if begun else ""
        return Finding(name=name, status=status, found=f"{run_dir}: {found}", fix=fix)  # type: ignore[arg-type]
    if facts.setup.checkpoint is None:
        return Finding(name=name, status="ok", found=f"{run_dir}: fresh, begins at step 1")
    step, total = facts.setup.state.step, facts.setup.loader.schedule.total_steps
    if step == total:
        return Finding(
            name=name, status="warn", found=f"{run_dir}: finished, all {total:,} steps are done",
            fix=f"{how_to_go_on(facts.config.training, facts.setup.loader.schedule)}, or choose another run.name.",
        )  # fmt: skip
    return Finding(name=name, status="ok", found=f"{run_dir}: resumes after step {step:,} of {total:,}")
