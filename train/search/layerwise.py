"""The held-out loss of one model with many choices of windows, computed a layer at a time."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import nha_jax
from train.data.batches import Batch
from train.step.evaluation import bits_per_target
from train.step.losses import LossSum, loss_sum
from train.windows import Window, Windows

DeviceBatch = dict[str, jax.Array]
"""A `Batch` whose arrays are on the device."""


class LayerwiseLoss:
    """Evaluates one model with different windows, by a compiled function for each distinct window.

    A compiled function applies one layer, whose index is an argument. So windows that were never
    seen together compile nothing, unless one of them is new. Everything is on the default device.
    """

    def __init__(
        self, model: nha_jax.Model, batches: Iterable[Batch], bytes_per_target: float = 1.0
    ):
        """Copies the batches to the device; nothing is compiled yet.

        Args:
            model: the model, whose own windows do not matter.
            batches: what to measure on, all of one shape [B, T].
            bytes_per_target: of the batches' text; see `train.data.token_source.Split`.
        """
        self._num_layers = model.config.num_layers
        self._bytes_per_target = bytes_per_target
        self._batches = [
            {name: jnp.asarray(array) for name, array in batch.items()} for batch in batches
        ]
        graph, self._state = nnx.split(model)

        def embed(state: Any, batch: DeviceBatch) -> jax.Array:
            return nnx.merge(graph, state).embed_tokens(batch["tokens"])

        def apply_layer(
            state: Any, hidden: jax.Array, batch: DeviceBatch, index: jax.Array, window_size: Window
        ) -> jax.Array:
            return nnx.merge(graph, state).apply_layer(
                index, hidden, window_size, segment_ids=batch["segment_ids"]
            )

        def loss(state: Any, hidden: jax.Array, batch: DeviceBatch) -> LossSum:
            model = nnx.merge(graph, state)
            return loss_sum(lambda *_, **__: model.logits(model.norm(hidden)), batch)

        self._embed = jax.jit(embed)
        self._apply_layer = jax.jit(apply_layer, static_argnames="window_size")
        self._loss = jax.jit(loss)

    def bits_per_byte(self, proposals: Sequence[Windows]) -> Iterator[float]:
        """Gives the loss with each proposal's windows, as `train.step.evaluation` measures it.

        The first layers that a proposal has in common with the one before it are not run again:
        the hidden states before the first layer that differs are kept, for the next proposal only.
        So proposals that each change one layer take least time in the order of that layer.

        Args:
            proposals: each a window for every layer.
        """
        start, inputs = 0, self._embedded()
        for number, windows in enumerate(proposals):
            following = proposals[number + 1 : number + 2]
            shared = max((_shared_layers(windows, other) for other in following), default=0)
            resume = min(shared, self._num_layers - 1)
            sums, kept = [], []
            for hidden, batch in zip(inputs, self._batches, strict=True):
                for index in range(start, self._num_layers):
                    if index == resume:
                        kept.append(hidden)
                    hidden = self._apply_layer(
                        self._state, hidden, batch, np.int32(index), window_size=windows[index]
                    )
                sums.append(self._loss(self._state, hidden, batch))
            yield bits_per_target(sums) / self._bytes_per_target
            start, inputs = (resume, kept) if resume >= start else (0, self._embedded())

    def _embedded(self) -> list[jax.Array]:
        """Returns what the first layer reads: [B, T, hidden_size] for each batch."""
        return [self._embed(self._state, batch) for batch in self._batches]


def _shared_layers(windows: Windows, other: Windows) -> int:
    """Counts the layers, from the first on, whose windows are the same."""
    same = [window == wanted for window, wanted in zip(windows, other, strict=True)]
    return (*same, False).index(False)
