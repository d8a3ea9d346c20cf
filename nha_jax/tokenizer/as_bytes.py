"""UTF-8 bytes as tokens: 0 to 255, and 256 after each document."""

import codecs
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

from nha_jax.tokenizer.interface import Decoder, TokenizedSpans

END_OF_DOCUMENT = 256
"""The token after each document; tokens below it are byte values."""

BYTE_VOCABULARY = END_OF_DOCUMENT + 1


class ByteTokenizer:
    """A `Tokenizer` whose tokens are UTF-8 bytes and END_OF_DOCUMENT."""

    name = "bytes"
    vocabulary_size = BYTE_VOCABULARY
    begin_tokens: tuple[int, ...] = ()
    end_token = END_OF_DOCUMENT
    files: Mapping[str, bytes] = {}

    def encode(self, text: str) -> np.ndarray:
        content = text.encode(errors="surrogateescape")
        return np.frombuffer(content, np.uint8).astype(np.int32)

    def encode_prompt(self, text: str, *, chat: bool = False) -> np.ndarray:
        return self.encode(text)

    def encode_with_spans(self, text: str, *, chat: bool = False) -> TokenizedSpans:
        tokens = self.encode(text)
        is_first_byte = (tokens & 0xC0) != 0x80  # UTF-8: the others of a character are 10xxxxxx
        characters = np.cumsum(is_first_byte, dtype=np.int64)
        return TokenizedSpans(tokens, characters - 1, characters, np.zeros(len(tokens), bool))

    def encode_documents(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        return join_documents([text.encode() for text in texts])

    def decode(self, tokens: ArrayLike) -> str:
        tokens = np.asarray(tokens)
        return tokens[tokens < END_OF_DOCUMENT].astype(np.uint8).tobytes().decode(errors="replace")

    def decoder(self, prompt: ArrayLike) -> Decoder:
        return _ByteDecoder()


def join_documents(contents: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Joins documents of bytes, each followed by END_OF_DOCUMENT.

    Returns:
        The tokens [N] uint16, and where each document ends, exclusive: [documents] int64.
    """
    ends = np.cumsum([len(content) + 1 for content in contents], dtype=np.int64)
    tokens = np.full(ends[-1] if len(ends) else 0, END_OF_DOCUMENT, np.uint16)
    for content, end in zip(contents, ends, strict=True):
        tokens[end - 1 - len(content) : end - 1] = np.frombuffer(content, np.uint8)
    return tokens, ends


class _ByteDecoder:
    """A `Decoder` of bytes."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token: int) -> str:
        return self._decoder.decode(bytes([token]) if token < END_OF_DOCUMENT else b"")

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)
