"""A run of records becomes rows of the prepared dataset, and the counts of what happened to them."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import numpy as np
import pyarrow as pa

from ochat.config import SourceConfig
from ochat.data.conversation import parse_conversation
from ochat.data.records import Record, parse_line
from ochat.data.replies import reply_starts
from ochat.data.store import SCHEMA
from ochat.data.tokenize import ChatTokenizer, TokenizedConversation
from ochat.errors import DataError, TemplateError


@dataclass(slots=True, kw_only=True)
class Counts:
    """What became of a source's conversations. Sums; filled while preparing.

    truncated             kept, but cut to model.max_length
    dropped_unsupervised  nothing with a weight in them, before or after the cut
    cut_tokens            tokens beyond model.max_length
    trimmed_tokens        context after the last supervised token, which no gradient reaches
    conditions            conversations kept, under each condition
    """

    read: int = 0
    kept: int = 0
    truncated: int = 0
    dropped_unsupervised: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    cut_tokens: int = 0
    trimmed_tokens: int = 0
    weight_sum: float = 0.0
    conditions: dict[str, int] = field(default_factory=dict)

    def add(self, other: "Counts") -> None:
        for f in fields(self):
            if f.name != "conditions":
                setattr(self, f.name, getattr(self, f.name) + getattr(other, f.name))
        for condition, number in other.conditions.items():
            self.conditions[condition] = self.conditions.get(condition, 0) + number


def build_items(
    records: Sequence[Record], source: SourceConfig, *, source_id: int, tokenizer: ChatTokenizer, max_length: int
) -> tuple[pa.RecordBatch, Counts]:
    """Parse, tokenise and cut a run of records; the batch holds those kept, in order."""
    conversations = []
    for record in records:
        where = f"{source.path}:{record.number}"
        row = parse_line(record.row, where) if isinstance(record.row, bytes) else record.row
        conversation = parse_conversation(row, source, where)
        try:
            tokenizer.check_condition(conversation.condition)
        except TemplateError as exc:
            raise DataError(f"{where}: {exc}") from exc
        conversations.append(conversation)
    tokenized = tokenizer.tokenize(conversations)
    counts = Counts(read=len(records))
    kept, lines, rewards, conditions = [], [], [], []
    for record, conversation, item in zip(records, conversations, tokenized, strict=True):
        cut = truncate(item, max_length)
        if cut is None:
            counts.dropped_unsupervised += 1
            continue
        kept.append(cut)
        lines.append(record.number)
        rewards.append(conversation.reward)
        beyond = max(0, len(item.input_ids) - max_length)
        counts.truncated += beyond > 0
        counts.cut_tokens += beyond
        conditions.append(conversation.condition)
        counts.trimmed_tokens += len(item.input_ids) - beyond - len(cut.input_ids)
    batch = record_batch(kept, source_id, lines, rewards)
    counts.kept = len(kept)
    counts.tokens = sum(len(item.input_ids) for item in kept)
    counts.supervised_tokens = sum(batch.column("num_supervised").to_pylist())
    counts.conditions = dict(Counter(conditions))
    counts.weight_sum = sum(batch.column("weight_sum").to_pylist())
    return batch, counts


def truncate(item: TokenizedConversation, max_length: int) -> TokenizedConversation | None:
    """Cut to max_length tokens and to the last supervised one; None when none is left.

    The first token is never predicted, so a weight there supervises nothing.
    """
    supervised = np.flatnonzero(item.token_weights[1:max_length])
    if len(supervised) == 0:
        return None
    end = int(supervised[-1]) + 2
    return TokenizedConversation(input_ids=item.input_ids[:end], token_weights=item.token_weights[:end])


def record_batch(
    items: Sequence[TokenizedConversation], source_id: int, lines: Sequence[int], rewards: Sequence[float | None]
) -> pa.RecordBatch:
    starts = [reply_starts(item.token_weights) for item in items]
    offsets = np.cumsum([0] + [len(item.input_ids) for item in items], dtype=np.int32)
    ids = np.concatenate([item.input_ids for item in items]) if items else np.zeros(0, np.int32)
    weights = np.concatenate([item.token_weights for item in items]) if items else np.zeros(0, np.float32)
    columns = {
        "input_ids": pa.ListArray.from_arrays(pa.array(offsets), pa.array(ids)),
        "token_weights": pa.ListArray.from_arrays(pa.array(offsets), pa.array(weights)),
        "source_id": [source_id] * len(items),
        "line": lines,
        "weight_sum": [float(item.token_weights.sum(dtype=np.float64)) for item in items],
        "num_supervised": [int(np.count_nonzero(item.token_weights)) for item in items],
        "num_replies": [len(s) for s in starts],
        "reply_weight_sum": [
            float(item.token_weights[s].sum(dtype=np.float64)) for item, s in zip(items, starts, strict=True)
        ],
        "reward": rewards,
    }
    arrays = [pa.array(column, SCHEMA.field(name).type) for name, column in columns.items()]
    return pa.RecordBatch.from_arrays(arrays, schema=SCHEMA)
