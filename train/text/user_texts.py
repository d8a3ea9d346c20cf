"""Texts that a user names: files, or standard input."""

import sys
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

from nha_jax.tokenizer.interface import Tokenizer
from train.data.packed_files import naming, open_unpacked
from train.errors import ConfigError
from train.paths import check_ends, user_path

# No token stands for more bytes than this on average, so the rest of a long file is not read.
_MOST_BYTES_PER_TOKEN = 16

_PIECE_BYTES = 1 << 20


def read_tokens(
    path: str, tokenizer: Tokenizer, limit: int | None = None, name: str = "--text"
) -> np.ndarray:
    """Reads a file's text as tokens; it begins as `Tokenizer.encode_prompt` says.

    Args:
        path: the file, unpacked if its name ends in .gz or .zst; "-" for standard input.
        tokenizer: what turns the text into tokens.
        limit: how many tokens to give at most; None: all.
        name: the option that it was given for.

    Returns:
        [at most limit] int32.

    Raises:
        ConfigError: the file cannot be read or is damaged, or its text has no token.
    """
    text = read_text(path, None if limit is None else limit * _MOST_BYTES_PER_TOKEN, name)
    tokens = tokenizer.encode_prompt(text)[:limit]
    if not len(tokens):
        raise ConfigError(f"{path}: the model's tokenizer makes no token of this text")
    return tokens


def read_text(path: str, limit: int | None = None, name: str = "--prompt-file") -> str:
    """Reads a file's text; bytes that are not UTF-8 become lone surrogates.

    Args:
        path: the file, unpacked if its name ends in .gz or .zst; "-" for standard input.
        limit: how many bytes to read at most; None: all.
        name: the option that it was given for.

    Raises:
        ConfigError: the file cannot be read, is damaged, or is empty.
    """
    file = user_path(path, name)
    check_ends(file, name)
    with (
        naming(file, ConfigError, "cannot read the text"),
        sys.stdin.buffer if path == "-" else open_unpacked(file) as opened,
    ):
        content = _read(opened, limit)
    if not content:
        raise ConfigError(f"{path}: the text is empty")
    return content.decode(errors="surrogateescape")


def read_turns() -> Iterator[str]:
    """Reads standard input a line at a time, as it is written, but for blank ones.

    A terminal is shown that a line is waited for. Bytes that are not UTF-8 become lone surrogates.
    """
    asks = sys.stdin.isatty() and sys.stdout.isatty()
    while True:
        print("> " if asks else "", end="", flush=True)
        line = sys.stdin.buffer.readline()
        if not line:
            print(end="\n" if asks else "")
            return
        if text := line.decode(errors="surrogateescape").strip():
            yield text


def _read(file: BinaryIO, limit: int | None) -> bytes:
    """Reads at most `limit` bytes; None: all."""
    if limit is None:
        return file.read()
    content = bytearray()
    # A piece at a time: memory is taken for what is read, whatever is asked for.
    while piece := file.read(min(limit - len(content), _PIECE_BYTES)):
        content += piece
    return bytes(content)
