"""A program: the forward of a model whose parameters eight devices share, against that of one."""

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from nha_jax import Model
from tests.nha_jax.test_model import random_tokens, tiny_config

RULES = {"heads": "model", "kv_heads": "model", "mlp": "model", "vocab": "model", "embed": "data"}


def main() -> None:
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    config = tiny_config(num_layers=2, window_size=4, implementation="reference")
    tokens = random_tokens(4, 12)
    forward = jax.jit(Model.__call__)
    wanted = jax.device_get(forward(Model(config, rngs=nnx.Rngs(0)), tokens))

    def place(parameter: nnx.Variable) -> nnx.Variable:
        names = parameter.get_metadata()["out_sharding"]
        sharding = NamedSharding(mesh, PartitionSpec(*map(RULES.get, names)))
        return parameter.replace(jax.device_put(parameter[...], sharding))

    with jax.set_mesh(mesh):
        model = Model(config, rngs=nnx.Rngs(0))
        state = jax.tree.map(place, nnx.state(model), is_leaf=lambda x: isinstance(x, nnx.Variable))
        nnx.update(model, state)
        kernel = model.blocks.attention.q_proj.kernel[...]
        assert kernel.sharding.spec == PartitionSpec(None, "data", "model"), kernel.sharding
        tokens = jax.device_put(tokens, NamedSharding(mesh, PartitionSpec("data")))
        found = jax.device_get(forward(model, tokens))
    np.testing.assert_allclose(found, wanted, atol=1e-5, rtol=1e-4)
