"""Text to tokens and back: bytes, or a Hugging Face `tokenizer.json`."""

import codecs
import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from train.data.input_files import import_extra
from train.data.tokenizer.files import (
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    TOKENIZER_FILES,
    end_tokens,
    read_objects,
    special_token,
)
from train.errors import ConfigError, DataError

END_OF_DOCUMENT = 256
"""The token after each document of bytes; tokens below it are byte values."""

BYTE_VOCABULARY = END_OF_DOCUMENT + 1

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
        begin_tokens: those before each document and each prompt; mostly one or none.
        end_token: the token after each document.
        files: name -> content, what `load_tokenizer` needs; empty for bytes.
    """

    name: str
    vocabulary_size: int
    begin_tokens: tuple[int, ...]
    end_token: int
    files: Mapping[str, bytes]

    def encode(self, text: str) -> np.ndarray:
        """[tokens] int32, without any special token.

        Lone surrogates stand for bytes that are not UTF-8.
        """

    def encode_prompt(self, text: str, *, chat: bool = False) -> np.ndarray:
        """[tokens] int32 of a text that is to be continued: `begin_tokens`, then the text's.

        chat: the text is what a chat template made, which wrote out every special token, the
        first one included, by its name.
        """

    def encode_documents(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Documents between `begin_tokens` and `end_token`, one after the other.

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
    begin_tokens: tuple[int, ...] = ()
    end_token = END_OF_DOCUMENT
    files: Mapping[str, bytes] = {}

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(_to_bytes(text), np.uint8).astype(np.int32)

    def encode_prompt(self, text: str, *, chat: bool = False) -> np.ndarray:
        return self.encode(text)

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

    def __init__(self, files: Mapping[str, bytes], end_token: str | int | None, where: str):
        """Reads the tokenizer.

        Args:
            files: name, one of TOKENIZER_FILES, and content; tokenizer.json at least.
            end_token: name or number of the token after each document; None: the eos_token that
                the files tell, or else one of END_TOKENS.
            where: what errors call tokenizer.json.

        Raises:
            ConfigError: it is no tokenizer, or has no such token; or the package tokenizers is
                not installed.
            DataError: another of the files is damaged.
        """
        tokenizers = import_extra("tokenizers")
        content = files[TOKENIZER_FILE]
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(content.decode())
        except Exception as error:  # the package raises nothing more specific
            raise ConfigError(f"{where}: not a tokenizer.json: {_one_line(error)}") from None
        # A file may have been saved with these switched on, and would cut documents.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        settings = read_objects(files, Path(where).parent)
        told = special_token(settings, "eos_token")
        name, self.end_token = self._find_end_token(end_token, told, where)
        self.begin_tokens = self._find_begin_tokens(settings)
        # Ids need not be without gaps, so the largest counts, not the number of them.
        self.vocabulary_size = max(self._tokenizer.get_vocab().values()) + 1
        self.name = hashlib.sha256(content).hexdigest()
        if name != told:
            changed = settings.get(TOKENIZER_CONFIG_FILE, {}) | {"eos_token": name}
            text = json.dumps(changed, indent=2, ensure_ascii=False) + "\n"
            files = {**files, TOKENIZER_CONFIG_FILE: text.encode()}
        self.files: Mapping[str, bytes] = {name: files[name] for name in sorted(files)}

    def _find_end_token(
        self, wanted: str | int | None, told: str | None, where: str
    ) -> tuple[str, int]:
        option = "eos_token" if wanted is None else "--end-token"
        known = self._tokenizer.id_to_token(wanted) if isinstance(wanted, int) else wanted or told
        for name in END_TOKENS if known is None else (known,):
            number = self._tokenizer.token_to_id(name)
            if number is not None:
                return name, number
        if known is not None:
            raise ConfigError(f"{option} = {known!r}: {where} has no such token")
        special = [token.content for token in self._tokenizer.get_added_tokens_decoder().values()]
        raise ConfigError(
            f"{where}: none of its tokens is called {', '.join(END_TOKENS)}; name the one that "
            f"ends a document with --end-token (its special tokens: {', '.join(special) or 'none'})"
        )

    def _find_begin_tokens(self, settings: Mapping[str, Mapping[str, Any]]) -> tuple[int, ...]:
        """What the tokenizer itself puts before a text, or else what add_bos_token asks for."""
        encoding = self._tokenizer.encode("a")
        added = itertools.takewhile(
            lambda token: token[1], zip(encoding.ids, encoding.special_tokens_mask, strict=True)
        )
        number = self._tokenizer.token_to_id(special_token(settings, "bos_token") or "")
        begin = tuple(token for token, _ in added if token != self.end_token or token == number)
        asked = settings.get(TOKENIZER_CONFIG_FILE, {}).get("add_bos_token") is True
        return (number,) if not begin and asked and number is not None else begin

    def encode(self, text: str) -> np.ndarray:
        clean = _to_bytes(text).decode(errors="replace")
        return np.array(self._tokenizer.encode(clean, add_special_tokens=False).ids, np.int32)

    def encode_prompt(self, text: str, *, chat: bool = False) -> np.ndarray:
        if not chat:
            return np.concatenate([np.array(self.begin_tokens, np.int32), self.encode(text)])
        self._tokenizer.encode_special_tokens = False
        try:
            return self.encode(text)
        finally:
            self._tokenizer.encode_special_tokens = True

    def encode_documents(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        parts = [
            np.array([*self.begin_tokens, *encoding.ids, self.end_token], np.int32)
            for encoding in encodings
        ]
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


def load_tokenizer(folder: Path, end_token: str | None = None) -> Tokenizer:
    """The tokenizer whose files lie in a folder; that of bytes if there are none.

    Args:
        folder: that of a run, a saved model, prepared tokens, or a model of Hugging Face.
        end_token: name of the token after each document; None: as the folder tells, by the name
            eos_token or else by the first number of eos_token_id.

    Raises:
        ConfigError: see `FileTokenizer`.
        DataError: one of the files is missing or damaged.
    """
    try:
        found = [name for name in TOKENIZER_FILES if (folder / name).exists()]
        if not found:
            return ByteTokenizer()
        files = {name: (folder / name).read_bytes() for name in {TOKENIZER_FILE, *found}}
        number = None
        if special_token(read_objects(files, folder), "eos_token") is None:
            number = next(iter(end_tokens(folder)), None)
    except OSError as error:
        raise DataError(f"{error.filename}: cannot read it: {error.strerror}") from None
    chosen = number if end_token is None else end_token
    return FileTokenizer(files, chosen, str(folder / TOKENIZER_FILE))


def _to_bytes(text: str) -> bytes:
    return text.encode(errors="surrogateescape")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
