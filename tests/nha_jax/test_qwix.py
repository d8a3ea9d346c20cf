"""LoRA and quantized weights by qwix, on a model with unstacked layers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import nha_jax
from tests.nha_jax.test_model import random_tokens, tiny_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:qwix"),  # of flax's own names
]

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "f_proj", "o_proj")
RANK, ALPHA = 3, 6.0


@pytest.fixture(scope="module")
def qwix():
    return pytest.importorskip("qwix")


@pytest.fixture(scope="module")
def model() -> nha_jax.Model:
    return tiny_model(num_layers=2, window_size=(4, None), dtype="float32", remat="none")


def test_lora_is_trained_merged_and_stacked(qwix, model):
    tokens = random_tokens(2, 12)
    expected = model(tokens)
    provider = qwix.LoraProvider(module_path=".*_proj", rank=RANK, alpha=ALPHA)
    unstacked = nha_jax.unstack(model)
    lora = qwix.apply_lora_to_model(unstacked, provider, tokens, rngs=nnx.Rngs(1))
    np.testing.assert_allclose(lora(tokens), expected, rtol=0, atol=2e-6)  # it starts as nothing
    for block in lora.blocks:
        layers = [getattr(block.attention, name) for name in PROJECTIONS]
        for layer in (*layers, block.mlp.gate_proj, block.mlp.up_proj, block.mlp.down_proj):
            assert layer.kernel_lora_a.shape == (layer.kernel.shape[0], RANK)
            assert layer.kernel_lora_b.shape == (RANK, layer.kernel.shape[1])

    def loss(lora):
        logits = lora(tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    optimizer = nnx.Optimizer(lora, optax.adam(1e-2), wrt=nnx.LoRAParam)
    gradient = nnx.jit(nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam)))
    losses = []
    for _ in range(8):
        value, gradients = gradient(lora)
        optimizer.update(lora, gradients)
        losses.append(float(value))
    assert losses[-1] < losses[0] - 0.05
    kernel = lora.blocks[0].attention.q_proj.kernel
    np.testing.assert_array_equal(kernel, model.blocks.attention.q_proj.kernel[0])

    trained = lora(tokens)
    for _, module in nnx.iter_modules(lora):
        if hasattr(module, "kernel_lora_a"):
            update = module.kernel_lora_a[...] @ module.kernel_lora_b[...]
            module.kernel[...] += ALPHA / RANK * update
            del module.kernel_lora_a, module.kernel_lora_b
    merged = nha_jax.stack(lora)
    assert float(jnp.abs(trained - expected).max()) > 0.01
    np.testing.assert_allclose(merged(tokens), trained, rtol=0, atol=2e-5)
    assert nha_jax.generate(merged, tokens, max_new_tokens=2).shape == (2, 2)


def test_weights_of_eight_bits_are_nearly_the_model(qwix, model):
    tokens = random_tokens(2, 12)
    rule = qwix.QuantizationRule(module_path=".*_proj", weight_qtype="int8")
    unstacked = nha_jax.unstack(model)
    quantized = qwix.quantize_model(unstacked, qwix.PtqProvider([rule]), tokens)
    for block in quantized.blocks:
        for layer in (block.attention.q_proj, block.attention.f_proj, block.mlp.down_proj):
            assert layer.kernel.array.qvalue.dtype == jnp.int8
    expected = model(tokens)
    error = jnp.linalg.norm(quantized(tokens) - expected) / jnp.linalg.norm(expected)
    assert 0 < float(error) < 0.02
    size = lambda model: sum(x.nbytes for x in jax.tree.leaves(nnx.state(model.blocks)))  # noqa: E731
    assert size(quantized) < 0.5 * size(unstacked)
    with pytest.raises(ValueError, match=r"blocks\.0\.attention\.q_proj\.kernel.* is unknown"):
        nha_jax.stack(quantized)
