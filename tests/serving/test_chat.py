"""An exported folder answers: through plain transformers, through ochat, and on the command line."""

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from ochat.checkpoint import CheckpointCard
from ochat.data.conversation import Conversation, Message
from ochat.data.prepare import prepare
from ochat.data.tokenize import ChatTokenizer, load_tokenizer
from ochat.errors import CheckpointError, OchatError
from ochat.serving.chat import Chat, Sampling, load_chat
from ochat.training.trainer import train
from tests.experiment import make_experiment
from tests.launch import run

SHORT = Sampling(max_new_tokens=8)


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with large random weights: it babbles, differently after every prompt, so equal answers say much."""
    config = make_experiment(
        tmp_path_factory.mktemp("chat"), "engine.type=torch", "training.max_steps=1", "optimizer.learning_rate=1e-9",
        "model.config_overrides={initializer_range: 0.5}",
    )  # fmt: skip
    prepare(config)
    return train(config)


@pytest.fixture(scope="module")
def chat(export: Path) -> Chat:
    return load_chat(export)


QUESTIONS = ("the cat", "12 red birds fly over the old walls", "a")


def test_answers_are_words_that_depend_on_question_and_condition(chat: Chat):
    """What makes the equalities below worth something."""
    answers = {(q, c): chat.reply([user(q)], condition=c, sampling=SHORT) for q in QUESTIONS for c in ("GPT4", "GPT3")}

    assert all(len(answer) > 3 for answer in answers.values())
    assert len(set(answers.values())) == 6


def user(text: str) -> Message:
    return Message(role="user", content=text)


@pytest.mark.parametrize("loader", [PreTrainedTokenizerFast, AutoTokenizer], ids=["fast", "auto"])
@pytest.mark.parametrize("condition", ["GPT4", "GPT3", None])
def test_the_exported_template_makes_the_prompt_ids_of_training(export: Path, loader, condition):
    card = CheckpointCard.read(export)
    ours = ChatTokenizer(load_tokenizer(str(export), card.inference_template()), card.inference_template())
    tokenizer = loader.from_pretrained(export)
    arguments = {} if condition is None else {"condition": condition}

    theirs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "the cat  sat"}], add_generation_prompt=True, return_dict=False, **arguments
    )

    assert theirs == ours.prompt_ids(Conversation(messages=(user("the cat  sat"),), condition=condition or "GPT4"))
    assert theirs != ours.prompt_ids(Conversation(messages=(user("the cat  sat"),), condition="Code"))


def test_plain_transformers_generates_the_same_answer(export: Path, chat: Chat):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(export)
    model = AutoModelForCausalLM.from_pretrained(export)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "the cat"}], add_generation_prompt=True, return_tensors="pt", condition="GPT3"
    )
    output = model.generate(**ids, max_new_tokens=8, do_sample=False)
    plain = tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).strip()

    assert chat.reply([user("the cat")], condition="GPT3", sampling=SHORT) == plain


def test_the_export_is_as_gguf_and_servers_need_it(export: Path):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(export)
    model = AutoModelForCausalLM.from_pretrained(export)

    assert model.config.vocab_size == len(tokenizer)
    assert tokenizer.eos_token == "<|end_of_turn|>"
    assert model.generation_config.eos_token_id == model.config.eos_token_id == tokenizer.eos_token_id
    assert (export / "chat_template.jinja").is_file()


def test_who_may_read_the_card_may_read_the_weights(export: Path):
    modes = {file.name: file.stat().st_mode & 0o777 for file in export.iterdir()}

    assert modes["model.safetensors"] == modes["ochat.json"]


def test_answers_in_a_batch_are_those_given_alone(chat: Chat):
    conversations = [Conversation(messages=(user(q),), condition="GPT4") for q in QUESTIONS]

    together = chat.reply_batch(conversations, sampling=SHORT)

    assert together == [chat.reply([user(q)], condition="GPT4", sampling=SHORT) for q in QUESTIONS]


def test_no_condition_is_the_models_default_one(chat: Chat):
    assert chat.reply([user("the cat")], sampling=SHORT) == chat.reply(
        [user("the cat")], condition="GPT4", sampling=SHORT
    )


def test_sampling_follows_its_seed_and_temperature(chat: Chat):
    def drawn(seed: int, temperature: float = 1.0) -> str:
        sampling = Sampling(max_new_tokens=8, temperature=temperature, seed=seed)
        return chat.reply([user("the cat")], sampling=sampling)

    assert drawn(1) == drawn(1)
    assert len({drawn(seed) for seed in range(5)}) > 1
    assert {drawn(seed, temperature=0.0) for seed in range(5)} == {chat.reply([user("the cat")], sampling=SHORT)}


def test_an_answer_ends_where_the_context_does(chat: Chat):
    question = "cat " * 90
    prompt = chat._chat_tokenizer.prompt_ids(Conversation(messages=(user(question),), condition="GPT4"))
    room = chat.card.max_length - len(prompt)
    assert 8 < room < Sampling().max_new_tokens

    # With the room as the limit the answer is the same, with one token less it is shorter.
    assert chat.reply([user(question)]) == chat.reply([user(question)], sampling=Sampling(max_new_tokens=room))
    assert chat.reply([user(question)]) != chat.reply([user(question)], sampling=Sampling(max_new_tokens=room - 2))


def test_a_condition_is_stripped_as_in_training(chat: Chat):
    assert chat.reply([user("a")], condition=" GPT3 ", sampling=SHORT) == chat.reply(
        [user("a")], condition="GPT3", sampling=SHORT
    )


def test_a_conversation_beyond_the_context_is_refused_with_its_length(chat: Chat):
    with pytest.raises(OchatError, match=r"the conversation has \d+ tokens, the model's limit is 128"):
        chat.reply([user("cat " * 200)])


def test_a_folder_without_a_card_is_not_an_ochat_model(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"ochat.json is missing"):
        load_chat(tmp_path)


def test_the_command_answers_one_message(export: Path):
    done = run("ochat", "chat", export.parent, "--message", "the cat", "--condition", "GPT3", "--max-new-tokens", 8)

    assert done.returncode == 0, done.stderr
    expected = load_chat(export).reply([user("the cat")], condition="GPT3", sampling=SHORT)
    assert done.stdout.strip() == expected


def test_the_command_refuses_a_folder_that_is_not_there():
    done = run("ochat", "chat", "runs/nothing-here")

    assert done.returncode == 2
    assert done.stderr.strip() == (
        "error: runs/nothing-here: no such folder. Give a run folder or its export, such as runs/NAME/export."
    )
