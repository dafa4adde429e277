"""The table at the end of `ochat prepare`: what became of every conversation, and who will move the model."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from ochat.config import Config
from ochat.data.store import TRAIN_SPLIT, Manifest, PreparedSplit
from ochat.data.weights import item_weights


def print_report(config: Config, manifest: Manifest) -> None:
    """One row per source; gradient share = source weight x sum of token weights, of all sources' total."""
    split = PreparedSplit(Path(config.data.prepared_dir) / TRAIN_SPLIT)
    weighted = item_weights(config, split) * split.column("weight_sum")
    source_id = split.column("source_id")
    table = Table(title=f"prepared {config.data.prepared_dir}  ({manifest.fingerprint[:12]})", title_justify="left")
    table.add_column("source")
    for heading in ("read", "kept", "no reply", "cut", "tokens", "supervised", "gradient"):
        table.add_column(heading, justify="right")
    for position, source in enumerate(config.data.sources):
        count = manifest.counts[source.name]
        share = weighted[source_id == position].sum() / max(weighted.sum(), 1e-300)
        table.add_row(
            source.name,
            f"{count['read']:,}",
            f"{count['kept']:,}",
            f"{count['dropped_unsupervised']:,}",
            f"{count['truncated']:,}",
            f"{count['tokens']:,}",
            f"{count['supervised_tokens'] / max(1, count['tokens']):.1%}",
            f"{share:.1%}",
        )
    Console(width=None if Console().is_terminal else 120).print(table)
