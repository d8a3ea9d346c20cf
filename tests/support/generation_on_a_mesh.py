"""A program: texts and scores of a batch divided over eight devices are those of one device."""

import jax
import numpy as np
from jax.sharding import AxisType, PartitionSpec

from nha_jax import Engine, generate, score
from tests.nha_jax.generation.test_engine import tiny_model


def main() -> None:
    model = tiny_model(num_kv_heads=2, conv_width=4)
    prompt = np.random.default_rng(0).integers(0, 24, (4, 9))
    wanted = generate(model, prompt, max_new_tokens=20, seed=1)
    texts, answers = list(prompt), [row[: 2 + n] for n, row in enumerate(prompt[:, ::-1])]
    scores = score(model, texts, answers, batch_size=4, chunk=8)
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        cache = Engine(model, batch_size=4, max_length=64)._state.cache
        for layer in cache.layers:
            assert layer.attention.slot_key.sharding.spec == PartitionSpec("data", "tensor")
            ring = layer.attention.window_value.sharding.spec
            assert ring == PartitionSpec("data", None, "tensor"), ring
        found = generate(model, prompt, max_new_tokens=20, seed=1)
        on_the_mesh = score(model, texts, answers, batch_size=4, chunk=8)
    np.testing.assert_array_equal(found, wanted)
    for one, same in zip(scores, on_the_mesh, strict=True):
        np.testing.assert_allclose(same.log_probabilities, one.log_probabilities, atol=1e-5)
        np.testing.assert_array_equal(same.greedy, one.greedy)
    with jax.set_mesh(jax.make_mesh((4, 2), ("data", "tensor"))):  # of explicit axes
        found = generate(model, prompt, max_new_tokens=20, seed=1)
    np.testing.assert_array_equal(found, wanted)
