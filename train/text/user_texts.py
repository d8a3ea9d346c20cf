"""Texts that a user names: files, or standard input."""

import sys
from pathlib import Path

import numpy as np

from train.data.tokenizer.interface import Tokenizer
from train.errors import ConfigError

# No token stands for more bytes than this on average, so the rest of a long file is not read.
_MOST_BYTES_PER_TOKEN = 16


def read_tokens(path: str, tokenizer: Tokenizer, limit: int | None = None) -> np.ndarray:
    """Reads a file's text as tokens; it begins as `Tokenizer.encode_prompt` says.

    Args:
        path: the file; "-" for standard input.
        tokenizer: what turns the text into tokens.
        limit: how many tokens to give at most; None: all.

    Returns:
        [at most limit] int32.

    Raises:
        ConfigError: the file cannot be read, or its text has no token.
    """
    text = read_text(path, None if limit is None else limit * _MOST_BYTES_PER_TOKEN)
    tokens = tokenizer.encode_prompt(text)[:limit]
    if not len(tokens):
        raise ConfigError(f"{path}: the model's tokenizer makes no token of this text")
    return tokens


def read_text(path: str, limit: int | None = None) -> str:
    """Reads a file's text; bytes that are not UTF-8 become lone surrogates.

    Args:
        path: the file; "-" for standard input.
        limit: how many bytes to read at most; None: all.

    Raises:
        ConfigError: the file cannot be read, or is empty.
    """
    try:
        with sys.stdin.buffer if path == "-" else Path(path).open("rb") as file:
            content = file.read(-1 if limit is None else limit)
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the text: {error.strerror}") from None
    if not content:
        raise ConfigError(f"{path}: the text is empty")
    return content.decode(errors="surrogateescape")
