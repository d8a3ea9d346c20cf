"""Lengths rounded up to few, so that prompts of all lengths run few programs."""

import jax
import numpy as np

from nha_jax.scalars import LARGEST_INT32

SHORTEST_CHUNK, LONGEST_CHUNK = 64, 512
"""What `chunk_for` chooses between."""


def rounded_length(length: int, multiple: int) -> int:
    """Rounds a length up to one of four between a power of two and the next, or to a multiple.

    Of N lengths there are O(log N); none grows by more than a quarter, or to more than `multiple`.

    Args:
        length: at least 1.
        multiple: what the result is a multiple of; a power of two.
    """
    step = max(multiple, 1 << (length - 1).bit_length() >> 3)
    return -(-length // step) * step


def chunk_for(num_tokens: int, num_shared: int = 0) -> int:
    """Chooses prefill_chunk for prompts of this length, among few sizes: each is compiled.

    Args:
        num_tokens: of the longest prompt, at least 1.
        num_shared: with how many tokens all of them begin. At least half of these are whole chunks,
            which an engine can keep, unless they are fewer than the shortest chunk.
    """
    chunk = min(max(1 << (num_tokens - 1).bit_length(), SHORTEST_CHUNK), LONGEST_CHUNK)
    if num_shared < SHORTEST_CHUNK:
        return chunk
    return min(chunk, 1 << num_shared.bit_length() - 1)


def room_for(num_tokens: int) -> int:
    """Chooses max_length for texts of this length, among few sizes: each is compiled."""
    return max(num_tokens, min(rounded_length(num_tokens, multiple=64), LARGEST_INT32))


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
