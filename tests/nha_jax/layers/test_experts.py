"""The mixture of experts against a plain one, in which every expert sees every token."""

import chex
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from nha_jax import Model, ModelConfig
from nha_jax.layers import MixtureOfExperts


def make_config(**experts) -> ModelConfig:
    return ModelConfig(
        vocab_size=40,
        num_layers=2,
        hidden_size=12,
        num_query_heads=2,
        num_slots=4,
        window_size=4,
        experts={"size": 10, **experts},
        dtype="float32",
        initializer_range=0.4,
    )


def make_inputs(B: int, T: int) -> jax.Array:
    return jax.random.normal(jax.random.key(B), (B, T, 12))


def plain_mixture(layer: MixtureOfExperts, x: jax.Array) -> jax.Array:
    experts = layer.config.experts
    shares = jax.nn.softmax(x @ layer.router.kernel[...])
    least = jnp.sort(shares)[..., -experts.per_token]
    weights = jnp.where(shares >= least[..., None], shares, 0)
    if experts.normalize:
        weights /= weights.sum(-1, keepdims=True)
    inner = jax.nn.silu(jnp.einsum("btd,edi->btei", x, layer.gate_proj.kernel[...]))
    inner *= jnp.einsum("btd,edi->btei", x, layer.up_proj.kernel[...])
    return jnp.einsum("bte,btei,eid->btd", weights, inner, layer.down_proj.kernel[...])


@pytest.mark.parametrize(
    ("count", "per_token", "normalize", "B", "T"),
    [
        (4, 2, True, 2, 9),
        (4, 2, False, 2, 9),
        pytest.param(4, 1, False, 2, 9, marks=pytest.mark.slow),
        pytest.param(3, 3, True, 2, 9, marks=pytest.mark.slow),
        (16, 2, True, 3, 1),
    ],
    ids=["two", "two-by-their-shares", "one", "all", "decode-with-idle-experts"],
)
def test_values_and_gradients_are_the_plain_ones(count, per_token, normalize, B, T):
    config = make_config(count=count, per_token=per_token, normalize=normalize)
    layer, x = MixtureOfExperts(config, rngs=nnx.Rngs(0)), make_inputs(B, T)

    def loss(apply):
        @jax.jit
        def run(layer, x):
            outputs, gradients = jax.vjp(apply, layer, x)
            return outputs, gradients(jnp.cos(3 * outputs))

        return run

    wanted, found = (loss(apply)(layer, x) for apply in (plain_mixture, MixtureOfExperts.__call__))
    chex.assert_trees_all_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_an_expert_may_get_every_token_or_none():
    layer = MixtureOfExperts(make_config(count=3, per_token=1), rngs=nnx.Rngs(0))
    layer.router.kernel[...] = jnp.zeros((12, 3)).at[0, 1].set(100.0)
    x = make_inputs(2, 5).at[..., 0].set(1.0)

    @jax.jit
    def run(layer):
        gradients = jax.grad(lambda layer: layer(x).sum())(layer)
        return layer(x), plain_mixture(layer, x), gradients

    found, wanted, gradients = run(layer)
    chex.assert_trees_all_close(found, wanted, rtol=1e-5, atol=1e-5)
    used = [bool(jnp.any(gradient)) for gradient in gradients.up_proj.kernel[...]]
    assert used == [False, True, False]


def test_bfloat16_experts_and_a_float32_router():
    config = make_config(count=5, per_token=2)
    exact = MixtureOfExperts(config, rngs=nnx.Rngs(0))
    rough_config = ModelConfig.from_dict(config.to_dict() | {"dtype": "bfloat16"})
    rough, x = MixtureOfExperts(rough_config, rngs=nnx.Rngs(0)), make_inputs(2, 20)
    chex.assert_trees_all_equal(rough.route(x), exact.route(x))
    outputs, wanted = rough(x), exact(x)
    assert outputs.dtype == jnp.bfloat16
    error = jnp.linalg.norm(outputs - wanted) / jnp.linalg.norm(wanted)
    assert 1e-4 < error < 1e-2


def test_parameters_are_one_stack_with_names():
    model = Model(make_config(count=5, per_token=2), rngs=nnx.Rngs(0))
    shapes = {
        ".".join(map(str, path)): (variable.shape, variable.get_metadata()["out_sharding"])
        for path, variable in nnx.to_flat_state(nnx.state(model.blocks.mlp))
    }
    wide = ((2, 5, 12, 10), ("layers", "experts", "embed", "mlp"))
    assert shapes == {
        "router.kernel": ((2, 12, 5), ("layers", "embed", "experts")),
        "gate_proj.kernel": wide,
        "up_proj.kernel": wide,
        "down_proj.kernel": ((2, 5, 10, 12), ("layers", "experts", "mlp", "embed")),
    }
    first, second = model.blocks.mlp.up_proj.kernel[...]
    assert jnp.abs(first - second).max() > 0.1
    assert jnp.abs(first[0] - first[1]).max() > 0.1
