"""Chat files become the prepared dataset: complete, in order, counted, and made again only when it must be."""

import gzip
import json
import os
import re
from multiprocessing import get_context
from pathlib import Path

import datasets
import pytest

from ochat.config import Config, load_config
from ochat.data.prepare import check_prepared, prepare
from ochat.data.report import print_report
from ochat.data.store import MANIFEST_NAME, SCHEMA, Manifest, PreparedSplit
from ochat.data.template import get_template
from ochat.data.tokenize import load_tokenizer
from ochat.errors import ConfigError, DataError

FIXTURE = Path(__file__).parents[1] / "fixtures" / "tokenizers" / "mini-mistral"
USER_ONLY = {"messages": [{"role": "user", "content": "anyone?"}]}


def row(content: str, **keys: object) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": content}], **keys}


def jsonl(*rows: object) -> bytes:
    return b"".join(json.dumps(r).encode() + b"\n" for r in rows)


class Kitchen:
    """A folder with chat files and an experiment over them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.prepared = folder / "prepared"
        self.tree = {
            "run": {"name": "tiny"},
            "model": {"name_or_path": str(FIXTURE), "template": "openchat-3.5", "max_length": 64},
            "data": {"prepared_dir": str(self.prepared), "num_proc": 1, "sources": []},
            "batch": {"micro_batch_tokens": 64, "global_batch_tokens": 64},
        }

    def source(self, name: str, content: bytes, suffix: str = ".jsonl", **keys: object) -> Path:
        path = self.folder / f"{name}{suffix}"
        path.write_bytes(content)
        self.tree["data"]["sources"].append({"name": name, "path": str(path), **keys})
        return path

    def config(self, *overrides: str) -> Config:
        path = self.folder / "experiment.yaml"
        path.write_text(json.dumps(self.tree))
        return load_config(path, overrides)

    def column(self, name: str) -> list[object]:
        values: list[object] = datasets.load_from_disk(str(self.prepared / "train"))[name][:]
        return values

    def files(self) -> dict[str, tuple[int, int]]:
        """Every file's inode and time of writing: both change when the dataset is made again."""
        files = [p for p in self.prepared.rglob("*") if p.is_file()]
        return {str(p): (p.stat().st_ino, p.stat().st_mtime_ns) for p in files}


@pytest.fixture
def kitchen(tmp_path: Path) -> Kitchen:
    return Kitchen(tmp_path)


@pytest.fixture
def done(kitchen: Kitchen) -> Kitchen:
    """Two sources, prepared: three rows of one (the second has no reply), two of the other."""
    kitchen.source("good", jsonl(row("a"), USER_ONLY, row("b")), condition="GPT4", weight=1.0)
    kitchen.source("bad", jsonl(row("c"), row("d e f g h i j")), condition="GPT3", weight=0.1)
    prepare(kitchen.config())
    return kitchen


def check(config: Config) -> Manifest:
    template = get_template(config.model.template)
    return check_prepared(config, template, load_tokenizer(config.tokenizer_name_or_path, template))


def out_of_date(config: Config) -> str:
    with pytest.raises(DataError) as raised:
        check(config)
    return str(raised.value)


# --- what is on disk


def test_datasets_opens_it_with_the_promised_columns(done: Kitchen) -> None:
    opened = datasets.load_from_disk(str(done.prepared / "train"))
    assert opened.features.arrow_schema.remove_metadata() == SCHEMA
    assert SCHEMA.names == [
        "input_ids",
        "token_weights",
        "source_id",
        "line",
        "weight_sum",
        "num_supervised",
        "num_replies",
        "reply_weight_sum",
        "reward",
    ]
    types = {field.name: str(field.type) for field in SCHEMA}
    assert types["input_ids"] == "list<item: int32>"
    assert types["token_weights"] == "list<item: float>"
    assert [types[name] for name in ("weight_sum", "reply_weight_sum")] == ["double", "double"]
    assert [types[name] for name in ("num_supervised", "num_replies", "reward")] == ["int32", "int32", "float"]


