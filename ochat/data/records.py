"""The street door: a source's rows as numbered records, in order; what `path` may be is decided here.

hf:NAME       a dataset of the Hugging Face hub, or a local folder of one; hub.py
.jsonl        a record is a line (bytes, not yet parsed), its number the 1-based line; blank lines are passed over
.json         a record is an item of the array (already parsed), its number the 1-based item
.parquet      a record is a row (already parsed), its number the 1-based row
.gz .zst      after .jsonl or .json: the same, decompressed on the way

Only a .json file is in memory as a whole.
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
from ochat.data.keys import LIST_KEYS
from ochat.data.problems import RowError
from ochat.errors import DataError, first_line

SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".json.zst", ".parquet")
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
            if ".json" in path.suffixes[-2:]:
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
            _check_no_array(line, path)
        if line.strip():
            yield Record(number=number, row=line)


def _check_encoding(start: bytes, path: Path) -> None:
    if start.startswith(UTF16_MARKS):
        raise DataError(f"{path}: is UTF-16 text. Convert it: iconv -f UTF-16 -t UTF-8 {path.name} > utf8{path.suffix}")


def _check_no_array(line: bytes, path: Path) -> None:
    """Refuse a .jsonl file whose first line is, or begins, an array of chats. A line may be a list of messages."""
    if not line.lstrip().startswith(b"["):
        return
    try:
        first = next(iter(json.loads(line)), None)
        is_array = isinstance(first, dict) and not first.keys() & {"role", "from"}
    except (ValueError, RecursionError):  # an array over several lines is broken off between values, a bad line is not
        start = b"".join(line.split())
        is_array = start in (b"[", b"[{") or start.endswith(b"},")
    if is_array:
        name = path.name.replace(".jsonl", ".json")
        raise DataError(
            f"{path}: line 1 begins a JSON array, and .jsonl has one chat on each line. If the file is one array, "
            f"rename it to {name}."
        )


def parse_line(line: bytes, where: str, *, lenient: bool = False) -> Any:
    """Decode one JSONL line; RowError names the place and the column. A byte order mark in front is no text.

    lenient  bytes that are no UTF-8 become U+FFFD, and control characters may stand inside strings
    """
    try:
        # Not json.loads(line): it would take a line with NUL bytes for UTF-16.
        text = line.decode("utf-8-sig", errors="replace" if lenient else "strict")
        return json.loads(text, strict=not lenient)
    except json.JSONDecodeError as exc:
        raise RowError(
            f"{where}: not valid JSON at column {exc.colno}: {exc.msg}. Fix or delete the line.", "not JSON"
        ) from exc
    except UnicodeDecodeError as exc:
        raise RowError(
            f"{where}: not valid UTF-8 at byte {exc.start}. Convert the file to UTF-8.", "not UTF-8"
        ) from exc
    except (ValueError, RecursionError) as exc:  # a number of thousands of digits, thousands of brackets
        raise RowError(f"{where}: not readable as JSON ({exc}). Fix or delete the line.", "not JSON") from exc


def hash_file(path: Path) -> str:
    """SHA-256 of the file's bytes, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _array_items(stream: io.BufferedIOBase, path: Path) -> Iterator[Record]:
    content = stream.read()
    _check_encoding(content, path)
    try:
        rows = parse_line(content, str(path))
    except RowError as exc:
        if isinstance(exc.__cause__, json.JSONDecodeError) and exc.__cause__.msg == "Extra data":
            raise DataError(
                f"{path}: something follows the first JSON value, and .json has one array of chats. If there is one "
                f"chat on each line, rename it to {path.name.replace('.json', '.jsonl')}."
            ) from exc
        raise
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
    if not isinstance(rows, list):
        raise DataError(f"{path}: expected a JSON array of chats, found {type(rows).__name__}. One per line is .jsonl.")
    for number, row in enumerate(rows, 1):
        yield Record(number=number, row=row)


def _parquet_rows(path: Path, advance: Advance) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as exc:
        raise DataError(f"{path}: damaged or no Parquet file ({exc}). Fetch it again.") from exc
    size, num_rows, number = path.stat().st_size, file.metadata.num_rows, 0
    batches = file.iter_batches(batch_size=PARQUET_ROWS)
    while True:
        try:
            rows = next(batches).to_pylist()
        except StopIteration:
            break
        except (pa.ArrowException, OSError) as exc:
            raise DataError(f"{path}: damaged after row {number:,} ({first_line(exc)}). Fetch it again.") from exc
        # Bytes of columns cannot be told by row; their share of the file can, and it ends at the file's size.
        advance(size * (number + len(rows)) // num_rows - size * number // num_rows)
        for row in rows:
            number += 1
            yield Record(number=number, row=row)
    if num_rows == 0:
        advance(size)


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
