"""Checks of arguments; each error is one line that names the argument and its value."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


def check_segments_and_positions(
    shape: tuple[int, ...], segment_ids: jax.Array | None, positions: jax.Array | None
) -> tuple[jax.Array | None, jax.Array]:
    """Checks segment ids and positions, and fills in the default positions.

    Args:
        shape: (B, T), of the tokens.
        segment_ids: [B, T] integers, or None.
        positions: [T] or [B, T] integers, or None for `default_positions`.

    Returns:
        The segment ids, or None, and the positions.

    Raises:
        ValueError, TypeError: one of them has a wrong shape or dtype.
    """
    if segment_ids is not None:
        segment_ids = check_integers("segment_ids", segment_ids)
        if segment_ids.shape != shape:
            raise ValueError(
                f"segment_ids must have the tokens' shape {shape}, got {segment_ids.shape}"
            )
    if positions is None:
        positions = default_positions(shape[1], segment_ids)
    positions = check_integers("positions", positions)
    if positions.shape not in (shape, shape[1:]):
        raise ValueError(
            f"positions must be [time] or [batch, time] for tokens of shape {shape}, "
            f"got {positions.shape}"
        )
    return segment_ids, positions


def default_positions(num_tokens: int, segment_ids: jax.Array | None) -> jax.Array:
    """Counts each token's distance from the first of its segment: [T], or [B, T] with segments."""
    index = jnp.arange(num_tokens)
    if segment_ids is None:
        return index
    first = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
    return index - jax.lax.cummax(jnp.where(first, index, 0), axis=1)


def check_integers(name: str, array: jax.typing.ArrayLike) -> jax.Array:
    """Returns the argument of this name as an array; raises TypeError unless it has integers."""
    array = jnp.asarray(array)
    _require_integers(name, array.dtype)
    return array


def check_prompt(prompt: jax.typing.ArrayLike | Sequence[int], vocab_size: int) -> np.ndarray:
    """Returns a prompt as [T] int32.

    Raises:
        ValueError, TypeError: it is empty, not [T] integers, or has tokens outside [0, vocab_size).
    """
    tokens = np.asarray(prompt)
    if tokens.ndim != 1 or not tokens.size:
        raise ValueError(f"prompt must be [time] and not empty, got shape {tokens.shape}")
    _require_integers("prompt", tokens.dtype)
    if tokens.min() < 0 or tokens.max() >= vocab_size:
        raise ValueError(
            f"prompt must have tokens within [0, {vocab_size}), "
            f"got {tokens.min()} to {tokens.max()}"
        )
    return tokens.astype(np.int32)


def _require_integers(name: str, dtype: jnp.dtype) -> None:
    if not jnp.issubdtype(dtype, jnp.integer):
        raise TypeError(f"{name} must be integers, got dtype {dtype}")


def check_lengths(
    lengths: jax.typing.ArrayLike, batch_size: int, num_tokens: int, least: int
) -> jax.Array:
    """Returns the lengths of rows as [batch_size] int32.

    Raises:
        ValueError, TypeError: they are not [batch_size] integers within [least, num_tokens]. Under
            jit the values are unknown and not checked.
    """
    if np.shape(lengths) != (batch_size,):
        raise ValueError(
            f"lengths must be [batch] = ({batch_size},), got shape {np.shape(lengths)}"
        )
    if not isinstance(lengths, jax.core.Tracer):
        values = np.asarray(lengths)
        if values.min() < least or values.max() > num_tokens:
            raise ValueError(
                f"lengths must be within [{least}, {num_tokens}], got {values.tolist()}"
            )
    return check_integers("lengths", lengths).astype(jnp.int32)
