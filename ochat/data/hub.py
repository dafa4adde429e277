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
from ochat.hub_names import hub_problem

DEFAULT_SPLIT = "train"


def is_hub(source: SourceConfig) -> bool:
    return source.path.startswith(HUB_PREFIX)


def hub_name(source: SourceConfig) -> str:
    """What was read, in one line: "hf:owner/name subset train"."""
    return " ".join(part for part in (source.path, source.subset, source.split or DEFAULT_SPLIT) if part)


def hub_rows(source: SourceConfig) -> Iterator[dict[str, Any]]:
    """The rows, in order. DataError says what `datasets` said."""
    import datasets

    name, number = _within_reach(source), 0
    try:
        rows = datasets.load_dataset(name, source.subset, split=source.split or DEFAULT_SPLIT, streaming=True)
    except Exception as exc:  # the library raises errors of a dozen kinds, its network layer more
        raise _refused(source, first_line(exc)) from exc
    try:
        for number, row in enumerate(rows, 1):  # noqa: B007 (told in the error)
            yield row
    except Exception as exc:
        raise DataError(
            f"{hub_name(source)}: cannot be read beyond row {number:,} ({type(exc).__name__}: {first_line(exc)}). "
            f"If the network failed, try again; else the data after that row is damaged: fetch or mend it."
        ) from exc


def hub_version(source: SourceConfig) -> str:
    """SHA-256 over what says which version of the data is read.

    hub     the files' addresses, which hold the commit
    folder  the files' names, sizes and times
    """
    import datasets

    name = _within_reach(source)
    if Path(name).is_dir():
        files = sorted(path for path in Path(name).rglob("*") if path.is_file())
        parts = [f"{p.relative_to(name)} {p.stat().st_size} {p.stat().st_mtime_ns}" for p in files]
    else:
        try:
            builder = datasets.load_dataset_builder(name, source.subset)
        except Exception as exc:
            raise _refused(source, first_line(exc)) from exc
        parts = [f"{split} {file}" for split, files in (builder.config.data_files or {}).items() for file in files]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _within_reach(source: SourceConfig) -> str:
    """The name for `datasets`; refused at once where that would try for a while and then say the same."""
    import datasets

    name = source.path.removeprefix(HUB_PREFIX)
    cached = Path(datasets.config.HF_DATASETS_CACHE) / name.replace("/", "___")
    if not Path(name).is_dir() and not cached.is_dir() and (problem := hub_problem()):
        raise _refused(source, f"it is no folder, and the hub does not answer: {problem}")
    return name


def _refused(source: SourceConfig, reason: str) -> DataError:
    return DataError(
        f"{hub_name(source)}: `datasets` cannot open it ({reason}). Check the name, the source's "
        f"`subset` and `split`, and the network. A file is written without {HUB_PREFIX!r}."
    )
