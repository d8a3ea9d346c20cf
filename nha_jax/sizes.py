"""How large a model of a config is: the shapes and number of its parameters, its FLOPs a token.

Everything is counted on abstract shapes; no parameter is ever computed.
"""

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
    return {jax.tree_util.keystr(keys, simple=True, separator="."): leaf for keys, leaf in leaves}


@functools.lru_cache(maxsize=128)
def abstract_parameters(config: ModelConfig) -> Shapes:
    """Returns shape and dtype of every parameter of a config's model, remembered by config."""
    _, state = abstract_model(config)
    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in by_name(state).items()}
    return MappingProxyType(shapes)


def num_parameters(config: ModelConfig) -> int:
    """Counts the parameters of a model of this config."""
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


def flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """Counts the floating-point operations of a forward pass, for each token.

    Counted are:

    - 2 operations for each weight that a token is multiplied with: projections, SwiGLU (of
      experts, those that the token goes to), short convolution and head;
    - the logits and the weighted sum over the keys that a token sees in its window: min(t + 1,
      W) at token t; with full attention (T + 1) / 2 on average;
    - once a token has left the window: reading the slots, for each query head, and updating
      them, 3 operations an entry for each key/value head.

    This is the work of the recurrence, the same for every implementation; a chunked one does
    more, to use matrix units. Norms, activations, softmax and rotation are not counted.

    Args:
        config: of the model.
        sequence_length: tokens of a sequence (T).

    Returns:
        Operations a token, averaged over the sequence.

    Raises:
        ValueError: sequence_length is not a positive integer.
    """
    if (
        isinstance(sequence_length, bool)
        or not isinstance(sequence_length, int)
        or sequence_length < 1
    ):
        raise ValueError(f"sequence_length={sequence_length!r} must be an integer of at least 1")
    total = 2.0 * sum(multiplied_weights(config).values())
    entry = config.key_dim + config.value_dim
    for window in config.windows:
        window = sequence_length if window is None else min(window, sequence_length)
        past_window = sequence_length - window
        visible_keys = (window * (window + 1) / 2 + past_window * window) / sequence_length
        total += 2 * config.num_query_heads * entry * visible_keys
        # All tokens but the first W find something in the slots.
        slot_work = (
            (2 * config.num_query_heads + 3 * config.num_kv_heads) * entry * config.num_slots
        )
        total += slot_work * past_window / sequence_length
    return total


def training_flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """Counts forward and backward: three times `flops_per_token`, without recomputation."""
    return 3 * flops_per_token(config, sequence_length)
