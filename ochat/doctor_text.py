"""The doctor's checks of the text: tokenizer, template, chat files, prepared dataset. Facts in, findings out."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from transformers import AutoConfig, PreTrainedTokenizerFast

from ochat.config import SourceConfig
from ochat.data.conversation import Conversation, Message
from ochat.data.items import NO_REPLY, PROMPT_FILLS
from ochat.data.store import TRAIN_SPLIT, PreparedSplit, check_replaceable
from ochat.data.template import to_jinja
from ochat.data.tokenize import ChatTokenizer, adds_dummy_prefix
from ochat.data.weights import weight_sums
from ochat.doctor_facts import Facts, Finding, Sample, unchecked
from ochat.errors import DataError, OchatError, TemplateError

# Texts that a single string can carry: no control strings, and nothing at the start that merges with a prefix.
PROBES: tuple[tuple[tuple[str, str], ...], ...] = (
    (("user", "Hi"), ("assistant", "Hello! How can I help?")),
    (("user", "2 + 2 = ?"), ("assistant", "4"), ("user", "And 12 * 34?"), ("assistant", "408.")),
    (("user", "Write a loop."), ("assistant", "```python\nfor i in range(3):\n    print(i)\n```\n")),
    (("user", "Grüße, 你好, مرحبا 🙂"), ("assistant", "it's {{ x }} \\ 'quoted' \"twice\"  and spaced  ")),
    (("system", "You are terse."), ("user", "Why?"), ("assistant", "Because.")),
)


def check_tokenizer(facts: Facts) -> Finding:
    name = "tokenizer"
    for found in (facts.template, facts.tokenizer, facts.chat_tokenizer):
        if isinstance(found, OchatError):
            fix = (
                "Give a tokenizer that fits model.template as model.tokenizer_name_or_path: without network, a folder."
            )
            return Finding(name=name, status="fail", found=str(found), fix=fix)
    assert not isinstance(facts.template, OchatError)
    assert not isinstance(facts.tokenizer, OchatError)
    ids = facts.tokenizer.convert_tokens_to_ids(list(facts.template.control_tokens))
    tokens = ", ".join(f"{token} = {i}" for token, i in zip(facts.template.control_tokens, ids, strict=True))
    found_text = f"{len(facts.tokenizer):,} tokens; template {facts.template.name}: single control ids {tokens}"
    return Finding(name=name, status="ok", found=found_text)


def check_embeddings(facts: Facts) -> Finding:
    name = "embeddings"
    if isinstance(facts.model, OchatError) or isinstance(facts.tokenizer, OchatError):
        return unchecked(name, "the base model's shape or the tokenizer")
    base = AutoConfig.from_pretrained(facts.config.model.name_or_path, local_files_only=True).vocab_size
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
    """The generated chat template gives the training ids of PROBES, under every condition in use."""
    name = "chat template"
    if isinstance(facts.chat_tokenizer, OchatError) or isinstance(facts.tokenizer, OchatError):
        return unchecked(name, "tokenizer and template")
    tokenizer, template = facts.chat_tokenizer, facts.chat_tokenizer.template
    jinja = to_jinja(template, dummy_prefix=adds_dummy_prefix(facts.tokenizer))
    chats = [chat for chat in PROBES if all(role in template.prefixes for role, _ in chat)]
    conditions = {source.condition.strip() or template.default_condition for source in facts.config.data.sources}
    try:
        differing = [
            (chat, condition)
            for condition in sorted({*conditions, template.default_condition})
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
    return Finding(name=name, status="ok", found=f"{found}; contents free of control strings and leading whitespace")


def jinja_ids(
    tokenizer: PreTrainedTokenizerFast, jinja: str, chat: Sequence[tuple[str, str]], condition: str
) -> list[int]:
    messages = [{"role": role, "content": content} for role, content in chat]
    encoded = tokenizer.apply_chat_template(
        messages, chat_template=jinja, tokenize=True, return_dict=True, condition=condition
    )
    return list(encoded["input_ids"])


def _training_ids(tokenizer: ChatTokenizer, chat: Sequence[tuple[str, str]], condition: str = "") -> list[int]:
    messages = tuple(Message(role=role, content=content) for role, content in chat)  # type: ignore[arg-type]
    ids: list[int] = tokenizer.tokenize([Conversation(messages=messages, condition=condition)])[0].input_ids.tolist()
    return ids


def check_injection(facts: Facts) -> Finding:
    """No added token's text, typed into a message, becomes a control id."""
    name = "injection"
    if isinstance(facts.chat_tokenizer, OchatError) or isinstance(facts.tokenizer, OchatError):
        return unchecked(name, "tokenizer and template")
    control = facts.tokenizer.added_tokens_decoder
    leaks = injected_tokens(facts.chat_tokenizer, {token.content: i for i, token in control.items()})
    if leaks:
        return Finding(
            name=name, status="fail",
            found=f"typed into a message, {len(leaks)} of {len(control)} added tokens become control ids: "
            f"{', '.join(leaks[:5])}",
            fix="Mark them special in tokenizer.json ('special': true), or use the base model's own tokenizer.",
        )  # fmt: skip
    return Finding(
        name=name, status="ok", found=f"none of {len(control)} added tokens can be typed: all stay plain pieces"
    )


