"""The operator's suite on a GPU, compiled: values and gradients against float64 on the host.

benchmarks/gpu_check.sh runs it: pytest -m gpu tests/gpu
"""

import jax
import pytest

from tests.gpu.interpreted import CASES
from tests.ops import test_attention
from tests.ops.cases import Case, make_inputs

# What the interpreter is too slow for, and what is cuDNN's on a GPU.
LARGER = [
    Case(T=1024, window="64", G=4, M=64, K=128, V=128, H=2, B=1),
    Case(T=1000, window="100", M=64, K=64, V=64, H=4, gate="mixed", segments=True),
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
    test_attention.check(case, "pallas_gpu", "bfloat16", make_inputs(case))


@pytest.mark.gpu
def test_float32_runs_plain_xla():
    """Whose products are in TF32 unless told otherwise."""
    case = CASES[0]
    with jax.default_matmul_precision("highest"), pytest.warns(UserWarning, match="running 'xla'"):
        test_attention.check(case, "pallas_gpu", "float32", make_inputs(case))
