"""The steps of an optimizer under the maximal-update parametrisation (`nha_jax.mup`)."""

from typing import Any

import jax
import optax
from flax import nnx

from nha_jax.layers.parameters import logical_axes
from nha_jax.mup import step_factor


def scale_by_mup(
    parameters: nnx.State, width_ratio: float, *, orthogonal: bool = False
) -> optax.GradientTransformation:
    """Scales each parameter's step as its place in a model of `mup_base_width` asks.

        parameters = nnx.state(model, nnx.Param)
        adam = optax.chain(
            optax.scale_by_adam(),
            nha_jax.scale_by_mup(parameters, model.config.width_ratio),
            optax.scale_by_learning_rate(3e-4),
        )
        optimizer = nnx.Optimizer(model, adam, wrt=nnx.Param)

    It belongs behind what makes entries of one size of gradients of any, as Adam, Lion, Adafactor
    and Muon do, and before decoupled weight decay, which has no part in it.

    Args:
        parameters: those that are trained; only the names of their axes are read.
        width_ratio: hidden_size / mup_base_width, as `ModelConfig.width_ratio`.
        orthogonal: whether matrices of the layers have Muon's steps, scaled to the size of Adam's
            (`consistent_rms` of `optax.contrib.muon`).
    """
    is_variable = lambda node: isinstance(node, nnx.Variable)  # noqa: E731
    factors = [
        step_factor(width_ratio, logical_axes(variable), orthogonal=orthogonal)
        for variable in jax.tree.leaves(parameters, is_leaf=is_variable)
    ]

    def scale(steps: Any, _: Any) -> Any:
        leaves, structure = jax.tree.flatten(steps)
        scaled = [step * factor for step, factor in zip(leaves, factors, strict=True)]
        return jax.tree.unflatten(structure, scaled)

    return optax.stateless(scale)
