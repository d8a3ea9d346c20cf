"""The logical names of parameter axes, and the flax.nnx layers whose parameters carry them."""

import jax
import jax.numpy as jnp
from flax import nnx

from nha_jax.layer_config import LayerFields

LOGICAL_AXES = (
    "layers",  # the stacked blocks; scanned over
    "vocab",  # rows of the embedding, columns of the head
    "embed",  # the residual stream: hidden_size
    "heads",  # query heads x their key or value size, heads outermost
    "kv_heads",  # key/value heads x their key, value or slot count, heads outermost
    "mlp",  # the inner width of the SwiGLU
    "experts",  # the SwiGLUs of a mixture
    "rank",  # between the two factors of an adapter
    "conv",  # the taps of the short convolution
    "norm",  # the scale of a norm over the residual stream, or over one head's query or key
)
"""Every name that an axis of a parameter can have.

A training stack maps each of them to mesh axes, or to none.
"""


def partitioned(initializer: jax.nn.initializers.Initializer, *names: str):
    """Makes an initializer name the axes of its parameter; it works with and without a mesh.

    Raises:
        ValueError: a name is not one of LOGICAL_AXES.
    """
    for name in names:
        if name not in LOGICAL_AXES:
            raise ValueError(f"{name!r} is no logical axis; there are {', '.join(LOGICAL_AXES)}")
    # eager_sharding would look for mesh axes of these very names when the model is built.
    return nnx.with_partitioning(initializer, names, eager_sharding=False)


def normal(config: LayerFields, *names: str):
    """Makes the initializer of a matrix whose axes have these names; errors as `partitioned`."""
    return partitioned(jax.nn.initializers.normal(config.initializer_range_of(*names)), *names)


def logical_axes(variable: nnx.Variable) -> tuple[str | None, ...]:
    """The logical names of a variable's axes, e.g. ("layers", "embed", "mlp"); () without any."""
    return tuple(variable.get_metadata().get("out_sharding") or ())


def rms_norm(
    config: LayerFields, features: int, name: str, *, eps: float | None = None, rngs: nnx.Rngs
) -> nnx.RMSNorm:
    """Makes an RMSNorm over the last axis, [..., features], that computes and returns float32.

    Args:
        config: dtype of the scale, and norm_eps.
        features, name: the length of the axis, and its logical name.
        eps: added to the mean square; None: config.norm_eps.
        rngs: not drawn from: the scale starts at 1.
    """
    return nnx.RMSNorm(
        features,
        epsilon=config.norm_eps if eps is None else eps,
        dtype=jnp.float32,
        param_dtype=jnp.dtype(config.param_dtype),
        scale_init=partitioned(jax.nn.initializers.ones, name),
        rngs=rngs,
    )
