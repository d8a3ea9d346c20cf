"""The gates inside a chunk, exact for every decay.

Between two rows j <= t of a chunk a slot decays by exp(c_t - c_j), c the cumulative log decay. The
difference of cumulative sums loses the small terms behind a large one and is NaN at -inf, so only
sums are ever taken. Halve the chunk recursively: for rows t in the second half of a block of 2h
rows and j in its first half,

    exp(c_t - c_j) = exp(upto_t) exp(after_j),

with upto_t the sum of the half's decays up to t, t included, and after_j that of those after j;

and each pair j < t is split by exactly one level h = 1, 2, 4 ... C/2. All sums of all levels are
one product with a matrix of zeros and ones: the fewer operations, the sooner they are compiled.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

LEAST = -1e30  # stands for -inf, which a zero of the matrix would make NaN; its exp is 0 as well


class ChunkGates(NamedTuple):
    """Gates of chunks of C rows (a power of two), L = log2(C) levels, s = 1 - exp(log_decay)."""

    write: jax.Array  # [..., C, M], s
    levels: jax.Array  # [..., L, C, M], by level h: exp(upto) or s exp(after), by half
    from_start: jax.Array  # [..., C, M], exp(c): decay since before the chunk's first row
    to_end: jax.Array  # [..., C, M], s exp(c_C - c): what is left of a row's write at the end
    total: jax.Array  # [..., M], exp(c_C)

    def spread(self, scores: jax.Array) -> jax.Array:
        """Slot logits sum_{j<=t} scores[t, j] s_j exp(c_t - c_j): [..., Q, C, C] -> [..., Q, C, M].

        Q stands for query heads that share the gates.
        """
        C = scores.shape[-1]
        diagonal = jnp.sum(jnp.where(np.eye(C, dtype=bool), scores, 0), axis=-1)
        logits = diagonal[..., None] * self.write[..., None, :, :]
        if C == 1:
            return logits
        later_half = jnp.where(_pairs(C), scores[..., None, :, :], 0)
        product = jnp.einsum("...qltj,...ljm->...qltm", later_half, self.levels)
        return logits + jnp.sum(self.levels[..., None, :, :, :] * product, axis=-3)

    def gather(self, weights: jax.Array) -> jax.Array:
        """Weight of each row's value, sum_m weights[t, m] s_j exp(c_t - c_j), 0 for j > t.

        The transpose of `spread`: [..., Q, C, M] -> [..., Q, C, C].
        """
        C = weights.shape[-2]
        diagonal = jnp.sum(weights * self.write[..., None, :, :], axis=-1)
        rows = jnp.where(np.eye(C, dtype=bool), diagonal[..., None], 0)
        if C == 1:
            return rows
        gated = weights[..., None, :, :] * self.levels[..., None, :, :, :]
        product = jnp.einsum("...qltm,...ljm->...qltj", gated, self.levels)
        return rows + jnp.sum(jnp.where(_pairs(C), product, 0), axis=-3)


def chunk_gates(log_decay: jax.Array) -> ChunkGates:
    """The gates of log_decay [..., C, M], C a power of two, values in [-inf, 0]."""
    *lead, C, M = log_decay.shape
    write = -jnp.expm1(log_decay)
    summed, written = _sums(C)
    # The batch axis of one tells it from a layer's product, which remat="dots" would keep.
    sums = jnp.einsum(
        "axr,a...rm->a...xm",
        summed.reshape(1, -1, C).astype(log_decay.dtype),
        jnp.maximum(log_decay, LEAST)[None],
        precision="highest",  # the matrix is exact in any, but not what it adds up
    ).reshape(*lead, len(summed), C, M)
    gates = jnp.exp(sums) * jnp.where(written, write[..., None, :, :], 1)
    return ChunkGates(
        write,
        levels=gates[..., :-2, :, :],
        from_start=gates[..., -2, :, :],
        to_end=gates[..., -1, :, :],
        total=gates[..., -2, -1, :],
    )


def _sums(C: int) -> tuple[np.ndarray, np.ndarray]:
    """Which rows r each gate sums up, [L + 2, C, C], and whether s is a factor, [L + 2, C, 1].

    After the levels come `from_start` and `to_end`: the whole chunk as a second and a first half.
    """
    t, r = np.arange(C)[:, None], np.arange(C)
    level = np.arange(C.bit_length() - 1)[:, None, None]
    second = t >> level & 1 == 1
    same_half = t >> level == r >> level
    second = np.concatenate([second, np.ones((1, C, 1), bool), np.zeros((1, C, 1), bool)])
    same_half = np.concatenate([same_half, np.ones((2, C, C), bool)])
    return same_half & np.where(second, r <= t, r > t), ~second


def _pairs(C: int) -> np.ndarray:
    """[L, C, C]: by level h, t in the second and j in the first half of one block of 2h rows."""
    t, j = np.arange(C)[:, None], np.arange(C)
    level = np.arange(C.bit_length() - 1)[:, None, None]
    same_block = t >> (level + 1) == j >> (level + 1)
    return same_block & (t >> level & 1 == 1) & (j >> level & 1 == 0)
