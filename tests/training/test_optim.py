"""Schedule and automatic learning rate against the original's numbers."""

import json
from pathlib import Path

import pytest
import torch

from ochat.config import OptimizerConfig, SchedulerConfig
from ochat.errors import ConfigError
from ochat.training.optim import auto_learning_rate, build_optimizer, lr_at

# SPEC.md section 6, by hand: 10 steps, warm-up round(0.2 x 10) = 2, then 8 steps of cosine down to 10 %.
BY_HAND = {1: 0.5, 2: 1.0, 6: 0.55, 10: 0.1}


def test_cosine_warms_up_halves_and_ends_at_its_floor():
    scheduler = SchedulerConfig(warmup_ratio=0.2, min_lr_ratio=0.1)

    for step, multiplier in BY_HAND.items():
        assert lr_at(step, peak=2.0, total_steps=10, scheduler=scheduler) == pytest.approx(2.0 * multiplier)


def test_linear_and_constant_share_the_warm_up():
    for kind, at_six in (("linear", 0.55), ("constant", 1.0)):
        scheduler = SchedulerConfig(type=kind, warmup_ratio=0.2, min_lr_ratio=0.1)
        assert lr_at(1, peak=1.0, total_steps=10, scheduler=scheduler) == pytest.approx(0.5)
        assert lr_at(6, peak=1.0, total_steps=10, scheduler=scheduler) == pytest.approx(at_six)


def test_the_originals_schedule_step_by_step(shared: Path):
    for case in json.loads((shared / "golden/lr_schedule.json").read_text()):
        scheduler = SchedulerConfig(warmup_ratio=case["warmup_ratio"], min_lr_ratio=case["min_ratio"])
        ours = [
            lr_at(step, peak=1.0, total_steps=case["total_steps"], scheduler=scheduler)
            for step in range(1, case["total_steps"] + 1)
        ]
        assert ours == pytest.approx(case["multipliers"], abs=1e-12)
        assert ours[1:] != pytest.approx(case["multipliers"][:-1], abs=1e-12)  # one step off is seen


@pytest.mark.parametrize(
    ("original", "family", "vocab_size"),
    [
        ("openchat_v3.2", "llama", 32_000),
        ("openchat_v3.2_mistral", "mistral", 32_002),
        ("openchat_3.6", "llama", 128_256),
    ],
)
def test_the_originals_automatic_learning_rates(shared: Path, original: str, family: str, vocab_size: int):
    cases = [c for c in json.loads((shared / "golden/auto_lr.json").read_text()) if c["model_type"] == original]

    assert len(cases) == 4
    for case in cases:
        supervised = case["world_size"] * case["batch_max_len"] * case["supervised_ratio"]
        rate, _ = auto_learning_rate(family, vocab_size, supervised)
        assert rate == pytest.approx(case["lr"], rel=1e-12)


def test_automatic_learning_rate_shows_its_numbers():
    rate, reason = auto_learning_rate("mistral", 32_001, 250_000)

    assert rate == pytest.approx(3e-4 / 6 * 0.25)
    assert reason == "0.0003 / 6 (mistral) x sqrt(250,000 supervised tokens a step / 4,000,000)"


def test_an_unknown_family_must_give_a_number():
    with pytest.raises(ConfigError, match=r"optimizer.learning_rate: auto knows mistral, llama-3, llama-2, not 'gpt2'"):
        auto_learning_rate("gpt2", 50_000, 1e5)


def test_adam_gets_the_configured_numbers():
    optimizer = build_optimizer(torch.nn.Linear(2, 2), OptimizerConfig(betas=(0.8, 0.9), eps=1e-3), fused=False)

    assert optimizer.defaults["betas"] == (0.8, 0.9)
    assert optimizer.defaults["eps"] == 1e-3


def test_matrices_decay_and_vectors_do_not():
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3))
    optimizer = build_optimizer(model, OptimizerConfig(weight_decay=0.1), fused=False)

    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {name: decay[id(p)] for name, p in model.named_parameters()} == {
        "0.weight": 0.1,
        "0.bias": 0.0,
        "1.weight": 0.0,
        "1.bias": 0.0,
    }
