"""Rotary embedding (rotate-half) of what lies in shared memory, in place.

With x1 and x2 the halves of a head, and the tables cos and sin of the row's position:

    y1 = x1 cos - x2 sin        y2 = x2 cos + x1 sin

A gradient is rotated back, with -sin. The sums are float32 and are rounded to bfloat16.
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
    """The tables of the token rows' positions, [B or 1, Tk, D / 2] float32 each."""

    cos: jax.Array
    sin: jax.Array


def halves_tile(D: int, columns: int = 64) -> tuple[Any, ...]:
    """`tile` for [rows, D] such that each half of D is a whole number of tiles.

    columns: of a tile, at most.
    """
    return tile(math.gcd(D // 2, columns))


def arrival(shared: Refs, name: str, loaded: Any) -> Any:
    """The barriers at which the copies to shared[name] arrive.

    They are `loaded`, or, if `rotate_copied` has to rotate what is copied before it counts as
    loaded, shared[name + "_copied"].
    """
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
    """Waits for the copy to a stage of shared[name], rotates it and arrives at `loaded`.

    Does nothing in a kernel that is given no tables.

    Args:
      positions: the slice of the rows in the tables.
      loaded: the stages' barriers.
      columns: as for `rotate`.
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
    """Rotates x in place; before others read it, it needs a `commit_smem`.

    Args:
      x: a reference to [C, D] bfloat16 that lies as `halves_tile` says.
      refs: with cos and sin of a `Rotation`.
      positions: the slice of x's rows in the tables.
      columns: of either half that are rotated at a time, as for `halves_tile`; they take
        `2 * columns` registers of a thread.
      back: the other way, for a gradient.
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
