"""The pieces that preparing is divided into: each gives one shard a split, whoever makes it."""

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import numpy as np

from train.data.hashing import in_fraction
from train.data.prepare.raw_documents import BadDocumentError, RawPart, read_documents
from train.data.prepared import SPLITS
from train.data.token_shards import ShardRecord, ShardWriter
from train.data.tokenizer.tokenizer import Tokenizer
from train.errors import DataError
from train.storage.atomic import write_atomically

# Documents go through the tokenizer in batches of about this size.
_BATCH_BYTES = 1 << 20
_BATCH_DOCUMENTS = 1024

Piece = tuple[RawPart, ...]

Progress = Callable[[int, int], None]
"""Called now and then with the bytes read and the tokens made since the last call; may raise."""


@dataclass(frozen=True)
class Rules:
    """What decides the tokens of a piece, beside its text.

    Attributes:
        text_key: the text's key in JSON lines, its column in parquet.
        held_out_fraction: share of the documents that are held out.
        skip_bad: count what is no document instead of stopping.
        dtype: of the tokens.
    """

    text_key: str
    held_out_fraction: float
    skip_bad: bool
    dtype: str


@dataclass(frozen=True)
class PieceRecord:
    """What a finished piece has become.

    Attributes:
        shards: of those of SPLITS that got a document.
        bad: documents left out.
        first_bad: what was wrong with the first of them.
    """

    shards: dict[str, ShardRecord] = field(default_factory=dict)
    bad: int = 0
    first_bad: str = ""

    @classmethod
    def read(cls, path: Path) -> Self:
        content = json.loads(path.read_bytes())
        shards = {split: ShardRecord(**record) for split, record in content.pop("shards").items()}
        return cls(shards, **content)

    def write(self, path: Path) -> None:
        write_atomically(path, json.dumps(dataclasses.asdict(self)))


def group(parts: Sequence[RawPart], piece_bytes: int) -> list[Piece]:
    """Neighbours together, until a piece has about `piece_bytes` of text."""
    pieces: list[Piece] = []
    waiting: list[RawPart] = []
    size = 0
    for part in parts:
        waiting.append(part)
        size += part.weight
        if size >= piece_bytes:
            pieces.append(tuple(waiting))
            waiting, size = [], 0
    return [*pieces, tuple(waiting)] if waiting else pieces


def make_piece(
    number: int,
    parts: Piece,
    folder: Path,
    tokenizer: Tokenizer,
    rules: Rules,
    progress: Progress,
) -> PieceRecord:
    """Writes a piece's shards; what they hold depends on `parts`, `tokenizer` and `rules` alone.

    Raises:
        DataError: a document or a file is bad, or the shards cannot be written.
    """
    bad: list[str] = []

    def note(error: BadDocumentError) -> None:
        if not rules.skip_bad:
            raise DataError(f"{error}; --skip-bad leaves such documents out")
        bad.append(str(error))

    read = 0

    def count(size: int) -> None:
        nonlocal read
        read += size

    dtype = np.dtype(rules.dtype)
    try:
        with (
            ShardWriter(folder, f"{SPLITS[0]}-{number:05}", dtype) as training,
            ShardWriter(folder, f"{SPLITS[1]}-{number:05}", dtype) as held_out,
        ):
            writers = dict(zip(SPLITS, (training, held_out), strict=True))
            for batch in _batches(parts, rules.text_key, note, count):
                tokens = 0
                for split, texts in _divide(batch, rules.held_out_fraction).items():
                    encoded, ends = tokenizer.encode_documents(texts)
                    size = sum(len(text.encode()) for text in texts)
                    writers[split].add(encoded, ends, size)
                    tokens += len(encoded)
                progress(read, tokens)
                read = 0
            progress(read, 0)
            closed = {split: writer.close() for split, writer in writers.items()}
    except OSError as error:
        raise DataError(f"{folder}: cannot write there: {error.strerror}") from None
    shards = {split: record for split, record in closed.items() if record}
    return PieceRecord(shards, len(bad), bad[0] if bad else "")


def _batches(
    parts: Sequence[RawPart],
    text_key: str,
    note: Callable[[BadDocumentError], None],
    count: Callable[[int], None],
) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for part in parts:
        for text in read_documents(part, text_key, note, count):
            batch.append(text)
            size += len(text)
            if size >= _BATCH_BYTES or len(batch) >= _BATCH_DOCUMENTS:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _divide(texts: Sequence[str], fraction: float) -> dict[str, list[str]]:
    """By split, decided by a document's content alone: its copies are all on the same side."""
    parts: dict[str, list[str]] = {split: [] for split in SPLITS}
    for text in texts:
        parts[SPLITS[in_fraction(text.encode(), fraction)]].append(text)
    return {split: texts for split, texts in parts.items() if texts}
