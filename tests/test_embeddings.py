"""Rows for control tokens: which rows count as trained, what a row without training becomes, what is never touched."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedModel

from ochat.embeddings import NUM_ALIKE, fit_vocabulary, study_rows, untrained_rows

V, D = 40, 8
SHAPE = {
    "vocab_size": V, "hidden_size": D, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 32,
}  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(**SHAPE),
    "llama-tied": LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "mistral": MistralConfig(**SHAPE),
}
RESERVED = (30, 31, 32, 33)  # rows no gradient reached


def trained_matrix(seed: int = 0) -> torch.Tensor:
    return torch.randn(V, D, generator=torch.Generator().manual_seed(seed)) + 1


def marked(weight: torch.Tensor) -> list[int]:
    return untrained_rows(weight).nonzero().flatten().tolist()


def model_with(name: str, reserved: float | None, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name]), dtype=dtype)
    with torch.no_grad():
        for seed, layer in enumerate((model.get_input_embeddings(), model.get_output_embeddings())):
            layer.weight.copy_(trained_matrix(seed))
            if reserved is not None:
                layer.weight[list(RESERVED)] = reserved
    return model


def weights(model: PreTrainedModel) -> list[torch.Tensor]:
    return [e.weight.detach().clone() for e in (model.get_input_embeddings(), model.get_output_embeddings())]


# --- which rows are untrained


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [0.0, 1e-5, 1.5], ids=["zero", "tiny", "identical"])
def test_reserved_rows_are_untrained_and_no_other(value: float, dtype: torch.dtype) -> None:
    weight = trained_matrix().to(dtype)
    assert marked(weight) == []
    weight[list(RESERVED)] = value
    assert marked(weight) == list(RESERVED)


def test_tiny_rows_that_differ_are_untrained() -> None:
    weight = trained_matrix()
    weight[list(RESERVED)] *= 1e-4
    assert marked(weight) == list(RESERVED)


def test_a_small_row_is_not_an_untrained_one() -> None:
    weight = trained_matrix()
    weight[3] *= 0.05
    assert marked(weight) == []


def test_a_copy_of_a_trained_row_makes_neither_untrained() -> None:
    weight = trained_matrix()
    weight[5] = weight[4]
    assert marked(weight) == []
    weight[6] = weight[4]
    assert NUM_ALIKE == 3
    assert marked(weight) == [4, 5, 6]


def test_identical_rows_are_found_across_chunks_and_rows_of_one_norm_are_told_apart() -> None:
    weight = torch.randn(5000, 4, generator=torch.Generator().manual_seed(0))
    weight[10:14] = torch.tensor([[1.0, 2, 3, 4], [2, 1, 3, 4], [4, 3, 2, 1], [1, 2, 4, 3]])
    assert marked(weight) == []
    weight[[0, 2500, 4999]] = 0.5
    assert marked(weight) == [0, 2500, 4999]


def test_in_a_matrix_of_equal_rows_none_is_untrained() -> None:
    assert marked(torch.zeros(V, D)) == marked(torch.ones(V, D)) == []


# --- the mean


def test_the_mean_is_of_the_trained_rows_only() -> None:
    alike = [8.0, 8.0]
    weight = torch.tensor([[1.0, 3.0], [3.0, 5.0], [0.0, 0.0], alike, alike, alike, [5.0, 4.0], [99.0, 99.0]])
    study = study_rows(weight, 7, [2, 4])  # the eighth row is beyond the tokenizer
    assert study.mean.tolist() == [3.0, 4.0]
    assert (study.num_trained, study.num_untrained, study.repaired) == (3, 4, (2, 4))
    assert weight[:7].mean(dim=0).tolist() != study.mean.tolist()


def test_the_mean_is_taken_in_float32() -> None:
    weight = (torch.randn(6000, 32, generator=torch.Generator().manual_seed(0)) + 100).bfloat16()
    exact = weight.double().mean(dim=0)
    study = study_rows(weight, 6000, [])
    summed_in_bf16 = torch.zeros(32, dtype=torch.bfloat16)
    for row in weight:
        summed_in_bf16 += row
    assert study.mean.dtype == torch.float32
    assert (study.mean - exact).abs().max() < 1e-3
    assert (summed_in_bf16 / 6000 - exact).abs().max() > 10


# --- models


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reserved", [0.0, 1.5])
def test_reserved_rows_of_control_tokens_are_repaired_and_all_others_keep_their_bits(
    name: str, dtype: torch.dtype, reserved: float
) -> None:
    model = model_with(name, reserved, dtype)
    before = weights(model)
    fit_vocabulary(model, V, [3, 31, 32])  # 3 is trained
    rest = [i for i in range(V) if i not in (31, 32)]
    trained = [i for i in range(V) if i not in RESERVED]
    for old, new in zip(before, weights(model), strict=True):
        mean = old[trained].float().mean(dim=0)
        assert torch.equal(new[rest], old[rest])
        torch.testing.assert_close(new[[31, 32]], mean.to(dtype).expand(2, -1))
        assert not torch.allclose(old.float().mean(dim=0), mean, rtol=1e-2)


@pytest.mark.parametrize("name", CONFIGS)
def test_in_a_base_without_untrained_rows_nothing_is_touched(name: str) -> None:
    model = model_with(name, None)
    before = weights(model)
    fit_vocabulary(model, V, [3, 31, 32])
    assert all(torch.equal(old, new) for old, new in zip(before, weights(model), strict=True))


@pytest.mark.parametrize("name", CONFIGS)
def test_new_rows_are_the_mean_and_the_vocabulary_is_as_long_as_the_tokenizer(name: str) -> None:
    model = model_with(name, 0.0)
    before = weights(model)
    fit_vocabulary(model, V + 2, [31, V, V + 1])
    trained = [i for i in range(V) if i not in RESERVED]
    for old, new in zip(before, weights(model), strict=True):
        assert len(new) == model.config.vocab_size == V + 2
        torch.testing.assert_close(new[[31, V, V + 1]], old[trained].mean(dim=0).expand(3, -1))
        assert torch.equal(new[trained], old[trained])
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tied == (name == "llama-tied")


def test_rows_beyond_the_tokenizer_go_and_count_for_no_mean() -> None:
    model = model_with("llama", None)
    with torch.no_grad():
        model.get_input_embeddings().weight[36:] = 1e6
    before = weights(model)
    fit_vocabulary(model, 36, [])
    assert all(torch.equal(new, old[:36]) for old, new in zip(before, weights(model), strict=True))
    assert study_rows(before[0], 36, []).mean.abs().max() < 10


def test_a_second_time_changes_nothing_of_weight() -> None:
    model = model_with("llama", 0.0)
    fit_vocabulary(model, V + 2, [31, 32, V, V + 1])
    once = weights(model)
    fit_vocabulary(model, V + 2, [31, 32, V, V + 1])
    for old, new in zip(once, weights(model), strict=True):
        torch.testing.assert_close(new, old, rtol=1e-6, atol=1e-6)


def test_a_repair_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        fit_vocabulary(model_with("llama-tied", 0.0), V, [31])
        fit_vocabulary(model_with("llama-tied", None), V, [31])
    first, second = (record.getMessage() for record in caplog.records)
    assert first.startswith("tied embeddings: mean of 36 trained rows")
    assert first.endswith("repaired the untrained rows of ids [31]")
    assert "repaired" not in second
