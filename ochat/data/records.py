"""The street door: chat files as numbered records, in file order, without holding a .jsonl file in memory.

.jsonl        a record is a line (bytes, not yet parsed), its number the 1-based line; blank lines are passed over
.json         a record is an item of the array (already parsed), its number the 1-based item
either + .gz  the same, decompressed on the way
"""

import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ochat.errors import DataError

SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """`row` is a decoded JSON value, or the undecoded line."""

    number: int
    row: Any


def check_chat_file(path: Path) -> None:
    """Raise DataError when `path` is missing or of no known kind."""
    if not path.is_file():
        raise DataError(f"{path}: no such file. Check the source's `path` (it is relative to where you are).")
    if not path.name.endswith(SUFFIXES):
        raise DataError(f"{path}: unknown kind of file. Known: {', '.join(SUFFIXES)}.")


def read_records(path: Path, advance: Callable[[int], object] = lambda num_bytes: None) -> Iterator[Record]:
    """Yield the records of a chat file; `advance` hears how many bytes of the file have been consumed."""
    check_chat_file(path)
    with path.open("rb") as raw:
        counted: BinaryIO = _Counted(raw, advance)  # type: ignore[assignment]
        stream: Any = gzip.GzipFile(fileobj=counted) if path.suffix == ".gz" else counted
        try:
            if path.name.removesuffix(".gz").endswith(".json"):
                yield from _array_items(stream, path)
                return
            for number, line in enumerate(io.BufferedReader(stream, 1 << 20), 1):
                if line.strip():
                    yield Record(number=number, row=line)
        except (EOFError, gzip.BadGzipFile, zlib.error) as exc:
            raise DataError(f"{path}: damaged or no gzip file ({exc}). Fetch or compress it again.") from exc


def parse_line(line: bytes, where: str) -> Any:
    """Decode one JSONL line; DataError names the place and the column."""
    try:
        return json.loads(line)
    except json.JSONDecodeError as exc:
        raise DataError(f"{where}: not valid JSON at column {exc.colno}: {exc.msg}. Fix or delete the line.") from exc
    except UnicodeDecodeError as exc:
        raise DataError(f"{where}: not valid UTF-8 at byte {exc.start}. Convert the file to UTF-8.") from exc
    except (ValueError, RecursionError) as exc:  # a number of thousands of digits, thousands of brackets
        raise DataError(f"{where}: not readable as JSON ({exc}). Fix or delete the line.") from exc


def hash_file(path: Path) -> str:
    """SHA-256 of the file's bytes, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _array_items(stream: BinaryIO, path: Path) -> Iterator[Record]:
    rows = parse_line(stream.read(), str(path))
    if not isinstance(rows, list):
        raise DataError(f"{path}: expected a JSON array of chats, found {type(rows).__name__}. One per line is .jsonl.")
    for number, row in enumerate(rows, 1):
        yield Record(number=number, row=row)


class _Counted(io.RawIOBase):
    """A file that reports how much of it has been read, so that a progress bar knows a .gz file's end."""

    def __init__(self, raw: BinaryIO, advance: Callable[[int], object]) -> None:
        self._raw, self._advance = raw, advance

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        num_bytes = self._raw.readinto(buffer)  # type: ignore[attr-defined]
        self._advance(num_bytes)
        return int(num_bytes)

    def seekable(self) -> bool:
        return False
