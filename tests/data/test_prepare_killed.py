"""kill -9 in the middle of preparing, for real: nothing that looks complete is left, and the next run does it all."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

from ochat.config import load_config
from ochat.data.prepare import prepare
from ochat.data.store import Manifest, PreparedSplit
from tests.experiment import write_experiment
from tests.launch import BIN, ROOT

ROW = {"messages": [{"role": "user", "content": "Hi " * 50}, {"role": "assistant", "content": "the old walls " * 100}]}


def start_and_kill(path: Path, unfinished: Path) -> int:
    """Start `ochat prepare`, kill its whole process group once it writes; the exit status."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [BIN / "ochat", "prepare", path, "data.num_proc=2"], env=environment, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while not any(unfinished.glob("*")) and process.poll() is None:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    return process.wait()


def test_killed_half_way_it_leaves_the_old_dataset_and_the_next_run_makes_the_new_one(tmp_path: Path):
    path = write_experiment(tmp_path)
    prepare(load_config(path))
    before = Manifest.read(tmp_path / "prepared")
    with (tmp_path / "crowd.jsonl").open("a") as file:
        file.writelines(json.dumps(ROW) + "\n" for _ in range(10_000))

    status = start_and_kill(path, tmp_path / ".prepared.new")

    assert status == -signal.SIGKILL
    assert (tmp_path / ".prepared.new").exists()  # it was in the middle of its work
    assert Manifest.read(tmp_path / "prepared") == before

    after = prepare(load_config(path, ["model.max_length=512", "batch.micro_batch_tokens=512"]))

    assert after.counts["crowd"]["read"] == 10_090
    assert len(PreparedSplit(tmp_path / "prepared/train")) == sum(count["kept"] for count in after.counts.values())
    assert not (tmp_path / ".prepared.new").exists()
