"""Streams of tokens, and the training and held-out splits of a corpus that are made of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from nha_jax.tokenizer.as_bytes import END_OF_DOCUMENT


class Source(Protocol):
    """A part of a corpus, which is made of documents. Its `len` is in tokens.

    Attributes:
        num_documents: number of documents.
        text_bytes: bytes of the documents' text as UTF-8.
        has_mask: whether only some tokens are marked, which are to be learned.
        num_targets: number of tokens that are targets: marked, and not a document's first.
        target_bytes: bytes of the text that the targets stand for.
    """

    @property
    def num_documents(self) -> int: ...
    @property
    def text_bytes(self) -> int: ...
    @property
    def has_mask(self) -> bool: ...
    @property
    def num_targets(self) -> int: ...
    @property
    def target_bytes(self) -> int: ...

    def __len__(self) -> int: ...

    def text(self, limit: int) -> bytes:
        """Returns what is marked of the text of the first `limit` tokens, one after the other."""


class TokenSource(Source, Protocol):
    """A `Source` that is a stream of tokens, whatever they are cut into."""

    def read(self, start: int, stop: int) -> np.ndarray:
        """Returns tokens `start` to `stop`, [stop - start] integers.

        Raises:
            DataError: a file is missing or damaged.
        """

    def marks(self, start: int, stop: int) -> np.ndarray:
        """Returns which of these tokens are marked, as bool.

        Raises:
            DataError: a file is missing or damaged.
        """

    def document_ends(self) -> np.ndarray:
        """Returns where each document ends, exclusive: [documents] int64.

        Raises:
            DataError: a file is missing or damaged.
        """

    def documents(self, start: int, stop: int) -> np.ndarray:
        """Returns the number of the document that each of these tokens is in, as int64.

        Raises:
            DataError: a file is missing or damaged.
        """


@dataclass(frozen=True)
class TokensInMemory:
    """A `TokenSource` of bytes that are held in memory, all of which are marked.

    Attributes:
        names: the documents' names.
        tokens: [N] uint16, the bytes, with END_OF_DOCUMENT after each document.
        ends: [documents] int64, where each document's tokens end, exclusive.
    """

    names: tuple[str, ...]
    tokens: np.ndarray
    ends: np.ndarray

    has_mask = False

    @property
    def num_documents(self) -> int:
        return len(self.ends)

    @property
    def text_bytes(self) -> int:
        return len(self.tokens) - len(self.ends)

    @property
    def num_targets(self) -> int:
        return len(self.tokens) - len(self.ends)

    @property
    def target_bytes(self) -> int:
        return self.text_bytes

    def __len__(self) -> int:
        return len(self.tokens)

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.tokens[start:stop]

    def marks(self, start: int, stop: int) -> np.ndarray:
        return np.ones(stop - start, bool)

    def document_ends(self) -> np.ndarray:
        return self.ends

    def documents(self, start: int, stop: int) -> np.ndarray:
        return np.searchsorted(self.ends, np.arange(start, stop), side="right")

    def text(self, limit: int) -> bytes:
        tokens = self.tokens[:limit]
        return tokens[tokens != END_OF_DOCUMENT].astype(np.uint8).tobytes()


@dataclass(frozen=True)
class Split:
    """The training or the held-out split of a corpus: one source, or several with weights.

    Attributes:
        sources: the sources.
        weights: the share of sequences that is drawn from each; they add up to 1.
        schedule: batches, ascending, from which on training draws other shares, and these.
    """

    sources: tuple[Source, ...]
    weights: tuple[float, ...] = (1.0,)
    schedule: tuple[tuple[int, tuple[float, ...]], ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.sources))

    @property
    def num_documents(self) -> int:
        return sum(source.num_documents for source in self.sources)

    @property
    def has_mask(self) -> bool:
        """Whether only some tokens of a source are marked."""
        return any(source.has_mask for source in self.sources)

    @property
    def num_targets(self) -> int:
        return sum(source.num_targets for source in self.sources)

    @property
    def bytes_per_target(self) -> float:
        """The mean number of bytes of text that a target stands for; 1 if tokens are bytes.

        All marked tokens but the first of a document are targets. Bits per target divided by this
        are bits per byte, of the marked text alone.
        """
        return self._bytes_per_target(self.weights)

    def bytes_per_target_at(self, batch: int) -> float:
        """Returns `bytes_per_target` of the shares that training batch `batch` is drawn by."""
        phases = [weights for first, weights in self.schedule if first <= batch]
        return self._bytes_per_target(phases[-1] if phases else self.weights)

    def _bytes_per_target(self, weights: Sequence[float]) -> float:
        total = targets = 0.0
        for weight, source in zip(weights, self.sources, strict=True):
            # Sources are drawn by sequences, so one of which little is marked has fewer targets.
            marked = weight * source.num_targets / max(len(source) - source.num_documents, 1)
            total += marked * source.target_bytes / max(source.num_targets, 1)
            targets += marked
        return total / targets if targets else 0.0

    def text(self, limit: int) -> bytes:
        """Returns the text of about the first `limit` tokens, from every source by its weight."""
        return b"".join(
            source.text(round(limit * weight))
            for weight, source in zip(self.weights, self.sources, strict=True)
        )
