"""The table of implementations: one registration serves the operator, the layers and the plan."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nha_jax import Model, ModelConfig
from nha_jax.ops import backends, decode_step, init_state, nha_attention
from nha_jax.ops.backends import Backend
from nha_jax.ops.rope import apply_rope
from nha_jax.ops.state import Tokens
from nha_jax.ops.types import NHAOutput, Options
from nha_jax.testing import Case, make_inputs
from tests.nha_jax.test_model import random_tokens, tiny_model
from tests.support.ops.suite import check as check_case


@dataclasses.dataclass(frozen=True)
class Precision:
    """The toy's own option."""

    dtype: str = "float64"


def on_the_host(query, rotated_query, tokens, *, scale: float, window: int, dtype: str):
    """The definition in numpy, a token at a time, without segments or a past."""
    arrays = jax.tree.map(lambda x: np.asarray(x, dtype), (query, rotated_query, tokens))
    query, rotated_query, (key, rotated_key, value, log_decay) = arrays
    B, T, Hq, _ = query.shape
    H, M = log_decay.shape[2:]
    out, weight = np.zeros((B, T, Hq, value.shape[3])), np.zeros((B, T, Hq))
    for b, h in np.ndindex(B, Hq):
        kv = h // (Hq // H)
        slot_key = np.zeros((M, key.shape[3]))
        slot_value = np.zeros((M, value.shape[3]))
        for t in range(T):
            if t >= window:
                decay = np.exp(log_decay[b, t - window, kv])[:, None]
                slot_key = decay * slot_key + (1 - decay) * key[b, t - window, kv]
                slot_value = decay * slot_value + (1 - decay) * value[b, t - window, kv]
            seen = slice(max(t - window + 1, 0), t + 1 if window else t)
            logits = [slot_key @ query[b, t, h], rotated_key[b, seen, kv] @ rotated_query[b, t, h]]
            p = np.exp(scale * np.concatenate(logits))
            out[b, t, h] = p @ np.concatenate([slot_value, value[b, seen, kv]]) / p.sum()
            weight[b, t, h] = p[:M].sum() / p.sum()
    return out.astype(np.float32), weight.astype(np.float32)


class NumpyBackend(Backend):
    """A callback to numpy; the gradient is that of the reference."""

    name = "numpy"
    options_type = Precision

    def attend(self, query, key, value, log_decay, *, rope, segment_ids, past, options):
        shapes = (
            jax.ShapeDtypeStruct((*query.shape[:3], value.shape[3]), jnp.float32),
            jax.ShapeDtypeStruct(query.shape[:3], jnp.float32),
        )
        own = options.implementation_options or Precision()
        host = functools.partial(
            on_the_host, scale=options.scale, window=options.window_size, dtype=own.dtype
        )
        reference = functools.partial(
            backends.get("reference").attend, segment_ids=None, past=None,
            options=dataclasses.replace(options, implementation_options=None),
        )  # fmt: skip

        @jax.custom_vjp
        def run(arrays, rope):
            query, key, value, log_decay = arrays
            tokens = Tokens(key, apply_rope(key, rope), value, log_decay)
            return jax.pure_callback(host, shapes, query, apply_rope(query, rope), tokens)

        def backward(saved, gradients):
            arrays, rope = saved

            def plain(*arrays):
                result = reference(*arrays, rope=rope)
                return result.out, result.slot_weight

            return jax.vjp(plain, *arrays)[1](gradients), None

        run.defvjp(lambda *saved: (run(*saved), saved), backward)
        out, weight = run((query, key, value, log_decay), rope)
        return NHAOutput(out, None, weight)

    def attend_unsupported(self, arrays, *, has_segments, has_past, options: Options):
        if arrays[0].dtype != jnp.float32:
            return f"it takes float32, got query of {arrays[0].dtype}"
        if has_segments or has_past or options.return_state or options.window_size is None:
            return "it has neither segments nor states nor full attention"
        return None


@pytest.fixture
def toy():
    backend = NumpyBackend()
    backends.register(backend)
    yield backend
    backends.unregister(backend.name)


