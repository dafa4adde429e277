"""Chat files become numbered records; a file that cannot be read is a DataError."""

import gzip
import hashlib
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from ochat.config import SourceConfig
from ochat.data.hub import hub_version
from ochat.data.problems import RowError
from ochat.data.records import Record, hash_file, parse_line, read_records, source_records
from ochat.errors import DataError
from tests.experiment import TOKENIZERS

ROWS = [{"messages": n} for n in (1, 2, 3)]
JSONL = b'{"messages": 1}\n\n  \t\n{"messages": 2}\r\n{"messages": 3}'
ARRAY = json.dumps(ROWS).encode()


def write(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return path


def decoded(records: list[Record]) -> list[object]:
    return [json.loads(r.row) if isinstance(r.row, bytes) else r.row for r in records]


def refused(path: Path) -> str:
    with pytest.raises(DataError) as raised:
        list(read_records(path))
    assert str(raised.value).startswith(str(path))
    return str(raised.value)


@pytest.mark.parametrize("name", ["chats.jsonl", "chats.jsonl.gz"])
def test_blank_lines_are_passed_over_and_counted(tmp_path: Path, name: str) -> None:
    records = list(read_records(write(tmp_path, name, JSONL)))
    assert [r.number for r in records] == [1, 4, 5]
    assert decoded(records) == ROWS


@pytest.mark.parametrize("name", ["chats.json", "chats.json.gz"])
def test_array_items_are_numbered_from_1(tmp_path: Path, name: str) -> None:
    records = list(read_records(write(tmp_path, name, ARRAY)))
    assert records == [Record(number=n, row=row) for n, row in enumerate(ROWS, 1)]


@pytest.mark.parametrize("name", ["chats.jsonl", "chats.jsonl.gz", "chats.json", "chats.json.gz"])
def test_advance_hears_every_byte_of_the_file(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, name, ARRAY if ".json." in f"{name}." else JSONL * 100_000)
    heard: list[int] = []
    num_records = sum(1 for _ in read_records(path, heard.append))
    assert num_records >= 3
    assert sum(heard) == path.stat().st_size


@pytest.mark.parametrize(
    ("name", "content"), [("chats.jsonl", JSONL * 200_000), ("chats.json", b"[" + b"1, " * 4_000_000 + b"1]")]
)
def test_a_file_is_not_read_ahead_to_its_end(tmp_path: Path, name: str, content: bytes) -> None:
    path = write(tmp_path, name, content)
    heard: list[int] = []
    next(read_records(path, heard.append))
    assert 0 < sum(heard) < path.stat().st_size


@pytest.mark.parametrize("content", [b"", b"\n\n"])
def test_an_empty_file_has_no_records(tmp_path: Path, content: bytes) -> None:
    assert list(read_records(write(tmp_path, "chats.jsonl", content))) == []


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert "no such file" in refused(tmp_path / "none.jsonl")


def test_an_unknown_kind_of_file_lists_the_known_ones(tmp_path: Path) -> None:
    assert "Known: .jsonl, .json, .jsonl.gz, .json.gz" in refused(write(tmp_path, "chats.csv", b"a,b"))


@pytest.mark.parametrize(("content", "found"), [(b'{"a": 1}', "dict"), (b"3", "int")])
def test_a_json_file_that_is_no_array_is_refused(tmp_path: Path, content: bytes, found: str) -> None:
    assert f"expected a JSON array of chats, found {found}" in refused(write(tmp_path, "chats.json", content))


def test_a_broken_json_file_is_refused(tmp_path: Path) -> None:
    text = refused(write(tmp_path, "chats.json", b"[1,\n 2 3]"))
    assert text.endswith(
        "chats.json: item 2: not valid JSON at line 2, column 4: Expecting ',' delimiter. Fix it there."
    )
    assert "item 2: not valid JSON at line 1, column 5" in refused(write(tmp_path, "chats.json", b"[1, "))
    assert "not valid UTF-8 at byte 2" in refused(write(tmp_path, "chats.json", b'["\xff"]'))
    assert "not readable as JSON" in refused(write(tmp_path, "chats.json", b"[" * 100_000))


def test_lines_in_a_json_file_and_an_array_in_a_jsonl_file_are_told_the_right_name(tmp_path: Path) -> None:
    lines = b'{"messages": 1}\n{"messages": 2}\n'
    assert "One chat per line is .jsonl: rename it." in refused(write(tmp_path, "chats.json", lines))
    array = json.dumps([{"id": "1", "conversations": []}] * 2)
    for content in (array, array.replace("}, ", "},\n"), json.dumps(ROWS, indent=1), "\ufeff" + array):
        text = refused(write(tmp_path, "chats.jsonl", content.encode()))
        assert "holds a JSON array, not a chat per line. Rename it: .json instead of .jsonl." in text


@pytest.mark.parametrize("line", [b'[{"role": "user", "content": "Hi"}]', b"[", b"[]", b"[1]", b"[{]", b"[" * 100_000])
def test_a_list_that_may_be_a_chat_is_a_line_like_any_other(tmp_path: Path, line: bytes) -> None:
    path = write(tmp_path, "chats.jsonl", b"{}\n" + line if line == b"[" else line)
    assert list(read_records(path))[-1].row == line


def test_only_the_end_of_a_name_says_what_a_file_is(tmp_path: Path) -> None:
    assert [r.number for r in read_records(write(tmp_path, "chats.json.jsonl", JSONL))] == [1, 4, 5]
    assert [r.number for r in read_records(write(tmp_path, "chats.jsonl.json", ARRAY))] == [1, 2, 3]


def test_a_byte_order_mark_is_no_line_of_its_own(tmp_path: Path) -> None:
    assert list(read_records(write(tmp_path, "chats.jsonl", b"\xef\xbb\xbf"))) == []
    assert [r.number for r in read_records(write(tmp_path, "chats.jsonl", b"\xef\xbb\xbf\r\n{}"))] == [2]


def test_lines_that_end_with_cr_alone_get_the_way_to_convert_them(tmp_path: Path) -> None:
    (record,) = read_records(write(tmp_path, "chats.jsonl", b"{}\r{}\r{}"))
    with pytest.raises(RowError, match=r"The lines end with CR: convert them with tr '\\r' '\\n'\.$"):
        parse_line(record.row, "f:1")
    with pytest.raises(RowError, match=r"Extra data\. Fix or delete the line\.$"):
        parse_line(b"{} {}", "f:1")


@pytest.mark.parametrize("damage", ["cut short", "no gzip at all", "wrong checksum", "wrong bits"])
@pytest.mark.parametrize("name", ["chats.jsonl.gz", "chats.json.gz"])
def test_a_damaged_gz_file_is_refused(tmp_path: Path, name: str, damage: str) -> None:
    path = write(tmp_path, name, JSONL if "jsonl" in name else ARRAY)
    assert list(read_records(path))
    whole = path.read_bytes()  # a header of 10 bytes, the compressed data, a checksum and a length of 4 bytes each
    damaged = {
        "cut short": whole[:-12],
        "no gzip at all": ARRAY,
        "wrong checksum": whole[:-8] + bytes(4) + whole[-4:],
        "wrong bits": whole[:10] + b"\xff" * 8 + whole[18:],
    }
    path.write_bytes(damaged[damage])
    assert "damaged or no gz file" in refused(path)


def test_a_line_is_decoded() -> None:
    assert parse_line('{"a": "é"}\n'.encode(), "f:1") == {"a": "é"}
    assert parse_line(b"\xef\xbb\xbf[1]", "f:1") == [1]  # a byte order mark, as some editors leave it


# The last two are valid JSON that Python will not take: too many digits, too many brackets.
@pytest.mark.parametrize(
    "line",
    [b"{'a': 1}", b"nope", b'"\xff"', b"[1" + b"0" * 5000 + b"]", b"[" * 100_000],
    ids=["quotes", "word", "utf8", "digits", "brackets"],
)
def test_a_line_that_cannot_be_decoded_names_its_place(line: bytes) -> None:
    with pytest.raises(DataError, match=r"^f:1: "):
        parse_line(line, "f:1")


def test_the_column_and_the_byte_of_the_mistake_are_named() -> None:
    with pytest.raises(DataError, match=r"^f:1: not valid JSON at column 7: .* Fix or delete the line\.$"):
        parse_line(b'{"a": }', "f:1")
    with pytest.raises(DataError, match=r"^f:1: not valid JSON at column 2: "):
        parse_line(b"[\n", "f:1")
    with pytest.raises(
        DataError, match=r"^f:1: not valid UTF-8 at byte 1\. Convert the file to UTF-8, or set data\.hygiene=clean"
    ):
        parse_line(b'"\xff"', "f:1")
    with pytest.raises(DataError, match=r"^f:1: not valid JSON at column 7: Unterminated string\. Fix or delete"):
        parse_line(b'{"a": "cut o\r\n', "f:1")
    with pytest.raises(DataError, match=r"^f:1: not valid JSON at column 9: Invalid control character\. Fix or delete"):
        parse_line(b'{"a": "b\tc"}', "f:1")


def test_a_file_is_known_by_its_bytes(tmp_path: Path) -> None:
    path = write(tmp_path, "chats.jsonl", JSONL)
    assert hash_file(path) == hashlib.sha256(JSONL).hexdigest()
    assert hash_file(path) != hashlib.sha256(JSONL + b"\n").hexdigest()


# --- other containers


@pytest.mark.parametrize("name", ["chats.jsonl.zst", "chats.json.zst"])
def test_zst_files_hold_the_same_records(tmp_path: Path, name: str) -> None:
    content = JSONL if "jsonl" in name else ARRAY
    path, heard = tmp_path / name, []
    half = len(content) // 2
    frames = [zstandard.compress(content[:half]), zstandard.compress(content[half:])]  # as `cat a.zst b.zst` makes them
    path.write_bytes(b"".join(frames))
    assert decoded(list(read_records(path, heard.append))) == ROWS
    assert sum(heard) == path.stat().st_size


@pytest.mark.parametrize("damage", ["cut short", "no zst at all"])
def test_a_damaged_zst_file_is_refused(tmp_path: Path, damage: str) -> None:
    whole = zstandard.compress(JSONL * 1000)
    path = tmp_path / "chats.jsonl.zst"
    path.write_bytes(whole)
    assert list(read_records(path))
    path.write_bytes({"cut short": whole[:-5], "no zst at all": JSONL}[damage])
    assert "damaged or no zst file" in refused(path)


def test_rows_of_a_parquet_file_are_numbered_from_1(tmp_path: Path) -> None:
    path, heard = tmp_path / "chats.parquet", []
    rows = [{"messages": [{"role": "user", "content": str(n)}]} for n in range(600)]
    pq.write_table(pa.Table.from_pylist(rows), path)
    records = list(read_records(path, heard.append))
    assert records == [Record(number=n, row=row) for n, row in enumerate(rows, 1)]
    assert sum(heard) == path.stat().st_size
    path.write_bytes(path.read_bytes()[:-10])
    assert "damaged or no Parquet file" in refused(path)


def test_a_parquet_file_without_rows_is_read_to_its_end(tmp_path: Path) -> None:
    path, heard = tmp_path / "chats.parquet", []
    pq.write_table(pa.table({"instruction": pa.array([], pa.string())}), path)
    assert list(read_records(path, heard.append)) == []
    assert sum(heard) == path.stat().st_size


def test_however_parquet_spells_texts_they_are_texts(tmp_path: Path) -> None:
    columns = {
        "instruction": pa.array(["a", "b"]).dictionary_encode(),
        "input": pa.array([None, "c"], pa.large_string()),
        "mine": pa.array([{"x": [1]}, None]),
    }
    pq.write_table(pa.table(columns), tmp_path / "chats.parquet")
    first, second = (r.row for r in read_records(tmp_path / "chats.parquet"))
    assert first == {"instruction": "a", "input": None, "mine": {"x": [1]}}
    assert second == {"instruction": "b", "input": "c", "mine": None}


def not_utf8(length: int) -> pa.Array:
    offsets = b"".join(n.to_bytes(4, "little") for n in range(length + 1))
    return pa.Array.from_buffers(pa.string(), length, [None, pa.py_buffer(offsets), pa.py_buffer(b"\xff" * length)])


@pytest.mark.parametrize("column", [not_utf8(1), pa.array([10**7], pa.date32())], ids=["text", "date"])
def test_a_column_that_python_cannot_hold_is_no_traceback(tmp_path: Path, column: pa.Array) -> None:
    fine = pa.nulls(300, column.type)
    table = pa.table({"instruction": ["a"] * 301, "mine": pa.chunked_array([fine, column])})
    pq.write_table(table, tmp_path / "chats.parquet")
    assert "chats.parquet: cannot be read after row 256 (" in refused(tmp_path / "chats.parquet")


def test_a_damaged_page_of_a_parquet_file_is_no_traceback(tmp_path: Path) -> None:
    path = tmp_path / "chats.parquet"
    pq.write_table(pa.table({"instruction": [f"{n}" * 20 for n in range(2000)]}), path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 3] + b"\x55" * 200 + content[len(content) // 3 + 200 :])
    assert "chats.parquet: cannot be read after row " in refused(path)


def test_a_missing_file_comes_with_what_is_there(tmp_path: Path) -> None:
    write(tmp_path, "chats.jsonl", JSONL)
    write(tmp_path, "notes.txt", b"")
    assert f"In {tmp_path}/ there is: chats.jsonl. " in refused(tmp_path / "chat.jsonl")
    assert f"There is no folder {tmp_path}/a. " in refused(tmp_path / "a/b/chat.jsonl")
    assert "there is" not in refused(TOKENIZERS / "chat.jsonl").lower()


def test_a_parquet_file_damaged_in_the_middle_names_the_row_reached(tmp_path: Path) -> None:
    path = tmp_path / "chats.parquet"
    damage_second_row_group(path)
    records = read_records(path)
    assert next(records).number == 1
    with pytest.raises(DataError, match=rf"^{path}: cannot be read after row \d+ \("):
        list(records)


def damage_second_row_group(path: Path) -> None:
    """A file of two row groups of 300 rows, the second one's bytes made nonsense: the footer is whole."""
    rows = [{"messages": f"{n} " * 20} for n in range(600)]
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=300, use_dictionary=False)
    column = pq.ParquetFile(path).metadata.row_group(1).column(0)
    content = bytearray(path.read_bytes())
    content[column.data_page_offset : column.data_page_offset + column.total_compressed_size] = (
        b"\xff" * column.total_compressed_size
    )
    path.write_bytes(bytes(content))


def test_a_hub_dataset_with_a_damaged_row_group_is_named(tmp_path: Path) -> None:
    damage_second_row_group(tmp_path / "train.parquet")
    with pytest.raises(DataError, match=rf"^hf:{tmp_path} train: cannot be read beyond row \d+ \("):
        list(source_records(hub(tmp_path)))


def test_a_hub_dataset_whose_second_file_is_damaged_names_source_and_row(tmp_path: Path) -> None:
    (tmp_path / "train-00000.jsonl").write_bytes(b'{"messages": 1}\n{"messages": 2}\n')
    (tmp_path / "train-00001.jsonl").write_bytes(b'{"messages": 3}\n')
    assert len(list(source_records(hub(tmp_path)))) == 3

    (tmp_path / "train-00001.jsonl").write_bytes(b'{"messages')
    with pytest.raises(DataError, match=rf"^hf:{tmp_path} train: cannot be read beyond row 2 \("):
        list(source_records(hub(tmp_path)))


def hub(path: Path, **keys: str) -> SourceConfig:
    return SourceConfig(name="hub", path=f"hf:{path}", **keys)


def test_a_folder_of_a_hub_dataset_is_streamed_by_split(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_bytes(b'{"messages": 1}\n{"messages": 2}\n')
    (tmp_path / "test.jsonl").write_bytes(b'{"messages": 3}\n')
    assert [(r.number, r.row) for r in source_records(hub(tmp_path))] == [(1, {"messages": 1}), (2, {"messages": 2})]
    assert [r.row for r in source_records(hub(tmp_path, split="test"))] == [{"messages": 3}]


def test_a_hub_dataset_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^hf:.*none train: `datasets` cannot open it \("):
        list(source_records(hub(tmp_path / "none")))


def test_a_folder_of_a_hub_dataset_is_known_by_its_files(tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    file.write_bytes(b'{"messages": 1}\n')
    before = hub_version(hub(tmp_path))
    assert hub_version(hub(tmp_path)) == before
    file.write_bytes(b'{"messages": 10}\n')
    assert hub_version(hub(tmp_path)) != before


def test_only_the_prefix_makes_it_a_hub_dataset(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such file\. .* a dataset of the hub is written hf:NAME"):
        list(source_records(SourceConfig(name="typo", path="owner/name")))


# --- encodings


def test_a_byte_order_mark_at_the_start_is_no_text(tmp_path: Path) -> None:
    (first, *_) = read_records(write(tmp_path, "chats.jsonl", b"\xef\xbb\xbf" + JSONL))
    assert parse_line(first.row, "f:1") == ROWS[0]
    (item, *_) = read_records(write(tmp_path, "chats.json", b"\xef\xbb\xbf" + ARRAY))
    assert item.row == ROWS[0]


@pytest.mark.parametrize("name", ["chats.jsonl", "chats.json", "chats.jsonl.gz"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be"])
def test_utf_16_is_refused_with_the_way_to_convert_it(tmp_path: Path, name: str, encoding: str) -> None:
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    text = refused(write(tmp_path, name, (mark + ARRAY.decode()).encode(encoding)))
    assert "is UTF-16 text. Convert it: iconv" in text


def test_a_list_inside_an_object_is_refused_with_the_way_to_unwrap_it(tmp_path: Path) -> None:
    text = refused(write(tmp_path, "chats.json", json.dumps({"data": ROWS}).encode()))
    assert "found one object with a list under `data`" in text
    assert "jq '.data' chats.json" in text
    assert "found one chat" in refused(write(tmp_path, "chats.json", json.dumps({"messages": []}).encode()))


@pytest.mark.parametrize(("line", "row"), [(b'"\xff"', "\ufffd"), (b'"a\tb\x00"', "a\tb\x00")])
def test_lenient_decoding_forgives_bytes_and_control_characters(line: bytes, row: str) -> None:
    assert parse_line(line, "f:1", lenient=True) == row
    with pytest.raises(RowError):
        parse_line(line, "f:1")


@pytest.mark.parametrize("lenient", [True, False])
def test_a_line_with_zero_bytes_is_not_taken_for_utf_16(lenient: bool) -> None:
    with pytest.raises(RowError) as raised:
        parse_line(b"[\x001\x00]\x00", "f:1", lenient=lenient)
    assert raised.value.reason == "not JSON"
