"""A progress bar on a terminal, a few plain lines elsewhere."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from ochat.log import console

log = logging.getLogger(__name__)

PLAIN_SECONDS = 10.0


@dataclass(slots=True)
class Bar:
    """Counts work done. `note` is shown beside the bar, and after the count on plain lines."""

    title: str
    total: int
    progress: Progress
    task: TaskID
    unit: Literal["bytes", "steps"]
    done: int
    done_before: int
    began: float
    last_line: float

    def advance(self, amount: int = 1, note: str = "") -> None:
        self.done += amount
        finished = amount > 0 and self.done >= self.total
        if console.is_terminal:
            self.progress.update(self.task, advance=amount, note=note)
        elif finished or time.monotonic() - self.last_line > PLAIN_SECONDS:
            self.last_line = time.monotonic()
            log.info("%s", self._plain_line(note))

    def _plain_line(self, note: str) -> str:
        rate = (self.done - self.done_before) / max(1e-9, time.monotonic() - self.began)
        left = timedelta(seconds=round((self.total - self.done) / rate)) if rate > 0 else "unknown"
        count = f"{self.done}/{self.total} " if self.unit == "steps" else ""
        share = self.done / max(1, self.total)
        return "  ".join(part for part in (f"{self.title} {count}{share:.0%}", note, f"{left} left") if part)


@contextmanager
def progress_bar(
    title: str, *, total: int, unit: Literal["bytes", "steps"], done: int = 0, shown: bool = True
) -> Iterator[Bar]:
    """Show progress towards `total` while the block runs; `shown` is False on all ranks but one."""
    amount: ProgressColumn = DownloadColumn() if unit == "bytes" else MofNCompleteColumn()
    columns = (TextColumn(title), BarColumn(), amount, TextColumn("{task.fields[note]}"), TimeRemainingColumn())
    progress = Progress(*columns, console=console, disable=not (shown and console.is_terminal))
    task = progress.add_task(title, total=total, completed=done, note="")
    with progress:
        now = time.monotonic()
        yield Bar(title, total, progress, task, unit, done, done_before=done, began=now, last_line=now)
