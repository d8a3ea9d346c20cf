"""Block sizes that do not fit are refused by name."""

import jax
import jax.numpy as jnp
import pytest

from pallas.gpu import BlockSizes, CallSpec, fused_attention
from pallas.gpu.backward.window_query_gradients import window_query_gradients
from pallas.gpu.backward.window_token_gradients import window_token_gradients
from tests.support.gpu import window_gradients


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


@pytest.mark.parametrize(
    "launch", [window_query_gradients, window_token_gradients], ids=lambda x: x.__name__
)
def test_stages_of_the_backward_that_do_not_fit_are_an_error(launch):
    case = window_gradients.Case(D=256)
    inputs = window_gradients.make_inputs(case).arrays()
    with pytest.raises(ValueError, match=r"window_stages of 3 takes 2\d+ KB of shared memory"):
        launch(inputs, spec=case.spec, block_sizes=BlockSizes(window_stages=3))
