"""Preparing files that are not tidy: which rows end it, which are left out and counted, and what else decides."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from ochat.config import Config, load_config
from ochat.data.loader import Loader
from ochat.data.prepare import check_prepared, prepare
from ochat.data.report import print_report
from ochat.data.store import TRAIN_SPLIT, Manifest, PreparedSplit
from ochat.data.template import get_template
from ochat.data.tokenize import load_tokenizer
from ochat.errors import ConfigError, DataError

FIXTURE = Path(__file__).parents[1] / "fixtures" / "tokenizers" / "mini-mistral"
NO_ROLE = {"messages": [{"role": "alien", "content": "Hi"}]}
USER_ONLY = {"messages": [{"role": "user", "content": "anyone?"}]}


def row(content: str, **keys: object) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": content}], **keys}


def jsonl(*rows: object) -> bytes:
    return b"".join((r if isinstance(r, bytes) else json.dumps(r).encode()) + b"\n" for r in rows)


def config(folder: Path, *overrides: str, **sources: bytes | str) -> Config:
    """An experiment over one file per source, named after it; a text is a source's path."""
    listed = []
    for name, content in sources.items():
        path = folder / f"{name}.jsonl"
        if isinstance(content, bytes):
            path.write_bytes(content)
        listed.append({"name": name, "path": str(path) if isinstance(content, bytes) else content})
    tree = {
        "run": {"name": "tiny"},
        "model": {"name_or_path": str(FIXTURE), "template": "openchat-3.5", "max_length": 64},
        "data": {"prepared_dir": str(folder / "prepared"), "num_proc": 1, "sources": listed},
        "batch": {"micro_batch_tokens": 64, "global_batch_tokens": 64},
    }
    path = folder / "experiment.yaml"
    path.write_text(json.dumps(tree))
    return load_config(path, overrides)


def refused(settings: Config) -> str:
    with pytest.raises(DataError) as raised:
        prepare(settings)
    assert not Path(settings.data.prepared_dir).exists()
    return str(raised.value)


def opened(settings: Config) -> PreparedSplit:
    return PreparedSplit(Path(settings.data.prepared_dir) / TRAIN_SPLIT)


# --- on_error


@pytest.mark.parametrize("num_proc", [1, 2])
def test_raise_shows_the_first_five_problems_of_all_sources_and_the_way_on(tmp_path: Path, num_proc: int) -> None:
    one = jsonl(row("a"), NO_ROLE, b"{", row("b"), [1])
    two = jsonl({"id": 3}, row("c", condition=4), NO_ROLE)
    text = refused(config(tmp_path, f"data.num_proc={num_proc}", one=one, two=two))
    *problems, first, way_on = text.splitlines()
    places = [f"{tmp_path}/{place}" for place in ("one.jsonl:2", "one.jsonl:3", "one.jsonl:5")]
    places += [f"{tmp_path}/{place}" for place in ("two.jsonl:1", "two.jsonl:2")]
    assert [problem.partition(": ")[0] for problem in problems] == places
    assert "role 'alien'" in problems[0]
    assert "not valid JSON" in problems[1]
    assert first == "These are the first 5 problems."
    assert "data.on_error=skip" in way_on


def test_raise_finds_problems_that_lie_far_apart(tmp_path: Path) -> None:
    rows = [row(f"{n}") for n in range(600)]  # three tasks of 256 records
    rows[3] = rows[590] = NO_ROLE
    problems = refused(config(tmp_path, chats=jsonl(*rows))).splitlines()
    assert [p.partition(": ")[0].rpartition(":")[2] for p in problems[:2]] == ["4", "591"]
    assert len(problems) == 3


@pytest.mark.parametrize("num_proc", [1, 2])
def test_skip_leaves_rows_out_and_counts_them_by_reason(
    tmp_path: Path, num_proc: int, caplog: pytest.LogCaptureFixture
) -> None:
    content = jsonl(row("a"), NO_ROLE, b"{", USER_ONLY, row("b"), NO_ROLE)
    settings = config(tmp_path, "data.on_error=skip", f"data.num_proc={num_proc}", chats=content)
    counts = prepare(settings).counts["chats"]
    assert counts["dropped"] == {"unknown role": 2, "not JSON": 1, "no reply": 1}
    assert (counts["read"], counts["kept"]) == (6, 2)
    assert set(counts["examples"]) == {"unknown role", "not JSON"}
    assert f"{tmp_path}/chats.jsonl:2: " in counts["examples"]["unknown role"]
    assert f"{tmp_path}/chats.jsonl:3: not valid JSON" in counts["examples"]["not JSON"]
    assert opened(settings).column("line").tolist() == [1, 5]
    assert "source chats: 4 of 6 left out (2 unknown role, 1 not JSON, 1 no reply)" in caplog.text


def test_skip_with_nothing_kept_is_a_warning_and_training_on_it_an_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = config(tmp_path, "data.on_error=skip", chats=jsonl(NO_ROLE), none=b"")
    manifest = prepare(settings)
    print_report(settings, manifest)
    assert "source chats: keeps nothing of 1 conversations read" in caplog.text
    assert "warning: source none keeps nothing of 0 conversations read." in capsys.readouterr().out
    assert len(opened(settings)) == 0
    assert prepare(settings) == manifest
    with pytest.raises(DataError, match="nothing to train on: the prepared dataset is empty"):
        Loader(settings, opened(settings))
    other = tmp_path / "raise"
    other.mkdir()
    assert refused(config(other, chats=jsonl(USER_ONLY))).startswith("nothing to train on: of 1 conversations read")


