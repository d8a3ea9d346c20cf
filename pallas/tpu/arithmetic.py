"""Products, rotations and changes of layout that Mosaic compiles well."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

LOG2E = math.log2(math.e)


def matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """a @ b, accumulated in float32."""
    return _dot(a, b, 1, 0)


def matmul_nt(a: jax.Array, b: jax.Array) -> jax.Array:
    """a @ b.T, accumulated in float32."""
    return _dot(a, b, 1, 1)


def matmul_tn(a: jax.Array, b: jax.Array) -> jax.Array:
    """a.T @ b, accumulated in float32."""
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


def flat(x: jax.Array) -> jax.Array:
    """[G, rows, D] -> [G * rows, D]."""
    return x.reshape(x.shape[0] * x.shape[1], x.shape[2])


def by_head(x: jax.Array, group: int) -> jax.Array:
    """[G * rows, D] -> [G, rows, D]."""
    return x.reshape(group, x.shape[0] // group, x.shape[1])


def scaled(x: jax.Array, factor: float) -> jax.Array:
    return x if factor == 1.0 else x * factor


def join(parts: list[jax.Array], axis: int) -> jax.Array:
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis)


def widen(x: jax.Array, width: int, fill: float = 0.0) -> jax.Array:
    """Columns of `fill` up to `width`."""
    missing = width - x.shape[-1]
    if not missing:
        return x
    return jnp.concatenate([x, jnp.full((*x.shape[:-1], missing), fill, x.dtype)], -1)


def overlay(
    op: Callable[..., jax.Array], a: jax.Array, b: jax.Array | None, neutral: float
) -> jax.Array:
    """op(a, b), the narrower one widened by op's neutral element, for one reduction of both."""
    if b is None:
        return a
    width = max(a.shape[-1], b.shape[-1])
    return op(widen(a, width, neutral), widen(b, width, neutral))


def apply_feature_map(x: jax.Array, name: str) -> jax.Array:
    """The slot branch's map of queries and keys, in their dtype."""
    if name == "identity":
        return x
    wide = x.astype(jnp.float32)
    mapped = jnp.maximum(wide, 0.0) if name == "relu" else wide * _sigmoid(wide)
    return mapped.astype(x.dtype)


def feature_map_pullback(gradient: jax.Array, x: jax.Array, name: str) -> jax.Array:
    """The float32 gradient at x, of the same shape, of what the feature map made of it."""
    if name == "identity":
        return gradient
    wide = x.astype(jnp.float32)
    if name == "relu":
        return jnp.where(wide > 0.0, gradient, 0.0)
    sigmoid = _sigmoid(wide)
    return gradient * (sigmoid * (1.0 + wide * (1.0 - sigmoid)))


def _sigmoid(x):
    return 1.0 / (1.0 + jnp.exp2(-x * LOG2E))


def rotate(x: jax.Array, table: jax.Array) -> jax.Array:
    """Rotate-half by a table [rows, 2 K] (`expand_table`); float32."""
    cos, sin = jnp.split(table, 2, axis=1)
    turned = pltpu.roll(x, x.shape[-1] // 2, x.ndim - 1).astype(jnp.float32)
    return x.astype(jnp.float32) * cos + turned * sin


def rotate_back(x: jax.Array, table: jax.Array) -> jax.Array:
    """The transpose of `rotate`, of float32 x."""
    cos, sin = jnp.split(table, 2, axis=1)
    return x * cos - pltpu.roll(x, x.shape[-1] // 2, x.ndim - 1) * sin


def expand_table(cos: jax.Array, sin: jax.Array) -> jax.Array:
    """[..., K / 2] each -> [..., 2 K]: for both halves, the sign of the first's sine folded in."""
    return jnp.concatenate([cos, cos, -sin, sin], axis=-1)


def cumulative_sum(x: jax.Array) -> jax.Array:
    """Inclusive, along the rows of [rows, M] float32; in log steps, as Mosaic has no cumsum."""
    rows, columns = x.shape
    step = 1
    while step < rows:
        shifted = jnp.concatenate([jnp.zeros((step, columns), x.dtype), x[:-step]], 0)
        x, step = x + shifted, 2 * step
    return x


def reverse_cumulative_sum(x: jax.Array) -> jax.Array:
    """Of each row of [rows, M] and all below it."""
    rows, columns = x.shape
    step = 1
    while step < rows:
        shifted = jnp.concatenate([x[step:], jnp.zeros((step, columns), x.dtype)], 0)
        x, step = x + shifted, 2 * step
    return x


def identity_mask(size: int) -> jax.Array:
    shape = (size, size)
    return lax.broadcasted_iota(jnp.int32, shape, 0) == lax.broadcasted_iota(jnp.int32, shape, 1)


def to_column(row: jax.Array) -> jax.Array:
    """[..., 1, n] -> [..., n, 1]."""
    eye = identity_mask(row.shape[-1])
    return jnp.sum(jnp.where(eye, row, 0.0), axis=-1, keepdims=True)


def to_row(column: jax.Array) -> jax.Array:
    """[..., n, 1] -> [..., n]."""
    return jnp.sum(jnp.where(identity_mask(column.shape[-2]), column, 0.0), axis=-2)
