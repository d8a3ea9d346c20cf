"""Raw text in every format, a tokenizer for it, and `nha data prepare` in this process."""

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import tokenizers
import zstandard
from tokenizers import decoders, models, pre_tokenizers, trainers

from train.cli import main

TEXTS = [
    *(f"{n} lines of a document, {'and more ' * (n % 23)}" for n in range(120)),
    "naïve Ελλάδα 日本語 😀",
    "it says </s> in the middle",
    "",
    "line\nafter line\n",
]
DOCUMENTS = [text for text in TEXTS if text]


def train_tokenizer(path: Path, size: int, alphabet: list[str]) -> Path:
    """A byte-level BPE, saved with truncation switched on."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<pad>", "</s>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.enable_truncation(5)
    tokenizer.save(str(path))
    return path


def json_lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"id": 1, "text": text}) + "\n\n" for text in texts).encode()


def write_text(folder: Path) -> None:
    for n, text in enumerate(TEXTS):
        (folder / f"{n:03}.md").write_text(text)


def write_json_lines(folder: Path) -> None:
    (folder / "all.jsonl").write_bytes(json_lines(TEXTS))


def write_gzip(folder: Path) -> None:
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(json_lines(TEXTS[:50])))
    (folder / "b.json.gz").write_bytes(gzip.compress(json_lines(TEXTS[50:])))


def write_zstandard(folder: Path) -> None:
    frames = [zstandard.compress(json_lines(part)) for part in (TEXTS[:50], TEXTS[50:])]
    (folder / "a.jsonl.zst").write_bytes(b"".join(frames))


def write_parquet(folder: Path) -> None:
    table = pyarrow.table({"id": range(len(TEXTS)), "text": TEXTS})
    pyarrow.parquet.write_table(table, folder / "a.parquet", row_group_size=30)


FORMATS = [write_text, write_json_lines, write_gzip, write_zstandard, write_parquet]


def prepare(out: Path, *arguments: object) -> int:
    return main(["data", "prepare", str(out), *map(str, arguments)])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
