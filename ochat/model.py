"""Hugging Face causal LMs, untouched: loading, and attention that stays in a document.

T tokens of a packed row, S documents in it, D hidden size, V vocabulary, H query heads, K key heads, A head size.
"""

import difflib
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from ochat.backend import Attention, Backend
from ochat.config import ModelConfig
from ochat.data.batch import PackedBatch
from ochat.data.template import get_template
from ochat.embeddings import fit_vocabulary
from ochat.errors import BackendError, ConfigError, first_line
from ochat.hub_names import located

# Families whose packed forward pass is tested, document by document, against one-by-one.
FAMILIES = ("llama", "mistral")
HF_NAMES: dict[Attention, str] = {
    "document_sdpa": "ochat_document_sdpa",
    "varlen": "ochat_varlen",
    "flash_attention_2": "flash_attention_2",
}


def load_model(
    model: ModelConfig, tokenizer: PreTrainedTokenizerFast, backend: Backend, *, seed: int
) -> PreTrainedModel:
    """The base model on the CPU in the backend's dtype, its vocabulary as long as the tokenizer.

    seed  draws the weights when `model.init` is random
    """
    _register_attention()
    source = located(model.name_or_path)
    hf_config = _load_hf_config(model, source)
    attention = HF_NAMES[backend.attention]
    if model.init == "random":
        hf_config.vocab_size = len(tokenizer)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            loaded = _construct(hf_config, attention)
        # Parameters only: rotary frequencies are buffers and stay float32, as they do in a loaded model.
        for parameter in loaded.parameters():
            parameter.data = parameter.data.to(backend.dtype)
    else:
        try:
            loaded = AutoModelForCausalLM.from_pretrained(
                source, config=hf_config, attn_implementation=attention, dtype=backend.dtype
            )
        except OSError as exc:
            raise ConfigError(
                f"model.name_or_path: {first_line(exc)} For an untrained model set model.init=random."
            ) from exc
        control_tokens = get_template(model.template).control_tokens
        fit_vocabulary(loaded, len(tokenizer), tokenizer.convert_tokens_to_ids(list(control_tokens)))
    if model.gradient_checkpointing:
        loaded.gradient_checkpointing_enable({"use_reentrant": False})
    return loaded


def _load_hf_config(model: ModelConfig, source: str) -> Any:
    try:
        hf_config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as exc:
        raise ConfigError(
            f"model.name_or_path: {model.name_or_path!r} has no model configuration: {first_line(exc)}"
        ) from exc
    if hf_config.model_type not in FAMILIES:
        raise ConfigError(
            f"model.name_or_path: {model.name_or_path!r} is of family {hf_config.model_type!r}. "
            f"Families that pack exactly: {', '.join(FAMILIES)}."
        )
    for key, value in model.config_overrides.items():
        if not hasattr(hf_config, key):
            near = difflib.get_close_matches(key, vars(hf_config), n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"model.config_overrides: {hf_config.model_type} has no field {key!r}.{hint}")
        try:
            setattr(hf_config, key, value)
        except Exception as exc:  # transformers' own validation errors share no public base
            raise ConfigError(f"model.config_overrides: {key} cannot be {value!r}: {first_line(exc)}") from exc
    return hf_config


def _construct(hf_config: Any, attention: str) -> PreTrainedModel:
    try:
        return AutoModelForCausalLM.from_config(hf_config, attn_implementation=attention, dtype=torch.float32)
    except (ValueError, TypeError, RuntimeError) as exc:
        raise ConfigError(f"model.config_overrides: no model can be made of this shape: {first_line(exc)}") from exc


def hidden_states(model: PreTrainedModel, batch: PackedBatch) -> Tensor:
    """Last hidden states [T, D] of a packed row; no document sees another."""
    # use_cache=False and no attention_mask: with either left to its default, documents leak into each other (FACTS).
    output = model.get_decoder()(
        input_ids=batch.input_ids[None],
        position_ids=batch.position_ids[None],
        use_cache=False,
        cu_seq_lens_q=batch.cu_seqlens,
        cu_seq_lens_k=batch.cu_seqlens,
        max_length_q=batch.max_seqlen,
        max_length_k=batch.max_seqlen,
    )
    return output.last_hidden_state[0]


def lm_head_weight(model: PreTrainedModel) -> Tensor:
    """The output embeddings [V, D]."""
    head = model.get_output_embeddings()
    assert head.bias is None, "families with a bias at the LM head are not in FAMILIES"
    return head.weight


def _register_attention() -> None:
    AttentionInterface.register(HF_NAMES["document_sdpa"], document_sdpa)
    AttentionInterface.register(HF_NAMES["varlen"], varlen)


def document_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    cu_seq_lens_q: Tensor,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each document: one `scaled_dot_product_attention` call per distinct document length.

    query [1, H, T, A], key and value [1, K, T, A] -> [1, T, H, A]. No mask spans more than one document.
    """
    assert attention_mask is None, "a registered attention without a registered mask gets none"
    lengths = cu_seq_lens_q.diff()
    # Documents sorted by length, so that equals lie side by side: lengths 3 2 3 -> tokens of documents 1 0 2.
    order = torch.argsort(lengths, stable=True)
    counts = lengths[order]
    starts = cu_seq_lens_q[:-1][order].repeat_interleave(counts)
    offsets = torch.arange(len(starts), device=starts.device) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    index = starts + offsets
    group_lengths, group_sizes = (x.tolist() for x in torch.unique_consecutive(counts, return_counts=True))
    group_tokens = [length * size for length, size in zip(group_lengths, group_sizes, strict=True)]
    # split, not slices: the backward pass of a slice fills a whole row's worth of zeros per group.
    grouped = zip(*(x[0].index_select(1, index).split(group_tokens, dim=1) for x in (query, key, value)), strict=True)
    outputs = []
    for length, size, tensors in zip(group_lengths, group_sizes, grouped, strict=True):
        q, k, v = (x.unflatten(1, (size, length)).transpose(0, 1) for x in tensors)
        mask = _window_mask(length, sliding_window, query.device)
        attended = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling, enable_gqa=True
        )
        outputs.append(attended.transpose(1, 2).flatten(0, 1))
    back = torch.empty_like(index)
    back[index] = torch.arange(len(index), device=index.device)
    return torch.cat(outputs).index_select(0, back)[None], None


def _window_mask(length: int, window: int | None, device: torch.device) -> Tensor | None:
    """True where a token may look, [length, length]; None when the plain causal mask says the same."""
    if window is None or length <= window:
        return None
    position = torch.arange(length, device=device)
    distance = position[:, None] - position[None, :]
    return (distance >= 0) & (distance < window)


def varlen(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The same through torch's variable-length kernel (CUDA, 16-bit): query [1, H, T, A] -> [1, T, H, A]."""
    from torch.nn.attention.varlen import varlen_attn

    assert attention_mask is None, "a registered attention without a registered mask gets none"
    if dropout:
        raise BackendError("torch's varlen attention has no dropout. Set model.config_overrides.attention_dropout=0.")
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    # (left, right) neighbours a token sees; -1 is all of them.
    window = (-1 if sliding_window is None else sliding_window - 1, 0)
    output = varlen_attn(
        q, k, v, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q,
        scale=scaling, window_size=window, enable_gqa=True,
    )  # fmt: skip
    assert isinstance(output, Tensor), "auxiliary outputs were not asked for"
    return output[None], None
