"""Reads the token files of llm.c: a header of 256 int32, and tokens without an index.

The header holds a magic number that says the tokens' type, a version, and how many they are. An end
token stands before each document, and a document may go on in the next file.
"""

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from nha_jax.tokenizer.interface import Tokenizer
from train.data.prepare.documents import FilePart, Reading, TokenizedText
from train.data.prepare.token_documents import BYTES_PER_TOKEN, checked_document, document_starts
from train.errors import DataError

_HEADER_BYTES = 1024
_DTYPES: dict[tuple[int, int], np.dtype] = {
    (20240520, 1): np.dtype("<u2"),
    (20240801, 7): np.dtype("<u4"),
}
"""The tokens' type by magic number and version."""

_READ_TOKENS = 1 << 18


class _Header(NamedTuple):
    dtype: np.dtype
    tokens: int

    def read(self, file: BinaryIO, start: int, stop: int) -> np.ndarray:
        """Returns tokens `start` to `stop`; raises EOFError if they are not there any more."""
        file.seek(_HEADER_BYTES + start * self.dtype.itemsize)
        content = file.read((stop - start) * self.dtype.itemsize)
        if len(content) < (stop - start) * self.dtype.itemsize:
            raise EOFError("it ends too early")
        return np.frombuffer(content, self.dtype)


def divide_llmc(path: Path, part_bytes: int) -> list[FilePart]:
    """Divides by tokens; a document belongs to the part in which it begins."""
    with path.open("rb") as file:
        header = _read_header(file, path)
    step, width = max(part_bytes // BYTES_PER_TOKEN, 1), header.dtype.itemsize
    ranges = ((n, min(n + step, header.tokens)) for n in range(0, header.tokens, step))
    return [
        FilePart(path, (stop - start) * width, (stop - start) * BYTES_PER_TOKEN, start, stop)
        for start, stop in ranges
    ]


def read_llmc(part: FilePart, reading: Reading) -> Iterator[TokenizedText]:
    """Reads the documents that begin in a part."""
    with part.path.open("rb") as file:
        header = _read_header(file, part.path)
        for first, tokens in _documents(file, header, part, reading.tokenizer):
            document = checked_document(tokens, part.path, first, reading.tokenizer)
            if document:
                yield document
    reading.progress(part.size)


def _documents(
    file: BinaryIO, header: _Header, part: FilePart, tokenizer: Tokenizer
) -> Iterator[tuple[int, np.ndarray]]:
    """Gives the number of the first token and the tokens of each document of a part."""
    start, stop = part.range
    before = int(header.read(file, start - 1, start)[0]) if start else tokenizer.end_token
    position, first, begun = start, start, False
    pieces: list[np.ndarray] = []  # of the document that has begun
    while position < (limit := header.tokens if begun else stop):
        tokens = header.read(file, position, min(position + _READ_TOKENS, limit))
        taken = 0
        for begin in document_starts(tokens, before, tokenizer):
            if begun:
                yield first, np.concatenate([*pieces, tokens[taken:begin]])
            if position + begin >= stop:
                return
            first, begun, pieces, taken = position + int(begin), True, [], int(begin)
        pieces.append(tokens[taken:])
        before = int(tokens[-1])
        position += len(tokens)
    if begun:
        yield first, np.concatenate(pieces)


def _read_header(file: BinaryIO, path: Path) -> _Header:
    """Reads the header; raises DataError if it is another file's, or the file is not whole."""
    content = file.read(_HEADER_BYTES)
    magic, version, tokens = struct.unpack("<3i", content[:12].ljust(12, b"\0"))
    dtype = _DTYPES.get((magic, version))
    if dtype is None:
        raise DataError(
            f"{path}: not tokens that can be read: expected llm.c's, which begin with the numbers "
            f"20240520 and 1, or Megatron's, with their index beside them, {path.stem}.idx"
        )
    expected = _HEADER_BYTES + tokens * dtype.itemsize
    size = os.fstat(file.fileno()).st_size
    if size != expected:
        raise DataError(f"{path}: damaged: it has {size} bytes instead of {expected}")
    return _Header(dtype, tokens)
