"""A program: on a mesh as `jax.make_mesh` makes it, whose axes are explicit, all is as on a device.

`main` takes the name of a check of CHECKS, and what it checks: the name of an implementation.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nha_jax import Model, NHAttention, nha_attention
from nha_jax.ops import rope_tables
from nha_jax.sharding import RULES, named_shardings
from tests.nha_jax.test_model import random_tokens, tiny_config


def _mesh() -> Mesh:
    return jax.make_mesh((4, 2), ("data", "tensor"))


def _close(found: object, wanted: object) -> None:
    found, wanted = jax.tree.map(np.asarray, (found, wanted))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5, rtol=1e-4), found, wanted)


def check_operator(implementation: str | None) -> None:
    rng = np.random.default_rng(0)
    sizes = (4, 8), (2, 8), (2, 8)
    arrays = [rng.standard_normal((4, 12, *size)).astype(np.float32) for size in sizes]
    arrays.append(-np.abs(rng.standard_normal((4, 12, 2, 4))).astype(np.float32))

    def loss(*arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
        rope = rope_tables(jnp.arange(12), 8)
        out = nha_attention(*arrays, window_size=4, rope=rope, implementation=implementation)
        return jnp.sin(out).sum(), out

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True))
    wanted = gradient(*arrays)
    mesh = _mesh()
    rows = NamedSharding(mesh, PartitionSpec("data"))
    with jax.set_mesh(mesh):
        found = gradient(*(jax.device_put(x, rows) for x in arrays))
        assert jax.typeof(found[1]).sharding.spec == PartitionSpec("data", None, "tensor", None)
    _close(found, wanted)


def _models(implementation: str | None) -> tuple[Model, Model, Mesh]:
    """A model on one device, and the same divided over a mesh."""
    config = tiny_config(num_layers=1, window_size=4, implementation=implementation)
    model, mesh = Model(config, rngs=nnx.Rngs(0)), _mesh()
    shardings = named_shardings(model, mesh, RULES | {"embed": ("data",)})
    graph, state = nnx.split(model)
    return model, nnx.merge(graph, jax.device_put(state, shardings)), mesh


def check_model(implementation: str | None) -> None:
    alone, divided, mesh = _models(implementation)
    tokens = random_tokens(4, 12)
    forward = jax.jit(Model.__call__)
    wanted = forward(alone, tokens)
    placed = jax.device_put(tokens, NamedSharding(mesh, PartitionSpec("data")))
    found = forward(divided, placed)  # the mesh is that of the arrays
    assert jax.typeof(found).sharding.spec == PartitionSpec("data", None, "tensor")
    _close(found, wanted)


def check_gradient(implementation: str | None) -> None:
    alone, divided, mesh = _models(implementation)
    tokens = np.asarray(random_tokens(4, 12))
    gradient = jax.jit(jax.grad(lambda model, tokens: jnp.sin(model(tokens)).sum()))
    wanted = gradient(alone, tokens)
    with jax.set_mesh(mesh):
        found = gradient(divided, tokens)
    _close(found, wanted)


def check_doors(implementation: str | None) -> None:
    """Every method of the model has results of the types that it should; traced only."""
    _, model, mesh = _models(implementation)
    tokens = random_tokens(4, 12)

    def doors(model: Model, tokens: jax.Array) -> Any:
        seen = model.diagnose(tokens)
        hidden = model.embed_tokens(tokens)
        hidden = model.apply_layer(0, hidden, 4)
        first, cache = model.prefill(tokens, lengths=np.array([12, 3, 1, 1]))
        second, cache = model.decode_step(tokens[:, 0], cache, active=np.ones(4, bool))
        return {
            "seen": seen,
            "hidden": hidden,
            "logits": model.logits(model.hidden_states(tokens)),
            "row": model.logits(hidden[:, 0]),
            "token": model.logits(jnp.zeros(16)),
            "steps": (first, second),
            "caches": (model.init_cache(4), cache),
        }

    with jax.set_mesh(mesh):
        found = jax.eval_shape(doors, model, tokens)
    specs = jax.tree.map(lambda x: tuple(x.sharding.spec), found)
    assert specs["seen"].hidden == specs["hidden"] == ("data", None, None), specs
    assert specs["seen"].slot_weight == (None, "data", None, "tensor")
    assert specs["seen"].log_decay == (None, "data", None, "tensor", None)
    assert specs["logits"] == ("data", None, "tensor")
    assert specs["row"] == specs["steps"][0] == specs["steps"][1] == ("data", "tensor")
    assert specs["token"] == (None,)
    assert specs["caches"][0] == specs["caches"][1]
    state = specs["caches"][1].layers[0].attention
    assert state.slot_key == ("data", "tensor", None, None)
    assert state.window_value == ("data", None, "tensor", None)
    assert state.length == ("data",)


def check_layer(implementation: str | None) -> None:
    """A layer by itself has results of the types that it should; traced only."""
    layer = NHAttention(16, 2, num_slots=4, implementation=implementation, rngs=nnx.Rngs(0))
    inputs, mesh = jnp.ones((4, 12, 16)), _mesh()

    def doors(layer: NHAttention, inputs: jax.Array) -> Any:
        return {
            "call": layer(inputs),
            "diagnose": layer.diagnose(inputs)[1],
            "prefill": layer.prefill(inputs),
            "decode": layer.decode_step(inputs[:, :1], layer.init_cache(4)),
        }

    with jax.set_mesh(mesh):
        found = jax.eval_shape(doors, layer, inputs)
    specs = jax.tree.map(lambda x: tuple(x.sharding.spec), found)
    assert specs["call"] == specs["prefill"][0] == specs["decode"][0] == ("data", None, None)
    assert specs["diagnose"].slot_weight == ("data", None, "tensor")
    assert specs["prefill"][1] == specs["decode"][1]
    assert specs["decode"][1].attention.slot_key == ("data", "tensor", None, None)
    assert specs["decode"][1].convolution.key == ("data", None, "tensor")


CHECKS = {
    "doors": check_doors,
    "operator": check_operator,
    "model": check_model,
    "gradient": check_gradient,
    "layer": check_layer,
}


def main(check: str, implementation: str) -> None:
    CHECKS[check](None if implementation == "None" else implementation)