def test_a_damaged_file_is_an_error_even_under_skip(tmp_path: Path) -> None:
    assert "UTF-16" in refused(config(tmp_path, "data.on_error=skip", chats="{}".encode("utf-16")))


def test_a_control_token_as_a_sources_condition_is_found_before_any_row_is_read(tmp_path: Path) -> None:
    chats = jsonl(NO_ROLE)  # would be the first problem, were it read
    overrides = ("data.sources.1.condition=' <s>'", "data.on_error=skip")
    with pytest.raises(ConfigError) as raised:
        prepare(config(tmp_path, *overrides, one=chats, two=chats))
    assert str(raised.value) == (
        "data.sources.1.condition: condition '<s>' spells a control token of the tokenizer. "
        "Name the class with plain words."
    )
    assert not (tmp_path / "prepared").exists()
    assert prepare(config(tmp_path, "data.on_error=skip", one=chats, two=chats)).counts["two"]["read"] == 1


# --- duplicates


@pytest.mark.parametrize("num_proc", [1, 2])
def test_duplicates_are_seen_across_sources_and_only_the_first_is_kept(tmp_path: Path, num_proc: int) -> None:
    many = [row(f"{n}") for n in range(300)]  # two tasks
    sources = {"one": jsonl(*many, row("7", id=4)), "two": jsonl(row("new"), row("9", condition="X"), row("9 "))}
    kept = config(tmp_path, f"data.num_proc={num_proc}", **sources)
    counts = prepare(kept).counts
    assert counts["one"]["noticed"] == {"duplicate": 1}
    assert counts["two"]["noticed"] == {"duplicate": 1, "duplicate of another source": 1}
    assert [c["kept"] for c in counts.values()] == [301, 3]
    dropping = config(tmp_path, f"data.num_proc={num_proc}", "data.duplicates=drop", **sources)
    counts = prepare(dropping).counts
    assert [c["kept"] for c in counts.values()] == [300, 2]
    assert [c["dropped"] for c in counts.values()] == [{"duplicate": 1}] * 2
    assert opened(dropping).column("line").tolist() == [*range(1, 301), 1, 3]
    assert sum(c["tokens"] for c in counts.values()) == opened(dropping).lengths.sum()
    assert counts["two"]["conditions"] == {"": 2}


# --- all policies enter the fingerprint


@pytest.mark.parametrize(
    "override",
    [
        "on_error=skip",
        "overlong=split",
        "empty_turns=trim",
        "assistant_first=drop",
        "same_role=merge",
        "duplicates=drop",
        "hygiene=clean",
    ],
)
def test_a_policy_that_changes_makes_the_dataset_again(tmp_path: Path, override: str) -> None:
    chats = jsonl(row("a"))
    before = prepare(config(tmp_path, chats=chats))
    name, _, value = override.partition("=")
    template = get_template("openchat-3.5")
    changed = config(tmp_path, f"data.{override}", chats=chats)
    with pytest.raises(DataError, match=rf"is out of date: data\.{name} was '\w+', is '{value}'"):
        check_prepared(changed, template, load_tokenizer(str(FIXTURE), template))
    assert prepare(changed).fingerprint != before.fingerprint


# --- containers


def test_every_container_gives_the_same_dataset(tmp_path: Path) -> None:
    rows = [row("a"), row("b")]
    folder = tmp_path / "hub"
    folder.mkdir()
    (folder / "train.jsonl").write_bytes(jsonl(*rows))
    (tmp_path / "z.jsonl.zst").write_bytes(zstandard.compress(jsonl(*rows)))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    paths = {"zst": f"{tmp_path}/z.jsonl.zst", "parquet": f"{tmp_path}/p.parquet", "hub": f"hf:{folder}"}
    settings = config(tmp_path, plain=jsonl(*rows), **paths)
    manifest = prepare(settings)
    split = opened(settings)
    texts = [split.tokens([i])[0].tolist() for i in range(len(split))]
    assert texts == texts[:2] * 4
    assert split.column("line").tolist() == [1, 2] * 4
    assert manifest.files["hub"].path == f"hf:{folder} train"
    assert prepare(settings) == manifest
    (folder / "train.jsonl").write_bytes(jsonl(*rows, row("c")))
    assert prepare(settings).counts["hub"]["read"] == 3


# --- size


def test_giant_rows_take_seconds_and_thousands_of_turns_and_brackets_do_no_harm(tmp_path: Path) -> None:
    giant = row("word " * 300_000)  # 1.5 MB
    word = row("x" * 200_000)
    turns = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 2000}
    nested = b'{"messages": ' + b"[" * 5000 + b"]" * 5000 + b"}"
    for policy in ("truncate", "split"):
        settings = config(
            tmp_path, "data.on_error=skip", f"data.overlong={policy}", chats=jsonl(giant, word, turns, nested)
        )
        counts = prepare(settings).counts["chats"]
        assert (counts["kept"], counts["truncated"]) == (3, 3 if policy == "truncate" else 2)
        assert counts["dropped"] == {"not JSON": 1}
        assert counts["split"] == (policy == "split")
    assert Manifest.read(tmp_path / "prepared").counts["chats"]["rows"] > 100
