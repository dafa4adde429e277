"""Process entry for launchers, one process per device.

    deepspeed --num_gpus 8 --module ochat.training.train --config CONFIG [key.path=value ...]

Also under torchrun, or as a plain single process.
"""

import argparse
import logging
import os
import shlex
import sys
import warnings
from collections.abc import Sequence

from ochat.config import Config, load_config
from ochat.errors import OchatError
from ochat.log import setup_logging


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one rank; 0 when trained, 2 after an error the user can mend."""
    parser = argparse.ArgumentParser(prog="ochat.training.train", description=__doc__)
    parser.add_argument("--config", required=True, help="YAML experiment")
    parser.add_argument("--local_rank", "--local-rank", type=int, help="inserted by the launcher; LOCAL_RANK counts")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="override configuration values")
    parsed = parser.parse_intermixed_args(arguments)
    rank = int(os.environ.get("RANK", "0"))
    setup_logging(rank)
    try:
        config = load_config(parsed.config, parsed.overrides)
        run_process(config, shlex.join(["ochat", "prepare", parsed.config, *parsed.overrides]))
    except OchatError as exc:
        # Every rank meets the same mistake; one paragraph is enough.
        if rank == 0:
            sys.stderr.write(f"error: {exc}\n")
        return 2
    return 0


def run_process(config: Config, prepare_command: str) -> None:
    """Train as one rank of the launcher's group, or as a group of one."""
    import torch.distributed as dist
    from transformers.utils.logging import disable_progress_bar

    from ochat.training.trainer import train

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    disable_progress_bar()  # of transformers: several ranks would draw over ours
    # DeepSpeed calls torch functions by their old names; its users cannot help it.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    if "WORLD_SIZE" not in os.environ:  # or DeepSpeed looks for MPI
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    try:
        train(config, prepare_command=prepare_command)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
