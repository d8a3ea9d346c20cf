"""What an engine keeps of its requests: their prompts, and how far they have been read."""

import dataclasses
import operator
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from nha_jax.argument_checks import check_prompt
from nha_jax.cache import ModelCache
from nha_jax.generation.prefixes import Node
from nha_jax.generation.sampling import SamplingOptions
from nha_jax.scalars import shown
from nha_jax.tokenizer.as_bytes import BYTE_VOCABULARY, ByteTokenizer

Prompt = jax.typing.ArrayLike | Sequence[Any] | str | bytes
"""Tokens, or a text for a model of bytes."""


def read_prompt(prompt: Prompt, vocab_size: int, name: str = "prompt") -> np.ndarray:
    """Returns a prompt as [T] int32; errors call it by `name`.

    Raises:
        ValueError, TypeError: it is empty, neither a text nor [T] integers, or has tokens outside
            [0, vocab_size); or it is a text, and the model's tokens are no bytes.
    """
    return check_prompt(encode_text(prompt, vocab_size, name), vocab_size, name)


def encode_text(prompt: object, vocab_size: int, name: str = "prompt") -> Any:
    """Encodes a text, and returns anything else as it is.

    Raises:
        ValueError: the text is empty.
        TypeError: the model's tokens are no bytes.
    """
    if not isinstance(prompt, str | bytes):
        return prompt
    # 256: a model of someone's own, whose documents have no end.
    if vocab_size not in (BYTE_VOCABULARY, BYTE_VOCABULARY - 1):
        raise TypeError(
            f"{name} is the text {shown(prompt)}, and the model's {vocab_size} tokens are no "
            "bytes: encode it by the model's own tokenizer, "
            "nha_jax.load_tokenizer(FOLDER).encode_prompt(text)"
        )
    if not prompt:
        raise ValueError(f"{name} must have at least one token, got {shown(prompt)}")
    text = prompt.decode(errors="surrogateescape") if isinstance(prompt, bytes) else prompt
    return ByteTokenizer().encode_prompt(text)


@dataclasses.dataclass
class Request:
    """A prompt to be continued, and how many tokens it got so far."""

    number: int
    prompt: np.ndarray  # [T] int32
    options: SamplingOptions
    num_drawn: int = 0


@dataclasses.dataclass
class PromptBatch:
    """The prompts that are being read, one in each of prefill_rows rows.

    Rows without a prompt, or whose request was cancelled, have no entry in `requests`.

    Fields:
      prompts: tokens of each row; empty if it has none.
      nodes: the prefix that each row has read and that is kept; None: it keeps no more.
      positions: how many tokens of each prompt have been read.
      cache: of what was read so far.
      logits: [prefill_rows, vocab_size], after the last token of each row so far.
      requests: the requests, by row of this batch.
      rows: the rows of the engine's batch that the prompts will move to.
    """

    prompts: list[np.ndarray]
    nodes: list[Node | None]
    positions: list[int]
    cache: ModelCache
    logits: jax.Array
    requests: dict[int, Request] = dataclasses.field(default_factory=dict)
    rows: list[int] = dataclasses.field(default_factory=list)

    @property
    def done(self) -> bool:
        return all(map(operator.ge, self.positions, map(len, self.prompts)))

    def next_chunk(self, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the next tokens, [prefill_rows, size], and how many of them each row has."""
        tokens = np.zeros((len(self.prompts), size), np.int32)
        lengths = np.zeros(len(self.prompts), np.int32)
        for row, prompt in enumerate(self.prompts):
            part = prompt[self.positions[row] :][:size]
            tokens[row, : len(part)], lengths[row] = part, len(part)
            self.positions[row] += len(part)
        return tokens, lengths
