"""The blocks of a model as one stacked module: creating it, and running its layers in order.

Every parameter of the stack has a leading axis of num_layers entries. The windows of the layers
repeat with a *period* (`ModelConfig.window_period`), so a scan over the num_layers / period
repetitions, with the period's blocks written out one after the other inside it, compiles each
window once. In the scan's trees, layer `repetition * period + i` is entry `repetition` of tree `i`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from nha_jax.config import ModelConfig, Remat
from nha_jax.layers.attention_core import LayerCache
from nha_jax.layers.block import Block
from nha_jax.layers.remat import remat_policy

LayerStep = Callable[[Block, jax.Array, Any, Any, Any], tuple[jax.Array, Any]]
"""step(block, hidden, cache, shared, window_size) -> (hidden, new cache or other results of it).

window_size may be whatever tells layers apart, such as a layer's windows in two models.

It closes over no arrays: `jax.checkpoint` keeps what it is given, after the trace that it is of.
"""


def stacked_blocks(config: ModelConfig, rngs: nnx.Rngs) -> Block:
    """Creates num_layers blocks as one module; its parameters' leading axis is named "layers"."""

    @nnx.split_rngs(splits=config.num_layers)
    @nnx.vmap(transform_metadata={nnx.PARTITION_NAME: "layers"})
    def create(rngs: nnx.Rngs) -> Block:
        return Block(config, rngs=rngs)

    return create(rngs)


def block_of_layer(blocks: Block, index: int | jax.Array) -> Block:
    """Takes one layer's block out of the stack.

    Args:
        blocks: as `stacked_blocks` creates them.
        index: which layer; it may be traced, and is then clamped to [0, num_layers).
    """
    graph, stack = nnx.split(blocks)
    parameters = jax.tree.map(
        lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), stack
    )  # [num_layers, ...] -> [...]
    return nnx.merge(graph, parameters)


def scan_blocks(
    step: LayerStep,
    blocks: Block,
    hidden: jax.Array,
    windows: Sequence[Any],
    caches: tuple[Any, ...] | None = None,
    *,
    shared: Any = None,
    remat: Remat = "none",
) -> tuple[jax.Array, tuple[Any, ...]]:
    """Runs `step` through all layers, in order.

    Args:
        step: what a layer does.
        blocks: as `stacked_blocks` creates them.
        hidden: [B, T, hidden_size], what the first layer reads.
        windows: the window of each layer of one period.
        caches: a tree for each layer of the period, its leaves stacked over the repetitions, as
            `stack_layers` gives them; None: `step` gets None.
        shared: a tree of arrays that every layer gets.
        remat: what the backward pass keeps of each block, as `ModelConfig.remat`.

    Returns:
        What the last layer gave, [B, T, hidden_size], and the second results of `step`, arranged
        like `caches`.
    """
    graph, stack = nnx.split(blocks)
    groups = jax.tree.map(
        lambda leaf: leaf.reshape(-1, len(windows), *leaf.shape[1:]), stack
    )  # [num_layers, ...] -> [repetitions, period, ...]

    def run(
        parameters: nnx.State, hidden: jax.Array, cache: Any, shared: Any, window_size: Any
    ) -> tuple[jax.Array, Any]:
        return step(nnx.merge(graph, parameters), hidden, cache, shared, window_size)

    if remat != "none":
        # Inside a scan nothing can be merged with the recomputation, so no barrier is needed.
        run = jax.checkpoint(run, prevent_cse=False, static_argnums=4, policy=remat_policy(remat))

    def run_period(hidden: jax.Array, group: tuple[nnx.State, tuple[Any, ...]]):
        parameters_of_layers = unstack(group[0], len(windows))
        results = []
        for parameters, cache, window_size in zip(
            parameters_of_layers, group[1], windows, strict=True
        ):
            hidden, result = run(parameters, hidden, cache, shared, window_size)
            results.append(result)
        return hidden, tuple(results)

    if caches is None:
        caches = (None,) * len(windows)
    return jax.lax.scan(run_period, hidden, (groups, caches))


def stack_layers(layers: Sequence[LayerCache], period: int) -> tuple[LayerCache, ...]:
    """Stacks the caches of all layers as `scan_blocks` takes them: one tree a layer of the period.

    Args:
        layers: num_layers caches.
        period: layers of a window period; it divides num_layers.
    """
    return tuple(
        jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers[i::period]) for i in range(period)
    )


def unstack_layers(stacked: Sequence[LayerCache], repetitions: int) -> tuple[LayerCache, ...]:
    """Gives the cache of each layer by itself: the inverse of `stack_layers`."""
    by_period = [unstack(tree, repetitions) for tree in stacked]
    return tuple(layer for layers in zip(*by_period, strict=True) for layer in layers)


def unstack(tree: Any, count: int) -> list[Any]:
    """Gives the `count` trees whose leaves are stacked along axis 0."""
    leaves, structure = jax.tree.flatten(tree)
    # The gradient of split is one concatenation; that of indexing would be a sum of padded parts.
    parts = [jax.lax.split(leaf, (1,) * count, axis=0) for leaf in leaves]
    return [
        jax.tree.unflatten(structure, [part[i].squeeze(0) for part in parts]) for i in range(count)
    ]


def in_layer_order(results: tuple[Any, ...]) -> Any:
    """Turns the results of `scan_blocks` into one tree with leaves [num_layers, ...]."""

    def merge(*leaves: jax.Array) -> jax.Array:
        repetitions = len(leaves[0])  # not -1: there may be no entries, without slots
        return jnp.stack(leaves, axis=1).reshape(repetitions * len(leaves), *leaves[0].shape[1:])

    return jax.tree.map(merge, *results)
