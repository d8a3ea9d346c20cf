"""Measuring a model on held-out text, and gzip's bits per byte to compare with."""

import gzip
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np

from train.data.batches import Sequences, evaluation_batches
from train.data.token_source import Split
from train.step.losses import LossSum
from train.step.update import EvaluationSums, TrainingFunctions

REFERENCE_TOKENS = 4_000_000
"""How many tokens' text gzip compresses: it takes seconds, and gzip looks back 32 KiB only."""


@dataclass(frozen=True)
class HeldOut:
    """What a model reached on held-out text.

    Attributes:
        bits_per_target: the mean cross-entropy, in bits.
        bytes_per_target: mean bytes of text that a target stands for, see `Split`.
        accuracy: the share of the targets that were the likeliest token in their place.
        whole: the share of the sequences with targets all of whose targets were.
        slot_weight: the mean slot weight of every layer, over tokens and query heads.
        corpora: bits per byte of each source of the text; not a number for one of which the share
            is less than a sequence.
        ema: what the moving average of the model reached, if there is one.
        tasks: what the model reached on questions that it was asked besides, by name.
    """

    bits_per_target: float
    bytes_per_target: float
    accuracy: float
    whole: float
    slot_weight: tuple[float, ...]
    corpora: tuple[float, ...] = ()
    ema: "HeldOut | None" = None
    tasks: Mapping[str, "HeldOut"] = field(default_factory=dict)

    def with_task(self, name: str, task: "HeldOut") -> "HeldOut":
        """Returns the same with a task that the model was asked besides."""
        return replace(self, tasks={**self.tasks, name: task})

    @property
    def bits_per_byte(self) -> float:
        """The cross-entropy in bits per byte of text."""
        return self.bits_per_target / self.bytes_per_target

    @property
    def perplexity(self) -> float:
        """The perplexity of a token; infinite if it is more than a float holds."""
        return 2**self.bits_per_target if self.bits_per_target < 1024 else math.inf


def measure_held_out(
    functions: TrainingFunctions,
    model_state: Any,
    sequences: Sequences,
    batch_size: int,
    count: int,
    rows: np.ndarray | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> HeldOut | None:
    """Measures `count` sequences spread over the held-out text.

    Each sequence is read on its own, from an empty state; a document's first token is given, and
    its end counts like any other.

    Args:
        functions: the run's compiled functions.
        model_state: the parameters to measure.
        sequences: the held-out text.
        batch_size: sequences per batch.
        count: how many sequences to measure.
        rows: the rows of a batch that this process holds; None: all.
        stopped: asked before every batch whether to give up; the same in all processes.

    Returns:
        What was measured; None if it was given up.
    """
    batches: list[EvaluationSums] = []
    corpora: list[float] = []
    for part, share in sequences.parts(count):
        first = len(batches)
        queued: EvaluationSums | None = None
        for batch in evaluation_batches(part, batch_size, share, rows) if share else ():
            if stopped():
                return None
            # The sums of the batch before are fetched while the devices work on this one.
            before, queued = queued, functions.evaluate(model_state, batch)
            if before is not None:
                batches.append(jax.device_get(before))
        if queued is not None:
            batches.append(jax.device_get(queued))
        bits = bits_per_target([batch.loss for batch in batches[first:]])
        corpora.append(bits / part.bytes_per_target if share else math.nan)
    number = sum(int(batch.slot_weights) for batch in batches)
    slot_weight = np.sum([batch.slot_weight for batch in batches], axis=0, dtype=np.float64)
    targets = sum(int(batch.loss.targets) for batch in batches)
    right, whole, rows = np.sum([batch.answers for batch in batches], axis=0).tolist()
    return HeldOut(
        bits_per_target([batch.loss for batch in batches]),
        sequences.bytes_per_target,
        right / max(targets, 1),
        whole / max(rows, 1),
        tuple((slot_weight / max(number, 1)).tolist()),
        tuple(corpora),
    )


def bits_per_target(sums: Sequence[LossSum]) -> float:
    """Divides the cross-entropy of several batches by their targets: mean bits per target."""
    nats = math.fsum(float(total.nats) for total in sums)
    return nats / max(sum(int(total.targets) for total in sums), 1) / math.log(2)


def gzip_bits_per_byte(text: bytes, piece_bytes: int | None = None) -> float:
    """Measures how many bits `gzip -9` needs per byte of `text`, headers included.

    Args:
        text: what to compress.
        piece_bytes: compress independent pieces of this many bytes; None: all of it in one.
    """
    size = piece_bytes or len(text)
    pieces = (text[start : start + size] for start in range(0, len(text), size))
    return 8 * sum(len(gzip.compress(piece, 9, mtime=0)) for piece in pieces) / len(text)


def gzip_references(split: Split) -> dict[str, float]:
    """Measures gzip on the text of at most REFERENCE_TOKENS tokens: label -> bits per byte.

    Where there is no text, nothing is measured.

    A thousand bytes are about what a small model sees at once, and too few for gzip to find
    many repeats; all the text at once is the other extreme.
    """
    text = split.text(REFERENCE_TOKENS)
    if not text:
        return {}
    return {
        "gzip -9, 1000 bytes at a time": gzip_bits_per_byte(text, 1000),
        "gzip -9, all of it at once": gzip_bits_per_byte(text),
    }
