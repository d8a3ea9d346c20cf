"""The decays of a chunk, exact enough for any gate and without overflow."""

import jax
import jax.numpy as jnp

from pallas.tpu.arithmetic import LOG2E, cumulative_sum
from pallas.tpu.spec import CallSpec

MAX_EXPONENT = 100.0  # of 2, in factors that a mask removes


class ChunkDecays:
    """How much of a token is left in the slots at a later row, as a product of two factors.

    At row r the slots hold s_j exp(c_r - c_j) of token j. A token's c_j alone may be anything, so
    exp(-c_j) may overflow. Rows are therefore taken in gate blocks of 16 (8 in float32), and both
    factors are relative to c_ref, c at the block's middle row:

        s_j exp(c_r - c_j) = row_decay_r token_decay_j,
        row_decay_r = exp(c_r - c_ref),  token_decay_j = s_j exp(c_ref - c_j)

    A decay below the floor (8 nats a token; 16 in float32) counts as the floor, which leaves e^-8
    (e^-16) of what the slot held before. So neither factor exceeds 2^93: at most 8 (16) nats for
    each of the 8 (4) tokens of half a block. "Bare" factors are without s.

    Attributes:
      cumulative: [entering_tokens, M], c of each token, in units of log 2.
      at_rows: [C, M], c of the last token in the slots of each row.
      write: [entering_tokens, M], s.
      at_end: [1, M], c of the C-th token, the last to be in the slots at the chunk's end.
      bare_to_end: [C, M], exp(c_C - c_j): from each of the first C tokens to the chunk's end.
      gate_blocks: the rows of each gate block.
      block_tokens: for each gate block, the tokens that may be in the slots of its rows.
      references: for each gate block, c_ref [1, M].
    """

    def __init__(self, decay: jax.Array, spec: CallSpec, dtype: jnp.dtype):
        """Takes floored decays [entering_tokens, M] float32, and the products' operands' dtype."""
        C, block = spec.chunk, _block_rows(dtype)
        cumulative = cumulative_sum(decay)
        self._dtype = dtype
        self.cumulative = cumulative
        self.at_rows = cumulative[spec.halo_padding : spec.halo_padding + C]
        self.write = 1.0 - jnp.exp2(decay)
        self.at_end = cumulative[C - 1 : C]
        self.bare_to_end = jnp.exp2(self.at_end - cumulative[:C])
        self.gate_blocks = [slice(r, r + block) for r in range(0, C, block)]
        beyond = spec.entering_tokens - C
        self.block_tokens = [slice(0, rows.stop + beyond) for rows in self.gate_blocks]
        self.references = [
            self.at_rows[rows.start + block // 2 - 1 :][:1] for rows in self.gate_blocks
        ]
        # Tokens beyond a row's last one are masked, but their factors must stay finite.
        self._clamp = beyond > 0

    def row_decay(self, block: int) -> jax.Array:
        """The factor exp(c_r - c_ref) of the block's rows, [., M] float32."""
        return jnp.exp2(self.at_rows[self.gate_blocks[block]] - self.references[block])

    def bare_token_decay(self, block: int) -> jax.Array:
        """The factor exp(c_ref - c_j) of the block's tokens, [., M] float32."""
        exponent = self.references[block] - self.cumulative[self.block_tokens[block]]
        return jnp.exp2(jnp.minimum(exponent, MAX_EXPONENT) if self._clamp else exponent)

    def token_decay(self, block: int) -> jax.Array:
        """The factor s_j exp(c_ref - c_j) of the block's tokens, [., M] in the operands' dtype."""
        return (self.write[self.block_tokens[block]] * self.bare_token_decay(block)).astype(
            self._dtype
        )


def _block_rows(dtype: jnp.dtype) -> int:
    """Rows of a gate block."""
    return 8 if dtype == jnp.float32 else 16


def decay_floor(dtype: jnp.dtype) -> float:
    """The least decay of a token, in units of log 2: its error is below the operands' own."""
    return (-16.0 if dtype == jnp.float32 else -8.0) * LOG2E


def floored_decays(log_decay: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Transposes [M, tokens] to [tokens, M], in units of log 2 and not below `decay_floor`."""
    return jnp.maximum(log_decay.T * LOG2E, decay_floor(dtype))
