"""The arrays of one token of generation, the same for every chip's kernel.

B batch rows, H key/value heads that serve Hq query heads, K key dim, V value dim, M slots, R ring
entries.
"""

from typing import NamedTuple

import jax


class SlotToken(NamedTuple):
    """What the slots need of the new token of each batch row."""

    query: jax.Array  # [B, Hq, K], the feature map applied
    key: jax.Array  # [B, H, K]
    log_decay: jax.Array  # [B, H, M] float32


class DecodeToken(NamedTuple):
    """The new token of each batch row; `slots` is None if the state's is."""

    rotated_query: jax.Array  # [B, Hq, K]
    rotated_key: jax.Array  # [B, H, K]
    value: jax.Array  # [B, H, V]
    slots: SlotToken | None


class SlotState(NamedTuple):
    """The slots, and the rings that only they read."""

    slot_key: jax.Array  # [B, H, M, K] float32
    slot_value: jax.Array  # [B, H, M, V] float32
    key: jax.Array  # [B, R, H, K]
    log_decay: jax.Array  # [B, R, H, M] float32


class DecodeState(NamedTuple):
    """The arrays that are updated in place.

    Without `slots` no token ever leaves the ring: the slots stay empty, M zeros to the softmax.
    """

    rotated_key: jax.Array  # [B, R, H, K]
    value: jax.Array  # [B, R, H, V]
    slots: SlotState | None
