"""Which parameters of a model are matrices to Muon, and along which axes."""

from typing import Any

import jax
from flax import nnx
from optax.contrib import MuonDimensionNumbers

from nha_jax.layers.parameters import logical_axes
from nha_jax.model import Model


def muon_dimension_numbers(model: Model | nnx.State) -> nnx.State[Any, Any]:
    """Says which parameters `optax.contrib.muon` shall orthogonalize, each layer by itself.

    Without it optax takes every array of two axes for a matrix and no other. Those are the
    embedding, and the norms and biases of all layers in a stack; the matrices of the layers, which
    have three axes, would go to Adam.

        numbers = nha_jax.muon_dimension_numbers(model)
        muon = optax.contrib.muon(0.02, muon_weight_dimension_numbers=numbers)
        optimizer = nnx.Optimizer(model, muon, wrt=nnx.Param)

    Muon gets the kernels of the layers' projections, SwiGLUs, experts and routers: [num_layers, in,
    out] or [num_layers, experts, in, out], whose last two axes are one matrix. A projection is one
    matrix for all its heads. Embedding, head, norms, biases and the taps of the convolutions go to
    Adam, and so does a parameter whose axes have no names (`nha_jax.layers.LOGICAL_AXES`).

    Args:
        model: the model, or the state of all or some of its parameters; only the names of their
            axes are read.

    Returns:
        The tree of `nnx.state(model, nnx.Param)`, or of the state given, with optax's
        `MuonDimensionNumbers` in place of each parameter for Muon, and None in place of each one
        for Adam.
    """
    state = model if isinstance(model, nnx.State) else nnx.state(model, nnx.Param)
    return jax.tree.map(
        _dimension_numbers,
        state,
        is_leaf=lambda node: isinstance(node, nnx.Variable),
    )


def _dimension_numbers(parameter: nnx.Variable) -> MuonDimensionNumbers | None:
    axes = logical_axes(parameter)
    if "layers" not in axes or "conv" in axes or len(axes) < 3:
        return None
    return MuonDimensionNumbers(reduction_axis=len(axes) - 2, output_axis=len(axes) - 1)
