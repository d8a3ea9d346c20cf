"""The operator's suite and decode steps, compiled for the GPU that is here, against the host.

The operator's values and gradients are held against float64, the decode steps against XLA.
benchmarks/gpu_check.sh runs this: pytest -m gpu tests/pallas/gpu
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nha_jax.ops.gpu import decode_gpu
from nha_jax.ops.xla.decode import decode_xla
from nha_jax.testing import Case, make_inputs
from tests.support.gpu.interpreted import CASES
from tests.support.ops.decode_cases import decode_options, make_state, make_token
from tests.support.ops.suite import check as check_case

# Cases that the interpreter is too slow for, and, of window None, cuDNN's on a GPU.
LARGER = [
    Case(T=1024, window="64", G=4, M=64, K=128, V=128, H=2, B=1),
    Case(T=1000, window="100", M=64, K=64, V=64, H=4, gate="mixed", segments=True),
    Case(T=1000, window="32", M=64, K=256, V=256, H=2, B=1, gate="mixed", segments=True),
    Case(T=512, window="64", G=4, M=128, K=192, V=160, H=1, B=1),
    Case(T=640, window="None", G=4, M=64, K=128, V=128, H=2, B=1),
    Case(T=640, window="None", M=64, K=256, V=256, B=1, slot_weight_gradient="slots"),
    Case(T=640, window="None", G=2, M=64, K=96, V=128, B=1, empty_slots="mask"),
    Case(T=640, window="None", M=64, K=64, V=64, B=1, segments=True),
]


@pytest.fixture(autouse=True)
def gpu(optimized) -> None:
    if jax.default_backend() != "gpu":
        pytest.skip("needs a GPU")


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES + LARGER, ids=str)
def test_compiled_kernels_match_float64_reference(case):
    check_case(case, "pallas_gpu", "bfloat16", make_inputs(case))


@pytest.mark.gpu
@pytest.mark.parametrize("empty_slots", ["attend", "mask"])
@pytest.mark.parametrize("window_size", [16, 128, None], ids=str)
def test_compiled_decode_step_matches_the_hosts(window_size, empty_slots):
    R = window_size or 48
    state = make_state(
        window_size, jnp.bfloat16, [0, R - 1, R // 2 if window_size is None else 3 * R]
    )
    token = make_token(0, 2, jnp.bfloat16, state)
    arguments = (*token, state, jnp.array([True, True, False]))
    chosen = decode_options(window_size, empty_slots, "silu")
    out, after = jax.jit(functools.partial(decode_gpu, options=chosen))(*arguments)
    host = jax.devices("cpu")[0]
    with jax.default_device(host):
        expected = decode_xla(*jax.device_put(arguments, host), options=chosen)
    np.testing.assert_allclose(np.float32(out), np.float32(expected[0]), rtol=2e-2, atol=2e-2)
    for name, x, wanted in zip(after._fields, after, expected[1], strict=True):
        close = {"rtol": 1e-5, "atol": 1e-5} if name.startswith("slot") else {"rtol": 0}
        np.testing.assert_allclose(np.float32(x), np.float32(wanted), err_msg=name, **close)
