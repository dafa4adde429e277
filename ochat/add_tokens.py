"""`ochat add-tokens`: a base model's folder in, the same model with the control tokens of a template out.

Works on the safetensors files: those without embeddings are copied, in the others only the embeddings change, so the
largest file is what memory must hold. `ochat train` does the same to a base that it loads (embeddings.py).
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from ochat.data.template import Template, get_template
from ochat.data.tokenize import ChatTokenizer, load_tokenizer
from ochat.embeddings import RowStudy, study_rows, write_rows
from ochat.errors import CheckpointError, first_line
from ochat.folders import replace_folder
from ochat.hub_names import located

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
NEEDED = ("*.json", "*.safetensors")
RESAVE = "Save the base as safetensors: `AutoModelForCausalLM.from_pretrained(BASE).save_pretrained(DIR)`."


@dataclass(frozen=True, slots=True, kw_only=True)
class AddedTokens:
    """control_ids: token -> id. num_old: embedding rows of the base. studies: embedding matrix -> its rows."""

    folder: Path
    control_ids: Mapping[str, int]
    num_old: int
    num_tokens: int
    studies: Mapping[str, RowStudy]

    def report(self) -> str:
        """What was done, a line each."""
        lines = [f"{self.folder}: {self.num_old} -> {self.num_tokens} tokens, as many as embedding rows"]
        for token, i in self.control_ids.items():
            lines.append(f"  {token} = {i} ({'new row' if i >= self.num_old else 'the base has a row for it'})")
        return "\n".join(lines + [f"  {name}: {study.summary()}" for name, study in self.studies.items()])


def add_tokens(base: str, *, template: str, to: str | Path) -> AddedTokens:
    """Write `to`: the base with the template's control tokens. CheckpointError if `to` holds anything already."""
    folder = Path(to)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder}: exists and is not empty. Give --to a new folder.")
    chosen = get_template(template)
    source = _base_folder(base)
    matrices = _matrices(source)
    shards = _shards(source, frozenset().union(*matrices))
    tokenizer = load_tokenizer(str(source), chosen)
    ChatTokenizer(tokenizer, chosen)  # refuses a control token that is not one token
    with replace_folder(folder) as new:
        studies: dict[str, RowStudy] = {}
        for file, names in shards.items():
            studies |= _write_shard(source / file, new / file, names, tokenizer, chosen)
        if missing := [sorted(names)[0] for names in matrices if names.isdisjoint(studies)]:
            raise CheckpointError(
                f"{source}: {' and '.join(missing)} not found in its safetensors files, whose tensors have other names "
                f"than its config.json stands for. {RESAVE}"
            )
        num_old = _write_config(source, new, num_tokens=len(tokenizer))
        tokenizer.save_pretrained(new)
    ids = tokenizer.convert_tokens_to_ids(list(chosen.control_tokens))
    control_ids = dict(zip(chosen.control_tokens, ids, strict=True))
    return AddedTokens(
        folder=folder, control_ids=control_ids, num_old=num_old, num_tokens=len(tokenizer), studies=studies
    )


def _base_folder(base: str) -> Path:
    source = located(base)
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(base, allow_patterns=list(NEEDED)))
    except Exception as exc:  # offline, unknown, gated, malformed: no base shared but Exception
        raise CheckpointError(f"{base}: neither a folder nor a model on the hub ({first_line(exc)}).") from exc


def _matrices(source: Path) -> list[frozenset[str]]:
    """The names of each embedding matrix; one matrix with two names where input and output are tied."""
    try:
        hf_config = AutoConfig.from_pretrained(source)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(hf_config)
    except (OSError, ValueError) as exc:
        raise CheckpointError(f"{source}: no configuration of a causal language model: {first_line(exc)}") from exc
    ids = {id(e.weight) for e in (model.get_input_embeddings(), model.get_output_embeddings())}
    named = [(name, id(p)) for name, p in model.named_parameters(remove_duplicate=False)]
    return [frozenset(name for name, of in named if of == matrix) for matrix in ids]


