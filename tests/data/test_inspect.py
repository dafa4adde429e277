"""What `ochat inspect` finds: the loader's own tokens and weights, readable again as text, with their origin."""

import json
from itertools import pairwise
from pathlib import Path

import pytest

from ochat.config import load_config
from ochat.data.inspect import InspectedConversation, Inspection, inspect
from ochat.data.inspect_tokens import Token
from ochat.data.loader import Loader
from ochat.data.prepare import prepare
from ochat.data.store import TRAIN_SPLIT, PreparedSplit
from ochat.errors import ConfigError, DataError
from tests.experiment import TOKENIZERS, make_experiment, write_experiment

LLAMA = TOKENIZERS / "mini-llama3"


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
        step, row = conversation.place
        batch = loader.step(0, step).batches[row]
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
    step = Loader(config, split).step(0, 0)
    shown = look(folder).rows

    assert [[d.start for d in row.documents] + [row.num_tokens] for row in shown] == [
        batch.cu_seqlens.tolist() for batch in step.batches
    ]
    assert sum(row.num_tokens for row in shown) / sum(row.row_tokens for row in shown) == pytest.approx(step.fill)


def test_each_document_of_a_row_is_the_conversation_it_is_named_for(folder: Path):
    document = look(folder).rows[1].documents[2]
    file, _, line = document.where.rpartition(":")
    (conversation,) = look(folder, source=Path(file).stem, row=int(line)).conversations

    assert conversation.place == (0, 1)
    assert conversation.num_tokens == document.end - document.start
    assert conversation.weight_sum == pytest.approx(document.weight_sum)


def test_each_document_of_a_row_has_the_source_of_its_file(folder: Path):
    documents = [document for row in look(folder).rows for document in row.documents]

    assert {document.source_id for document in documents} == {0, 1}
    assert all(f"/{('expert', 'crowd')[d.source_id]}.jsonl:" in d.where for d in documents)
    assert all(d.weight == pytest.approx((1.0, 0.1)[d.source_id]) for d in documents)


def test_a_repeated_source_is_shown_where_it_is_trained_first_and_a_rested_chat_is_said_to_be(folder: Path):
    twice = look(folder, "data.sources.0.repeat=2", source="expert", num=30).conversations
    half = look(folder, "data.sources.1.repeat=0.5", source="crowd", num=90).conversations

    assert all(shown.place is not None for shown in twice)
    assert [shown.place for shown in half].count(None) == len(half) // 2
    assert next(s for s in half if s.place is None).place_text == "not trained in the first epoch"


def test_behind_max_steps_nothing_is_said_to_be_trained(folder: Path):
    shown = look(folder, "training.max_steps=1", num=90)

    assert shown.num_steps == 1
    assert {c.place[0] for c in shown.conversations if c.place} == {0}
    assert any(c.place is None for c in shown.conversations)


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


# --- where it ends, by policy


def look_at(folder: Path, *overrides: str) -> list[InspectedConversation]:
    config = load_config(folder / "experiment.yaml", overrides)
    prepare(config)
    return list(look(folder, *overrides, source="crowd", num=500).conversations)


def crowd_of(folder: Path, *chats: tuple[int, ...]) -> None:
    """An experiment whose crowd says numbers of words in turn: user, assistant, user, ..."""
    write_experiment(folder)
    with (folder / "crowd.jsonl").open("w") as file:
        for chat in chats:
            turns = [{"from": ("human", "gpt")[n % 2], "value": " ".join(["cat"] * m)} for n, m in enumerate(chat)]
            file.write(json.dumps({"conversations": turns}) + "\n")


@pytest.mark.parametrize("overlong", ["truncate", "split"])
def test_uncut_data_says_so(folder: Path, overlong: str):
    endings = {c.ending for c in look_at(folder, f"data.overlong={overlong}", f"data.prepared_dir={folder}/{overlong}")}

    assert endings == {"ends with a whole reply; nothing of its source was cut off"}


def test_under_truncate_a_whole_reply_may_have_lost_what_followed_and_the_number_cut_is_said(tmp_path: Path):
    crowd_of(tmp_path, (1, 1), (1, 1, 90, 1), (1, 90))
    short, longer, cut = look_at(tmp_path, "model.max_length=40")

    assert short.ending == longer.ending
    assert short.ending == (
        "ends with a whole reply; turns may be missing after it (2 of its source were cut at model.max_length = 40)"
    )
    assert (cut.ending, cut.cut) == ("cut inside a reply, at model.max_length = 40 tokens", True)


def test_under_split_a_part_says_which_it_is_and_a_whole_conversation_does_not(tmp_path: Path):
    crowd_of(tmp_path, (1, 1), (1, 20, 1, 20, 1, 20))
    whole, *parts = look_at(tmp_path, "model.max_length=40", "data.overlong=split")

    assert whole.ending == "ends with a whole reply; nothing of its source was cut off"
    assert [part.ending for part in parts] == [
        f"part {n} of 3 of its conversation, cut between turns; {whole.ending}" for n in (1, 2, 3)
    ]
    assert not any(part.cut for part in parts)


def test_under_split_a_part_that_is_too_long_by_itself_is_cut_and_the_others_may_lack_one(tmp_path: Path):
    crowd_of(tmp_path, (1, 20, 1, 90, 90, 1, 1, 20))
    first, cut, last = look_at(tmp_path, "model.max_length=40", "data.overlong=split")

    assert cut.ending == (
        "part 2 of 3 of its conversation, cut between turns; cut inside a reply, at model.max_length = 40 tokens"
    )
    assert [part.cut for part in (first, cut, last)] == [False, True, False]
    assert last.ending == (
        "part 3 of 3 of its conversation, cut between turns; ends with a whole reply; "
        "turns may be missing after it (1 of its source were cut at model.max_length = 40)"
    )


def test_under_drop_nothing_is_cut_and_the_number_left_out_is_said(tmp_path: Path):
    crowd_of(tmp_path, (1, 1), (1, 90), (1, 90), (1, 2))
    shown = look_at(tmp_path, "model.max_length=40", "data.overlong=drop")

    assert len(shown) == 2
    assert {c.ending for c in shown} == {
        "ends with a whole reply; over-long conversations are left out, never cut (2 of its source)"
    }


# --- the condition


@pytest.mark.parametrize(("template", "shown"), [("openchat-3.6", "GPT4"), ("chatml", None)])
def test_the_condition_is_the_one_in_the_tokens_and_a_template_that_writes_none_shows_none(
    tmp_path: Path, template: str, shown: str | None
):
    path = write_experiment(tmp_path, model={"template": template, "tokenizer_name_or_path": str(LLAMA)})
    with (tmp_path / "expert.jsonl").open("w") as file:
        turns = [{"from": role, "value": "cat"} for role in ("system", "human", "gpt")]
        file.write(json.dumps({"conversations": turns}) + "\n")
    prepare(load_config(path))
    (conversation,) = look(tmp_path, source="expert").conversations

    assert conversation.condition == shown
    assert conversation.condition_text == (shown or "not written by this template")
    assert [turn.role for turn in conversation.turns] == ["system", "user", "assistant"]
    assert [turn.condition for turn in conversation.turns] == [None, shown, shown]


# --- colours and weights


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
