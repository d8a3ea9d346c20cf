"""A tokenizer that a Hugging Face `tokenizer.json` and the files beside it define."""

import contextlib
import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from nha_jax.extras import import_extra
from nha_jax.storage.folder import (
    CONFIG_FILE,
    ORIGINAL_CONFIG_FILE,
    WEIGHTS_FILE,
    is_beside_weights,
)
from nha_jax.storage.stores import local_input
from nha_jax.tokenizer.as_bytes import BYTE_VOCABULARY, ByteTokenizer
from nha_jax.tokenizer.files import (
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    TOKENIZER_FILES,
    end_tokens,
    read_objects,
    special_token,
)
from nha_jax.tokenizer.interface import Decoder, TokenizedSpans, Tokenizer

END_TOKENS = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>")
"""Names to look for, in this order, where nothing says which token ends a document."""


class FileTokenizer:
    """A `Tokenizer` that a `tokenizer.json` defines.

    The names of special tokens in a text are text like any other, so that no document can contain
    the token that ends it.
    """

    def __init__(
        self,
        files: Mapping[str, bytes],
        end_token: str | int | None,
        where: str,
        option: str = "end_token",
    ):
        """Reads the tokenizer.

        Args:
            files: content by name, the names out of TOKENIZER_FILES; at least tokenizer.json.
            end_token: name or number of the token after each document; None: the eos_token of the
                files, or else the first of END_TOKENS that there is.
            where: the path of tokenizer.json, for error messages.
            option: what error messages call `end_token`.

        Raises:
            ValueError: tokenizer.json is no tokenizer or has no such token, or another of the files
                is damaged (`DamagedFileError`).
            ImportError: the package tokenizers is not installed.
        """
        tokenizers = import_extra("tokenizers")
        content = files[TOKENIZER_FILE]
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(content.decode())
        except Exception as error:  # the package raises nothing more specific
            raise ValueError(f"{where}: not a tokenizer.json: {_one_line(error)}") from None
        # A file may have been saved with these switched on; truncation would cut documents.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        added = self._tokenizer.get_added_tokens_decoder()
        self._special = [number for number, token in added.items() if token.special]
        settings = read_objects(files, Path(where).parent)
        stated = special_token(settings, "eos_token")
        name, self.end_token = self._find_end_token(end_token, stated, where, option)
        try:
            self.begin_tokens = self._find_begin_tokens(settings)
        except Exception as error:  # e.g. without a token for what is unknown
            raise ValueError(f"{where}: it encodes no text: {_one_line(error)}") from None
        # Ids may have gaps, so the largest id counts and not the number of ids.
        self.vocabulary_size = max(self._tokenizer.get_vocab().values()) + 1
        self.name = hashlib.sha256(content).hexdigest()
        if name != stated:
            changed = settings.get(TOKENIZER_CONFIG_FILE, {}) | {"eos_token": name}
            text = json.dumps(changed, indent=2, ensure_ascii=False) + "\n"
            files = {**files, TOKENIZER_CONFIG_FILE: text.encode()}
        self.files: Mapping[str, bytes] = {name: files[name] for name in sorted(files)}

    def _find_end_token(
        self, wanted: str | int | None, stated: str | None, where: str, option: str
    ) -> tuple[str, int]:
        """Finds the name and number of the token after each document."""
        asked = "eos_token" if wanted is None else option
        known = self._tokenizer.id_to_token(wanted) if isinstance(wanted, int) else wanted or stated
        for name in END_TOKENS if known is None else (known,):
            number = self._tokenizer.token_to_id(name)
            if number is not None:
                return name, number
        if known is not None:
            raise ValueError(f"{asked} = {known!r}: {where} has no such token")
        special = [token.content for token in self._tokenizer.get_added_tokens_decoder().values()]
        raise ValueError(
            f"{where}: none of its tokens is called {', '.join(END_TOKENS)}; name the one that "
            f"ends a document with {option} (its special tokens: {', '.join(special) or 'none'})"
        )

    def _find_begin_tokens(self, settings: Mapping[str, Mapping[str, Any]]) -> tuple[int, ...]:
        """Finds what the tokenizer puts before a text, or else the bos_token, if add_bos_token."""
        encoding = self._tokenizer.encode("a")
        added = itertools.takewhile(
            lambda token: token[1], zip(encoding.ids, encoding.special_tokens_mask, strict=True)
        )
        number = self._tokenizer.token_to_id(special_token(settings, "bos_token") or "")
        begin = tuple(token for token, _ in added if token != self.end_token or token == number)
        asked = settings.get(TOKENIZER_CONFIG_FILE, {}).get("add_bos_token") is True
        return (number,) if not begin and asked and number is not None else begin

    def encode(self, text: str) -> np.ndarray:
        clean = text.encode(errors="surrogateescape").decode(errors="replace")
        return np.array(self._tokenizer.encode(clean, add_special_tokens=False).ids, np.int32)

    def encode_prompt(self, text: str, *, chat: bool = False) -> np.ndarray:
        if not chat:
            return np.concatenate([np.array(self.begin_tokens, np.int32), self.encode(text)])
        with self._names_are_tokens():
            return self.encode(text)

    def encode_with_spans(self, text: str, *, chat: bool = False) -> TokenizedSpans:
        with self._names_are_tokens() if chat else contextlib.nullcontext():
            encoding = self._tokenizer.encode(text, add_special_tokens=False)
        tokens = np.array(encoding.ids, np.int32)
        special = np.isin(tokens, self._special)
        pairs = itertools.chain.from_iterable(encoding.offsets)  # faster than an array of pairs
        starts, stops = np.fromiter(pairs, np.int64, 2 * len(tokens)).reshape(-1, 2).T
        # Some tokenizers leave the space out that a token begins with, and have it all the same.
        before = np.concatenate([[0], np.maximum.accumulate(stops)[:-1]])[: len(stops)]
        starts = np.where(special, starts, np.minimum(starts, before))
        return TokenizedSpans(tokens, starts, stops, special)

    @contextlib.contextmanager
    def _names_are_tokens(self) -> Iterator[None]:
        """Lets the names of special tokens in a text become these."""
        self._tokenizer.encode_special_tokens = False
        try:
            yield
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

    def decode(self, tokens: ArrayLike) -> str:
        return self._tokenizer.decode(np.asarray(tokens).tolist(), skip_special_tokens=True)

    def decoder(self, prompt: ArrayLike) -> Decoder:
        return _FileDecoder(self, prompt)


