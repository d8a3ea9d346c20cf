"""Every implementation of the operator against the float64 reference: values and gradients."""

import dataclasses
import itertools
from collections.abc import Hashable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nha_jax import testing
from nha_jax.testing import CASES, GATES, OPTIONS, Case, Inputs, Tolerance, make_inputs
from tests.support.ops.interpreters import interpreter
from tests.support.pairs import missing_pairs

WINDOWS = ("0", "1", "16", "64", "100", "T", "T+5", "None")

# An implementation that says nothing else is held to what plain XLA is held to.
TOLERANCE = {
    ("pallas_tpu", "float32"): Tolerance(1e-4, 5e-4),
    ("pallas_tpu", "bfloat16"): Tolerance(5e-3, 2e-2),
    ("pallas_gpu", "bfloat16"): Tolerance(5e-3, 2e-2),
}


def grid() -> list[Case]:
    """Every length with every window; the other options take turns, each at its own pace."""
    heads, slots = (1, 4, 8), (16, 48, 64, 80)
    dims = ((64, 64), (60, 64), (128, 64), (64, 128), (60, 60))
    cases = []
    for i, (T, window) in enumerate(itertools.product((1, 2, 63, 64, 65, 200), WINDOWS)):
        K, V = dims[i % 5]
        cases.append(Case(
            T=T, window=window, G=heads[i % 3], M=slots[i % 4], K=K, V=V, H=1 + i % 2,
            gate=GATES[(3 * i + i // 8) % 8],
            rope=("tokens", "rows", None)[i // 2 % 3],
            segments=i // 3 % 2 == 1,
            state=i // 5 % 2 == 1,
            empty_slots=("attend", "mask")[i // 7 % 2],
            slot_feature_map=("identity", "identity", "silu", "relu")[i // 4 % 4],
        ))  # fmt: skip
    return cases


def gate_cases() -> list[Case]:
    """Every kind of gate in the regimes that treat it differently."""
    return [
        Case(T=200, window=window, M=48, K=64, V=64, gate=gate, segments=window == "16")
        for gate, window in itertools.product(GATES, ("0", "16"))
    ]


def check(case: Case, implementation: str, dtype: str, inputs: Inputs) -> None:
    """Holds an implementation against the float64 reference on the same, rounded, inputs."""
    tolerance = TOLERANCE.get((implementation, dtype))
    with interpreter(case, implementation):
        testing.assert_matches_reference(
            case, implementation, dtype, inputs=inputs, tolerance=tolerance
        )


def wide_cases() -> list[Case]:
    """Windows beyond the reach of the TPU's fused kernel."""
    options = (
        {},
        {"segments": True, "gate": "mixed", "slot_feature_map": "silu"},
        {"rope": "rows", "empty_slots": "mask", "G": 4},
    )
    return [Case(T=300, window="150", K=64, V=64, **more) for more in options]


SUITE = grid() + gate_cases() + wide_cases()


def kernel_cases() -> list[Case]:
    """One of each kind that the kernels treat in their own way, for every run of the tests."""
    return [
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


WINDOW_KINDS = {
    "0": "slots only", "1": "short", "16": "short", "64": "long", "100": "long", "T": "whole past",
    "T+5": "whole past", "None": "whole past",
}  # fmt: skip
GATE_KINDS = {
    "normaliser-8": "mild", "normaliser-1": "mild", "0": "mild", "normaliser-0.1": "strong",
    "-1000": "strong", "-inf": "strong", "mixed": "mixed", "holes": "mixed",
}  # fmt: skip


def kinds(case: Case) -> dict[str, Hashable]:
    return {
        "window": WINDOW_KINDS[case.window],
        "gate": GATE_KINDS[case.gate],
        "group": case.G > 1,
        "K = V": case.K == case.V,
        "feature map": case.slot_feature_map != "identity",
        "slots only": case.slot_weight_gradient == "slots",
    } | {name: getattr(case, name) for name in ("rope", "segments", "state", "empty_slots")}


def test_the_public_cases_hold_every_value_and_every_pair_of_kinds():
    rows = [kinds(case) for case in CASES]
    assert missing_pairs(rows, {name: {row[name] for row in rows} for name in rows[0]}) == []
    for name in ("window", "gate", "T"):
        assert {getattr(case, name) for case in CASES} == {getattr(x, name) for x in grid()}


def parameters() -> list:
    """case, implementation, dtype: the chosen cases, and the whole suite behind markers.

    The cases of pallas_tpu are in its interpreter, which is slow. What is next to each other shares
    the compiled definition.
    """
    values = []
    for i, case in enumerate(CASES):
        values.append((case, "xla", "float32", ()))
        if i % 3 == 0:
            values.append((case, "xla", "bfloat16", ()))
        elif i % 3 == 1:
            values.append((case, "reference", "float32", ()))
    for i, case in enumerate(SUITE):
        values.append((case, "xla", "float32", pytest.mark.slow))
        values.append((case, "pallas_tpu", "float32", pytest.mark.full))
        if i % 3 == 0:
            values.append((case, "xla", "bfloat16", pytest.mark.slow))
            values.append((case, "pallas_tpu", "bfloat16", pytest.mark.full))
        if i % 8 == 0:
            values.append((case, "reference", "float32", pytest.mark.slow))
    return [
        pytest.param(*value, marks=marks, id="-".join(map(str, value))) for *value, marks in values
    ]


@pytest.mark.parametrize(("case", "implementation", "dtype"), parameters())
def test_matches_float64_reference(case, implementation, dtype):
    check(case, implementation, dtype, make_inputs(case))


def more(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def more_kernels(*values):
    return pytest.param(*values, marks=pytest.mark.full)


@pytest.mark.parametrize(
    ("implementation", "case"),
    [
        more("xla", Case(T=65, window="0")),
        more("xla", Case(
            T=90, window="16", G=2, segments=True, empty_slots="mask", state=True, rope="yarn"
        )),
        more("xla", Case(T=64, window="None")),
        more_kernels("pallas_tpu", Case(T=90, window="16", G=2, segments=True, state=True)),
        more_kernels("pallas_tpu", Case(T=300, window="150", B=1)),
        more_kernels("pallas_tpu", Case(T=64, window="None")),
    ],
    ids=str,
)  # fmt: skip
def test_slot_weight_that_pulls_the_slots_only(implementation, case):
    case = dataclasses.replace(case, slot_weight_gradient="slots")
    check(case, implementation, "float32", make_inputs(case))


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *((case, "float32") for case in kernel_cases()),
        (kernel_cases()[0], "bfloat16"),
        *(more_kernels(case, "bfloat16") for case in kernel_cases()[1:]),
    ],
    ids=str,
)
def test_tpu_kernels_match_float64_reference(case, dtype):
    check(case, "pallas_tpu", dtype, make_inputs(case))


@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param("float32", marks=pytest.mark.full),
        pytest.param("bfloat16", marks=pytest.mark.slow),
    ],
)
def test_tpu_kernels_gate_gradient_at_strong_decay(dtype):
    """Its true value is nearly 0, the difference of sums that are not."""
    case = Case(T=256, window="64", B=1, M=64, K=128, V=128)
    inputs = make_inputs(case)
    pre = np.random.default_rng(0).normal(-20, 20, inputs.arrays["log_decay"].shape)
    inputs.arrays["log_decay"] = testing.log_decays("normaliser-8", pre, None).astype(np.float32)
    check(case, "pallas_tpu", dtype, inputs)


any_case = st.builds(Case, **{name: st.sampled_from(values) for name, values in OPTIONS.items()})


@given(case=any_case, seed=st.integers(0, 99))
@settings(max_examples=3, deadline=None, derandomize=True)
def test_any_shape_and_option(case, seed):
    check(case, "xla", "float32", make_inputs(case, seed))


@pytest.mark.parametrize(
    "implementation",
    [
        pytest.param("xla", marks=pytest.mark.slow),
        pytest.param("pallas_tpu", marks=pytest.mark.full),
    ],
)
@given(case=any_case, seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_any_shape_and_option_more(implementation, case, seed):
    check(case, implementation, "float32", make_inputs(case, seed))
