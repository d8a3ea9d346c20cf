"""The jobs that preparing a corpus is divided into, each of which writes one shard a split."""

import contextlib
import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import numpy as np

from nha_jax.tokenizer.interface import Tokenizer
from train.data.held_out import is_document_held_out
from train.data.prepare.documents import (
    BadDocumentError,
    Document,
    FilePart,
    MarkedTokens,
    Reading,
    RecordFormat,
    TokenizedText,
)
from train.data.prepare.instructions import Instructions, TooLongCounts, make_form
from train.data.prepare.raw_files import read_documents
from train.data.prepared_folder import SPLITS
from train.data.token_shards import Marks, ShardRecord, ShardWriter
from train.errors import DataError
from train.storage.atomic import write_atomically
from train.storage.small_json import read_whole

# Documents go through the tokenizer in batches of about this size.
_BATCH_BYTES = 1 << 20
_BATCH_DOCUMENTS = 1024

ShardJob = tuple[FilePart, ...]
"""The parts of files that become one shard a split."""

Progress = Callable[[int, int], None]
"""A function that is called now and then with the bytes read and the tokens made since the last
call. It may raise an error to stop the work."""


@dataclass(frozen=True)
class ShardRules:
    """What the tokens of a shard depend on besides its text and the tokenizer.

    Attributes:
        text_key: the field of a text, see `train.data.prepare.documents.Form`.
        held_out_fraction: share of the documents that are held out.
        skip_bad: whether to count documents that cannot be used, instead of stopping at one.
        dtype: of the tokens, "uint16" or "uint32".
        record_format: see `Reading`.
        instructions: which fields are marked text instead; None: no text is.
    """

    text_key: str
    held_out_fraction: float
    skip_bad: bool
    dtype: str
    record_format: RecordFormat | None = None
    instructions: Instructions | None = None


@dataclass(frozen=True)
class WrittenShards:
    """What a finished job has written.

    Attributes:
        shards: the record of a split's shard, for each of SPLITS that got a document.
        bad: number of documents that were left out.
        first_bad: what was wrong with the first of them.
        cut, dropped: number of documents that were too long, and cut or left out.
    """

    shards: dict[str, ShardRecord] = field(default_factory=dict)
    bad: int = 0
    first_bad: str = ""
    cut: int = 0
    dropped: int = 0

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """Reads what `write` wrote; None if that is missing or damaged."""
        return read_whole(path, cls)

    def write(self, path: Path) -> None:
        """Writes JSON, whole or not at all."""
        write_atomically(path, json.dumps(dataclasses.asdict(self)))


def divide_into_jobs(parts: Sequence[FilePart], shard_bytes: int) -> list[ShardJob]:
    """Groups neighbouring parts; each job but the last has at least `shard_bytes` of text."""
    jobs: list[ShardJob] = []
    waiting: list[FilePart] = []
    size = 0
    for part in parts:
        waiting.append(part)
        size += part.text_bytes
        if size >= shard_bytes:
            jobs.append(tuple(waiting))
            waiting, size = [], 0
    return [*jobs, tuple(waiting)] if waiting else jobs


