"""Checks of arguments; each error is one line that names the argument and its value."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from nha_jax.scalars import is_count, is_integer, plain, shown


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
    index = jnp.arange(num_tokens, dtype=jnp.int32)
    if segment_ids is None:
        return index
    index = index[None]
    first = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
    return index - jax.lax.cummax(jnp.where(first, index, 0), axis=1)


def check_integers(name: str, array: jax.typing.ArrayLike) -> jax.Array:
    """Returns the argument of this name as an array; raises TypeError unless it has integers."""
    array = jnp.asarray(array)
    _require_integers(name, array.dtype)
    return array


def check_hidden(name: str, hidden: jax.typing.ArrayLike, hidden_size: int) -> jax.Array:
    """Returns the argument of this name as an array.

    Raises:
        ValueError, TypeError: it is not [batch, time, hidden_size], of a floating dtype, or empty.
    """
    hidden = jnp.asarray(hidden)
    if hidden.ndim != 3 or hidden.shape[-1] != hidden_size:
        raise ValueError(
            f"{name} must be [batch, time, hidden_size={hidden_size}], got shape {hidden.shape}"
        )
    if not hidden.size:
        raise ValueError(f"{name} must not be empty, got shape {hidden.shape}")
    if not jnp.issubdtype(hidden.dtype, jnp.floating):
        raise TypeError(f"{name} must have a floating dtype, got {hidden.dtype}")
    return hidden


def check_count(name: str, value: object) -> int:
    """Returns the argument of this name as an int; raises ValueError unless it is at least 1."""
    number = plain(value)
    if not is_count(number):
        raise ValueError(f"{name}={shown(value)} must be an integer of at least 1 and below 2**31")
    return number


def check_tokens(
    name: str, tokens: jax.typing.ArrayLike, vocab_size: int
) -> tuple[jax.Array, jax.Array]:
    """Tells the tokens of a vocabulary from those that it has not.

    Args:
        name: of the argument, for the error.
        tokens: integers of any dtype, in any shape.
        vocab_size: tokens in [0, vocab_size) are known.

    Returns:
        The tokens in int32, 0 in place of unknown ones, and bool, which of them are known.

    Raises:
        ValueError, TypeError: the tokens are no integers, or lists of several lengths.
    """
    tokens, known = known_tokens(name, tokens, vocab_size)
    return jnp.asarray(tokens), jnp.asarray(known)


def known_tokens(
    name: str, tokens: jax.typing.ArrayLike, vocab_size: int
) -> tuple[np.ndarray | jax.Array, np.ndarray | jax.Array]:
    """Does what `check_tokens` does; what is no array of JAX stays on the host, in NumPy."""
    if not isinstance(tokens, jax.Array):
        tokens = token_array(tokens, name)  # in jnp, a token of 64 bits would lose the upper 32
    _require_integers(name, tokens.dtype)
    if tokens.dtype.itemsize < 4:
        tokens = tokens.astype(np.int32)  # vocab_size may be more than the dtype holds
    known = (tokens >= 0) & (tokens < vocab_size)
    numpy = jnp if isinstance(tokens, jax.Array) else np
    return numpy.where(known, tokens, 0).astype(np.int32), known


def after_unknown(known: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
    """Finds the real tokens that an unknown one precedes in their segment, or that are unknown.

    Args:
        known: [B, T] bool.
        segment_ids: [B, T] integers, or None: each row is one segment.

    Returns:
        [B, T] bool.
    """
    num_tokens = known.shape[1]
    index = jnp.arange(num_tokens, dtype=jnp.int32)[None]
    unknown = ~known if segment_ids is None else ~known & (segment_ids != 0)
    last_unknown = jax.lax.cummax(jnp.where(unknown, index, -1), axis=1)
    first = index - jnp.atleast_2d(default_positions(num_tokens, segment_ids))
    return last_unknown >= first  # the first token of each one's segment


def check_prompt(
    prompt: jax.typing.ArrayLike | Sequence[int], vocab_size: int, name: str = "prompt"
) -> np.ndarray:
    """Returns a prompt as [T] int32; errors call it by `name`.

    Raises:
        ValueError, TypeError: it is empty, not [T] integers, or has tokens outside [0, vocab_size).
    """
    tokens = token_array(prompt, name)
    if tokens.ndim != 1 or not tokens.size:
        got = shown(prompt) if tokens.ndim == 0 else f"shape {tokens.shape}"
        raise ValueError(f"{name} must be [time] and not empty, got {got}")
    _require_integers(name, tokens.dtype)
    if tokens.min() < 0 or tokens.max() >= vocab_size:
        raise ValueError(
            f"{name} must have tokens within [0, {vocab_size}), "
            f"got {shown(int(tokens.min()))} to {shown(int(tokens.max()))}"
        )
    return tokens.astype(np.int32)


def token_array(prompt: object, name: str = "prompt") -> np.ndarray:
    """Returns tokens as an array of any shape and dtype.

    Raises:
        ValueError, TypeError: they are text, or lists of several lengths.
    """
    try:
        tokens = np.asarray(prompt)
    except ValueError:
        raise ValueError(
            f"{name} must be [time] or [batch, time], got lists of several lengths: {shown(prompt)}"
        ) from None
    if tokens.dtype.kind in "US":
        raise TypeError(f"{name} must be tokens, got the text {shown(prompt)}: encode it first")
    if tokens.dtype.kind in "fO" and not isinstance(prompt, np.ndarray):
        exact = np.asarray(prompt, object)
        if exact.size and all(map(is_integer, exact.flat)):  # beyond 64 bits, and so out of range
            raise ValueError(f"{name} must have tokens of a vocabulary, got {shown(prompt)}")
    return tokens


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
    try:
        shape = np.shape(lengths)
    except ValueError:  # lists of several lengths
        raise ValueError(
            f"lengths must be [batch] = ({batch_size},), got {shown(lengths)}"
        ) from None
    if shape != (batch_size,):
        raise ValueError(f"lengths must be [batch] = ({batch_size},), got shape {shape}")
    if not isinstance(lengths, jax.core.Tracer):
        values = np.asarray(lengths)
        _require_integers("lengths", values.dtype)
        if values.min() < least or values.max() > num_tokens:
            raise ValueError(
                f"lengths must be within [{least}, {num_tokens}], got {values.tolist()}"
            )
    return check_integers("lengths", lengths).astype(jnp.int32)


def check_room(windows: Sequence[int | None], max_length: int | None, num_tokens: int) -> None:
    """Raises ValueError if a layer has full attention and max_length is missing or too small."""
    if None in windows and (max_length is None or max_length < num_tokens):
        raise ValueError(
            f"max_length={max_length}: layers with full attention (window None) keep every "
            f"token; give the longest a row will become, at least the prompt's {num_tokens}"
        )


def check_cache(rows: int, max_length: int | None, batch_size: int, name: str = "tokens") -> None:
    """Raises ValueError if max_length is given beside a cache, or the cache has other rows.

    Args:
        rows: of the cache.
        max_length: None: it was not given.
        batch_size: rows of the argument of this name.
        name: of that argument, for the error.
    """
    if max_length is not None:
        raise ValueError(
            f"max_length={max_length}: the cache has its own; leave it out with a cache"
        )
    if rows != batch_size:
        raise ValueError(f"{name} have {batch_size} rows, but the cache {rows}")
