"""An exported model: a plain Hugging Face folder that also knows its template, its conditions and where it came from.

config.json, generation_config.json, *.safetensors    any transformers loads them
tokenizer.json, tokenizer_config.json, chat_template.jinja
                                                      `apply_chat_template(..., condition="GPT4")` works
ochat.json                                            the CheckpointCard
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from ochat.config import Config
from ochat.data.store import Manifest
from ochat.data.template import Template, get_template, to_jinja
from ochat.data.tokenize import ChatTokenizer, adds_dummy_prefix
from ochat.errors import CheckpointError
from ochat.folders import replace_folder

EXPORT_NAME = "export"  # of a run folder
CARD_NAME = "ochat.json"
CARD_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointCard:
    """conditions: those the model was trained under, the most frequent first. max_length: in tokens."""

    format_version: int
    base_model: str
    template: str
    conditions: tuple[str, ...]
    default_condition: str
    max_length: int
    step: int
    dataset_fingerprint: str
    config: Mapping[str, Any]

    @classmethod
    def read(cls, folder: Path) -> Self:
        path = folder / CARD_NAME
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as exc:
            raise CheckpointError(
                f"{folder}: not an ochat model, {CARD_NAME} is missing. Give a run's export folder."
            ) from exc
        except ValueError as exc:
            raise CheckpointError(f"{path}: not readable as JSON ({exc}).") from exc
        if tree.get("format_version") != CARD_VERSION:
            raise CheckpointError(
                f"{path}: format {tree.get('format_version')}, this ochat reads format {CARD_VERSION}."
            )
        return cls(conditions=tuple(tree.pop("conditions")), **tree)

    def inference_template(self) -> Template:
        """The template with this model's default condition in the place of its own."""
        return replace(get_template(self.template), default_condition=self.default_condition)


def make_card(config: Config, manifest: Manifest, *, best_source: int, step: int) -> CheckpointCard:
    """The card of a run after `step`. best_source: position of the source with the highest weight."""
    total: Counter[str] = Counter()
    for counts in manifest.counts.values():
        total.update(counts["conditions"])
    return CheckpointCard(
        format_version=CARD_VERSION,
        base_model=config.model.name_or_path,
        template=get_template(config.model.template).name,
        conditions=tuple(condition for condition, _ in total.most_common()),
        default_condition=default_condition(config, manifest, best_source),
        max_length=config.model.max_length,
        step=step,
        dataset_fingerprint=manifest.fingerprint,
        config=config.model_dump(mode="json"),
    )


def default_condition(config: Config, manifest: Manifest, best_source: int) -> str:
    """The template's own default if the best source was trained as that, else what that source mostly was."""
    default = get_template(config.model.template).default_condition
    in_best = manifest.counts[config.data.sources[best_source].name]["conditions"]
    return default if default in in_best else max(in_best, key=lambda condition: in_best[condition], default="")


def export_model(
    folder: Path,
    *,
    model: PreTrainedModel,
    state_dict: Mapping[str, Tensor],
    tokenizer: PreTrainedTokenizerFast,
    card: CheckpointCard,
) -> None:
    """Write the folder, or replace it whole. `model` gives the architecture, `state_dict` the weights."""
    template = card.inference_template()
    end_of_turn = ChatTokenizer(tokenizer, template).end_of_turn_ids[-1]
    tokenizer.chat_template = to_jinja(template, dummy_prefix=adds_dummy_prefix(tokenizer))
    # Whoever generates until eos (a GGUF, say) must stop at the end of a turn.
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end_of_turn)
    model.config.eos_token_id = end_of_turn
    model.config.bos_token_id = tokenizer.bos_token_id
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=end_of_turn, pad_token_id=end_of_turn
    )
    with replace_folder(folder) as new:
        model.save_pretrained(new, state_dict=dict(state_dict))
        tokenizer.save_pretrained(new)
        (new / CARD_NAME).write_text(json.dumps(asdict(card), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
