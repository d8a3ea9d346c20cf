"""What files of tokens share: where documents begin, and which tokens there may be."""

from pathlib import Path

import numpy as np

from nha_jax.tokenizer.interface import Tokenizer
from train.data.prepare.documents import TokenizedText
from train.errors import DataError

BYTES_PER_TOKEN = 4
"""Bytes of text that a token is taken to stand for, which decides what a part is."""


def document_starts(tokens: np.ndarray, before: int, tokenizer: Tokenizer) -> np.ndarray:
    """Finds where documents begin: behind an end token, and at what begins a text.

    Args:
        tokens: [N] integers.
        before: the token before them.
        tokenizer: whose tokens they are.

    Returns:
        The positions, ascending, [documents] int64.
    """
    previous = np.concatenate([[before], tokens[:-1]])
    is_start = previous == tokenizer.end_token
    if tokenizer.begin_tokens and tokenizer.begin_tokens[0] != tokenizer.end_token:
        is_start |= tokens == tokenizer.begin_tokens[0]
    return np.flatnonzero(is_start)


def checked_document(
    tokens: np.ndarray, path: Path, first: int, tokenizer: Tokenizer
) -> TokenizedText | None:
    """Makes a document of its tokens, without the end token behind them.

    Args:
        tokens: [N] integers.
        path: the file that they are from.
        first: the number of the first of them in the file.
        tokenizer: whose tokens they are.

    Returns:
        The document; None if it has no text.

    Raises:
        DataError: a token is not in the vocabulary.
    """
    outside = np.flatnonzero((tokens < 0) | (tokens >= tokenizer.vocabulary_size))
    if len(outside):
        raise DataError(
            f"{path}, token {first + outside[0]}: {tokens[outside[0]]}, which is not in the "
            f"vocabulary of {tokenizer.vocabulary_size:,}; --tokenizer is whose tokens these are"
        )
    if len(tokens) and tokens[-1] == tokenizer.end_token:
        tokens = tokens[:-1]
    text = tokenizer.decode(tokens)
    return TokenizedText(text, tokens) if text else None
