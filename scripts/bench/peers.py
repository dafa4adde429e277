"""Peers for the benchmarks, from the package index into throw-away environments under .cache/peers."""

import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PEERS = ROOT / ".cache" / "peers"

# The original, with the library versions at which its neutralising of special tokens works.
OPENCHAT = "ochat==3.6.1"
OPENCHAT_NEEDS = (
    "transformers==4.40.2",
    "tokenizers==0.19.1",
    "orjson",
    "pyarrow<20",
    "pydantic",
    "numpy<2",
    "numba",
    "torch==2.13.0",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """python: its interpreter; source: a folder to put on its path."""

    python: Path
    source: Path


def openchat_peer() -> Peer:
    """The original OpenChat package, unpacked beside an environment that can run its data functions."""
    folder = PEERS / OPENCHAT.replace("==", "-")
    peer = Peer(python=folder / "venv/bin/python", source=folder / "source")
    if (folder / "done").is_file():
        return peer
    folder.mkdir(parents=True, exist_ok=True)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    subprocess.run([*pip, "download", "--quiet", "--no-deps", "--dest", folder, OPENCHAT], check=True)
    for wheel in folder.glob("*.whl"):
        zipfile.ZipFile(wheel).extractall(peer.source)
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    subprocess.run([peer.python, "-m", "pip", "install", "--quiet", *OPENCHAT_NEEDS], check=True)
    (folder / "done").touch()
    return peer
