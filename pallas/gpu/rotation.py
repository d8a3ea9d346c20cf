"""Rotary embedding (rotate-half) of what lies in shared memory, in place.

Of x = [x1, x2], the halves of a head, with the tables cos and sin of the row's position:

    y1 = x1 cos - x2 sin        y2 = x2 cos + x1 sin

and of a gradient the other way, with -sin. It is computed in float32 and rounded to bfloat16.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas.gpu.launch import Refs
from pallas.gpu.spec import LOGITS, tile


class Rotation(NamedTuple):
    """Tables of the token rows' positions, [B or 1, P, D / 2] float32."""

    cos: jax.Array
    sin: jax.Array


def halves_tile(D: int) -> tuple[Any, ...]:
    """`tile` of [rows, D] of which either half is a whole number of tiles."""
    return tile(math.gcd(D // 2, 64))


def rotate(x: Any, refs: Refs, batch, positions: Any, *, back: bool = False) -> None:
    """Rotates x, a reference to [C, D] bfloat16 that lies as `halves_tile` says.

    refs: with cos and sin of a `Rotation`. positions: the slice of x's rows in them. back: the
    other way, a gradient.

    What others are to read of it needs a `commit_smem` afterwards.
    """
    half = x.shape[1] // 2
    step = math.gcd(half, 64)
    row = batch if refs["cos"].shape[0] > 1 else 0

    @pl.loop(0, half // step)  # unrolled, it would load all of the tables before the first product
    def _(i):
        where = row, positions, pl.ds(i * step, step)
        cos, sin = (
            plgpu.load(refs[name].at[*where], layout=LOGITS, optimized=False)
            for name in Rotation._fields
        )
        sin = -sin if back else sin
        places = [x.at[:, pl.ds(start + i * step, step)] for start in (0, half)]
        first, second = (plgpu.load(place, layout=LOGITS).astype(jnp.float32) for place in places)
        places[0][...] = (first * cos - second * sin).astype(jnp.bfloat16)
        places[1][...] = (second * cos + first * sin).astype(jnp.bfloat16)
