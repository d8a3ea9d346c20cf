"""Rotary position embedding, rotate-half convention (Su et al., arXiv 2104.09864; Llama)."""

import jax
import jax.numpy as jnp

Rope = tuple[jax.Array, jax.Array]
"""(cos, sin), each [T, K/2] or [B, T, K/2], float32."""


def rope_tables(positions: jax.Array, head_dim: int, theta: float = 10000.0) -> Rope:
    """The (cos, sin) tables of `positions` ([T] or [B, T]): angles `position * theta**(-2i/K)`.

    Raises ValueError if `head_dim` is odd.
    """
    if head_dim % 2:
        raise ValueError(f"rope_tables: head_dim must be even, got {head_dim}")
    frequency = theta ** -(jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angle = positions[..., None].astype(jnp.float32) * frequency
    return jnp.cos(angle), jnp.sin(angle)


def apply_rope(x: jax.Array, rope: Rope | None) -> jax.Array:
    """Rotates x [B, T, H, K] by the tables, in at least float32; None leaves it as it is."""
    if rope is None:
        return x
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    # [T, K/2] or [B, T, K/2] -> [1 or B, T, 1, K/2]
    cos, sin = (jnp.expand_dims(t, (0, 2) if t.ndim == 2 else 2).astype(dtype) for t in rope)
    first, second = jnp.split(x.astype(dtype), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
