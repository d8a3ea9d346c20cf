"""Who sees whom: what the kernels are told of packed documents, padding and carried states."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas.tpu.arithmetic import MASKED, join, matmul_tn
from pallas.tpu.spec import Spec


def pack_facts(
    *, run: jax.Array, entering: jax.Array, enters: jax.Array, written: jax.Array
) -> jax.Array:
    """What is known of each row, [B, T] each -> [B, 8, T] float32, in digits of base 256.

    run: the number, from 2 to 2^24, of the row's own segment; 1 of padding. entering: of what is
    in the slots once row r of cat has entered. enters: the slots hold a token of the row's segment.
    written: the row's own token enters the slots at its turn.
    """
    digits = [(x >> shift) & 255 for x in (run, entering) for shift in (0, 8, 16)]
    facts = jnp.stack([*digits, enters, written], axis=1)
    return facts.astype(jnp.float32)


def pack_visible(visible: jax.Array, carried: jax.Array, end: jax.Array) -> jax.Array:
    """What is known of each chunk, [B, T / C, width] and twice [B, T / C], -> [., 256 + width].

    visible: the numbers of the segments of cat's tokens. carried, end: of the slots at the chunk's
    start and end; the kernel wants them in every lane.
    """
    spread = [jnp.repeat(x[..., None], 128, axis=-1) for x in (carried, end)]
    return jnp.concatenate([*spread, visible], axis=-1).astype(jnp.float32)


def turned_facts(facts: jax.Array, names: list[str]) -> jax.Array:
    """[8, rows] of `pack_facts` -> [rows, 128 for each name], all lanes of a fact alike.

    The matrix unit turns the digits' rows to columns, spreads them over the lanes and adds them up,
    exactly; it has the time, and lanes are slow to talk to each other.
    """
    weights = join([_digit_weights(_DIGITS[name]) for name in names], 1)
    return matmul_tn(facts.astype(jnp.bfloat16), weights)


_DIGITS = {"run": (0, 1, 2), "entering": (3, 4, 5), "enters": (6,)}  # rows of `pack_facts`


def _digit_weights(digits: tuple[int, ...]) -> jax.Array:
    """[8, 128]: what each row counts for a fact of these digits."""
    row = lax.broadcasted_iota(jnp.int32, (8, 128), 0)
    weights = jnp.zeros((8, 128), jnp.float32)
    for power, digit in enumerate(digits):
        weights = jnp.where(row == digit, 256.0**power, weights)
    return weights.astype(jnp.bfloat16)


def where_written(x: jax.Array, facts: jax.Array) -> jax.Array:
    """x [M, rows] of the tokens that enter the slots, 0 of others; facts [8, rows]."""
    return jnp.where(facts[7:8] > 0.0, x, 0.0)


class Facts:
    """What a chunk must know of segments."""

    def __init__(self, of_rows: dict[str, jax.Array], of_chunk: jax.Array, spec: Spec):
        """of_rows: [C, 128] of each fact of `turned_facts`; of_chunk: [1, 256 + width]."""
        self.spec = spec
        self.run, self.entering = of_rows["run"], of_rows["entering"]
        self.carried_run, self.end_run = of_chunk[:, :128], of_chunk[:, 128:256]  # all lanes alike
        self.visible = of_chunk[:, 256:]
        self.top = jnp.where(self.run > 1.0, MASKED, -MASKED)  # [C, 128], of padding above all else
        if spec.mask_empty:
            self.enters = of_rows["enters"] > 0.0  # [C, 128]

    def same(self) -> jax.Array:
        """[C, width]: cat's tokens of the row's segment."""
        return spread(self.run, self.spec.width) == self.visible

    def carried(self, x: jax.Array) -> jax.Array:
        """x [C, M] in the rows that are of the segment of the slots at the chunk's start."""
        return jnp.where((self.run == self.carried_run)[:, : x.shape[1]], x, 0.0)

    def written(self, x: jax.Array) -> jax.Array:
        """x [C, M] in the rows of cat whose segment the slots are of at the chunk's end."""
        return jnp.where((self.entering == self.end_run)[:, : x.shape[1]], x, 0.0)

    def kept(self, x: jax.Array) -> jax.Array:
        """x [1, M] if the slots at the chunk's start are of the segment of those at its end."""
        return jnp.where((self.carried_run == self.end_run)[:, : x.shape[1]], x, 0.0)


def spread(x: jax.Array, width: int) -> jax.Array:
    """[C, 128], all lanes alike, -> [C, width]."""
    return join([x] * -(-width // x.shape[1]), 1)[:, :width]
