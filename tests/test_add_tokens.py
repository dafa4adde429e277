"""`ochat add-tokens`: the folder it writes loads, agrees with its tokenizer, and is otherwise the base, bit by bit."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedTokenizerFast

from ochat.add_tokens import INDEX_NAME, SINGLE_NAME, add_tokens
from ochat.backend import select_backend
from ochat.config import EngineConfig, ModelConfig
from ochat.data.template import TEMPLATES, get_template
from ochat.data.tokenize import ChatTokenizer, load_tokenizer
from ochat.errors import CheckpointError, ConfigError, TemplateError
from ochat.model import load_model
from tests.experiment import TOKENIZERS
from tests.launch import run

SHAPE = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 64,
}  # fmt: skip
BASES = {
    "llama": (LlamaConfig, "mini-llama3", {}),
    "llama-tied": (LlamaConfig, "mini-llama3", {"tie_word_embeddings": True}),
    "mistral": (MistralConfig, "mini-mistral", {}),
}
HEADERS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


def write_base(folder: Path, name: str, *, zero: tuple[str, ...] = (), shard: str = "50GB") -> Path:
    """A tiny bfloat16 base with random weights; the rows of tokens in `zero` are zero."""
    config, tokenizer_name, extra = BASES[name]
    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(TOKENIZERS / tokenizer_name))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(vocab_size=len(tokenizer), **SHAPE, **extra), dtype=torch.bfloat16)
    with torch.no_grad():
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            layer.weight[tokenizer.convert_tokens_to_ids(list(zero))] = 0.0
    model.save_pretrained(folder, max_shard_size=shard)
    tokenizer.save_pretrained(folder)
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def is_embedding(name: str) -> bool:
    return "embed_tokens" in name or "lm_head" in name


@pytest.mark.parametrize("shard", ["50GB", "20KB"], ids=["one-file", "shards"])
@pytest.mark.parametrize("name", BASES)
def test_new_tokens_get_the_mean_and_everything_else_keeps_its_bits(tmp_path: Path, name: str, shard: str) -> None:
    base = write_base(tmp_path / "base", name, shard=shard)
    assert (base / INDEX_NAME).exists() == (shard == "20KB")

    done = add_tokens(str(base), template="chatml", to=tmp_path / "out")

    old, new = tensors(base), tensors(tmp_path / "out")
    assert set(old) == set(new)
    assert len(done.studies) == sum(map(is_embedding, old)) == (1 if name == "llama-tied" else 2)
    for key, tensor in old.items():
        assert torch.equal(new[key][: len(tensor)], tensor)
        added = new[key][len(tensor) :]
        assert len(added) == (2 if is_embedding(key) else 0)
        if len(added):
            torch.testing.assert_close(added, tensor.float().mean(dim=0).bfloat16().expand(2, -1))
            assert added.abs().max() > 0


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("shard", ["50GB", "20KB"], ids=["one-file", "shards"])
def test_the_result_loads_and_its_vocabulary_is_as_long_as_its_tokenizer(tmp_path: Path, name: str, shard: str) -> None:
    base = write_base(tmp_path / "base", name, shard=shard)
    done = add_tokens(str(base), template="chatml", to=tmp_path / "out")
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto", output_loading_info=True)
    tokenizer = load_tokenizer(str(tmp_path / "out"), get_template("chatml"))
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.dtype == torch.bfloat16
    assert len(model.get_input_embeddings().weight) == len(model.get_output_embeddings().weight) == len(tokenizer)
    assert model.config.vocab_size == done.num_tokens == len(tokenizer) == done.num_old + 2
    assert [ChatTokenizer(tokenizer, get_template("chatml")).end_of_turn_ids] == [(done.control_ids["<|im_end|>"],)]
    ids = torch.tensor([[1, 5, 9]])
    plain = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    assert torch.equal(model(ids).logits[..., : done.num_old], plain(ids).logits)


def test_untrained_rows_of_control_tokens_are_repaired_and_trained_ones_never_touched(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "llama", zero=(*HEADERS[:2], "<|end_of_text|>"))
    done = add_tokens(str(base), template="llama3-instruct", to=tmp_path / "out")
    repaired = [done.control_ids[token] for token in HEADERS[:2]]
    assert done.num_old == done.num_tokens
    for key, old in tensors(base).items():
        new = tensors(tmp_path / "out")[key]
        changed = [i for i in range(len(old)) if not torch.equal(old[i], new[i])]
        assert changed == (repaired if is_embedding(key) else [])
        if changed:
            trained = old[old.abs().sum(dim=1) > 0]
            assert len(trained) == len(old) - 3
            torch.testing.assert_close(new[changed], trained.float().mean(dim=0).bfloat16().expand(2, -1))


def test_training_on_the_base_itself_begins_with_the_same_rows(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "llama", zero=HEADERS)
    for template in ("openchat-3.6", "chatml"):
        add_tokens(str(base), template=template, to=tmp_path / template)
        backend = select_backend(EngineConfig(type="torch"))
        tokenizer = load_tokenizer(str(base), get_template(template))
        model = ModelConfig(name_or_path=str(base), template=template, max_length=16)
        loaded = load_model(model, tokenizer, backend, seed=0).state_dict()
        for key, tensor in tensors(tmp_path / template).items():
            torch.testing.assert_close(loaded[key].bfloat16(), tensor)


@pytest.mark.parametrize("template", TEMPLATES)
def test_every_template_can_be_added(tmp_path: Path, template: str) -> None:
    base = write_base(tmp_path / "base", "mistral")
    done = add_tokens(str(base), template=template, to=tmp_path / "out")
    assert len(PreTrainedTokenizerFast.from_pretrained(str(tmp_path / "out"))) == done.num_tokens
    assert tuple(done.control_ids) == get_template(template).control_tokens


def test_the_command_says_what_it_did_and_what_to_run_next(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "llama", zero=HEADERS)
    done = run("ochat", "add-tokens", base, "--template", "openchat-3.6", "--to", tmp_path / "out")
    n = len(PreTrainedTokenizerFast.from_pretrained(str(base)))
    eot = PreTrainedTokenizerFast.from_pretrained(str(base)).convert_tokens_to_ids("<|eot_id|>")
    assert done.returncode == 0, done.stderr
    assert f"{n} -> {n} tokens, as many as embedding rows" in done.stdout
    assert f"  <|eot_id|> = {eot} (the base has a row for it)" in done.stdout
    assert f"model.embed_tokens.weight: mean of {n - 3} trained rows" in done.stdout
    assert f"repaired the untrained rows of ids [{eot - 2}, {eot - 1}, {eot}]" in done.stdout
    assert f"next: ochat train CONFIG model.name_or_path={tmp_path / 'out'} model.template=openchat-3.6" in done.stdout


def test_the_report_tells_new_rows_from_those_the_base_has(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "llama")
    n = len(PreTrainedTokenizerFast.from_pretrained(str(base)))
    lines = add_tokens(str(base), template="chatml", to=tmp_path / "out").report().splitlines()
    assert lines[0].endswith(f": {n} -> {n + 2} tokens, as many as embedding rows")
    assert lines[1:3] == [f"  <|im_start|> = {n} (new row)", f"  <|im_end|> = {n + 1} (new row)"]


# --- refusals: each leaves nothing behind


def refusal(tmp_path: Path, base: Path, kind: type[Exception] = CheckpointError, template: str = "chatml") -> str:
    with pytest.raises(kind) as raised:
        add_tokens(str(base), template=template, to=tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir() if "out" in p.name) == []
    return str(raised.value)


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "llama")
    before = sorted(base.iterdir())
    with pytest.raises(CheckpointError, match=r"exists and is not empty\. Give --to a new folder"):
        add_tokens(str(base), template="chatml", to=base)
    assert sorted(base.iterdir()) == before


def test_a_base_without_safetensors_is_refused_with_the_fix(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "llama")
    (base / SINGLE_NAME).rename(base / "pytorch_model.bin")
    assert "Save the base as safetensors" in refusal(tmp_path, base)


def test_a_damaged_file_of_weights_is_refused(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "llama")
    (base / SINGLE_NAME).write_bytes((base / SINGLE_NAME).read_bytes()[:-100])
    assert refusal(tmp_path, base).startswith(f"{base / SINGLE_NAME}: not readable as safetensors")


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "llama", shard="20KB")
    missing = sorted(base.glob("*.safetensors"))[1]
    missing.unlink()
    assert refusal(tmp_path, base).startswith(f"{missing}: missing")


def test_a_name_that_is_neither_a_folder_nor_on_the_hub_is_refused(tmp_path: Path) -> None:
    assert "no such folder, and no name of a hub's" in refusal(tmp_path, tmp_path / "none", ConfigError)


def test_an_unknown_template_and_a_base_without_a_tokenizer_are_refused(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "llama")
    assert "no template is called 'chat'" in refusal(tmp_path, base, TemplateError, "chat")
    (base / "tokenizer.json").unlink()
    assert "It needs tokenizer.json" in refusal(tmp_path, base, TemplateError)


def test_the_index_states_the_size_of_what_was_written(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "llama", shard="20KB")
    add_tokens(str(base), template="chatml", to=tmp_path / "out")
    index = json.loads((tmp_path / "out" / INDEX_NAME).read_text())
    old = json.loads((base / INDEX_NAME).read_text())
    sizes = [sum(t.nbytes for t in tensors(folder).values()) for folder in (base, tmp_path / "out")]
    assert old["metadata"]["total_size"] == sizes[0]
    assert index["metadata"] == {"total_size": sizes[1]}
    assert index["weight_map"] == old["weight_map"]
    assert sizes[0] < sizes[1]


def rewrite(base: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    save_file(change(tensors(base)), base / SINGLE_NAME, metadata={"format": "pt"})


@pytest.mark.parametrize(("lost", "name"), [("lm_head", "llama"), ("embed_tokens", "llama"), ("embed", "llama-tied")])
def test_an_embedding_that_is_not_where_it_should_be_is_no_reason_to_write_half_a_model(
    tmp_path: Path, lost: str, name: str
) -> None:
    # A folder saved from the bare MistralModel has `embed_tokens.weight`: its vocabulary would stay as it was.
    base = write_base(tmp_path / "base", name)
    rewrite(base, lambda old: {n.replace(lost, "other"): t for n, t in old.items()})
    assert f"{lost}" in refusal(tmp_path, base)
    assert not (tmp_path / "out").exists()


def test_a_base_of_eight_bits_or_with_numbers_that_are_not_finite_is_refused(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "llama")
    whole = tensors(base)
    rewrite(base, lambda _: {n: t.to(torch.float8_e4m3fn) for n, t in whole.items()})
    assert "is torch.float8_e4m3fn, a quantised base" in refusal(tmp_path, base)
    rewrite(base, lambda _: {n: t.index_fill(0, torch.tensor([5]), torch.nan) for n, t in whole.items()})
    assert "holds numbers that are not finite" in refusal(tmp_path, base)


@pytest.mark.parametrize(("content", "said"), [("{", "not readable as JSON"), ("{}", "has no `weight_map`")])
def test_a_damaged_index_is_named(tmp_path: Path, content: str, said: str) -> None:
    base = write_base(tmp_path / "base", "llama", shard="20KB")
    (base / INDEX_NAME).write_text(content)
    text = refusal(tmp_path, base)
    assert text.startswith(f"{base / INDEX_NAME}: ")
    assert said in text


def test_a_base_that_is_no_causal_language_model_is_refused(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "llama")
    (base / "config.json").write_text('{"model_type": "t5"}')
    text = refusal(tmp_path, base)
    assert "no configuration of a causal language model: Unrecognized configuration class" in text
    assert "\n" not in text
