"""The arithmetic of a run's updates, with frozen parameters and a teacher taken into account."""

import math

import nha_jax
from nha_jax.adapters import factor_shapes
from nha_jax.sizes import multiplied_weights
from train.config import TrainConfig
from train.step.trainable import Trainable
from train.storage.initial_model import teacher_config


def training_flops_per_token(config: TrainConfig) -> float:
    """Counts the floating-point operations of one update per token, recomputation left out.

    Forward and backward are three times the forward, less the gradients of the frozen matrices;
    an adapter adds three products with each of its factors, a teacher its forward, and attention
    transfer the attention's way beside it.
    """
    model, length = config.model, config.data.sequence_length
    trained = Trainable.of(config).names
    weights = multiplied_weights(model)
    spared = {name: 2 * n for name, n in weights.items() if name not in trained}
    flops, teacher = 0.0, teacher_config(config)
    if config.loss.reads_outputs:
        flops += nha_jax.training_flops_per_token(model, length) - sum(spared.values())
    if config.loss.attention_transfer:
        others = [name for name in weights if not name.startswith("blocks.attention.")]
        forward = nha_jax.flops_per_token(model, length) - sum(2 * weights[x] for x in others)
        flops += 3 * forward - sum(n for name, n in spared.items() if name not in others)
    if teacher is not None:
        flops += nha_jax.flops_per_token(teacher, length)
    if config.adapter is not None:
        factors = factor_shapes(model, config.adapter).values()
        flops += 3.0 * sum(2 * math.prod(factor.shape) for factor in factors)
    return flops
