"""What the output pass refuses."""

import jax
import jax.numpy as jnp
import pytest

from pallas.gpu import BlockSizes, Spec, fused_attention


def test_two_warpgroups_of_wide_heads_are_an_error():
    spec = Spec(
        group=2, slots=0, empty_slots=0, window=64, offset=0, ahead=0, scale=1.0,
        masked=False, state=False,
    )  # fmt: skip
    heads = {"rotated_query": 2, "rotated_key": 1, "value": 1}
    inputs = {
        name: jax.ShapeDtypeStruct((1, 128, count, 192), jnp.bfloat16)
        for name, count in heads.items()
    }
    sizes = BlockSizes(warpgroups=2)
    with pytest.raises(ValueError, match="warpgroups must be 1 for heads of more than 128, got 2"):
        jax.eval_shape(lambda x: fused_attention(x, {}, spec=spec, block_sizes=sizes), inputs)
