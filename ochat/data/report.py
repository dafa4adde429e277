"""The report of `ochat prepare`: what became of every conversation, and who will move the model.

The numbers are made once, as a tree; the table on the screen and PREPARED/report.json show the same ones.
"""

import json
import logging
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from ochat.config import Config
from ochat.data.store import REPORT_NAME, TRAIN_SPLIT, Manifest, PreparedSplit
from ochat.data.template import TEMPLATES, get_template, writes_condition
from ochat.data.weights import item_weights, weight_sums

log = logging.getLogger(__name__)

PERCENTILES = {"p50": 50, "p90": 90, "p99": 99, "max": 100}


def print_report(config: Config, manifest: Manifest) -> None:
    """Print the report and write it as report.json; warn when a low class dominates."""
    report = make_report(config, manifest)
    _write(report, Path(config.data.prepared_dir) / REPORT_NAME)
    console = Console(width=None if Console().is_terminal else 140)
    console.print(_table(report, f"prepared {config.data.prepared_dir}  ({manifest.fingerprint[:12]})"))
    for name, numbers in report["sources"].items():
        for key in ("dropped", "noticed"):
            if numbers[key]:
                found = ", ".join(f"{number:,} {what}" for what, number in numbers[key].items())
                console.print(f"{name}: {key} {found}", markup=False, highlight=False, soft_wrap=True)
        if weights := numbers["item_weights"]:
            found = "  ".join(f"{what} {weight:.3g}" for what, weight in weights.items())
            console.print(f"{name}: weights from rewards  {found}", markup=False, highlight=False, soft_wrap=True)
    for warning in report["warnings"]:
        log.warning("%s", warning)
        console.print(f"warning: {warning}", markup=False, highlight=False, soft_wrap=True)


def make_report(config: Config, manifest: Manifest) -> dict[str, Any]:
    """All numbers, as JSON would have them.

    sources.NAME   the counts of the manifest, and
      supervised_share   supervised tokens / tokens
      source_weight      mean factor of its rows: the weight, or what the rewards come to; null without rows
      weighted_sum       sum over rows of factor x token weights (reply weights, for loss.weighting: message)
      gradient_share     weighted_sum / that of all sources
      length             tokens of a row: p50, p90, p99, max
      item_weights       distribution of the rows' factors, when they come from rewards
    warnings       sentences
    """
    split = PreparedSplit(Path(config.data.prepared_dir) / TRAIN_SPLIT)
    factors: NDArray[np.float64] = item_weights(config, split) if len(split) else np.zeros(0)
    weighted: NDArray[np.float64] = weight_sums(config, split) if len(split) else np.zeros(0)
    source_id = split.column("source_id")
    total = float(weighted.sum())
    sources = {}
    for position, source in enumerate(config.data.sources):
        mine = source_id == position
        count = manifest.counts[source.name]
        sources[source.name] = {
            **count,
            "supervised_share": count["supervised_tokens"] / max(1, count["tokens"]),
            "source_weight": float(factors[mine].mean()) if mine.any() else None,
            "weighted_sum": float(weighted[mine].sum()),
            "gradient_share": float(weighted[mine].sum()) / total if total else 0.0,
            "length": _percentiles(split.lengths[mine]),
            "item_weights": _spread(factors[mine]) if config.loss.beta is not None else {},
        }
    return {
        "fingerprint": manifest.fingerprint,
        "prepared_dir": config.data.prepared_dir,
        "sources": sources,
        "warnings": [*_empty_sources(sources), *_blurred_classes(config, sources), *_dominating(sources)],
    }


def _percentiles(lengths: NDArray[np.int32]) -> dict[str, int]:
    if len(lengths) == 0:
        return dict.fromkeys(PERCENTILES, 0)
    # "higher": a length that some row has, and no less than that share of the rows.
    values = np.percentile(lengths, list(PERCENTILES.values()), method="higher")
    return {name: int(value) for name, value in zip(PERCENTILES, values, strict=True)}


def _spread(factors: NDArray[np.float64]) -> dict[str, float]:
    if len(factors) == 0:
        return {}
    names = ("min", "p10", "p50", "p90", "max")
    return dict(zip(names, np.percentile(factors, [0, 10, 50, 90, 100]).tolist(), strict=True))


