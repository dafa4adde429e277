"""Checkpoints of a run: whole or not there.

    RUN/checkpoints/step-00000060/   engine files of every rank, and trainer.json, written last

A checkpoint is filled under a hidden name and renamed when every rank is done.
"""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.distributed as dist

from ochat.errors import CheckpointError
from ochat.training.engine import TrainEngine

STATE_NAME = "trainer.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerState:
    """Where a run stands after a step.

    step           optimizer steps done
    epoch          the epoch of the next step, from 0; epoch_step is its index in it
    num_tokens     non-padding tokens so far
    plan_digest    of that epoch's packing plan: another plan would feed other data
    """

    step: int
    epoch: int
    epoch_step: int
    num_tokens: int
    world_size: int
    plan_digest: str
    dataset_fingerprint: str


def save_checkpoint(folder: Path, engine: TrainEngine, state: TrainerState, *, rank: int, keep_last: int) -> Path:
    """Save into `folder`, then drop all but the newest `keep_last`. Every rank calls it."""
    final = folder / f"step-{state.step:08d}"
    partial = folder / f".{final.name}"
    if rank == 0:
        for left_over in (partial, final):
            shutil.rmtree(left_over, ignore_errors=True)
        partial.mkdir(parents=True)
    _barrier()
    engine.save(partial)
    _barrier()
    if rank == 0:
        (partial / STATE_NAME).write_text(json.dumps(asdict(state), indent=2) + "\n", encoding="utf-8")
        partial.rename(final)
        for old in list_checkpoints(folder)[:-keep_last]:
            shutil.rmtree(old)
    _barrier()
    return final


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path.parent for path in folder.glob(f"step-*/{STATE_NAME}"))


def read_state(checkpoint: Path, *, world_size: int, dataset_fingerprint: str) -> TrainerState:
    """The state of a checkpoint, refused when it cannot be continued exactly from here."""
    state = TrainerState(**json.loads((checkpoint / STATE_NAME).read_text(encoding="utf-8")))
    if state.world_size != world_size:
        raise CheckpointError(
            f"{checkpoint}: saved by {state.world_size} processes, this run has {world_size}. "
            f"Continue on {state.world_size}, or start another run.name."
        )
    if state.dataset_fingerprint != dataset_fingerprint:
        raise CheckpointError(
            f"{checkpoint}: trained on dataset {state.dataset_fingerprint[:12]}, data.prepared_dir now holds "
            f"{dataset_fingerprint[:12]}. Prepare the old data again, or start another run.name."
        )
    return state


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
