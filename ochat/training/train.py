"""Process entry for launchers, one process per device.

    deepspeed --num_gpus 8 --module ochat.training.train --config CONFIG [key.path=value ...]

Also under torchrun, or as a plain single process.
"""

import argparse
import logging
import os
import shlex
import sys
from collections.abc import Sequence

from ochat.config import load_config
from ochat.errors import OchatError
from ochat.log import setup_logging


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one rank; 0 when trained, 2 after an error the user can mend."""
    parser = argparse.ArgumentParser(prog="ochat.training.train", description=__doc__)
    parser.add_argument("--config", required=True, help="YAML experiment")
    parser.add_argument("--local_rank", "--local-rank", type=int, help="inserted by the launcher; LOCAL_RANK counts")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="override configuration values")
    parsed = parser.parse_args(arguments)
    rank = int(os.environ.get("RANK", "0"))
    setup_logging(rank)
    try:
        config = load_config(parsed.config, parsed.overrides)
        run_rank(config, shlex.join(["ochat", "prepare", parsed.config, *parsed.overrides]))
    except OchatError as exc:
        # Every rank meets the same mistake; one paragraph is enough.
        if rank == 0:
            sys.stderr.write(f"error: {exc}\n")
        return 2
    return 0


def run_rank(config: object, prepare_command: str) -> None:
    import torch.distributed as dist

    from ochat.training.trainer import train

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # A process without a launcher is a group of one; DeepSpeed looks for MPI unless told so.
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    if "WORLD_SIZE" not in os.environ:
        os.environ.update(alone)
    try:
        train(config, prepare_command=prepare_command)  # type: ignore[arg-type]
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
