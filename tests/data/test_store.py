"""The prepared dataset on disk: written, replaced in one step, and read without copying."""

from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest

from ochat.data.store import (
    BATCH_ROWS,
    FORMAT_VERSION,
    MANIFEST_NAME,
    SCHEMA,
    Manifest,
    PreparedSplit,
    SourceFile,
    check_replaceable,
    write_split,
)
from ochat.errors import DataError

ITEMS = [
    {"input_ids": [5, 6], "token_weights": [0.0, 1.0], "source_id": 0, "line": 1, "reward": 0.5},
    {"input_ids": [7, 8, 9], "token_weights": [0.0, 0.0, 2.0], "source_id": 0, "line": 4, "reward": None},
    {"input_ids": [3, 4], "token_weights": [0.0, 0.5], "source_id": 1, "line": 2, "reward": 1.0},
]


def batch(*items: dict[str, object]) -> pa.RecordBatch:
    sums = [sum(i["token_weights"]) for i in items]  # type: ignore[arg-type]
    one = {"num_supervised": 1, "num_replies": 1}
    rows = [{**i, **one, "weight_sum": s, "reply_weight_sum": s} for i, s in zip(items, sums, strict=True)]
    return pa.RecordBatch.from_pylist(rows, SCHEMA)


@pytest.fixture
def split(tmp_path: Path) -> Path:
    write_split(iter([batch(*ITEMS[:2]), batch(ITEMS[2])]), tmp_path / "train")
    return tmp_path / "train"


def manifest() -> Manifest:
    file = SourceFile(path="a.jsonl", size=3, mtime_ns=5, sha256="ab")
    return Manifest(
        format_version=FORMAT_VERSION,
        fingerprint="f",
        recipe={"max_length": 8},
        files={"a": file},
        counts={"a": {"read": 1}},
    )


# --- the split


def test_datasets_opens_the_split_with_the_promised_columns(split: Path) -> None:
    opened = datasets.load_from_disk(str(split))
    assert opened.features.arrow_schema.remove_metadata() == SCHEMA
    assert opened["input_ids"][:] == [i["input_ids"] for i in ITEMS]
    assert opened["reward"][:] == [0.5, None, 1.0]


def test_the_reader_gives_back_every_item_in_order(split: Path) -> None:
    opened = PreparedSplit(split)
    assert len(opened) == 3
    assert opened.lengths.tolist() == [2, 3, 2]
    for index, item in enumerate(ITEMS):
        ids, weights = opened.tokens([index])
        assert (ids.tolist(), weights.tolist()) == (item["input_ids"], item["token_weights"])
        assert (ids.dtype, weights.dtype) == (np.int32, np.float32)


def test_columns_are_arrays_and_a_missing_reward_is_nan(split: Path) -> None:
    opened = PreparedSplit(split)
    assert opened.column("source_id").tolist() == [0, 0, 1]
    assert opened.column("line").tolist() == [1, 4, 2]
    np.testing.assert_array_equal(opened.column("reward"), [0.5, np.nan, 1.0])


def test_several_items_lie_end_to_end_in_the_order_asked_for(split: Path) -> None:
    opened = PreparedSplit(split)
    ids, weights = opened.tokens([2, 0])
    assert ids.tolist() == ITEMS[2]["input_ids"] + ITEMS[0]["input_ids"]
    assert weights.tolist() == ITEMS[2]["token_weights"] + ITEMS[0]["token_weights"]
    assert [len(array) for array in opened.tokens([])] == [0, 0]


def test_small_batches_are_joined_and_large_ones_are_not(tmp_path: Path) -> None:
    small = [batch({**ITEMS[0], "line": line}) for line in range(100)]
    large = [batch(*({**ITEMS[1], "line": line} for line in range(BATCH_ROWS)))] * 2
    write_split(iter(small), tmp_path / "small")
    write_split(iter(large), tmp_path / "large")
    sizes = {}
    for name in ("small", "large"):
        (file,) = (tmp_path / name).glob("*.arrow")
        sizes[name] = [b.num_rows for b in pa.ipc.open_stream(pa.memory_map(str(file)))]
    assert sizes == {"small": [100], "large": [BATCH_ROWS] * 2}
    assert PreparedSplit(tmp_path / "small").column("line").tolist() == list(range(100))


def test_only_the_folder_is_left(split: Path) -> None:
    assert list(split.parent.iterdir()) == [split]


def test_what_a_caller_writes_reaches_no_other(split: Path) -> None:
    opened = PreparedSplit(split)
    opened.tokens([1])[0][:] = 0
    assert opened.tokens([1])[0].tolist() == ITEMS[1]["input_ids"]


def test_tokens_are_no_column(split: Path) -> None:
    with pytest.raises(AssertionError, match=r"use tokens\(items\)"):
        PreparedSplit(split).column("input_ids")


def test_several_arrow_files_are_read_as_one_in_their_order(tmp_path: Path, split: Path) -> None:
    datasets.load_from_disk(str(split)).save_to_disk(str(tmp_path / "three"), num_shards=3)
    assert len(list((tmp_path / "three").glob("data-*.arrow"))) == 3
    opened = PreparedSplit(tmp_path / "three")
    assert [opened.tokens([i])[0].tolist() for i in range(3)] == [i["input_ids"] for i in ITEMS]
    assert opened.column("line").tolist() == [1, 4, 2]


def test_a_folder_without_arrow_files_says_how_to_make_them(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no Arrow files there\. Run `ochat prepare`"):
        PreparedSplit(tmp_path)


# --- the manifest


def test_a_manifest_is_read_as_it_was_written(tmp_path: Path) -> None:
    manifest().write(tmp_path)
    assert Manifest.read(tmp_path) == manifest()


@pytest.mark.parametrize("text", ["{", "[]", "3", "{}", f'{{"format_version": {FORMAT_VERSION}}}'])
def test_a_damaged_manifest_is_a_data_error(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST_NAME).write_text(text)
    with pytest.raises(DataError) as raised:
        Manifest.read(tmp_path)
    assert str(raised.value).startswith(str(tmp_path / MANIFEST_NAME))


def test_a_manifest_of_another_format_names_both(tmp_path: Path) -> None:
    (tmp_path / MANIFEST_NAME).write_text('{"format_version": 99}')
    with pytest.raises(DataError, match=f"prepared in format 99, this ochat reads format {FORMAT_VERSION}"):
        Manifest.read(tmp_path)


def test_a_missing_manifest_means_no_prepared_dataset(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no prepared dataset there \(manifest.json is missing\)"):
        Manifest.read(tmp_path / "none")


def test_a_file_where_the_folder_should_be_is_a_data_error(tmp_path: Path) -> None:
    (tmp_path / "prepared").write_text("mine")
    with pytest.raises(DataError):
        Manifest.read(tmp_path / "prepared")


# --- what may be replaced


def contents(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


# The second folder has a manifest, as a web page or a browser extension has one, but not ours.
@pytest.mark.parametrize("files", [{"thesis.tex": "mine"}, {"thesis.tex": "mine", MANIFEST_NAME: '{"name": "page"}'}])
def test_a_folder_of_someone_else_is_refused_and_kept(tmp_path: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match="is not a prepared dataset; it will not be overwritten"):
        check_replaceable(tmp_path)
    assert contents(tmp_path) == files


def test_a_file_in_the_way_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "prepared").write_text("mine")
    with pytest.raises(DataError, match="is not a prepared dataset"):
        check_replaceable(tmp_path / "prepared")
    assert (tmp_path / "prepared").read_text() == "mine"
