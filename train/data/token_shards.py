"""Shards of tokens on disk, which are written whole or not at all and checked when they are read.

A shard is two files. NAME.tokens holds the tokens, little-endian, one document after the other.
NAME.index holds where each document ends (int64, exclusive) and then a checksum (CRC-32, uint32) of
every block, which is BLOCK_BYTES of the tokens. The checksum of the index itself is in the record
that a manifest keeps.

Where not every token is to be learned there is a third, NAME.mask: a byte for each token, 1 if the
token is marked and else 0. The checksums of its blocks follow those of the tokens in the index.
"""

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from nha_jax.storage.stores import Store
from train.data.checked_blocks import BlockReader, BlockWriter, OpenFile, block_count
from train.data.store_files import StoreFile
from train.errors import DataError
from train.storage.atomic import write_atomically

TOKENS_SUFFIX, INDEX_SUFFIX, MASK_SUFFIX = ".tokens", ".index", ".mask"

_MASK_DTYPE = np.dtype(np.uint8)


class Marks(NamedTuple):
    """Which tokens of documents are to be learned.

    Attributes:
        mask: [N] bool.
        target_bytes: bytes of the text that the marked tokens stand for, without that of a token
            which is a document's first and so no target.
    """

    mask: np.ndarray
    target_bytes: int


@dataclass(frozen=True)
class ShardRecord:
    """What a manifest keeps of a shard.

    Attributes:
        name: its files' name without the suffix.
        tokens: number of tokens, ends of documents included.
        documents: number of documents.
        text_bytes: bytes of the documents' text as UTF-8.
        index_crc32: checksum of the index.
        targets: of a shard with a mask, number of marked tokens that are not a document's first.
        target_bytes: of a shard with a mask, see `Marks`.
    """

    name: str
    tokens: int
    documents: int
    text_bytes: int
    index_crc32: int
    targets: int | None = None
    target_bytes: int | None = None

    @property
    def has_mask(self) -> bool:
        return self.targets is not None

    @property
    def num_targets(self) -> int:
        """Number of tokens that are targets: all but the first of a document, without a mask."""
        return self.tokens - self.documents if self.targets is None else self.targets

    @property
    def bytes_of_targets(self) -> int:
        """Bytes of the text that the targets stand for."""
        return self.text_bytes if self.target_bytes is None else self.target_bytes

    def sizes(self, dtype: np.dtype) -> dict[str, int]:
        """Returns the size in bytes of each of the two or three files, by name."""
        files = {TOKENS_SUFFIX: self.tokens * dtype.itemsize}
        if self.has_mask:
            files[MASK_SUFFIX] = self.tokens * _MASK_DTYPE.itemsize
        blocks = sum(map(block_count, files.values()))
        files[INDEX_SUFFIX] = 8 * self.documents + 4 * blocks
        return {self.name + suffix: size for suffix, size in files.items()}

    def check_sizes(
        self, folder: Path | Store, dtype: np.dtype, present: Mapping[str, int] | None = None
    ) -> None:
        """Raises DataError if a file is missing or has another size.

        Args:
            folder: the folder.
            dtype: of the tokens.
            present: the sizes of the files there, by name; None: the disk is asked.
        """
        for name, expected in self.sizes(dtype).items():
            size = _size(folder, name, present)
            if size != expected:
                path = folder / name
                raise DataError(f"{path}: damaged: it has {size} bytes instead of {expected}")


def _size(folder: Path | Store, name: str, present: Mapping[str, int] | None) -> int:
    """The size of a file; DataError if it is missing."""
    if present is None:
        path = folder / name
        assert isinstance(path, Path)
        try:
            return path.stat().st_size
        except OSError as error:
            raise DataError(f"{path}: cannot read it: {error.strerror}") from None
    if name not in present:
        raise DataError(f"{folder / name}: cannot read it: it is not there")
    return present[name]


