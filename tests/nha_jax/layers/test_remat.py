"""Rematerialisation: the same gradients, and as much computed again as the policy says."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from nha_jax import Model, ModelConfig
from nha_jax.testing import relative_error

POLICIES = ("none", "full", "operator", "dots")


def model_of(remat: str, **overrides) -> Model:
    fields = {
        "vocab_size": 32, "num_layers": 4, "hidden_size": 32, "num_query_heads": 2, "num_slots": 8,
        "window_size": 8, "dtype": "float32", "implementation": "xla",
    }  # fmt: skip
    return Model(ModelConfig(**fields | overrides, remat=remat), rngs=nnx.Rngs(0))


def loss(model: Model, tokens: jax.Array) -> jax.Array:
    """Of the logits and of the slot weights: both are saved, or computed again."""
    seen = model.diagnose(tokens, slot_weight_gradient="slots")
    return jnp.sin(model.logits(seen.hidden)).sum() + jnp.cos(9 * seen.slot_weight).sum()


@pytest.mark.slow
def test_gradients_do_not_depend_on_what_is_kept():
    tokens = jnp.arange(40)[None] % 32
    kept, *recomputed = (
        jax.jit(jax.grad(loss))(model_of(remat, num_layers=2, window_size=(8, None)), tokens)
        for remat in POLICIES
    )
    for gradients in recomputed:
        errors = jax.tree.map(relative_error, nnx.state(gradients), nnx.state(kept))
        assert max(jax.tree.leaves(errors)) < 2e-6


def gradient(model: Model, tokens: jax.Array) -> Model:
    return jax.grad(lambda model: jnp.sin(model(tokens)).sum())(model)


@pytest.mark.parametrize(
    "implementation", ["xla", pytest.param("pallas_tpu", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
    "window_size", [8, pytest.param(None, marks=pytest.mark.slow)], ids=["window", "full-attention"]
)
def test_the_operators_forward_runs_once_if_its_residuals_are_kept(window_size, implementation):
    tokens = jnp.zeros((1, 300), jnp.int32)

    def runs(remat: str) -> int:
        """Of the operator's loop or kernels, forward and backward, in the program."""
        options = {"window_size": window_size, "implementation": implementation}
        program = str(jax.make_jaxpr(gradient)(model_of(remat, **options), tokens))
        return program.count("scan[" if implementation == "xla" else "pallas_call[")

    assert runs("operator") == runs("dots") < runs("full")


@pytest.mark.slow
def test_the_less_is_kept_the_less_memory_is_needed():
    tokens = jax.ShapeDtypeStruct((1, 128), jnp.int32)
    sizes = [
        jax.jit(gradient).lower(model_of(remat, num_layers=32), tokens).compile().memory_analysis()
        for remat in ("full", "operator", "dots", "none")
    ]
    temporary = [size.temp_size_in_bytes for size in sizes]
    assert temporary == sorted(temporary)
    assert temporary[-1] > 1.5 * temporary[0]
