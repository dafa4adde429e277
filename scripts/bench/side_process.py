"""One side of a benchmark in a process of its own, asked for a piece of work at a time."""

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class SideProcess:
    """A process that answers a line of JSON for every line it gets."""

    def __init__(self, command: Sequence[object], source: Path) -> None:
        """source: the folder on its path."""
        environment = {**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [str(word) for word in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def ask(self, request: str = "") -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(request + "\n")
        self._process.stdin.flush()
        return self.read()

    def read(self) -> dict[str, Any]:
        """What it says unasked."""
        assert self._process.stdout is not None
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
