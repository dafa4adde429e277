"""Each finding that says no is provoked, beside the same experiment where it says yes."""

import json
import shutil
import socket
import time
from collections import namedtuple
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, PreTrainedTokenizerFast

from ochat import doctor_facts, doctor_room, doctor_text
from ochat.config import Config
from ochat.data.prepare import prepare
from ochat.data.tokenize import _encoder
from ochat.doctor import examine
from ochat.doctor_facts import Finding, gather
from ochat.doctor_room import host_memory_bytes
from ochat.doctor_run import check_schedule
from ochat.training.optim import auto_learning_rate
from tests.experiment import TOKENIZERS, make_experiment, write_experiment
from tests.launch import run

GPT2 = '{"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 1, "vocab_size": 32}'


@pytest.fixture(autouse=True)
def anywhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Neither the W&B key nor the GPU of whoever runs the tests."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def look(config: Config, name: str, **options) -> Finding:
    """The finding of that name."""
    return next(finding for finding in examine(config, **options) if finding.name == name)


def write_rows(path: Path, rows: list[object]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def chat(question: str, answer: str, **extra: object) -> dict[str, object]:
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}], **extra}


def save_checkpoint_of(config: Config, *, step: int, epoch: int = 0) -> None:
    """A checkpoint as training leaves it, as far as the doctor reads it; with an epoch, at its beginning."""
    fresh = gather(config, num_gpus=None, gpu_memory_gib=80.0, prepare_command="").setup
    position = {"epoch": epoch, "step": 0 if epoch else step, "plan": fresh.loader.epoch_plan(epoch).digest}
    folder = config.run_dir / f"checkpoints/step-{step:08d}"
    folder.mkdir(parents=True)
    state = replace(fresh.state, step=step, loader=position)
    (folder / "trainer.json").write_text(json.dumps(asdict(state)))


def test_an_experiment_without_mistakes_has_no_failure_and_leaves_nothing_behind(tmp_path: Path):
    config = make_experiment(tmp_path)
    before = sorted(tmp_path.rglob("*"))

    findings = examine(config)

    assert [finding for finding in findings if finding.status == "fail"] == []
    assert sorted(tmp_path.rglob("*")) == before


def test_a_failure_always_names_its_fix(tmp_path: Path):
    config = make_experiment(
        tmp_path, "model.template=nope", "data.sources.0.path=nowhere.jsonl", "tracking.wandb={project: p}"
    )
    failures = [finding for finding in examine(config, num_gpus=3) if finding.status == "fail"]

    assert {"tokenizer", "data: expert", "rows per step", "W&B"} <= {finding.name for finding in failures}
    assert all(finding.fix for finding in failures)


# --- the machine


def test_the_torch_engine_is_refused_for_two_gpus(tmp_path: Path):
    config = make_experiment(tmp_path, "engine.type=torch")

    assert look(config, "backend", num_gpus=2).status == "fail"
    assert look(config, "backend", num_gpus=1).status == "ok"


def test_zero_0_is_refused_for_the_bf16_of_gpus_and_allowed_in_fp32(tmp_path: Path):
    config = make_experiment(tmp_path, "engine.zero_stage=0")

    assert "zero_stage: 0 with bf16 is refused" in look(config, "backend", num_gpus=2).found
    assert (
        look(make_experiment(tmp_path, "engine.zero_stage=0", "engine.dtype=fp32"), "backend", num_gpus=2).status
        == "ok"
    )


def test_rows_that_processes_cannot_share_name_the_numbers_that_can(tmp_path: Path):
    config = make_experiment(tmp_path)  # 4 rows a step
    refused = look(config, "rows per step", num_gpus=3)

    assert refused.status == "fail"
    assert "Use 1, 2, 4 processes, or set batch.global_batch_tokens=768" in refused.fix
    assert look(config, "rows per step", num_gpus=2).status == "ok"


def llama_8b(folder: Path, *overrides: str) -> Config:
    LlamaConfig(
        vocab_size=128_256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8,
    ).save_pretrained(folder / "8b")  # fmt: skip
    return make_experiment(
        folder, f"model.name_or_path={folder}/8b", "model.gradient_checkpointing=true", "batch.micro_batch_tokens=8192",
        "batch.global_batch_tokens=131072", *overrides,
    )  # fmt: skip


