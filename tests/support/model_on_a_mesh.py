"""A program: the forward of a model whose parameters eight devices share, against that of one."""

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from nha_jax import Model
from nha_jax.sharding import named_shardings
from tests.nha_jax.test_model import random_tokens, tiny_config

RULES = dict.fromkeys(("heads", "kv_heads", "mlp", "vocab"), ("model",)) | {"embed": ("data",)}


def main() -> None:
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    config = tiny_config(num_layers=2, window_size=4, implementation="reference")
    tokens = random_tokens(4, 12)
    forward = jax.jit(Model.__call__)
    wanted = jax.device_get(forward(Model(config, rngs=nnx.Rngs(0)), tokens))

    with jax.set_mesh(mesh):
        model = Model(config, rngs=nnx.Rngs(0))
        shardings = named_shardings(model, mesh, RULES)
        nnx.update(model, jax.device_put(nnx.state(model), shardings))
        kernel = model.blocks.attention.q_proj.kernel[...]
        assert kernel.sharding.spec == PartitionSpec(None, ("data",), ("model",)), kernel.sharding
        tokens = jax.device_put(tokens, NamedSharding(mesh, PartitionSpec("data")))
        found = jax.device_get(forward(model, tokens))
    np.testing.assert_allclose(found, wanted, atol=1e-5, rtol=1e-4)
