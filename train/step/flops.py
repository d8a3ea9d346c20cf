"""What a run's updates take: of a model of which a part is trained, and of one to learn from."""

import math

from nha_jax import ModelConfig
from nha_jax.storage.weights import abstract_parameters
from train.config import TrainConfig
from train.step.trainable import Trainable
from train.storage.initial_model import model_to_learn_from


def training_flops_per_token(config: TrainConfig) -> float:
    """Floating-point operations a token of one update; recomputation is not counted.

    Forward and backward are three times the forward, less the gradients of the frozen matrices;
    distillation adds the forward of the model to learn from.
    """
    model, length = config.model, config.data.sequence_length
    trained = Trainable.match(config.trainable, model).names
    spared = sum(2 * entries for name, entries in _multiplied(model).items() if name not in trained)
    original = model_to_learn_from(config)
    further = 0.0 if original is None else original.flops_per_token(length)
    return model.training_flops_per_token(length) - spared + further


def _multiplied(model: ModelConfig) -> dict[str, float]:
    """The entries of each parameter that a token is multiplied with."""
    entries = {name: math.prod(x.shape) for name, x in abstract_parameters(model).items()}
    head = "embed.embedding" if model.tie_embeddings else "head.kernel"
    counted: dict[str, float] = {
        name: size for name, size in entries.items() if name.endswith("kernel") or name == head
    }
    if model.experts is not None:
        for name in ("gate", "up", "down"):
            share = model.experts.per_token / model.experts.count
            counted[f"blocks.mlp.{name}_proj.kernel"] *= share
    return counted
