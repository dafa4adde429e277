"""Lengths of conversations that packing is measured on, from ../shared.

length_sets   the three of the scoreboard
real_lengths  seven open data sets as Mistral's tokenizer and OpenChat's template make them
"""

import json
import math

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from scripts.bench.peers import SHARED

FULL_STEPS = 20  # the fewest that a figure is taken from
MISTRAL_TOKENS = 0  # the column of a lengths file


def length_sets() -> dict[str, NDArray[np.int32]]:
    """The scoreboard's sets by name: two drawn ones of 20,000 and the 6,144 real ones of OpenChat V1."""
    drawn = pq.read_table(SHARED / "golden/multipack_lengths.parquet")
    sets = {name: drawn.column(name).to_numpy().astype(np.int32) for name in ("lognormal_chat", "heavy_tail")}
    real = json.loads((SHARED / "golden/openchat_v1_real_lengths.json").read_bytes())
    return {**sets, "openchat_v1": np.array(real, np.int32)}


def real_lengths() -> dict[str, NDArray[np.int32]]:
    """Tokens of every conversation of a data set, by its name."""
    files = sorted((SHARED / "data/lengths").glob("*.npy"))
    return {file.name.split(".")[0]: np.load(file)[:, MISTRAL_TOKENS].astype(np.int32) for file in files}


def tiled(lengths: NDArray[np.int32], step_tokens: int) -> NDArray[np.int32]:
    """The lengths, repeated as a whole until they fill 20 steps and a part of another."""
    copies = math.ceil((FULL_STEPS + 0.5) * step_tokens / lengths.sum(dtype=np.int64))
    return np.tile(lengths, max(1, copies))
