"""Every file of ../shared/data/raw_formats: what becomes of it with the defaults, and with hygiene.

The formats' own tests with small rows, for a clone without that folder, are in test_formats.py and test_policies.py.
"""

from pathlib import Path

import pytest

from ochat.config import DataConfig, SourceConfig
from ochat.data.counts import Counts
from ochat.data.items import build_items, settle
from ochat.data.records import read_records
from ochat.data.template import get_template
from ochat.data.tokenize import ChatTokenizer, load_tokenizer
from ochat.errors import DataError

FIXTURE = Path(__file__).parents[1] / "fixtures" / "tokenizers" / "mini-mistral"

# file -> (read, kept, dropped, noticed), everything else as the defaults have it
GOOD = {
    "sharegpt.jsonl": (19, 19, {}, {}),
    "sharegpt.json": (10, 10, {}, {}),
    "sharegpt_extra_keys.jsonl": (3, 3, {}, {}),
    "sharegpt_role_aliases.jsonl": (12, 12, {}, {}),
    "sharegpt_tools.json": (10, 7, {"tool call": 3}, {"duplicate": 1}),
    "fastchat_dummy.json": (30, 30, {}, {}),
    "openai_messages_toy.jsonl": (10, 10, {}, {"assistant first": 3, "duplicate": 5}),
    "openai_messages.jsonl": (20, 20, {}, {}),
    "openai_functions.jsonl": (10, 0, {"tool call": 10}, {}),
    "openai_tools.jsonl": (10, 0, {"tool call": 10}, {}),
    "openai_bare_list.jsonl": (20, 20, {}, {}),
    "openai_parts_lossweight.jsonl": (18, 15, {"tool call": 3}, {}),
    "alpaca.json": (15, 15, {}, {}),
    "alpaca.jsonl": (25, 25, {}, {}),
    "alpaca_code.json": (12, 12, {}, {}),
    "dolly.json": (12, 12, {}, {}),
    "openchat_items.jsonl": (24, 24, {}, {}),
    "orca.jsonl": (20, 20, {}, {}),
    "history_user_bot.jsonl": (10, 10, {}, {}),
    "preference_azure_orca.jsonl": (12, 0, {"preference pair": 12}, {}),
    "oasst_tree.jsonl": (10, 0, {"message tree": 10}, {}),
    "hh_rlhf_text.jsonl": (5, 0, {"text dialogue": 5}, {}),
}
BROKEN = {"not JSON": 6, "malformed message": 1, "no object": 3}
ODD_VALUES = {
    "content is no text": 6,
    "malformed message": 3,
    "no messages": 1,
    "unknown format": 1,
    "unknown role": 2,
    "bad weight": 1,
}
UGLY = {
    "ugly/broken_json.jsonl": (12, 2, BROKEN, {}),
    "ugly/empty_turns.jsonl": (7, 6, {"no messages": 1}, {"empty turn": 5, "same role twice": 1}),
    "ugly/two_humans.jsonl": (5, 4, {"no reply": 1}, {"same role twice": 3, "assistant first": 1}),
    "ugly/assistant_first.jsonl": (10, 10, {}, {"assistant first": 10}),
    "ugly/html_residue.jsonl": (5, 5, {}, {}),
    "ugly/control_chars.jsonl": (6, 6, {}, {"untidy text": 5}),
    "ugly/lone_surrogates.jsonl": (3, 1, {"half a character": 2}, {}),
    "ugly/invalid_utf8.jsonl": (5, 2, {"not UTF-8": 2, "not JSON": 1}, {}),
    "ugly/duplicates.jsonl": (9, 9, {}, {"duplicate": 3}),
    "ugly/non_string_values.jsonl": (15, 1, ODD_VALUES, {}),
    "ugly/bom.jsonl": (3, 3, {}, {}),
    "ugly/crlf.jsonl": (3, 3, {}, {}),
    "ugly/no_final_newline_blank_lines.jsonl": (3, 3, {}, {}),
    "ugly/giant_line.jsonl": (5, 5, {}, {}),
    "ugly/special_token_injection.jsonl": (14, 14, {}, {}),
    "ugly/openchat_bad_weights.jsonl": (
        13,
        7,
        {"bad weight": 4, "bad condition": 1, "no reply": 1},
        {"duplicate": 6},
    ),
    "ugly/deep_nesting.jsonl": (2, 1, {"not JSON": 1}, {}),
    "ugly/empty.jsonl": (0, 0, {}, {}),
}
# file -> the rows that cannot be read, where they are neither none nor all
LINES = {
    "sharegpt_tools.json": [1, 4, 8],
    "openai_parts_lossweight.jsonl": [16, 17, 18],
    "ugly/broken_json.jsonl": [*range(2, 12)],
    "ugly/empty_turns.jsonl": [4],
    "ugly/lone_surrogates.jsonl": [1, 3],
    "ugly/invalid_utf8.jsonl": [2, 3, 4],
    "ugly/non_string_values.jsonl": [*range(1, 15)],
    "ugly/openchat_bad_weights.jsonl": [2, 3, 4, 10, 13],
    "ugly/deep_nesting.jsonl": [1],
}
# file -> what the one error says; no row of these can be numbered
REFUSED = {
    "axolotl_missingturns.json": "expected a JSON array of chats, found one chat. Put it into brackets",
    "ugly/wrong_container.json": "found one object with a list under `data`",
    "ugly/utf16.jsonl": "is UTF-16 text. Convert it: iconv -f UTF-16 -t UTF-8 utf16.jsonl",
}
# file -> what hygiene changes: (kept, dropped, noticed)
CLEANED = {
    "ugly/control_chars.jsonl": (6, {}, {"untidy text": 5}),
    "ugly/lone_surrogates.jsonl": (3, {}, {"untidy text": 2}),
    "ugly/invalid_utf8.jsonl": (5, {}, {"untidy text": 3}),
    # a tab inside a string is forgiven; that row holds no reply
    "ugly/broken_json.jsonl": (2, {**BROKEN, "not JSON": 5, "no reply": 1}, {"untidy text": 1}),
    "ugly/bom.jsonl": (3, {}, {}),
}