TOY_CASES = [
    Case(T=9, window="0", G=2, M=3, B=1, rope=None, gate="mixed", return_state=False),
    Case(T=12, window="3", M=5, H=2, V=4, gate="normaliser-1", return_state=False),
    Case(T=7, window="T+5", rope="rows", return_state=False),
]


@pytest.mark.parametrize(
    "case",
    [TOY_CASES[0], *(pytest.param(case, marks=pytest.mark.slow) for case in TOY_CASES[1:])],
    ids=str,
)
def test_the_operators_suite_runs_on_a_registered_backend(toy, case):
    """What every implementation is held to, but for the state, which this one does not return."""
    check_case(case, "numpy", "float32", make_inputs(case))


def test_a_model_runs_on_a_registered_backend(toy):
    tokens = random_tokens(1, 9)
    sizes = {"num_layers": 1, "window_size": 4, "dtype": "float32", "remat": "none"}
    found = tiny_model(implementation="numpy", kernel_options={"numpy": {}}, **sizes)
    expected = found.with_implementation("reference")
    np.testing.assert_allclose(found(tokens), expected(tokens), atol=2e-5)
    with pytest.raises(NotImplementedError, match="'numpy': it has neither segments"):
        found(tokens, segment_ids=jnp.ones_like(tokens))


def test_what_a_registered_backend_cannot_serve_is_an_error_that_says_why(toy):
    x = jnp.ones((1, 4, 1, 2))
    with pytest.raises(NotImplementedError, match="'numpy': it has neither segments nor states"):
        nha_attention(x, x, x, -x, window_size=None, implementation="numpy")
    _, state = nha_attention(x, x, x, -x, window_size=2, return_state=True)[:2]
    one = x[:, :1]
    with pytest.raises(NotImplementedError, match="'numpy': numpy has no decode step"):
        decode_step(one, one, one, -one, state, window_size=2, implementation="numpy")


def test_a_backend_that_knows_of_no_delay_is_given_none(toy):
    arrays = map(jnp.asarray, make_inputs(Case(T=4, window="4")).arrays.values())
    with pytest.raises(NotImplementedError, match=r"'numpy'.*slot_delay=1 with window_size=4"):
        nha_attention(*arrays, window_size=4, slot_delay=1, implementation="numpy")


class UnpackedBackend(Backend):
    """The reference, without packed documents."""

    name = "unpacked"

    def attend(self, query, key, value, log_decay, **rest):
        return backends.get("reference").attend(query, key, value, log_decay, **rest)

    def attend_unsupported(self, arrays, *, has_segments, has_past, options):
        return "it has no packed documents" if has_segments else None


def test_a_backend_without_padding_reads_prompts_of_any_length():
    backends.register(UnpackedBackend())
    try:
        model = tiny_model(num_layers=1, window_size=4, conv_width=0, implementation="unpacked")
        tokens = np.asarray(random_tokens(1, 5))
        found, _ = model.prefill(tokens)
        with pytest.raises(NotImplementedError, match="no packed documents"):
            model.prefill(tokens, lengths=[3])
    finally:
        backends.unregister("unpacked")
    expected = jax.jit(Model.prefill)(model.with_implementation("reference"), tokens)[0]
    np.testing.assert_allclose(found, expected, atol=1e-5)


class CarelessBackend(Backend):
    """Adds up all tokens, padding too, and gives NaN at padding: nobody may see any of it."""

    name = "careless"

    def attend(self, query, key, value, log_decay, *, rope, segment_ids, past, options):
        everything = (key + value).sum((1, 2), keepdims=True) + log_decay.sum() + rope[0].sum()
        holes = jnp.where(segment_ids == 0, jnp.nan, 0.0)[..., None]
        out = query * everything + holes[..., None]
        return NHAOutput(out, None, out.sum(-1))


