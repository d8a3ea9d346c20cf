"""`NHAttention` by itself, as the layer of anyone's own Transformer."""

import dataclasses
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from nha_jax import ModelConfig, NHAttention
from nha_jax.config_parts import RopeScaling
from nha_jax.layer_config import LayerConfig
from nha_jax.model import abstract_model
from nha_jax.ops import rope_tables
from nha_jax.sharding import named_shardings
from tests.nha_jax.test_compilations import count
from tests.nha_jax.test_model import tiny_config

B, T, HIDDEN = 2, 9, 8


PACKED = np.array([[1] * 4 + [2] * 5, [0] * 2 + [7] * 6 + [0]])


def small(**options) -> NHAttention:
    defaults = {
        "num_kv_heads": 1,
        "num_slots": 3,
        "window_size": 3,
        "initializer_range": 0.4,
        "implementation": "reference",
        "conv_width": 0,
        "rope_theta": 500.0,
        "rope_scaling": {"kind": "linear", "factor": 2.0},
    }
    return NHAttention(HIDDEN, 2, **defaults | options, rngs=nnx.Rngs(0))


X = np.random.default_rng(0).normal(size=(B, T, HIDDEN)).astype(np.float32)


def close(found, expected) -> None:
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_it_is_float32_and_needs_two_sizes():
    def make_and_run() -> tuple[NHAttention, jax.Array]:
        layer = NHAttention(16, 2, rngs=nnx.Rngs(0))
        config = layer.config
        assert (config.num_kv_heads, config.key_dim, config.value_dim) == (2, 8, 8)
        return layer, layer(jnp.ones((1, 4, 16), jnp.bfloat16))

    layer, outputs = jax.eval_shape(make_and_run)
    assert outputs.shape == (1, 4, 16)
    assert {x.dtype for x in (outputs, *jax.tree.leaves(layer))} == {jnp.dtype("float32")}


def test_every_option_of_a_models_layers_is_an_argument():
    arguments = dict(inspect.signature(NHAttention.__init__).parameters)
    del arguments["self"]
    assert list(arguments) == [field.name for field in dataclasses.fields(LayerConfig)] + ["rngs"]
    of_the_model = {
        field.name: field.default for field in dataclasses.fields(ModelConfig)
    }  # and of no layer:
    for name in (
        *("vocab_size", "num_layers", "mlp_size", "experts", "tie_embeddings", "mup_base_width"),
        "remat",
    ):
        del of_the_model[name]
    of_the_model["num_heads"] = of_the_model.pop("num_query_heads")
    assert of_the_model.pop("dtype") == "bfloat16"
    assert arguments["dtype"].default == "float32"
    for name, default in of_the_model.items():
        missing = inspect.Parameter.empty if default is dataclasses.MISSING else default
        assert arguments[name].default == missing, name


def test_it_is_the_layer_of_the_model():
    config = tiny_config(window_size=(4, None), num_layers=2, qk_norm=True)
    options = vars(config.layer) | {"window_size": None}
    alone = jax.eval_shape(lambda: nnx.state(NHAttention(**options, rngs=nnx.Rngs(0))))
    graph, state = abstract_model(config)
    assert type(nnx.merge(graph, state).blocks.attention) is NHAttention
    of_the_model = {path: x.shape for path, x in nnx.to_flat_state(state.blocks.attention)}
    assert of_the_model == {path: (2, *x.shape) for path, x in nnx.to_flat_state(alone)}


@pytest.mark.parametrize(
    ("window_size", "conv_width", "pieces"),
    [
        (3, 0, [[4, 2]]),
        pytest.param(3, 3, [[4, 2], [0, 2]], marks=pytest.mark.slow),
        pytest.param(0, 3, [[4, 2], [0, 2]], marks=pytest.mark.slow),
        pytest.param(None, 3, [[4, 2], [0, 2]], marks=pytest.mark.slow),
    ],
)
def test_prompts_and_steps_are_one_forward(window_size, conv_width, pieces):
    """Ragged prompts, in pieces, with anything behind their ends, and then token by token."""
    layer = small(window_size=window_size, conv_width=conv_width)
    expected, done, cache = np.asarray(layer(X)), np.zeros(B, int), None
    for lengths in pieces:
        prompt = np.full((B, 4, HIDDEN), np.nan, np.float32)
        for row, length in enumerate(lengths):
            prompt[row, :length] = X[row, done[row] :][:length]
        room = {"max_length": T} if cache is None else {"cache": cache}
        outputs, cache = layer.prefill(prompt, lengths=lengths, **room)
        for row, length in enumerate(lengths):
            close(outputs[row, :length], expected[row, done[row] :][:length])
        done += lengths
    for active in ([True, True], [False, True], [True, False], [True, True]):
        token, positions = X[range(B), done][:, None], done[:, None]
        outputs, cache = layer.decode_step(
            token, cache, active=np.array(active), positions=positions if all(active) else None
        )
        for row in np.flatnonzero(active):
            close(outputs[row, 0], expected[row, done[row]])
        done += active


