"""A model whose layers are modules of their own is the same function, and becomes a model again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import nha_jax
from nha_jax.layers.parameters import logical_axes
from tests.nha_jax.test_model import random_tokens, tiny_model


def same(x: nnx.Module, y: nnx.Module) -> None:
    jax.tree.map(np.testing.assert_array_equal, nnx.state(x), nnx.state(y))


@pytest.mark.slow
def test_an_unstacked_model_computes_what_the_model_does():
    model = tiny_model(window_size=(4, None), num_layers=2, dtype="float32", remat="none")
    unstacked = nha_jax.unstack(model)
    tokens = random_tokens(2, 9).at[0, 6].set(-1)
    segment_ids = jnp.array([[1, 1, 1, 2, 2, 0, 3, 3, 3], [1] * 9])
    found = nnx.jit(lambda model: model(tokens, segment_ids))(unstacked)
    expected = model(tokens, segment_ids)
    real = np.asarray(segment_ids != 0)
    assert np.isnan(expected[0, 6:]).all()
    np.testing.assert_allclose(found[real], expected[real], rtol=0, atol=2e-6)


@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_stacking_undoes_it(tie_embeddings):
    model = tiny_model(tie_embeddings=tie_embeddings, num_layers=3)
    again = nha_jax.stack(nha_jax.unstack(model))
    assert again.config == model.config
    assert nnx.graphdef(again) == nnx.graphdef(model)
    same(again, model)


def test_a_layers_parameters_name_their_own_axes():
    unstacked = nha_jax.unstack(tiny_model(num_layers=2))
    for block in unstacked.blocks:
        for parameter in jax.tree.leaves(block, is_leaf=lambda x: isinstance(x, nnx.Param)):
            assert len(logical_axes(parameter)) == parameter.ndim


def test_what_no_model_has_is_named_when_stacked():
    unstacked = nha_jax.unstack(tiny_model(num_layers=2))
    unstacked.blocks[1].mlp.up_proj.kernel_lora_a = nnx.LoRAParam(jnp.zeros((2, 2)))
    unstacked.blocks[0].mlp.up_proj.kernel = nnx.Param(jnp.zeros(3))
    with pytest.raises(ValueError, match=r"blocks\.1\.mlp\.up_proj\.kernel_lora_a is unknown"):
        nha_jax.stack(unstacked)
    with pytest.raises(ValueError, match=r"blocks\.0\.mlp\.up_proj\.kernel is float32\[3\], not"):
        nha_jax.stack(unstacked)
