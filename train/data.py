"""Fixed windows of a token stream, and batches as a pure function of the step."""

from collections.abc import Iterator

import grain
import numpy as np

from train.corpus import Documents

Batch = dict[str, np.ndarray]
"""One batch [B, T] (or one window [T]) of each of:

- `tokens` int32: the model's input.
- `targets` int32: the token after each of them.
- `segment_ids` int32: 1, 2, ... for the documents in a window; 0 is padding.
- `loss_mask` bool: whether the target is in the token's own document.
"""


class Windows:
    """A document stream cut into windows of T inputs and their targets.

    A window holds T + 1 tokens and shares its last with the next one's first, so that every
    token but a document's first is a target exactly once. The last window is padded.
    """

    def __init__(self, documents: Documents, sequence_length: int):
        self._documents = documents
        self._length = sequence_length

    def __len__(self) -> int:
        return -(-(len(self._documents.tokens) - 1) // self._length)

    def __getitem__(self, index: int) -> Batch:
        """Window `index`, each array [T]; see `Batch`."""
        start = int(index) * self._length
        tokens = self._documents.tokens[start : start + self._length + 1].astype(np.int32)
        positions = np.arange(start, start + len(tokens))
        document = np.searchsorted(self._documents.ends, positions, side="right")
        padding = self._length + 1 - len(tokens)
        segment_ids = np.pad(document - document[0] + 1, (0, padding)).astype(np.int32)
        tokens = np.pad(tokens, (0, padding))
        return {
            "tokens": tokens[:-1],
            "targets": tokens[1:],
            "segment_ids": segment_ids[:-1],
            "loss_mask": (segment_ids[1:] == segment_ids[:-1]) & (segment_ids[1:] > 0),
        }


def training_batches(windows: Windows, batch_size: int, seed: int, first: int) -> Iterator[Batch]:
    """Endless batches; the n-th ever is a function of `windows`, `batch_size`, `seed` and n.

    Each epoch goes through all windows in another order.

    Args:
        windows: what to draw from.
        batch_size: windows per batch.
        seed: of the order.
        first: n of the first batch returned: 0, or the position of a checkpoint.
    """
    dataset = grain.MapDataset.source(windows).shuffle(seed=seed).repeat().batch(batch_size)
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
    iterator = iter(dataset.to_iter_dataset(options))
    grain.experimental.set_next_index(iterator, first)
    return iterator


def evaluation_batches(windows: Windows, batch_size: int, count: int) -> Iterator[Batch]:
    """The same `count` windows (fewer if there are not as many), evenly spread, in batches.

    The last batch is filled up with padding, which no loss counts.
    """
    chosen = np.unique(np.linspace(0, len(windows) - 1, min(count, len(windows))).round())
    for start in range(0, len(chosen), batch_size):
        rows = [windows[int(index)] for index in chosen[start : start + batch_size]]
        empty = {name: np.zeros_like(array) for name, array in rows[0].items()}
        rows += [empty] * (batch_size - len(rows))
        yield {name: np.stack([row[name] for row in rows]) for name in empty}
