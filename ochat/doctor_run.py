"""The doctor's checks of the run: model, steps, learning rate, memory, disk, tracking. Facts in, findings out."""

import importlib.util
import netrc
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from ochat.backend import Backend
from ochat.config import Config
from ochat.data.packing import plan
from ochat.doctor_facts import Facts, Finding, Sample, unchecked
from ochat.errors import CheckpointError, ConfigError, OchatError
from ochat.memory import (
    MemoryEstimate,
    ModelShape,
    RunShape,
    checkpoint_bytes,
    estimate_memory,
    loading_bytes,
)
from ochat.training.loss import CHUNK_ELEMENTS
from ochat.training.optim import auto_learning_rate
from ochat.training.state import CHECKPOINTS_NAME

GIB = 2**30
PLANNED_ITEMS = 20_000  # an estimate packs at most so many conversations
GPUS_PER_NODE = 8
WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """supervised_tokens: of a step. estimated: from samples, not from the plan of the prepared dataset."""

    total: int
    per_epoch: int
    supervised_tokens: float
    estimated: bool


def check_backend(facts: Facts) -> Finding:
    name = "backend"
    if isinstance(facts.backend, OchatError):
        return Finding(name=name, status="fail", found=str(facts.backend), fix="Change the engine section.")
    if isinstance(facts.here, OchatError):
        return Finding(name=name, status="fail", found=str(facts.here), fix="Change the engine section.")
    here = f"this machine: {_describe(facts.here)} ({facts.here.reason})"
    if facts.plan.elsewhere:
        return Finding(
            name=name, status="ok",
            found=f"{here}; planned for {facts.plan.num_processes} GPU(s) in {_dtype_name(facts.backend)}, taken to be "
            f"Ampere or later",
        )  # fmt: skip
    return Finding(name=name, status="ok", found=f"{here}; {facts.plan.num_processes} process(es)")


def _describe(backend: Backend) -> str:
    return f"{backend.device} {_dtype_name(backend)}, {backend.attention}"


def _dtype_name(backend: Backend) -> str:
    return str(backend.dtype).removeprefix("torch.")


def check_model(facts: Facts) -> Finding:
    name = "base model"
    settings = facts.config.model
    if isinstance(facts.tokenizer, OchatError) or isinstance(facts.backend, OchatError):
        return unchecked(name, "tokenizer and backend")
    if isinstance(facts.model, OchatError):
        fix = "Fetch it (a machine with network, `hf download`), or give its folder as model.name_or_path."
        return Finding(name=name, status="fail", found=str(facts.model), fix=fix)
    found = f"{settings.name_or_path}: {facts.model.config.model_type}, {facts.model.num_parameters():,} parameters"
    if settings.init == "random":
        return Finding(name=name, status="ok", found=f"{found}, drawn at random (model.init)")
    folder = Path(settings.name_or_path)
    if folder.is_dir() and not any(file for pattern in WEIGHT_FILES for file in folder.glob(pattern)):
        return Finding(
            name=name, status="fail", found=f"{found}, but no weights ({', '.join(WEIGHT_FILES)}) in the folder",
            fix="Fetch the weights too, or set model.init=random for an untrained model.",
        )  # fmt: skip
    return Finding(name=name, status="ok", found=found)


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
        schedule = facts.fresh.schedule
        return Steps(
            total=schedule.total_steps,
            per_epoch=schedule.epoch_steps[0],
            supervised_tokens=facts.fresh.supervised_tokens_per_step,
            estimated=False,
        )
    samples = [sample for sample in facts.samples.values() if isinstance(sample, Sample)]
    if len(samples) < len(facts.samples) or not any(sample.counts.kept for sample in samples):
        return None
    return _estimate_steps(facts.config, samples)


