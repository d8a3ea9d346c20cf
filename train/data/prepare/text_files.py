"""Reads plain text, which is one document a file."""

import codecs
from collections.abc import Iterator
from typing import BinaryIO

from train.data.packed_files import open_unpacked
from train.data.prepare.documents import BadDocumentError, FileFormat, FilePart, Reading, whole_file


def _read(part: FilePart, reading: Reading) -> Iterator[str]:
    with open_unpacked(part.path) as file:
        yield from _read_stream(file, str(part.path), reading)
    reading.progress(part.size)


def _read_stream(file: BinaryIO, name: str, reading: Reading) -> Iterator[str]:
    content = file.read()
    try:
        yield content.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        reading.bad(BadDocumentError(f"{name}, line {line}: not UTF-8 text"))


TEXT = FileFormat(whole_file, _read, _read_stream)