def test_too_little_gpu_memory_fails_and_each_fix_it_names_fits(tmp_path: Path):
    refused = look(llama_8b(tmp_path, "engine.zero_stage=1"), "GPU memory", num_gpus=8, gpu_memory_gib=60)

    assert refused.status == "fail"
    assert "engine.zero_stage=2" in refused.fix
    fixed = look(llama_8b(tmp_path, "engine.zero_stage=2"), "GPU memory", num_gpus=8, gpu_memory_gib=60)
    assert fixed.status == "ok"
    assert "estimate" in fixed.found


def test_a_shorter_row_or_checkpointing_is_named_only_where_it_helps(tmp_path: Path):
    off = look(llama_8b(tmp_path, "model.gradient_checkpointing=false"), "GPU memory", num_gpus=8, gpu_memory_gib=70)
    tiny = look(llama_8b(tmp_path), "GPU memory", num_gpus=1, gpu_memory_gib=3)

    assert off.status == "fail"
    assert "model.gradient_checkpointing=true" in off.fix
    assert "batch.micro_batch_tokens=4096" in off.fix
    assert tiny.status == "fail"
    assert tiny.fix == "A smaller model, or more and larger GPUs."


def test_without_gpus_the_estimate_is_held_against_this_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = make_experiment(tmp_path)

    assert look(config, "memory to train").status == "ok"
    monkeypatch.setattr(doctor_room, "host_memory_bytes", lambda: 1000)
    assert look(config, "memory to train").status == "fail"
    assert "--num-gpus N" in look(config, "memory to train").fix


def test_host_memory_fails_here_and_warns_of_a_machine_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = make_experiment(tmp_path)

    assert host_memory_bytes() > 2**28
    assert look(config, "host memory").status == "ok"
    monkeypatch.setattr(doctor_room, "host_memory_bytes", lambda: 1000)
    assert look(config, "host memory").status == "fail"
    assert look(config, "host memory", num_gpus=100).status == "warn"


def test_a_full_disk_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = make_experiment(tmp_path)
    usage = namedtuple("usage", "total used free")

    assert look(config, "disk").status == "ok"
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(1, 1, 0))
    assert look(config, "disk").status == "fail"


def test_room_is_for_the_checkpoints_kept_and_the_next(tmp_path: Path):
    kept = make_experiment(tmp_path, "checkpoint.keep_last=3")
    only_last = make_experiment(tmp_path, "checkpoint.keep_last=3", "checkpoint.save_every_epochs=null")

    assert "for 4 checkpoint(s)" in look(kept, "disk").found
    assert "for 1 checkpoint(s)" in look(only_last, "disk").found


def test_checkpoints_that_are_there_need_no_room_again(tmp_path: Path):
    config = make_experiment(tmp_path)
    before = look(config, "disk").found
    (config.run_dir / "checkpoints/step-00000001").mkdir(parents=True)
    (config.run_dir / "checkpoints/step-00000001/engine.bin").write_bytes(bytes(100_000))

    assert look(config, "disk").found.split(" for ")[0] != before.split(" for ")[0]


def test_wandb_online_needs_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    online = make_experiment(tmp_path, "tracking.wandb={project: p}")

    assert look(online, "W&B").status == "fail"
    assert look(make_experiment(tmp_path), "W&B").status == "ok"
    assert look(make_experiment(tmp_path, "tracking.wandb={mode: offline}"), "W&B").status == "ok"
    monkeypatch.setenv("WANDB_API_KEY", "made-up")
    assert look(online, "W&B").status == "ok"
    assert "made-up" not in look(online, "W&B").found


@pytest.mark.parametrize(("host", "status"), [("api.wandb.ai", "ok"), ("example.org", "fail")])
def test_a_key_in_netrc_counts_for_its_host_only(tmp_path: Path, host: str, status: str):
    (tmp_path / "netrc").write_text(f"machine {host} login user password made-up\n")
    (tmp_path / "netrc").chmod(0o600)

    assert look(make_experiment(tmp_path, "tracking.wandb={project: p}"), "W&B").status == status


# --- the base model


def test_a_pretrained_base_without_weights_fails_and_a_random_one_needs_none(tmp_path: Path):
    pretrained = make_experiment(tmp_path, "model.init=pretrained")

    assert "no weights" in look(pretrained, "base model").found
    assert look(pretrained, "base model").status == "fail"
    assert look(make_experiment(tmp_path), "base model").status == "ok"
    (tmp_path / "base/model.safetensors").write_bytes(b"")
    assert look(pretrained, "base model").status == "ok"