def test_rows_are_in_file_order_and_sources_in_the_configurations(done: Kitchen) -> None:
    tokenizer = load_tokenizer(str(FIXTURE), get_template("openchat-3.5"))
    texts = [tokenizer.decode(ids) for ids in done.column("input_ids")]
    assert [text.split("Assistant:")[1].split("<|")[0].strip() for text in texts] == ["a", "b", "c", "d e f g h i j"]
    assert done.column("source_id") == [0, 0, 1, 1]
    assert done.column("line") == [1, 3, 1, 2]
    assert ["GPT4" in text for text in texts] == [True, True, False, False]


def test_the_sources_weight_is_not_on_disk(done: Kitchen) -> None:
    weights = [{w for w in row_weights if w} for row_weights in done.column("token_weights")]
    assert weights == [{1.0}] * 4


def test_blank_lines_arrays_and_gz_files_keep_their_numbers(kitchen: Kitchen) -> None:
    lines = b"\n" + jsonl(row("a")) + b"\n\n" + jsonl(row("b"))
    array = json.dumps([row("c"), USER_ONLY, row("d")]).encode()
    kitchen.source("lines", lines)
    kitchen.source("lines-gz", gzip.compress(lines), ".jsonl.gz")
    kitchen.source("array", array, ".json")
    kitchen.source("array-gz", gzip.compress(array), ".json.gz")
    prepare(kitchen.config())
    assert kitchen.column("line") == [2, 5, 2, 5, 1, 3, 1, 3]
    ids = kitchen.column("input_ids")
    assert ids[0:2] == ids[2:4]
    assert ids[4:6] == ids[6:8]
    assert ids[0:2] != ids[4:6]


def test_one_process_and_two_write_the_same_dataset(kitchen: Kitchen) -> None:
    rows = [row(f"number {n}") for n in range(2400)]  # ten tasks of 256 records: more than two processes have in flight
    rows[300] = USER_ONLY
    kitchen.source("many", jsonl(*rows))
    kitchen.source("few", jsonl(row("a"), row("b")))
    manifests, tables = [], []
    for num_proc in (1, 2):
        kitchen.tree["data"]["prepared_dir"] = str(kitchen.folder / f"prepared-{num_proc}")
        manifests.append(prepare(kitchen.config(f"data.num_proc={num_proc}")))
        tables.append(datasets.load_from_disk(str(kitchen.folder / f"prepared-{num_proc}" / "train")).data.table)
    assert tables[0].equals(tables[1])
    assert manifests[0] == manifests[1]
    assert tables[0].column("line").to_pylist() == [n for n in range(1, 2401) if n != 301] + [1, 2]


def test_the_reward_of_a_row_is_on_disk_and_null_without_a_field(kitchen: Kitchen) -> None:
    kitchen.source("scored", jsonl(row("a", score=2), row("b", score=0.5)), reward_field="score")
    kitchen.source("fixed", jsonl(row("c")), reward=1)
    prepare(kitchen.config("loss.beta=1"))
    assert kitchen.column("reward") == [2.0, 0.5, None]


# --- counts


def test_read_is_kept_plus_dropped_for_every_source(done: Kitchen) -> None:
    counts = Manifest.read(done.prepared).counts
    assert [(c["read"], c["kept"], c["dropped"]) for c in counts.values()] == [(3, 2, {"no reply": 1}), (2, 2, {})]
    assert list(counts) == ["good", "bad"]
    assert [c["conditions"] for c in counts.values()] == [{"GPT4": 2}, {"GPT3": 2}]


def test_the_counts_are_of_what_is_on_disk(done: Kitchen) -> None:
    counts = Manifest.read(done.prepared).counts.values()
    split = PreparedSplit(done.prepared / "train")
    assert sum(c["tokens"] for c in counts) == split.lengths.sum()
    assert sum(c["supervised_tokens"] for c in counts) == split.column("num_supervised").sum()
    assert sum(c["weight_sum"] for c in counts) == split.column("weight_sum").sum()


def test_a_long_conversation_is_cut_to_max_length_and_counted(done: Kitchen) -> None:
    lengths = [len(ids) for ids in done.column("input_ids")]
    whole = done.column("input_ids")
    limit = lengths[3] - 3  # the long reply of `bad` loses its end of turn and two letters
    assert limit > max(lengths[:3])
    manifest = prepare(done.config(f"model.max_length={limit}"))
    assert [len(ids) for ids in done.column("input_ids")] == [*lengths[:3], limit]
    assert done.column("input_ids")[3] == whole[3][:limit]  # type: ignore[index]
    assert (manifest.counts["bad"]["truncated"], manifest.counts["bad"]["cut_tokens"]) == (1, 3)
    assert manifest.counts["good"]["truncated"] == 0


