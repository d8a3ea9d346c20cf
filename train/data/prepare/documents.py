"""What the readers of raw files share: parts of files, documents, and what is wrong with one."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple, Protocol, get_args

import numpy as np

from nha_jax.tokenizer.interface import Tokenizer
from train.data.packed_files import is_packed

RecordFormat = Literal["text", "json", "example"]
"""What a record of an ArrayRecord file is: UTF-8 text, a JSON object, or a tf.train.Example."""

RECORD_FORMATS: tuple[str, ...] = get_args(RecordFormat)

PACKED_RATIO = 4
"""How many times its size of text a packed file is taken to hold."""


@dataclass(frozen=True)
class FilePart:
    """A file, or a part of one that can be read by itself.

    Attributes:
        path: the file.
        size: bytes of the part in the file.
        text_bytes: bytes of text that the part is taken to hold.
        start, stop: the part's range of bytes, row groups, records, tokens or documents, as its
            format counts; None: the whole file.
    """

    path: Path
    size: int
    text_bytes: int
    start: int | None = None
    stop: int | None = None

    @property
    def range(self) -> tuple[int, int]:
        """The range of a part of a format that is always divided."""
        assert self.start is not None
        assert self.stop is not None
        return self.start, self.stop


class BadDocumentError(Exception):
    """Says which document cannot be used, and why."""


class TokenizedText(NamedTuple):
    """A document that came as tokens: its text, and the tokens [N] without the end token."""

    text: str
    tokens: np.ndarray


class MarkedTokens(NamedTuple):
    """A document of which some tokens are marked, which are to be learned.

    Attributes:
        identity: what decides whether it is held out.
        tokens: [N] int32, all of them.
        mask: [N] bool, which are marked.
        text_bytes: bytes of its text.
        target_bytes: see `train.data.token_shards.Marks`.
    """

    identity: str
    tokens: np.ndarray
    mask: np.ndarray
    text_bytes: int
    target_bytes: int


Document = str | TokenizedText | MarkedTokens


class Form(Protocol):
    """How records become documents.

    Attributes:
        options: the fields that are read of a record, and the option that names each. A field is a
            key in JSON, a column in tables, a feature in a tf.train.Example; a.b is b inside of a,
            unless there is one of that name.
    """

    @property
    def options(self) -> Mapping[str, str]: ...

    def document(self, values: Sequence[object]) -> Document | None:
        """Returns the document of a record; None if it is left out.

        Args:
            values: what is in each of the fields.

        Raises:
            BadDocumentError: it cannot be used.
        """

    def document_of_text(self, text: str) -> Document:
        """Returns the document of a file or record that is text; BadDocumentError if it is none."""


@dataclass(frozen=True)
class PlainText:
    """The form of records of which one field is the text."""

    text_key: str

    @property
    def options(self) -> Mapping[str, str]:
        return {self.text_key: "--text-key"}

    def document(self, values: Sequence[object]) -> Document:
        return checked_text(values[0], self.text_key)

    def document_of_text(self, text: str) -> Document:
        return text


@dataclass(frozen=True)
class Reading:
    """How documents are read.

    Attributes:
        form: how records become documents.
        tokenizer: whose tokens are in files of tokens.
        bad: called for each document that cannot be used; it may raise.
        progress: called with the bytes of the file read since the last call.
        record_format: what the records of ArrayRecord files are; None: there are none.
    """

    form: Form
    tokenizer: Tokenizer
    bad: Callable[[BadDocumentError], None]
    progress: Callable[[int], None]
    record_format: RecordFormat | None = None


ReadStream = Callable[[BinaryIO, str, Reading], Iterator[Document | None]]
"""A function that reads the documents of an open file, whose name in messages is given."""


class FileFormat(NamedTuple):
    """How files of a kind are read.

    Attributes:
        divide: returns the parts of a file, of about so many bytes of text each.
        read: reads the documents of a part in order; those without text, and None for those that
            are left out, may be among them.
        read_stream: of text, plain or in lines, reads the documents of an open file.
    """

    divide: Callable[[Path, int], list[FilePart]]
    read: Callable[[FilePart, Reading], Iterator[Document | None]]
    read_stream: ReadStream | None = None


def whole_file(path: Path, part_bytes: int = 0) -> list[FilePart]:
    """Returns a file as its only part: a `FileFormat.divide` of what cannot be divided."""
    size = path.stat().st_size
    return [FilePart(path, size, size * PACKED_RATIO if is_packed(path) else size)]


def look_up(record: Mapping[str, object], key: str) -> object:
    """Returns what is under `key`, or for a.b under b inside of a; raises KeyError if nothing."""
    if key in record:
        return record[key]
    for dot in reversed([n for n, letter in enumerate(key) if letter == "."]):
        inner = record.get(key[:dot])
        if isinstance(inner, Mapping):
            try:
                return look_up(inner, key[dot + 1 :])
            except KeyError:
                continue
    raise KeyError(key)


def checked_text(text: object, text_key: str) -> str:
    """Returns `text` if it is text, or bytes of it, as UTF-8; raises BadDocumentError if not."""
    if isinstance(text, bytes):
        try:
            return text.decode()
        except UnicodeDecodeError:
            raise BadDocumentError(f"{text_key!r} is not UTF-8 text") from None
    if not isinstance(text, str):
        raise BadDocumentError(f"{text_key!r} is {text!r:.40}, not text")
    try:
        text.encode()
    except UnicodeEncodeError:  # half of an escaped pair, "\ud800"
        raise BadDocumentError(f"{text_key!r} holds half a character (a lone surrogate)") from None
    return text
