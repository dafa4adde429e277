"""One packed row as tensors. The only place that shifts labels.

    documents of 3 and 2 tokens -> position_ids 0 1 2 0 1, cu_seqlens 0 3 5
    labels[t] = input_ids[t + 1] inside a document; -100 at its last token, and wherever the next token has weight 0

T tokens of the row, S documents in it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

IGNORE_INDEX = -100


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """input_ids int [n], token_weights float [n] (source's weight included), source_id."""

    input_ids: NDArray[np.integer]
    token_weights: NDArray[np.floating]
    source_id: int


# What a row without documents holds, so that its rank still runs forward and backward. Weight 0: it teaches nothing.
PADDING = Document(input_ids=np.zeros(2, np.int32), token_weights=np.zeros(2, np.float32), source_id=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedBatch:
    """A micro-batch: one row of documents that do not see each other."""

    input_ids: Tensor  # int64 [T]
    position_ids: Tensor  # int64 [T], restart per document
    labels: Tensor  # int64 [T], already shifted, IGNORE_INDEX = none
    loss_weights: Tensor  # float32 [T], weight of predicting labels[t]
    cu_seqlens: Tensor  # int32 [S + 1]
    source_ids: Tensor  # int32 [S]
    max_seqlen: int

    def to(self, device: torch.device) -> Self:
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "max_seqlen"}
        moved = {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}
        return type(self)(**moved, max_seqlen=self.max_seqlen)


def collate(documents: Sequence[Document]) -> PackedBatch:
    """Join documents into one row; no documents make a row of padding."""
    documents = documents or (PADDING,)
    lengths = np.array([len(d.input_ids) for d in documents])
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths)])
    ids = np.concatenate([d.input_ids for d in documents]).astype(np.int64)
    weights = np.concatenate([d.token_weights for d in documents]).astype(np.float32)
    weights[cu_seqlens[:-1]] = 0.0  # a document's first token follows nothing; its weight must not wrap around
    loss_weights = np.roll(weights, -1)
    labels = np.where(loss_weights != 0, np.roll(ids, -1), IGNORE_INDEX)
    return PackedBatch(
        input_ids=torch.from_numpy(ids),
        position_ids=torch.from_numpy(np.arange(len(ids)) - np.repeat(cu_seqlens[:-1], lengths)),
        labels=torch.from_numpy(labels),
        loss_weights=torch.from_numpy(loss_weights),
        cu_seqlens=torch.from_numpy(cu_seqlens.astype(np.int32)),
        source_ids=torch.tensor([d.source_id for d in documents], dtype=torch.int32),
        max_seqlen=int(lengths.max()),
    )
