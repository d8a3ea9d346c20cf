"""How a fetch warpgroup keeps some items ahead of the warpgroup that computes with them."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu


def fetch_ahead(
    count: int | jax.Array, read: Any, *steps: Callable[[jax.Array, int | jax.Array], None]
) -> None:
    """Calls every step(item, stage) for items 0 to count - 1, when the stage's buffers are free.

    Item i uses the buffers of stage i modulo the number of stages.

    Args:
      count: of items.
      read: barriers, one for each stage, at which the reader arrives after each item.
      steps: called for an item one after the other; the first starts its copies, and a second may
        wait for them.
    """
    stages = read.shape[0]
    for step in steps:
        for stage in range(stages):
            pl.when(stage < count)(functools.partial(step, jnp.int32(stage), stage))

    @pl.loop(jnp.int32(0), jnp.int32(count))
    def _(item):
        stage = lax.rem(item, jnp.int32(stages))
        plgpu.barrier_wait(read.at[stage])  # of the last items too: every completion must be
        for step in steps:
            pl.when(item + stages < count)(functools.partial(step, item + stages, stage))
