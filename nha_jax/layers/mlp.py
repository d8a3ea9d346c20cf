"""The gated feed-forward part of a block."""

import jax
from flax import nnx

from nha_jax.config import ModelConfig
from nha_jax.layers.parameters import linear


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer, arXiv 2002.05202), without biases."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        hidden, inner = config.hidden_size, config.mlp_size
        self.gate_proj = linear(config, hidden, inner, ("embed", "mlp"), rngs=rngs)
        self.up_proj = linear(config, hidden, inner, ("embed", "mlp"), rngs=rngs)
        self.down_proj = linear(config, inner, hidden, ("mlp", "embed"), rngs=rngs)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """[..., hidden_size] -> [..., hidden_size] in config.dtype."""
        return self.down_proj(jax.nn.silu(self.gate_proj(inputs)) * self.up_proj(inputs))
