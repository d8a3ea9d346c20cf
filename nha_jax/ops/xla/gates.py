"""The gates inside a chunk, exact for every decay.

Between two rows j <= t of a chunk a slot decays by exp(c_t - c_j), c the cumulative log decay. The
difference of cumulative sums loses the small terms behind a large one and is NaN at -inf, so only
sums are ever taken. Halve the chunk recursively: for rows t in the second half of a block of 2h
rows and j in its first half,

    exp(c_t - c_j) = exp(upto_t) exp(after_j),

with upto_t the sum of the half's decays up to t, t included, and after_j that of those after j;

and each pair j < t is split by exactly one level h = 1, 2, 4 ... C/2. Both sums follow from the
level below: in the second half `upto` grows by the total of the first, in the first half `after`
grows by the total of the second.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class ChunkGates(NamedTuple):
    """Gates of chunks of C rows (a power of two), M slots, s = 1 - exp(log_decay)."""

    write: jax.Array  # [..., C, M], s
    levels: tuple[jax.Array, ...]  # per level h, [..., C, M]: exp(upto) or s exp(after), by half
    from_start: jax.Array  # [..., C, M], exp(c): decay since before the chunk's first row
    to_end: jax.Array  # [..., C, M], s exp(c_C - c): what is left of a row's write at the end
    total: jax.Array  # [..., M], exp(c_C)

    def spread(self, scores: jax.Array) -> jax.Array:
        """Slot logits sum_{j<=t} scores[t, j] s_j exp(c_t - c_j): [..., Q, C, C] -> [..., Q, C, M].

        Q stands for query heads that share the gates.
        """
        diagonal = jnp.sum(jnp.where(np.eye(scores.shape[-1], dtype=bool), scores, 0), axis=-1)
        logits = diagonal[..., None] * self.write[..., None, :, :]
        for level, gate in enumerate(self.levels):
            later_half = jnp.where(_pairs(scores.shape[-1], level), scores, 0)
            logits += gate[..., None, :, :] * jnp.einsum("...qtj,...jm->...qtm", later_half, gate)
        return logits

    def gather(self, weights: jax.Array) -> jax.Array:
        """Weight of each row's value, sum_m weights[t, m] s_j exp(c_t - c_j), 0 for j > t.

        The transpose of `spread`: [..., Q, C, M] -> [..., Q, C, C].
        """
        C = weights.shape[-2]
        diagonal = jnp.sum(weights * self.write[..., None, :, :], axis=-1)
        rows = jnp.where(np.eye(C, dtype=bool), diagonal[..., None], 0)
        for level, gate in enumerate(self.levels):
            gated = weights * gate[..., None, :, :]
            product = jnp.einsum("...qtm,...jm->...qtj", gated, gate)
            rows = jnp.where(_pairs(C, level), product, rows)
        return rows


def chunk_gates(log_decay: jax.Array) -> ChunkGates:
    """The gates of log_decay [..., C, M], C a power of two, values in [-inf, 0]."""
    *lead, C, M = log_decay.shape
    write = -jnp.expm1(log_decay)
    upto, after = log_decay, jnp.zeros_like(log_decay)
    levels = []
    half = 1
    while half < C:
        blocks = (*lead, C // (2 * half), 2, half, M)
        first, second = np.arange(2)[:, None, None] == 0, np.arange(2)[:, None, None] == 1
        upto, after, s = (x.reshape(blocks) for x in (upto, after, write))
        level = jnp.exp(jnp.where(second, upto, after)) * jnp.where(second, 1, s)
        levels.append(level.reshape(log_decay.shape))
        totals = upto[..., -1:, :]  # of either half: [..., blocks, 2, 1, M]
        other = jnp.flip(totals, axis=-3)
        upto = jnp.where(second, upto + other, upto).reshape(log_decay.shape)
        after = jnp.where(first, after + other, after).reshape(log_decay.shape)
        half *= 2
    return ChunkGates(
        write, tuple(levels), jnp.exp(upto), write * jnp.exp(after), jnp.exp(upto[..., -1, :])
    )


def _pairs(C: int, level: int) -> np.ndarray:
    """[C, C]: t in the second, j in the first half of the same block of 2 ** (level + 1) rows."""
    t, j = np.arange(C)[:, None], np.arange(C)
    same_block = t >> (level + 1) == j >> (level + 1)
    return same_block & (t >> level & 1 == 1) & (j >> level & 1 == 0)
