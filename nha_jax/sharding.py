"""How a model is divided over a mesh: its parameters, by the names of their axes, and its results.

The functions `..._specs` are for `nha_jax.ops.mesh.explicit.with_auto_axes`.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from nha_jax.cache import ModelCache, cache_specs
from nha_jax.layers.diagnostics import Diagnostics
from nha_jax.layers.parameters import logical_axes
from nha_jax.ops.mesh.division import tokens_spec

# Every matrix of the model has one "embed" axis, so dividing that one divides them all. Devices
# that share a sequence need the parameters no more than those that share a batch do.
RULES: Mapping[str, tuple[str, ...]] = {
    "layers": (),
    "vocab": ("tensor",),
    "embed": ("fsdp", "context"),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "experts": (),
    "rank": (),
    "conv": (),
    "norm": (),
}
"""Logical axis of a parameter (`nha_jax.layers.LOGICAL_AXES`) -> the mesh axes that divide it."""


def named_shardings(
    model: Any, mesh: Mesh | AbstractMesh, rules: Mapping[str, tuple[str, ...]] = RULES
) -> Any:
    """Gives each parameter of a model a sharding, by the names of its axes.

    Two lines divide a model over a mesh:

        shardings = named_shardings(model, mesh)
        nnx.update(model, jax.device_put(nnx.state(model), shardings))

    Args:
        model: a `Model` or another nnx module, an `nnx.Optimizer` of one, or the nnx state of
            these; its arrays may be abstract.
        mesh: the devices. Axes of the rules that it lacks divide nothing.
        rules: logical axis -> the mesh axes that divide it; a name that is not there is of an axis
            that stays whole.

    Returns:
        `nnx.state(model)`, or the state given, with a `NamedSharding` in place of each variable.
        Variables without names (counters, say) are whole on every device, and so is an axis that
        the devices of its rule do not divide evenly (a vocabulary of 257).
    """

    def axis(name: str | None, length: int) -> tuple[str, ...] | None:
        rule = tuple(x for x in rules.get(name or "", ()) if x in mesh.shape)
        return None if length % math.prod(mesh.shape[x] for x in rule) else rule or None

    def sharding(variable: nnx.Variable) -> NamedSharding:
        names = logical_axes(variable)
        parts = map(axis, names, variable.shape[: len(names)])
        return NamedSharding(mesh, PartitionSpec(*parts))

    state = nnx.state(model) if isinstance(model, nnx.Pytree) else model
    return jax.tree.map(sharding, state, is_leaf=lambda node: isinstance(node, nnx.Variable))


def hidden_specs(hidden: jax.Array, *_: Any, **__: Any) -> Any:
    """Says how [B, T, hidden_size] is divided over the mesh in force."""
    return tokens_spec(hidden)


def logits_specs(logits: jax.Array, *_: Any, **__: Any) -> Any:
    """Says how [B, T, vocab_size], or [B, vocab_size], is divided over the mesh in force."""
    return tokens_spec(logits, heads=logits.shape[-1])


def diagnostics_specs(seen: Diagnostics, model: Any, *_: Any, **__: Any) -> Any:
    """Says how the fields of the model's diagnostics are divided over the mesh in force."""
    one_layer = tokens_spec(seen.log_decay[0], heads=model.config.num_kv_heads)
    of_layers: Any = PartitionSpec(None, *one_layer)
    return Diagnostics(tokens_spec(seen.hidden), of_layers, of_layers)


def model_cache_specs(cache: ModelCache, model: Any, *_: Any, **__: Any) -> ModelCache:
    """Says how the model's cache is divided over the mesh in force."""
    return cache_specs(cache, model.config.num_kv_heads)


def step_specs(result: tuple[jax.Array, ModelCache], model: Any, *_: Any, **__: Any) -> Any:
    """Says the same of what prefill and decode steps return: logits and cache."""
    logits, cache = result
    return logits_specs(logits), model_cache_specs(cache, model)


def scored_specs(
    result: tuple[jax.Array, jax.Array, ModelCache], model: Any, *_: Any, **__: Any
) -> Any:
    """Says the same of what `score_tokens` returns: log-probabilities, what is likeliest, cache."""
    log_probability, greedy, cache = result
    return tokens_spec(log_probability), tokens_spec(greedy), model_cache_specs(cache, model)