def test_context_after_the_last_reply_is_not_kept(kitchen: Kitchen) -> None:
    trailing = row("a")
    trailing["messages"].append({"role": "user", "content": "thanks"})  # type: ignore[attr-defined]
    kitchen.source("chats", jsonl(row("a"), trailing))
    manifest = prepare(kitchen.config())
    ids = kitchen.column("input_ids")
    assert ids[0] == ids[1]
    assert manifest.counts["chats"]["trimmed_tokens"] > 0
    assert manifest.counts["chats"]["truncated"] == 0


# --- made again only when it must be


def test_a_second_call_writes_nothing(done: Kitchen) -> None:
    before, manifest = done.files(), Manifest.read(done.prepared)
    assert prepare(done.config()) == manifest
    assert done.files() == before


@pytest.mark.parametrize(
    "override", ["data.sources.1.weight=0.5", "run.seed=3", "data.num_proc=2", "loss.weighting=message"]
)
def test_what_is_not_in_the_tokens_does_not_make_it_again(done: Kitchen, override: str) -> None:
    before = done.files()
    prepare(done.config(override))
    assert done.files() == before


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("data.sources.1.condition=GPT2", "data.sources.bad.condition was 'GPT3', is 'GPT2'"),
        ("model.max_length=32", "model.max_length was 64, is 32"),
        ("model.template=openchat-3.2", "template.name was 'openchat-3.5', is 'openchat-3.2'"),
        ("data.sources.0.format=openai", "data.sources.good.format was 'auto', is 'openai'"),
        ("data.sources.0.name=best", "order of data.sources.0 was 'good', is 'best'"),
    ],
)
def test_what_is_in_the_tokens_makes_it_again_and_is_named(done: Kitchen, override: str, named: str) -> None:
    before, fingerprint = done.files(), Manifest.read(done.prepared).fingerprint
    assert (
        out_of_date(done.config(override))
        == f"{done.prepared} is out of date: {named}. Set that back, or prepare again."
    )
    assert prepare(done.config(override)).fingerprint != fingerprint
    assert done.files() != before
    assert check(done.config(override))


def test_another_tokenizer_makes_it_again(done: Kitchen) -> None:
    other = f"model.tokenizer_name_or_path={FIXTURE.with_name('mini-llama3')}"
    ids = done.column("input_ids")
    assert "tokenizer_sha256 was" in out_of_date(done.config(other))
    prepare(done.config(other))
    assert done.column("input_ids") != ids


@pytest.mark.parametrize("content", [jsonl(row("a")), jsonl(row("a"), USER_ONLY, row("x"))])
def test_another_content_of_a_file_makes_it_again(done: Kitchen, content: bytes) -> None:
    path = done.folder / "good.jsonl"
    assert len(jsonl(row("a"), USER_ONLY, row("x"))) == path.stat().st_size  # the second has the old size
    path.write_bytes(content)
    assert out_of_date(done.config()) == f"{done.prepared} is out of date: {path} has changed since."
    fingerprint = Manifest.read(done.prepared).fingerprint
    assert prepare(done.config()).fingerprint != fingerprint


def test_another_path_is_not_taken_for_the_file_that_was_read(done: Kitchen) -> None:
    """A slip of the pen in a path must not train what was read before under its name."""
    mistyped = f"data.sources.0.path={done.folder}/god.jsonl"
    was = f"source good was read from {done.folder}/good.jsonl, is {done.folder}/god.jsonl"
    assert f"{was}, where no file is." in out_of_date(done.config(mistyped))
    with pytest.raises(DataError, match=r"god\.jsonl: no such file"):
        prepare(done.config(mistyped))
    (done.folder / "god.jsonl").write_bytes(jsonl(row("other")))
    assert f"{was}." in out_of_date(done.config(mistyped))
    (done.folder / "god.jsonl").write_bytes((done.folder / "good.jsonl").read_bytes())  # the same chats elsewhere
    assert check(done.config(mistyped))
    (done.folder / "good.jsonl").unlink()
    assert check(done.config())  # a training node has no chats


