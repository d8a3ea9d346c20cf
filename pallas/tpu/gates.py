"""The decays of a chunk, exact enough for any of them and without overflow."""

import jax
import jax.numpy as jnp

from pallas.tpu.arithmetic import LOG2E, cumulative_sum
from pallas.tpu.spec import CallSpec

MAX_EXPONENT = 100.0  # of 2, in factors that a mask removes


class Gates:
    """The decays of a chunk, of tokens j to rows r, without overflow for any decay.

    A decay below the floor (8 nats a token; 16 in float32) counts as the floor: that leaves e^-8
    (e^-16) of what the slot held before. Then no sum over half a block of rows, 8 (4) tokens,
    exceeds 2^93, so that a block's weights may be taken relative to its middle:
    exp(G_r - G_j) = rise[block][r] * fall[block][j], with j up to the block's last column.
    """

    def __init__(self, decay: jax.Array, spec: CallSpec, dtype: jnp.dtype):
        """decay: [columns, M] float32, floored (`floor_of`)."""
        C, block = spec.chunk, block_rows(dtype)
        total = cumulative_sum(decay)  # G
        self.dtype = dtype
        self.total = total
        self.rows = total[
            spec.halo_padding : spec.halo_padding + C
        ]  # at the rows: of the tokens up to r + d
        self.write = 1.0 - jnp.exp2(decay)  # s
        self.end = total[C - 1 : C]
        self.to_end = jnp.exp2(self.end - total[:C])
        self.blocks = [slice(r, r + block) for r in range(0, C, block)]
        extra = spec.entering_tokens - C
        self.extents = [slice(0, b.stop + extra) for b in self.blocks]
        self.middles = [self.rows[b.start + block // 2 - 1 :][:1] for b in self.blocks]
        self.clamp = extra > 0

    def rise(self, block: int) -> jax.Array:
        """[block rows, M]: exp(G_r - G_middle)."""
        return jnp.exp2(self.rows[self.blocks[block]] - self.middles[block])

    def fall(self, block: int) -> jax.Array:
        """[block columns, M]: exp(G_middle - G_j). Beyond the row's own token, finite."""
        exponent = self.middles[block] - self.total[self.extents[block]]
        return jnp.exp2(jnp.minimum(exponent, MAX_EXPONENT) if self.clamp else exponent)

    def weight(self, block: int) -> jax.Array:
        """[block columns, M], in the operands' dtype: s_j exp(G_middle - G_j)."""
        return (self.write[self.extents[block]] * self.fall(block)).astype(self.dtype)


def block_rows(dtype: jnp.dtype) -> int:
    """Rows whose gates share a reference."""
    return 8 if dtype == jnp.float32 else 16


def floor_of(dtype: jnp.dtype) -> float:
    """The least decay of a token, in units of log 2: its error is below the operands' own."""
    return (-16.0 if dtype == jnp.float32 else -8.0) * LOG2E


def turned_decays(log_decay: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """[M, rows] -> [rows, M], floored, in units of log 2."""
    return jnp.maximum(log_decay.T * LOG2E, floor_of(dtype))
