"""`ochat inspect` on a terminal of 16 colours, and where there are none."""

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from ochat.config import load_config
from ochat.data.inspect import Inspection, inspect
from ochat.data.inspect_terminal import print_inspection
from ochat.data.prepare import prepare
from tests.experiment import make_experiment
from tests.launch import run, run_in_terminal


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("terminal")
    prepare(make_experiment(folder))
    return folder


@pytest.fixture(scope="module")
def shown(folder: Path) -> Inspection:
    return inspect(load_config(folder / "experiment.yaml"), "", num=1)


def printed(shown: Inspection, **console: object) -> str:
    file = io.StringIO()
    print_inspection(shown, Console(file=file, **{"width": 80, "_environ": {}, **console}))
    return file.getvalue()


def test_without_colour_supervised_runs_stand_in_brackets_with_their_weight(shown: Inspection):
    out = printed(shown)
    runs = re.findall(r"\[(1|0\.1): ", out)

    assert "\x1b" not in out
    assert set(runs) == {"1", "0.1"}
    assert len(runs) == sum(turn.tokens[-1].weight > 0 for c in shown.conversations for turn in c.turns)


def test_a_pipe_gets_lines_of_any_length_whole(shown: Inspection):
    narrow, wide = printed(shown, width=20), printed(shown, width=500)

    assert narrow == wide


def test_on_16_colours_each_level_has_its_own_ground(shown: Inspection):
    out = printed(shown, force_terminal=True, color_system="standard")
    grounds = re.findall(r"\x1b\[(?:[\d;]*;)?(4[0-7]|10[0-7])m", out)

    assert "102" in grounds  # 1: bright green
    assert "46" in grounds  # 0.1: cyan
    assert not re.search(r"[34]8;[25]", out)
    assert "[1: " not in out


def test_no_color_on_a_terminal_falls_back_to_brackets(shown: Inspection):
    assert "[0.1: " in printed(shown, force_terminal=True, no_color=True)


def test_packed_rows_show_fill_and_where_each_document_is_from(shown: Inspection):
    out = printed(shown)
    row = shown.rows[0]

    assert f"step 0 of {shown.num_steps}: {len(shown.rows)} packed rows" in out
    assert f"{row.num_tokens} of 256 tokens, {row.fill:.1%}" in out
    assert f"{row.documents[0].where} ({row.documents[0].end})" in out
    bars = re.findall(r"^row \d+ +([▓░·]+) ", out, re.M)
    assert [len(bar) for bar in bars] == [72] * len(shown.rows)


def test_escape_codes_and_rich_markup_in_a_chat_stay_text(tmp_path: Path):
    path = make_experiment(tmp_path) and tmp_path / "experiment.yaml"
    (tmp_path / "expert.jsonl").write_text(
        '{"conversations": [{"from": "human", "value": "\\u001b[2J [red]x[/red] :smile:"},'
        ' {"from": "gpt", "value": "[/]"}]}\n'
    )
    prepare(load_config(path))
    out = printed(inspect(load_config(path), "", source="expert"))
    flat = out.replace("¦", "")

    assert "\x1b" not in out
    assert "‹U+001B›[2J [red]x[/red] :smile:" in flat
    assert "[1:  [/]<|end_of_turn|>]" in flat  # the second space is SentencePiece's


def test_the_command_prints_plain_text_to_a_pipe_and_colours_to_a_terminal(folder: Path):
    path = folder / "experiment.yaml"
    piped = run("ochat", "inspect", path, "--source", "crowd", "--row", 3)
    seen = run_in_terminal("ochat", "inspect", path, "--source", "crowd", "--row", 3)

    assert piped.returncode == 0, piped.stderr
    assert f"{folder}/crowd.jsonl:3  source crowd, condition GPT3, weight 0.1" in piped.stdout
    assert "\x1b[" not in piped.stdout
    assert "\x1b[" in seen


def test_the_command_writes_a_page_and_takes_overrides_anywhere(folder: Path):
    page = folder / "page.html"
    done = run("ochat", "inspect", "--html", page, folder / "experiment.yaml", "data.sources.1.weight=0.25", "--num", 1)

    assert done.stdout == f"wrote {page}; open it in a browser\n"
    assert "weight 0.25" in page.read_text(encoding="utf-8")


def test_the_command_names_prepare_with_its_overrides(folder: Path):
    path = folder / "experiment.yaml"
    done = run("ochat", "inspect", path, "model.max_length=100")

    assert done.returncode == 2
    assert done.stderr.endswith(f"Run: ochat prepare {path} model.max_length=100\n")
    assert "is out of date: model.max_length" in done.stderr