def injected_tokens(tokenizer: ChatTokenizer, control: dict[str, int]) -> list[str]:
    """Those texts that, alone or between words, leave a control id that plain content would not."""
    expected = _num_control(tokenizer, "a", control)
    return [
        text
        for text in control
        if any(_num_control(tokenizer, typed, control) != expected for typed in (text, f"a {text} b", text + text))
    ]


def _num_control(tokenizer: ChatTokenizer, content: str, control: dict[str, int]) -> int:
    ids = _training_ids(tokenizer, (("user", content), ("assistant", content)))
    return len(set(control.values()) & set(ids)) + sum(i in control.values() for i in ids)


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
        trained, where = sum(map(_num_trained(end), samples)), "the sample"
    if not trained:
        return Finding(
            name=name, status="fail",
            found=f"no end-of-turn (id {end}) has a weight in {where}: the model would never learn to stop",
            fix="Raise model.max_length: replies are cut before they end.",
        )  # fmt: skip
    return Finding(name=name, status="ok", found=f"id {end} is trained {trained:,} times in {where}")


def _num_trained(token: int) -> Callable[[Sample], int]:
    def count(sample: Sample) -> int:
        ids = sample.batch.column("input_ids").flatten().to_numpy()
        weights = sample.batch.column("token_weights").flatten().to_numpy()
        return int(np.count_nonzero((ids == token) & (weights > 0)))

    return count


def check_conditions(facts: Facts) -> Finding:
    """Conditions are plain text, and tell sources of different worth apart."""
    name = "conditions"
    if isinstance(facts.chat_tokenizer, OchatError):
        return unchecked(name, "tokenizer and template")
    sources = facts.config.data.sources
    used = {source.name: _conditions_in_use(facts, source) for source in sources}
    for condition in sorted({condition for found in used.values() for condition in found}):
        try:
            facts.chat_tokenizer.check_condition(condition)
        except TemplateError as exc:
            return Finding(name=name, status="fail", found=str(exc), fix="Rename it in data.sources or in the rows.")
    shown = "; ".join(f"{source}: {', '.join(found) or 'none'}" for source, found in used.items())
    worth = {source.name: (source.weight, source.reward) for source in sources}
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


def _conditions_in_use(facts: Facts, source: SourceConfig) -> list[str]:
    if not isinstance(facts.manifest, OchatError):
        return sorted(facts.manifest.counts[source.name]["conditions"])
    sample = facts.samples[source.name]
    return sorted(sample.counts.conditions) if isinstance(sample, Sample) else [source.condition.strip()]


