"""A whole experiment in a temporary folder: chats of two sources, a tiny base model, the fixture tokenizer, a YAML.

Small enough that a training step takes milliseconds.
"""

import json
import random
from pathlib import Path

import yaml
from transformers import MistralConfig

from ochat.config import Config, load_config

TOKENIZERS = Path(__file__).parent / "fixtures" / "tokenizers"
WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "saw", "12", "red", "birds", "fly", "over", "old", "walls")


def write_chats(path: Path, num_chats: int, seed: int) -> None:
    """ShareGPT lines of one to three turns of random words."""
    rng = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(num_chats):
            turns = []
            for _ in range(rng.randint(1, 3)):
                for role in ("human", "gpt"):
                    turns.append({"from": role, "value": " ".join(rng.choices(WORDS, k=rng.randint(1, 9)))})
            file.write(json.dumps({"conversations": turns}) + "\n")


def write_experiment(folder: Path, **sections: dict) -> Path:
    """Write chats, base model and experiment.yaml; `sections` update the YAML's. Returns the YAML's path."""
    write_chats(folder / "expert.jsonl", 30, seed=1)
    write_chats(folder / "crowd.jsonl", 90, seed=2)
    MistralConfig(
        vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256,
    ).save_pretrained(folder / "base")  # fmt: skip
    tree = {
        "run": {"name": "test", "output_dir": str(folder / "runs"), "seed": 0},
        "model": {
            "name_or_path": str(folder / "base"),
            "tokenizer_name_or_path": str(TOKENIZERS / "mini-mistral"),
            "template": "openchat-3.5",
            "max_length": 128,
            "init": "random",
            "gradient_checkpointing": False,
        },
        "data": {
            "prepared_dir": str(folder / "prepared"),
            "sources": [
                {"name": "expert", "path": str(folder / "expert.jsonl"), "condition": "GPT4", "weight": 1.0},
                {"name": "crowd", "path": str(folder / "crowd.jsonl"), "condition": "GPT3", "weight": 0.1},
            ],
            "num_proc": 1,
        },
        "batch": {"micro_batch_tokens": 256, "global_batch_tokens": 1024},
        "optimizer": {"learning_rate": 1e-3},
        "training": {"num_epochs": 2},
    }
    for section, values in sections.items():
        tree.setdefault(section, {}).update(values)
    path = folder / "experiment.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def make_experiment(folder: Path, *overrides: str) -> Config:
    return load_config(write_experiment(folder), overrides)
