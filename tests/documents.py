"""Rows by hand: documents as people write them, end to end as `collate` takes them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ochat.data.batch import PackedBatch, collate


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    input_ids: Sequence[int]
    token_weights: Sequence[float]
    source_id: int = 0


def pack(documents: Sequence[Document]) -> PackedBatch:
    return collate(
        np.array([i for d in documents for i in d.input_ids], np.int32),
        np.array([w for d in documents for w in d.token_weights], np.float32),
        np.array([len(d.input_ids) for d in documents], np.int32),
        np.array([d.source_id for d in documents], np.int32),
    )
