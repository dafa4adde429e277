"""The tokenizers built by scripts/ equal the reference ones; the two fixture tokenizers encode any text.

Comparisons with the reference are skipped where it is absent or `python scripts/build_tokenizers.py` was not run.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[2]
BUILT = ROOT / ".cache" / "tokenizers"
REFERENCE = ROOT.parent / "shared" / "tokenizers"
CONVERSATIONS = ROOT.parent / "shared" / "golden" / "conversations.jsonl"
FIXTURES = ROOT / "tests" / "fixtures" / "tokenizers"
REAL = ["mistral-v0.1-eot", "llama-3"]
FILES = ["tokenizer.json", "tokenizer_config.json"]
SPECIAL = ["<s>", "</s>", "<unk>", "<|end_of_turn|>", "<|begin_of_text|>", "<|start_header_id|>", "<|eot_id|>"]

# Plain text, text with runs of spaces and newlines, and text that spells out special tokens and byte pieces.
any_text = st.lists(
    st.one_of(st.text(), st.sampled_from([*SPECIAL, "<0x41>", " ", "  ", "\n", "\n\n", "▁", "GPT4 Correct User:"]))
).map("".join)


def module_at(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


script = module_at(ROOT / "scripts" / "build_tokenizers.py")
fixture_builder = module_at(ROOT / "tests" / "fixtures" / "build_fixture_tokenizers.py")


@cache
def load(folder: Path) -> PreTrainedTokenizerFast:
    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(str(folder))
    return tokenizer


def ids(tokenizer: PreTrainedTokenizerFast, texts: list[str], *, split_special: bool) -> list[list[int]]:
    rows: list[list[int]] = tokenizer(texts, add_special_tokens=False, split_special_tokens=split_special)["input_ids"]
    return rows


def need_built(name: str) -> None:
    if not (BUILT / name).is_dir():
        pytest.skip(f"{BUILT / name} is not built: run `python scripts/build_tokenizers.py`")


def need_reference(path: Path) -> None:
    if not path.exists():
        pytest.skip(f"no reference at {path}")


def golden_contents() -> list[str]:
    lines = CONVERSATIONS.read_text(encoding="utf-8").splitlines()
    conversations = [json.loads(line)["conversation"] for line in lines]
    return [item["content"] for conversation in conversations for item in conversation["items"]]


def random_texts(count: int) -> list[str]:
    rng = random.Random(0)
    pieces = [
        *SPECIAL,
        " ",
        "  ",
        "\n",
        "\t",
        "'s",
        "'LL",
        "1",
        "234567",
        "Hello",
        "user",
        "é",
        "中文",
        "🙂",
        "\u0301",
        "▁",
    ]
    texts = []
    for _ in range(count):
        drawn = rng.choices(pieces, k=rng.randint(1, 12))
        texts.append("".join(piece if rng.random() < 0.7 else chr(rng.randint(32, 0xD7FF)) for piece in drawn))
    return texts


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("name", REAL)
def test_built_tokenizer_is_byte_for_byte_the_reference(name: str, file: str) -> None:
    need_built(name)
    need_reference(REFERENCE / name)
    assert (BUILT / name / file).read_bytes() == (REFERENCE / name / file).read_bytes()


@pytest.mark.parametrize("split_special", [True, False])
@pytest.mark.parametrize("name", REAL)
def test_built_tokenizer_gives_the_reference_ids(name: str, split_special: bool) -> None:
    need_built(name)
    need_reference(REFERENCE / name)
    need_reference(CONVERSATIONS)
    texts = golden_contents() + random_texts(2000)
    built = ids(load(BUILT / name), texts, split_special=split_special)
    assert built == ids(load(REFERENCE / name), texts, split_special=split_special)


@pytest.mark.parametrize("name", REAL)
def test_spelled_out_special_tokens_stay_plain_only_when_split(name: str) -> None:
    need_built(name)
    tokenizer = load(BUILT / name)
    special = sorted(tokenizer.get_added_vocab())
    control = set(tokenizer.get_added_vocab().values())
    assert all(control.isdisjoint(row) for row in ids(tokenizer, special, split_special=True))
    assert all(len(row) == 1 for row in ids(tokenizer, special, split_special=False))


def test_llama3_special_tokens_have_their_3_0_places() -> None:
    names = script.llama3_special_tokens()
    assert len(names) == len(set(names)) == 256
    assert [names.index(name) for name in ("<|begin_of_text|>", "<|start_header_id|>", "<|eot_id|>")] == [0, 6, 9]
    assert (names[8], names[10], names[255]) == (
        "<|reserved_special_token_4|>",
        "<|reserved_special_token_5|>",
        "<|reserved_special_token_250|>",
    )


def test_a_changed_file_is_refused_with_both_hashes(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(b"not a model")
    with pytest.raises(script.BuildError, match=f"has sha256 [0-9a-f]{{64}}, expected {script.MISTRAL.sha256}"):
        script.check_hash(path, script.MISTRAL)


def test_a_missing_package_is_reported_in_one_paragraph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(script.BuildError, match=r"`pip download mistral-common==1\.13\.1` failed") as raised:
        script.fetch(script.MISTRAL, tmp_path)
    assert "\n" not in str(raised.value)


def test_fixture_files_are_what_the_builder_writes(tmp_path: Path) -> None:
    fixture_builder.build(tmp_path)
    for name in ("mini-llama3", "mini-mistral"):
        for file in FILES:
            assert (tmp_path / name / file).read_bytes() == (FIXTURES / name / file).read_bytes()


@given(any_text)
def test_mini_llama3_decodes_to_the_text_it_encoded(text: str) -> None:
    tokenizer = load(FIXTURES / "mini-llama3")
    (row,) = ids(tokenizer, [text], split_special=True)
    assert tokenizer.decode(row) == text


@given(any_text)
def test_mini_mistral_never_gives_unk(text: str) -> None:
    tokenizer = load(FIXTURES / "mini-mistral")
    (row,) = ids(tokenizer, [text], split_special=True)
    assert tokenizer.unk_token_id not in row


@given(any_text)
def test_mini_mistral_decodes_to_the_text_with_plain_spaces(text: str) -> None:
    tokenizer = load(FIXTURES / "mini-mistral")
    (row,) = ids(tokenizer, [text], split_special=True)
    assert tokenizer.decode(row) == text.replace("▁", " ")


@pytest.mark.parametrize("name", ["mini-llama3", "mini-mistral"])
@given(text=any_text)
def test_fixture_special_tokens_come_only_from_unsplit_text(name: str, text: str) -> None:
    tokenizer = load(FIXTURES / name)
    control = tokenizer.get_added_vocab()
    (plain,) = ids(tokenizer, [text], split_special=True)
    (parsed,) = ids(tokenizer, [text], split_special=False)
    assert set(control.values()).isdisjoint(plain)
    assert set(control.values()).isdisjoint(parsed) == all(token not in text for token in control)


def test_mini_llama3_finds_one_word_only_by_ignoring_merges() -> None:
    tokenizer = load(FIXTURES / "mini-llama3")
    word = fixture_builder.ONLY_IGNORE_MERGES.decode()
    assert len(ids(tokenizer, [word], split_special=True)[0]) == 1
    merging = PreTrainedTokenizerFast.from_pretrained(str(FIXTURES / "mini-llama3"))
    merging.backend_tokenizer.model.ignore_merges = False
    assert len(ids(merging, [word], split_special=True)[0]) > 1


@pytest.mark.parametrize("name", ["mini-llama3", "mini-mistral"])
def test_fixture_pieces_joined_are_not_the_joined_text(name: str) -> None:
    tokenizer = load(FIXTURES / name)
    first, second, joined = ids(tokenizer, ["GPT4 Cor", "rect User", "GPT4 Correct User"], split_special=True)
    assert first + second != joined


def test_mini_mistral_writes_a_rare_character_as_its_utf8_bytes() -> None:
    tokenizer = load(FIXTURES / "mini-mistral")
    (row,) = ids(tokenizer, ["🙂"], split_special=True)
    assert tokenizer.convert_ids_to_tokens(row) == ["▁", "<0xF0>", "<0x9F>", "<0x99>", "<0x82>"]