def test_parameters_are_counted_exactly_and_without_loading(tmp_path: Path):
    # 2 layers: q, o 32 x 32, k, v 16 x 32, MLP 3 x 64 x 32, two norms of 32; a norm at the end; embeddings and head
    vocabulary = len(PreTrainedTokenizerFast.from_pretrained(TOKENIZERS / "mini-mistral"))
    expected = 2 * (2 * 1024 + 2 * 512 + 3 * 2048 + 64) + 32 + 2 * 32 * vocabulary

    assert f" {expected:,} parameters" in look(make_experiment(tmp_path), "base model").found


def test_a_family_that_does_not_pack_exactly_fails(tmp_path: Path):
    config = make_experiment(tmp_path)
    (tmp_path / "base/config.json").write_text(GPT2)

    assert look(config, "base model").status == "fail"
    assert "'gpt2'" in look(config, "base model").found
    assert look(config, "GPU memory", num_gpus=2).status == "warn"


def test_rows_for_new_tokens_are_counted(tmp_path: Path):
    config = make_experiment(tmp_path, "model.init=pretrained")
    vocabulary = len(PreTrainedTokenizerFast.from_pretrained(TOKENIZERS / "mini-mistral"))

    assert f"{vocabulary - 32:,} rows are added" in look(config, "embeddings").found
    exact = make_experiment(tmp_path, "model.init=pretrained", f"model.config_overrides={{vocab_size: {vocabulary}}}")
    assert "none are added" in look(exact, "embeddings").found
    more = make_experiment(tmp_path, "model.init=pretrained", "model.config_overrides={vocab_size: 9999}")
    assert look(more, "embeddings").status == "warn"


# --- the text


@pytest.mark.parametrize("override", ["model.template=openchat-9", "model.tokenizer_name_or_path=/nowhere"])
def test_without_tokenizer_or_template_the_rest_is_unchecked_and_nothing_crashes(tmp_path: Path, override: str):
    config = make_experiment(tmp_path, override)

    assert look(config, "tokenizer").status == "fail"
    assert look(config, "chat template").status == "warn"
    assert look(config, "rows per step").status == "ok"
    assert look(make_experiment(tmp_path), "tokenizer").status == "ok"


def test_a_hub_out_of_reach_fails_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def nowhere(host: str, port: int):
        raise OSError(f"{host}: name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", nowhere)
    monkeypatch.setattr(doctor_facts, "getproxies", dict)
    began = time.monotonic()
    found = look(make_experiment(tmp_path, "model.tokenizer_name_or_path=nobody/nothing"), "tokenizer")

    assert time.monotonic() - began < 10
    assert found.status == "fail"
    assert "out of reach" in found.found
    assert look(make_experiment(tmp_path), "tokenizer").status == "ok"


def test_a_probe_that_one_string_cannot_carry_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = make_experiment(tmp_path)

    assert look(config, "chat template").status == "ok"
    monkeypatch.setattr(doctor_text, "PROBES", ((("user", "a <|end_of_turn|> b"), ("assistant", "c")),))
    assert look(config, "chat template").status == "fail"


@pytest.mark.parametrize("special", [True, False])
def test_no_added_token_can_be_typed_and_one_that_could_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, special: bool
):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(TOKENIZERS / "mini-mistral")
    tokenizer.add_tokens(["<tool>"], special_tokens=special)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    config = make_experiment(tmp_path, f"model.tokenizer_name_or_path={tmp_path}/tokenizer")

    assert look(config, "injection").status == "ok"
    monkeypatch.setattr("ochat.data.tokenize._plain_encoder", _encoder)  # contents read as markup is
    found = look(config, "injection")
    assert found.status == "fail"
    assert "<tool>" in found.found


@pytest.mark.parametrize(("words", "status"), [(3, "ok"), (500, "fail")])
def test_replies_that_are_all_cut_never_teach_to_stop(tmp_path: Path, words: int, status: str):
    config = make_experiment(tmp_path)
    for source in ("expert", "crowd"):
        write_rows(tmp_path / f"{source}.jsonl", [chat("Hi", "cat " * words)] * 3)

    assert look(config, "end of turn").status == status


def test_a_condition_that_spells_a_control_token_fails(tmp_path: Path):
    assert look(make_experiment(tmp_path, "data.sources.1.condition=<|end_of_turn|>"), "conditions").status == "fail"
    assert look(make_experiment(tmp_path), "conditions").status == "ok"


