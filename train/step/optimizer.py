"""The optimizer and its learning rate."""

from typing import Any

import jax
import optax
from flax import nnx

from nha_jax.layers.parameters import logical_axes
from train.config import OptimizerConfig


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Makes the schedule, step -> learning rate: a linear warm-up from 0 to the peak, then a decay.

    Step n is the update that n others went before. With warmup_stable_decay a checkpoint from
    before the decay goes on under more `steps` with the rates it would have had anyway; the other
    schedules stretch.

    Args:
        config: the peak, the shape and the end.
        steps: updates of the whole run.
    """
    peak, final = config.learning_rate, config.learning_rate * config.final_fraction
    decay_steps = max(steps - config.warmup_steps, 1)
    # The first update is step 0: starting at 1/warmup rather than 0 makes it count.
    warmup_steps = max(config.warmup_steps, 1)
    warmup = optax.linear_schedule(peak / warmup_steps, peak, max(warmup_steps - 1, 1))
    match config.schedule:
        case "cosine":
            decay = optax.cosine_decay_schedule(peak, decay_steps, config.final_fraction)
        case "linear":
            decay = optax.linear_schedule(peak, final, decay_steps)
        case "constant":
            decay = optax.constant_schedule(peak)
        case "warmup_stable_decay":
            length = round(config.decay_fraction * steps)
            stable = max(steps - length - config.warmup_steps, 0)
            decay = optax.linear_schedule(
                peak, final, min(length, decay_steps), transition_begin=stable
            )
    return optax.join_schedules([warmup, decay], [config.warmup_steps])


def make_optimizer(
    config: OptimizerConfig, learning_rate: optax.Schedule, parameters: Any
) -> optax.GradientTransformation:
    """Makes AdamW behind clipping by the global norm.

    Args:
        config: their numbers.
        learning_rate: step -> learning rate.
        parameters: nnx state whose variables name their axes; which of them decay is decided
            here, as the optimizer itself sees bare arrays.
    """
    variables = jax.tree.leaves(parameters, is_leaf=lambda node: isinstance(node, nnx.Variable))
    decayed = [_is_matrix(variable) for variable in variables]
    adamw = optax.adamw(
        learning_rate,
        config.beta1,
        config.beta2,
        config.epsilon,
        weight_decay=config.weight_decay,
        mask=lambda tree: jax.tree.unflatten(jax.tree.structure(tree), decayed),
    )
    if config.clip_norm is None:
        return adamw
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)


def _is_matrix(variable: nnx.Variable) -> bool:
    """Whether one layer's parameter has two axes or more, the stack of layers not counted."""
    return variable.ndim - logical_axes(variable).count("layers") >= 2
