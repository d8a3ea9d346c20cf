"""The held-out loss of one model under many window layouts, a layer at a time."""

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
"""A `Batch`, its arrays on the device."""


class LayerwiseLoss:
    """Evaluates layouts by compiled functions of one layer each: one for every distinct window.

    Which layer it is, is an argument, so that a layout never seen before costs no compilation
    unless it brings a new window. Everything is on the default device.
    """

    def __init__(
        self, model: nha_jax.Model, batches: Iterable[Batch], bytes_per_target: float = 1.0
    ):
        """Nothing is compiled yet.

        Args:
            model: its own layout does not matter.
            batches: what to measure on, all of one shape [B, T].
            bytes_per_target: of their text; see `train.data.token_source.Split`.
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

    def bits_per_byte(self, layouts: Sequence[Windows]) -> Iterator[float]:
        """The loss under each layout, in order; see `train.step.evaluation.measure_held_out`.

        The layers that a layout shares with the one before it, from the first on, are not run
        again where their result was kept: one set of hidden states is, of the deepest layer that
        the next layout shares. So variants of one layout are soonest done in the order of the
        layer that they change.

        Args:
            layouts: a window for each layer, all of them.
        """
        start, inputs = 0, self._embedded()
        for number, layout in enumerate(layouts):
            following = layouts[number + 1 : number + 2]
            shared = max((_shared_layers(layout, other) for other in following), default=0)
            resume = min(shared, self._num_layers - 1)
            sums, kept = [], []
            for hidden, batch in zip(inputs, self._batches, strict=True):
                for index in range(start, self._num_layers):
                    if index == resume:
                        kept.append(hidden)
                    hidden = self._apply_layer(
                        self._state, hidden, batch, np.int32(index), window_size=layout[index]
                    )
                sums.append(self._loss(self._state, hidden, batch))
            yield bits_per_target(sums) / self._bytes_per_target
            start, inputs = (resume, kept) if resume >= start else (0, self._embedded())

    def _embedded(self) -> list[jax.Array]:
        """What the first layer reads: [B, T, hidden_size] for each batch."""
        return [self._embed(self._state, batch) for batch in self._batches]


def _shared_layers(layout: Windows, other: Windows) -> int:
    """How many windows, from the first layer on, are the same."""
    same = [window == wanted for window, wanted in zip(layout, other, strict=True)]
    return (*same, False).index(False)
