"""What the output pass refuses."""

import jax
import jax.numpy as jnp
import pytest

from pallas.gpu import BlockSizes, CallSpec, fused_attention


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (BlockSizes(warpgroups=2), "warpgroups must be 1 for heads of more than 128, got 2"),
        (BlockSizes(stages=4), r"stages of 4 takes \d+ KB of shared memory"),
    ],
    ids=["warpgroups", "stages"],
)
def test_what_does_not_fit_wide_heads_is_an_error(sizes, message):
    spec = CallSpec(
        group=2, slots=0, empty_slots=0, window=64, offset=0, ahead=0, scale=1.0,
        masked=False, state=False,
    )  # fmt: skip
    heads = {"window_query": 2, "window_key": 1, "value": 1}
    inputs = {
        name: jax.ShapeDtypeStruct((1, 128, count, 256), jnp.bfloat16)
        for name, count in heads.items()
    }
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda x: fused_attention(x, {}, spec=spec, block_sizes=sizes), inputs)
