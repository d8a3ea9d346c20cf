"""Muon on stacked layers: it gets every matrix of the layers, one by one, and nothing else."""

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict
from optax.contrib import MuonDimensionNumbers

import nha_jax
from nha_jax import Model, ModelConfig
from nha_jax.model import abstract_model
from nha_jax.sizes import by_name

# Every matrix that a model can have, and none of the shapes square, so that axes are told apart.
EVERYTHING = {
    "vocab_size": 40,
    "num_layers": 2,
    "hidden_size": 16,
    "num_query_heads": 4,
    "num_kv_heads": 2,
    "key_dim": 6,
    "value_dim": 6,
    "num_slots": 4,
    "qk_norm": True,
    "attention_bias": "all",
    "experts": {"count": 3, "per_token": 1, "size": 24},
    "dtype": "float32",
}


def abstract(config: ModelConfig) -> Model:
    return nnx.merge(*abstract_model(config))


def numbers_by_name(numbers: nnx.State) -> dict[str, MuonDimensionNumbers | None]:
    """Lists what `by_name` would enter: dimension numbers are tuples."""
    return flatten_dict(nnx.to_pure_dict(numbers), sep=".")


def counts(transformation: optax.GradientTransformation, parameters: nnx.State) -> dict[str, int]:
    """How many parameters Muon and Adam keep a momentum of."""
    state = jax.eval_shape(transformation.init, nnx.as_pure(parameters))
    return {
        name: sum(x.size for x in jax.tree.leaves(each.inner_state[0].mu))
        for name, each in state.inner_states.items()
    }


def test_muon_gets_the_matrices_of_the_layers_and_adam_the_rest():
    model = abstract(ModelConfig.preset("nha-tiny"))
    parameters = nnx.state(model, nnx.Param)
    numbers = nha_jax.muon_dimension_numbers(model)
    muon = optax.contrib.muon(0.02, muon_weight_dimension_numbers=numbers)
    # q, k, v and o are 128 x 128, f is 128 x 64, and there are three of 128 x 384 in the SwiGLU.
    matrices = 3 * (4 * 128 * 128 + 128 * 64 + 3 * 128 * 384)
    assert counts(muon, parameters) == {"muon": matrices, "adam": 702_336 - matrices}
    # What optax would do by itself: the embedding, and norms of all layers as matrices.
    assert counts(optax.contrib.muon(0.02), parameters) == {"muon": 34_048, "adam": 668_288}


@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_the_matrices_are_those_of_projections_experts_and_router(tie_embeddings):
    model = abstract(ModelConfig.from_dict(EVERYTHING | {"tie_embeddings": tie_embeddings}))
    numbers = numbers_by_name(nha_jax.muon_dimension_numbers(model))
    two, three = MuonDimensionNumbers(1, 2), MuonDimensionNumbers(2, 3)
    assert {name: each for name, each in numbers.items() if each is not None} == {
        **{f"blocks.attention.{name}_proj.kernel": two for name in "qkvfo"},
        "blocks.mlp.router.kernel": two,
        **{f"blocks.mlp.{name}_proj.kernel": three for name in ("gate", "up", "down")},
    }


def test_an_update_of_the_stack_is_that_of_each_matrix_by_itself():
    model = abstract(ModelConfig.from_dict(EVERYTHING))
    numbers = nha_jax.muon_dimension_numbers(model)
    random = np.random.default_rng(0)
    gradients = jax.tree.map(
        lambda x: random.standard_normal(x.shape).astype(np.float32),
        nnx.as_pure(nnx.state(model, nnx.Param)),
    )

    def first_update(muon):
        return jax.jit(lambda gradients: muon.update(gradients, muon.init(gradients), gradients)[0])

    stacked = first_update(optax.contrib.muon(0.02, muon_weight_dimension_numbers=numbers))
    alone = first_update(optax.contrib.muon(0.02))
    updates, gradients = by_name(stacked(gradients)), by_name(gradients)
    matrices = [name for name, axes in numbers_by_name(numbers).items() if axes is not None]
    for name in matrices:
        each = [alone(x) for x in gradients[name].reshape(-1, *gradients[name].shape[-2:])]
        expected = np.reshape(each, gradients[name].shape)
        np.testing.assert_allclose(updates[name], expected, rtol=0, atol=1e-6, err_msg=name)
    assert len(matrices) == 9
