"""A folder that `nha data prepare` wrote: its manifest, and its tokens as one stream a split."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from train.data.token_shards import TOKENS_SUFFIX, OpenFile, Shard, ShardRecord
from train.data.tokenizer.files import TOKENIZER_FILE
from train.data.tokenizer.tokenizer import Tokenizer, load_tokenizer
from train.errors import DataError
from train.storage.atomic import write_atomically

MANIFEST_FILE = "manifest.json"
WORK_FOLDER = ".prepare"
"""In the folder while it is made: the settings, a lock, a record of each finished piece."""

FORMAT = 1
SPLITS = ("training", "held_out")

_OPEN_FILES = 256


@dataclass(frozen=True)
class Manifest:
    """What a prepared folder holds.

    Attributes:
        tokenizer: `Tokenizer.name`.
        vocabulary_size: tokens of the vocabulary.
        end_token: the token after each document.
        dtype: of the tokens, "uint16" or "uint32".
        settings: what they were made from, by name; for `nha data prepare` alone.
        totals: "tokens", "documents" and "text_bytes" of everything, and what was left out.
        shards: of each of SPLITS, in order.
    """

    tokenizer: str
    vocabulary_size: int
    end_token: int
    dtype: str
    settings: Mapping[str, Any]
    totals: Mapping[str, int]
    shards: Mapping[str, tuple[ShardRecord, ...]]
    format: int = FORMAT

    @property
    def fingerprint(self) -> str:
        """A hash of all of it, and so of every token, by way of the checksums."""
        return hashlib.sha256(_canonical(dataclasses.asdict(self))).hexdigest()

    def write(self, folder: Path) -> None:
        """Writes `manifest.json`, whole or not at all."""
        content = {**dataclasses.asdict(self), "sha256": self.fingerprint}
        write_atomically(folder / MANIFEST_FILE, json.dumps(content, indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The manifest of a folder.

        Raises:
            DataError: it is missing, damaged, or of another version of the format.
        """
        path = folder / MANIFEST_FILE
        try:
            content = json.loads(path.read_bytes())
            stored = content.pop("sha256")
        except OSError as error:
            raise DataError(f"{path}: cannot read it: {error.strerror}") from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise DataError(f"{path}: damaged: not what `nha data prepare` writes") from None
        if hashlib.sha256(_canonical(content)).hexdigest() != stored:
            raise DataError(f"{path}: damaged: its checksum is another")
        if content["format"] != FORMAT:
            raise DataError(f"{path}: format {content['format']}, which this version cannot read")
        shards = {
            split: tuple(ShardRecord(**record) for record in records)
            for split, records in content.pop("shards").items()
        }
        return cls(**content, shards=shards)


def is_prepared(folder: Path) -> bool:
    """Whether there are prepared tokens, or what is left of them, and not just any files."""
    return (folder / MANIFEST_FILE).exists() or any(folder.glob(f"{SPLITS[0]}-*{TOKENS_SUFFIX}"))


def is_unfinished(folder: Path) -> bool:
    """Whether `nha data prepare` was stopped there, and is to be run again."""
    return (folder / WORK_FOLDER).is_dir() and not (folder / MANIFEST_FILE).exists()


@dataclass(frozen=True)
class Prepared:
    """A prepared folder, opened.

    Attributes:
        folder: where it is.
        manifest: what it holds.
        tokenizer: what its tokens mean.
        training, held_out: its tokens.
    """

    folder: Path
    manifest: Manifest
    tokenizer: Tokenizer
    training: "ShardedTokens"
    held_out: "ShardedTokens"

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Opens a folder; every file's size is checked, their contents when they are read.

        Raises:
            DataError: a file is missing or damaged.
            ConfigError: the package tokenizers is needed and missing.
        """
        manifest = Manifest.read(folder)
        tokenizer = load_tokenizer(folder)
        if tokenizer.name != manifest.tokenizer:
            path = folder / TOKENIZER_FILE
            damage = "damaged: its checksum is another" if path.exists() else "missing"
            raise DataError(f"{path}: {damage}")
        dtype = np.dtype(manifest.dtype)
        parts = (
            ShardedTokens(folder, manifest.shards[split], dtype, tokenizer) for split in SPLITS
        )
        return cls(folder, manifest, tokenizer, *parts)


class ShardedTokens:
    """The shards of a split as one stream of tokens; see `train.data.corpus.TokenSource`.

    Any number of threads may read. At most 256 files are open.
    """

    def __init__(
        self, folder: Path, records: Sequence[ShardRecord], dtype: np.dtype, tokenizer: Tokenizer
    ):
        """Raises DataError if a file is missing or of another size."""
        for record in records:
            record.check_sizes(folder, dtype)
        self._shards = [Shard(folder, record, dtype) for record in records]
        self._starts = np.cumsum([0, *(record.tokens for record in records)])
        self._first_documents = np.cumsum([0, *(record.documents for record in records)])
        self._tokenizer = tokenizer
        self._dtype = dtype
        self.text_bytes = sum(record.text_bytes for record in records)
        self._open: Callable[[Path], OpenFile] = functools.lru_cache(_OPEN_FILES)(OpenFile)

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def num_documents(self) -> int:
        return int(self._first_documents[-1])

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens `start` to `stop`; DataError if a file is missing or damaged."""

        def read(number: int, start: int, stop: int) -> np.ndarray:
            shard = self._shards[number]
            return shard.read(self._open(shard.path), start, stop)

        return self._collect(start, stop, read)

    def documents(self, start: int, stop: int) -> np.ndarray:
        """The number of each token's document; DataError as of `read`."""
        return self._collect(
            start, stop, lambda i, a, b: self._shards[i].documents(a, b) + self._first_documents[i]
        )

    def text(self, limit: int) -> bytes:
        """The text of the first `limit` tokens; DataError as of `read`."""
        return self._tokenizer.decode(self.read(0, min(limit, len(self)))).encode()

    def _collect(
        self, start: int, stop: int, read: Callable[[int, int, int], np.ndarray]
    ) -> np.ndarray:
        """What `read(shard, start, stop)` gives of each shard that the range touches, joined."""
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        parts = []
        while start < stop:
            begin, end = int(self._starts[first]), int(self._starts[first + 1])
            parts.append(read(first, start - begin, min(stop, end) - begin))
            start, first = end, first + 1
        if not parts:
            return np.zeros(0, self._dtype)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _canonical(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True).encode()