def _estimate_steps(config: Config, samples: list[Sample]) -> Steps | None:
    """Pack conversations drawn from the samples, as many as the files hold or PLANNED_ITEMS, and scale up."""
    kept = [sample.num_conversations * sample.counts.kept / max(1, sample.counts.read) for sample in samples]
    scale = max(1.0, sum(kept) / PLANNED_ITEMS)
    rng = np.random.default_rng(config.run.seed)
    lengths = [
        rng.choice(sample.batch.column("input_ids").value_lengths().to_numpy(), max(1, round(number / scale)))
        for sample, number in zip(samples, kept, strict=True)
        if sample.counts.kept
    ]
    row_tokens, rows_per_step = config.batch.micro_batch_tokens, config.rows_per_step
    packed = plan(
        np.concatenate(lengths), row_tokens=row_tokens, rows_per_step=rows_per_step, seed=config.run.seed, epoch=0
    )
    per_epoch = max(1, -(-round(len(packed.rows) * scale) // rows_per_step))
    supervised = sum(
        number * sample.counts.supervised_tokens / max(1, sample.counts.kept)
        for sample, number in zip(samples, kept, strict=True)
    )
    total = per_epoch * config.training.num_epochs
    limit = config.training.max_steps
    return Steps(
        total=total if limit is None else min(limit, total),
        per_epoch=per_epoch,
        supervised_tokens=supervised / per_epoch,
        estimated=True,
    )


def check_steps(facts: Facts) -> Finding:
    name = "steps"
    steps = count_steps(facts)
    if steps is None:
        if isinstance(facts.fresh, OchatError) and not isinstance(facts.manifest, OchatError):
            return Finding(name=name, status="fail", found=str(facts.fresh), fix="Mend the data, the weights or batch.")
        return unchecked(name, "readable chat files")
    found = (
        f"{steps.total:,} steps ({steps.per_epoch:,} an epoch, training.num_epochs={facts.config.training.num_epochs}, "
        f"max_steps={facts.config.training.max_steps}), {steps.supervised_tokens:,.0f} supervised tokens a step"
    )
    if steps.estimated:
        found = f"about {found}; an estimate from the samples, exact once prepared"
    if steps.total < 10:
        fix = "Lower batch.global_batch_tokens or raise training.num_epochs."
        return Finding(name=name, status="warn", found=f"{found}: fewer than 10 updates", fix=fix)
    return Finding(name=name, status="ok", found=found)


def check_learning_rate(facts: Facts) -> Finding:
    name = "learning rate"
    configured = facts.config.optimizer.learning_rate
    steps = count_steps(facts)
    warmup = f", warm-up {round(facts.config.scheduler.warmup_ratio * steps.total):,} steps" if steps else ""
    shape = f"{facts.config.scheduler.type}{warmup}"
    if configured != "auto":
        return Finding(name=name, status="ok", found=f"peak {configured:.3g}, as configured; {shape}")
    if isinstance(facts.model, OchatError) or steps is None:
        return unchecked(name, "for `auto` the base model's shape and the supervised tokens of a step")
    model = facts.model.config
    try:
        rate, reason = auto_learning_rate(model.model_type, model.vocab_size, steps.supervised_tokens)
    except ConfigError as exc:
        return Finding(name=name, status="fail", found=str(exc), fix="Set optimizer.learning_rate to a number.")
    about = "about " if steps.estimated else ""
    return Finding(name=name, status="ok", found=f"auto: peak {about}{rate:.3g} = {reason}; {shape}")


def check_memory(facts: Facts) -> Finding:
    """The estimate for one process against the room it has, and what to change when that is too little."""
    on_gpu = facts.plan.on_gpu
    name = "GPU memory" if on_gpu else "memory to train"
    if isinstance(facts.model, OchatError) or isinstance(facts.backend, OchatError):
        return unchecked(name, "the base model's shape")
    model, run = model_shape(facts), run_shape(facts)
    room = facts.plan.gpu_memory_gib * GIB if on_gpu else host_memory_bytes() / run.num_processes
    estimate = estimate_memory(model, run)
    found = (
        f"about {_gib(estimate.total)} of {_gib(room)} a process (an estimate): {_parts(estimate)}; assumes "
        f"{run.num_processes} process(es), {_dtype_name(facts.backend)}, "
        f"{_engine(facts.config)}, rows of {run.row_tokens:,} tokens all supervised, gradient checkpointing "
        f"{'on' if run.gradient_checkpointing else 'off'}, fused attention, no fragmentation"
    )
    if estimate.total <= 0.9 * room:
        return Finding(name=name, status="ok", found=found)
    fixes = list(_what_would_fit(facts.config, model, run, 0.9 * room))
    fix = f"One of: {'; '.join(fixes)}." if fixes else "A smaller model, or more and larger GPUs."
    if not on_gpu:
        fix += " Or plan for GPUs: --num-gpus N."
    status = "fail" if estimate.total > room else "warn"
    return Finding(name=name, status=status, found=found, fix=fix)  # type: ignore[arg-type]


def model_shape(facts: Facts) -> ModelShape:
    assert not isinstance(facts.model, OchatError)
    model, config = facts.model, facts.model.config
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return ModelShape(
        num_parameters=model.num_parameters(),
        largest_parameter=max(parameter.numel() for parameter in model.parameters()),
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        query_size=config.num_attention_heads * head_size,
        key_size=config.num_key_value_heads * head_size,
        num_heads=config.num_attention_heads,
        mlp_size=config.intermediate_size,
        vocab_size=config.vocab_size,
    )


def run_shape(facts: Facts) -> RunShape:
    assert not isinstance(facts.backend, OchatError)
    config = facts.config
    return RunShape(
        deepspeed=config.engine.type == "deepspeed",
        zero_stage=config.engine.zero_stage,
        num_processes=facts.plan.num_processes,
        param_bytes=torch.finfo(facts.backend.dtype).bits // 8,
        gradient_checkpointing=config.model.gradient_checkpointing,
        row_tokens=config.batch.micro_batch_tokens,
        chunk_elements=CHUNK_ELEMENTS,
        on_gpu=facts.plan.on_gpu,
    )


def _what_would_fit(config: Config, model: ModelShape, run: RunShape, room: float) -> Iterator[str]:
    """Single changes after which the estimate is within `room`, the cheapest first."""
    changes = [("model.gradient_checkpointing=true", replace(run, gradient_checkpointing=True))]
    if run.deepspeed:
        changes.append(("engine.zero_stage=2", replace(run, zero_stage=2)))
    both = replace(run, gradient_checkpointing=True, zero_stage=2)
    tokens = run.row_tokens // 2
    while tokens >= config.model.max_length:
        changes.append((f"batch.micro_batch_tokens={tokens}", replace(run, row_tokens=tokens)))
        tokens //= 2
    if run.deepspeed:
        for processes in (2**n for n in range(1, 8)):
            if processes > run.num_processes:
                changes.append(
                    (f"{processes} GPUs with ZeRO-2 and checkpointing", replace(both, num_processes=processes))
                )
    kinds = set()
    for text, changed in changes:
        kind = text.split("=")[0].lstrip("0123456789 ")
        if changed != run and kind not in kinds and estimate_memory(model, changed).total <= room:
            kinds.add(kind)
            yield text


def _parts(estimate: MemoryEstimate) -> str:
    names = ("parameters", "gradients", "optimizer", "buckets", "activations", "working", "overhead")
    return ", ".join(f"{name} {_gib(getattr(estimate, name))}" for name in names if getattr(estimate, name))


def _engine(config: Config) -> str:
    return f"ZeRO-{config.engine.zero_stage}" if config.engine.type == "deepspeed" else "the torch engine"


def host_memory_bytes() -> int:
    """This machine's memory, not what is free of it just now."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_host_memory(facts: Facts) -> Finding:
    name = "host memory"
    if isinstance(facts.model, OchatError) or isinstance(facts.backend, OchatError):
        return unchecked(name, "the base model's shape")
    run, processes = run_shape(facts), min(facts.plan.num_processes, GPUS_PER_NODE)
    random_init = facts.config.model.init == "random"
    needed = loading_bytes(
        facts.model.num_parameters(), run.param_bytes, processes_on_node=processes, random_init=random_init
    )
    found = (
        f"{_gib(needed)} to load the model in {processes} process(es) of a node, this machine has "
        f"{_gib(host_memory_bytes())}"
    )
    if needed <= host_memory_bytes():
        return Finding(name=name, status="ok", found=found)
    if facts.plan.elsewhere:
        fix = "Check the node that will train, or start fewer processes on each."
        return Finding(name=name, status="warn", found=found, fix=fix)
    return Finding(name=name, status="fail", found=found, fix="Start fewer processes on each node.")


def check_disk(facts: Facts) -> Finding:
    name = "disk"
    config, run_dir = facts.config, facts.config.run_dir
    if isinstance(facts.model, OchatError) or isinstance(facts.backend, OchatError):
        return unchecked(name, "the base model's shape")
    run, parameters = run_shape(facts), facts.model.num_parameters()
    only_last = config.checkpoint.save_every_epochs is None and config.checkpoint.save_every_steps is None
    number = 1 if only_last else config.checkpoint.keep_last + 1  # the new one is whole before the oldest goes
    one, export = checkpoint_bytes(parameters, run), parameters * run.param_bytes
    there = sum(file.stat().st_size for file in (run_dir / CHECKPOINTS_NAME).rglob("*") if file.is_file())
    needed = max(0, number * one - there) + export
    place = next(folder for folder in (run_dir, *run_dir.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(place).free
    found = (
        f"{_gib(needed)} for {number} checkpoint(s) of {_gib(one)} and an export of {_gib(export)}; "
        f"{_gib(free)} free at {place}"
    )
    if needed <= free:
        return Finding(name=name, status="ok", found=found)
    fix = "Set run.output_dir to a larger disk, or lower checkpoint.keep_last."
    return Finding(name=name, status="fail", found=found, fix=fix)


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
        return Finding(name=name, status="fail", found=str(facts.setup), fix="See there, or choose another run.name.")
    if isinstance(facts.setup, OchatError):
        begun = (run_dir / CHECKPOINTS_NAME).is_dir()
        found = "holds checkpoints; whether they fit is not known before preparing" if begun else "fresh"
        status = "warn" if begun else "ok"
        fix = f"Run: {facts.plan.prepare_command}" if begun else ""
        return Finding(name=name, status=status, found=f"{run_dir}: {found}", fix=fix)  # type: ignore[arg-type]
    if facts.setup.checkpoint is None:
        return Finding(name=name, status="ok", found=f"{run_dir}: fresh, begins at step 1")
    step, total = facts.setup.state.step, facts.setup.schedule.total_steps
    if step == total:
        return Finding(
            name=name, status="warn", found=f"{run_dir}: finished, all {total:,} steps are done",
            fix="Raise training.num_epochs or training.max_steps to go on, or choose another run.name.",
        )  # fmt: skip
    return Finding(name=name, status="ok", found=f"{run_dir}: resumes after step {step:,} of {total:,}")


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.1f} GiB" if num_bytes >= GIB / 10 else f"{num_bytes / 2**20:.1f} MiB"
