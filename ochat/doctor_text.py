"""The doctor's checks of the text: tokenizer and template. Facts in, findings out."""

from collections.abc import Sequence

import numpy as np
from transformers import AutoConfig, PreTrainedTokenizerFast

from ochat.config import SourceConfig
from ochat.data.conversation import Conversation, Message
from ochat.data.prepare import check_conditions as check_configured_conditions
from ochat.data.template import CONDITION, TEMPLATES, in_jinja_class, to_jinja
from ochat.data.tokenize import ChatTokenizer, adds_dummy_prefix
from ochat.doctor_facts import Facts, Finding, Sample, unchecked
from ochat.errors import ConfigError, OchatError, TemplateError
from ochat.hub_names import located

# Texts without control strings. Beginnings differ, because it is the beginning of a content that a prefix may run into:
# each template's class of contents (docs/templates.md) has at least one of these.
PROBES: tuple[tuple[tuple[str, str], ...], ...] = (
    (("user", "Hi"), ("assistant", "Hello! How can I help?")),
    (("user", "2 + 2 = ?"), ("assistant", "4"), ("user", "And 12 * 34?"), ("assistant", "408.")),
    (("user", "Write a loop."), ("assistant", "```python\nfor i in range(3):\n    print(i)\n```\n")),
    (("user", "Grüße, 你好, مرحبا 🙂"), ("assistant", "it's {{ x }} \\ 'quoted' \"twice\"  and spaced  ")),
    (("system", "You are terse."), ("user", "Why?"), ("assistant", "Because.")),
    (("user", "7 times 6?"), ("assistant", " It is 42."), ("user", "12"), ("assistant", "1\n2\n")),
    (("user", ""), ("assistant", "")),
)


def check_tokenizer(facts: Facts) -> Finding:
    name = "tokenizer"
    if isinstance(facts.template, OchatError):
        fix = f"Set model.template to one of {', '.join(TEMPLATES)}."
        return Finding(name=name, status="fail", found=str(facts.template), fix=fix)
    if isinstance(facts.tokenizer, OchatError) or isinstance(facts.chat_tokenizer, OchatError):
        error = facts.tokenizer if isinstance(facts.tokenizer, OchatError) else facts.chat_tokenizer
        fix = f"Set model.tokenizer_name_or_path to a folder with a tokenizer.json that fits {facts.template.name}."
        return Finding(name=name, status="fail", found=str(error), fix=fix)
    ids = facts.tokenizer.convert_tokens_to_ids(list(facts.template.control_tokens))
    tokens = ", ".join(f"{token} = {i}" for token, i in zip(facts.template.control_tokens, ids, strict=True))
    found_text = f"{len(facts.tokenizer):,} tokens; template {facts.template.name}: single control ids {tokens}"
    return Finding(name=name, status="ok", found=found_text)


def check_embeddings(facts: Facts) -> Finding:
    name = "embeddings"
    if isinstance(facts.model, OchatError) or isinstance(facts.tokenizer, OchatError):
        return unchecked(name, "the base model's shape or the tokenizer")
    base = AutoConfig.from_pretrained(located(facts.config.model.name_or_path), local_files_only=True).vocab_size
    old = int(facts.config.model.config_overrides.get("vocab_size", base))
    new = len(facts.tokenizer)
    if facts.config.model.init == "random":
        return Finding(name=name, status="ok", found=f"{new:,} rows, as the tokenizer has; all drawn at random")
    if new == old:
        return Finding(name=name, status="ok", found=f"{new:,} rows, as the tokenizer has; none are added")
    if new > old:
        added = f"{new - old:,} {'row is' if new - old == 1 else 'rows are'} added as the mean of the trained ones"
        return Finding(name=name, status="ok", found=f"model {old:,} rows, tokenizer {new:,} tokens: {added}")
    return Finding(
        name=name, status="warn", found=f"model {old:,} rows, tokenizer {new:,} tokens: {old - new:,} rows are cut off",
        fix="Padding rows may go; if the model has tokens that this tokenizer lacks, set model.tokenizer_name_or_path.",
    )  # fmt: skip


