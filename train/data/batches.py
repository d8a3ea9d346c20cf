"""Token streams cut into sequences, and batches of them as a pure function of the step."""

import functools
from collections.abc import Iterator, Sequence
from typing import cast

import grain
import numpy as np

from train.data.mixture import Mixture, MixtureInPhases
from train.data.recall import DrawnExamples
from train.data.token_source import Source, Split, TokenSource
from train.errors import require

Batch = dict[str, np.ndarray]
"""One batch [B, T] (or one sequence [T]) of each of:

- `tokens` int32: the model's input.
- `targets` int32: the token after each token; of a task, what it asks there.
- `segment_ids` int32: 1, 2, ... for the documents of a sequence; 0 is padding.
- `loss_mask` bool: whether the target is marked, and in the same document as the token.
"""

# Batches to read ahead: enough that a slow disk does not delay a step, for little memory.
_BATCHES_AHEAD = 8
_THREADS = 4


class SourceSequences:
    """A token stream cut into sequences of T inputs and their targets; the rest of one is padding.

    A sequence holds up to T + 1 tokens. Where all tokens are marked it holds as many, whatever the
    documents, and its last token is the next sequence's first, so that every token but a document's
    first is a target exactly once. Where only some are, such as the answers of dialogues, it holds
    the documents that follow each other and fit whole: an answer whose question is in another
    sequence would teach to guess. Only a document longer than T + 1 tokens is cut, as above.
    """

    def __init__(self, source: TokenSource, sequence_length: int):
        """Cuts the stream; DataError if its documents have to be known and a file is damaged."""
        self._source = source
        self._length = sequence_length
        self._ranges = None
        if source.has_mask:
            self._ranges = _ranges_of_whole_documents(source.document_ends(), sequence_length)

    def __len__(self) -> int:
        if self._ranges is not None:
            return len(self._ranges)
        return -(-(len(self._source) - 1) // self._length)

    def __getitem__(self, index: int) -> Batch:
        """Returns sequence `index`, arrays [T] as in `Batch`; DataError if a file is damaged."""
        start, stop = self._range(int(index))
        tokens = self._source.read(start, stop).astype(np.int32)
        document = self._source.documents(start, stop)
        padding = self._length + 1 - len(tokens)
        segment_ids = np.pad(document - document[0] + 1, (0, padding)).astype(np.int32)
        tokens = np.pad(tokens, (0, padding))
        marks = np.pad(self._source.marks(start, stop), (0, padding))
        return {
            "tokens": tokens[:-1],
            "targets": tokens[1:],
            "segment_ids": segment_ids[:-1],
            "loss_mask": (segment_ids[1:] == segment_ids[:-1]) & (segment_ids[1:] > 0) & marks[1:],
        }

    def _range(self, index: int) -> tuple[int, int]:
        """Returns the range of the tokens of a sequence."""
        if self._ranges is not None:
            start, stop = self._ranges[index]
            return int(start), int(stop)
        start = index * self._length
        return start, min(start + self._length + 1, len(self._source))


def _ranges_of_whole_documents(ends: np.ndarray, length: int) -> np.ndarray:
    """Packs documents, in their order, into ranges of at most length + 1 tokens.

    Args:
        ends: [documents], where each ends, exclusive.
        length: inputs of a sequence.

    Returns:
        [sequences, 2] int64. A longer document is cut into ranges that share a token.
    """
    ranges = []
    start, total = 0, int(ends[-1]) if len(ends) else 0
    while start < total:
        limit = start + length + 1
        fitting = int(np.searchsorted(ends, limit, side="right"))
        whole = int(ends[fitting - 1]) if fitting else 0
        stop = whole if whole > start else limit
        ranges.append((start, stop))
        start = stop if stop == whole else stop - 1
    return np.array(ranges, np.int64).reshape(-1, 2)


class ExampleSequences:
    """Drawn examples, each of which is a sequence."""

    def __init__(self, source: DrawnExamples):
        self._source = source

    def __len__(self) -> int:
        return self._source.count

    def __getitem__(self, index: int) -> Batch:
        """Returns sequence `index`, arrays [T] as in `Batch`; its targets are not the next tokens.

        What is asked at a place is not what stands behind it.
        """
        tokens, targets, asked = self._source.example(int(index))
        return {
            "tokens": tokens,
            "targets": targets,
            "segment_ids": np.ones_like(tokens),
            "loss_mask": asked,
        }


def _cut(source: Source, length: int) -> SourceSequences | ExampleSequences:
    """Makes the sequences of a source."""
    if isinstance(source, DrawnExamples):
        require(length == source.length, "sequence_length", length, f"{source.length}, as drawn")
        return ExampleSequences(source)
    return SourceSequences(cast(TokenSource, source), length)


class Sequences:
    """The sequences of a split of a corpus, source by source.

    Attributes:
        sources: the sequences of each of the split's sources.
        weights, schedule, bytes_per_target: see `train.data.token_source.Split`.
    """

    def __init__(self, split: Split, sequence_length: int):
        self.sources = tuple(_cut(source, sequence_length) for source in split.sources)
        self.weights, self.schedule = split.weights, split.schedule
        self.bytes_per_target = split.bytes_per_target
        self._split, self._length = split, sequence_length

    def __len__(self) -> int:
        return sum(map(len, self.sources))

    def parts(self, count: int) -> list[tuple["Sequences", int]]:
        """Divides `count` sequences among the sources by their weights: each source, and its share.

        A source with fewer sequences than its share gives all of them.
        """
        return list(zip(self._alone, _shares(self, count), strict=True))

    @functools.cached_property
    def _alone(self) -> list["Sequences"]:
        sources = self._split.sources
        if len(sources) == 1:
            return [self]
        return [Sequences(Split((source,)), self._length) for source in sources]


class _BatchSource:
    """The endless batches as a random-access source for Grain: `source[n]` is batch n."""

    def __init__(self, sequences: Sequences, batch_size: int, seed: int, rows: Sequence[int]):
        seeds = _seeds(seed, len(sequences.sources))
        self._orders = [
            grain.MapDataset.source(source).shuffle(seed=each).repeat()
            for source, each in zip(sequences.sources, seeds, strict=True)
        ]
        phases = {0: sequences.weights, **dict(sequences.schedule)}
        self._mixture = MixtureInPhases(
            {batch * batch_size: weights for batch, weights in phases.items()}
        )
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
    """Gives batches without end; batch n depends on n and on all arguments but `first`.

    Every source goes through all of its sequences in one order, then in another, and so on, without
    regard to where a batch ends. With several sources, their sequences take turns by weight, which
    may change from a batch on. Threads read batches ahead.

    Args:
        sequences: what to draw from.
        batch_size: sequences in a batch.
        seed: of the order.
        first: number of the first batch to give: 0, or the position of a checkpoint.
        rows: the rows of every batch to give, ascending; None: all.

    Raises:
        DataError: a file is missing or damaged; raised when a batch is drawn from it.
    """
    chosen = range(batch_size) if rows is None else [int(row) for row in rows]
    batches = _BatchSource(sequences, batch_size, seed, chosen)
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
    """Gives `count` sequences, always the same and evenly spread over the text, in batches.

    Several sources share `count` by their weights. A source with fewer sequences than its share
    gives all of them. The last batch is filled up with padding, which the loss leaves out.

    Args:
        sequences: what to take them from.
        batch_size: sequences in a batch.
        count: number of sequences.
        rows: the rows of every batch to give, ascending; None: all.

    Raises:
        DataError: a file is missing or damaged; raised when a sequence is read from it.
    """
    indices = [
        np.unique(np.linspace(0, len(source) - 1, number).round()).astype(np.int64)
        for source, number in zip(sequences.sources, _shares(sequences, count), strict=True)
    ]
    ends = np.cumsum([len(each) for each in indices])
    wanted = range(batch_size) if rows is None else [int(row) for row in rows]

    def read(n: int) -> Batch:
        source = int(np.searchsorted(ends, n, side="right"))
        from_the_end = n - int(ends[source])
        return sequences.sources[source][int(indices[source][from_the_end])]

    empty = {name: np.zeros_like(array) for name, array in read(0).items()}
    for start in range(0, int(ends[-1]), batch_size):
        yield _stack([read(start + row) if start + row < ends[-1] else empty for row in wanted])


def _shares(sequences: Sequences, count: int) -> list[int]:
    """Divides `count` sequences among the sources, as the first draws of the mixture do."""
    drawn = Mixture(sequences.weights).counts(count)
    return [
        min(number, len(source)) for number, source in zip(drawn, sequences.sources, strict=True)
    ]


def _seeds(seed: int, count: int) -> list[int]:
    """Makes a seed for each source; a single source has the given one."""
    if count == 1:
        return [seed]
    # The seeds are far apart, as Grain adds one to a seed in every epoch.
    return [int(each) for each in np.random.SeedSequence(seed).generate_state(count)]


def _stack(rows: Sequence[Batch]) -> Batch:
    """Stacks sequences [T] to a batch [B, T]."""
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
