"""Held-out bits by position, beyond the length of training."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

import nha_jax
from train.config import DataConfig
from train.data.corpus import Corpus
from train.data.prepared_folder import ShardedTokens
from train.data.token_source import TokensInMemory
from train.errors import ConfigError
from train.storage.atomic import write_picture

FACTOR = 16
"""How many times the training length texts are, if there are such."""


class Part(NamedTuple):
    """A range of positions, and what was found there.

    Attributes:
        start, stop: positions in a document.
        bits_per_byte: the mean cross-entropy of their tokens.
    """

    start: int
    stop: int
    bits_per_byte: float


class LongTexts(NamedTuple):
    """The beginnings of held-out documents, all of one length.

    Attributes:
        rows: [texts, tokens] int32; the first of each is given, the others are to be predicted.
        length: tokens of a sequence in training.
    """

    rows: np.ndarray
    length: int


def find_long_texts(corpus: Corpus, data: DataConfig, count: int) -> LongTexts:
    """Takes the beginnings of the first held-out documents that are long enough.

    They have FACTOR times the training length and a token, or the half of that as often as is
    needed for one document to be as long. Every position is then of the same documents.

    Raises:
        ConfigError: no held-out document is longer than a training sequence, or it is no text.
    """
    documents = [
        (source, start, stop)
        for source in corpus.held_out.sources
        if isinstance(source, TokensInMemory | ShardedTokens)
        for start, stop in itertools.pairwise([0, *source.document_ends().tolist()])
    ]
    longest = max((stop - start for _, start, stop in documents), default=0)
    tokens = FACTOR * data.sequence_length
    while tokens >= longest and tokens > data.sequence_length:
        tokens //= 2
    if tokens <= data.sequence_length:
        raise ConfigError(
            f"--tasks=extrapolate: the longest held-out document of {corpus.name} has {longest} "
            f"tokens; expected more than twice data.sequence_length, which is "
            f"{data.sequence_length}"
        )
    long = [(source, start) for source, start, stop in documents if stop - start > tokens]
    rows = [source.read(start, start + tokens + 1) for source, start in long[:count]]
    return LongTexts(np.stack(rows).astype(np.int32), data.sequence_length)


def measure_by_position(
    model: nha_jax.Model,
    texts: LongTexts,
    bytes_per_target: float,
    batch_size: int,
    progress: Callable[[int], object] | None = None,
) -> list[Part]:
    """Measures the bits per byte of positions below the training length, and of each doubling.

    Args:
        model: the model; it reads each text from an empty state, in chunks.
        texts: what it reads.
        bytes_per_target: mean bytes of text that a token stands for.
        batch_size: texts at once.
        progress: is called with the number of texts done so far.
    """
    scores = nha_jax.score(
        model,
        list(texts.rows[:, :1]),
        list(texts.rows[:, 1:]),
        batch_size=batch_size,
        progress=progress,
    )
    nats = -np.stack([score.log_probabilities for score in scores]).astype(np.float64)
    parts, start, stop = [], 0, texts.length
    while start < nats.shape[1]:
        bits = nats[:, start:stop].mean() / np.log(2)
        parts.append(Part(start, stop, float(bits / bytes_per_target)))
        start, stop = stop, 2 * stop
    return parts


def as_table(parts: list[Part]) -> str:
    """Writes the parts as a Markdown table."""
    lines = ["| positions | bits per byte |", "| --- | --- |"]
    lines += [f"| {start} to {stop - 1} | {bits:.3f} |" for start, stop, bits in parts]
    return "\n".join(lines)


def draw(parts: list[Part], length: int, path: Path) -> None:
    """Draws the bits per byte over the positions, a PNG, with a line at the training length."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot(
        xlabel="position in the document", ylabel="held-out bits per byte", xscale="log"
    )
    edges = [1, *(part.stop for part in parts)]  # a logarithmic axis has no 0
    axes.stairs([part.bits_per_byte for part in parts], edges)
    axes.axvline(length, color="grey", linestyle="--", label="length in training")
    axes.grid(alpha=0.3)
    axes.legend()
    write_picture(path, figure)
