"""One step's metrics from its sums, by hand."""

from pathlib import Path

import pytest

from ochat.data.loader import TrainStep
from ochat.training.engine import StepResult
from ochat.training.loss import LossSums
from ochat.training.metrics import StepContext, step_metrics
from tests.experiment import make_experiment


def test_every_metric_of_a_step(tmp_path: Path):
    sums = LossSums(
        loss=6.0, correct=3.0, weight=4.0, num_supervised=12.0, source_loss=(5.0, 1.0), source_weight=(3.0, 1.0)
    )
    step = TrainStep(index=1, epoch=2, batches=(), loss_denominator=8.0, num_tokens=100, fill=0.5)
    context = StepContext(
        global_step=7, epoch=2.5, num_tokens=700, learning_rate=1e-3, step_s=2.0, data_wait_s=0.5, world_size=4
    )

    metrics = step_metrics(make_experiment(tmp_path), StepResult(sums=sums, grad_norm=0.25), step, context)

    assert metrics == pytest.approx(
        {
            "train/global_step": 7,
            "train/loss": 6 / 4,
            "train/objective": 6 / 8,
            "train/mean_token_accuracy": 3 / 12,
            "train/loss/expert": 5 / 3,
            "train/loss/crowd": 1.0,
            "train/weight_share/expert": 3 / 4,
            "train/weight_share/crowd": 1 / 4,
            "train/learning_rate": 1e-3,
            "train/grad_norm": 0.25,
            "train/epoch": 2.5,
            "train/num_tokens": 700,
            "perf/tokens_per_second": 50,
            "perf/tokens_per_second_per_gpu": 12.5,
            "perf/packing_efficiency": 0.5,
            "perf/data_wait_fraction": 0.25,
        }
    )
