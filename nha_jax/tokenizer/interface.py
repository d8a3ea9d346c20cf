"""What is known of every tokenizer."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike


class Decoder(Protocol):
    """Turns tokens into text as they come in."""

    def add(self, token: int) -> str:
        """Takes the next token; returns the text that is certain now, "" inside a character."""

    def finish(self) -> str:
        """Returns the rest; an incomplete character comes out as the replacement character."""


class TokenizedSpans(NamedTuple):
    """A text's tokens, and where each of them is from.

    Attributes:
        tokens: [N] int32.
        starts, stops: [N] int64, the range of characters that a token is from. Tokens that share a
            character each have all of it; one that is from none, as a space that the tokenizer puts
            before a text, has an empty range.
        special: [N] bool, whether a token is a special one, which stands for its name.
    """

    tokens: np.ndarray
    starts: np.ndarray
    stops: np.ndarray
    special: np.ndarray


class Tokenizer(Protocol):
    """Turns text into tokens of one vocabulary, and tokens into text.

    Attributes:
        name: "bytes", or the checksum of the tokenizer.json, so that no two vocabularies share it.
        vocabulary_size: number of tokens, the end of a document included.
        begin_tokens: the tokens before each document and each prompt; mostly one or none.
        end_token: the token after each document.
        files: content by name of the files that `load_tokenizer` needs; empty for bytes.
    """

    name: str
    vocabulary_size: int
    begin_tokens: tuple[int, ...]
    end_token: int
    files: Mapping[str, bytes]

    def encode(self, text: str) -> np.ndarray:
        """Returns the text's tokens, [tokens] int32, without any special token.

        Lone surrogates in the text stand for bytes that are not UTF-8.
        """

    def encode_prompt(self, text: str, *, chat: bool = False) -> np.ndarray:
        """Returns `begin_tokens` and the tokens of a text to continue, [tokens] int32.

        With `chat` the text comes from a chat template, which has written every special token by
        its name, those at the beginning included: the names become the tokens, and none is added.
        """

    def encode_with_spans(self, text: str, *, chat: bool = False) -> TokenizedSpans:
        """Returns the text's tokens and their places in it; with `chat`, as in `encode_prompt`.

        The text has no lone surrogates. `begin_tokens` are not among the tokens.
        """

    def encode_documents(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Encodes documents one after the other, each between `begin_tokens` and `end_token`.

        Returns:
            The tokens [N] integers, and where each document ends, exclusive: [documents] int64.
        """

    def decode(self, tokens: ArrayLike) -> str:
        """Returns the text of tokens [N], without ends of documents and other special ones."""

    def decoder(self, prompt: ArrayLike) -> Decoder:
        """Returns a decoder of the tokens that follow those of `prompt`, [N]."""
