"""The optimizer, its learning rate and its state."""

from typing import Any

import jax
import optax
from flax import nnx

from nha_jax.layers.parameters import logical_axes
from train.config import OptimizerConfig
from train.optimizers import Job, find_optimizer
from train.step.average import average_parameters


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
        case "constant" | None:
            decay = optax.constant_schedule(peak)
        case "warmup_stable_decay":
            length = round(config.decay_fraction * steps)
            stable = max(steps - length - config.warmup_steps, 0)
            decay = optax.linear_schedule(
                peak, final, min(length, decay_steps), transition_begin=stable
            )
    return optax.join_schedules([warmup, decay], [config.warmup_steps])


def make_optimizer(
    config: OptimizerConfig,
    learning_rate: optax.Schedule,
    parameters: nnx.State,
    width_ratio: float = 1.0,
) -> optax.GradientTransformation:
    """Makes the optimizer that the configuration names, behind clipping, and the average after it.

    Args:
        config: its name and numbers.
        learning_rate: step -> learning rate.
        parameters: nnx state whose variables name their axes: by these, not by the bare arrays
            that the optimizer will see, parameters are told apart.
        width_ratio: of the model, as `ModelConfig.width_ratio`.
    """
    optimizer = find_optimizer(config.name)
    job = Job(learning_rate, config.weight_decay, parameters, width_ratio)
    keys = {name: getattr(config, name) for name in optimizer.defaults if name != "schedule"}
    parts = [optimizer.build(job, **keys)]
    if config.clip_norm is not None:
        parts.insert(0, optax.clip_by_global_norm(config.clip_norm))
    if config.ema_decay is not None:
        parts.append(average_parameters(config.ema_decay))
    return parts[0] if len(parts) == 1 else optax.chain(*parts)


class NamedOptimizer(nnx.Optimizer):
    """An `nnx.Optimizer` whose state names its axes as the parameters that it belongs to do.

    An array of the shape of its parameter has all the names; one that lacks an axis, such as a
    factored moment, those that are left. Flax by itself gives every array all of its parameter's
    names, and makes variables of what Muon leaves out.
    """

    def __init__(self, model: nnx.Module, transformation: optax.GradientTransformation, wrt: Any):
        """Makes the empty state.

        Args:
            model: the model.
            transformation: what updates it.
            wrt: a filter for the parameters to update.
        """
        super().__init__(model, optax.identity(), wrt=wrt)
        parameters = nnx.state(model, wrt)
        self.tx = transformation
        state = transformation.init(nnx.as_pure(parameters))
        self.opt_state = nnx.data(_name_axes(state, parameters))


def _name_axes(state: Any, parameters: nnx.State) -> Any:
    """Makes a variable of each array, with the names of its axes."""
    known = {tuple(map(str, path)): variable for path, variable in nnx.to_flat_state(parameters)}

    def variable(path: tuple[Any, ...], array: jax.Array) -> nnx.Variable:
        keys = tuple(jax.tree_util.keystr((key,), simple=True) for key in path)
        tails = (keys[start:] for start in range(len(keys)))
        parameter = next((known[tail] for tail in tails if tail in known), None)
        if parameter is None:
            return nnx.OptArray(array)
        names = _remaining_axes(array.shape, parameter)
        metadata = parameter.get_metadata() | {"out_sharding": names}
        return nnx.OptVariable(array, **metadata)

    return jax.tree_util.tree_map_with_path(variable, state)


def _remaining_axes(shape: tuple[int, ...], parameter: nnx.Variable) -> tuple[str | None, ...]:
    """Names the axes of an array that has a parameter's shape, or that without one axis."""
    names = logical_axes(parameter)
    if shape == parameter.shape:
        return names
    for gone in range(len(parameter.shape)):
        rest = [axis for axis in range(len(parameter.shape)) if axis != gone]
        if shape == tuple(parameter.shape[axis] for axis in rest):
            return tuple(names[axis] for axis in rest)
    return ()
