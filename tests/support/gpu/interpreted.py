"""The operator on the interpreted GPU kernels, values and gradients, against float64.

NPROC=16 JAX_PLATFORMS=cpu python -m tests.support.gpu.interpreted INDEX...    # see process.py
"""

import functools

import jax

from nha_jax import testing
from nha_jax.testing import Case
from tests.support.gpu.process import HOPPER, report
from tests.support.ops import suite

# One of each kind that the kernels treat in their own way; index 0 is the documents' example.
KINDS = [
    Case(T=128, window="64", G=2, M=20, K=64, V=40, B=1, gate="mixed", rope="yarn", segments=True),
    Case(T=90, window="None", B=1, segments=True, empty_slots="mask", rope="rows"),
    Case(T=66, window="0", B=1, slot_feature_map="silu", gate="-inf", state=True),
    Case(T=128, window="64", G=2, M=20, K=60, V=40, B=1, gate="mixed", rope="yarn", segments=True),
    Case(T=70, window="16", G=2, M=20, K=60, V=40, B=1, gate="-inf", segments=True, state=True),
    Case(T=66, window="0", B=1, slot_feature_map="silu", gate="normaliser-0.1"),
    Case(T=128, window="64", M=64, K=64, V=64, B=1, gate="mixed", rope="yarn", segments=True),
    Case(T=128, window="64", M=64, K=64, V=64, B=1, gate="mixed", rope="yarn"),
    Case(T=130, window="64", G=4, K=128, V=128, B=1, M=128, gate="-1000", rope="yarn"),
    Case(T=90, window="16", M=0, state=True),
    Case(T=90, window="16", M=0, slot_weight_gradient="slots"),
    Case(T=90, window="16", G=2, M=32, state=True, slot_weight_gradient="slots"),
    Case(T=90, window="None", G=2, slot_weight_gradient="slots"),
    Case(T=66, window="0", M=64, K=128, V=64, segments=True, slot_weight_gradient="slots"),
    Case(T=100, window="32", M=64, K=256, V=256, B=1, gate="mixed", rope="yarn", segments=True),
    Case(T=128, window="64", G=2, M=128, K=256, V=200, B=1, gate="-1000"),
    Case(T=66, window="0", M=20, K=160, V=192, B=1, gate="normaliser-1", state=True),
    Case(T=90, window="None", G=2, M=64, K=192, V=250, B=1, segments=True),
    # All slots nearly equal: the gradients of their logits are what is left of a difference.
    Case(
        T=128,
        window="1",
        M=48,
        K=60,
        V=64,
        B=1,
        gate="normaliser-0.1",
        segments=True,
        empty_slots="mask",
        slot_feature_map="silu",
        rope=None,
    ),
]
# Heads that are not padded, and windows of up to 128: the kernels rotate queries and keys.
ROTATED = [
    Case(T=130, window="1", M=48, K=64, V=64, rope="rows", empty_slots="mask"),
    Case(T=190, window="64", G=2, M=64, K=128, V=128, rope="rows", gate="mixed", segments=True),
    Case(T=130, window="16", K=64, V=40, slot_feature_map="silu", rope="yarn", segments=True),
    Case(T=256, window="128", M=128, K=128, V=64, B=1),
    Case(T=200, window="100", G=4, H=2, M=20, K=64, V=64, B=1, gate="-inf", rope="yarn"),
    Case(T=130, window="100", M=0, K=64, V=64, rope="rows"),
    Case(T=128, window="64", G=2, M=128, K=256, V=256, B=1, gate="mixed", rope="rows"),
    Case(T=100, window="32", G=2, M=20, K=256, V=200, B=1, rope="yarn", segments=True),
    Case(T=128, window="64", M=64, K=128, V=128, B=1, slot_weight_gradient="slots"),
]

CASES = KINDS + ROTATED + suite.SUITE


def lower_for_cuda(case: Case, inputs: testing.Inputs) -> None:
    """Raises what Mosaic does: the interpreter knows no layouts, and runs what Mosaic refuses."""
    call = functools.partial(testing.attend_with_gradients, case, implementation="pallas_gpu")
    with jax.sharding.use_abstract_mesh(HOPPER):
        traced = jax.jit(call).trace(inputs.on_device("bfloat16"))
        program = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in program or "__cudnn$fmha" in program
    jax.clear_caches()


def check(case: Case) -> None:
    """Lowers the kernels for CUDA, and interprets them."""
    lower_for_cuda(case, testing.make_inputs(case))
    interpret(case)


def interpret(case: Case) -> None:
    """Raises AssertionError if a value or a gradient is too far from the definition's."""
    suite.check(case, "pallas_gpu", "bfloat16", testing.make_inputs(case))


if __name__ == "__main__":
    report(CASES, check)
