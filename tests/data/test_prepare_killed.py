"""kill -9 in the middle of preparing, for real: nothing that looks complete is left, and the next run does it all."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from ochat.config import load_config
from ochat.data.prepare import prepare
from ochat.data.store import Manifest, PreparedSplit
from tests.experiment import write_experiment
from tests.launch import BIN, ROOT

ROW = {"messages": [{"role": "user", "content": "Hi " * 50}, {"role": "assistant", "content": "the old walls " * 100}]}
LONGER = ("model.max_length=512", "batch.micro_batch_tokens=512")


def start(path: Path) -> subprocess.Popen[bytes]:
    """`ochat prepare`, and its two workers at work."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [BIN / "ochat", "prepare", path, "data.num_proc=2"], env=environment, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    assert soon(lambda: len(session_of(process.pid)) == 3)
    return process


def soon(claim: Callable[[], bool], seconds: float = 60) -> bool:
    """Whether it becomes true in time."""
    end = time.monotonic() + seconds
    while not claim() and time.monotonic() < end:
        time.sleep(0.02)
    return claim()


def session_of(leader: int) -> set[int]:
    """The living processes of a session."""
    living = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, session = stat.read_text().rpartition(")")[2].split()[:4]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(session) == leader and state not in "ZX":
            living.add(int(stat.parent.name))
    return living


def test_killed_half_way_it_leaves_the_old_dataset_and_the_next_run_makes_the_new_one(tmp_path: Path):
    path = write_experiment(tmp_path)
    prepare(load_config(path))
    before = Manifest.read(tmp_path / "prepared")
    with (tmp_path / "crowd.jsonl").open("a") as file:
        file.writelines(json.dumps(ROW) + "\n" for _ in range(10_000))

    process = start(path)
    os.killpg(process.pid, signal.SIGKILL)

    assert process.wait() == -signal.SIGKILL
    assert (tmp_path / ".prepared.new").exists()  # it was in the middle of its work
    assert Manifest.read(tmp_path / "prepared") == before

    after = prepare(load_config(path, LONGER))

    assert after.counts["crowd"]["read"] == 10_090
    assert len(PreparedSplit(tmp_path / "prepared/train")) == sum(count["kept"] for count in after.counts.values())
    assert not (tmp_path / ".prepared.new").exists()


def test_killed_alone_it_takes_its_workers_and_its_lock_with_it(tmp_path: Path):
    path = write_experiment(tmp_path)
    with (tmp_path / "crowd.jsonl").open("a") as file:
        file.writelines(json.dumps(ROW) + "\n" for _ in range(10_000))

    process = start(path)
    workers = session_of(process.pid) - {process.pid}
    process.kill()

    assert process.wait() == -signal.SIGKILL
    assert (tmp_path / ".prepared.new").exists()
    assert len(workers) == 2
    assert not (tmp_path / "prepared").exists()
    try:
        assert soon(lambda: not session_of(process.pid), seconds=10)
    finally:
        for worker in session_of(process.pid):
            os.kill(worker, signal.SIGKILL)
    assert prepare(load_config(path, LONGER)).counts["crowd"]["read"] == 10_090