def check_jinja(facts: Facts) -> Finding:
    """The generated chat template gives the training ids of the PROBES in its class, under every condition in use."""
    name = "chat template"
    if isinstance(facts.chat_tokenizer, OchatError) or isinstance(facts.tokenizer, OchatError):
        return unchecked(name, "tokenizer and template")
    tokenizer, template = facts.chat_tokenizer, facts.chat_tokenizer.template
    dummy_prefix = adds_dummy_prefix(facts.tokenizer)
    jinja = to_jinja(template, dummy_prefix=dummy_prefix)
    written = [chat for chat in PROBES if all(role in template.prefixes for role, _ in chat)]
    chats = [chat for chat in written if in_jinja_class(template, _conversation(chat), dummy_prefix=dummy_prefix)]
    used = {condition for source in facts.config.data.sources for condition in conditions_in_use(facts, source)}
    conditions = {condition or template.default_condition for condition in used} | {template.default_condition}
    try:
        differing = [
            (chat, condition)
            for condition in sorted(conditions)
            for chat in chats
            if jinja_ids(facts.tokenizer, jinja, chat, condition) != _training_ids(tokenizer, chat, condition)
        ]
    except TemplateError as exc:
        return Finding(name=name, status="fail", found=str(exc), fix="Name the class with plain words.")
    if differing:
        (chat, condition), *_ = differing
        return Finding(
            name=name, status="fail",
            found=f"the generated Jinja differs from the training ids on {len(differing)} probes, first {chat!r} "
            f"under {condition!r}",
            fix="Use the tokenizer that the template is made for (model.tokenizer_name_or_path); `ochat chat` is exact "
            "in any case.",
        )  # fmt: skip
    found = f"generated Jinja = training ids on {len(chats)} probe conversations under {len(conditions)} condition(s)"
    outside = len(written) - len(chats)
    if outside:
        found += (
            f"; {outside} others are outside of the class that one string can carry with this tokenizer "
            f"(docs/templates.md): prompt with `ochat chat`, which is exact"
        )
    return Finding(name=name, status="ok", found=found)


def jinja_ids(
    tokenizer: PreTrainedTokenizerFast, jinja: str, chat: Sequence[tuple[str, str]], condition: str
) -> list[int]:
    messages = [{"role": role, "content": content} for role, content in chat]
    encoded = tokenizer.apply_chat_template(
        messages, chat_template=jinja, tokenize=True, return_dict=True, condition=condition
    )
    return list(encoded["input_ids"])


def _conversation(chat: Sequence[tuple[str, str]], condition: str = "") -> Conversation:
    messages = tuple(Message(role=role, content=content) for role, content in chat)  # type: ignore[arg-type]
    return Conversation(messages=messages, condition=condition)


def _training_ids(tokenizer: ChatTokenizer, chat: Sequence[tuple[str, str]], condition: str = "") -> list[int]:
    ids: list[int] = tokenizer.tokenize([_conversation(chat, condition)])[0].input_ids.tolist()
    return ids


def check_injection(facts: Facts) -> Finding:
    """No added token's text, typed into a message, becomes a control id. Added runs of white space are text."""
    name = "injection"
    if isinstance(facts.chat_tokenizer, OchatError) or isinstance(facts.tokenizer, OchatError):
        return unchecked(name, "tokenizer and template")
    added = {token.content: i for i, token in facts.tokenizer.added_tokens_decoder.items()}
    control = {text: i for text, i in added.items() if text.replace("\u2581", " ").strip()}
    leaks = injected_tokens(facts.chat_tokenizer, control)
    if leaks:
        return Finding(
            name=name, status="fail",
            found=f"typed into a message, {len(leaks)} of {len(control)} added tokens become control ids: "
            f"{', '.join(leaks[:5])}",
            fix="Use the base model's own tokenizer.json: in this one they are also ordinary pieces of text.",
        )  # fmt: skip
    return Finding(
        name=name, status="ok", found=f"none of {len(control)} added tokens can be typed: all stay plain pieces"
    )


def injected_tokens(tokenizer: ChatTokenizer, control: dict[str, int]) -> list[str]:
    """Those texts that, alone or between words, leave a control id that plain content would not."""
    ids = frozenset(control.values())
    expected = _num_control(tokenizer, "a", ids)
    return [
        text
        for text in control
        if any(_num_control(tokenizer, typed, ids) != expected for typed in (text, f"a {text} b", text + text))
    ]


