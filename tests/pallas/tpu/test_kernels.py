"""The TPU kernels in their interpreter against the float64 reference: values and gradients."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nha_jax import testing
from nha_jax.testing import Case, make_inputs
from tests.nha_jax.ops.test_definition import check_sliding_window_attention
from tests.nha_jax.ops.test_segments import check_padding
from tests.support.ops.suite import SUITE, any_case, check

# One of each kind that the kernels treat in their own way.
KINDS = [
    Case(T=65, window="0", G=2, M=20, K=60, V=40, state=True, gate="-inf"),
    Case(
        T=200, window="64", G=4, K=128, V=128, H=2, B=1, M=64, rope="yarn", small_blocks=False
    ),
    Case(
        T=200, window="100", segments=True, gate="mixed", empty_slots="mask", rope="rows",
        slot_feature_map="relu",
    ),
    Case(
        T=140, window="1", segments=True, state=True, gate="-1000", rope=None, M=48,
        slot_weight_gradient="slots",
    ),
    Case(T=300, window="150", segments=True, G=2, slot_feature_map="silu", rope="yarn"),
    Case(T=64, window="None", segments=True, M=64),
]  # fmt: skip

# Heads of 512, whose rotation table is half as wide, over all options.
LARGE_HEADS = [
    Case(T=70, window="32", K=512, V=512, H=1, B=1, M=16),
    Case(T=200, window="64", K=512, V=512, G=4, M=64, state=True, segments=True, gate="mixed"),
    Case(T=140, window="0", K=512, V=512, M=48, empty_slots="mask", slot_feature_map="relu"),
    Case(T=300, window="150", K=512, V=512, rope="rows", slot_feature_map="silu", segments=True),
    Case(T=130, window="100", K=512, V=384, G=2, rope="yarn", slot_weight_gradient="slots"),
    Case(T=130, window="16", K=384, V=512, rope=None, gate="-1000", state=True),
    Case(T=1100, window="32", K=512, V=512, B=1, M=64, small_blocks=False),
    Case(T=64, window="None", K=512, V=512, segments=True),
]


def more(*values):
    return pytest.param(*values, marks=pytest.mark.full)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *((case, "float32") for case in KINDS),
        (KINDS[0], "bfloat16"),
        *(more(case, "bfloat16") for case in KINDS[1:]),
        *(more(case, "float32") for case in SUITE),
        *(more(case, "bfloat16") for case in SUITE[::3]),
        (LARGE_HEADS[0], "bfloat16"),
        more(LARGE_HEADS[0], "float32"),
        *(more(case, dtype) for case in LARGE_HEADS[1:] for dtype in ("float32", "bfloat16")),
    ],
    ids=str,
)
def test_kernels_match_float64_reference(case, dtype):
    check(case, "pallas_tpu", dtype, make_inputs(case))


@pytest.mark.full
@pytest.mark.parametrize(
    "case",
    [
        Case(T=90, window="16", G=2, segments=True, state=True),
        Case(T=300, window="150", B=1),
        Case(T=64, window="None"),
    ],
    ids=str,
)
def test_slot_weight_that_pulls_the_slots_only(case):
    case = dataclasses.replace(case, slot_weight_gradient="slots")
    check(case, "pallas_tpu", "float32", make_inputs(case))


@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param("float32", marks=pytest.mark.full),
        pytest.param("bfloat16", marks=pytest.mark.slow),
    ],
)
def test_gate_gradient_at_strong_decay(dtype):
    """Its true value is nearly 0, the difference of sums that are not."""
    case = Case(T=256, window="64", B=1, M=64, K=128, V=128)
    inputs = make_inputs(case)
    pre = np.random.default_rng(0).normal(-20, 20, inputs.arrays["log_decay"].shape)
    inputs.arrays["log_decay"] = testing.log_decays("normaliser-8", pre, None).astype(np.float32)
    check(case, "pallas_tpu", dtype, inputs)


@pytest.mark.full
@given(case=any_case, seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_any_shape_and_option(case, seed):
    check(case, "pallas_tpu", "float32", make_inputs(case, seed))


def test_padding_is_zero_and_changes_nothing_whatever_it_holds():
    check_padding("5", "pallas_tpu")


def test_without_slots_is_sliding_window_attention():
    check_sliding_window_attention("pallas_tpu")