@pytest.mark.parametrize("window_size", [2, None])
def test_what_stands_in_padding_reaches_no_backend_and_nothing_comes_out_of_it(window_size):
    backends.register(CarelessBackend())
    try:
        ids = jnp.array([[0, 1, 1, 0, 2, 2]])
        real = np.asarray(ids != 0)[..., None, None]
        shape = (1, 6, 1, 4)

        def results(hole):
            arrays = [jnp.where(real, -jnp.full(shape, x), hole) for x in (1.0, 2.0, 3.0, 4.0)]
            rope = tuple(jnp.where(real[..., 0], jnp.ones((1, 6, 2)), hole) for _ in range(2))

            def attend(*arrays):
                return nha_attention(
                    *arrays, rope=rope, window_size=window_size, segment_ids=ids,
                    return_slot_weight=True, implementation="careless",
                )  # fmt: skip

            result, pullback = jax.vjp(attend, *arrays)
            pull = jnp.where(real, jnp.ones(shape), hole)
            return result, pullback(result._replace(out=pull, slot_weight=pull[..., 0]))

        expected = results(0.0)
        for hole in (jnp.nan, jnp.inf, -jnp.inf):
            for x, wanted in zip(*map(jax.tree.leaves, (results(hole), expected)), strict=True):
                np.testing.assert_array_equal(x, wanted)
                assert np.all(np.isfinite(x))
                assert not np.any(np.asarray(x)[~real[..., 0, 0]])
                assert np.all(np.asarray(x)[real[..., 0, 0]])
    finally:
        backends.unregister("careless")


def test_a_backends_own_options_reach_it(toy):
    x = jnp.ones((1, 4, 1, 2))
    for dtype in ("float32", "float64"):
        options = {"numpy": {"dtype": dtype}}
        nha_attention(x, x, x, -x, window_size=2, implementation="numpy", kernel_options=options)
    with pytest.raises(ValueError, match=r"kernel_options\['numpy'\] has no 'block'; there are"):
        nha_attention(x, x, x, -x, window_size=2, kernel_options={"numpy": {"block": 3}})


def test_a_registered_backend_is_described_in_a_plan(toy):
    x = jnp.ones((1, 4, 1, 2))
    options = Options(2, 1.0, "identity", "attend", False, False)
    described = backends.describe("numpy", (x, x, x, x), options, "tpu")
    assert described == "numpy, as the configuration says"


def test_names_are_taken_once(toy):
    with pytest.raises(ValueError, match="'xla' is the library's own"):
        backends.register(backends.get("xla"))
    assert ModelConfig.preset("nha-tiny", implementation="numpy").implementation == "numpy"
    backends.unregister("numpy")
    with pytest.raises(ValueError, match=r"implementation must be one of .* got 'numpy'"):
        backends.get("numpy")
    backends.register(toy)


@pytest.mark.parametrize("window_size", [0, 16, None], ids="W{}".format)
def test_every_name_decodes_as_it_attends(window_size):
    """Steps of rows of different age, not all active, by the definition, by xla and by a kernel."""
    B, H, K, M, R = 3, 8, 128, 16, 16
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    state = init_state(
        B, num_kv_heads=H, num_slots=M, key_dim=K, value_dim=K, window_size=window_size,
        dtype=jnp.float32, max_length=R,
    )  # fmt: skip
    lengths = [0, 5, R - 5] if window_size is None else [0, R - 2, 3 * R]
    state = state._replace(length=jnp.array(lengths, jnp.int32))
    states = dict.fromkeys(("reference", "xla", "pallas_tpu"), state)
    if window_size == 0:
        del states["pallas_tpu"]  # its kernel needs a ring
    for step in range(5):
        token = [normal(B, 1, heads, K) for heads in (2 * H, H, H)]
        token.append(-jnp.abs(normal(B, 1, H, M)))
        found = {
            name: decode_step(
                *token,
                before,
                window_size=window_size,
                active=jnp.array([True, step < 3, step > 0]),
                implementation=name,
            )
            for name, before in states.items()
        }
        states = {name: after for name, (_, after) in found.items()}
        for name in set(found) - {"reference"}:
            jax.tree.map(
                functools.partial(np.testing.assert_allclose, rtol=0, atol=2e-6, err_msg=name),
                found[name],
                found["reference"],
            )