def _shards(source: Path, names: frozenset[str]) -> dict[str, set[str]]:
    """File name -> the embedding matrices in it, of those with `names`."""
    if (source / INDEX_NAME).is_file():
        weight_map = _read_index(source)["weight_map"]
        return {f: {n for n in names if weight_map.get(n) == f} for f in sorted(set(weight_map.values()))}
    if (source / SINGLE_NAME).is_file():
        return {SINGLE_NAME: set(names)}
    raise CheckpointError(f"{source}: neither {SINGLE_NAME} nor {INDEX_NAME}. {RESAVE}")


def _read_index(source: Path) -> dict[str, Any]:
    path = source / INDEX_NAME
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as exc:
        raise CheckpointError(f"{path}: not readable as JSON ({exc}). Download the base again.") from exc
    if not isinstance(index, dict) or not isinstance(index.get("weight_map"), dict):
        raise CheckpointError(f"{path}: has no `weight_map`. Download the base again.")
    return index


def _write_shard(
    old: Path, new: Path, names: set[str], tokenizer: PreTrainedTokenizerFast, template: Template
) -> dict[str, RowStudy]:
    """Copy a file of tensors with its embedding matrices, `names`, made to fit."""
    if not old.is_file():
        raise CheckpointError(f"{old}: missing, though {INDEX_NAME} names it. Download the base again.")
    if not names:
        shutil.copyfile(old, new)
        return {}
    control_ids = tokenizer.convert_tokens_to_ids(list(template.control_tokens))
    studies = {}
    try:
        with safe_open(old, framework="pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except SafetensorError as exc:
        raise CheckpointError(f"{old}: not readable as safetensors ({exc}). Download the base again.") from exc
    for name in sorted(names & set(tensors)):  # tied embeddings are stored once
        weight = tensors[name]
        if weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise CheckpointError(f"{old}: {name} is {weight.dtype}, a quantised base. Give one in 16 or 32 bits.")
        studies[name] = study_rows(weight, len(tokenizer), control_ids)
        tensors[name] = _resized(weight, len(tokenizer), studies[name])
    save_file(tensors, new, metadata=metadata)
    return studies


def _resized(weight: Tensor, num_tokens: int, study: RowStudy) -> Tensor:
    kept = min(len(weight), num_tokens)
    resized = weight.new_empty(num_tokens, weight.shape[1])
    resized[:kept] = weight[:kept]
    write_rows(resized, study, num_old=kept)
    return resized


def _write_config(source: Path, new: Path, *, num_tokens: int) -> int:
    """Copy the model's JSON files with the new vocabulary size and file sizes; returns the old vocabulary size."""
    tree: dict[str, Any] = json.loads((source / "config.json").read_text(encoding="utf-8"))
    num_old = AutoConfig.from_pretrained(source).vocab_size
    _write_json(new / "config.json", tree | {"vocab_size": num_tokens})
    if (source / "generation_config.json").is_file():
        shutil.copyfile(source / "generation_config.json", new / "generation_config.json")
    if (source / INDEX_NAME).is_file():
        index = _read_index(source)
        sizes = (_num_bytes(new / file) for file in set(index["weight_map"].values()))
        # Nothing of the old metadata: transformers writes the number of parameters there, which is another number here.
        index["metadata"] = {"total_size": sum(sizes)}
        _write_json(new / INDEX_NAME, index)
    return num_old


def _num_bytes(file: Path) -> int:
    """Bytes of the tensors of a safetensors file: 8 bytes, the length of a header, the header, the tensors."""
    with file.open("rb") as stream:
        return file.stat().st_size - 8 - int.from_bytes(stream.read(8), "little")


def _write_json(path: Path, tree: object) -> None:
    path.write_text(json.dumps(tree, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
