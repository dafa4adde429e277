"""What `ochat inspect` finds: the loader's own tokens and weights, readable again as text, with their origin."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ochat.config import load_config
from ochat.data.conversation import Conversation, Message
from ochat.data.inspect import Inspection, inspect
from ochat.data.inspect_tokens import Token, TokenReader, Turn, glyphs, weight_level
from ochat.data.loader import Loader
from ochat.data.prepare import prepare
from ochat.data.store import TRAIN_SPLIT, PreparedSplit
from ochat.data.template import get_template
from ochat.data.tokenize import ChatTokenizer, load_tokenizer
from ochat.errors import ConfigError, DataError
from tests.experiment import TOKENIZERS, make_experiment, write_experiment

FAMILIES = {"mini-mistral": "openchat-3.5", "mini-llama3": "openchat-3.6"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared experiment: expert 30 chats at 1.0, crowd 90 at 0.1."""
    folder = tmp_path_factory.mktemp("inspect")
    prepare(make_experiment(folder))
    return folder


def look(folder: Path, *overrides: str, **selection: object) -> Inspection:
    return inspect(load_config(folder / "experiment.yaml", overrides), "ochat prepare experiment.yaml", **selection)


def text_of(tokens: tuple[Token, ...]) -> str:
    return "".join(token.text for token in tokens if token.kind == "content")


def read_chat(family: str, *messages: Message, condition: str = "GPT4") -> tuple[Turn, ...]:
    template = get_template(FAMILIES[family])
    tokenizer = load_tokenizer(str(TOKENIZERS / family), template)
    chat = Conversation(messages=messages, condition=condition, source="s")
    item = ChatTokenizer(tokenizer, template).tokenize([chat])[0]
    reader = TokenReader(tokenizer, template, ["", "GPT4", "GPT4 Correct"])
    return reader.read(item.input_ids, item.token_weights)


def test_every_source_shows_its_first_three_conversations_with_file_and_line(folder: Path):
    shown = look(folder)

    assert [c.where for c in shown.conversations] == [
        f"{folder}/{name}.jsonl:{line}" for name in ("expert", "crowd") for line in (1, 2, 3)
    ]
    assert [c.condition for c in shown.conversations] == ["GPT4"] * 3 + ["GPT3"] * 3


@pytest.mark.parametrize("weighting", ["token", "message"])
def test_ids_and_weights_shown_are_those_of_the_step_that_trains_them(folder: Path, weighting: str):
    override = f"loss.weighting={weighting}"
    loader = Loader(*_config_and_split(folder, override))

    for conversation in look(folder, override, num=5).conversations:
        step = list(loader.epoch(0))[conversation.step]
        batch = step.batches[conversation.row]
        ids = [token.id for token in conversation.tokens]
        bounds = batch.cu_seqlens.tolist()
        starts = [a for a, b in pairwise(bounds) if batch.input_ids[a:b].tolist() == ids]
        trained = batch.loss_weights[starts[0] : starts[0] + len(ids)].tolist()
        assert [token.weight for token in conversation.tokens[1:]] == trained[:-1]
        assert conversation.weight_sum == pytest.approx(sum(trained))


def _config_and_split(folder: Path, *overrides: str):
    config = load_config(folder / "experiment.yaml", overrides)
    return config, PreparedSplit(Path(config.data.prepared_dir) / TRAIN_SPLIT)


def test_a_changed_source_weight_is_shown_without_preparing_again(folder: Path):
    before, after = (look(folder, f"data.sources.1.weight={w}", source="crowd", row=1) for w in (0.1, 0.3))
    supervised = [
        sorted({token.weight for token in shown.conversations[0].tokens if token.weight}) for shown in (before, after)
    ]

    assert supervised == [[pytest.approx(0.1)], [pytest.approx(0.3)]]


def test_a_row_is_the_line_of_the_chat_file(folder: Path):
    (shown,) = look(folder, source="crowd", row=7).conversations
    turns = json.loads((folder / "crowd.jsonl").read_text().splitlines()[6])["conversations"]

    assert shown.where == f"{folder}/crowd.jsonl:7"
    assert [text_of(turn.tokens).strip() for turn in shown.turns] == [turn["value"] for turn in turns]


def test_num_counts_from_the_row_on(folder: Path):
    shown = look(folder, source="crowd", row=7, num=2).conversations

    assert [c.where.rpartition(":")[2] for c in shown] == ["7", "8"]


