"""Calls outside of `jax.jit` find the program of the first call like them: none compiles twice."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nha_jax import Model, NHAttention
from nha_jax.ops import NHAState, backends, decode_step, init_state, nha_attention, use_mesh_axes
from nha_jax.ops.backends import Backend
from nha_jax.ops.mesh.division import divide_over_mesh
from nha_jax.ops.types import NHAOutput
from tests.nha_jax.test_model import tiny_model

B, T, H, K, W = 1, 5, 1, 2, 2
X = np.ones((B, T, H, K), np.float32)
ONE = X[:, :1]
IDS = np.ones((B, T), np.int32)
TABLES = (np.ones((T, K // 2), np.float32), np.zeros((T, K // 2), np.float32))
TOKENS = np.arange(B * T, dtype=np.int32).reshape(B, T)


@contextlib.contextmanager
def count() -> Iterator[list[str]]:
    """Lists what is traced and compiled within: an entry each."""
    seen: list[str] = []

    def note(event: str, duration: float, **_: Any) -> None:
        if event.endswith(("/backend_compile_duration", "/jaxpr_trace_duration")):
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(note)


@pytest.fixture(scope="module")
def layer() -> NHAttention:
    return NHAttention(
        4, H, num_slots=2, window_size=W, implementation="reference", rngs=nnx.Rngs(0)
    )


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny_model(
        implementation="reference", window_size=W, num_layers=1, conv_width=0, output_norm=False
    )


def attend(query: Any, implementation: str = "reference", **rest: Any) -> Any:
    return nha_attention(query, X, X, -X, window_size=W, implementation=implementation, **rest)


def loss(query: Any) -> jax.Array:
    return attend(query, rope=TABLES).sum()


def loss_of(model: Model) -> jax.Array:
    return model(TOKENS).sum()


def state() -> NHAState:
    return init_state(
        B, num_kv_heads=H, num_slots=K, key_dim=K, value_dim=K, window_size=W, dtype=jnp.float32
    )


def decode(implementation: str | None) -> Any:
    return decode_step(ONE, ONE, ONE, -ONE, state(), window_size=W, implementation=implementation)


OPERATOR: dict[str, Callable[[], Any]] = {
    "attention": lambda: attend(X),
    "attention-xla": lambda: attend(X, "xla"),
    "everything": lambda: attend(
        X,
        rope=TABLES,
        segment_ids=IDS,
        initial_state=state(),
        return_state=True,
        return_slot_weight=True,
    ),
    "grad": lambda: jax.grad(loss)(X),
    "vjp": lambda: jax.vjp(attend, X)[1](X),
    "vmap": lambda: jax.vmap(attend)(X[None]),
    "decode": lambda: decode("reference"),
    "decode-automatic": lambda: decode(None),
}
MODEL: dict[str, Callable[[Model], Any]] = {
    "call": lambda model: model(TOKENS),
    "hidden_states": lambda model: model.hidden_states(TOKENS),
    "diagnose": lambda model: model.diagnose(TOKENS),
    "prefill": lambda model: model.prefill(TOKENS, lengths=[T - 1], cache=model.init_cache(B)),
    "decode_step": lambda model: model.decode_step(TOKENS[:, 0], model.init_cache(B)),
    "apply_layer": lambda model: model.apply_layer(0, model.embed_tokens(TOKENS), W),
    "with_windows": lambda model: model.with_windows(0)(TOKENS),
    "grad": lambda model: nnx.grad(loss_of)(model),
    "value_and_grad": lambda model: nnx.value_and_grad(loss_of)(model),
}

HIDDEN = np.ones((B, T, 4), np.float32)
LAYER: dict[str, Callable[[NHAttention], Any]] = {
    "call": lambda layer: layer(HIDDEN, IDS),
    "diagnose": lambda layer: layer.diagnose(HIDDEN),
    "prefill": lambda layer: layer.prefill(HIDDEN, lengths=[T - 1], cache=layer.init_cache(B)),
    "decode_step": lambda layer: layer.decode_step(HIDDEN[:, :1], layer.init_cache(B)),
    "with_window": lambda layer: layer.with_window(0)(HIDDEN),
    "grad": lambda layer: nnx.grad(lambda layer: layer(HIDDEN).sum())(layer),
}


@pytest.mark.parametrize("name", OPERATOR)
def test_the_operator_compiles_once(name):
    OPERATOR[name]()
    with count() as seen:
        OPERATOR[name]()
    assert not seen


@pytest.mark.parametrize("name", MODEL)
def test_a_model_compiles_once(name, model):
    MODEL[name](model)
    with count() as seen:
        MODEL[name](model)
    assert not seen


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYER)
def test_a_layer_compiles_once(name, layer):
    LAYER[name](layer)
    with count() as seen:
        LAYER[name](layer)
    assert not seen


@pytest.mark.slow
def test_the_gradient_by_xla_compiles_once():
    gradient = jax.grad(lambda query: attend(query, "xla", rope=TABLES).sum())
    gradient(X)
    with count() as seen:
        gradient(X)
    assert not seen


def test_prompts_of_many_lengths_run_one_program(model):
    prompts = [np.ones((2, length), np.int32) for length in (3, 15, 1, 7)]
    arrays = [jnp.asarray(prompt) for prompt in prompts]
    lengths = [jnp.asarray([prompt.shape[1], 1]) for prompt in prompts]
    with count() as seen:
        for prompt, rows in zip([*prompts, *arrays], 2 * lengths, strict=True):  # read as 16
            model.prefill(prompt)
            model.prefill(prompt, lengths=rows)
    assert [event.endswith("/backend_compile_duration") for event in seen].count(True) == 1


def test_other_shapes_are_counted():
    with count() as seen:
        attend(np.ones((B, T, 3 * H, K), np.float32))
    kinds = {event.rsplit("/")[-1] for event in seen}
    assert kinds == {"jaxpr_trace_duration", "backend_compile_duration"}


def test_other_parameters_run_the_same_program(model):
    doubled = nnx.merge(nnx.graphdef(model), jax.tree.map(lambda x: 2 * x, nnx.state(model)))
    logits = model(TOKENS)
    with count() as seen:
        changed = doubled(TOKENS)
    assert not seen
    assert np.abs(np.subtract(changed, logits)).max() > 0.1


class Constant(Backend):
    """Gives one number everywhere."""

    name = "constant"

    def __init__(self, number: float):
        self.number = number

    def attend(self, query, key, value, log_decay, *, rope, segment_ids, past, options):
        shape = (*query.shape[:3], value.shape[3])
        return NHAOutput(jnp.full(shape, self.number, query.dtype))


def test_a_name_that_is_registered_anew_runs_the_new_backend(model):
    hidden = []
    for number in (2.0, 3.0):
        backends.register(Constant(number))
        try:
            out = attend(X, "constant")
            hidden.append(model.with_implementation("constant").hidden_states(TOKENS))
        finally:
            backends.unregister("constant")
        np.testing.assert_array_equal(out, np.full(X.shape, number))
    assert np.abs(np.subtract(*hidden)).max() > 1e-3


def test_other_axes_of_the_mesh_are_another_program():
    traced = []

    @jax.jit
    def work(x):
        traced.append(divide_over_mesh(1, 1).batch)
        return x

    mesh = jax.make_mesh((1,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        for axis in ("data", "rows", "data", "rows"):
            with use_mesh_axes(batch=[axis]):
                work(X)
    assert traced == [(), ("rows",)]


def test_scales_that_are_equal_are_one_program():
    attend(X, scale=0.5)
    with count() as seen:
        attend(X, scale=np.float32(0.5))
    assert not seen


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, h: m.apply_layer(0, h, [2]), r"window_size must be an int or None.*\[2\]"),
        (lambda m, h: m.apply_layer(0, h, 2.0), "window_size must be an int or None.*2.0"),
        (
            lambda m, _: m.diagnose(TOKENS, slot_weight_gradient=["all"]),
            r"slot_weight_gradient must be one of .*\['all'\]",
        ),
    ],
    ids=["list", "float", "gradient"],
)
def test_what_programs_are_found_by_is_checked_first(call, message, model):
    with pytest.raises((TypeError, ValueError), match=message):
        call(model, np.zeros((B, T, model.config.hidden_size), np.float32))
