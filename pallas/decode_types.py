"""The arrays of one token of generation, the same for every chip's kernel.

B batch rows; Hq query heads and Hkv key/value heads; K key dim, V value dim; M slots; R ring
entries. Keys, queries and values are of one dtype, bfloat16 or float32.
"""

from typing import NamedTuple

import jax


class SlotToken(NamedTuple):
    """What the slots need of the new token of each batch row."""

    query: jax.Array  # [B, Hq, K], after the feature map, not rotated
    key: jax.Array  # [B, Hkv, K], as it is
    log_decay: jax.Array  # [B, Hkv, M] float32


class DecodeToken(NamedTuple):
    """The new token of each batch row; `slots` is None where the state's is."""

    rotated_query: jax.Array  # [B, Hq, K]
    rotated_key: jax.Array  # [B, Hkv, K]
    value: jax.Array  # [B, Hkv, V]
    slots: SlotToken | None


class SlotState(NamedTuple):
    """The slots, and the rings of what tokens need when they enter the slots."""

    slot_key: jax.Array  # [B, Hkv, M, K] float32
    slot_value: jax.Array  # [B, Hkv, M, V] float32
    key: jax.Array  # [B, R, Hkv, K]
    log_decay: jax.Array  # [B, R, Hkv, M] float32


class DecodeState(NamedTuple):
    """The state's arrays, which a kernel updates in place.

    With `slots` None no token ever leaves the ring: the slots stay empty, M zeros to the softmax.
    """

    rotated_key: jax.Array  # [B, R, Hkv, K]
    value: jax.Array  # [B, R, Hkv, V]
    slots: SlotState | None