def check_sources(facts: Facts) -> Iterator[Finding]:
    """One finding per source: what its first conversations become."""
    for source in facts.config.data.sources:
        yield _check_source(facts, source, facts.samples[source.name])


def _check_source(facts: Facts, source: SourceConfig, sample: Sample | OchatError) -> Finding:
    name = f"data: {source.name}"
    if isinstance(facts.chat_tokenizer, OchatError) and Path(source.path).is_file():
        return unchecked(name, "tokenizer and template")
    if isinstance(sample, OchatError):
        if not isinstance(facts.manifest, OchatError) and not Path(source.path).is_file():
            found = f"{source.path} is not here; the prepared dataset is, and is trusted"
            return Finding(name=name, status="ok", found=found)
        path_error = sample if isinstance(sample, DataError) else f"{source.path}: no such file."
        return Finding(name=name, status="fail", found=str(path_error), fix=f"Mend data.sources ({source.name}).")
    counts = sample.counts
    share = counts.supervised_tokens / max(1, counts.tokens)
    about = "" if sample.exact else "about "
    full = f"{counts.dropped[PROMPT_FILLS]:,} whose prompt fills max_length, " if PROMPT_FILLS in counts.dropped else ""
    found = (
        f"{about}{sample.num_conversations:,} conversations; of the first {counts.read:,}: {counts.kept:,} kept, "
        f"{counts.dropped.get(NO_REPLY, 0):,} without a reply, "
        f"{full}{counts.truncated:,} cut, "
        f"{counts.tokens / max(1, counts.kept):,.0f} tokens each, {share:.1%} supervised"
    )
    if not counts.kept:
        fix = "Check the roles and weights in the file, and that replies begin within model.max_length."
        return Finding(name=name, status="fail", found=f"{found}: no supervised token", fix=fix)
    if source.weight == 0:
        fix = "Remove the source, or give it a weight."
        return Finding(name=name, status="warn", found=f"{found}; weight 0 teaches nothing", fix=fix)
    if counts.truncated > counts.kept / 10:
        fix = "Raise model.max_length if the tails matter."
        return Finding(name=name, status="warn", found=f"{found}: more than a tenth is cut", fix=fix)
    return Finding(name=name, status="ok", found=found)


def check_prepared_dataset(facts: Facts) -> Finding:
    name = "prepared dataset"
    if isinstance(facts.chat_tokenizer, OchatError):
        return unchecked(name, "tokenizer and template")
    if not isinstance(facts.manifest, OchatError):
        found = f"{facts.config.data.prepared_dir} is up to date ({facts.manifest.fingerprint[:12]})"
        return Finding(name=name, status="ok", found=found)
    try:
        check_replaceable(Path(facts.config.data.prepared_dir))
    except DataError as exc:
        return Finding(name=name, status="fail", found=str(exc), fix="Set data.prepared_dir to another folder.")
    return Finding(name=name, status="warn", found=str(facts.manifest), fix=f"Run: {facts.plan.prepare_command}")


def check_gradient_shares(facts: Facts) -> Finding:
    """Who will move the model: source weight x token weights, of all sources' total."""
    name = "gradient shares"
    if isinstance(facts.fresh, OchatError):
        return unchecked(name, "an up-to-date prepared dataset")
    split = PreparedSplit(Path(facts.config.data.prepared_dir) / TRAIN_SPLIT)
    weighted = weight_sums(facts.config, split)
    sources = facts.config.data.sources
    shares = np.bincount(split.column("source_id"), weighted, minlength=len(sources)) / weighted.sum()
    best = facts.fresh.loader.best_source()
    found = ", ".join(f"{source.name} {share:.1%}" for source, share in zip(sources, shares, strict=True))
    if shares[best] < shares.max():
        return Finding(
            name=name, status="warn", found=f"{found}: the best source, {sources[best].name}, does not lead",
            fix="Lower the weight of the others if the expert should decide.",
        )  # fmt: skip
    return Finding(name=name, status="ok", found=found)
