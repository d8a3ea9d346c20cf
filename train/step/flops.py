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
    an adapter adds three products with each of its factors, and distillation the teacher's forward.
    """
    model, length = config.model, config.data.sequence_length
    trained = Trainable.of(config).names
    spared = sum(2 * n for name, n in multiplied_weights(model).items() if name not in trained)
    teacher = teacher_config(config)
    further = 0.0 if teacher is None else nha_jax.flops_per_token(teacher, length)
    if config.adapter is not None:
        factors = factor_shapes(model, config.adapter).values()
        further += 3.0 * sum(2 * math.prod(factor.shape) for factor in factors)
    return nha_jax.training_flops_per_token(model, length) - spared + further
