"""Products, rotations and changes of layout that Mosaic compiles well."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

LOG2E = math.log2(math.e)
LANES = 128  # columns of a register


def matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns a @ b, accumulated in float32."""
    return _dot(a, b, 1, 0)


def matmul_nt(a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns a @ b.T, accumulated in float32."""
    return _dot(a, b, 1, 1)


def matmul_tn(a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns a.T @ b, accumulated in float32."""
    return _dot(a, b, 0, 0)


def _dot(a, b, contract_a, contract_b):
    exact = a.dtype == jnp.float32
    return lax.dot_general(
        a,
        b,
        (((contract_a,), (contract_b,)), ((), ())),
        precision=lax.Precision.HIGHEST if exact else None,
        preferred_element_type=jnp.float32,
    )


def merge_group(x: jax.Array) -> jax.Array:
    """Makes [G, rows, D] one operand [G * rows, D], for all heads of a group at once."""
    return x.reshape(x.shape[0] * x.shape[1], x.shape[2])


def split_group(x: jax.Array, group: int) -> jax.Array:
    """Inverts `merge_group`: [G * rows, D] -> [G, rows, D]."""
    return x.reshape(group, x.shape[0] // group, x.shape[1])


def scaled(x: jax.Array, factor: float) -> jax.Array:
    """Returns x * factor, without an operation if the factor is 1."""
    return x if factor == 1.0 else x * factor


def join(parts: list[jax.Array], axis: int) -> jax.Array:
    """Concatenates, without an operation if there is one part."""
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis)


def pad_columns(x: jax.Array, width: int, fill: float = 0.0) -> jax.Array:
    """Appends columns of `fill` up to `width`."""
    missing = width - x.shape[-1]
    if not missing:
        return x
    return jnp.concatenate([x, jnp.full((*x.shape[:-1], missing), fill, x.dtype)], -1)


def overlay(
    op: Callable[..., jax.Array], a: jax.Array, b: jax.Array | None, neutral: float
) -> jax.Array:
    """Applies op to a and b, the narrower one padded with columns of op's neutral element.

    One reduction over the columns by op then serves both arrays. b may be None: a alone.
    """
    if b is None:
        return a
    width = max(a.shape[-1], b.shape[-1])
    return op(pad_columns(a, width, neutral), pad_columns(b, width, neutral))


def apply_feature_map(x: jax.Array, name: str) -> jax.Array:
    """Maps queries or keys for the slots, by the operator's slot_feature_map, in their dtype."""
    if name == "identity":
        return x
    x_float32 = x.astype(jnp.float32)
    mapped = jnp.maximum(x_float32, 0.0) if name == "relu" else x_float32 * _sigmoid(x_float32)
    return mapped.astype(x.dtype)


def feature_map_pullback(gradient: jax.Array, x: jax.Array, name: str) -> jax.Array:
    """Takes the gradient of `apply_feature_map(x, name)`, float32, back to x."""
    if name == "identity":
        return gradient
    x_float32 = x.astype(jnp.float32)
    if name == "relu":
        return jnp.where(x_float32 > 0.0, gradient, 0.0)
    sigmoid = _sigmoid(x_float32)
    return gradient * (sigmoid * (1.0 + x_float32 * (1.0 - sigmoid)))


def _sigmoid(x):
    return 1.0 / (1.0 + jnp.exp2(-x * LOG2E))


def table_columns(K: int) -> int:
    """How many columns the table of `rotate` has: K if half a head is whole registers, or 2 K."""
    return K if K % (2 * LANES) == 0 else 2 * K


def expand_table(cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Makes `rotate`'s table [..., table_columns(K)] of cosines and sines, [..., K / 2] each.

    Where half a head is whole registers, it is the two side by side. Elsewhere it holds both for
    both halves of a head, with the sign of the first half's sine.
    """
    K = 2 * cos.shape[-1]
    parts = [cos, sin] if table_columns(K) == K else [cos, cos, -sin, sin]
    return jnp.concatenate(parts, axis=-1)


def rotate(x: jax.Array, table: jax.Array) -> jax.Array:
    """Rotates x [..., rows, K] by halves, as Llama does, by a table of `expand_table`; float32."""
    cos, sin = _of_rank(x.ndim, table)
    if cos.shape[-1] == x.shape[-1]:
        swapped = pltpu.roll(x, x.shape[-1] // 2, x.ndim - 1).astype(jnp.float32)
        return x.astype(jnp.float32) * cos + swapped * sin
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def rotate_back(x: jax.Array, table: jax.Array) -> jax.Array:
    """Transposes `rotate`: takes the gradient of the rotated x, float32, back to x."""
    cos, sin = _of_rank(x.ndim, table)
    if cos.shape[-1] == x.shape[-1]:
        return x * cos - pltpu.roll(x, x.shape[-1] // 2, x.ndim - 1) * sin
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos + second * sin, second * cos - first * sin], -1)


def _of_rank(rank: int, table: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cuts the table in its two halves [..., rows, K or K / 2] of this many axes."""
    cos, sin = (jnp.expand_dims(x, tuple(range(rank - 2))) for x in jnp.split(table, 2, axis=1))
    return cos, sin


def cumulative_sum(x: jax.Array) -> jax.Array:
    """Sums each row of [rows, M] float32 and all rows above it.

    In log2(rows) shifted additions, because Mosaic has no cumulative sum.
    """
    rows, columns = x.shape
    step = 1
    while step < rows:
        shifted = jnp.concatenate([jnp.zeros((step, columns), x.dtype), x[:-step]], 0)
        x, step = x + shifted, 2 * step
    return x


def reverse_cumulative_sum(x: jax.Array) -> jax.Array:
    """Sums each row of [rows, M] float32 and all rows below it."""
    rows, columns = x.shape
    step = 1
    while step < rows:
        shifted = jnp.concatenate([x[step:], jnp.zeros((step, columns), x.dtype)], 0)
        x, step = x + shifted, 2 * step
    return x


def identity_mask(size: int) -> jax.Array:
    """A bool array [size, size], True on the diagonal."""
    shape = (size, size)
    return lax.broadcasted_iota(jnp.int32, shape, 0) == lax.broadcasted_iota(jnp.int32, shape, 1)


def to_column(row: jax.Array) -> jax.Array:
    """Transposes rows [..., 1, n] to columns [..., n, 1]."""
    eye = identity_mask(row.shape[-1])
    return jnp.sum(jnp.where(eye, row, 0.0), axis=-1, keepdims=True)


def to_row(column: jax.Array) -> jax.Array:
    """Transposes columns [..., n, 1] to rows [..., n]."""
    return jnp.sum(jnp.where(identity_mask(column.shape[-2]), column, 0.0), axis=-2)
