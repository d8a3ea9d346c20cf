"""What a run's updates take: of a model of which a part is trained, and of one to learn from."""

from nha_jax.parameter_shapes import multiplied_weights
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
    spared = sum(2 * n for name, n in multiplied_weights(model).items() if name not in trained)
    original = model_to_learn_from(config)
    further = 0.0 if original is None else original.flops_per_token(length)
    return model.training_flops_per_token(length) - spared + further
