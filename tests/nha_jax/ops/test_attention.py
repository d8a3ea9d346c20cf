"""Every implementation of the operator against the float64 reference: values and gradients."""

import dataclasses
import functools
from collections.abc import Hashable

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nha_jax.testing import CASES, Case, attend, make_inputs, relative_error
from tests.support.ops.suite import SUITE, any_case, check, grid
from tests.support.pairs import missing_pairs

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
        "scale": case.scale is None,
        "slots only": case.slot_weight_gradient == "slots",
    } | {name: getattr(case, name) for name in ("rope", "segments", "state", "empty_slots")}


def test_the_public_cases_hold_every_value_and_every_pair_of_kinds():
    rows = [kinds(case) for case in CASES]
    assert missing_pairs(rows, {name: {row[name] for row in rows} for name in rows[0]}) == []
    for name in ("window", "gate", "T"):
        assert {getattr(case, name) for case in CASES} == {getattr(x, name) for x in grid()}


def parameters() -> list:
    """case, implementation, dtype: the chosen cases, and the whole suite behind a marker.

    What is next to each other shares the compiled definition. The kernels' are in `tests/pallas`.
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
        if i % 3 == 0:
            values.append((case, "xla", "bfloat16", pytest.mark.slow))
        if i % 8 == 0:
            values.append((case, "reference", "float32", pytest.mark.slow))
    return [
        pytest.param(*value, marks=marks, id="-".join(map(str, value))) for *value, marks in values
    ]


@pytest.mark.parametrize(("case", "implementation", "dtype"), parameters())
def test_matches_float64_reference(case, implementation, dtype):
    check(case, implementation, dtype, make_inputs(case))


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        Case(T=65, window="0"),
        Case(T=90, window="16", G=2, segments=True, empty_slots="mask", state=True, rope="yarn"),
        Case(T=64, window="None"),
    ],
    ids=str,
)
def test_slot_weight_that_pulls_the_slots_only(case):
    case = dataclasses.replace(case, slot_weight_gradient="slots")
    check(case, "xla", "float32", make_inputs(case))


@given(case=any_case, seed=st.integers(0, 99))
@settings(max_examples=3, deadline=None, derandomize=True)
def test_any_shape_and_option(case, seed):
    check(case, "xla", "float32", make_inputs(case, seed))


@pytest.mark.slow
@given(case=any_case, seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_any_shape_and_option_more(case, seed):
    check(case, "xla", "float32", make_inputs(case, seed))


def test_many_heads_without_slots():
    """A CPU's step is sized by heads and slots, and has a chunk whatever their numbers."""
    case = Case(T=40, window="8", B=5, H=2, M=0, K=4, V=4, rope=None)
    check(case, "xla", "float32", make_inputs(case))


@pytest.mark.parametrize(("T", "window"), [(16, "8"), (32, "16"), (31, "16"), (20, "0")])
def test_a_single_step_without_its_gradient(T, window):
    """Empty slots that were constants made XLA compute it from memory that nobody wrote."""
    case = Case(T=T, window=window, B=4, H=2, M=32, K=16, V=16, rope=None)
    inputs = make_inputs(case)
    call = jax.jit(functools.partial(attend, case), static_argnames="implementation")
    found, expected = (
        call(inputs.arrays, inputs.rest, implementation=implementation).out
        for implementation in ("xla", "reference")
    )
    assert relative_error(np.asarray(found), np.asarray(expected)) < 5e-6