@pytest.mark.slow
def test_an_empty_cache_is_where_a_prompt_begins():
    layer = small()
    outputs, cache = layer.prefill(X[:, :1])
    found = layer.decode_step(X[:, :1], layer.init_cache(B))
    jax.tree.map(close, found, (outputs, cache))


def test_segments_are_sequences_of_their_own_and_are_diagnosed():
    layer = small()
    dirty = np.where((PACKED == 0)[..., None], np.nan, X).astype(np.float32)
    found, seen = jax.tree.map(np.asarray, layer.diagnose(dirty, PACKED))
    for parts in (slice(0, 4), slice(2, 8)), (slice(4, 9), slice(2, 8)):
        alone = np.ones_like(X)  # nothing after a segment reaches it
        for row, part in enumerate(parts):
            alone[row, : part.stop - part.start] = X[row, part]
        expected = layer(alone)
        for row, part in enumerate(parts):
            close(found[row, part], expected[row, : part.stop - part.start])
    np.testing.assert_array_equal(found[PACKED == 0], 0)
    assert seen.slot_weight.shape == (B, T, 2)
    assert ((seen.slot_weight > 0) == (PACKED != 0)[..., None]).all()
    assert (seen.slot_weight < 1).all()
    assert seen.log_decay.shape == (B, T, 1, 3)
    assert (seen.log_decay < 0).all()


def test_the_rotation_is_the_layers_that_of_the_call_or_none():
    layer = small()
    expected, positions = layer(X), np.arange(T)
    close(layer(X, None, positions + 5), expected)  # relative
    assert np.abs(layer(X, None, 3 * positions) - expected).max() > 1e-3
    tables = rope_tables(jnp.arange(T), 4, 500.0, RopeScaling(kind="linear", factor=2.0))
    still = (np.ones((T, 2), np.float32), np.zeros((T, 2), np.float32))
    close(layer(X, rope=tables), expected)
    bare = small(rope_theta=None, rope_scaling=None)
    close(bare(X), layer(X, rope=still))
    assert small(key_dim=3, rope_theta=None, rope_scaling=None).config.key_dim == 3


def test_a_call_compiles_once():
    expected = small()(X)
    with count() as seen:
        found = small()(X)
    assert not seen
    np.testing.assert_array_equal(found, expected)


def test_another_window_shares_the_parameters():
    layer = small()
    wide = layer.with_window(None)
    assert (layer.config.window_size, wide.config.window_size) == (3, None)
    chex.assert_trees_all_equal(nnx.state(wide), nnx.state(layer))
    assert np.abs(layer(X) - wide(X)).max() > 1e-3
    with pytest.raises(ValueError, match="window_size=-1 must be an integer of at least 0, or"):
        layer.with_window(-1)


