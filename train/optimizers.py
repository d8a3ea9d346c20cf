"""The optimizers that `optimizer.name` chooses from, and how a package adds one."""

import inspect
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from optax.contrib import ScheduleFreeState, schedule_free_eval_params

from nha_jax import muon_dimension_numbers, scale_by_mup
from nha_jax.layers.parameters import logical_axes

ENTRY_POINTS = "nha_jax.optimizers"
"""The group of entry points by which an installed package adds an `Optimizer`, under its name."""


@dataclass(frozen=True)
class Job:
    """What every optimizer is built for.

    Attributes:
        learning_rate: the schedule, update -> learning rate.
        weight_decay: the decay of matrices, decoupled from the gradient.
        parameters: nnx state of the trained parameters, whose variables name their axes.
        width_ratio: by how much the model is wider than the one that learning_rate is of, as
            `ModelConfig.width_ratio`.
    """

    learning_rate: optax.Schedule
    weight_decay: float
    parameters: nnx.State
    width_ratio: float = 1.0

    def follow(
        self, direction: optax.GradientTransformation, *, orthogonal: bool = False
    ) -> optax.GradientTransformation:
        """Makes the step from a direction: minus learning_rate * (direction + weight_decay * x).

        Only matrices decay, not biases and norms. In a wider model the direction's part is smaller,
        as `nha_jax.mup` says of directions whose entries are as large as Adam's.

        Args:
            direction: gradient -> direction of ascent.
            orthogonal: whether it is Muon's in the matrices of the layers.
        """
        if self.width_ratio != 1:
            scale = scale_by_mup(self.parameters, self.width_ratio, orthogonal=orthogonal)
            direction = optax.chain(direction, scale)
        is_variable = lambda node: isinstance(node, nnx.Variable)  # noqa: E731
        decayed = list(map(_is_matrix, jax.tree.leaves(self.parameters, is_leaf=is_variable)))
        # A function, as the optimizer itself sees bare arrays.
        mask = lambda tree: jax.tree.unflatten(jax.tree.structure(tree), decayed)  # noqa: E731
        return optax.chain(
            direction,
            optax.add_decayed_weights(self.weight_decay, mask),
            optax.scale_by_learning_rate(self.learning_rate),
        )


@dataclass(frozen=True)
class Optimizer:
    """One optimizer: how it is built, and which keys of the section `optimizer` it takes.

    Attributes:
        build: makes it, from a `Job` and keywords: the keys that it takes beside those that all
            do, each with its default. The others of the section are refused if they are given.
        scheduled: whether its learning rate may decay. If not, it takes no `schedule`, and the
            rate stays at its peak after the warm-up.
        positive: keys that may not be 0.
        evaluated: (optax's state, parameters) -> the parameters that it would be judged by, if
            those are not the ones whose gradient it takes.
    """

    build: Callable[..., optax.GradientTransformation]
    scheduled: bool = True
    positive: tuple[str, ...] = ()
    evaluated: Callable[[Any, Any], Any] | None = None

    @property
    def defaults(self) -> Mapping[str, Any]:
        """The keys that it takes and not all do -> their defaults."""
        keywords = {
            name: parameter.default
            for name, parameter in inspect.signature(self.build).parameters.items()
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY
        }
        return ({"schedule": "cosine"} if self.scheduled else {}) | keywords


def find_optimizer(name: str) -> Optimizer:
    """Finds an optimizer: one of `OPTIMIZERS`, or else one that an installed package adds.

    Raises:
        ValueError: there is none of this name, or what the package adds is no `Optimizer`.
    """
    if name in OPTIMIZERS:
        return OPTIMIZERS[name]
    for entry in entry_points(group=ENTRY_POINTS, name=name):
        optimizer = entry.load()
        if not isinstance(optimizer, Optimizer):
            raise ValueError(
                f"name = {name!r}: {entry.value}, the entry point of {ENTRY_POINTS}, is no "
                "train.optimizers.Optimizer"
            )
        return optimizer
    known = [*OPTIMIZERS, *sorted(entry_points(group=ENTRY_POINTS).names)]
    raise ValueError(f"name = {name!r}: expected one of {', '.join(known)}")


def _is_matrix(variable: nnx.Variable) -> bool:
    """Whether one layer's parameter has two axes or more, the stack of layers not counted."""
    return variable.ndim - logical_axes(variable).count("layers") >= 2