def _empty_sources(sources: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return [
        f"source {name} keeps nothing of {numbers['read']:,} conversations read."
        for name, numbers in sources.items()
        if not numbers["kept"]
    ]


def _blurred_classes(config: Config, sources: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A sentence for each condition under which sources of different weights are trained, or one for the template.

    Sources whose rows have rewards of their own are passed over: there, weights within a class are meant.
    """
    rated = {
        position: sources[source.name]
        for position, source in enumerate(config.data.sources)
        if source.reward_field is None and sources[source.name]["source_weight"]
    }
    conditions = sorted({condition for numbers in sources.values() for condition in numbers["conditions"]})
    template = get_template(config.model.template)
    if not writes_condition(template):
        if not any(conditions) and _weigh_alike(rated.values()):
            return []
        found = ", ".join(filter(None, conditions)) or "none"
        fitting = ", ".join(name for name, other in TEMPLATES.items() if writes_condition(other))
        return [
            f"template {template.name} writes no condition into the prompt (the data's: {found}): all classes are "
            f"trained as one, by weight only, and the model cannot be asked for the best. For C-RLFT choose a "
            f"model.template that writes them: {fitting}."
        ]
    sharing = {c: {n: numbers for n, numbers in rated.items() if c in numbers["conditions"]} for c in conditions}
    return [_shared(config, c, mine) for c, mine in sharing.items() if not _weigh_alike(mine.values())]


def _weigh_alike(sources: Iterable[Mapping[str, Any]]) -> bool:
    weights = [numbers["source_weight"] for numbers in sources]
    return not weights or math.isclose(min(weights), max(weights), rel_tol=1e-9)  # they are means over rows


def _shared(config: Config, condition: str, sources: Mapping[int, Mapping[str, Any]]) -> str:
    names = " and ".join(config.data.sources[position].name for position in sources)
    weights = " and ".join(f"{numbers['source_weight']:.3g}" for numbers in sources.values())
    shared = f"share the condition {condition}" if condition else "have no condition"
    asked = f", and asked for {condition} it answers like both" if condition else ""
    fields = ", ".join(f"data.sources.{position}.condition" for position in sources)
    return (
        f"sources {names} (weights {weights}) {shared}: the model cannot tell one from the other{asked}. "
        f"Give each its own: {fields}, or in the rows."
    )


def _dominating(sources: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A sentence for each source that outweighs all that are rated higher, with the weight that makes them even.

    weights 1.0 and 0.1, sums 50 and 400 (x 0.1 = 40): fine. Sums 50 and 900: 90 against 50; even at 0.1 x 50 / 90.
    """
    sentences = []
    rated = {name: numbers for name, numbers in sources.items() if numbers["source_weight"]}
    for name, low in rated.items():
        above = [other for other in rated.values() if other["source_weight"] > low["source_weight"] * (1 + 1e-9)]
        share = sum(other["gradient_share"] for other in above)
        if above and low["gradient_share"] > share:
            even = low["source_weight"] * share / low["gradient_share"]
            sentences.append(
                f"source {name} has the lower weight ({low['source_weight']:.3g}) and still "
                f"{low['gradient_share']:.1%} of the gradient, against {share:.1%} of those rated higher: the model "
                f"will mostly learn from it. They are even at a weight of {even:.3g}."
            )
    return sentences


def _table(report: Mapping[str, Any], title: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("source")
    headings = ("read", "kept", "dropped", "cut", "split", "tokens", "supervised", "p50/p90/p99/max")
    for heading in (*headings, "weight sum", "x weight", "gradient"):
        table.add_column(heading, justify="right")
    for name, numbers in report["sources"].items():
        weight = numbers["source_weight"]
        table.add_row(
            name,
            *(f"{numbers[key]:,}" for key in ("read", "kept")),
            f"{sum(numbers['dropped'].values()):,}",
            *(f"{numbers[key]:,}" for key in ("truncated", "split", "tokens")),
            f"{numbers['supervised_share']:.1%}",
            "/".join(str(length) for length in numbers["length"].values()),
            f"{numbers['weight_sum']:,.6g}",
            "-" if weight is None else f"{weight:.3g}",
            f"{numbers['gradient_share']:.1%}",
        )
    return table


def _write(report: Mapping[str, Any], path: Path) -> None:
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
