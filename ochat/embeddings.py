"""Rows of embedding matrices for control tokens: new ones begin as the mean of the trained, untrained ones too.

A base may hold rows that no gradient ever reached, such as Llama 3's reserved tokens: (near) zero, or all alike. A
control token on such a row trains badly, and its row spoils the mean. `study_rows` looks at one matrix, `write_rows`
mends it; both are used on a loaded model (model.py) and on a checkpoint's files (add_tokens.py).

V rows, D hidden size
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ochat.errors import CheckpointError

log = logging.getLogger(__name__)

# An untrained row is far below the median norm, or has at least two exact doubles. One double alone may be a copy of a
# trained row that somebody made on purpose.
UNTRAINED_NORM = 0.01
NUM_ALIKE = 3
CHUNK_ROWS = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class RowStudy:
    """What is known of one matrix before it is written to.

    mean           float32 [D]   of the trained rows, what a row without training begins as
    num_trained    rows in that mean
    num_untrained  rows left out of it
    repaired       ids of control tokens whose row is untrained
    """

    mean: Tensor
    num_trained: int
    num_untrained: int
    repaired: tuple[int, ...]

    def summary(self) -> str:
        text = f"mean of {self.num_trained} trained rows for what is new ({self.num_untrained} untrained left out)"
        return f"{text}; repaired the untrained rows of ids {list(self.repaired)}" if self.repaired else text


def study_rows(weight: Tensor, num_tokens: int, control_ids: Sequence[int]) -> RowStudy:
    """Tell trained rows from untrained ones among the first num_tokens of weight [V, D].

    Sums run in float32 whatever dtype the matrix has, CHUNK_ROWS rows at a time: no float32 copy of it is made.
    """
    rows = weight[:num_tokens]
    untrained = untrained_rows(rows)
    num_untrained = int(untrained.sum())
    total = torch.zeros(weight.shape[1], dtype=torch.float32)
    for part, left_out in zip(rows.split(CHUNK_ROWS), untrained.split(CHUNK_ROWS), strict=True):
        total += part[~left_out].float().sum(dim=0)
    if not total.isfinite().all():
        raise CheckpointError(
            "an embedding matrix of the base holds numbers that are not finite; no row could be begun as the mean. "
            "Download the base again."
        )
    repaired = tuple(i for i in sorted(control_ids) if i < len(rows) and untrained[i])
    num_trained = len(rows) - num_untrained
    return RowStudy(mean=total / num_trained, num_trained=num_trained, num_untrained=num_untrained, repaired=repaired)


def untrained_rows(weight: Tensor) -> Tensor:
    """bool [V]: rows of (near) zero norm, and rows with at least two exact doubles.

    A matrix without any trained row gives all False: there is nothing to learn a mean from but itself.
    """
    norms = torch.cat([part.float().norm(dim=1) for part in weight.split(CHUNK_ROWS)])
    keys = torch.cat([_row_keys(part) for part in weight.split(CHUNK_ROWS)])
    _, row_of, num_alike = keys.unique(return_inverse=True, return_counts=True)
    untrained = (norms <= UNTRAINED_NORM * norms.median()) | (num_alike[row_of] >= NUM_ALIKE)
    return torch.zeros_like(untrained) if untrained.all() else untrained


def _row_keys(rows: Tensor) -> Tensor:
    """int64 [rows]: equal for rows of equal bits, whatever the order of the sum; for others as good as never."""
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(-(2**62), 2**62, (rows.shape[1],), generator=generator)
    bits = rows.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[rows.element_size()])
    return (bits * factors).sum(dim=1)


def write_rows(weight: Tensor, study: RowStudy, *, num_old: int) -> None:
    """Set the rows from num_old on, and those to be repaired, to the mean. No other row is touched."""
    mean = study.mean.to(weight.dtype)
    weight[num_old:] = mean
    weight[list(study.repaired)] = mean


def fit_vocabulary(model: PreTrainedModel, num_tokens: int, control_ids: Sequence[int]) -> None:
    """Make the embeddings as long as the tokenizer, and give every control token a row that can be trained."""
    num_old = model.config.vocab_size
    with torch.no_grad():
        studies = {name: study_rows(weight, num_tokens, control_ids) for name, weight in _matrices(model).items()}
        if num_old != num_tokens:
            model.resize_token_embeddings(num_tokens, mean_resizing=False)
            log.info("vocabulary: %d -> %d tokens, as the tokenizer has", num_old, num_tokens)
        for name, weight in _matrices(model).items():
            write_rows(weight, studies[name], num_old=num_old)
            log.info("%s: %s", name, studies[name].summary())


def _matrices(model: PreTrainedModel) -> dict[str, Tensor]:
    """The embeddings [V, D] by name; one where input and output are tied."""
    embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    if head is embeddings:
        return {"tied embeddings": head}
    return {"input embeddings": embeddings, "output embeddings": head}
