"""An exponential moving average of the parameters, which the optimizer's state holds."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class AverageState(NamedTuple):
    """The average so far.

    Attributes:
        updates: int32 scalar, how many updates are in it.
        average: float32 arrays, one for each parameter.
    """

    updates: jax.Array
    average: Any


def average_parameters(decay: float) -> optax.GradientTransformation:
    """Averages the parameters that the updates given lead to; it changes no update.

    average += max(1 - decay, 1 / n) * (parameters - average) after update n: the plain mean of all
    parameters since the first update until there are 1 / (1 - decay) of them, so that what they
    were at the start has no part in it.

    Args:
        decay: the share of the average that an update leaves, 0 or more and below 1.
    """

    def init(parameters: Any) -> AverageState:
        average = jax.tree.map(lambda x: jnp.array(x, jnp.float32), parameters)
        return AverageState(jnp.zeros((), jnp.int32), average)

    def update(
        updates: Any, state: AverageState, parameters: Any = None
    ) -> tuple[Any, AverageState]:
        count = state.updates + 1
        new = optax.apply_updates(parameters, updates)
        share = jnp.maximum(1 - decay, 1 / count)
        return updates, AverageState(count, optax.incremental_update(new, state.average, share))

    return optax.GradientTransformation(init, update)


def average_of(state: Any, parameters: Any) -> Any:
    """Finds the average in an optimizer's state; it gets the parameters' dtypes.

    Args:
        state: optax's state, which has one `AverageState` in it.
        parameters: the parameters themselves.
    """
    is_average = lambda node: isinstance(node, AverageState)  # noqa: E731
    (found,) = filter(is_average, jax.tree.leaves(state, is_leaf=is_average))
    return jax.tree.map(lambda x, like: x.astype(like.dtype), found.average, parameters)