@pytest.fixture(scope="module")
def tokenizer() -> ChatTokenizer:
    template = get_template("openchat-3.5")
    return ChatTokenizer(load_tokenizer(str(FIXTURE), template), template)


def outcome(path: Path, tokenizer: ChatTokenizer, **policies: str) -> tuple[Counts, list[str]]:
    """The counts, and the sentences about rows that could not be read."""
    source = SourceConfig(name="raw", path=str(path))
    data = DataConfig(prepared_dir="p", sources=(source,), **policies)
    records = list(read_records(path))
    chunk = build_items(records, source, data, source_id=0, tokenizer=tokenizer, max_length=1 << 22)
    return settle(chunk, {}, drop_duplicates=False)[2], [problem.message for problem in chunk.problems]


def test_every_file_of_the_folder_is_in_a_table(shared: Path) -> None:
    folder = shared / "data" / "raw_formats"
    files = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} - {"MANIFEST.json"}
    assert files == {*GOOD, *UGLY, *REFUSED}
    assert len(files) == 23 + 20


@pytest.mark.parametrize("name", [*GOOD, *UGLY])
def test_a_file_becomes_what_the_table_says(shared: Path, tokenizer: ChatTokenizer, name: str) -> None:
    path = shared / "data" / "raw_formats" / name
    counts, problems = outcome(path, tokenizer)
    assert (counts.read, counts.kept, counts.dropped, counts.noticed) == {**GOOD, **UGLY}[name]
    assert counts.read == counts.kept + sum(counts.dropped.values())
    assert len(problems) == sum(counts.dropped.values()) - counts.dropped.get("no reply", 0)
    places = [problem.partition(": ")[0].rpartition(":") for problem in problems]
    assert {place for place, _, _ in places} <= {str(path)}
    assert [int(number) for _, _, number in places] == LINES.get(name, list(range(1, len(problems) + 1)))


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_without_numbered_rows_is_refused_as_a_whole(shared: Path, tokenizer: ChatTokenizer, name: str) -> None:
    path = shared / "data" / "raw_formats" / name
    with pytest.raises(DataError) as raised:
        outcome(path, tokenizer)
    assert str(raised.value).startswith(f"{path}: ")
    assert REFUSED[name] in str(raised.value)


@pytest.mark.parametrize("name", CLEANED)
def test_hygiene_makes_more_rows_readable(shared: Path, tokenizer: ChatTokenizer, name: str) -> None:
    counts, _ = outcome(shared / "data" / "raw_formats" / name, tokenizer, hygiene="clean")
    assert (counts.kept, counts.dropped, counts.noticed) == CLEANED[name]
