"""Checks of arguments: each error names the argument and its value."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


def check_segments_and_positions(
    shape: tuple[int, ...], segment_ids: jax.Array | None, positions: jax.Array | None
) -> tuple[jax.Array | None, jax.Array]:
    """The segment ids and the positions, given or not, of tokens [B, T] of this shape."""
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
    """[T], or with segments [B, T]: each token's distance from its segment's first."""
    index = jnp.arange(num_tokens)
    if segment_ids is None:
        return index
    first = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
    return index - jax.lax.cummax(jnp.where(first, index, 0), axis=1)


def check_integers(name: str, array: jax.typing.ArrayLike) -> jax.Array:
    array = jnp.asarray(array)
    _require_integers(name, array.dtype)
    return array


def check_prompt(prompt: jax.typing.ArrayLike | Sequence[int], vocab_size: int) -> np.ndarray:
    """The prompt as [T] int32, with tokens within [0, vocab_size)."""
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
    if np.shape(lengths) != (batch_size,):
        raise ValueError(
            f"lengths must be [batch] = ({batch_size},), got shape {np.shape(lengths)}"
        )
    # Under jit the values are not known; there they are the caller's responsibility.
    if not isinstance(lengths, jax.core.Tracer):
        values = np.asarray(lengths)
        if values.min() < least or values.max() > num_tokens:
            raise ValueError(
                f"lengths must be within [{least}, {num_tokens}], got {values.tolist()}"
            )
    return check_integers("lengths", lengths).astype(jnp.int32)