class ShardWriter:
    """Writes one shard. Use it with `with`; unless `close` is called, no file is left.

    with ShardWriter(folder, "training-00000", np.dtype(np.uint16), with_mask=True) as writer:
        writer.add(tokens, ends, text_bytes, Marks(mask, target_bytes))
        record = writer.close()
    """

    def __init__(self, folder: Path, name: str, dtype: np.dtype, *, with_mask: bool = False):
        self._name = name
        self._index_path = folder / (name + INDEX_SUFFIX)
        self._tokens_file = BlockWriter(folder / (name + TOKENS_SUFFIX), dtype)
        self._mask_file = (
            BlockWriter(folder / (name + MASK_SUFFIX), _MASK_DTYPE) if with_mask else None
        )
        self._ends: list[np.ndarray] = []
        self._tokens = self._text_bytes = self._targets = self._target_bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._tokens_file.__exit__(*exception)
        if self._mask_file is not None:
            self._mask_file.__exit__(*exception)

    def add(
        self, tokens: np.ndarray, ends: np.ndarray, text_bytes: int, marks: Marks | None = None
    ) -> None:
        """Appends documents, none of which is without a token.

        Args:
            tokens: [N], those of all documents.
            ends: [documents], where each document ends in them, exclusive.
            text_bytes: bytes of the documents' text.
            marks: of a shard with a mask, which of the tokens are marked.
        """
        assert (marks is None) == (self._mask_file is None)
        self._ends.append(ends + self._tokens)
        self._tokens += len(tokens)
        self._text_bytes += text_bytes
        self._tokens_file.add(tokens)
        if marks is not None and self._mask_file is not None:
            self._mask_file.add(marks.mask)
            is_first = np.zeros(len(tokens), bool)
            is_first[np.concatenate([[0], ends[:-1]]).astype(np.int64)] = True
            self._targets += int((marks.mask & ~is_first).sum())
            self._target_bytes += marks.target_bytes

    def close(self) -> ShardRecord | None:
        """Puts all files in place; returns None, and leaves no files, if no document was added."""
        if not self._tokens:
            return None
        ends = np.concatenate(self._ends).astype("<i8")
        parts = [ends, self._tokens_file.commit()]
        if self._mask_file is not None:
            parts.append(self._mask_file.commit())
        index = b"".join(part.tobytes() for part in parts)
        write_atomically(self._index_path, index)
        marked = (self._targets, self._target_bytes) if self._mask_file is not None else ()
        return ShardRecord(
            self._name, self._tokens, len(ends), self._text_bytes, zlib.crc32(index), *marked
        )


class ShardReader:
    """Reads one shard, for any number of threads.

    The index (8 bytes for each document) is read with the first tokens and kept. A block's checksum
    is verified when the block is first read.
    """

    def __init__(
        self,
        folder: Path | Store,
        record: ShardRecord,
        dtype: np.dtype,
        open_file: Callable[[Any], OpenFile | StoreFile] = OpenFile,
    ):
        """Opens nothing yet; `open_file` opens a file of the folder."""
        self._open_file = open_file
        self._record, self._dtype = record, dtype
        self._tokens = BlockReader(folder / (record.name + TOKENS_SUFFIX), dtype, record.tokens)
        self._mask = BlockReader(folder / (record.name + MASK_SUFFIX), _MASK_DTYPE, record.tokens)
        self._index_path: Path | Store = folder / (record.name + INDEX_SUFFIX)
        self._index: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def path(self) -> Path | Store:
        """The file of the tokens."""
        return self._tokens.path

    @property
    def mask_path(self) -> Path | Store | None:
        """The file of the mask, if there is one."""
        return self._mask.path if self._record.has_mask else None

    def ends(self) -> np.ndarray:
        """Returns where each document ends, exclusive: [documents] int64.

        Raises:
            DataError: the index is missing or damaged.
        """
        return self._load_index()[0]

    def documents(self, start: int, stop: int) -> np.ndarray:
        """Returns the number, within the shard, of each token's document: [stop - start] int64.

        Raises:
            DataError: the index is missing or damaged.
        """
        return np.searchsorted(self.ends(), np.arange(start, stop), side="right")

    def read(self, file: OpenFile | StoreFile, start: int, stop: int) -> np.ndarray:
        """Returns tokens `start` to `stop`, [stop - start] of the shard's dtype.

        Raises:
            DataError: a file is missing, too short, or has another content than was written.
        """
        return self._tokens.read(file, start, stop, lambda: self._load_index()[1])

    def marks(self, file: OpenFile | StoreFile, start: int, stop: int) -> np.ndarray:
        """Returns which of tokens `start` to `stop` are marked, [stop - start] bool.

        Raises:
            DataError: like `read`.
        """
        tokens_blocks = block_count(self._record.tokens * self._dtype.itemsize)
        checksums = lambda: self._load_index()[1][tokens_blocks:]  # noqa: E731
        return self._mask.read(file, start, stop, checksums) != 0

    def _load_index(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the ends of documents and the checksums of blocks."""
        if self._index is None:
            documents = 8 * self._record.documents
            size = self._record.sizes(self._dtype)[self._index_path.name]
            file = self._open_file(self._index_path)
            content = file.read(0, size)
            if zlib.crc32(content) != self._record.index_crc32 and file.refresh(0, size):
                content = file.read(0, size)
            if zlib.crc32(content) != self._record.index_crc32:
                raise DataError(f"{self._index_path}: damaged: its checksum is another")
            self._index = (
                np.frombuffer(content[:documents], "<i8"),
                np.frombuffer(content[documents:], "<u4"),
            )
        return self._index