def test_an_unknown_source_is_named_with_the_nearest(folder: Path):
    with pytest.raises(ConfigError, match=r"--source 'crwd': .* Did you mean 'crowd'\? Known: expert, crowd\."):
        look(folder, source="crwd")


def test_a_line_without_a_kept_conversation_names_the_nearest(folder: Path):
    with pytest.raises(DataError, match=r"--row 31: no conversation .*expert\.jsonl .* nearest line kept is 30\."):
        look(folder, source="expert", row=31)


def test_data_that_was_not_prepared_is_refused_with_the_command(tmp_path: Path):
    write_experiment(tmp_path)

    with pytest.raises(DataError, match=r"no prepared dataset there .* Run: ochat prepare experiment\.yaml"):
        look(tmp_path)


def test_data_of_another_condition_is_out_of_date(folder: Path):
    with pytest.raises(DataError, match=r"out of date: .*condition.* Run: ochat prepare experiment\.yaml"):
        look(folder, "data.sources.1.condition=GPT2")


def test_rows_of_step_0_are_the_batches_with_their_boundaries(folder: Path):
    config, split = _config_and_split(folder)
    step = next(Loader(config, split).epoch(0))
    shown = look(folder).rows

    assert [[d.start for d in row.documents] + [row.num_tokens] for row in shown] == [
        batch.cu_seqlens.tolist() for batch in step.batches
    ]
    assert sum(row.num_tokens for row in shown) / sum(row.row_tokens for row in shown) == pytest.approx(step.fill)


def test_each_document_of_a_row_is_the_conversation_it_is_named_for(folder: Path):
    document = look(folder).rows[1].documents[2]
    file, _, line = document.where.rpartition(":")
    (conversation,) = look(folder, source=Path(file).stem, row=int(line)).conversations

    assert (conversation.step, conversation.row) == (0, 1)
    assert conversation.num_tokens == document.end - document.start
    assert conversation.weight_sum == pytest.approx(document.weight_sum)


def test_each_document_of_a_row_has_the_source_of_its_file(folder: Path):
    documents = [document for row in look(folder).rows for document in row.documents]

    assert {document.source_id for document in documents} == {0, 1}
    assert all(f"/{('expert', 'crowd')[d.source_id]}.jsonl:" in d.where for d in documents)
    assert all(d.weight == pytest.approx((1.0, 0.1)[d.source_id]) for d in documents)


def test_a_row_of_padding_has_no_documents(folder: Path):
    rows = look(folder, "batch.global_batch_tokens=25600").rows  # 100 rows a step, more than there are

    assert len(rows) == 100
    assert rows[0].documents
    assert (rows[-1].documents, rows[-1].num_tokens) == ((), 0)


def test_a_conversation_cut_inside_a_reply_is_known_and_a_whole_one_is_not_called_cut(tmp_path: Path):
    override = "model.max_length=30"
    config = make_experiment(tmp_path, override)
    prepare(config)
    shown = look(tmp_path, override, num=30).conversations
    cut = [c for c in shown if c.cut]

    assert 0 < len(cut) < len(shown)
    assert all(c.tokens[-1].text != "<|end_of_turn|>" and c.num_tokens == 30 for c in cut)
    assert all(c.tokens[-1].text == "<|end_of_turn|>" for c in shown if not c.cut)
    assert cut[0].ending == "cut inside a reply, at model.max_length = 30 tokens"


def test_uncut_data_says_so(folder: Path):
    assert {c.ending for c in look(folder).conversations} == {
        "ends with a whole reply; no conversation of its source was cut"
    }


@pytest.mark.parametrize("family", FAMILIES)
@settings(deadline=None, max_examples=40)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30))
def test_the_text_shown_can_be_read_again(family: str, text: str):
    turns = read_chat(family, Message(role="user", content=text), Message(role="assistant", content="ok"))
    template = get_template(FAMILIES[family])
    tokenizer = load_tokenizer(str(TOKENIZERS / family), template)
    encoded = tokenizer.backend_tokenizer
    encoded.encode_special_tokens = True
    expected = encoded.decode(encoded.encode(text, add_special_tokens=False).ids, skip_special_tokens=False)
    shown = text_of(turns[0].tokens)

    assert shown.removeprefix(" " if family == "mini-mistral" else "") == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_a_character_of_several_tokens_is_the_text_of_the_last_and_bytes_before(family: str):
    turns = read_chat(family, Message(role="assistant", content="😀"))
    tokens = [token for token in turns[0].tokens if token.kind == "content" and token.raw != b" "]

    assert b"".join(token.raw for token in tokens) == "😀".encode()
    assert [token.text for token in tokens] == ["", "", "", "😀"]
    assert next(glyphs(tokens[0])).text == "‹F0›"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("condition", ["", "GPT4", "GPT4 Correct"])
