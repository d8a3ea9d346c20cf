"""Files of numbers in blocks, each with a checksum that is verified when it is first read."""

import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Self

import numpy as np

from nha_jax.storage.stores import Store
from train.data.store_files import StoreFile
from train.errors import DataError
from train.storage.atomic import Replacement

BLOCK_BYTES = 1 << 16
"""Bytes of a file with one checksum. A sequence of a few thousand tokens lies in one or two blocks,
so that reading it for the first time costs little more than reading it again."""


def block_count(size: int) -> int:
    """Counts the blocks of a file of `size` bytes."""
    return -(-size // BLOCK_BYTES)


class BlockWriter:
    """Writes a file, little-endian. Use it with `with`; unless `commit` is called, none is left."""

    def __init__(self, path: Path, dtype: np.dtype):
        self._dtype = dtype.newbyteorder("<")
        self._replacement = Replacement(path)
        self._pending = bytearray()
        self._checksums: list[int] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._replacement.close()

    def add(self, numbers: np.ndarray) -> None:
        """Appends numbers [N]."""
        self._pending += numbers.astype(self._dtype).tobytes()
        self._write(len(self._pending) - len(self._pending) % BLOCK_BYTES)

    def commit(self) -> np.ndarray:
        """Puts the file in place; returns the checksums (CRC-32) of its blocks, uint32."""
        self._write(len(self._pending))
        self._replacement.commit()
        return np.array(self._checksums, "<u4")

    def _write(self, size: int) -> None:
        """Writes the first `size` pending bytes: whole blocks, or at the end all that is left."""
        for start in range(0, size, BLOCK_BYTES):
            block = bytes(self._pending[start : min(start + BLOCK_BYTES, size)])
            self._checksums.append(zlib.crc32(block))
            self._replacement.file.write(block)
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

    def refresh(self, start: int, stop: int) -> bool:
        """Says that reading these bytes once more gives the same: they are no copy."""
        return False

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


class BlockReader:
    """Reads what a `BlockWriter` wrote, for any number of threads.

    Attributes:
        path: the file.
    """

    def __init__(self, path: Path | Store, dtype: np.dtype, count: int):
        """Opens nothing yet; the file holds `count` numbers."""
        self.path = path
        self._dtype = dtype.newbyteorder("<")
        self._size = count * dtype.itemsize
        self._verified = bytearray(block_count(self._size))

    def read(
        self,
        file: OpenFile | StoreFile,
        start: int,
        stop: int,
        checksums: Callable[[], np.ndarray],
    ) -> np.ndarray:
        """Returns numbers `start` to `stop`, [stop - start].

        Args:
            file: the file, open; of a copy that is damaged the original is fetched.
            start, stop: which of its numbers.
            checksums: gives the checksums of its blocks, if one is to be verified.

        Raises:
            DataError: the file is too short, or has another content than was written.
        """
        width = self._dtype.itemsize
        first, last = start * width, stop * width
        blocks = range(first // BLOCK_BYTES, block_count(last))
        if all(self._verified[block] for block in blocks):
            return np.frombuffer(file.read(first, last), self._dtype)
        offset = blocks.start * BLOCK_BYTES
        end = min(blocks.stop * BLOCK_BYTES, self._size)
        content, expected = file.read(offset, end), checksums()
        damaged = _first_damaged(content, expected[blocks.start : blocks.stop])
        if damaged is not None and file.refresh(offset, end):
            content = file.read(offset, end)
            damaged = _first_damaged(content, expected[blocks.start : blocks.stop])
        if damaged is not None:
            begin = offset + damaged * BLOCK_BYTES
            raise DataError(
                f"{self.path}: damaged: the checksum of bytes {begin} to "
                f"{min(begin + BLOCK_BYTES, self._size)} is another"
            )
        for block in blocks:
            self._verified[block] = 1
        return np.frombuffer(content, self._dtype)[start - offset // width : stop - offset // width]


def _first_damaged(content: bytes, checksums: np.ndarray) -> int | None:
    """Returns the first of the blocks of `content` whose checksum is another; None if none is."""
    for block, expected in enumerate(checksums):
        part = memoryview(content)[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES]
        if zlib.crc32(part) != expected:
            return block
    return None
