"""Weights and rewards of the configuration become one factor per item."""

import json
from pathlib import Path

import pyarrow as pa
import pytest

from ochat.config import Config
from ochat.data.store import SCHEMA, PreparedSplit, write_split
from ochat.data.weights import item_weights
from ochat.errors import DataError

# item:     0    1    2    3
SOURCE_IDS = [0, 1, 1, 0]
E_MINUS_2 = 0.1353352832366127


def config(*sources: dict[str, object], beta: float | None = None) -> Config:
    tree = {
        "run": {"name": "tiny"},
        "model": {"name_or_path": "base", "template": "openchat-3.5", "max_length": 8},
        "data": {"prepared_dir": "p", "sources": [{"name": f"s{n}", "path": "x", **s} for n, s in enumerate(sources)]},
        "batch": {"micro_batch_tokens": 8, "global_batch_tokens": 8},
        "loss": {"beta": beta},
    }
    return Config.model_validate_json(json.dumps(tree))


def split(folder: Path, rewards: list[float | None]) -> PreparedSplit:
    rows = [{"input_ids": [1], "source_id": s, "reward": r} for s, r in zip(SOURCE_IDS, rewards, strict=True)]
    write_split(iter([pa.RecordBatch.from_pylist(rows, SCHEMA)]), folder / "train")
    return PreparedSplit(folder / "train")


def test_a_weight_is_the_factor_of_its_source_and_1_where_none_is_given(tmp_path: Path) -> None:
    items = split(tmp_path, [None] * 4)
    assert item_weights(config({}, {"weight": 0.1}), items).tolist() == [1.0, 0.1, 0.1, 1.0]
    assert item_weights(config({"weight": 2}, {"weight": 0}), items).tolist() == [2.0, 0.0, 0.0, 2.0]


def test_a_reward_becomes_exp_of_its_distance_to_the_highest_over_beta(tmp_path: Path) -> None:
    items = split(tmp_path, [None] * 4)
    # exp((0 - 1) / 0.5) = exp(-2)
    weights = item_weights(config({"reward": 1}, {"reward": 0}, beta=0.5), items)
    assert weights.tolist() == pytest.approx([1, E_MINUS_2, E_MINUS_2, 1])
    assert item_weights(config({"reward": 1}, {"reward": 0}, beta=1), items)[1] == pytest.approx(E_MINUS_2**0.5)


def test_only_differences_of_rewards_count(tmp_path: Path) -> None:
    items = split(tmp_path, [None] * 4)
    near = item_weights(config({"reward": 1}, {"reward": 0}, beta=0.5), items)
    far = item_weights(config({"reward": 1001}, {"reward": 1000}, beta=0.5), items)
    assert far.tolist() == pytest.approx(near.tolist())


def test_rows_may_bring_their_rewards_beside_a_source_that_has_one(tmp_path: Path) -> None:
    items = split(tmp_path, [None, 2.0, 0.0, None])
    weights = item_weights(config({"reward": 1}, {"reward_field": "score"}, beta=0.5), items)
    # the best item, reward 2, has 1; then (1 - 2) / 0.5 = -2 and (0 - 2) / 0.5 = -4
    assert weights.tolist() == pytest.approx([E_MINUS_2, 1, E_MINUS_2**2, E_MINUS_2])


def test_rewards_on_disk_are_no_weights_unless_the_configuration_says_so(tmp_path: Path) -> None:
    items = split(tmp_path, [5.0, 2.0, 0.0, 1.0])
    assert item_weights(config({}, {}), items).tolist() == [1.0, 1.0, 1.0, 1.0]


def test_an_item_without_a_reward_names_its_source(tmp_path: Path) -> None:
    items = split(tmp_path, [None, 2.0, None, None])
    with pytest.raises(DataError, match=r"^source s1: items without a reward\. Run `ochat prepare` again"):
        item_weights(config({"reward": 1}, {"reward_field": "score"}, beta=1), items)
