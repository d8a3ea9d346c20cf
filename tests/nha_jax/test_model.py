"""The whole model: its forward pass, packed documents, depth, and the axes of parameters."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import nha_jax
from nha_jax import Model, ModelConfig
from nha_jax.layers import LOGICAL_AXES
from nha_jax.ops import rope_tables
from tests.support.eight_devices import run_on_eight_devices

WINDOWS = {
    "window": 8,
    "wide-window": (32,),
    "slots-only": 0,
    "full": None,
    "mixed": (8, 0, None),
}
# Everything that a model converted from a pretrained one may have, at once.
CONVERTED = {
    "window_size": (8, 0, None),
    "empty_slots": "mask",
    "conv_width": 0,
    "value_activation": "identity",
    "output_norm": False,
    "qk_norm": True,
    "attention_bias": "all",
    "rope_scaling": {"kind": "yarn", "factor": 4.0, "original_length": 6},
    "experts": {"count": 6, "per_token": 2, "size": 10},
}


def tiny_config(**overrides) -> ModelConfig:
    sizes = {
        "vocab_size": 40,
        "num_layers": 3,
        "hidden_size": 16,
        "num_query_heads": 4,
        "num_kv_heads": 2,
        "key_dim": 8,
        "value_dim": 6,
        "num_slots": 4,
        "window_size": 8,
        "mlp_size": 24,
        "dtype": "float32",
        "initializer_range": 0.2,
    }
    return ModelConfig.from_dict(sizes | overrides)


def tiny_model(**overrides) -> Model:
    return Model(tiny_config(**overrides), rngs=nnx.Rngs(0))


def random_tokens(*shape: int) -> jax.Array:
    return jax.random.randint(jax.random.key(7), shape, 0, 40)


forward = jax.jit(Model.__call__)


DOCUMENTS = (9, 1, 14)
PADDING = 4
SEGMENT_IDS = jnp.repeat(
    jnp.asarray([3, 1, 3, 0]), jnp.asarray([*DOCUMENTS, PADDING]), total_repeat_length=28
)[None]


@pytest.mark.parametrize(
    ("num_layers", "window_size", "implementation"),
    [
        pytest.param(2, (4, None), "reference", id="mixed-reference", marks=pytest.mark.slow),
        pytest.param(1, 4, "xla", id="window-xla", marks=pytest.mark.slow),
    ],
)
def test_packed_documents_equal_documents_alone(num_layers, window_size, implementation):
    model = tiny_model(
        num_layers=num_layers, window_size=window_size, implementation=implementation
    )
    tokens = np.asarray(random_tokens(1, 28))
    weights = np.random.default_rng(1).standard_normal((1, 28, 40), np.float32)
    weights *= np.asarray(SEGMENT_IDS != 0)[..., None]

    @nnx.jit
    @nnx.value_and_grad(has_aux=True)
    def loss(model, tokens, segment_ids, weights):
        logits = model(tokens, segment_ids)
        return (logits * weights).sum(), logits

    # Each document alone in a row; what follows it there is neither compared nor weighted.
    starts = np.cumsum([0, *DOCUMENTS[:-1]])
    index = starts[:, None] + np.arange(max(DOCUMENTS))
    inside = (np.arange(max(DOCUMENTS)) < np.asarray(DOCUMENTS)[:, None])[..., None]
    (_, alone), wanted = loss(model, tokens[0, index], None, weights[0, index] * inside)
    (_, packed), found = loss(model, tokens, SEGMENT_IDS, weights)
    packed, alone, wanted, found = jax.device_get((packed, alone, wanted, found))
    chex.assert_trees_all_close(packed[0, index] * inside, alone * inside, atol=2e-5, rtol=1e-5)
    for one, other in zip(jax.tree.leaves(wanted), jax.tree.leaves(found), strict=True):
        assert np.linalg.norm(other - one) <= 1e-5 * np.linalg.norm(one)


UNKNOWN = {
    "below": -1,
    "beyond": 40,
    "far-below": np.int32(-(2**31)),
    "of-64-bits": np.int64(2**32 + 5),  # in 32 bits it would be 5
}


@pytest.mark.parametrize("conv_width", [0, pytest.param(4, marks=pytest.mark.slow)])
def test_unknown_tokens_harm_their_own_document_only(conv_width):
    model = tiny_model(
        num_layers=2, window_size=(4, None), conv_width=conv_width, implementation="reference"
    )
    tokens, ids = np.asarray(random_tokens(1, 28), np.int64), np.asarray(SEGMENT_IDS)
    wanted = np.asarray(model(tokens, SEGMENT_IDS))
    harmed = (np.arange(28) >= 4) & (np.arange(28) < DOCUMENTS[0])
    for unknown in UNKNOWN.values():
        with_unknown = np.where(ids == 0, unknown, tokens)
        with_unknown[0, 4] = unknown
        found = np.asarray(model(with_unknown, SEGMENT_IDS))
        assert np.isnan(found[0, harmed]).all()
        unharmed = (ids[0] != 0) & ~harmed
        np.testing.assert_array_equal(found[0, unharmed], wanted[0, unharmed])
    embedded = np.isnan(model.embed_tokens(np.array([[3, *UNKNOWN.values(), 39]]))).all(-1)
    assert embedded.tolist() == [[False, *[True] * len(UNKNOWN), False]]


def test_positions_only_matter_through_their_differences():
    model = tiny_model(num_layers=1)
    tokens = random_tokens(2, 12)
    expected = forward(model, tokens)
    rows = jnp.broadcast_to(jnp.arange(12), (2, 12))
    shifted = forward(model, tokens, None, rows + jnp.asarray([[5], [70]]))
    chex.assert_trees_all_close(shifted, expected, atol=2e-5)
    stretched = forward(model, tokens, None, 3 * rows)
    assert jnp.abs(stretched - expected).max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes",
    [
        {"num_layers": 4, "window_size": (8, None)},
        {"num_layers": 2, "experts": CONVERTED["experts"]},
    ],
    ids=["groups-of-two", "experts"],
)
def test_scan_over_groups_equals_a_loop_over_layers(sizes):
    sizes = {"conv_width": 0, "implementation": "reference", **sizes}
    model = tiny_model(**sizes)
    tokens = random_tokens(2, 20)

    def loop(model, tokens):
        graph, stack = nnx.split(model.blocks)
        hidden = model.embed(tokens)
        rope = rope_tables(jnp.arange(20), 8)
        for layer, window_size in enumerate(model.config.windows):
            block = nnx.merge(graph, jax.tree.map(lambda leaf: leaf[layer], stack))  # noqa: B023
            hidden = block(hidden, window_size=window_size, rope=rope)
        return model.head(model.norm(hidden))

    def loss(forward):
        return nnx.jit(nnx.value_and_grad(lambda model, x: jnp.sin(forward(model, x)).sum()))

    wanted, found = loss(loop)(model, tokens), loss(Model.__call__)(model, tokens)
    chex.assert_trees_all_close(found, wanted, rtol=2e-4, atol=2e-4)
    kept = forward(tiny_model(remat="none", **sizes), tokens)
    chex.assert_trees_all_close(kept, forward(model, tokens), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "window_size",
    [pytest.param(8, id="window", marks=pytest.mark.slow), pytest.param((8, None), id="pattern")],
)
def test_program_size_does_not_depend_on_depth(window_size):
    def equations(num_layers):
        model = tiny_model(num_layers=num_layers, window_size=window_size)
        gradient = nnx.grad(lambda model, x: model(x).sum())
        programs = [
            jax.make_jaxpr(gradient)(model, random_tokens(1, 8)),
            jax.make_jaxpr(lambda m, x: m.prefill(x, max_length=9))(model, random_tokens(1, 8)),
        ]
        return [str(program).count(" = ") for program in programs]

    (gradient, prefill), (deep_gradient, deep_prefill) = equations(4), equations(8)
    assert deep_gradient == gradient
    # But for the arrays of the cache, which every layer has for itself.
    assert (deep_prefill - prefill) / 4 < prefill / 50


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"tie_embeddings": True, "conv_width": 0},
        {"num_kv_heads": 4, "window_size": None, "num_layers": 1},
        {"conv_width": 2, "mlp_size": None, "value_dim": 8},
        {"attention_bias": "qkv"},
        CONVERTED,
    ],
    ids=["gqa", "tied-no-convolution", "one-layer", "default-mlp", "biases", "converted"],
)
def test_parameters_are_counted_by_the_config_and_name_their_axes(overrides):
    config = tiny_config(**overrides)
    model = nnx.eval_shape(lambda: Model(config, rngs=nnx.Rngs(0)))
    parameters = nnx.to_flat_state(nnx.state(model))
    assert sum(parameter.size for _, parameter in parameters) == nha_jax.num_parameters(config)
    for path, parameter in parameters:
        names = parameter.get_metadata()["out_sharding"]
        assert len(names) == parameter.ndim, path
        assert set(names) <= set(LOGICAL_AXES), path
        if path[0] == "blocks":
            assert names[0] == "layers", path
            assert parameter.shape[0] == config.num_layers, path


def test_layers_start_different():
    kernel = tiny_model().blocks.attention.q_proj.kernel[...]
    assert jnp.abs(kernel[0] - kernel[1]).max() > 0.01


def test_bfloat16_compute_stays_near_float32():
    tokens = random_tokens(2, 24)
    expected = forward(tiny_model(), tokens)
    logits = forward(tiny_model(dtype="bfloat16"), tokens)
    assert logits.dtype == jnp.float32
    error = jnp.linalg.norm(logits - expected) / jnp.linalg.norm(expected)
    assert 1e-5 < error < 3e-2


@pytest.mark.slow
def test_loss_falls_when_the_model_is_fitted():
    model = tiny_model(num_layers=2, window_size=(4, None), implementation="reference")
    tokens = random_tokens(2, 16)

    @nnx.jit
    @nnx.value_and_grad
    def loss(model, tokens):
        logprobs = jax.nn.log_softmax(model(tokens[:, :-1]))
        return -jnp.take_along_axis(logprobs, tokens[:, 1:, None], axis=-1).mean()

    first, _ = loss(model, tokens)
    for _ in range(30):
        value, gradient = loss(model, tokens)
        step = jax.tree.map(lambda p, g: p - 0.03 * jnp.sign(g), nnx.state(model), gradient)
        nnx.update(model, step)
    assert value < 0.3 * first


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m(jnp.zeros(3, int)), ValueError, r"tokens must be \[batch, time\], got shape"),
        (lambda m: m(jnp.zeros((1, 3))), TypeError, "tokens must be integers, got dtype float32"),
        (
            lambda m: m(random_tokens(1, 3), jnp.ones((1, 4), int)),
            ValueError,
            r"segment_ids must have the tokens' shape \(1, 3\), got \(1, 4\)",
        ),
        (
            lambda m: m(random_tokens(1, 3), None, jnp.arange(2)),
            ValueError,
            r"positions must be \[time\] or \[batch, time\]",
        ),
        (lambda m: m.prefill(random_tokens(1, 3)), ValueError, "max_length=None: layers with full"),
        (
            lambda m: m.prefill(random_tokens(1, 3), max_length=2),
            ValueError,
            "at least the prompt's 3",
        ),
        (
            lambda m: m.prefill(random_tokens(2, 3), lengths=[1, 4], max_length=9),
            ValueError,
            r"lengths must be within \[1, 3\], got \[1, 4\]",
        ),
        (
            lambda m: m.prefill(random_tokens(2, 3), lengths=[1], max_length=9),
            ValueError,
            r"lengths must be \[batch\] = \(2,\)",
        ),
        (
            lambda m: m.decode_step(
                random_tokens(3, 1), m.prefill(random_tokens(3, 2), max_length=3)[1]
            ),
            ValueError,
            r"tokens must be \[batch\] as in the cache",
        ),
    ],
    ids=[
        "tokens-rank",
        "tokens-dtype",
        "segments-shape",
        "positions-shape",
        "no-max-length",
        "small-max-length",
        "lengths-range",
        "lengths-shape",
        "step-rank",
    ],
)
def test_a_wrong_argument_is_named(call, error, message):
    model = tiny_model(num_layers=1, window_size=None, implementation="reference")
    with pytest.raises(error, match=message):
        call(model)


def test_sharded_over_eight_devices_equals_one():
    done = run_on_eight_devices("tests.support.model_on_a_mesh")
    assert done.returncode == 0, done.stderr


def test_with_windows_shares_the_parameters():
    model = Model(tiny_config(window_size=4), rngs=nnx.Rngs(0))
    num_layers = model.config.num_layers
    layout = [None, *range(num_layers - 1)]
    other = model.with_windows(layout)
    assert other.config.windows == tuple(layout)
    assert other.embed.embedding is model.embed.embedding
    same = Model(tiny_config(window_size=layout), rngs=nnx.Rngs(0))
    tokens = random_tokens(1, 20)
    chex.assert_trees_all_equal(forward(other, tokens), forward(same, tokens))
    with pytest.raises(ValueError, match="window_size"):
        model.with_windows([4] * (num_layers + 1))


def test_layers_one_by_one_make_up_the_model():
    model = tiny_model(window_size=(8, 0, None))
    tokens = random_tokens(1, 28)

    @jax.jit
    def one_by_one(model, tokens):
        hidden = model.embed_tokens(tokens)
        for index, window_size in enumerate(model.config.windows):
            hidden = jnp.where((SEGMENT_IDS != 0)[..., None], hidden, jnp.nan)  # nobody reads it
            hidden = model.apply_layer(index, hidden, window_size, segment_ids=SEGMENT_IDS)
        return model.logits(model.norm(hidden))

    real = np.asarray(SEGMENT_IDS != 0)
    found = np.asarray(one_by_one(model, tokens))[real]
    wanted = np.asarray(forward(model, tokens, SEGMENT_IDS))[real]
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("index", "shape", "message"),
    [
        (3, (1, 4, 16), "index=3"),
        (-1, (1, 4, 16), "index=-1"),
        (0, (1, 4, 17), "hidden must be"),
        (0, (4, 16), "hidden must be"),
    ],
)
def test_a_layer_that_is_not_there_is_refused(index, shape, message):
    with pytest.raises(ValueError, match=message):
        tiny_model().apply_layer(index, jnp.zeros(shape), 8)
