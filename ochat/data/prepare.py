"""Chat files -> prepared dataset: parse and tokenise in processes, in file order, with every loss of text counted.

Called by `ochat prepare` and, in a single process, by `ochat train`. What has been prepared from the same recipe and
the same files is not prepared again.
"""

import hashlib
import json
import logging
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pyarrow as pa
from transformers import PreTrainedTokenizerFast

from ochat.config import Config, SourceConfig, first_difference
from ochat.data.items import Counts, build_items
from ochat.data.records import Record, check_chat_file, hash_file, read_records
from ochat.data.store import (
    FORMAT_VERSION,
    TRAIN_SPLIT,
    Manifest,
    PreparedSplit,
    SourceFile,
    check_replaceable,
    write_split,
)
from ochat.data.template import Template, get_template
from ochat.data.tokenize import ChatTokenizer, load_tokenizer, tokenizer_hash
from ochat.errors import DataError
from ochat.folders import locked, replace_folder
from ochat.progress import progress_bar

log = logging.getLogger(__name__)

CHUNK_RECORDS = 256
CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A run of records of one source, small enough to travel to a worker."""

    source_id: int
    records: tuple[Record, ...]


def prepare(config: Config) -> Manifest:
    """Make the prepared dataset of a configuration, or find it up to date.

    Raises DataError (with file and line) and TemplateError; on any error no dataset, old or new, is touched.
    """
    template = get_template(config.model.template)
    tokenizer = load_tokenizer(config.tokenizer_name_or_path, template)
    prepared_dir = Path(config.data.prepared_dir)
    with locked(prepared_dir):
        try:
            manifest = check_prepared(config, template, tokenizer)
        except DataError as reason:
            log.info("preparing %s (%s)", prepared_dir, reason)
        else:
            log.info("prepared dataset %s is up to date (%s)", prepared_dir, manifest.fingerprint[:12])
            return manifest
        for source in config.data.sources:
            check_chat_file(Path(source.path))
        check_replaceable(prepared_dir)
        with replace_folder(prepared_dir) as folder:
            manifest = _prepare_into(folder, config, template, tokenizer)
    return manifest


def _prepare_into(folder: Path, config: Config, template: Template, tokenizer: PreTrainedTokenizerFast) -> Manifest:
    files = {source.name: _describe_file(Path(source.path)) for source in config.data.sources}
    counts = {source.name: Counts() for source in config.data.sources}
    write_split(_tokenized_batches(config, ChatTokenizer(tokenizer, template), counts), folder / TRAIN_SPLIT)
    if not any(count.kept for count in counts.values()):
        num_read = sum(count.read for count in counts.values())
        raise DataError(
            f"nothing to train on: of {num_read} conversations read, none has a reply with a weight within "
            f"model.max_length = {config.model.max_length} tokens. Check the roles and weights in the chat files."
        )
    recipe = _recipe(config, template, tokenizer)
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        fingerprint=_fingerprint(recipe, files),
        recipe=recipe,
        files=files,
        counts={name: asdict(count) for name, count in counts.items()},
    )
    manifest.write(folder)
    return manifest


def check_prepared(config: Config, template: Template, tokenizer: PreTrainedTokenizerFast) -> Manifest:
    """The manifest of `data.prepared_dir` if it fits the configuration and the files; DataError says what does not.

    A chat file that is not on this machine is trusted: training nodes need the prepared dataset only.
    """
    prepared_dir = Path(config.data.prepared_dir)
    manifest = Manifest.read(prepared_dir)
    num_kept = sum(count["kept"] for count in manifest.counts.values())
    if (num_rows := len(PreparedSplit(prepared_dir / TRAIN_SPLIT))) != num_kept:
        raise DataError(f"{prepared_dir} is damaged: {num_rows} rows, where the manifest counts {num_kept}.")
    recipe = _recipe(config, template, tokenizer)
    if changed := first_difference(manifest.recipe, recipe):
        raise DataError(f"{prepared_dir} is out of date: {changed}.")
    for source in config.data.sources:
        path, then = Path(source.path), manifest.files[source.name]
        if not path.is_file():
            log.info("source %s: %s is not here; trusting the prepared dataset", source.name, path)
            continue
        now = path.stat()
        touched = (now.st_size, now.st_mtime_ns) != (then.size, then.mtime_ns)
        if now.st_size != then.size or (touched and hash_file(path) != then.sha256):
            raise DataError(f"{prepared_dir} is out of date: {path} has changed since.")
    return manifest


def _recipe(config: Config, template: Template, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    sources = {
        source.name: {"condition": source.condition, "format": source.format, "reward_field": source.reward_field}
        for source in config.data.sources
    }
    return {
        "template": json.loads(json.dumps(asdict(template))),
        "tokenizer_sha256": tokenizer_hash(tokenizer),
        "max_length": config.model.max_length,
        "source_order": list(sources),
        "sources": sources,
    }


def _fingerprint(recipe: dict[str, Any], files: dict[str, SourceFile]) -> str:
    identity = [FORMAT_VERSION, recipe, {name: file.sha256 for name, file in files.items()}]
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _describe_file(path: Path) -> SourceFile:
    stat = path.stat()
    return SourceFile(path=str(path), size=stat.st_size, mtime_ns=stat.st_mtime_ns, sha256=hash_file(path))


def _tokenized_batches(config: Config, tokenizer: ChatTokenizer, counts: dict[str, Counts]) -> Iterator[pa.RecordBatch]:
    """Tokenise every source, in order; adds to `counts` on the way."""
    sources = config.data.sources
    num_workers = config.data.num_proc or os.cpu_count() or 1
    total = sum(Path(source.path).stat().st_size for source in sources)
    worker = _Worker(tokenizer=tokenizer, sources=sources, max_length=config.model.max_length)
    with progress_bar("preparing", total=total, unit="bytes") as bar:
        tasks = _tasks(sources, bar.advance)
        for source_id, batch, count in _map_in_order(worker, tasks, num_workers):
            counts[sources[source_id].name].add(count)
            if batch.num_rows:
                yield batch


@dataclass(frozen=True, slots=True, kw_only=True)
class _Worker:
    tokenizer: ChatTokenizer
    sources: tuple[SourceConfig, ...]
    max_length: int

    def __call__(self, task: Task) -> tuple[int, pa.RecordBatch, Counts]:
        source = self.sources[task.source_id]
        batch, count = build_items(
            task.records, source, source_id=task.source_id, tokenizer=self.tokenizer, max_length=self.max_length
        )
        return task.source_id, batch, count


def _tasks(sources: tuple[SourceConfig, ...], advance: Callable[[int], None]) -> Iterator[Task]:
    for source_id, source in enumerate(sources):
        records: list[Record] = []
        num_bytes = 0
        for record in read_records(Path(source.path), advance):
            records.append(record)
            num_bytes += len(record.row) if isinstance(record.row, bytes) else 0
            if len(records) == CHUNK_RECORDS or num_bytes >= CHUNK_BYTES:
                yield Task(source_id=source_id, records=tuple(records))
                records, num_bytes = [], 0
        if records:
            yield Task(source_id=source_id, records=tuple(records))


_worker: _Worker | None = None


def _start_worker(worker: _Worker) -> None:
    global _worker
    _worker = worker
    # One process per core already; the tokenizer's own threads would only fight over them.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _work(task: Task) -> tuple[int, pa.RecordBatch, Counts]:
    assert _worker is not None
    return _worker(task)


def _map_in_order(
    worker: _Worker, tasks: Iterator[Task], num_workers: int
) -> Iterator[tuple[int, pa.RecordBatch, Counts]]:
    """worker(task) for every task, in order; at most 4 tasks a process are in flight, so memory stays bounded."""
    if num_workers == 1:
        yield from map(worker, tasks)
        return
    # fork: the tokenizer is inherited, not sent, and a script that calls prepare() needs no __main__ guard.
    context = get_context("fork")
    with ProcessPoolExecutor(num_workers, context, initializer=_start_worker, initargs=(worker,)) as pool:
        flying: deque[Future[tuple[int, pa.RecordBatch, Counts]]] = deque()
        try:
            for task in tasks:
                flying.append(pool.submit(_work, task))
                if len(flying) >= 4 * num_workers:
                    yield flying.popleft().result()
            while flying:
                yield flying.popleft().result()
        except BrokenProcessPool as exc:
            raise DataError(
                "a tokenising process was killed, most likely for lack of memory. Lower data.num_proc."
            ) from exc
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
