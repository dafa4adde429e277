"""A JSON array item by item: what the standard library makes of the whole, wherever a read happens to end."""

import io
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ochat.data.json_array import JsonText, said
from ochat.errors import DataError

FILE = Path("chats.json")
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
VALUES = st.recursive(SCALARS, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=3), v, max_size=3))


class Trickle(io.BytesIO):
    """A stream that gives `step` bytes at a time."""

    def __init__(self, content: bytes, step: int) -> None:
        super().__init__(content)
        self._step = step

    def read(self, size: int | None = -1) -> bytes:
        return super().read(self._step)


def items(content: str | bytes, step: int = 1 << 20) -> list[Any]:
    content = content.encode() if isinstance(content, str) else content
    return list(JsonText(Trickle(content, step), FILE).items())


def refused(content: str | bytes, step: int = 1 << 20) -> str:
    with pytest.raises(DataError) as raised:
        items(content, step)
    return str(raised.value)


def attempt(read: Callable[[], Any]) -> tuple[Any, Exception | None]:
    """The value or the mistake."""
    try:
        return read(), None
    except (json.JSONDecodeError, DataError) as exc:
        return None, exc


@settings(max_examples=200, deadline=None)
@given(
    rows=st.lists(VALUES, max_size=5), step=st.integers(1, 9), indent=st.sampled_from([None, 0, 2]), plain=st.booleans()
)
@example(rows=[123, -1.5e300, float("-inf"), "\U0001f600"], step=1, indent=None, plain=True)
@example(rows=[1.5e-300, "\U0001f600"], step=1, indent=None, plain=False)
def test_the_items_are_those_of_the_whole_text(rows: list[Any], step: int, indent: int | None, plain: bool) -> None:
    content = json.dumps(rows, indent=indent, ensure_ascii=plain).encode(errors="replace")
    assert repr(items(content, step)) == repr(json.loads(content))


@settings(max_examples=300, deadline=None)
@given(data=st.data(), rows=st.lists(VALUES, min_size=1, max_size=3), step=st.integers(1, 40))
def test_a_broken_text_is_refused_when_and_where_the_whole_would_be(data: st.DataObject, rows: list[Any], step: int):
    whole = json.dumps(rows, indent=1)
    place = data.draw(st.integers(1, len(whole) - 1))
    change = data.draw(st.sampled_from(["", "]", "}", '"', ",", "\\", "1", "\n", "x"]))
    content = whole[:place] + change + whole[place + data.draw(st.integers(0, 2)) :]
    expected, mistake = attempt(lambda: json.loads(content))
    found, named = attempt(lambda: items(content, step))
    assert repr(found) == repr(expected)
    if isinstance(mistake, json.JSONDecodeError):
        assert f"not valid JSON at line {mistake.lineno}, column {mistake.colno}: {said(mistake)}." in str(named)


@pytest.mark.parametrize("step", [1, 3, 1 << 20])
def test_the_item_line_and_column_of_a_mistake_are_named(step: int) -> None:
    assert refused('[1,\n 2,\n {"a" 3}]', step) == (
        "chats.json: item 3: not valid JSON at line 3, column 7: Expecting ':' delimiter. Fix it there."
    )
    assert (
        refused("[1] 2", step)
        == "chats.json: not valid JSON at line 1, column 5: Extra data. One chat per line is .jsonl: rename it."
    )


@pytest.mark.parametrize("step", [1, 1 << 20])
def test_the_byte_that_is_no_utf_8_is_named(step: int) -> None:
    assert refused('["é", "'.encode() + b'\xff"]', step) == (
        "chats.json: not valid UTF-8 at byte 8. Convert the file to UTF-8."
    )
    assert "not valid UTF-8 at byte 2" in refused(b'["\xc3', step)


def test_too_many_brackets_or_digits_are_refused_by_item() -> None:
    assert refused("[1, " + "[" * 100_000).startswith("chats.json: item 2: not readable as JSON (maximum recursion")
    assert refused("[" + "1" * 5000 + "]").startswith("chats.json: item 1: not readable as JSON (Exceeds the limit")


def test_a_mistake_is_found_without_reading_to_the_end() -> None:
    stream = io.BytesIO(b'[{"a": 1}, {"a" 2}, ' + b"0, " * 10_000_000)
    with pytest.raises(DataError, match="item 2"):
        list(JsonText(stream, FILE).items())
    assert stream.tell() < 2 << 20


def test_memory_is_that_of_an_item_and_not_of_the_file() -> None:
    row = json.dumps({"text": "walls " * 20_000})
    stream = io.BytesIO(b"[" + b", ".join([row.encode()] * 400) + b"]")  # 48 MB
    tracemalloc.start()
    assert sum(1 for _ in JsonText(stream, FILE).items()) == 400
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 12 << 20