def write_shards(
    number: int,
    job: ShardJob,
    folder: Path,
    tokenizer: Tokenizer,
    rules: ShardRules,
    progress: Progress,
) -> WrittenShards:
    """Does a job: writes a shard for each split that gets a document.

    What the shards hold depends on `job`, `tokenizer` and `rules` alone.

    Args:
        number: the job's number, which names the shards.
        job: what to read.
        folder: where to write.
        tokenizer: what turns the text into tokens.
        rules: see `ShardRules`.
        progress: see `Progress`.

    Raises:
        DataError: a document or a file cannot be used, or the shards cannot be written.
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

    too_long = TooLongCounts()
    form = make_form(rules.text_key, rules.instructions, tokenizer, folder, too_long)
    reading = Reading(form, tokenizer, note, count, rules.record_format)
    try:
        with _writers(number, folder, rules) as writers:
            for batch in _batches(job, reading):
                tokens = 0
                for split, documents in _by_split(batch, rules.held_out_fraction).items():
                    encoded = _encode(tokenizer, documents)
                    writers[split].add(*encoded)
                    tokens += len(encoded[0])
                progress(read, tokens)
                read = 0
            progress(read, 0)
            closed = {split: writer.close() for split, writer in writers.items()}
    except OSError as error:
        raise DataError(f"{folder}: cannot write there: {error.strerror}") from None
    shards = {split: record for split, record in closed.items() if record}
    first_bad = bad[0] if bad else ""
    return WrittenShards(shards, len(bad), first_bad, too_long.cut, too_long.dropped)


@contextlib.contextmanager
def _writers(number: int, folder: Path, rules: ShardRules) -> Iterator[dict[str, ShardWriter]]:
    """Opens the shard of a job for each of SPLITS."""
    dtype, with_mask = np.dtype(rules.dtype), rules.instructions is not None
    with contextlib.ExitStack() as stack:
        yield {
            split: stack.enter_context(
                ShardWriter(folder, f"{split}-{number:05}", dtype, with_mask=with_mask)
            )
            for split in SPLITS
        }


def _batches(job: ShardJob, reading: Reading) -> Iterator[list[Document]]:
    """Reads a job's documents in order and gathers them for the tokenizer."""
    batch: list[Document] = []
    size = 0
    for part in job:
        for document in read_documents(part, reading):
            batch.append(document)
            size += _size(document)
            if size >= _BATCH_BYTES or len(batch) >= _BATCH_DOCUMENTS:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _text(document: str | TokenizedText) -> str:
    return document.text if isinstance(document, TokenizedText) else document


def _identity(document: Document) -> str:
    """Returns what decides whether a document is held out."""
    return document.identity if isinstance(document, MarkedTokens) else _text(document)


def _size(document: Document) -> int:
    return document.text_bytes if isinstance(document, MarkedTokens) else len(_text(document))


def _by_split(documents: Sequence[Document], held_out_fraction: float) -> dict[str, list[Document]]:
    """Divides documents into the splits that get any."""
    splits: dict[str, list[Document]] = {split: [] for split in SPLITS}
    for document in documents:
        held_out = is_document_held_out(_identity(document), held_out_fraction)
        splits[SPLITS[held_out]].append(document)
    return {split: chosen for split, chosen in splits.items() if chosen}


Encoded = tuple[np.ndarray, np.ndarray, int, Marks | None]
"""What `ShardWriter.add` takes."""


def _encode(tokenizer: Tokenizer, documents: Sequence[Document]) -> Encoded:
    """Makes tokens of documents of one form; marked ones have theirs."""
    marked = [document for document in documents if isinstance(document, MarkedTokens)]
    if not marked:
        texts = [x for x in documents if not isinstance(x, MarkedTokens)]
        size = sum(len(_text(document).encode()) for document in texts)
        return *_encode_texts(tokenizer, texts), size, None
    assert len(marked) == len(documents)
    return (
        np.concatenate([document.tokens for document in marked]),
        np.cumsum([len(document.tokens) for document in marked], dtype=np.int64),
        sum(document.text_bytes for document in marked),
        Marks(
            np.concatenate([document.mask for document in marked]),
            sum(document.target_bytes for document in marked),
        ),
    )


def _encode_texts(
    tokenizer: Tokenizer, documents: Sequence[str | TokenizedText]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns what `Tokenizer.encode_documents` does; documents that have tokens keep them."""
    arrays: list[np.ndarray] = []
    lengths: list[int] = []
    for _, group in itertools.groupby(documents, type):
        members = list(group)
        kept = [document.tokens for document in members if isinstance(document, TokenizedText)]
        for tokens in kept:
            arrays += [tokens, np.array([tokenizer.end_token], tokens.dtype)]
            lengths.append(len(tokens) + 1)
        if not kept:
            tokens, ends = tokenizer.encode_documents([_text(document) for document in members])
            arrays.append(tokens)
            lengths += np.diff(ends, prepend=0).tolist()
    return np.concatenate(arrays), np.cumsum(lengths, dtype=np.int64)
