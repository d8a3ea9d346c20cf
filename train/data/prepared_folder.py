"""A folder that `nha data prepare` wrote: its manifest, and one stream of tokens for each split."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from nha_jax.storage.stores import Store, local_copy
from nha_jax.tokenizer.files import TOKENIZER_FILE
from nha_jax.tokenizer.interface import Tokenizer
from train.data.chat_template import TEMPLATE_FILE
from train.data.checked_blocks import OpenFile
from train.data.store_files import StoreFile, cache_folder, shared_cache
from train.data.token_shards import (
    INDEX_SUFFIX,
    MASK_SUFFIX,
    TOKENS_SUFFIX,
    ShardReader,
    ShardRecord,
)
from train.data.tokenizers import load_tokenizer
from train.errors import DataError
from train.storage.atomic import write_atomically
from train.storage.small_json import parse

MANIFEST_FILE = "manifest.json"
WORK_FOLDER = ".prepare"
"""A folder inside it while it is made: the settings, a lock, and what each finished job wrote."""

FORMAT, FORMAT_WITH_MASKS = 1, 2
"""Versions of the format. An older version of this library, which knows no masks, refuses 2."""

SPLITS = ("training", "held_out")

_OPEN_FILES = 256

_AGAIN = "delete the folder and run `nha data prepare` again"


@dataclass(frozen=True)
class Manifest:
    """What a prepared folder holds.

    Attributes:
        tokenizer: `Tokenizer.name`.
        vocabulary_size: number of tokens in the vocabulary.
        end_token: the token after each document.
        dtype: of the tokens, "uint16" or "uint32".
        settings: the inputs and options that it was made from; only `nha data prepare` reads them.
        totals: "tokens", "documents" and "text_bytes" of both splits together, and
            "bad_documents", which were left out; with masks also "targets", and of documents that
            were too long "cut_documents" and "dropped_documents".
        shards: records of the shards of each of SPLITS, in order.
        format: version of the format.
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
        """A hash of the manifest; its checksums make it depend on every token."""
        return hashlib.sha256(_canonical(self._content())).hexdigest()

    def _content(self) -> dict[str, Any]:
        """What is written; records of shards without masks are as they were before there were."""
        content = dataclasses.asdict(self)
        content["shards"] = {
            split: [
                {name: value for name, value in record.items() if value is not None}
                for record in records
            ]
            for split, records in content["shards"].items()
        }
        return content

    def write(self, folder: Path) -> None:
        """Writes manifest.json, whole or not at all."""
        content = {**self._content(), "sha256": self.fingerprint}
        write_atomically(folder / MANIFEST_FILE, json.dumps(content, indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Reads a folder's manifest.

        Raises:
            DataError: the manifest is missing, damaged, or of another version of the format.
        """
        path = folder / MANIFEST_FILE
        try:
            content = parse(path.read_bytes(), dict[str, Any])
        except OSError as error:
            raise DataError(f"{path}: cannot read it: {error.strerror}") from None
        except ValueError as error:
            raise DataError(f"{path}: damaged: {error}; {_AGAIN}") from None
        stored = content.pop("sha256", None)
        if hashlib.sha256(_canonical(content)).hexdigest() != stored:
            raise DataError(f"{path}: damaged: its checksum is another; {_AGAIN}")
        if content["format"] not in (FORMAT, FORMAT_WITH_MASKS):
            raise DataError(f"{path}: format {content['format']}, which this version cannot read")
        shards = {
            split: tuple(ShardRecord(**record) for record in records)
            for split, records in content.pop("shards").items()
        }
        return cls(**content, shards=shards)


def is_prepared(folder: Path | Store) -> bool:
    """Says whether a folder holds prepared tokens, even if its manifest was lost."""
    if not isinstance(folder, Path):
        return folder.exists(MANIFEST_FILE)
    return (folder / MANIFEST_FILE).exists() or any(folder.glob(f"{SPLITS[0]}-*{TOKENS_SUFFIX}"))


def is_unfinished(folder: Path) -> bool:
    """Says whether `nha data prepare` was stopped in a folder and has to be run again."""
    return (folder / WORK_FOLDER).is_dir() and not (folder / MANIFEST_FILE).exists()


@dataclass(frozen=True)
class PreparedFolder:
    """An opened folder of prepared tokens.

    Attributes:
        folder: its path.
        manifest: what it holds.
        tokenizer: what turned its text into tokens.
        chat_template: chat_template.jinja of its dialogues; None: it is of other text.
        training, held_out: the tokens of its splits.
    """

    folder: Path | Store
    manifest: Manifest
    tokenizer: Tokenizer
    chat_template: bytes | None
    training: "ShardedTokens"
    held_out: "ShardedTokens"

    @classmethod
    def open(cls, folder: Path | Store, cache_bytes: int = 1 << 34) -> Self:
        """Opens a folder and checks the size of every file; contents are checked when read.

        Args:
            folder: the folder; of one in a store the small files are downloaded now, and parts of
                the tokens when they are needed.
            cache_bytes: how much of tokens from stores may stay on the disk.

        Raises:
            DataError: a file is missing or damaged.
            ConfigError: the package tokenizers is needed and not installed.
            StoreError: the store stays away.
        """
        small = folder if isinstance(folder, Path) else local_copy(folder.url, _is_small)
        manifest = Manifest.read(small)
        tokenizer = load_tokenizer(small)
        if tokenizer.name != manifest.tokenizer:
            path = small / TOKENIZER_FILE
            damage = "damaged: its checksum is another" if path.exists() else "missing"
            raise DataError(f"{path}: {damage}")
        dtype = np.dtype(manifest.dtype)
        splits = (
            ShardedTokens(folder, manifest.shards[split], dtype, tokenizer, cache_bytes)
            for split in SPLITS
        )
        return cls(folder, manifest, tokenizer, _read_template(small, manifest), *splits)


class ShardedTokens:
    """A split's shards as one stream of tokens, a `train.data.token_source.TokenSource`.

    Any number of threads may read from it. At most 256 files are open at a time.
    """

    def __init__(
        self,
        folder: Path | Store,
        records: Sequence[ShardRecord],
        dtype: np.dtype,
        tokenizer: Tokenizer,
        cache_bytes: int = 0,
    ):
        """Opens nothing yet; raises DataError if a file is missing or has another size.

        Args:
            folder: the folder.
            records: what its manifest says of the split's shards.
            dtype: of the tokens.
            tokenizer: what made them.
            cache_bytes: of a folder in a store, see `PreparedFolder.open`.
        """
        present = None if isinstance(folder, Path) else folder.files()
        for record in records:
            record.check_sizes(folder, dtype, present)
        self._open = _opener(folder, records, cache_bytes)
        self._shards = [ShardReader(folder, record, dtype, self._open) for record in records]
        self._starts = np.cumsum([0, *(record.tokens for record in records)])
        self._first_documents = np.cumsum([0, *(record.documents for record in records)])
        self._tokenizer = tokenizer
        self._dtype = dtype
        self.text_bytes = sum(record.text_bytes for record in records)
        self.has_mask = any(record.has_mask for record in records)
        self.num_targets = sum(record.num_targets for record in records)
        self.target_bytes = sum(record.bytes_of_targets for record in records)

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def num_documents(self) -> int:
        return int(self._first_documents[-1])

    def read(self, start: int, stop: int) -> np.ndarray:
        """Returns tokens `start` to `stop`; raises DataError if a file is missing or damaged."""

        def read(number: int, start: int, stop: int) -> np.ndarray:
            shard = self._shards[number]
            return shard.read(self._open(shard.path), start, stop)

        return self._collect(start, stop, read)

    def marks(self, start: int, stop: int) -> np.ndarray:
        """Returns which of these tokens are marked; raises DataError like `read`."""

        def read(number: int, start: int, stop: int) -> np.ndarray:
            shard = self._shards[number]
            if shard.mask_path is None:
                return np.ones(stop - start, bool)
            return shard.marks(self._open(shard.mask_path), start, stop)

        return self._collect(start, stop, read)

    def document_ends(self) -> np.ndarray:
        """Returns where each document ends, exclusive; raises DataError like `read`."""
        parts = zip(self._shards, self._starts[:-1], strict=True)
        ends = [shard.ends() + start for shard, start in parts]
        return np.concatenate(ends) if ends else np.zeros(0, np.int64)

    def documents(self, start: int, stop: int) -> np.ndarray:
        """Returns the number of each token's document; raises DataError like `read`."""
        return self._collect(
            start, stop, lambda i, a, b: self._shards[i].documents(a, b) + self._first_documents[i]
        )

    def text(self, limit: int) -> bytes:
        """Returns what is marked of the first `limit` tokens' text; DataError like `read`."""
        stop = min(limit, len(self))
        tokens = self.read(0, stop)
        marked = tokens[self.marks(0, stop)] if self.has_mask else tokens
        return self._tokenizer.decode(marked).encode()

    def _collect(
        self, start: int, stop: int, read: Callable[[int, int, int], np.ndarray]
    ) -> np.ndarray:
        """Joins what `read(shard, start, stop)` returns for each shard that the range touches."""
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        arrays = []
        while start < stop:
            begin, end = int(self._starts[first]), int(self._starts[first + 1])
            arrays.append(read(first, start - begin, min(stop, end) - begin))
            start, first = end, first + 1
        if not arrays:
            return np.zeros(0, self._dtype)
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _opener(
    folder: Path | Store, records: Sequence[ShardRecord], cache_bytes: int
) -> Callable[[Any], OpenFile | StoreFile]:
    """What opens a file of the folder by its path."""
    if isinstance(folder, Path):
        return functools.lru_cache(_OPEN_FILES)(OpenFile)
    cache = shared_cache(cache_folder(), cache_bytes)
    # Of a folder that was prepared anew the checksums of some index are others.
    version = hashlib.sha256(repr([record.index_crc32 for record in records]).encode()).hexdigest()
    return lambda path: StoreFile(path, cache, version)


def _is_small(name: str) -> bool:
    """Whether a file of a prepared folder is not one of a shard's."""
    return "/" not in name and not name.endswith((TOKENS_SUFFIX, INDEX_SUFFIX, MASK_SUFFIX))


def _read_template(folder: Path, manifest: Manifest) -> bytes | None:
    """Reads the chat template of a folder of dialogues; DataError if it is another or missing."""
    expected = (manifest.settings.get("instructions") or {}).get("chat_template")
    if expected is None:
        return None
    path = folder / TEMPLATE_FILE
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot read it: {error.strerror}") from None
    if hashlib.sha256(content).hexdigest() != expected:
        raise DataError(f"{path}: damaged: its checksum is another")
    return content


def _canonical(content: Mapping[str, Any]) -> bytes:
    """Writes JSON in one way only, to be hashed."""
    return json.dumps(content, sort_keys=True).encode()
