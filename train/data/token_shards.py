"""Shards of tokens on disk, which are written whole or not at all and checked when they are read.

A shard is two files. NAME.tokens holds the tokens, little-endian, one document after the other.
NAME.index holds where each document ends (int64, exclusive) and then a checksum (CRC-32, uint32) of
every block, which is BLOCK_BYTES of the tokens. The checksum of the index itself is in the record
that a manifest keeps.
"""

import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from train.errors import DataError
from train.storage.atomic import Replacement, write_atomically

BLOCK_BYTES = 1 << 16
"""Bytes of tokens with one checksum. A sequence of a few thousand tokens lies in one or two blocks,
so that reading it for the first time costs little more than reading it again."""

TOKENS_SUFFIX, INDEX_SUFFIX = ".tokens", ".index"


@dataclass(frozen=True)
class ShardRecord:
    """What a manifest keeps of a shard.

    Attributes:
        name: its files' name without the suffix.
        tokens: number of tokens, ends of documents included.
        documents: number of documents.
        text_bytes: bytes of the documents' text as UTF-8.
        index_crc32: checksum of the index.
    """

    name: str
    tokens: int
    documents: int
    text_bytes: int
    index_crc32: int

    def sizes(self, dtype: np.dtype) -> dict[str, int]:
        """Returns the size in bytes of each of the two files, by name."""
        token_bytes = self.tokens * dtype.itemsize
        blocks = -(-token_bytes // BLOCK_BYTES)
        return {
            self.name + TOKENS_SUFFIX: token_bytes,
            self.name + INDEX_SUFFIX: 8 * self.documents + 4 * blocks,
        }

    def check_sizes(self, folder: Path, dtype: np.dtype) -> None:
        """Raises DataError if a file is missing or has another size."""
        for name, expected in self.sizes(dtype).items():
            path = folder / name
            try:
                size = path.stat().st_size
            except OSError as error:
                raise DataError(f"{path}: cannot read it: {error.strerror}") from None
            if size != expected:
                raise DataError(f"{path}: damaged: it has {size} bytes instead of {expected}")


class ShardWriter:
    """Writes one shard. Use it with `with`; unless `close` is called, no file is left."""

    def __init__(self, folder: Path, name: str, dtype: np.dtype):
        self._name = name
        self._dtype = dtype.newbyteorder("<")
        self._index_path = folder / (name + INDEX_SUFFIX)
        self._tokens_file = Replacement(folder / (name + TOKENS_SUFFIX))
        self._pending = bytearray()
        self._checksums: list[int] = []
        self._ends: list[np.ndarray] = []
        self._tokens = self._text_bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._tokens_file.close()

    def add(self, tokens: np.ndarray, ends: np.ndarray, text_bytes: int) -> None:
        """Appends documents: tokens [N], their ends [documents], and the bytes of their text."""
        self._ends.append(ends + self._tokens)
        self._tokens += len(tokens)
        self._text_bytes += text_bytes
        self._pending += tokens.astype(self._dtype).tobytes()
        self._write(len(self._pending) - len(self._pending) % BLOCK_BYTES)

    def close(self) -> ShardRecord | None:
        """Puts both files in place; returns None, and leaves no files, if no document was added."""
        if not self._tokens:
            return None
        self._write(len(self._pending))
        self._tokens_file.commit()
        ends = np.concatenate(self._ends).astype("<i8")
        index = ends.tobytes() + np.array(self._checksums, "<u4").tobytes()
        write_atomically(self._index_path, index)
        return ShardRecord(self._name, self._tokens, len(ends), self._text_bytes, zlib.crc32(index))

    def _write(self, size: int) -> None:
        """Writes the first `size` pending bytes: whole blocks, or at the end all that is left."""
        for start in range(0, size, BLOCK_BYTES):
            block = bytes(self._pending[start : min(start + BLOCK_BYTES, size)])
            self._checksums.append(zlib.crc32(block))
            self._tokens_file.file.write(block)
        del self._pending[:size]


class OpenFile:
    """An open file that threads may share; it is closed when nothing refers to it any more."""

    def __init__(self, path: Path):
        """Opens the file; raises DataError if it cannot be opened."""
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise DataError(f"{path}: cannot read it: {error.strerror}") from None

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def read(self, start: int, stop: int) -> bytes:
        """Returns bytes `start` to `stop`; raises DataError if the file ends before `stop`."""
        parts = []
        try:
            while start < stop:
                # A memory map would kill the process with SIGBUS if the file was truncated.
                part = os.pread(self._descriptor, stop - start, start)
                if not part:
                    raise DataError(f"{self.path}: damaged: it ends at byte {start}")
                parts.append(part)
                start += len(part)
        except OSError as error:
            raise DataError(f"{self.path}: cannot read it: {error.strerror}") from None
        return parts[0] if len(parts) == 1 else b"".join(parts)


class ShardReader:
    """Reads one shard, for any number of threads.

    The index (8 bytes for each document) is read with the first tokens and kept. A block's checksum
    is verified when the block is first read.
    """

    def __init__(self, folder: Path, record: ShardRecord, dtype: np.dtype):
        self._record, self._dtype = record, dtype.newbyteorder("<")
        self._tokens_path = folder / (record.name + TOKENS_SUFFIX)
        self._index_path = folder / (record.name + INDEX_SUFFIX)
        self._size = record.tokens * dtype.itemsize
        self._verified = bytearray(-(-self._size // BLOCK_BYTES))
        self._index: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def path(self) -> Path:
        """The file of the tokens."""
        return self._tokens_path

    def documents(self, start: int, stop: int) -> np.ndarray:
        """Returns the number, within the shard, of each token's document: [stop - start] int64.

        Raises:
            DataError: the index is missing or damaged.
        """
        ends, _ = self._load_index()
        return np.searchsorted(ends, np.arange(start, stop), side="right")

    def read(self, file: OpenFile, start: int, stop: int) -> np.ndarray:
        """Returns tokens `start` to `stop`, [stop - start] of the shard's dtype.

        Raises:
            DataError: a file is missing, too short, or has another content than was written.
        """
        width = self._dtype.itemsize
        first, last = start * width, stop * width
        blocks = range(first // BLOCK_BYTES, -(-last // BLOCK_BYTES))
        if all(self._verified[block] for block in blocks):
            return np.frombuffer(file.read(first, last), self._dtype)
        offset = blocks.start * BLOCK_BYTES
        content = file.read(offset, min(blocks.stop * BLOCK_BYTES, self._size))
        _, checksums = self._load_index()
        for block in blocks:
            begin = block * BLOCK_BYTES - offset
            if zlib.crc32(memoryview(content)[begin : begin + BLOCK_BYTES]) != checksums[block]:
                raise DataError(
                    f"{self._tokens_path}: damaged: the checksum of bytes {offset + begin} to "
                    f"{min(offset + begin + BLOCK_BYTES, self._size)} is another"
                )
            self._verified[block] = 1
        return np.frombuffer(content, self._dtype)[start - offset // width : stop - offset // width]

    def _load_index(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the ends of documents and the checksums of blocks."""
        if self._index is None:
            documents = 8 * self._record.documents
            size = documents + 4 * len(self._verified)
            content = OpenFile(self._index_path).read(0, size)
            if zlib.crc32(content) != self._record.index_crc32:
                raise DataError(f"{self._index_path}: damaged: its checksum is another")
            self._index = (
                np.frombuffer(content[:documents], "<i8"),
                np.frombuffer(content[documents:], "<u4"),
            )
        return self._index
