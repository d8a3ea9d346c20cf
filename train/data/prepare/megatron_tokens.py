"""Reads the token files of Megatron-LM: X.bin holds tokens only, and X.idx says what they are.

The index is, little-endian: b"MMIDIDX\\0\\0", the version (uint64), a code of the tokens' type
(uint8), the number S of sequences and D of ends of documents (uint64); then of each sequence its
length in tokens (int32) and its first byte (int64), and the first sequence of each document, with
S behind the last (int64). An index of several modalities has a byte more for each sequence.
"""

import itertools
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from train.data.packed_files import naming
from train.data.prepare.documents import FilePart, Reading, TokenizedText
from train.data.prepare.file_groups import index_of
from train.data.prepare.token_documents import BYTES_PER_TOKEN, checked_document, document_starts
from train.errors import DataError

_HEADER = struct.Struct("<9sQBQQ")
_MAGIC, _VERSION = b"MMIDIDX\0\0", 1
_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
"""The tokens' type by its code; those of fractions are left out."""


def divide_megatron(path: Path, part_bytes: int) -> list[FilePart]:
    """Divides by documents, after the whole index was checked."""
    index = _Index.open(index_of(path))
    starts = index.checked_starts(path.stat().st_size)
    step = max(part_bytes // BYTES_PER_TOKEN, 1)
    firsts = np.unique(np.searchsorted(starts[:-1], np.arange(0, starts[-1], step)))
    parts = []
    for first, stop in itertools.pairwise([*firsts.tolist(), index.documents]):
        tokens = int(starts[stop] - starts[first])
        size = tokens * index.dtype.itemsize
        parts.append(FilePart(path, size, tokens * BYTES_PER_TOKEN, first, stop))
    return [part for part in parts if part.size]


def read_megatron(part: FilePart, reading: Reading) -> Iterator[TokenizedText]:
    """Reads the documents of a part; one that holds an end token is several."""
    index, tokenizer = _Index.open(index_of(part.path)), reading.tokenizer
    bounds = index.starts(*part.range)
    width = index.dtype.itemsize
    with part.path.open("rb") as file:
        for start, stop in itertools.pairwise(bounds.tolist()):
            file.seek(start * width)
            content = file.read((stop - start) * width)
            if len(content) < (stop - start) * width:
                raise EOFError("it ends too early")
            tokens = np.frombuffer(content, index.dtype)
            inner = document_starts(tokens, tokenizer.end_token, tokenizer)
            for first, end in itertools.pairwise([*inner.tolist(), len(tokens)]):
                document = checked_document(tokens[first:end], part.path, start + first, tokenizer)
                if document:
                    yield document
    reading.progress(part.size)


class _Index(NamedTuple):
    path: Path
    dtype: np.dtype
    sequences: int
    documents: int

    @classmethod
    def open(cls, path: Path) -> "_Index":
        """Reads the header; raises DataError if it is another file's, or the file is not whole."""
        with naming(path, DataError), path.open("rb") as file:
            header = file.read(_HEADER.size)
            size = os.fstat(file.fileno()).st_size
        if len(header) < _HEADER.size or not header.startswith(_MAGIC):
            raise DataError(f"{path}: no index of Megatron's, which begins with MMIDIDX")
        _, version, code, sequences, ends = _HEADER.unpack(header)
        if version != _VERSION or code not in _DTYPES:
            raise DataError(
                f"{path}: version {version}, tokens of type {code}; expected version {_VERSION} "
                f"and one of the types {', '.join(map(str, _DTYPES))}, which are integers"
            )
        expected = _HEADER.size + 12 * sequences + 8 * ends
        if size not in (expected, expected + sequences) or not ends:
            raise DataError(f"{path}: damaged: it has {size} bytes instead of {expected}")
        return cls(path, np.dtype(_DTYPES[code]), sequences, ends - 1)

    def checked_starts(self, token_bytes: int) -> np.ndarray:
        """Returns `starts` of all documents; DataError unless they are all of so many bytes."""
        lengths, pointers = self._sequences(0, self.sequences)
        ends = np.cumsum(lengths * self.dtype.itemsize)
        firsts = self._array(12 * self.sequences, "<i8", 0, self.documents + 1)
        in_order = (
            (lengths >= 0).all()
            and (pointers == ends - lengths * self.dtype.itemsize).all()
            and (np.diff(firsts, prepend=0, append=self.sequences) >= 0).all()
            and firsts[0] == 0
            and firsts[-1] == self.sequences
        )
        if not in_order:
            raise DataError(f"{self.path}: damaged: its sequences do not follow each other")
        expected = int(ends[-1]) if len(ends) else 0
        if token_bytes != expected:
            raise DataError(
                f"{self.path.with_suffix('.bin')}: damaged: it has {token_bytes} bytes instead of "
                f"the {expected} of its index"
            )
        return self.starts(0, self.documents)

    def starts(self, first: int, stop: int) -> np.ndarray:
        """Returns where documents begin, in tokens, and where the last ends: [stop - first + 1]."""
        firsts = self._array(12 * self.sequences, "<i8", first, stop + 1)
        lengths, pointers = self._sequences(int(firsts[0]), int(firsts[-1]))
        if not len(lengths):
            return np.zeros(len(firsts), np.int64)
        bounds = np.append(pointers // self.dtype.itemsize, 0)
        bounds[-1] = bounds[-2] + lengths[-1]
        return bounds[firsts - firsts[0]]

    def _sequences(self, first: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the lengths in tokens, and the first bytes, of sequences, both int64."""
        lengths = self._array(0, "<i4", first, stop).astype(np.int64)
        return lengths, self._array(4 * self.sequences, "<i8", first, stop)

    def _array(self, offset: int, dtype: str, start: int, stop: int) -> np.ndarray:
        """Reads elements `start` to `stop` of the array at a byte behind the header."""
        width = np.dtype(dtype).itemsize
        with naming(self.path, DataError), self.path.open("rb") as file:
            file.seek(_HEADER.size + offset + start * width)
            content = file.read((stop - start) * width)
            if len(content) < (stop - start) * width:
                raise EOFError("it ends too early")
        return np.frombuffer(content, dtype)
