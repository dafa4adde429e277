"""A base model to fine-tune in a minute: a small tokenizer trained on the corpus, and the shape of a tiny Mistral.

The corpus' texts enter; a Hugging Face folder with tokenizer files and `config.json` leaves. It holds no weights:
train with `model.init=random`.
"""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import MistralConfig, PreTrainedTokenizerFast

BOS, EOS, END_OF_TURN = "<s>", "</s>", "<|end_of_turn|>"

# What the template writes around the messages, and its words alone.
TEMPLATE_TEXTS = ("GPT4 User:", "GPT4 Assistant:", "GPT3 User:", "GPT3 Assistant:", "User", "Assistant")
MAX_VOCAB_SIZE = 512


def write_base_model(folder: Path, texts: Iterable[str]) -> MistralConfig:
    """Write tokenizer and `config.json` of an untrained model into the folder and return the config."""
    tokenizer = train_tokenizer(texts)
    config = tiny_mistral(tokenizer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    config.save_pretrained(folder)
    return config


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer in which a digit is always one token and any text encodes.

    Nothing but digits splits a text, so all that stands between two numbers becomes one token:
    "What is 347 + 586?" is `What is `, 3, 4, 7, ` + `, 5, 8, 6, `?`.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=MAX_VOCAB_SIZE,
        min_frequency=1,
        special_tokens=[BOS, EOS, END_OF_TURN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([*TEMPLATE_TEXTS, *texts], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        additional_special_tokens=[END_OF_TURN],
        clean_up_tokenization_spaces=False,
    )


def tiny_mistral(tokenizer: PreTrainedTokenizerFast) -> MistralConfig:
    """Return the shape of a Mistral of about 230,000 parameters."""
    return MistralConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=24,
        max_position_embeddings=256,
        sliding_window=None,
        rope_parameters={"rope_type": "default", "rope_theta": 10.0},  # a chat has 28 tokens
        initializer_range=0.1,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
