"""What `launch` asks of the compiler for every kernel."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas.gpu.warpgroup.launch import launch
from tests.support.gpu.process import HOPPER


def lower_column_sums(warpgroups: int, **options: bool) -> None:
    """Lowers a kernel whose first warpgroup sums over an axis that its warps divide."""

    def kernel(refs, shared):
        @pl.when(lax.axis_index("wg") == 0)
        def _():
            x = plgpu.load(refs["x"], layout=plgpu.Layout.WGMMA, optimized=False)
            refs["sums"][...] = x.sum(axis=0)

    def call(x):
        return launch(
            kernel, {"x": x}, {"sums": jax.ShapeDtypeStruct((64,), jnp.float32)}, {},
            grid={"block": 1}, warpgroups=warpgroups, name="sums", interpret=False, **options,
        )  # fmt: skip

    x = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    with jax.sharding.use_abstract_mesh(HOPPER):
        jax.jit(call).trace(x).lower(lowering_platforms=("cuda",))


def test_two_warpgroups_cannot_both_reduce_across_warps():
    with pytest.raises(ValueError, match="reduction scratch"):
        lower_column_sums(warpgroups=2)
    lower_column_sums(warpgroups=2, one_warpgroup_reduces=True)
    lower_column_sums(warpgroups=1)
