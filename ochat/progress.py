"""A progress bar on a terminal, a few plain lines elsewhere."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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
    done: int = 0
    last_line: float = 0.0

    def advance(self, amount: int = 1, note: str = "") -> None:
        self.done += amount
        if console.is_terminal:
            self.progress.update(self.task, advance=amount, note=note)
        elif time.monotonic() - self.last_line > PLAIN_SECONDS:
            self.last_line = time.monotonic()
            log.info("%s: %.0f %%  %s", self.title, 100 * self.done / max(1, self.total), note)


@contextmanager
def progress_bar(title: str, *, total: int, unit: Literal["bytes", "steps"], done: int = 0) -> Iterator[Bar]:
    """Show progress towards `total` while the block runs."""
    amount: ProgressColumn = DownloadColumn() if unit == "bytes" else MofNCompleteColumn()
    columns = (TextColumn(title), BarColumn(), amount, TextColumn("{task.fields[note]}"), TimeRemainingColumn())
    progress = Progress(*columns, console=console, disable=not console.is_terminal)
    task = progress.add_task(title, total=total, completed=done, note="")
    with progress:
        yield Bar(title, total, progress, task, done, time.monotonic())
