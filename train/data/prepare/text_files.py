"""Reads plain text, which is one document a file."""

import codecs
from collections.abc import Iterator
from typing import BinaryIO

from train.data.packed_files import open_unpacked
from train.data.prepare.documents import (
    BadDocumentError,
    Document,
    FileFormat,
    FilePart,
    Reading,
    whole_file,
)


def _read(part: FilePart, reading: Reading) -> Iterator[Document]:
    with open_unpacked(part.path) as file:
        yield from _read_stream(file, str(part.path), reading)
    reading.progress(part.size)


def _read_stream(file: BinaryIO, name: str, reading: Reading) -> Iterator[Document]:
    content = file.read()
    try:
        yield reading.form.document_of_text(content.removeprefix(codecs.BOM_UTF8).decode())
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        reading.bad(BadDocumentError(f"{name}, line {line}: not UTF-8 text"))
    except BadDocumentError as error:
        reading.bad(BadDocumentError(f"{name}: {error}"))


TEXT = FileFormat(whole_file, _read, _read_stream)