def test_a_touched_file_of_the_same_content_does_not_make_it_again(done: Kitchen) -> None:
    path, before = done.folder / "good.jsonl", done.files()
    os.utime(path, ns=(1, 1))
    prepare(done.config())
    assert done.files() == before
    path.write_bytes(path.read_bytes().replace(b'"b"', b'"x"'))
    os.utime(path, ns=(1, 1))
    prepare(done.config())
    assert done.files() != before


def test_a_dataset_whose_files_were_lost_is_made_again(done: Kitchen) -> None:
    before = done.column("input_ids")
    for file in (done.prepared / "train").iterdir():
        file.unlink()
    prepare(done.config())
    assert done.column("input_ids") == before


# --- errors leave the old dataset alone


@pytest.mark.parametrize("num_proc", [1, 2])
def test_a_bad_line_is_named_and_the_old_dataset_stays(done: Kitchen, num_proc: int) -> None:
    before = done.files()
    path = done.folder / "bad.jsonl"
    path.write_bytes(jsonl(row("c")) + b"\n" + b'{"messages": [}\n')
    with pytest.raises(DataError) as raised:
        prepare(done.config(f"data.num_proc={num_proc}"))
    assert str(raised.value).startswith(f"{path}:3: not valid JSON at column 15")
    assert done.files() == before
    assert [p.name for p in done.folder.iterdir() if p.is_dir()] == ["prepared"]


def test_a_bad_line_without_an_old_dataset_leaves_nothing(kitchen: Kitchen) -> None:
    kitchen.source("chats", jsonl(row("a"), {"messages": []}))
    with pytest.raises(DataError, match=r"chats\.jsonl:2: "):
        prepare(kitchen.config())
    assert not kitchen.prepared.exists()


def test_a_folder_of_someone_else_is_refused(kitchen: Kitchen) -> None:
    kitchen.source("chats", jsonl(row("a")))
    kitchen.prepared.mkdir()
    (kitchen.prepared / "thesis.tex").write_text("mine")
    with pytest.raises(DataError, match=r"is not a prepared dataset; it will not be overwritten"):
        prepare(kitchen.config())
    assert [p.name for p in kitchen.prepared.iterdir()] == ["thesis.tex"]


def test_a_file_in_place_of_the_folder_is_refused(kitchen: Kitchen) -> None:
    kitchen.source("chats", jsonl(row("a")))
    kitchen.prepared.write_text("mine")
    with pytest.raises(DataError):
        prepare(kitchen.config())
    assert kitchen.prepared.read_text() == "mine"


def test_a_missing_chat_file_is_named_before_anything_is_done(done: Kitchen) -> None:
    before = done.files()
    with pytest.raises(DataError, match=r"^none\.jsonl: no such file\."):
        prepare(done.config("data.sources.1.path=none.jsonl", "model.max_length=9"))
    assert done.files() == before


def test_a_prepared_dataset_does_not_need_the_chat_files_any_more(done: Kitchen) -> None:
    before = done.files()
    (done.folder / "bad.jsonl").unlink()
    prepare(done.config())
    assert done.files() == before


def test_rows_that_went_missing_are_noticed(done: Kitchen) -> None:
    manifest = json.loads((done.prepared / "manifest.json").read_text())
    manifest["counts"]["good"]["rows"] += 1
    (done.prepared / "manifest.json").write_text(json.dumps(manifest))
    assert re.search(r"is damaged: \d+ rows, where the manifest counts \d+", out_of_date(done.config()))


