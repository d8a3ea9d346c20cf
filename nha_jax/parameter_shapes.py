"""The shapes, dtypes and counts of a model's parameters, by name; no number is ever computed."""

import functools
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
from flax import nnx

from nha_jax.config import ModelConfig
from nha_jax.model import abstract_model

Shapes = Mapping[str, jax.ShapeDtypeStruct]
"""Shape and dtype of each parameter, by its dotted name: `blocks.attention.q_proj.kernel`."""


def by_name(state: Any) -> dict[str, Any]:
    """Lists the leaves of an nnx state, or of a tree like it, by dotted name."""
    leaves, _ = jax.tree.flatten_with_path(nnx.to_pure_dict(state))
    return {".".join(str(entry.key) for entry in keys): leaf for keys, leaf in leaves}


@functools.lru_cache(maxsize=128)
def abstract_parameters(config: ModelConfig) -> Shapes:
    """Shape and dtype of every parameter that a model of this config has, remembered by config."""
    _, state = abstract_model(config)
    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in by_name(state).items()}
    return MappingProxyType(shapes)


def num_parameters(config: ModelConfig) -> int:
    """Counts the numbers that a model of this config learns."""
    return sum(math.prod(x.shape) for x in abstract_parameters(config).values())


def multiplied_weights(config: ModelConfig) -> dict[str, int]:
    """Counts, by parameter, the weights that one token is multiplied with in a forward pass.

    These are the kernels of projections, router, SwiGLU and convolution, and the head (with tied
    embeddings, the embedding table); of an expert layer, the kernels of the experts that a token
    goes to. Norms, biases and the lookup of the embedding multiply no matrix and are left out.
    """
    head = "embed.embedding" if config.tie_embeddings else "head.kernel"
    counts = {
        name: math.prod(x.shape)
        for name, x in abstract_parameters(config).items()
        if name.endswith(".kernel") or name == head
    }
    if config.experts is not None:
        for part in ("gate", "up", "down"):
            name = f"blocks.mlp.{part}_proj.kernel"
            counts[name] = counts[name] * config.experts.per_token // config.experts.count
    return counts
