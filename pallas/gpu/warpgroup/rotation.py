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

from pallas.gpu.spec import LOGITS, tile
from pallas.gpu.warpgroup.launch import Refs


class Rotation(NamedTuple):
    """Tables of the token rows' positions, [B or 1, Tk, D / 2] float32."""

    cos: jax.Array
    sin: jax.Array


def halves_tile(D: int, columns: int = 64) -> tuple[Any, ...]:
    """`tile` of [rows, D] of which either half is a whole number of tiles, of columns or fewer."""
    return tile(math.gcd(D // 2, columns))


def arrival(shared: Refs, name: str, loaded: Any) -> Any:
    """Where copies to shared[name] arrive: what `rotate_copied` is to rotate is not loaded yet."""
    return shared.get(name + "_copied", loaded)


def rotate_copied(
    refs: Refs,
    shared: Refs,
    name: str,
    stage,
    batch,
    positions: Any,
    loaded: Any,
    *,
    columns: int = 64,
) -> None:
    """Rotates what a copy leaves at a stage of shared[name], if the kernel is to.

    shared[name + "_copied"]: the barriers of the copies. loaded: those of what is rotated.
    """
    if "cos" not in refs:
        return
    plgpu.barrier_wait(shared[name + "_copied"].at[stage])
    rotate(shared[name].at[stage], refs, batch, positions, columns=columns)
    plgpu.commit_smem()
    plgpu.barrier_arrive(loaded.at[stage])


def rotate(
    x: Any, refs: Refs, batch, positions: Any, *, columns: int = 64, back: bool = False
) -> None:
    """Rotates x, a reference to [C, D] bfloat16 that lies as `halves_tile` says.

    refs: with cos and sin of a `Rotation`. positions: the slice of x's rows in them. back: the
    other way, a gradient. columns: as for `halves_tile`; so many of either half at a time, which
    take `2 * columns` registers of a thread.

    What others are to read of it needs a `commit_smem` afterwards.
    """
    half = x.shape[1] // 2
    step = math.gcd(half, columns)
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
