"""One experiment, trained by every engine and every split over processes and micro-batches: the same numbers."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ochat.data.prepare import prepare
from tests.experiment import make_experiment
from tests.launch import ALONE, ROOT, free_port, run

WORKER = ROOT / "tests" / "training" / "train_many.py"
STEPS = "training.max_steps=4 checkpoint.save_every_steps=2 checkpoint.keep_last=9"
# With an enormous eps Adam's first update is lr / eps x gradient: the exported weights show the gradient itself.
GRADIENT = (
    "training.max_steps=1 optimizer.eps=1e4 optimizer.learning_rate=1e4 optimizer.weight_decay=0 "
    "optimizer.max_grad_norm=1e6 scheduler.warmup_ratio=0 scheduler.type=constant"
)
ENGINES = {
    "torch": "engine.type=torch",
    "stage0": "engine.zero_stage=0",
    "stage1": "engine.zero_stage=1",
    "stage2": "engine.zero_stage=2",
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """RUNS/NAME for every variant: 1 process with 4 micro-batches a step, and 2 processes with 2 each."""
    folder = tmp_path_factory.mktemp("engines")
    prepare(make_experiment(folder))
    path = folder / "experiment.yaml"
    single = [f"run.name={kind}-{name} {engine} {extra}"
              for kind, extra in (("steps", STEPS), ("gradient", GRADIENT))
              for name, engine in ENGINES.items()]  # fmt: skip
    single.append(f"run.name=gradient-unweighted engine.type=torch data.sources.1.weight=1.0 {GRADIENT}")
    single += [f"after=steps-{name}@2 run.name=resumed-{name} {engine} {STEPS}" for name, engine in ENGINES.items()]
    single.append(f"run.name=bf16-1 engine.dtype=bf16 engine.zero_stage=1 {STEPS}")
    single.append(f"run.name=bf16-2 engine.dtype=bf16 engine.zero_stage=2 {STEPS}")
    double = [
        variant.replace("run.name=", "run.name=two-").replace("after=", "after=two-")
        for variant in single
        if "engine.type=torch" not in variant
    ]
    done = run("python", WORKER, path, *single, env={**ALONE, "MASTER_PORT": free_port()})
    assert done.returncode == 0, done.stderr[-3000:]
    done = run("deepspeed", "--num_accelerators", 2, "--master_port", free_port(), WORKER, path, *double)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder / "runs"


def column(run_dir: Path, name: str) -> list[float]:
    return [json.loads(line)[name] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "export" / "model.safetensors")


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name].float() - b[name].float()).abs().max()) for name in a)


SPLITS = ["steps-stage0", "steps-stage1", "steps-stage2", "two-steps-stage0", "two-steps-stage1", "two-steps-stage2"]


@pytest.mark.parametrize("name", SPLITS)
def test_every_engine_and_split_logs_the_reference_curve(runs: Path, name: str):
    for metric in ("train/loss", "train/objective", "train/grad_norm", "train/loss/expert", "train/loss/crowd"):
        assert column(runs / name, metric) == pytest.approx(column(runs / "steps-torch", metric), rel=1e-5), metric


@pytest.mark.parametrize("name", SPLITS)
def test_every_engine_and_split_ends_at_the_reference_weights(runs: Path, name: str):
    assert largest_difference(weights(runs / name), weights(runs / "steps-torch")) < 1e-5


@pytest.mark.parametrize("name", [n.replace("steps", "gradient") for n in SPLITS])
def test_gradients_do_not_depend_on_engine_processes_or_micro_batches(runs: Path, name: str):
    assert largest_difference(weights(runs / name), weights(runs / "gradient-torch")) < 1e-6


def test_gradients_do_depend_on_the_weights(runs: Path):
    """The negative control: with the crowd at weight 1 instead of 0.1, the same comparison fails by far."""
    assert largest_difference(weights(runs / "gradient-unweighted"), weights(runs / "gradient-torch")) > 1e-3


@pytest.mark.parametrize(("split", "name"), [("", "torch"), *((s, n) for s in ("", "two-") for n in list(ENGINES)[1:])])
def test_a_run_killed_after_a_checkpoint_ends_bitwise_where_the_whole_run_does(runs: Path, split: str, name: str):
    whole, resumed = runs / f"{split}steps-{name}", runs / f"{split}resumed-{name}"

    assert column(resumed, "train/global_step") == [3, 4]
    assert column(resumed, "train/loss") == column(whole, "train/loss")[2:]
    assert column(resumed, "train/num_tokens") == column(whole, "train/num_tokens")[2:]
    assert largest_difference(weights(resumed), weights(whole)) == 0


def test_bf16_stages_agree_and_follow_the_fp32_curve(runs: Path):
    first = column(runs / "bf16-1", "train/loss")

    assert column(runs / "bf16-2", "train/loss") == pytest.approx(first, abs=1e-5)
    for name in ("bf16-1", "two-bf16-1", "two-bf16-2"):
        assert column(runs / name, "train/loss") == pytest.approx(column(runs / "steps-torch", "train/loss"), rel=1e-2)
