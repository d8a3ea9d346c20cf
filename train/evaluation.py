"""Bits per byte on held-out text: the model's, and gzip's beside it."""

import gzip
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from train.corpus import Part
from train.data import Windows, evaluation_batches
from train.step import LossSum, Steps

REFERENCE_TOKENS = 4_000_000
"""Text of so many tokens is compressed for comparison: seconds, and gzip looks back 32 KiB only."""


def held_out_bits_per_byte(
    steps: Steps,
    model_state: Any,
    windows: Windows,
    batch_size: int,
    count: int,
    rows: np.ndarray | None = None,
) -> float:
    """Cross-entropy in bits per byte over `count` windows spread over the held-out text.

    Each window is read on its own, from an empty state; a document's first token is given, and
    its end counts like any other. Bits per target are divided by the bytes that a target of the
    whole held-out text has in the mean: of bytes 1. `rows` are those of this process.
    """
    sums = [
        steps.evaluate(model_state, batch)
        for batch in evaluation_batches(windows, batch_size, count, rows)
    ]
    return bits_per_target(sums) / windows.bytes_per_target


def bits_per_target(sums: Sequence[LossSum]) -> float:
    """The cross-entropy of all batches together; on bytes, bits per byte."""
    nats = math.fsum(float(total.nats) for total in sums)
    return nats / max(sum(int(total.targets) for total in sums), 1) / math.log(2)


def gzip_bits_per_byte(text: bytes, window: int | None = None) -> float:
    """What `gzip -9` needs for `text`, headers included.

    Args:
        text: what to compress.
        window: compress independent pieces of so many bytes; None: all of it in one.
    """
    size = window or len(text)
    pieces = (text[start : start + size] for start in range(0, len(text), size))
    return 8 * sum(len(gzip.compress(piece, 9, mtime=0)) for piece in pieces) / len(text)


def gzip_references(part: Part) -> dict[str, float]:
    """Bits per byte by what was compressed, of four million tokens' text at most.

    A thousand bytes are about what a small model sees at once, and too few for gzip to find
    many repeats; all the text at once is the other extreme.
    """
    text = part.text(REFERENCE_TOKENS)
    return {
        "gzip -9, 1000 bytes at a time": gzip_bits_per_byte(text, 1000),
        "gzip -9, all of it at once": gzip_bits_per_byte(text),
    }
