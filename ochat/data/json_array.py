"""The values of a JSON text one after the other, so that an array of gigabytes takes the memory of its largest item.

The decoding is the standard library's. Here is what it lacks: to tell a value that goes on beyond the text read so far
from one that is broken, and to name item, line and column of the mistake in the whole file.
"""

import codecs
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ochat.errors import DataError

CHUNK_BYTES = 1 << 20
# A value that is cut off is complained of this close to the end of the text, or is an unterminated string: at the
# longest, "-Infinit" is complained of at its first letter, and the escape "\ud83d" at its first.
CUT_CHARACTERS = 16

_WHITE = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder()


class JsonText:
    """A position in a JSON text that is read and decoded piece by piece."""

    def __init__(self, stream: io.BufferedIOBase, path: Path) -> None:
        self._stream, self._path = stream, path
        self._decode = codecs.getincrementaldecoder("utf-8-sig")()
        self._text, self._at = "", 0
        self._num_bytes = 0  # read
        self._line, self._column = 0, 0  # of the first character of _text, from 0
        self._item = 0

    def peek(self) -> str:
        """The character at the position, behind any white space; empty at the end."""
        while True:
            match = _WHITE.match(self._text, self._at)
            assert match is not None
            self._at = match.end()
            if self._at < len(self._text) or not self._read():
                return self._text[self._at : self._at + 1]

    def items(self) -> Iterator[Any]:
        """The items of the array that begins here, up to the end of the text."""
        assert self.peek() == "["
        self._at += 1
        if self.peek() != "]":
            self._item = 1
            yield self.value()
            while self.peek() == ",":
                self._at += 1
                self._item += 1
                yield self.value()
        if self.peek() != "]":
            raise self._broken(json.JSONDecodeError("Expecting ',' delimiter", self._text, self._at))
        self._at += 1
        self._item = 0
        self.end()

    def value(self) -> Any:
        """The value at the position, which moves behind it."""
        while True:
            self.peek()
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
            except json.JSONDecodeError as exc:
                # Twice as much each time: an item of n bytes is decoded log n times, over 2 n bytes in all.
                if not (self._is_cut(exc) and self._read()):
                    raise self._broken(exc) from exc
            except (ValueError, RecursionError) as exc:  # a number of thousands of digits, thousands of brackets
                raise DataError(f"{self._where()}: not readable as JSON ({exc}). Fix or delete it.") from exc
            else:
                # A number near the end of the text may go on: 12 of 123, 1.5 of 1.5e+9.
                if end < len(self._text) - 2 or not self._read():
                    self._at = end
                    return value

    def end(self) -> None:
        """Raise DataError unless only white space is left."""
        if self.peek():
            raise self._broken(json.JSONDecodeError("Extra data", self._text, self._at))

    def _is_cut(self, exc: json.JSONDecodeError) -> bool:
        return exc.msg.startswith("Unterminated string") or exc.pos > len(self._text) - CUT_CHARACTERS

    def _read(self) -> bool:
        """Forget what is behind the position and read on; False at the end of the stream."""
        chunk = self._stream.read(max(CHUNK_BYTES, len(self._text) - self._at))
        pending = len(self._decode.getstate()[0])
        try:
            more = self._decode.decode(chunk, final=not chunk)
        except UnicodeDecodeError as exc:
            place = self._num_bytes - pending + exc.start
            raise DataError(f"{self._path}: not valid UTF-8 at byte {place}. Convert the file to UTF-8.") from exc
        self._num_bytes += len(chunk)
        if not chunk:
            return False
        if newlines := self._text.count("\n", 0, self._at):
            self._line, self._column = self._line + newlines, -self._text.rfind("\n", 0, self._at) - 1
        self._column += self._at
        self._text, self._at = self._text[self._at :] + more, 0
        return True

    def _where(self) -> str:
        return f"{self._path}: item {self._item}" if self._item else str(self._path)

    def _broken(self, exc: json.JSONDecodeError) -> DataError:
        column = exc.colno + (self._column if exc.lineno == 1 else 0)
        fix = "One chat per line is .jsonl: rename it" if exc.msg == "Extra data" else "Fix it there"
        place = f"line {self._line + exc.lineno}, column {column}"
        return DataError(f"{self._where()}: not valid JSON at {place}: {said(exc)}. {fix}.")


def said(exc: json.JSONDecodeError) -> str:
    """What is wrong; where is said already."""
    return exc.msg.removesuffix(" at").removesuffix(" starting")
