"""The reference against the operator's formulas written out, and its two limits."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nha_jax.ops import nha_attention
from nha_jax.testing import SMALL_BLOCKS, Case, make_inputs, relative_error
from tests.support.pairs import every_pair


def written_out(query, key, value, log_decay, case: Case, rope, ids, slot_delay=None):
    """Output and slot weight by sums over all tokens, in float64, for one key/value head."""
    B, T, Hq, _K = query.shape
    W = case.window_size
    delay = W if slot_delay is None else slot_delay
    ids = np.ones((B, T), int) if ids is None else ids
    out, weight = np.zeros((B, T, Hq, case.V)), np.zeros((B, T, Hq))
    feature = {
        "identity": lambda x: x,
        "silu": lambda x: x / (1 + np.exp(-x)),
        "relu": lambda x: np.maximum(x, 0),
    }[case.slot_feature_map]

    def rotate(x, b, t):
        if rope is None:
            return x
        cos, sin = (table[b, t] if table.ndim == 3 else table[t] for table in rope)
        first, second = np.split(x, 2)
        return np.concatenate([first * cos - second * sin, second * cos + first * sin])

    for b, t in itertools.product(range(B), range(T)):
        if ids[b, t] == 0:
            continue
        first = t
        while first > 0 and ids[b, first - 1] == ids[b, t]:
            first -= 1
        inside = range(first if W is None else max(first, t - W + 1), t + 1)
        entered = range(0) if delay is None else range(first, max(first, t + 1 - delay))
        slot_key, slot_value = np.zeros((case.M, case.K)), np.zeros((case.M, case.V))
        for j in entered:
            kept = np.exp(sum(log_decay[b, i, 0] for i in entered if i > j))
            share = (kept * (1 - np.exp(log_decay[b, j, 0])))[:, None]
            slot_key += share * feature(key[b, j, 0])
            slot_value += share * value[b, j, 0]
        for h in range(Hq):
            q, rotated = query[b, t, h], rotate(query[b, t, h], b, t)
            a = list(slot_key @ feature(q)) if entered or case.empty_slots == "attend" else []
            logits = a + [rotated @ rotate(key[b, j, 0], b, j) for j in inside]
            p = np.exp(np.array(logits) * case.K**-0.5)
            p /= p.sum()
            values = list(slot_value) if a else []
            out[b, t, h] = p @ np.array(values + [value[b, j, 0] for j in inside])
            weight[b, t, h] = p[: len(a)].sum()
    return out, weight


OPTIONS = {
    "window": ("0", "1", "4", "T", "T+5", "None"),
    "empty_slots": ("attend", "mask"),
    "segments": (False, True),
}


STATIC = ("window_size", "slot_feature_map", "slot_delay", "empty_slots")


@functools.partial(jax.jit, static_argnames=STATIC)
def reference(arrays, rest, **options):
    return nha_attention(
        *arrays, rope=rest["rope"], segment_ids=rest["segment_ids"], return_slot_weight=True,
        implementation="reference", **options,
    )  # fmt: skip


@pytest.mark.parametrize("options", every_pair(OPTIONS, rest=pytest.mark.slow))
def test_reference_is_the_formula(options):
    feature_map = {"0": "silu", "1": "relu"}.get(options["window"], "identity")
    rope = "rows" if options["segments"] else "tokens"
    case = Case(
        T=23, G=2, M=5, K=6, V=4, gate="mixed", rope=rope, slot_feature_map=feature_map, **options
    )
    inputs = make_inputs(case)
    arrays = {name: x.astype(np.float64) for name, x in inputs.arrays.items()}
    rest = inputs.rest
    out, weight = written_out(**arrays, case=case, rope=rest["rope"], ids=rest["segment_ids"])
    with jax.enable_x64():
        result = reference(
            [jnp.asarray(x) for x in arrays.values()], rest, window_size=case.window_size,
            slot_feature_map=feature_map, empty_slots=case.empty_slots,
        )  # fmt: skip
    assert relative_error(np.asarray(result.out), out) < 1e-7  # the rope tables are float32
    assert np.max(np.abs(result.slot_weight - weight)) < 1e-7


@pytest.mark.parametrize(
    ("window", "slot_delay", "empty_slots", "segments"),
    [
        ("4", 0, "attend", True),
        ("T+5", 2, "attend", False),
        pytest.param("4", 3, "mask", True, marks=pytest.mark.slow),
    ],
)
def test_reference_with_a_slot_delay_is_the_formula(window, slot_delay, empty_slots, segments):
    case = Case(
        T=23, window=window, G=2, M=5, K=6, V=4, gate="mixed", slot_feature_map="silu",
        empty_slots=empty_slots, segments=segments,
    )  # fmt: skip
    inputs = make_inputs(case)
    arrays = {name: x.astype(np.float64) for name, x in inputs.arrays.items()}
    rest = inputs.rest
    out, weight = written_out(
        **arrays, case=case, rope=rest["rope"], ids=rest["segment_ids"], slot_delay=slot_delay
    )
    with jax.enable_x64():
        result = reference(
            [jnp.asarray(x) for x in arrays.values()], rest, window_size=case.window_size,
            slot_feature_map="silu", slot_delay=slot_delay, empty_slots=empty_slots,
        )  # fmt: skip
    assert relative_error(np.asarray(result.out), out) < 1e-7  # the rope tables are float32
    assert np.max(np.abs(result.slot_weight - weight)) < 1e-7


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_whole_past_with_masked_slots_is_softmax_attention(implementation):
    inputs = make_inputs(Case(T=70, window="None", G=2, H=2, K=16, V=16, rope=None)).arrays
    arrays = {name: jnp.asarray(x) for name, x in inputs.items()}

    def loss(attention):
        def value(query, key, value):
            return jnp.sum(jnp.sin(attention(query, key, value)))

        names = ("query", "key", "value")
        return jax.jit(jax.value_and_grad(value, (0, 1, 2)))(*(arrays[name] for name in names))

    ours = loss(
        lambda q, k, v: nha_attention(
            q,
            k,
            v,
            arrays["log_decay"],
            window_size=None,
            empty_slots="mask",
            implementation=implementation,
        )
    )
    softmax = loss(lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True))
    for x, expected in zip(jax.tree.leaves(ours), jax.tree.leaves(softmax), strict=True):
        assert relative_error(np.asarray(x), np.asarray(expected)) < 5e-6


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_no_window_is_gated_slot_attention(implementation):
    """arXiv 2409.07146: two gated recurrences joined by a softmax over the slots."""
    case = Case(T=70, window="0", K=16, V=12, M=10, B=1, rope=None)
    arrays = make_inputs(case).arrays
    query, key, value, gate = (
        arrays[name][0, :, 0].astype(np.float64) for name in ("query", "key", "value", "log_decay")
    )
    alpha = np.exp(gate)[:, :, None]
    slot_key, slot_value = np.zeros((10, 16)), np.zeros((10, 12))
    expected = []
    for t in range(case.T):
        slot_key = alpha[t] * slot_key + (1 - alpha[t]) * key[t]
        slot_value = alpha[t] * slot_value + (1 - alpha[t]) * value[t]
        scores = np.exp(slot_key @ query[t] / 4)
        expected.append(scores / scores.sum() @ slot_value)
    out = nha_attention(
        *map(jnp.asarray, arrays.values()), window_size=0, implementation=implementation
    )
    assert relative_error(np.asarray(out[0, :, 0]), np.array(expected)) < 5e-6


def test_slot_weight_of_the_slots_only_leaves_the_window_alone():
    """Rotation reaches the window's logits only, decays the slots' only."""
    case = Case(T=20, window="4", G=2)
    inputs = make_inputs(case)

    def gradients(kind):
        def loss(log_decay, rope):
            arrays = inputs.arrays | {"log_decay": log_decay}
            result = nha_attention(
                **arrays, window_size=4, rope=rope, return_slot_weight=True,
                slot_weight_gradient=kind, implementation="reference",
            )  # fmt: skip
            return jnp.vdot(result.slot_weight, inputs.cotangents["slot_weight"])

        gradient = jax.jit(jax.grad(loss, (0, 1)))
        return gradient(inputs.arrays["log_decay"], inputs.rest["rope"])

    with jax.enable_x64():
        (every_decay, every_rope), (decay, rope) = gradients("all"), gradients("slots")
    np.testing.assert_allclose(decay, every_decay, rtol=1e-5, atol=1e-8)
    assert all(np.abs(table).max() > 1e-3 for table in every_rope)
    assert all(np.abs(table).max() == 0 for table in rope)


def check_sliding_window_attention(implementation):
    """Without slots the operator is attention over a sliding window."""
    B, T, H, K, W = 2, 70, 2, 16, 9
    rng = np.random.default_rng(0)
    query, cotangent = (jnp.asarray(rng.standard_normal((B, T, 2 * H, K))) for _ in range(2))
    key, value = (jnp.asarray(rng.standard_normal((B, T, H, K))) for _ in range(2))
    empty = jnp.zeros((B, T, H, 0))

    def loss(attend):
        value_and_gradients = jax.value_and_grad(
            lambda *arrays: jnp.vdot(attend(*arrays), cotangent), argnums=(0, 1, 2)
        )
        return jax.jit(value_and_gradients)(query, key, value)

    found = loss(
        lambda *arrays: nha_attention(
            *arrays,
            empty,
            window_size=W,
            implementation=implementation,
            kernel_options=SMALL_BLOCKS,
        )
    )
    wanted = loss(
        lambda *arrays: jax.nn.dot_product_attention(
            *arrays, is_causal=True, local_window_size=(W - 1, 0)
        )
    )
    for x, expected in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
        assert relative_error(np.asarray(x), np.asarray(expected)) < 5e-6


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_without_slots_is_sliding_window_attention(implementation):
    check_sliding_window_attention(implementation)
