"""Padding (segment id 0) is read as zeros, whatever it holds.

Its weights are 0, but 0 * NaN is NaN: what padding holds, and the gradient that comes back to it,
has to be replaced before it enters any sum.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from nha_jax.ops.rope import Rope
from nha_jax.ops.types import NHAOutput


def zero_unless(mask: jax.Array, x: jax.Array) -> jax.Array:
    """Puts zeros into x [B, T, ...], and into its gradient, wherever mask [B, T] is False."""
    return jnp.where(mask.reshape(*mask.shape, *(1,) * (x.ndim - mask.ndim)), x, 0)


def clear_padding(segment_ids: jax.Array, x: jax.Array) -> jax.Array:
    """Puts zeros in place of padding in x [B, T, ...], and of its gradient."""
    return zero_unless(segment_ids != 0, x)


def clear_rope(segment_ids: jax.Array, rope: Rope | None) -> Rope | None:
    """Does so in tables [B, T, K/2]; tables [T, K/2] are of positions, not of tokens."""
    if rope is None:
        return None
    cos, sin = (clear_padding(segment_ids, x) if x.ndim == 3 else x for x in rope)
    return cos, sin


def without_padding(attend: Callable[..., NHAOutput]) -> Callable[..., NHAOutput]:
    """Clears the padding of what `attend`, like a `Backend.attend` of segments, takes and gives."""

    def attend_without_padding(
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        log_decay: jax.Array,
        *,
        segment_ids: jax.Array,
        rope: Rope | None,
        **rest,
    ) -> NHAOutput:
        clear = functools.partial(clear_padding, segment_ids)
        arrays = map(clear, (query, key, value, log_decay))
        rope = clear_rope(segment_ids, rope)
        out, state, weight = attend(*arrays, segment_ids=segment_ids, rope=rope, **rest)
        return NHAOutput(clear(out), state, None if weight is None else clear(weight))

    return attend_without_padding
