"""What is wrong with one row: a DataError with a short reason, so that problems can be counted by kind.

Raised by the readers of rows; `data.on_error` decides whether it ends the preparing or is counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ochat.errors import DataError

MAX_SHOWN = 5


class RowError(DataError):
    """One row cannot be used. `reason` is a few words that many rows share: "unknown role", "tool call"."""

    # `reason` has a default because unpickling calls with the message alone, then restores the attributes.
    def __init__(self, message: str, reason: str = "other") -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A row that was left out, as it travels from a worker: the reason and the sentence that names file and line."""

    reason: str
    message: str


def problems_error(problems: Sequence[Problem]) -> DataError:
    """The first problems, a line each, and the way to go on without these rows."""
    lines = [problem.message for problem in problems[:MAX_SHOWN]]
    if len(problems) >= MAX_SHOWN:
        lines.append(f"These are the first {MAX_SHOWN} problems.")
    lines.append("To leave such rows out and have them counted: data.on_error=skip.")
    return DataError("\n".join(lines))
