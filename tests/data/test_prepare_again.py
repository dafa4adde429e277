"""What has been prepared is found up to date from its fingerprint, without reading the chats."""

import resource
from pathlib import Path

import pytest

from ochat.data.store import Manifest
from tests.experiment import write_chats, write_experiment
from tests.launch import run


def core_seconds_of(*command: object) -> float:
    """Time on a core, which a busy machine does not stretch as it does the clock's."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = run(*command)
    assert result.returncode == 0, result.stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.slow
def test_a_hundred_thousand_chats_are_found_up_to_date_in_two_seconds(tmp_path: Path) -> None:
    path = write_experiment(tmp_path)
    write_chats(tmp_path / "crowd.jsonl", 100_000, seed=1)
    first = core_seconds_of("ochat", "prepare", path)
    again = core_seconds_of("ochat", "prepare", path)
    reweighted = core_seconds_of("ochat", "prepare", path, "data.sources.1.weight=0.7")
    conditioned = core_seconds_of("ochat", "prepare", path, "data.sources.1.condition=Crowd")
    assert Manifest.read(tmp_path / "prepared").counts["crowd"]["read"] == 100_000
    assert again < 2
    assert reweighted < 2
    assert min(first, conditioned) > 2 * max(again, reweighted)  # both tokenised everything
