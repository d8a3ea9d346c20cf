"""Full attention through the splash kernel against `full_attention`: values and gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nha_jax.ops.state import Tokens
from nha_jax.ops.timeline import Timeline
from nha_jax.ops.tpu.splash import splash_full_attention
from nha_jax.ops.types import EmptySlots, Options
from nha_jax.ops.xla.full import full_attention
from nha_jax.testing import relative_error
from tests.support.tpu_topology import compile_for

TOLERANCE = {"float32": (1e-4, 5e-4), "bfloat16": (5e-3, 2e-2)}  # of values and of gradients
SLOTS = 16


@dataclasses.dataclass(frozen=True)
class Case:
    """T queries behind R earlier rows; `segments` puts documents and padding into both."""

    T: int
    R: int = 0
    Hq: int = 2
    Hkv: int = 1
    K: int = 16
    V: int = 16
    dtype: str = "bfloat16"
    empty_slots: EmptySlots = "attend"
    slot_weight: bool = True
    segments: bool = True
    scale: float = 0.25

    def options(self) -> Options:
        return Options(
            window_size=None,
            scale=self.scale,
            slot_feature_map="identity",
            empty_slots=self.empty_slots,
            return_state=False,
            return_slot_weight=self.slot_weight,
        )


CASES = [
    Case(T=200, Hq=4, Hkv=2),
    Case(T=130, R=40, K=60, V=128, empty_slots="mask", scale=-0.2),
    Case(T=150, R=490, dtype="float32"),  # two blocks of keys, ragged
    Case(T=1, R=20, dtype="float32", slot_weight=False, segments=False),
]


def make_inputs(case: Case):
    """Arrays in float32, rounded to the case's dtype; segments and what is real; cotangents.

    The arrays are query, key and value. Documents of some 40 rows; every third is padding.
    """
    rng = np.random.default_rng(0)
    N = case.R + case.T

    def normal(*shape, dtype=case.dtype):
        return jnp.asarray(rng.standard_normal(shape), dtype).astype(jnp.float32)

    arrays = (
        normal(2, case.T, case.Hq, case.K),
        normal(2, N, case.Hkv, case.K),
        normal(2, N, case.Hkv, case.V),
    )
    segment = np.cumsum(rng.random((2, N)) < 1 / 40, axis=1) if case.segments else np.zeros((2, N))
    real = segment % 3 != 1
    cotangents = (
        normal(2, case.T, case.Hq, case.V, dtype="float32"),
        normal(2, case.T, case.Hq, dtype="float32"),
    )
    return arrays, (jnp.asarray(segment, jnp.int32), jnp.asarray(real)), cotangents


def run(attend, case: Case, dtype: str, **keywords) -> dict[str, np.ndarray]:
    """Values where the query is real, as the operator takes them, and gradients."""
    arrays, (segment, real), cotangents = make_inputs(case)

    def results(query, key, value):
        timeline = Timeline(Tokens(key, key, value, value), segment, real, case.T, None)
        out, weight = attend(query, timeline, num_slots=SLOTS, options=case.options(), **keywords)
        assert out.dtype == weight.dtype == jnp.float32
        if not case.slot_weight:
            weight = jnp.zeros_like(weight)
        is_real = real[:, -case.T :, None]
        return jnp.where(is_real[..., None], out, 0), jnp.where(is_real, weight, 0)

    @jax.jit
    def values_and_gradients(*arrays):
        values, pullback = jax.vjp(results, *arrays)
        return values, pullback(cotangents)

    flat = jax.tree.leaves(values_and_gradients(*(x.astype(dtype) for x in arrays)))
    names = ("out", "slot weight", "query", "key", "value")
    return {name: np.asarray(x, np.float64) for name, x in zip(names, flat, strict=True)}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_full_attention(case):
    result = run(splash_full_attention, case, case.dtype, interpret=True)
    expected = run(full_attention, case, "float32")
    of_values, of_gradients = TOLERANCE[case.dtype]
    for name, x in result.items():
        tolerance = of_values if name in ("out", "slot weight") else of_gradients
        assert relative_error(x, expected[name]) <= tolerance, name


@pytest.mark.tpu_aot
@pytest.mark.parametrize(
    "case",
    [
        Case(T=2048, Hq=4, Hkv=2, K=128, V=128, slot_weight=False),
        Case(T=5000, R=100, K=60, V=64, dtype="float32"),
    ],
    ids=str,
)
def test_compiles_for_v5e(case, monkeypatch):
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    rows = case.R + case.T
    shapes = [
        jax.ShapeDtypeStruct(shape, case.dtype)
        for shape in (
            (1, case.T, case.Hq, case.K),
            (1, rows, case.Hkv, case.K),
            (1, rows, case.Hkv, case.V),
        )
    ]

    def loss(query, key, value):
        segment, real = jnp.zeros((1, rows), jnp.int32), jnp.ones((1, rows), bool)
        timeline = Timeline(Tokens(key, key, value, value), segment, real, case.T, None)
        out, weight = splash_full_attention(
            query, timeline, num_slots=SLOTS, options=case.options()
        )
        return jnp.sum(jnp.sin(out)) + jnp.sum(weight)

    compiled = compile_for("v5e", jax.grad(loss, (0, 1, 2)), *shapes)
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') >= 2