def _adamw(
    job: Job,
    *,
    beta1: float = 0.9,
    beta2: float = 0.95,
    epsilon: float = 1e-8,
    moment_dtype: str | None = None,
) -> optax.GradientTransformation:
    return job.follow(optax.scale_by_adam(beta1, beta2, epsilon, mu_dtype=moment_dtype))


def _muon(
    job: Job,
    *,
    momentum: float = 0.95,
    beta1: float = 0.9,
    beta2: float = 0.95,
    epsilon: float = 1e-8,
    moment_dtype: str | None = None,
) -> optax.GradientTransformation:
    """Builds Muon for the matrices of the layers, with AdamW for all else.

    Updates of matrices are scaled to the size of AdamW's (arXiv:2502.16982), so that learning rate
    and weight decay are the same for both.
    """
    return job.follow(
        optax.contrib.muon(
            -1.0,  # the direction of ascent
            beta=momentum,
            eps=epsilon,
            mu_dtype=moment_dtype,
            adam_b1=beta1,
            adam_b2=beta2,
            muon_weight_dimension_numbers=muon_dimension_numbers(job.parameters),
            consistent_rms=_RMS_OF_ADAMW,
        ),
        orthogonal=True,
    )


def _adafactor(job: Job) -> optax.GradientTransformation:
    """Builds Adafactor without momentum, and with steps that do not grow with the parameters."""
    return job.follow(
        optax.chain(optax.scale_by_factored_rms(), _clip_rms_of_each_layer(job.parameters))
    )


def _clip_rms_of_each_layer(parameters: nnx.State) -> optax.GradientTransformation:
    """Divides each layer's part of a step, and each expert's, by its RMS if that is above 1.

    `optax.clip_by_block_rms` would divide a whole stack of layers by the RMS of all of them.
    """
    is_variable = lambda node: isinstance(node, nnx.Variable)  # noqa: E731
    own_axes = []
    for variable in jax.tree.leaves(parameters, is_leaf=is_variable):
        names = logical_axes(variable)
        stacked = len(list(itertools.takewhile(lambda name: name in ("layers", "experts"), names)))
        own_axes.append(tuple(range(stacked, variable.ndim)))

    def clip(steps: Any, _: Any) -> Any:
        leaves, structure = jax.tree.flatten(steps)
        squares = [
            jnp.square(step).mean(axes, keepdims=True)
            for step, axes in zip(leaves, own_axes, strict=True)
        ]
        clipped = [
            step / jnp.maximum(1.0, jnp.sqrt(square))
            for step, square in zip(leaves, squares, strict=True)
        ]
        return jax.tree.unflatten(structure, clipped)

    return optax.stateless(clip)


def _lion(
    job: Job, *, beta1: float = 0.9, beta2: float = 0.99, moment_dtype: str | None = None
) -> optax.GradientTransformation:
    return job.follow(optax.scale_by_lion(beta1, beta2, mu_dtype=moment_dtype))


def _schedule_free_adamw(
    job: Job, *, beta1: float = 0.9, beta2: float = 0.95, epsilon: float = 1e-8
) -> optax.GradientTransformation:
    """Builds AdamW whose averaging takes the place of momentum and of the rate's decay."""
    adam = optax.scale_by_rms(beta2, epsilon, eps_in_sqrt=False, bias_correction=True)
    rate = lambda count: job.learning_rate(count - 1)  # noqa: E731 (it counts from 1)
    return optax.contrib.schedule_free(job.follow(adam), rate, beta1)


def _schedule_free_average(state: Any, parameters: Any) -> Any:
    is_part = lambda node: isinstance(node, ScheduleFreeState)  # noqa: E731
    (part,) = filter(is_part, jax.tree.leaves(state, is_leaf=is_part))
    return schedule_free_eval_params(part, parameters)


_RMS_OF_ADAMW = 0.2

OPTIMIZERS: Mapping[str, Optimizer] = {
    "adamw": Optimizer(_adamw),
    "muon": Optimizer(_muon),
    "adafactor": Optimizer(_adafactor),
    "lion": Optimizer(_lion),
    "schedule_free_adamw": Optimizer(
        _schedule_free_adamw,
        scheduled=False,
        positive=("beta1",),
        evaluated=_schedule_free_average,
    ),
}
"""The library's own, by name."""
