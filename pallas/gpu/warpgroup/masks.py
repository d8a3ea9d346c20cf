"""Who sees whom, in a product of 64 query rows and 64 tokens, and what else has that shape."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas.gpu.spec import CHUNK, COLUMN, ROW, CallSpec


def iota(columns: int, axis: int) -> jax.Array:
    """[C, columns]; of one axis, then spread: a thread has few different numbers to hold."""
    if axis == 0:
        return by_row(plgpu.broadcasted_iota(jnp.int32, (CHUNK,), 0, layout=ROW), columns)
    return by_column(plgpu.broadcasted_iota(jnp.int32, (columns,), 0, layout=COLUMN))


def by_row(x: jax.Array, columns: int) -> jax.Array:
    """[C] -> [C, columns]."""
    return lax.broadcast_in_dim(x, (CHUNK, columns), [0])


def by_column(x: jax.Array) -> jax.Array:
    """[columns] -> [C, columns]."""
    return lax.broadcast_in_dim(x, (CHUNK, *x.shape), [1])


def in_window(spec: CallSpec, row: jax.Array, token: jax.Array) -> jax.Array:
    """Whether query row `row` has the timeline's row `token` in its window, segments aside."""
    now = row + spec.offset
    inside = token <= now
    if spec.window is not None:
        inside &= token > now - spec.window
    first = (
        spec.ahead if spec.masked else spec.offset
    )  # without segments nothing precedes the queries
    return inside & (token >= first) if first else inside
