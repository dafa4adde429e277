"""The street door: a source's rows as numbered records, in order; what `path` may be is decided here.

hf:NAME       a dataset of the Hugging Face hub, or a local folder of one; hub.py
.jsonl        a record is a line (bytes, not yet parsed), its number the 1-based line; blank lines are passed over
.json         a record is an item of the array (already parsed), its number the 1-based item; json_array.py
.parquet      a record is a row (already parsed), its number the 1-based row
.gz .zst      after .jsonl or .json: the same, decompressed on the way

No file is in memory as a whole.
"""

import codecs
import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

from ochat.config import SourceConfig
from ochat.data.hub import hub_rows, is_hub
from ochat.data.json_array import JsonText, said
from ochat.data.keys import LIST_KEYS
from ochat.data.problems import RowError
from ochat.errors import DataError, first_line

SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".json.zst", ".parquet")
ARRAY_SUFFIXES = (".json", ".json.gz", ".json.zst")
PARQUET_ROWS = 256
UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)

Advance = Callable[[int], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """`row` is a decoded JSON value, or the undecoded line."""

    number: int
    row: Any


def check_chat_file(path: Path) -> None:
    """Raise DataError when `path` is missing or of no known kind."""
    if not path.is_file():
        raise DataError(
            f"{path}: no such file. {_whats_there(path)}Check the source's `path` (it is relative to where you are, "
            f"{Path.cwd()}); a dataset of the hub is written hf:NAME."
        )
    if not path.name.endswith(SUFFIXES):
        raise DataError(f"{path}: unknown kind of file. Known: {', '.join(SUFFIXES)}.")


def _whats_there(path: Path) -> str:
    """The first folder on the way that is missing, or the chat files beside; empty when neither says anything."""
    if missing := [folder for folder in path.parents if not folder.is_dir()]:
        return f"There is no folder {missing[-1]}. "
    beside = sorted(file.name for file in path.parent.iterdir() if file.name.endswith(SUFFIXES))
    return f"In {path.parent}/ there is: {', '.join(beside[:5])}. " if beside else ""


def source_records(source: SourceConfig, advance: Advance = lambda num_bytes: None) -> Iterator[Record]:
    """The records of a source, wherever it is."""
    if not is_hub(source):
        return read_records(Path(source.path), advance)
    return (Record(number=number, row=row) for number, row in enumerate(hub_rows(source), 1))


def read_records(path: Path, advance: Advance = lambda num_bytes: None) -> Iterator[Record]:
    """Yield the records of a chat file; `advance` hears how many bytes of the file have been consumed."""
    check_chat_file(path)
    if path.suffix == ".parquet":
        yield from _parquet_rows(path, advance)
        return
    with path.open("rb") as raw:
        stream = _decompressed(_Counted(raw, advance), path.suffix)
        try:
            if path.name.endswith(ARRAY_SUFFIXES):
                yield from _array_items(stream, path)
            else:
                yield from _lines(stream, path)
        except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as exc:
            kind = path.suffix.removeprefix(".")
            raise DataError(f"{path}: damaged or no {kind} file ({exc}). Fetch or compress it again.") from exc


def _decompressed(raw: io.RawIOBase, suffix: str) -> io.BufferedIOBase:
    if suffix == ".gz":
        return gzip.GzipFile(fileobj=raw)
    return io.BufferedReader(_Zstd(raw) if suffix == ".zst" else raw, 1 << 20)


def _lines(stream: Any, path: Path) -> Iterator[Record]:
    # Only b"\n" ends a line: U+2028 and the like are text. The buffer makes lines of a .gz file cheap.
    for number, line in enumerate(io.BufferedReader(stream, 1 << 20), 1):
        if number == 1:
            _check_encoding(line, path)
            line = line.removeprefix(codecs.BOM_UTF8)
            _check_lines(line.strip(), path)
        if line.strip():
            yield Record(number=number, row=line)


def _check_encoding(start: bytes, path: Path) -> None:
    if start.startswith(UTF16_MARKS):
        raise DataError(f"{path}: is UTF-16 text. Convert it: iconv -f UTF-16 -t UTF-8 {path.name} > utf8{path.suffix}")


def _check_lines(first: bytes, path: Path) -> None:
    """Refuse an array by its first line: as lines it would be a hundred problems, none of them the right one."""
    if first == b"[" or _begins_array_of_chats(first):
        raise DataError(f"{path}: holds a JSON array, not a chat per line. Rename it: .json instead of .jsonl.")


def _begins_array_of_chats(line: bytes) -> bool:
    """Whether the first item of a list is a row, and not a message of a bare list."""
    if not line.startswith(b"["):
        return False
    try:
        item, _ = json.JSONDecoder().raw_decode(line[1:].decode().lstrip())
    except (ValueError, RecursionError):
        return False
    return isinstance(item, dict) and not item.keys().isdisjoint((*LIST_KEYS, "instruction", "question"))


def parse_line(line: bytes, where: str, *, lenient: bool = False) -> Any:
    """Decode one JSONL line; RowError names the place and the column. A byte order mark in front is no text.

    lenient  bytes that are no UTF-8 become U+FFFD, and control characters may stand inside strings
    """
    try:
        # Not json.loads(line): it would take a line with NUL bytes for UTF-16.
        # Without its end, or a line that was cut off inside a string would have a control character there.
        text = line.rstrip(b"\r\n").decode("utf-8-sig", errors="replace" if lenient else "strict")
        return json.loads(text, strict=not lenient)
    except json.JSONDecodeError as exc:
        # Only LF ends a line, so a file with CR alone is one line, with a second chat after the first.
        is_cr = exc.msg == "Extra data" and exc.doc[: exc.pos].endswith("\r")
        fix = "The lines end with CR: convert them with tr '\\r' '\\n'" if is_cr else "Fix or delete the line"
        raise RowError(f"{where}: not valid JSON at column {exc.pos + 1}: {said(exc)}. {fix}.", "not JSON") from exc
    except UnicodeDecodeError as exc:
        raise RowError(
            f"{where}: not valid UTF-8 at byte {exc.start}. Convert the file to UTF-8, or set data.hygiene=clean to "
            f"have such bytes replaced.",
            "not UTF-8",
        ) from exc
    except (ValueError, RecursionError) as exc:  # a number of thousands of digits, thousands of brackets
        raise RowError(f"{where}: not readable as JSON ({exc}). Fix or delete the line.", "not JSON") from exc


def hash_file(path: Path) -> str:
    """SHA-256 of the file's bytes, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _array_items(stream: Any, path: Path) -> Iterator[Record]:
    buffered = io.BufferedReader(stream, 1 << 20)
    _check_encoding(buffered.peek(), path)
    text = JsonText(buffered, path)
    if text.peek() == "[":
        for number, row in enumerate(text.items(), 1):
            yield Record(number=number, row=row)
        return
    rows = text.value()
    text.end()
    if isinstance(rows, dict) and rows.keys() & set(LIST_KEYS):
        raise DataError(
            f"{path}: expected a JSON array of chats, found one chat. Put it into brackets: jq '[.]' {path.name} > "
            f"chats.json, or save it on one line as .jsonl."
        )
    if isinstance(rows, dict) and (wrapper := next((k for k, v in rows.items() if isinstance(v, list)), None)):
        raise DataError(
            f"{path}: expected a JSON array of chats, found one object with a list under `{wrapper}`. If that is the "
            f"list of chats, unwrap it: jq '.{wrapper}' {path.name} > chats.json. One chat per line is .jsonl."
        )
    raise DataError(f"{path}: expected a JSON array of chats, found {type(rows).__name__}. One per line is .jsonl.")


def _parquet_rows(path: Path, advance: Advance) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as exc:
        raise DataError(f"{path}: damaged or no Parquet file ({exc}). Fetch it again.") from exc
    size, num_rows, number = path.stat().st_size, file.metadata.num_rows, 0
    batches = file.iter_batches(batch_size=PARQUET_ROWS)
    while rows := _next_rows(batches, path, number):
        # Bytes of columns cannot be told by row; their share of the file can, and it ends at the file's size.
        advance(size * (number + len(rows)) // num_rows - size * number // num_rows)
        for row in rows:
            number += 1
            yield Record(number=number, row=row)
    if num_rows == 0:
        advance(size)


def _next_rows(batches: Iterator[Any], path: Path, number: int) -> list[Any]:
    """The rows of the next batch, none at the end."""
    import pyarrow as pa

    try:
        batch = next(batches, None)
        return [] if batch is None else batch.to_pylist()
    # Damaged pages; texts that are no UTF-8; dates that Python does not have.
    except (pa.ArrowException, OSError, ValueError, OverflowError) as exc:
        raise DataError(
            f"{path}: cannot be read after row {number} ({first_line(exc)}). Fetch it again; if a column of yours is "
            f"the cause, write the file without it."
        ) from exc


class _Counted(io.RawIOBase):
    """A file that reports how much of it has been read, so that a progress bar knows a compressed file's end."""

    def __init__(self, raw: BinaryIO, advance: Advance) -> None:
        self._raw, self._advance = raw, advance

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        num_bytes = self._raw.readinto(buffer)  # type: ignore[attr-defined]
        self._advance(num_bytes)
        return int(num_bytes)

    def seekable(self) -> bool:
        return False


class _Zstd(io.RawIOBase):
    """Decompressed frames, one after the other. zstandard's own reader takes a file cut short for a whole one."""

    def __init__(self, raw: io.RawIOBase) -> None:
        self._raw, self._ready = raw, b""
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._began = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            if self._frame.eof:
                rest = self._frame.unused_data
                self._frame, self._began = zstandard.ZstdDecompressor().decompressobj(), False
            else:
                rest = b""
            chunk = rest or self._raw.read(1 << 16)
            if not chunk:
                if self._began:
                    raise EOFError("it ends before its end-of-frame")
                return 0
            self._began = True
            self._ready = self._frame.decompress(chunk)
        piece, self._ready = self._ready[: len(buffer)], self._ready[len(buffer) :]
        buffer[: len(piece)] = piece
        return len(piece)
