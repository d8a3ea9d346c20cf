"""Fixed sequences of token streams, and batches as a pure function of the step."""

from collections.abc import Iterator, Sequence
from fractions import Fraction

import grain
import numpy as np

from train.data.corpus import Part, TokenSource

Batch = dict[str, np.ndarray]
"""One batch [B, T] (or one sequence [T]) of each of:

- `tokens` int32: the model's input.
- `targets` int32: the token after each of them.
- `segment_ids` int32: 1, 2, ... for the documents in a sequence; 0 is padding.
- `loss_mask` bool: whether the target is in the token's own document.
"""

# Read ahead: enough that a batch from a slow disk does not hold up a step, and little memory.
_BATCHES_AHEAD = 8
_THREADS = 4


class SourceSequences:
    """A token stream cut into sequences of T inputs and their targets.

    A sequence holds T + 1 tokens and shares its last with the next one's first, so that every
    token but a document's first is a target exactly once. The last sequence is padded.
    """

    def __init__(self, source: TokenSource, sequence_length: int):
        self._source = source
        self._length = sequence_length

    def __len__(self) -> int:
        return -(-(len(self._source) - 1) // self._length)

    def __getitem__(self, index: int) -> Batch:
        """Window `index`, each array [T]; see `Batch`. DataError: a file is damaged."""
        start = int(index) * self._length
        stop = min(start + self._length + 1, len(self._source))
        tokens = self._source.read(start, stop).astype(np.int32)
        document = self._source.documents(start, stop)
        padding = self._length + 1 - len(tokens)
        segment_ids = np.pad(document - document[0] + 1, (0, padding)).astype(np.int32)
        tokens = np.pad(tokens, (0, padding))
        return {
            "tokens": tokens[:-1],
            "targets": tokens[1:],
            "segment_ids": segment_ids[:-1],
            "loss_mask": (segment_ids[1:] == segment_ids[:-1]) & (segment_ids[1:] > 0),
        }


class Sequences:
    """The sequences of a part of a corpus, source by source.

    Attributes:
        sources: the sequences of each of the part's sources.
        weights: the share of each among the sequences that are drawn.
        bytes_per_target: see `train.data.corpus.Part`.
    """

    def __init__(self, part: Part, sequence_length: int):
        self.sources = tuple(SourceSequences(source, sequence_length) for source in part.sources)
        self.weights = part.weights
        self.bytes_per_target = part.bytes_per_target

    def __len__(self) -> int:
        return sum(map(len, self.sources))


class Mixture:
    """Endless draws from several sources: which one the n-th is from, and how many were before.

    Of any number of first draws each source has its share, to within fewer draws than there are
    sources. (Grain's own mixture rounds the shares to a hundredth of the smallest.)
    """

    def __init__(self, weights: Sequence[float]):
        exact = [Fraction(weight) for weight in weights]
        # shares[i]: of source i among those from i on, the sources before being set aside.
        shares = [weight / sum(exact[i:]) for i, weight in enumerate(exact)]
        self._shares = [share.as_integer_ratio() for share in shares]

    def __getitem__(self, n: int) -> tuple[int, int]:
        """(source, index in the source's own order) of draw `n`."""
        before, after = n, n + 1  # how many draws remain to be given out, without and with the n-th
        for source, (part, whole) in enumerate(self._shares):
            mine, mine_after = (-(-count * part // whole) for count in (before, after))
            if mine_after > mine:
                return source, mine
            before, after = before - mine, after - mine_after
        raise AssertionError("the last source takes what remains")


class _Batches:
    """Batch n, as a random-access source for Grain."""

    def __init__(self, sequences: Sequences, batch_size: int, seed: int, rows: Sequence[int]):
        seeds = _seeds(seed, len(sequences.sources))
        self._orders = [
            grain.MapDataset.source(source).shuffle(seed=each).repeat()
            for source, each in zip(sequences.sources, seeds, strict=True)
        ]
        self._mixture = Mixture(sequences.weights)
        self._batch_size, self._rows = batch_size, rows

    def __len__(self) -> int:
        return np.iinfo(np.int64).max // self._batch_size

    def __getitem__(self, n: int) -> Batch:
        draws = (self._mixture[int(n) * self._batch_size + int(row)] for row in self._rows)
        return _stack([self._orders[source][index] for source, index in draws])


def training_batches(
    sequences: Sequences,
    batch_size: int,
    seed: int,
    first: int,
    rows: Sequence[int] | np.ndarray | None = None,
) -> Iterator[Batch]:
    """Endless batches; the n-th ever is a function of the arguments but `first`, and n.

    Every source goes through all of its sequences, then again in another order, and so on; with
    several sources, their sequences take turns by weight. Batches are read ahead by threads.

    Args:
        sequences: what to draw from.
        batch_size: sequences per batch.
        seed: of the order.
        first: n of the first batch returned: 0, or the position of a checkpoint.
        rows: those of every batch that are wanted, ascending; None: all.

    Raises:
        DataError: when a batch is drawn, if a file is missing or damaged.
    """
    chosen = range(batch_size) if rows is None else [int(row) for row in rows]
    batches = _Batches(sequences, batch_size, seed, chosen)
    options = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=_BATCHES_AHEAD)
    iterator = iter(grain.MapDataset.source(batches).to_iter_dataset(options))
    grain.experimental.set_next_index(iterator, first)
    return iterator


def evaluation_batches(
    sequences: Sequences,
    batch_size: int,
    count: int,
    rows: Sequence[int] | np.ndarray | None = None,
) -> Iterator[Batch]:
    """The same `count` sequences (fewer if there are not as many), evenly spread, in batches.

    Of several sources, each gives its weight's share. The last batch is filled up with padding,
    which no loss counts.

    Args:
        sequences: what to take them from.
        batch_size: sequences per batch.
        count: how many sequences.
        rows: those of every batch that are wanted, ascending; None: all.
    """
    chosen = [
        (source, int(index))
        for source, number in zip(sequences.sources, _shares(sequences, count), strict=True)
        for index in np.unique(np.linspace(0, len(source) - 1, number).round())
    ]
    wanted = range(batch_size) if rows is None else [int(row) for row in rows]
    source, index = chosen[0]
    empty = {name: np.zeros_like(array) for name, array in source[index].items()}
    for start in range(0, len(chosen), batch_size):
        places = [start + row for row in wanted]
        yield _stack([chosen[n][0][chosen[n][1]] if n < len(chosen) else empty for n in places])


def _shares(sequences: Sequences, count: int) -> list[int]:
    """How many of `count` sequences come from each source: the first draws of the mixture."""
    mixture = Mixture(sequences.weights)
    drawn = np.bincount([mixture[n][0] for n in range(count)], minlength=len(sequences.sources))
    return [min(int(n), len(source)) for n, source in zip(drawn, sequences.sources, strict=True)]


def _seeds(seed: int, count: int) -> list[int]:
    """A seed for each source; of one alone the given one."""
    if count == 1:
        return [seed]
    # Far apart: Grain counts the seed up by one an epoch.
    return [int(part) for part in np.random.SeedSequence(seed).generate_state(count)]


def _stack(rows: Sequence[Batch]) -> Batch:
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
