"""One block of the model: attention and SwiGLU, each after a norm and added to its input."""

import jax
from flax import nnx

from nha_jax.config import ModelConfig
from nha_jax.layers.attention import NHAttention
from nha_jax.layers.attention_core import LayerCache, LayerDiagnostics
from nha_jax.layers.experts import MixtureOfExperts
from nha_jax.layers.mlp import SwiGLU
from nha_jax.layers.parameters import rms_norm
from nha_jax.ops import Rope, SlotWeightGradient
from nha_jax.ops.mesh.division import shard_tokens
from nha_jax.ops.padding import clear_padding


class Block(nnx.Module):
    """y = x + attention(RMSNorm(x)); the block gives y + mlp(RMSNorm(y)).

    x and y are [B, T, hidden_size]; the mlp is a `SwiGLU`, or a `MixtureOfExperts` if the config
    has experts. The methods take the arguments of those of `AttentionCore`.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        """Makes a block with random parameters, in config.param_dtype.

        Args:
            config: of the model.
            rngs: the random numbers, as for `NHAttention`.
        """
        self.attention_norm = rms_norm(config, config.hidden_size, "norm", rngs=rngs)
        self.attention = NHAttention(**vars(config.layer), rngs=rngs)
        self.mlp_norm = rms_norm(config, config.hidden_size, "norm", rngs=rngs)
        mlp = MixtureOfExperts if config.experts else SwiGLU
        self.mlp = mlp(config, rngs=rngs)

    def __call__(
        self,
        hidden: jax.Array,
        *,
        window_size: int | None,
        rope: Rope,
        segment_ids: jax.Array | None = None,
    ) -> jax.Array:
        """Runs the block: [B, T, hidden_size] -> [B, T, hidden_size].

        Padding (segment id 0) is read as zeros.
        """
        if segment_ids is not None:
            hidden = clear_padding(segment_ids, hidden)
        hidden, _ = self.forward(
            hidden, window_size=window_size, rope=rope, segment_ids=segment_ids, diagnose=None
        )
        return hidden

    def forward(
        self,
        hidden: jax.Array,
        *,
        window_size: int | None,
        rope: Rope,
        segment_ids: jax.Array | None,
        diagnose: SlotWeightGradient | None,
    ) -> tuple[jax.Array, LayerDiagnostics | None]:
        """Returns what a call returns, and the attention's diagnostics if asked for.

        The padding of `hidden` must be finite.
        """
        attended, diagnostics = self.attention.forward(
            self.attention_norm(hidden),
            window_size=window_size,
            rope=rope,
            segment_ids=segment_ids,
            diagnose=diagnose,
        )
        return self.after_attention(hidden, attended), diagnostics

    def after_attention(self, hidden: jax.Array, attended: jax.Array) -> jax.Array:
        """Does the rest of `forward`: adds what the attention gave, and then the mlp's outputs."""
        hidden = shard_tokens(hidden + attended)
        return shard_tokens(hidden + self.mlp(self.mlp_norm(hidden)))

    def prefill(
        self,
        hidden: jax.Array,
        *,
        window_size: int | None,
        rope: Rope,
        lengths: jax.Array | None = None,
        max_length: int | None = None,
        cache: LayerCache | None = None,
    ) -> tuple[jax.Array, LayerCache]:
        """Runs the block on prompts [B, T, hidden_size], and returns its cache too."""
        attended, cache = self.attention.forward_prompt(
            self.attention_norm(hidden),
            window_size=window_size,
            rope=rope,
            lengths=lengths,
            max_length=max_length,
            cache=cache,
        )
        hidden = hidden + attended
        return hidden + self.mlp(self.mlp_norm(hidden)), cache

    def decode_step(
        self,
        hidden: jax.Array,
        cache: LayerCache,
        *,
        window_size: int | None,
        rope: Rope,
        active: jax.Array | None = None,
    ) -> tuple[jax.Array, LayerCache]:
        """Runs the block on one token of each row, [B, 1, hidden_size], and updates the cache."""
        attended, cache = self.attention.forward_token(
            self.attention_norm(hidden), cache, window_size=window_size, rope=rope, active=active
        )
        hidden = hidden + attended
        return hidden + self.mlp(self.mlp_norm(hidden)), cache
