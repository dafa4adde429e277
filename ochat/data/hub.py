"""Datasets of the Hugging Face hub, and local folders of such, as rows: `path: hf:NAME`.

The prefix decides, never what happens to lie on the disk: a mistyped file name must not become a download.
Rows are streamed; nothing is kept but what `datasets` itself caches.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ochat.config import HUB_PREFIX, SourceConfig
from ochat.errors import DataError, first_line

DEFAULT_SPLIT = "train"


def is_hub(source: SourceConfig) -> bool:
    return source.path.startswith(HUB_PREFIX)


def hub_name(source: SourceConfig) -> str:
    """What was read, in one line: "hf:owner/name subset train"."""
    return " ".join(part for part in (source.path, source.subset, source.split or DEFAULT_SPLIT) if part)


def hub_rows(source: SourceConfig) -> Iterator[dict[str, Any]]:
    """The rows, in order. DataError says what `datasets` said."""
    import datasets

    name = source.path.removeprefix(HUB_PREFIX)
    try:
        rows = datasets.load_dataset(name, source.subset, split=source.split or DEFAULT_SPLIT, streaming=True)
    except Exception as exc:  # the library raises errors of a dozen kinds, its network layer more
        raise _refused(source, exc) from exc
    yield from rows


def hub_version(source: SourceConfig) -> str:
    """SHA-256 over what says which version of the data is read.

    hub     the files' addresses, which hold the commit
    folder  the files' names, sizes and times
    """
    import datasets

    name = source.path.removeprefix(HUB_PREFIX)
    if Path(name).is_dir():
        files = sorted(path for path in Path(name).rglob("*") if path.is_file())
        parts = [f"{p.relative_to(name)} {p.stat().st_size} {p.stat().st_mtime_ns}" for p in files]
    else:
        try:
            builder = datasets.load_dataset_builder(name, source.subset)
        except Exception as exc:
            raise _refused(source, exc) from exc
        parts = [f"{split} {file}" for split, files in (builder.config.data_files or {}).items() for file in files]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _refused(source: SourceConfig, exc: Exception) -> DataError:
    return DataError(
        f"{hub_name(source)}: `datasets` cannot open it ({first_line(exc)}). Check the name, the source's "
        f"`subset` and `split`, and the network. A file is written without {HUB_PREFIX!r}."
    )
