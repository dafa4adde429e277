"""The recipes end to end. Slow: each runs the commands that its file's head tells the user to run."""

import json
from pathlib import Path
from statistics import mean

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.launch import ROOT, free_port, run

ALPACAEVAL = "configs/alpacaeval-10m.yaml"


@pytest.mark.slow
@pytest.mark.xdist_group("whole machine")
def test_real_chats_train_under_zero_2_and_the_export_generates_through_its_own_template(shared: Path, tmp_path: Path):
    here = (f"run.output_dir={tmp_path}/runs", f"data.prepared_dir={tmp_path}/prepared")
    done = run("ochat", "prepare", ALPACAEVAL, *here)
    assert done.returncode == 0, done.stderr
    done = run("deepspeed", "--num_accelerators", 2, "--master_port", free_port(), "--module", "ochat.training.train",
               "--config", ALPACAEVAL, *here, timeout=1800)  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    run_dir = tmp_path / "runs/alpacaeval-10m"
    logged = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert len(logged) == 60
    for source in ("strong", "weak"):
        losses = [line[f"train/loss/{source}"] for line in logged if f"train/loss/{source}" in line]
        assert mean(losses[-5:]) < 0.8 * mean(losses[:5]), source

    tokenizer = PreTrainedTokenizerFast.from_pretrained(run_dir / "export")
    model = AutoModelForCausalLM.from_pretrained(run_dir / "export")
    assert 8e6 < model.num_parameters() < 12e6
    assert model.config.vocab_size == len(tokenizer) == 32_001
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Name a colour."}],
        add_generation_prompt=True, condition="GPT3", return_tensors="pt",
    )  # fmt: skip
    assert tokenizer.decode(prompt["input_ids"][0]).startswith("<s> GPT3 User: Name a colour.<|end_of_turn|>")
    with torch.inference_mode():
        output = model.generate(**prompt, max_new_tokens=5, do_sample=False)
    assert output.shape[1] > prompt["input_ids"].shape[1]


@pytest.mark.slow
@pytest.mark.xdist_group("whole machine")
def test_the_demo_shows_c_rlft(tmp_path: Path):
    done = run("python", "-m", "scripts.sums.demo", "--folder", tmp_path, timeout=900)

    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert (tmp_path / "runs/demo-sums/loss.png").stat().st_size > 10_000
    assert "200 held-out sums" in done.stdout


def test_every_recipe_names_itself_in_its_commands():
    for path in (ROOT / "configs").glob("*.yaml"):
        head = [line for line in path.read_text().splitlines() if line.startswith("#")]
        assert any(f"configs/{path.name}" in line for line in head), path.name
