"""`ModelCache`: what a model keeps of its rows between prefill and decode steps."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nha_jax.layers.attention_core import AttentionCore, LayerCache
from nha_jax.layers.specs import divided_cache
from nha_jax.ops.mesh.division import divide_over_mesh


class ModelCache(NamedTuple):
    """What the model keeps of each row's tokens; for finite windows its size never grows.

    Each layer has arrays of its own, rather than a part of one stack, so that a step can update
    them in place.
    """

    layers: tuple[LayerCache, ...]  # num_layers of them
    length: jax.Array  # [B] int32, number of tokens so far


def empty_cache(
    attention: AttentionCore,
    windows: Sequence[int | None],
    batch_size: int,
    max_length: int | None,
) -> ModelCache:
    """Makes the cache of rows without a token, divided over the mesh if there is one.

    Args:
        attention: the layer, whose sizes are those of all layers.
        windows: the window of each layer.
        batch_size: number of rows (B).
        max_length: entries of the caches of layers with full attention.
    """
    layers = tuple(
        attention.new_cache(batch_size, window_size=window_size, max_length=max_length)
        for window_size in windows
    )
    cache = ModelCache(layers, jnp.zeros(batch_size, jnp.int32))
    division = divide_over_mesh(batch_size, attention.config.num_kv_heads)
    return division.place(cache, cache_specs(cache, attention.config.num_kv_heads))


def cache_specs(cache: ModelCache, num_kv_heads: int) -> ModelCache:
    """Says how the cache is divided over the mesh in force: a cache of `PartitionSpec`."""
    division = divide_over_mesh(cache.length.shape[0], num_kv_heads)
    layers = tuple(divided_cache(layer, division) for layer in cache.layers)
    return ModelCache(layers, division.rows)
