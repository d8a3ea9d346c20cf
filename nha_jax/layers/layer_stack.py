"""Layers as one stack [L, ...], as groups of a window period, and each by itself.

P is the window period: a scan over the L/P groups gives, for each of their P places, leaves
[L/P, ...]; layer g * P + p is place p at index g.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from nha_jax.layers import LayerCache


def layer_of(stack: nnx.State, index: int | jax.Array) -> nnx.State:
    """[L, ...] -> [...], of each parameter."""
    return jax.tree.map(
        lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), stack
    )


def stack_layers(layers: Sequence[LayerCache], period: int) -> tuple[LayerCache, ...]:
    """Of L layers -> of each place in the window period, stacked over its L/P repetitions."""
    return tuple(
        jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers[place::period])
        for place in range(period)
    )


def unstack_layers(stacked: Sequence[LayerCache], repeats: int) -> tuple[LayerCache, ...]:
    """The inverse of `stack_layers`."""
    places = [unstack(place, repeats) for place in stacked]
    return tuple(layer for layers in zip(*places, strict=True) for layer in layers)


def unstack(tree: Any, count: int) -> list[Any]:
    """The `count` trees whose leaves are stacked along axis 0."""
    leaves, structure = jax.tree.flatten(tree)
    # The gradient of split is one concatenation; that of indexing would be a sum of padded parts.
    parts = [jax.lax.split(leaf, (1,) * count, axis=0) for leaf in leaves]
    return [
        jax.tree.unflatten(structure, [part[i].squeeze(0) for part in parts]) for i in range(count)
    ]


def in_layer_order(period: tuple[Any, ...]) -> Any:
    """P trees with leaves [L/P, ...], as a scan over groups of P layers gives them -> [L, ...]."""

    def stack(*leaves: jax.Array) -> jax.Array:
        repeats = len(leaves[0])  # not -1: there may be no entries, without slots
        return jnp.stack(leaves, axis=1).reshape(repeats * len(leaves), *leaves[0].shape[1:])

    return jax.tree.map(stack, *period)
