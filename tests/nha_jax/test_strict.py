"""No array's dtype is promoted unless the code says so; of ranks, tests/conftest.py sees to it."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nha_jax import SamplingOptions
from nha_jax.generation.sampling import RowSampling, Stages, draw
from nha_jax.model import abstract_model
from nha_jax.ops import decode_step, init_state, nha_attention, rope_tables
from tests.nha_jax.test_model import CONVERTED, tiny_config


@pytest.fixture(autouse=True)
def strict() -> Iterator[None]:
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("window_size", [4, None])
def test_the_operator_in_bfloat16(implementation: str, window_size: int | None) -> None:
    query, key = jnp.zeros((2, 40, 4, 8), "bfloat16"), jnp.zeros((2, 40, 2, 8), "bfloat16")
    log_decay, rope = jnp.zeros((2, 40, 2, 4)), rope_tables(jnp.arange(40), 8)

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


@pytest.mark.parametrize("overrides", [{"conv_width": 4}, CONVERTED], ids=["own", "converted"])
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


def test_drawing_tokens() -> None:
    options = SamplingOptions(top_k=3, top_p=0.9, min_p=0.1, repetition_penalty=1.2)
    rows = RowSampling.of([options], [np.array([1, 2])], 40)
    found = jax.eval_shape(lambda x: draw(x, rows, Stages(True, True)), jnp.zeros((1, 40)))
    assert found[0].dtype == "int32"


@pytest.mark.slow
def test_no_tracer_leaks() -> None:
    """Without rematerialisation: `jax.checkpoint` itself keeps what its function closes over."""
    config = tiny_config(num_layers=1, window_size=4, remat="none", implementation="reference")
    graph, state = abstract_model(config)
    tokens = jnp.ones((2, 4), jnp.int32)
    with jax.checking_leaks():
        jax.eval_shape(lambda state: nnx.merge(graph, state)(tokens), state)
        jax.eval_shape(jax.grad(lambda state: nnx.merge(graph, state)(tokens).sum()), state)
