"""Adapters: they begin as nothing, compute their equation, and merge into a plain model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import nha_jax
from nha_jax.adapters import (
    FACTORS,
    adapter_of,
    factor_shapes,
    quantize_projections,
    targets_of,
)
from nha_jax.config_parts import Adapter
from nha_jax.layers.parameters import logical_axes
from nha_jax.layers.projection import linear, projections
from nha_jax.muon import muon_dimension_numbers
from nha_jax.sharding import RULES
from nha_jax.sizes import abstract_parameters, by_name
from tests.nha_jax.test_model import random_tokens, tiny_config, tiny_model

EVERYWHERE = Adapter(rank=3, alpha=4.0, targets=("*",))


def adapted_model(model: nha_jax.Model, adapter: Adapter = EVERYWHERE) -> nha_jax.Model:
    """A model with an adapter whose update is not 0."""
    adapted = nha_jax.add_adapter(model, adapter, rngs=nnx.Rngs(1))
    set_factors(adapted)
    return adapted


def set_factors(adapted: nha_jax.Model) -> None:
    """Gives the factors that begin as 0 other numbers."""
    generator = np.random.default_rng(2)
    for projection in projections(adapted).values():
        if projection.lora_b is not None:
            shape = projection.lora_b.shape
            dtype = projection.lora_b.dtype
            projection.lora_b[...] = jnp.asarray(generator.normal(size=shape) / 10, dtype)


def tiny_and_adapted(dtype="float32"):
    """A model of one layer, and the same with an adapter that has learned nothing yet."""
    model = tiny_model(num_layers=1, window_size=4, dtype=dtype, implementation="reference")
    return model, nha_jax.add_adapter(model, EVERYWHERE, rngs=nnx.Rngs(1))


@pytest.fixture(scope="module")
def plain():
    """A model without an adapter, which tests only read."""
    return tiny_and_adapted()[0]


def assert_same_bits(x, y):
    x, y = (np.asarray(array).view(np.uint32) for array in (x, y))
    np.testing.assert_array_equal(x, y)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_compiled_to_run_fast_it_changes_no_bit_at_first(dtype, optimized):
    model, adapted = tiny_and_adapted(dtype)
    tokens = random_tokens(2, 6)
    assert_same_bits(adapted(tokens), model(tokens))


def test_it_begins_as_nothing_and_merged_it_computes_the_same(plain):
    model, adapted = plain, nha_jax.add_adapter(plain, EVERYWHERE, rngs=nnx.Rngs(1))
    tokens = random_tokens(2, 6)
    before = model(tokens)
    assert_same_bits(adapted(tokens), before)
    set_factors(adapted)
    found = np.asarray(adapted(tokens))
    assert np.abs(found - before).max() > 0.1
    merged = nha_jax.merge_adapter(adapted)
    np.testing.assert_allclose(merged(tokens), found, rtol=0, atol=1e-5)
    assert nnx.graphdef(merged) == nnx.graphdef(model)
    assert adapter_of(merged) is None


@pytest.mark.slow
def test_merged_it_computes_the_same_with_any_windows():
    adapted = adapted_model(tiny_model(num_layers=2)).with_windows((2, None))
    assert adapted.config.window_size == (2, None)
    assert adapter_of(adapted) is not None
    tokens = random_tokens(2, 9)
    merged = nha_jax.merge_adapter(adapted)
    np.testing.assert_allclose(merged(tokens), adapted(tokens), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_it_generates_as_merged():
    adapted = adapted_model(tiny_model(num_layers=2, window_size=(4, None)))
    prompts = jnp.array([[1, 2, 3], [4, 5, 6]])
    found, expected = (
        nha_jax.generate(model, prompts, max_new_tokens=8, temperature=0)
        for model in (adapted, nha_jax.merge_adapter(adapted))
    )
    np.testing.assert_array_equal(found, expected)


def projection_of(use_bias: bool):
    return linear(tiny_config(), 6, 5, ("embed", "mlp"), rngs=nnx.Rngs(0), use_bias=use_bias)


@pytest.mark.parametrize("use_bias", [True, False])
def test_a_projection_computes_its_equation(use_bias):
    projection = projection_of(use_bias)
    projection.add_factors(2, 5.0, jax.random.key(3))
    assert np.abs(projection.lora_a[...]).max() <= 6**-0.5
    assert not np.any(projection.lora_b[...])
    generator = np.random.default_rng(0)
    for parameter in (projection.lora_b, projection.bias) if use_bias else (projection.lora_b,):
        parameter[...] = jnp.asarray(generator.normal(size=parameter.shape), jnp.float32)
    x = generator.normal(size=(3, 6)).astype(np.float32)
    kernel, a, b = (
        np.asarray(parameter[...], np.float64)
        for parameter in (projection.kernel, projection.lora_a, projection.lora_b)
    )
    bias = np.asarray(projection.bias[...], np.float64) if use_bias else 0
    expected = x @ kernel + bias + 5.0 / 2 * (x @ a) @ b
    np.testing.assert_allclose(projection(jnp.asarray(x)), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("use_bias", [True, False])
def test_a_kernel_of_8_bits_is_near_and_computes_what_it_holds(use_bias):
    projection = projection_of(use_bias)
    whole = np.asarray(projection.kernel[...]).copy()
    whole[:, 1] = 0
    projection.kernel[...] = jnp.asarray(whole)
    projection.quantize()
    assert projection.kernel.dtype == jnp.int8
    scale = np.asarray(projection.kernel_scale[...], np.float32)
    np.testing.assert_allclose(scale[[0, 2]], np.abs(whole).max(0)[[0, 2]] / 127, rtol=2**-8)
    held = np.asarray(projection.kernel[...], np.float32) * scale
    assert np.all(np.abs(held - whole) <= scale * 0.75)  # half a step, and the scale's own rounding
    assert not held[:, 1].any()
    x = np.random.default_rng(0).normal(size=(3, 6)).astype(np.float32)
    found = np.asarray(projection(jnp.asarray(x)))
    bias = 0 if projection.bias is None else np.asarray(projection.bias[...])
    np.testing.assert_allclose(found, x @ held + bias, rtol=1e-5, atol=1e-6)
    projection.merge("float32")
    np.testing.assert_array_equal(projection.kernel[...], held)
    assert projection.is_plain


@pytest.mark.slow
def test_an_adapter_beside_kernels_of_8_bits_merges_too():
    model = tiny_model(window_size=(4, None), num_layers=2)
    quantized = quantize_projections(model, [*projections(model)])
    tokens = random_tokens(2, 9)
    assert 1e-3 < np.abs(quantized(tokens) - model(tokens)).max() < 0.3
    adapted = adapted_model(quantized)
    merged = nha_jax.merge_adapter(adapted)
    np.testing.assert_allclose(merged(tokens), adapted(tokens), rtol=0, atol=1e-5)


def test_factors_are_stacked_and_name_their_axes(plain):
    quantized = quantize_projections(plain, ["head"])
    adapted = nha_jax.add_adapter(quantized, EVERYWHERE, rngs=nnx.Rngs(0))
    factors = nnx.state(adapted, nnx.LoRAParam)
    shapes = {name: (x.shape, x.dtype) for name, x in by_name(factors).items()}
    expected = factor_shapes(plain.config, EVERYWHERE)
    assert shapes == {name: (x.shape, x.dtype) for name, x in expected.items()}
    assert shapes["blocks.attention.q_proj.lora_a"] == ((1, 16, 3), jnp.float32)
    attention, head = adapted.blocks.attention, adapted.head
    assert logical_axes(attention.o_proj.lora_a) == ("layers", "heads", "rank")
    assert logical_axes(attention.o_proj.lora_b) == ("layers", "rank", "embed")
    assert logical_axes(head.lora_b) == ("rank", "vocab")
    assert logical_axes(head.kernel_scale) == ("vocab",)
    assert RULES["rank"] == ()
    numbers = muon_dimension_numbers(factors)
    assert numbers["blocks"]["attention"]["q_proj"]["lora_a"].reduction_axis == 1
    assert numbers["head"]["lora_a"] is None


def test_parameters_are_shared_and_the_model_stays_plain(plain):
    adapted = nha_jax.add_adapter(plain, Adapter(rank=2), rngs=nnx.Rngs(0))
    assert adapter_of(plain) is None
    targets = tuple(f"blocks.attention.{x}_proj" for x in "koqv")
    assert adapter_of(adapted) == Adapter(rank=2, targets=targets)
    before, after = by_name(nnx.state(plain)), by_name(nnx.state(adapted))
    assert all(after[name] is array for name, array in before.items())
    assert {name.rpartition(".")[2] for name in after.keys() - before.keys()} == set(FACTORS)
    assert before.keys() == abstract_parameters(plain.config).keys()


EXPERTS = {"experts": {"count": 4, "per_token": 2, "size": 8}}


@pytest.mark.parametrize(
    ("fields", "model", "message"),
    [
        ({"rank": 0}, {}, "rank=0 must be an integer of at least 1"),
        ({"rank": 2, "alpha": 0}, {}, "alpha=0 must be a finite number above 0"),
        ({"rank": 2, "targets": ()}, {}, r"targets=\(\) must be a pattern at least"),
        ({"rank": 2, "targets": ("*.ffn",)}, {}, r"targets='\*.ffn' matches no projection; .*head"),
        ({"rank": 2, "targets": ("*",)}, EXPERTS, "matches blocks.mlp.down_proj, the kernels of"),
        ({"rank": 13}, {}, r"rank=13 is above the smaller .*attention.v_proj's kernel, 16 x 12"),
    ],
    ids=["rank", "alpha", "no targets", "no projection", "experts", "large rank"],
)
def test_what_fits_no_model_is_named(fields, model, message):
    with pytest.raises(ValueError, match=message):
        targets_of(tiny_config(**model), Adapter(**fields))


def test_a_second_adapter_and_taking_layers_apart_need_a_merge(plain):
    adapted = nha_jax.add_adapter(plain, Adapter(rank=2), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"merge it first, with merge_adapter\(model\)"):
        nha_jax.add_adapter(adapted, Adapter(rank=2), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"merge it first, with nha_jax.merge_adapter\(model\)"):
        nha_jax.unstack(adapted)
