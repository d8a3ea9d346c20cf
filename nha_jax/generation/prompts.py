"""What an engine keeps of its requests: their prompts, and how far they have been read."""

import dataclasses

import jax
import numpy as np

from nha_jax.cache import ModelCache
from nha_jax.generation.sampling import SamplingOptions


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
      requests: the requests, by row of this batch.
      rows: the rows of the engine's batch that the prompts will move to.
      cache: of what was read so far.
      logits: [prefill_rows, vocab_size], after the last token of each row so far.
      position: how many tokens of each prompt have been read.
    """

    prompts: list[np.ndarray]
    requests: dict[int, Request]
    rows: list[int]
    cache: ModelCache
    logits: jax.Array
    position: int = 0

    @property
    def done(self) -> bool:
        return self.position >= max(map(len, self.prompts))

    def next_chunk(self, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the next tokens, [prefill_rows, size], and how many of them each row has."""
        tokens = np.zeros((len(self.prompts), size), np.int32)
        lengths = np.zeros(len(self.prompts), np.int32)
        for row, prompt in enumerate(self.prompts):
            part = prompt[self.position : self.position + size]
            tokens[row, : len(part)], lengths[row] = part, len(part)
        self.position += size
        return tokens, lengths
