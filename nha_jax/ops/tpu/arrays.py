"""The operator's arrays in the layout of the TPU kernels, and back.

A head is a block of lanes: [B, rows, heads * D'], with D' the head's size D padded to a multiple of
128. Slots are padded to a multiple of 16, M'. What is aligned already is reshaped and nothing else.
"""

import math

import jax
import jax.numpy as jnp

from nha_jax.ops.rope import Rope
from nha_jax.ops.state import Slots
from pallas.tpu import LANES, ROW_TILE, expand_table


def flatten_heads(x: jax.Array, padding: int, *, halves: bool) -> jax.Array:
    """Lays out [B, rows, heads, D] as [B, rows + padding, heads * D'].

    halves: pad each half of a head by itself, as queries and keys need to be rotated.
    """
    x = _pad(_pad_halves(x) if halves else _pad_last(x), axis=1, after=padding)
    return x.reshape(*x.shape[:2], -1)


def flatten_decay(log_decay: jax.Array, padding: int) -> jax.Array:
    """Lays out [B, rows, Hkv, M] as [B, Hkv, M', rows + padding]."""
    log_decay = _pad(log_decay, axis=3, after=-log_decay.shape[3] % ROW_TILE)
    return _pad(log_decay, axis=1, after=padding).transpose(0, 2, 3, 1)


def join_slots(slots: Slots) -> jax.Array:
    """Joins slot keys and values side by side: [B, Hkv, M', K' + V']."""
    joined = jnp.concatenate([_pad_halves(slots[0]), _pad_last(slots[1])], -1)
    return _pad(joined, axis=2, after=-joined.shape[2] % ROW_TILE)


def split_slots(slots: jax.Array, M: int, K: int, V: int) -> Slots:
    """Inverts `join_slots`: keys [B, Hkv, M, K] and values [B, Hkv, M, V]."""
    key, value = jnp.split(slots[:, :, :M], [K + -K % LANES], axis=-1)
    return _drop_halves(key, K), value[..., :V]


def rotation_table(rope: Rope, scale: float, padding: int) -> jax.Array:
    """The rotation's table, [1 or B, rows + padding, K2] float32, `expand_table` of it.

    It is multiplied by the root of scale * log2(e). Queries and keys are both rotated by it, so
    their products are logits in units of log 2.
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
    """Pads each half of the last axis to D'/2: what is rotated together stays D'/2 apart."""
    D = x.shape[-1]
    if D % LANES == 0 or D % 2:  # an odd dim is not rotated
        return _pad_last(x)
    halves = x.reshape(*x.shape[:-1], 2, D // 2)
    halves = _pad(halves, axis=halves.ndim - 1, after=(-D % LANES) // 2)
    return halves.reshape(*x.shape[:-1], -1)


def _drop_halves(x: jax.Array, D: int) -> jax.Array:
    """Undoes `_pad_halves`."""
    if D % 2:
        return x[..., :D]
    halves = x.reshape(*x.shape[:-1], 2, -1)[..., : D // 2]
    return halves.reshape(*x.shape[:-1], D)
