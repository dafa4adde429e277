"""A folder is whole or not there, whoever is killed in between."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ochat.folders import locked, replace_folder


def fill(folder: Path, text: str) -> None:
    (folder / "train").mkdir()
    (folder / "train/data").write_text(text)
    (folder / "manifest").write_text(text)


def contents(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def old(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "here" / "thing"
    with replace_folder(folder) as new:
        fill(new, "old")
    yield folder
    assert [p.name for p in folder.parent.iterdir()] == ["thing"]  # nothing is left over beside it


def test_a_new_dataset_takes_the_place_of_the_old_one_at_the_end(old: Path) -> None:
    with replace_folder(old) as new:
        fill(new, "new")
        assert contents(old)["train/data"] == "old"
    assert contents(old)["train/data"] == "new"


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_an_error_leaves_the_old_dataset_as_it_was(old: Path, error: BaseException) -> None:
    def fill_half() -> None:
        with replace_folder(old) as new:
            fill(new, "half")
            raise error

    before = contents(old)
    with pytest.raises(type(error)):
        fill_half()
    assert contents(old) == before


def test_what_a_killed_process_left_is_cleared_away(old: Path) -> None:
    for name in (".thing.new", ".thing.old"):
        (old.parent / name).mkdir()
        (old.parent / name / "rest").write_text("half")
    with replace_folder(old) as new:
        fill(new, "new")
    assert set(contents(old)) == {"train/data", "manifest"}


def test_an_empty_folder_may_be_filled(tmp_path: Path) -> None:
    (tmp_path / "thing").mkdir()
    with replace_folder(tmp_path / "thing") as new:
        fill(new, "new")
    assert contents(tmp_path / "thing")["train/data"] == "new"


def test_a_process_killed_between_the_two_renames_loses_nothing(old: Path) -> None:
    old.rename(old.with_name(".thing.old"))

    with pytest.raises(OSError, match="again"), replace_folder(old):
        raise OSError("again")

    assert contents(old)["train/data"] == "old"


def test_a_lock_is_held_against_other_processes_and_ends_with_its_holder(tmp_path: Path) -> None:
    code = "import sys, time; from pathlib import Path; from ochat.folders import locked\n"
    code += "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "thing")], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    holder.stdout.readline()
    waiter = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "thing")], stdout=subprocess.DEVNULL)
    time.sleep(1)
    assert waiter.poll() is None

    waiter.kill()
    holder.kill()
    holder.wait()

    with locked(tmp_path / "thing"):
        pass


@pytest.mark.parametrize(("umask", "rights"), [(0o022, 0o644), (0o007, 0o660)])
def test_files_follow_the_umask_whoever_wrote_them(tmp_path: Path, umask: int, rights: int) -> None:
    before = os.umask(umask)
    try:
        with replace_folder(tmp_path / "folder") as new:
            save_file({"a": torch.zeros(1)}, new / "model.safetensors")
            assert (new / "model.safetensors").stat().st_mode & 0o777 == 0o600  # what it is about
            (new / "inside").mkdir()
            (new / "inside/plain.txt").write_text("")
    finally:
        os.umask(before)

    files = (tmp_path / "folder/model.safetensors", tmp_path / "folder/inside/plain.txt")
    assert [file.stat().st_mode & 0o777 for file in files] == [rights, rights]