def test_two_processes_that_prepare_at_once_make_one_whole_dataset(kitchen: Kitchen) -> None:
    kitchen.source("good", jsonl(*(row(f"answer {n}") for n in range(3000))))
    config = kitchen.config()
    both = [get_context("fork").Process(target=prepare, args=(config,)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    kept = sum(count["kept"] for count in Manifest.read(kitchen.prepared).counts.values())
    assert len(PreparedSplit(kitchen.prepared / "train")) == kept


def test_a_condition_that_spells_a_control_token_is_refused(done: Kitchen) -> None:
    with pytest.raises(
        ConfigError, match=r"^data\.sources\.0\.condition: condition '<\|end_of_turn\|>' spells a control token"
    ):
        prepare(done.config("data.sources.0.condition=<|end_of_turn|>"))


def test_sources_without_any_reply_are_refused_and_the_old_dataset_stays(done: Kitchen) -> None:
    before = done.files()
    for name in ("good", "bad"):
        (done.folder / f"{name}.jsonl").write_bytes(jsonl(USER_ONLY))
    with pytest.raises(DataError, match="nothing to train on"):
        prepare(done.config())
    assert done.files() == before


# --- the report


def test_the_report_shows_what_became_of_every_source(done: Kitchen, capsys: pytest.CaptureFixture[str]) -> None:
    # Supervised tokens weigh 1 each in both sources, so shares of the gradient go as weight x tokens.
    sums = [c["weight_sum"] for c in Manifest.read(done.prepared).counts.values()]
    share = sums[0] / (sums[0] + 0.1 * sums[1])
    print_report(done.config(), Manifest.read(done.prepared))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    good, bad = ([cells for cells in lines if cells[:1] == [name]] for name in ("good", "bad"))
    assert good[0] == ["good", "3", "2", "1", "0", "0"]
    assert bad[0] == ["bad", "2", "2", "0", "0", "0"]
    assert good[2][-1] == f"{share:.1%}"
    assert bad[2][-1] == f"{1 - share:.1%}"


# --- check_prepared, as training asks it


def test_a_missing_dataset_is_said_to_be_missing(kitchen: Kitchen) -> None:
    kitchen.source("chats", jsonl(row("a")))
    expected = f"{kitchen.prepared}: no prepared dataset there ({MANIFEST_NAME} is missing)."
    assert out_of_date(kitchen.config()) == expected


def test_an_absent_chat_file_is_trusted(done: Kitchen) -> None:
    (done.folder / "good.jsonl").unlink()
    assert check(done.config()) == Manifest.read(done.prepared)
    assert "max_length" in out_of_date(done.config("model.max_length=32"))


# --- held out


def test_a_prompt_of_two_sources_is_held_out_of_both_or_neither(
    kitchen: Kitchen, capsys: pytest.CaptureFixture[str]
) -> None:
    def chats(answer: str) -> bytes:
        prompts = [{"role": "user", "content": f"prompt {n}"} for n in range(40)]
        return jsonl(*({"messages": [p, {"role": "assistant", "content": answer}]} for p in prompts))

    kitchen.source("good", chats("yes"), condition="GPT4", weight=1.0)
    kitchen.source("bad", chats("no"), condition="GPT3", weight=0.1)
    whole = prepare(kitchen.config())
    assert [p.name for p in kitchen.prepared.iterdir() if p.is_dir()] == ["train"]
    part = prepare(kitchen.config("data.val_fraction=0.3"))
    assert part.fingerprint != whole.fingerprint

    lines = {
        (split, source): [
            r["line"] for r in datasets.load_from_disk(str(kitchen.prepared / split)) if r["source_id"] == source
        ]
        for split in ("train", "val")
        for source in (0, 1)
    }
    assert lines["val", 0] == lines["val", 1]
    assert 4 < len(lines["val", 0]) < 22
    assert sorted(lines["train", 0] + lines["val", 0]) == list(range(1, 41))
    good = part.counts["good"]
    assert (good["read"], good["kept"], good["held_out"]) == (40, len(lines["train", 0]), len(lines["val", 0]))
    print_report(kitchen.config("data.val_fraction=0.3"), part)
    assert "held out" in capsys.readouterr().out


def test_a_lost_validation_split_is_noticed(kitchen: Kitchen) -> None:
    kitchen.source("chats", jsonl(row("a"), row("b")))
    config = kitchen.config("data.val_fraction=0.3")
    prepare(config)
    assert check(config)
    for file in (kitchen.prepared / "val").iterdir():
        file.unlink()
    assert "val: no Arrow files there" in out_of_date(config)


@pytest.mark.parametrize("value", ["-0.1", "1", "nan"])
def test_a_share_to_hold_out_is_below_one(kitchen: Kitchen, value: str) -> None:
    kitchen.source("chats", jsonl(row("a")))
    with pytest.raises(ConfigError, match=r"data\.val_fraction"):
        kitchen.config(f"data.val_fraction={value}")
