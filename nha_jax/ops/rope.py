"""Rotary position embedding, rotate-half convention (Su et al., arXiv 2104.09864; Llama)."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from nha_jax.config_parts import RopeScaling
from nha_jax.ops.state import compute_dtype

Rope = tuple[jax.Array, jax.Array]
"""(cos, sin), each [T, K/2] or [B, T, K/2], float32."""


def rope_tables(
    positions: jax.Array,
    head_dim: int,
    theta: float = 10000.0,
    scaling: RopeScaling | None = None,
) -> Rope:
    """The (cos, sin) tables of `positions` ([T] or [B, T]): angles `position * frequency`.

    With "yarn" both tables are multiplied by its attention factor: they need not be a rotation's.

    Raises ValueError if `head_dim` is odd.
    """
    frequency = rope_frequencies(head_dim, theta, scaling)
    # [T, 1] or [B, T, 1], and [1, K/2] or [1, 1, K/2]
    frequency = np.expand_dims(frequency, tuple(range(positions.ndim)))
    angle = positions[..., None].astype(jnp.float32) * frequency
    size = 1.0 if scaling is None else _attention_factor(scaling)
    return size * jnp.cos(angle), size * jnp.sin(angle)


def rope_frequencies(
    head_dim: int, theta: float = 10000.0, scaling: RopeScaling | None = None
) -> np.ndarray:
    """[K/2] float32, in radians a token: `theta**(-2i/K)`, changed as `scaling` says.

    Raises ValueError if `head_dim` is odd.
    """
    if head_dim % 2:
        raise ValueError(f"rope_tables: head_dim must be even, got {head_dim}")
    # In float32 throughout, as pretrained models had them: far on, a last bit is a large angle.
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequency = 1 / np.float32(theta) ** exponents
    if scaling is None:
        return frequency
    slowed = frequency / np.float32(scaling.factor)
    match scaling.kind:
        case "linear":
            return slowed
        case "llama3":
            kept = _kept_by_llama3(frequency, scaling)
        case "yarn":
            kept = _kept_by_yarn(head_dim, theta, scaling)
    return (1 - kept) * slowed + kept * frequency


def apply_rope(x: jax.Array, rope: Rope | None) -> jax.Array:
    """Rotates x [B, T, H, K] by the tables, in at least float32; None leaves it as it is."""
    if rope is None:
        return x
    dtype = compute_dtype(x)
    # [T, K/2] or [B, T, K/2] -> [1 or B, T, 1, K/2]
    cos, sin = (jnp.expand_dims(t, (0, 2) if t.ndim == 2 else 2).astype(dtype) for t in rope)
    first, second = jnp.split(x.astype(dtype), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def _kept_by_llama3(frequency: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """[K/2] float32 in [0, 1]: how much of a frequency stays, by its turns in the old context."""
    assert scaling.original_length is not None
    turns = np.float32(scaling.original_length) * frequency / np.float32(2 * math.pi)
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    return np.clip((turns - np.float32(low)) / np.float32(high - low), 0, 1)


def _kept_by_yarn(head_dim: int, theta: float, scaling: RopeScaling) -> np.ndarray:
    """[K/2] float32 in [0, 1]: all of those that turn fast, none of the slow, linear in i between.

    arXiv 2309.00071, section 3.2. The upper bound is one of head_dim, not of head_dim / 2, as in
    the code that YaRN's models were trained with.
    """
    length = scaling.original_length
    assert length is not None

    def dimension(turns: float) -> float:
        """The (real) i whose frequency turns so often in the old context."""
        return head_dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    if first == last:
        last += 0.001
    steps = np.arange(head_dim // 2, dtype=np.float32)
    return 1 - np.clip((steps - np.float32(first)) / np.float32(last - first), 0, 1)


def _attention_factor(scaling: RopeScaling) -> float:
    """What the rotated vectors are multiplied by; YaRN's own default if none is given."""
    if scaling.kind != "yarn":
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    return 0.1 * math.log(scaling.factor) + 1
