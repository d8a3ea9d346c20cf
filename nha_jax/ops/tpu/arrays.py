"""The public arrays in the layout of the TPU kernels, and back.

Heads are blocks of lanes, [B, N, H * D'], with D' a multiple of 128; slots a multiple of 16. What
is aligned already is reshaped and nothing else.
"""

import math

import jax
import jax.numpy as jnp

from nha_jax.ops.rope import Rope
from nha_jax.ops.state import Slots
from pallas.tpu import expand_table

LANES = 128
SLOT_TILE = 16


def flatten_heads(x: jax.Array, padding: int, *, halves: bool) -> jax.Array:
    """[B, N, H, D] -> [B, N + padding, H * D']; `halves` for queries and keys."""
    x = _pad(_pad_halves(x) if halves else _pad_last(x), axis=1, after=padding)
    return x.reshape(*x.shape[:2], -1)


def flatten_decay(log_decay: jax.Array, padding: int) -> jax.Array:
    """[B, N, H, M] -> [B, H, M', N + padding]."""
    log_decay = _pad(log_decay, axis=3, after=-log_decay.shape[3] % SLOT_TILE)
    return _pad(log_decay, axis=1, after=padding).transpose(0, 2, 3, 1)


def join_slots(slots: Slots) -> jax.Array:
    """-> [B, H, M', K' + V']."""
    joined = jnp.concatenate([_pad_halves(slots[0]), _pad_last(slots[1])], -1)
    return _pad(joined, axis=2, after=-joined.shape[2] % SLOT_TILE)


def split_slots(slots: jax.Array, M: int, K: int, V: int) -> Slots:
    """The inverse of `join_slots`."""
    key, value = jnp.split(slots[:, :, :M], [K + -K % LANES], axis=-1)
    return _drop_halves(key, K), value[..., :V]


def rotation_table(rope: Rope, scale: float, padding: int) -> jax.Array:
    """[1 or B, N + padding, 2 K'] float32, times the root of scale * log2(e).

    Queries and keys are both rotated by it, so that their products are logits of base 2.
    """
    half = rope[0].shape[-1]
    missing = (-2 * half % LANES) // 2

    def pad(table):
        table = table if table.ndim == 3 else table[None]
        table = table.astype(jnp.float32)
        return _pad(_pad(table, axis=1, after=padding), axis=2, after=missing)

    return expand_table(*map(pad, rope)) * math.sqrt(scale * math.log2(math.e))


def _pad(x: jax.Array, *, axis: int, after: int) -> jax.Array:
    if not after:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, after)
    return jnp.pad(x, widths)


def _pad_last(x: jax.Array) -> jax.Array:
    return _pad(x, axis=x.ndim - 1, after=-x.shape[-1] % LANES)


def _pad_halves(x: jax.Array) -> jax.Array:
    """Each half of the last axis to half of D': what is rotated together stays D'/2 apart."""
    D = x.shape[-1]
    if D % LANES == 0 or D % 2:  # an odd dim is not rotated
        return _pad_last(x)
    halves = x.reshape(*x.shape[:-1], 2, D // 2)
    halves = _pad(halves, axis=halves.ndim - 1, after=(-D % LANES) // 2)
    return halves.reshape(*x.shape[:-1], -1)


def _drop_halves(x: jax.Array, D: int) -> jax.Array:
    """The inverse of `_pad_halves`."""
    if D % 2:
        return x[..., :D]
    halves = x.reshape(*x.shape[:-1], 2, -1)[..., : D // 2]
    return halves.reshape(*x.shape[:-1], D)
