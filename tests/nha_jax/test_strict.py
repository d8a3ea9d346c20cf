"""The strict settings of JAX; that no rank is promoted, tests/conftest.py sees to in all tests."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nha_jax import SamplingOptions
from nha_jax.generation import programs
from nha_jax.generation.sampling import RowSampling, Stages, draw
from nha_jax.model import abstract_model
from nha_jax.ops import decode_step, init_state, nha_attention, rope_tables
from tests.nha_jax.test_model import CONVERTED, tiny_config, tiny_model


@pytest.fixture(autouse=True)
def strict() -> Iterator[None]:
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture(params=[False, True], ids=["x32", "x64"])
def bits(request: pytest.FixtureRequest) -> Iterator[None]:
    with jax.enable_x64(request.param):
        yield


@pytest.mark.usefixtures("bits")
@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("window_size", [4, None])
def test_the_operator_in_bfloat16(implementation: str, window_size: int | None) -> None:
    query, key = jnp.zeros((2, 40, 4, 8), "bfloat16"), jnp.zeros((2, 40, 2, 8), "bfloat16")
    log_decay, rope = jnp.zeros((2, 40, 2, 4), "float32"), rope_tables(jnp.arange(40), 8)

    def loss(*arrays: jax.Array) -> jax.Array:
        found = nha_attention(
            *arrays,
            window_size=window_size,
            rope=rope,
            segment_ids=jnp.ones((2, 40), jnp.int32),
            return_state=True,
            return_slot_weight=True,
            implementation=implementation,
        )
        return found.out.astype(jnp.float32).sum() + found.slot_weight.sum()

    gradients = jax.eval_shape(jax.grad(loss, (0, 1, 2, 3)), query, key, key, log_decay)
    assert [x.dtype for x in gradients] == ["bfloat16"] * 3 + ["float32"]
    state = init_state(
        2,
        num_kv_heads=2,
        num_slots=4,
        key_dim=8,
        value_dim=8,
        window_size=window_size,
        dtype="bfloat16",
        max_length=40,
    )
    one = [x[:, :1] for x in (query, key, key, log_decay)]
    out, _ = jax.eval_shape(
        lambda *arrays: decode_step(
            *arrays, state, window_size=window_size, implementation=implementation
        ),
        *one,
    )
    assert out.dtype == "bfloat16"


@pytest.mark.usefixtures("bits")
@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param({"conv_width": 4}, id="own"),
        pytest.param(CONVERTED, id="converted", marks=pytest.mark.slow),
    ],
)
def test_the_model_in_bfloat16(overrides: dict) -> None:
    config = tiny_config(**overrides, dtype="bfloat16", implementation="xla")
    graph, state = abstract_model(config)
    tokens = jnp.ones((3, 12), jnp.int32)
    gradient = jax.grad(lambda state: nnx.merge(graph, state)(tokens, tokens).sum())
    assert jax.tree.all(
        jax.tree.map(lambda x, y: x.dtype == y.dtype, jax.eval_shape(gradient, state), state)
    )

    def steps(state: nnx.State) -> jax.Array:
        model = nnx.merge(graph, state)
        _, cache = model.prefill(tokens, lengths=np.array([12, 5, 1]), max_length=20)
        return model.decode_step(tokens[:, 0], cache, active=jnp.ones(3, bool))[0]

    assert jax.eval_shape(steps, state).dtype == "float32"


@pytest.mark.usefixtures("bits")
def test_rows_that_are_taken_out_of_a_cache_and_put_back() -> None:
    config = tiny_config(window_size=(4, None), num_layers=2, conv_width=4, dtype="bfloat16")
    graph, state = abstract_model(config)
    empty = jax.eval_shape(lambda: nnx.merge(graph, state).init_cache(3, max_length=20))
    row, start = np.int32(1), np.int32(4)
    taken = jax.eval_shape(
        functools.partial(programs.take_row, config=config, chunk=4), empty, row, start
    )
    put = functools.partial(programs.put_row, config=config)
    assert jax.eval_shape(put, empty, row, start, taken) == empty


def test_drawing_tokens() -> None:
    options = SamplingOptions(top_k=30, top_p=0.9, min_p=0.01, repetition_penalty=1.2, seed=5)
    logits = jax.random.normal(jax.random.key(0), (1, 40), "float32")
    drawn = []
    for wide in (False, True):
        with jax.enable_x64(wide):
            rows = RowSampling.of([options], [np.array([1, 2])], 40)
            tokens = []
            for _ in range(8):
                token, log_probability, rows = draw(logits, rows, Stages(True, True))
                assert (token.dtype, log_probability.dtype) == ("int32", "float32")
                tokens.append(int(token[0]))
        drawn.append(tokens)
    assert drawn[0] == drawn[1]  # 64 bits draw the same text
    assert len(set(drawn[0])) > 2


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "full", "operator", "dots"])
def test_no_tracer_leaks(remat: str) -> None:
    config = tiny_config(num_layers=2, window_size=(4, None), remat=remat, implementation="xla")
    graph, state = abstract_model(config)
    tokens = jnp.ones((2, 8), jnp.int32)

    def call(state: nnx.State) -> jax.Array:
        return nnx.merge(graph, state)(tokens, tokens)

    with jax.checking_leaks():
        jax.eval_shape(call, state)
        jax.eval_shape(jax.grad(lambda state: call(state).sum()), state)


@pytest.mark.slow
def test_nothing_is_nan_on_the_way() -> None:
    """Padding, decays of -inf and rows that see nothing, all outside of `jax.jit`."""
    shape, ids = (1, 8, 1, 4), jnp.array([[0, 1, 1, 2, 2, 2, 0, 0]])
    query = jax.random.normal(jax.random.key(0), shape)
    log_decay = jnp.where(jnp.arange(8)[None, :, None, None] % 3 == 0, -jnp.inf, -(query**2))
    for window_size in (0, 2, None):
        attend = functools.partial(
            nha_attention, window_size=window_size, segment_ids=ids, implementation="xla"
        )
        with jax.debug_nans(True), jax.disable_jit():
            jax.jit(lambda q, g, attend=attend: attend(q, q, q, g))(query, log_decay)
            gradient = jax.grad(lambda q, g, attend=attend: attend(q, q, q, g).sum(), (0, 1))
            jax.tree.map(np.asarray, gradient(query, log_decay))


@pytest.mark.slow
def test_64_bits_change_no_float32_model() -> None:
    """By the usual promotion: numbers of tokens are then of 64 bits, and meet those of 32."""
    model = tiny_model(window_size=(4, None), num_layers=2)
    tokens = np.arange(12, dtype=np.int32).reshape(1, 12)

    def results() -> list[jax.Array]:
        loss = lambda model: jnp.sin(model(tokens, tokens // 5 + 1)).sum()  # noqa: E731
        logits, cache = model.prefill(tokens, max_length=20)
        stepped = model.decode_step(tokens[:, 0], cache)
        return jax.tree.leaves((model(tokens), jax.grad(loss)(model), logits, stepped))

    expected = results()
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        found = results()
    for x, y in zip(found, expected, strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)
