"""The demo's corpus and base model: the claims its documentation makes."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from ochat.data.template import get_template
from scripts.sums.base import write_base_model
from scripts.sums.corpus import (
    Corpus,
    Sum,
    SumsConfig,
    careless_answer,
    correct_answer,
    is_correct,
    needs_carry,
    parse_answer,
    question,
    read_texts,
    write_corpus,
)
from scripts.sums.curve import draw_loss_curve

EXAMPLE = Sum(a=347, b=586)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return write_corpus(tmp_path_factory.mktemp("sums"), SumsConfig(num_conversations=1000))


def chats(path: Path) -> list[tuple[str, str]]:
    rows = [json.loads(line)["conversations"] for line in path.read_text().splitlines()]
    assert all([m["from"] for m in row] == ["human", "gpt"] for row in rows)
    return [(row[0]["value"], row[1]["value"]) for row in rows]


def asked(text: str) -> Sum:
    a, b = text.removeprefix("What is ").removesuffix("?").split(" + ")
    return Sum(a=int(a), b=int(b))


def test_the_example_of_the_documentation():
    assert question(EXAMPLE) == "What is 347 + 586?"
    assert correct_answer(EXAMPLE) == "ones 3, tens 3, hundreds 9"
    assert careless_answer(EXAMPLE) == "ones 3, tens 2, hundreds 8"
    assert parse_answer("ones 3, tens 3, hundreds 9") == "933"


@given(st.integers(100, 999), st.integers(100, 999))
def test_an_answer_is_exact_or_it_is_wrong(a: int, b: int):
    problem = Sum(a=a, b=b)

    assert is_correct(problem, correct_answer(problem))
    assert is_correct(problem, careless_answer(problem)) == (not needs_carry(problem))
    assert not is_correct(problem, correct_answer(Sum(a=a, b=b + 1)))
    assert not is_correct(problem, str(a + b))


def test_the_expert_is_always_right_and_one_in_ten(corpus: Corpus):
    answered = chats(corpus.expert)

    assert len(answered) == corpus.num_expert == 100
    assert all(is_correct(asked(q), a) for q, a in answered)


def test_sixty_per_cent_of_the_other_source_forget_to_carry(corpus: Corpus):
    answered = chats(corpus.suboptimal)
    wrong = [(q, a) for q, a in answered if not is_correct(asked(q), a)]

    assert len(answered) == 900
    assert len(wrong) == 540
    assert all(a == careless_answer(asked(q)) for q, a in wrong)


def test_held_out_sums_are_never_asked_either_way_round(corpus: Corpus):
    seen = {frozenset((asked(q).a, asked(q).b)) for path in (corpus.expert, corpus.suboptimal) for q, _ in chats(path)}

    assert len({frozenset((p.a, p.b)) for p in corpus.held_out}) == 200
    assert not seen & {frozenset((p.a, p.b)) for p in corpus.held_out}


def test_a_seed_fixes_every_byte(corpus: Corpus, tmp_path: Path):
    same = write_corpus(tmp_path / "same", SumsConfig(num_conversations=1000))
    other = write_corpus(tmp_path / "other", SumsConfig(num_conversations=1000, seed=1))

    assert same.suboptimal.read_bytes() == corpus.suboptimal.read_bytes()
    assert other.suboptimal.read_bytes() != corpus.suboptimal.read_bytes()


def test_the_base_tokenizer_keeps_digits_single_and_template_words_short(corpus: Corpus, tmp_path: Path):
    config = write_base_model(tmp_path, [*read_texts(corpus.expert), *read_texts(corpus.suboptimal)])
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path)

    assert config.vocab_size == len(tokenizer)
    assert [t for t in tokenizer.tokenize("9876543210") if len(t) > 1] == []
    assert len(tokenizer.tokenize("9876543210")) == 10
    assert all(len(tokenizer.tokenize(word)) <= 2 for word in ("GPT4", "GPT3", "User", "Assistant"))
    assert tokenizer.convert_tokens_to_ids(get_template("openchat-3.5").end_of_turn) != tokenizer.unk_token_id
    anything = "né 漢字 \U0001f642 <|end_of_turn|>\n\t"
    assert tokenizer.decode(tokenizer(anything, split_special_tokens=True)["input_ids"]) == anything


def test_the_curve_is_a_picture(tmp_path: Path):
    lines = [{"train/global_step": i, "train/loss": 3 / i, "train/loss/expert": 2 / i} for i in range(1, 50)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    draw_loss_curve(tmp_path / "metrics.jsonl", tmp_path / "loss.png")

    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