def _num_control(tokenizer: ChatTokenizer, content: str, control: frozenset[int]) -> int:
    return sum(i in control for i in _training_ids(tokenizer, (("user", content), ("assistant", content))))


def check_end_of_turn(facts: Facts) -> Finding:
    """A reply that ends within max_length teaches the model to stop."""
    name = "end of turn"
    if isinstance(facts.chat_tokenizer, OchatError):
        return unchecked(name, "tokenizer and template")
    end = facts.chat_tokenizer.end_of_turn_ids[-1]
    samples = [sample for sample in facts.samples.values() if isinstance(sample, Sample) and sample.counts.kept]
    if not samples:
        probe = (Message(role="user", content="Hi"), Message(role="assistant", content="Hello", weight=1.0))
        item = facts.chat_tokenizer.tokenize([Conversation(messages=probe)])[0]
        trained, where = int(item.input_ids[-1] == end and item.token_weights[-1] > 0), "a probe conversation"
    else:
        trained, where = sum(_num_trained(sample, end) for sample in samples), "the sample"
    if not trained:
        return Finding(
            name=name, status="fail",
            found=f"no end-of-turn (id {end}) has a weight in {where}: the model would never learn to stop",
            fix=f"Raise model.max_length (now {facts.config.model.max_length}): every reply is cut before it ends.",
        )  # fmt: skip
    return Finding(name=name, status="ok", found=f"id {end} is trained {trained:,} times in {where}")


def _num_trained(sample: Sample, token: int) -> int:
    ids = sample.batch.column("input_ids").flatten().to_numpy()
    weights = sample.batch.column("token_weights").flatten().to_numpy()
    return int(np.count_nonzero((ids == token) & (weights > 0)))


def check_conditions(facts: Facts) -> Finding:
    """Conditions are plain text, and tell sources of different worth apart."""
    name = "conditions"
    if isinstance(facts.chat_tokenizer, OchatError):
        return unchecked(name, "tokenizer and template")
    sources = facts.config.data.sources
    try:
        check_configured_conditions(facts.config, facts.chat_tokenizer)
    except ConfigError as exc:
        return Finding(name=name, status="fail", found=str(exc), fix="Rename it there.")
    used = {source.name: conditions_in_use(facts, source) for source in sources}
    for condition in sorted({condition for found in used.values() for condition in found}):
        try:
            facts.chat_tokenizer.check_condition(condition)
        except TemplateError as exc:
            return Finding(name=name, status="fail", found=str(exc), fix="Rename it in data.sources or in the rows.")
    shown = "; ".join(f"{source}: {', '.join(found) or 'none'}" for source, found in used.items())
    worth = {source.name: (source.weight, source.reward) for source in sources}
    template = facts.chat_tokenizer.template
    if not any(CONDITION in text for text in template.prefixes.values()):
        if len(set(worth.values())) == 1 and not any(condition for found in used.values() for condition in found):
            return Finding(name=name, status="ok", found=f"none, as template {template.name} has it")
        writing = [t.name for t in TEMPLATES.values() if any(CONDITION in text for text in t.prefixes.values())]
        return Finding(
            name=name, status="warn",
            found=f"template {template.name} writes no condition ({shown}): the model cannot tell sources apart",
            fix=f"Set model.template to one that does ({', '.join(writing)}), if it should.",
        )  # fmt: skip
    shared = [
        (a, b) for a in used for b in used if a < b and set(used[a]) & set(used[b]) and worth[a] != worth[b]
    ]  # fmt: skip
    if shared:
        return Finding(
            name=name, status="warn",
            found=f"{shown}. Sources {' and '.join(shared[0])} weigh differently under one condition: the model cannot "
            f"tell them apart",
            fix="Give each class of data its own data.sources.*.condition.",
        )  # fmt: skip
    return Finding(name=name, status="ok", found=f"plain text, by source: {shown}")


def conditions_in_use(facts: Facts, source: SourceConfig) -> list[str]:
    if not isinstance(facts.manifest, OchatError):
        return sorted(facts.manifest.counts[source.name]["conditions"])
    sample = facts.samples[source.name]
    return sorted(sample.counts.conditions) if isinstance(sample, Sample) else [source.condition.strip()]
