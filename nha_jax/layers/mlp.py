"""The feed-forward part of a block: `SwiGLU`."""

import jax
from flax import nnx

from nha_jax.config import ModelConfig
from nha_jax.layers.projection import linear
from nha_jax.ops.mesh.division import shard_tokens


class SwiGLU(nnx.Module):
    """down_proj(silu(gate_proj(x)) * up_proj(x)) (Shazeer, arXiv 2002.05202), without biases."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        """Makes the three projections at random, in config.param_dtype.

        Args:
            config: of the model, whose hidden_size and mlp_size are the widths.
            rngs: the random numbers, as for `NHAttention`.
        """
        hidden, inner = config.hidden_size, config.mlp_size
        self.gate_proj = linear(config, hidden, inner, ("embed", "mlp"), rngs=rngs)
        self.up_proj = linear(config, hidden, inner, ("embed", "mlp"), rngs=rngs)
        self.down_proj = linear(config, inner, hidden, ("mlp", "embed"), rngs=rngs)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """[B, T, hidden_size] -> [B, T, hidden_size] in config.dtype."""
        inner = jax.nn.silu(self.gate_proj(inputs)) * self.up_proj(inputs)
        return self.down_proj(shard_tokens(inner, heads=inner.shape[2]))
