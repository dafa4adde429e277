"""Logging for the command line: set up once per process by the entry points, never on import.

Rank 0 tells the story of a run at INFO; the other ranks only warn, and say who they are.
"""

import logging

from rich.console import Console
from rich.logging import RichHandler

console = Console(stderr=True)


def setup_logging(rank: int = 0) -> None:
    """Send the log to stderr: pretty on a terminal, plain lines with a time elsewhere."""
    handler: logging.Handler
    if console.is_terminal:
        handler = RichHandler(console=console, show_path=False, omit_repeated_times=False)
        handler.setFormatter(logging.Formatter("%(message)s", datefmt="%H:%M:%S"))
    else:
        handler = logging.StreamHandler()
        prefix = "" if rank == 0 else f"[rank {rank}] "
        handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)s {prefix}%(message)s", datefmt="%H:%M:%S"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("ochat").setLevel(logging.INFO if rank == 0 else logging.WARNING)
