"""Text to tokens and back: bytes, or a Hugging Face `tokenizer.json`."""

import codecs
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from train.data.input_files import import_extra
from train.errors import ConfigError, DataError

END_OF_DOCUMENT = 256
"""The token after each document of bytes; tokens below it are byte values."""

BYTE_VOCABULARY = END_OF_DOCUMENT + 1

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"

END_TOKENS = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>")
"""Names that are taken for the end of a document where none is told."""


class Decoder(Protocol):
    """Tokens to text as they come."""

    def add(self, token: int) -> str:
        """What is certain after this token: "" as long as a character is not complete."""

    def finish(self) -> str:
        """The rest; what is not complete comes out as the replacement character."""


class Tokenizer(Protocol):
    """Both directions of one vocabulary.

    Attributes:
        name: "bytes", or the checksum of the tokenizer.json: another vocabulary has another one.
        vocabulary_size: tokens, the end of a document included.
        end_token: the token after each document.
        files: name -> content, what `load_tokenizer` needs; empty for bytes.
    """

    name: str
    vocabulary_size: int
    end_token: int
    files: Mapping[str, bytes]

    def encode(self, text: str) -> np.ndarray:
        """[tokens] int32, without any special token.

        Lone surrogates stand for bytes that are not UTF-8.
        """

    def encode_documents(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Documents closed by `end_token`, one after the other.

        Returns:
            The tokens [N], and where each document's end, exclusive: [documents] int64.
        """

    def decode(self, tokens: np.ndarray) -> str:
        """The text of tokens [N]; ends of documents and other special tokens are left out."""

    def decoder(self, prompt: np.ndarray) -> Decoder:
        """For what comes after the tokens of `prompt` [N]."""


class ByteTokenizer:
    """UTF-8 bytes, and END_OF_DOCUMENT; see `Tokenizer`."""

    name = "bytes"
    vocabulary_size = BYTE_VOCABULARY
    end_token = END_OF_DOCUMENT
    files: Mapping[str, bytes] = {}

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(_to_bytes(text), np.uint8).astype(np.int32)

    def encode_documents(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        return join_documents([text.encode() for text in texts])

    def decode(self, tokens: np.ndarray) -> str:
        return tokens[tokens < END_OF_DOCUMENT].astype(np.uint8).tobytes().decode(errors="replace")

    def decoder(self, prompt: np.ndarray) -> Decoder:
        return _ByteDecoder()


def join_documents(contents: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Documents of bytes, each closed by END_OF_DOCUMENT: tokens [N] uint16, ends int64."""
    ends = np.cumsum([len(content) + 1 for content in contents], dtype=np.int64)
    tokens = np.full(ends[-1] if len(ends) else 0, END_OF_DOCUMENT, np.uint16)
    for content, end in zip(contents, ends, strict=True):
        tokens[end - 1 - len(content) : end - 1] = np.frombuffer(content, np.uint8)
    return tokens, ends


class _ByteDecoder:
    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token: int) -> str:
        return self._decoder.decode(bytes([token]) if token < END_OF_DOCUMENT else b"")

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class FileTokenizer:
    """A `tokenizer.json`; see `Tokenizer`.

    The names of special tokens in a text are text like any other: no document can hold the token
    that ends it, however it was written.
    """

    def __init__(self, content: bytes, end_token: str | None, where: str):
        """Reads the tokenizer.

        Args:
            content: of the file.
            end_token: name of the token after each document; None: one of END_TOKENS.
            where: what errors call the file.

        Raises:
            ConfigError: it is no tokenizer, or has no such token; or the package tokenizers is
                not installed.
        """
        tokenizers = import_extra("tokenizers")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(content.decode())
        except Exception as error:  # the package raises nothing more specific
            raise ConfigError(f"{where}: not a tokenizer.json: {_one_line(error)}") from None
        # A file may have been saved with these switched on, and would cut documents.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        name, self.end_token = self._find_end_token(end_token, where)
        # Ids need not be without gaps, so the largest counts, not the number of them.
        self.vocabulary_size = max(self._tokenizer.get_vocab().values()) + 1
        self.name = hashlib.sha256(content).hexdigest()
        settings = json.dumps({"eos_token": name}, indent=2) + "\n"
        self.files: Mapping[str, bytes] = {
            TOKENIZER_FILE: content,
            TOKENIZER_CONFIG_FILE: settings.encode(),
        }

    def _find_end_token(self, wanted: str | None, where: str) -> tuple[str, int]:
        for name in END_TOKENS if wanted is None else (wanted,):
            number = self._tokenizer.token_to_id(name)
            if number is not None:
                return name, number
        if wanted is not None:
            raise ConfigError(f"--end-token = {wanted!r}: {where} has no such token")
        special = [token.content for token in self._tokenizer.get_added_tokens_decoder().values()]
        raise ConfigError(
            f"{where}: none of its tokens is called {', '.join(END_TOKENS)}; name the one that "
            f"ends a document with --end-token (its special tokens: {', '.join(special) or 'none'})"
        )

    def encode(self, text: str) -> np.ndarray:
        clean = _to_bytes(text).decode(errors="replace")
        return np.array(self._tokenizer.encode(clean, add_special_tokens=False).ids, np.int32)

    def encode_documents(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        parts = [np.array([*encoding.ids, self.end_token], np.int32) for encoding in encodings]
        ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
        return np.concatenate(parts) if parts else np.zeros(0, np.int32), ends

    def decode(self, tokens: np.ndarray) -> str:
        return self._tokenizer.decode(tokens.tolist(), skip_special_tokens=True)

    def decoder(self, prompt: np.ndarray) -> Decoder:
        return _FileDecoder(self, prompt)


class _FileDecoder:
    """Decodes the last few tokens over and over: how a token reads depends on those before it."""

    _CONTEXT = 8

    def __init__(self, tokenizer: FileTokenizer, prompt: np.ndarray):
        self._tokenizer = tokenizer
        self._tokens = [int(token) for token in prompt[-self._CONTEXT :]]
        self._shown = len(self._tokens)  # of _tokens, how many are in the text already

    def add(self, token: int) -> str:
        self._tokens.append(token)
        text = self._new_text()
        if not text or text.endswith("\ufffd"):  # the first bytes of a character
            return ""
        self._tokens = self._tokens[-self._CONTEXT :]
        self._shown = len(self._tokens)
        return text

    def finish(self) -> str:
        text, self._shown = self._new_text(), len(self._tokens)
        return text

    def _new_text(self) -> str:
        before = self._tokenizer.decode(np.array(self._tokens[: self._shown], np.int32))
        return self._tokenizer.decode(np.array(self._tokens, np.int32))[len(before) :]


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer whose files lie in a folder; that of bytes if there are none.

    Raises:
        ConfigError: see `FileTokenizer`.
        DataError: one of the two files is missing or damaged.
    """
    file, settings = folder / TOKENIZER_FILE, folder / TOKENIZER_CONFIG_FILE
    if not file.exists() and not settings.exists():
        return ByteTokenizer()
    try:
        content = file.read_bytes()
        end_token = json.loads(settings.read_bytes())["eos_token"]
    except OSError as error:
        raise DataError(f"{error.filename}: cannot read it: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{settings}: damaged: expected JSON with the key eos_token") from None
    return FileTokenizer(content, end_token, str(file))


def _to_bytes(text: str) -> bytes:
    return text.encode(errors="surrogateescape")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
