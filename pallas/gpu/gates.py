"""The decays of the chunks, computed by XLA ahead of the state pass and of the backward.

The output pass makes its own of log_decay: XLA computes no more here than its callers read.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas.gpu.spec import CHUNK

LOG2E = 1.4426950408889634
FLOOR = -8.0  # nats; the least decay of a token inside a chunk


class Gates(NamedTuple):
    """Of N rows in chunks of C, s = 1 - exp(log_decay), G the chunk's cumulative log decay.

    Only sums of decays are ever exponentiated, so that none overflows and -inf is exact. But the
    kernels need differences of G, between rows up to 8 tokens away from a reference: for G alone a
    decay below -8 nats counts as -8, which leaves e^-8 of what the slot held before the token, for
    the rest of its chunk. `to_end` and `total` know no floor, so nothing of it reaches the next.
    """

    cumulative: jax.Array  # [B, N, H, M] float32, G, floored, in units of log 2
    write: jax.Array  # [B, N, H, M] bfloat16, s
    to_end: jax.Array  # [B, N, H, M] bfloat16, s times the decay from the row to its chunk's end
    total: jax.Array  # [B, H, N / C, M] float32, the decay over a chunk


def chunk_gates(log_decay: jax.Array, written: jax.Array | None, kept: jax.Array | None) -> Gates:
    """The gates of log_decay [B, N, H, M] float32, N a multiple of C, values in [-inf, 0].

    Args:
      written: [B, N] bool, the row's token is in the slots at its chunk's end; None: all are.
      kept: [B, N / C] bool, what the slots held at the chunk's start they may hold at its end.
    """
    B, N, H, M = log_decay.shape
    chunks = log_decay.reshape(B, N // CHUNK, CHUNK, H, M)
    write = -jnp.expm1(chunks)
    cumulative = jnp.cumsum(jnp.maximum(chunks, FLOOR) * LOG2E, axis=2)
    from_row = jnp.cumsum(chunks[:, :, ::-1], axis=2)[:, :, ::-1]
    after = jnp.pad(from_row[:, :, 1:], ((0, 0), (0, 0), (0, 1), (0, 0), (0, 0)))
    to_end, total = write * jnp.exp(after), jnp.exp(from_row[:, :, 0])
    if written is not None and kept is not None:
        to_end = jnp.where(written.reshape(*chunks.shape[:3], 1, 1), to_end, 0)
        total = jnp.where(kept[..., None, None], total, 0)
    narrow = lambda x: x.astype(jnp.bfloat16).reshape(B, N, H, M)  # noqa: E731
    return Gates(
        cumulative.reshape(B, N, H, M), narrow(write), narrow(to_end), total.swapaxes(1, 2)
    )