def test_sources_of_different_worth_under_one_condition_are_pointed_out(tmp_path: Path):
    shared = make_experiment(tmp_path, "data.sources.1.condition=GPT4")
    equal = make_experiment(tmp_path, "data.sources.1.condition=GPT4", "data.sources.1.weight=1.0")

    assert look(shared, "conditions").status == "warn"
    assert look(equal, "conditions").status == "ok"


def test_a_source_is_sampled_and_its_conversations_counted(tmp_path: Path):
    config = make_experiment(tmp_path)
    write_rows(tmp_path / "crowd.jsonl", [chat("Hi", "the cat")] * 250)
    found = look(config, "data: crowd")

    assert found.status == "ok"
    assert found.found.startswith("250 conversations; of the first 200: 200 kept, 0 without a reply, 0 cut")


def test_a_long_file_is_extrapolated_and_said_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = make_experiment(tmp_path)
    write_rows(tmp_path / "crowd.jsonl", [chat("Hi", "the cat " * 40)] * 20_000)
    assert look(config, "data: crowd").found.startswith("20,000 conversations")

    monkeypatch.setattr(doctor_facts, "COUNTED_BYTES", 2 << 20)
    about, number, *_ = look(config, "data: crowd").found.split()
    assert about == "about"
    assert int(number.replace(",", "")) == pytest.approx(20_000, rel=0.01)


def test_a_bad_line_fails_with_file_and_line(tmp_path: Path):
    config = make_experiment(tmp_path)
    with (tmp_path / "crowd.jsonl").open("a") as file:
        file.write("{broken\n")

    assert look(config, "data: crowd").status == "fail"
    assert f"{tmp_path}/crowd.jsonl:91: not valid JSON" in look(config, "data: crowd").found
    assert look(config, "data: expert").status == "ok"


def test_a_source_without_a_supervised_token_fails(tmp_path: Path):
    config = make_experiment(tmp_path)
    write_rows(tmp_path / "crowd.jsonl", [{"items": [{"role": "user", "content": "Hi"}]}] * 3)

    assert look(config, "data: crowd").status == "fail"
    assert "no supervised token" in look(config, "data: crowd").found


def test_prompts_that_leave_no_room_for_a_reply_are_counted_apart(tmp_path: Path):
    config = make_experiment(tmp_path)
    prompt, reply = {"role": "user", "content": "cat " * 200}, {"role": "assistant", "content": "sat"}
    write_rows(tmp_path / "crowd.jsonl", [{"items": [prompt, reply]}, {"items": [prompt]}, {"items": [reply]}])

    found = look(config, "data: crowd").found
    assert "1 kept, 1 without a reply, 1 whose prompt fills max_length, 0 cut" in found


def test_a_missing_file_fails_unless_the_dataset_is_prepared(tmp_path: Path):
    config = make_experiment(tmp_path)
    other = make_experiment(tmp_path, f"data.prepared_dir={tmp_path}/other")
    prepare(config)
    (tmp_path / "crowd.jsonl").unlink()

    assert look(config, "data: crowd").status == "ok"
    assert look(other, "data: crowd").status == "fail"


def test_the_prepared_dataset_is_missing_then_up_to_date_then_out_of_date(tmp_path: Path):
    config = make_experiment(tmp_path)
    missing = look(config, "prepared dataset", prepare_command="ochat prepare x.yaml")
    prepare(config)

    assert (missing.status, missing.fix) == ("warn", "Run: ochat prepare x.yaml")
    assert look(config, "prepared dataset").status == "ok"
    stale = look(make_experiment(tmp_path, "data.sources.1.condition=Human"), "prepared dataset")
    assert stale.status == "warn"
    assert "out of date" in stale.found


def test_a_folder_that_is_no_dataset_will_not_be_overwritten(tmp_path: Path):
    config = make_experiment(tmp_path)
    (tmp_path / "prepared").mkdir()
    assert look(config, "prepared dataset").status == "warn"

    (tmp_path / "prepared/thesis.txt").write_text("years of work")
    assert look(config, "prepared dataset").status == "fail"


def test_a_low_class_that_dominates_is_pointed_out(tmp_path: Path):
    config = make_experiment(tmp_path)
    assert look(config, "gradient shares").found.startswith("not checked")
    prepare(config)

    assert look(config, "gradient shares").status == "ok"
    assert look(make_experiment(tmp_path, "data.sources.1.weight=0.9"), "gradient shares").status == "warn"


