"""The two ends of a language model, and what every way through its layers shares."""

import jax
import jax.numpy as jnp
from flax import nnx

from nha_jax.argument_checks import after_unknown, check_segments_and_positions, check_tokens
from nha_jax.config import ModelConfig
from nha_jax.ops import Rope, rope_tables
from nha_jax.ops.mesh.division import shard_tokens, shard_vocabulary
from nha_jax.ops.mesh.explicit import with_auto_axes
from nha_jax.ops.padding import clear_padding
from nha_jax.sharding import hidden_specs, logits_specs


class Ends(nnx.Module):
    """The embedding before the layers, and the norm and head after them; `Model` makes them."""

    config: ModelConfig
    embed: nnx.Embed
    norm: nnx.RMSNorm
    head: nnx.Linear

    @with_auto_axes(hidden_specs)
    def embed_tokens(self, tokens: jax.Array) -> jax.Array:
        """Looks up the input of the first layer: [B, T] -> [B, T, hidden_size] in config.dtype.

        Tokens outside [0, vocab_size) give NaN.
        """
        tokens, known = check_tokens("tokens", tokens, self.config.vocab_size)
        return nan_unless(known, self._embed(tokens))

    def _embed(self, tokens: jax.Array) -> jax.Array:
        """Does what `embed_tokens` does, of tokens that are all known."""
        table = shard_vocabulary(self.embed.embedding[...], tokens)
        # Cast afterwards, so that the gradient is summed in the table's dtype.
        hidden = jnp.take(table, tokens, axis=0)
        return shard_tokens(hidden.astype(jnp.dtype(self.config.dtype)))

    @with_auto_axes(logits_specs)
    def logits(self, hidden: jax.Array) -> jax.Array:
        """Applies the head: [..., hidden_size], as `hidden_states` -> [..., vocab_size] float32.

        With config.mup_base_width they are 1 / config.width_ratio of the head's.
        """
        if self.config.width_ratio != 1:
            hidden = hidden / self.config.width_ratio
        if not self.config.tie_embeddings:
            return self.head(hidden)
        dtype = jnp.dtype(self.config.dtype)
        return jnp.einsum(
            "...d,vd->...v",
            hidden.astype(dtype),
            self.embed.embedding[...].astype(dtype),
            preferred_element_type=jnp.float32,
        )

    def _read(
        self,
        tokens: jax.Array,
        segment_ids: jax.Array | None,
        positions: jax.Array | None,
    ) -> tuple[jax.Array, jax.Array, jax.Array | None, jax.Array]:
        """Checks the arguments of a forward pass; returns tokens, which are known, and the rest."""
        tokens, known = check_tokens("tokens", tokens, self.config.vocab_size)
        if tokens.ndim != 2:
            raise ValueError(f"tokens must be [batch, time], got shape {tokens.shape}")
        return tokens, known, *check_segments_and_positions(tokens.shape, segment_ids, positions)

    def _end(self, hidden: jax.Array, known: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
        """Makes the head's input of what the last layer gave, [B, T, hidden_size]."""
        # NaN goes in after the layers: in them it would reach other segments, as 0 * NaN.
        hidden = nan_unless(~after_unknown(known, segment_ids), self.norm(hidden))
        return hidden if segment_ids is None else clear_padding(segment_ids, hidden)

    def _rope(self, positions: jax.Array) -> Rope:
        """Makes the tables of the rotary embedding, the same for all layers."""
        config = self.config
        return rope_tables(positions, config.key_dim, config.rope_theta, config.rope_scaling)


def nan_unless(known: jax.Array, hidden: jax.Array) -> jax.Array:
    """Puts NaN into hidden [B, T, hidden_size] wherever known [B, T] is False."""
    return jnp.where(known[..., None], hidden, jnp.nan)
