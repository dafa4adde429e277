"""Row 7 of the scoreboard: opening the dataset, its memory, and making a row of 81,920 tokens, against the original.

    python -m scripts.bench.row7_loader [--chats N] [--rows R]

Both hold the same token rows (lengths of real chats from ../shared, random ids), ours in a prepared dataset, the
original's in its Parquet file. Both are asked for rows in turn; each packs in its own way, so times are per token.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ochat.data.items import Row, record_batch
from ochat.data.store import FORMAT_VERSION, TRAIN_SPLIT, Manifest, write_split
from ochat.data.tokenize import TokenizedConversation
from scripts.bench.lengths import real_lengths
from scripts.bench.peers import ROOT, openchat_peer
from scripts.bench.side_process import SideProcess

LENGTHS = "alpacaeval_strong"
ROW_TOKENS = 81_920


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chats", type=int, default=40_000)
    parser.add_argument("--rows", type=int, default=60)
    arguments = parser.parse_args()
    peer = openchat_peer()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        num_tokens = _write_both(folder, arguments.chats)
        ours = SideProcess([sys.executable, ROOT / "scripts/bench/loader_ochat.py", folder, ROW_TOKENS], ROOT)
        theirs = SideProcess(
            [peer.python, ROOT / "scripts/bench/loader_openchat.py", folder / "peer.parquet", ROW_TOKENS], peer.source
        )
        opened = {"ours": ours.read(), "peer": theirs.read()}
        times: dict[str, list[float]] = {"ours": [], "peer": []}
        for _ in range(arguments.rows):
            for side, process in (("ours", ours), ("peer", theirs)):
                answer = process.ask()
                times[side].append(1e3 * answer["seconds"] * ROW_TOKENS / answer["num_tokens"])
        ours.close()
        theirs.close()
    collate = {side: statistics.median(values) for side, values in times.items()}
    for side in ("ours", "peer"):
        print(
            f"  {side}: open {opened[side]['open_s']:.3f} s, {opened[side]['memory_mib']:.1f} MiB "
            f"({opened[side]['memory_mib'] * 2**20 / num_tokens:.1f} bytes a token), row {collate[side]:.2f} ms"
        )
    ratio = collate["ours"] / collate["peer"]
    print(
        f"row 7: ours open {opened['ours']['open_s']:.3f} s, {opened['ours']['memory_mib']:.0f} MiB, "
        f"row {collate['ours']:.2f} ms; peer row {collate['peer']:.2f} ms; ratio {ratio:.2f}, "
        f"goal open < 0.1 s, < 50 MiB, <= 1.00"
    )


def _write_both(folder: Path, num_chats: int) -> int:
    """The same rows in both formats: a third context, then a reply. Returns their tokens."""
    rng = np.random.default_rng(0)
    lengths = np.resize(real_lengths()[LENGTHS], num_chats).clip(8, 8192)
    items = []
    for length in lengths.tolist():
        weights = np.ones(length, np.float32)
        weights[: length // 3] = 0
        ids = rng.integers(3, 32_000, length).astype(np.int32)
        items.append(TokenizedConversation(input_ids=ids, token_weights=weights))
    _write_ours(folder, items)
    table = _peer_table(items).replace_schema_metadata({"metadata_json": "{}"})
    pq.write_table(table, folder / "peer.parquet")
    return int(lengths.sum())


def _write_ours(folder: Path, items: list[TokenizedConversation]) -> None:
    chunks = (items[i : i + 256] for i in range(0, len(items), 256))
    batches = (record_batch([_row(item) for item in chunk], 0) for chunk in chunks)
    (folder / "prepared").mkdir()
    write_split(batches, folder / "prepared" / TRAIN_SPLIT)
    counts = {"chats": {"kept": len(items)}}
    Manifest(format_version=FORMAT_VERSION, fingerprint="bench", recipe={}, files={}, counts=counts).write(
        folder / "prepared"
    )


def _row(item: TokenizedConversation) -> Row:
    return Row(chat=0, line=1, item=item, cut=0, trimmed=0, condition="", reward=None)


def _peer_table(items: list[TokenizedConversation]) -> pa.Table:
    def column(rows: list[np.ndarray], kind: pa.DataType) -> pa.Array:
        offsets = np.cumsum([0, *map(len, rows)], dtype=np.int32)
        return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(rows), kind))

    ids, weights = [i.input_ids for i in items], [i.token_weights for i in items]
    lengths = np.array([len(row) for row in ids], np.int32)
    return pa.table(
        {
            "total_length": lengths,
            "num_seqs": np.array([w.sum() for w in weights], np.float32),
            "seqlens": column([lengths[i : i + 1] for i in range(len(ids))], pa.int32()),
            "nz_input_ids": column(ids, pa.int32()),
            "nz_position_ids": column([np.arange(len(row), dtype=np.int32) for row in ids], pa.int32()),
            "nz_shifted_label_ids": column([np.append(row[1:], 0).astype(np.int32) for row in ids], pa.int32()),
            "nz_shifted_loss_weights": column([np.append(w[1:], 0).astype(np.float32) for w in weights], pa.float32()),
        }
    )


if __name__ == "__main__":
    main()