# --- the run


def test_steps_are_the_plans_once_prepared_and_a_near_estimate_before(tmp_path: Path):
    config = make_experiment(tmp_path)
    estimate = look(config, "steps")
    prepare(config)
    setup = gather(config, num_gpus=None, gpu_memory_gib=80.0, prepare_command="").setup
    exact = look(config, "steps")

    assert "an estimate" in estimate.found
    assert "estimate" not in exact.found
    assert exact.found.startswith(f"{setup.loader.total_steps:,} steps ({setup.loader.epoch_steps[0]:,} an epoch")
    assert int(estimate.found.split()[1]) == pytest.approx(setup.loader.total_steps, rel=0.25)


def test_weights_that_are_all_zero_fail(tmp_path: Path):
    config = make_experiment(tmp_path)
    prepare(config)
    nothing = make_experiment(tmp_path, "data.sources.0.weight=0.0", "data.sources.1.weight=0.0")

    assert look(config, "steps").status == "ok"
    assert look(nothing, "steps").status == "fail"
    assert look(nothing, "data: crowd").status == "warn"


def test_the_automatic_learning_rate_comes_with_its_numbers(tmp_path: Path):
    config = make_experiment(tmp_path, "optimizer.learning_rate=auto")
    prepare(config)
    setup = gather(config, num_gpus=None, gpu_memory_gib=80.0, prepare_command="").setup
    rate, reason = auto_learning_rate("mistral", 0, setup.loader.supervised_tokens_per_step())

    assert f"auto: peak {rate:.3g} = {reason}" in look(config, "learning rate").found


def test_a_family_without_a_rule_for_the_learning_rate_fails(tmp_path: Path):
    config = make_experiment(tmp_path, "optimizer.learning_rate=auto")
    facts = gather(config, num_gpus=None, gpu_memory_gib=80.0, prepare_command="")
    _, known = check_schedule(facts)
    facts.model.config.model_type = "gemma"
    _, unknown = check_schedule(facts)

    assert (known.status, unknown.status) == ("ok", "fail")


def test_the_run_folder_is_fresh_then_resumes_then_is_finished(tmp_path: Path):
    config = make_experiment(tmp_path)
    prepare(config)
    total = gather(config, num_gpus=None, gpu_memory_gib=80.0, prepare_command="").setup.loader.total_steps

    assert "begins at step 1" in look(config, "run folder").found
    save_checkpoint_of(config, step=2)
    assert f"resumes after step 2 of {total}" in look(config, "run folder").found
    save_checkpoint_of(config, step=total, epoch=2)
    assert look(config, "run folder").status == "warn"
    assert f"finished, all {total} steps are done" in look(config, "run folder").found


def test_a_run_folder_of_another_recipe_is_refused_in_trainings_words_and_steps_are_still_known(tmp_path: Path):
    config = make_experiment(tmp_path)
    prepare(config)
    save_checkpoint_of(config, step=2)
    changed = make_experiment(tmp_path, "optimizer.learning_rate=2e-3")

    assert look(config, "run folder").status == "ok"
    refused = look(changed, "run folder")
    assert refused.status == "fail"
    assert "optimizer.learning_rate was 0.001, is 0.002" in refused.found
    assert "estimate" not in look(changed, "steps").found
    assert look(make_experiment(tmp_path, "checkpoint.resume=never"), "run folder").status == "fail"


# --- the command


def test_the_command_exits_0_and_names_the_next_command(tmp_path: Path):
    path = write_experiment(tmp_path)
    done = run("ochat", "doctor", path)

    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 that would go wrong" in done.stdout
    assert f"next: ochat prepare {path}" in done.stdout


def test_the_command_exits_1_with_the_fix(tmp_path: Path):
    done = run("ochat", "doctor", write_experiment(tmp_path), "--num-gpus", 3, "run.name=other")

    assert done.returncode == 1
    assert "fix: Use 1, 2, 4 processes" in done.stdout
    assert "next:" not in done.stdout
    assert "Traceback" not in done.stderr


def test_a_mistake_in_the_configuration_is_an_error_as_everywhere(tmp_path: Path):
    done = run("ochat", "doctor", write_experiment(tmp_path), "training.num_epoch=3")

    assert done.returncode == 2
    assert "Did you mean `training.num_epochs`?" in done.stderr