def test_prefix_tokens_are_the_ids_before_the_content(family: str, condition: str):
    hello = (Message(role="user", content="sat"), Message(role="assistant", content="GPT4 User: sat"))
    turns = read_chat(family, *hello, condition=condition)
    spaced = f"{condition} " if condition else ""

    assert [turn.condition for turn in turns] == [condition, condition]
    for turn, role in zip(turns, ("User", "Assistant"), strict=True):
        assert f"{spaced}{role}" in "".join(token.text for token in turn.tokens if token.kind == "prefix")
    assert "User: sat" in text_of(turns[1].tokens)  # typed, so not a prefix


def test_of_two_prefixes_that_fit_the_longer_is_taken():
    template = get_template("openchat-3.5")
    tokenizer = load_tokenizer(str(TOKENIZERS / "mini-mistral"), template)
    chat = Conversation(
        messages=(Message(role="assistant", content="sat"),), condition="sat Assistant: red", source="s"
    )
    item = ChatTokenizer(tokenizer, template).tokenize([chat])[0]
    reader = TokenReader(tokenizer, template, ["sat", "sat Assistant: red"])

    assert reader.read(item.input_ids, item.token_weights)[0].condition == "sat Assistant: red"


def test_an_added_token_that_is_not_special_is_plain_pieces_when_typed():
    template = get_template("openchat-3.5")
    tokenizer = load_tokenizer(str(TOKENIZERS / "mini-mistral"), template)
    tokenizer.add_tokens(["walls!"])
    chat = Conversation(messages=(Message(role="assistant", content="walls!"),), condition="", source="s")
    item = ChatTokenizer(tokenizer, template).tokenize([chat])[0]
    (turn,) = TokenReader(tokenizer, template, [""]).read(item.input_ids, item.token_weights)

    content = [token.text for token in turn.tokens if token.kind == "content"]
    assert "".join(content).strip() == "walls!"
    assert len(content) > 1
    assert (turn.tokens[-1].text, turn.tokens[-1].kind) == ("<|end_of_turn|>", "control")


def test_a_typed_control_string_is_content_and_the_real_one_is_control():
    turns = read_chat("mini-mistral", Message(role="assistant", content="<|end_of_turn|>"))

    assert len(turns) == 1
    assert [token.text for token in turns[0].tokens if token.kind == "control"] == ["<s>", "<|end_of_turn|>"]
    assert "<|end_of_turn|>" in text_of(turns[0].tokens)


def test_what_cannot_be_seen_gets_a_mark():
    token = Token(id=1, raw=b"", text="a \n\t\x1b\u202e\u00a0é", weight=0.0, kind="content")

    assert [(g.text, g.mark, g.newline) for g in glyphs(token)] == [
        ("a ", False, False), ("↵", True, True), ("⇥", True, False), ("‹U+001B›", True, False),
        ("‹U+202E›", True, False), ("‹U+00A0›", True, False), ("é", False, False),
    ]  # fmt: skip


@pytest.mark.parametrize(("weight", "level"), [(0, 0), (1.0, 5), (0.33, 4), (0.1, 3), (0.01, 1), (1e-9, 1), (2.0, 5)])
def test_levels_are_half_decades_below_the_highest(weight: float, level: int):
    assert weight_level(weight, 1.0) == level


def test_one_colour_means_one_weight_whatever_is_selected(folder: Path):
    alone, together = look(folder, source="crowd", row=1), look(folder, num=1)

    assert {entry.level: entry.highest for entry in alone.legend()} == {0: 0, 3: pytest.approx(0.1)}
    assert {e.level: e.highest for e in together.legend()} == {0: 0, 3: pytest.approx(0.1), 5: 1.0}


def test_the_legend_counts_every_token_shown(folder: Path):
    shown = look(folder)

    assert sum(entry.num_tokens for entry in shown.legend()) == sum(c.num_tokens for c in shown.conversations)


def test_the_first_token_of_a_document_never_shows_the_weight_of_another(folder: Path):
    # The batch holds weights shifted by one: a last token's slot must not come back as the next document's first.
    shown = look(folder, num=9).conversations

    assert all(c.tokens[0].weight == 0 for c in shown)
    assert all(c.tokens[-1].weight == pytest.approx(c.weight) for c in shown)  # end-of-turn of a reply