def test_a_mesh_divides_it_by_the_names_of_its_axes():
    mesh = jax.make_mesh((1,), ("tensor",))
    shardings = named_shardings(small(), mesh)
    assert shardings.q_proj.kernel.spec == PartitionSpec(None, "tensor")
    assert shardings.o_proj.kernel.spec == PartitionSpec("tensor", None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_kv_heads": 3}, "num_kv_heads=3 must divide num_heads=2: every key/value head"),
        ({"num_heads": 3}, "hidden_size=8 is not a multiple of num_heads=3; change one of them"),
        ({"num_heads": 0}, "num_heads=0 must be an integer of at least 1"),
        ({"hidden_size": 8.0}, "hidden_size=8.0 must be an integer"),
        ({"key_dim": 3}, "key_dim=3 must be even"),
        ({"num_slots": -1}, "num_slots=-1 must be an integer of at least 0"),
        ({"window_size": (4, None)}, r"window_size=\(4, None\) must be an integer of at least 0"),
        ({"window_size": True}, "window_size=True must be an integer"),
        ({"window_size": 0, "num_slots": 0}, "window_size=0 leaves nothing to read: num_slots=0"),
        ({"conv_width": 1}, "conv_width=1 has no past tap"),
        ({"qk_norm": 1}, "qk_norm=1 must be true or false"),
        ({"attention_bias": True}, "attention_bias=True must be one of 'none', 'qkv', 'all'"),
        ({"rope_theta": 0.0}, "rope_theta=0.0 must be a finite number above 0"),
        (
            {"rope_theta": None, "rope_scaling": {"kind": "linear", "factor": 2.0}},
            "rope_scaling=.* stretches no rotation, as rope_theta=None",
        ),
        ({"dtype": jnp.float16}, "dtype='float16' must be one of 'bfloat16', 'float32'"),
        ({"param_dtype": None}, "param_dtype=None must be one of 'bfloat16', 'float32'"),
        ({"implementation": "cuda"}, "implementation='cuda' must be one of 'reference', 'xla'"),
        ({"kernel_options": {"xla": {}}}, "kernel_options: implementation 'xla' has no options"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_a_wrong_option_is_one_line_that_names_it(options, message):
    arguments = {"hidden_size": HIDDEN, "num_heads": 2} | options
    with pytest.raises(ValueError, match=f"^NHAttention: {message}") as error:
        NHAttention(**arguments, rngs=nnx.Rngs(0))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f: f(X[0]), r"inputs must be \[batch, time, hidden_size=8\], got shape \(9, 8\)"),
        (lambda f: f(X[..., :6]), r"inputs must be \[batch, time, hidden_size=8\], got .*6\)"),
        (lambda f: f(X[:, :0]), r"inputs must not be empty, got shape \(2, 0, 8\)"),
        (lambda f: f(X.astype(int)), "inputs must have a floating dtype, got int"),
        (lambda f: f(X, PACKED[:1]), r"segment_ids must have the tokens' shape \(2, 9\)"),
        (lambda f: f(X, PACKED * 1.0), "segment_ids must be integers, got dtype float"),
        (lambda f: f(X, None, np.arange(4)), r"positions must be \[time\] or \[batch, time\]"),
        (
            lambda f: f(X, None, np.arange(T), rope=rope_tables(jnp.arange(T), 4)),
            "positions make the layer's rotary tables, but rope is given: leave them out",
        ),
        (
            lambda f: small(rope_theta=None, rope_scaling=None)(X, None, np.arange(T)),
            "positions make .* but the layer has rope_theta=None: leave them out",
        ),
        (lambda f: f(X, rope=rope_tables(jnp.arange(T), 2)), r"rope's cos must have shape \(9, 2"),
        (
            lambda f: f.diagnose(X, slot_weight_gradient="some"),
            "slot_weight_gradient must be one of",
        ),
        (lambda f: f.prefill(X, lengths=[9, 0]), r"lengths must be within \[1, 9\], got \[9, 0\]"),
        (lambda f: f.with_window(None).prefill(X, max_length=8), "max_length=8: layers with full"),
        (lambda f: f.with_window(None).init_cache(2), "max_length=None: layers with full"),
        (lambda f: f.init_cache(0), "batch_size=0 must be an integer of at least 1"),
        (
            lambda f: f.prefill(X, cache=f.init_cache(2), max_length=9),
            "max_length=9: the cache has its own",
        ),
        (lambda f: f.prefill(X, cache=f.init_cache(3)), "inputs have 2 rows, but the cache 3"),
        (lambda f: f.decode_step(X[:1, :1], f.init_cache(2)), "inputs have 1 rows, but the cache"),
        (lambda f: f.decode_step(X, f.init_cache(2)), "inputs must be one token of each row"),
        (
            lambda f: f.with_window(2).decode_step(X[:, :1], f.init_cache(2)),
            "state.window_key must have shape",
        ),
    ],
)
def test_a_wrong_argument_is_named(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call(small())
