"""Lengths rounded up to few, so that prompts of all lengths run few programs."""

import jax
import numpy as np


def rounded_length(length: int, multiple: int) -> int:
    """Rounds a length up to one of four between a power of two and the next, or to a multiple.

    Of N lengths there are O(log N); none grows by more than a quarter, or to more than `multiple`.

    Args:
        length: at least 1.
        multiple: what the result is a multiple of; a power of two.
    """
    step = max(multiple, 1 << (length - 1).bit_length() >> 3)
    return -(-length // step) * step


def pad_rows(rows: np.ndarray | jax.Array, length: int) -> np.ndarray:
    """Pads rows [B, T] with zeros on the right: [B, length]."""
    return np.pad(rows, ((0, 0), (0, length - rows.shape[1])))


def to_host(
    tokens: jax.typing.ArrayLike,
) -> tuple[jax.typing.ArrayLike, jax.sharding.Sharding | None]:
    """Takes tokens to the host, where no length needs a program of its own.

    Returns:
        The tokens, and the place to which `jax.device_put` brings them back. Those that several
        devices hold stay as they are.
    """
    if not isinstance(tokens, jax.Array) or len(tokens.devices()) > 1:
        return tokens, None
    return jax.device_get(tokens), tokens.sharding if tokens.committed else None
