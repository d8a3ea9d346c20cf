"""How what `NHAttention` returns is divided over the mesh in force: for `with_auto_axes`."""

from typing import Any

import jax

from nha_jax.layers.attention_core import LayerCache, LayerDiagnostics
from nha_jax.ops.mesh.division import Division, divide_over_mesh, tokens_spec


def divided_cache(cache: LayerCache, division: Division) -> LayerCache:
    """Says how the cache of one layer is divided: a cache of `PartitionSpec`."""
    return LayerCache(division.state, jax.tree.map(lambda _: division.tokens, cache.convolution))


def of_outputs(outputs: jax.Array, *_: Any, **__: Any) -> Any:
    """Says how [B, T, hidden_size] is divided."""
    return tokens_spec(outputs)


def of_diagnosed(result: tuple[jax.Array, LayerDiagnostics], layer: Any, *_: Any, **__: Any) -> Any:
    """Says how the results of `NHAttention.diagnose` are divided."""
    outputs, seen = result
    return tokens_spec(outputs), tokens_spec(seen.log_decay, heads=layer.config.num_kv_heads)


def of_cache(cache: LayerCache, layer: Any, *_: Any, **__: Any) -> LayerCache:
    """Says how the layer's cache is divided."""
    rows = cache.attention.length.shape[0]
    return divided_cache(cache, divide_over_mesh(rows, layer.config.num_kv_heads))


def of_step(result: tuple[jax.Array, LayerCache], layer: Any, *_: Any, **__: Any) -> Any:
    """Says how outputs and cache are divided, as prefill and decode steps return them."""
    outputs, cache = result
    return tokens_spec(outputs), of_cache(cache, layer)