class _FileDecoder:
    """A `Decoder` that decodes the last few tokens again for each new one.

    The text of a token depends on the tokens before it.
    """

    _CONTEXT = 8

    def __init__(self, tokenizer: FileTokenizer, prompt: ArrayLike):
        self._tokenizer = tokenizer
        self._tokens = np.asarray(prompt)[-self._CONTEXT :].tolist()
        self._shown = len(self._tokens)  # how many of _tokens are in the text already

    def add(self, token: int) -> str:
        self._tokens.append(token)
        text = self._new_text()
        if not text or text.endswith("\ufffd"):  # the first bytes of a character only
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


def load_tokenizer(
    folder: str | os.PathLike[str], *, end_token: str | None = None, option: str = "end_token"
) -> Tokenizer:
    """Loads the tokenizer whose files lie in a folder, or that of bytes if there are none.

    Args:
        folder: of a run, a saved model, prepared tokens, or a model of Hugging Face; it may be in
            an object store.
        end_token: name of the token after each document; None: the folder's eos_token, or else the
            first number of its eos_token_id.
        option: what error messages call `end_token`.

    Raises:
        ValueError: tokenizer.json is no tokenizer or has no such token, another file is damaged
            (`DamagedFileError`), or the model was imported without its tokenizer.
        ImportError: the package tokenizers is not installed.
        OSError: the folder, or tokenizer.json beside the others, is missing or cannot be read.
    """
    folder = local_input(folder, is_beside_weights)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; expected a run or a saved model")
    found = [name for name in TOKENIZER_FILES if (folder / name).exists()]
    if not found:
        _check_bytes(folder)
        return ByteTokenizer()
    files = {name: (folder / name).read_bytes() for name in {TOKENIZER_FILE, *found}}
    number = None
    if special_token(read_objects(files, folder), "eos_token") is None:
        number = next(iter(end_tokens(folder)), None)
    chosen = number if end_token is None else end_token
    return FileTokenizer(files, chosen, str(folder / TOKENIZER_FILE), option)


def _check_bytes(folder: Path) -> None:
    """Raises ValueError if the folder's model was imported and has another vocabulary."""
    if all((folder / name).exists() for name in (CONFIG_FILE, ORIGINAL_CONFIG_FILE)):
        # They take jax, which no tokenizer needs.
        from nha_jax.storage.saved_model import open_saved, read_saved_config

        has_weights = (folder / WEIGHTS_FILE).exists()  # the copy of a folder in a store has none
        config = open_saved(folder)[0] if has_weights else read_saved_config(folder / CONFIG_FILE)
        size = config.vocab_size
        if size != BYTE_VOCABULARY:
            raise ValueError(
                f"{folder}: it was imported without its tokenizer, and its {size} tokens are no "
                f"bytes; put the original's {TOKENIZER_FILE} into this folder"
            )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
