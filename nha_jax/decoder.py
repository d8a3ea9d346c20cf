"""The model as it reads token by token: prompts into a cache, then one token after the other."""

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nha_jax.argument_checks import (
    check_cache,
    check_lengths,
    check_room,
    check_tokens,
    known_tokens,
)
from nha_jax.cache import ModelCache, empty_cache
from nha_jax.compiled import compiled
from nha_jax.ends import Ends, nan_unless
from nha_jax.layers import Block, LayerCache
from nha_jax.layers.layer_stack import block_of_layer, scan_blocks, stack_layers, unstack_layers
from nha_jax.ops.mesh.explicit import with_auto_axes
from nha_jax.prompt_lengths import pad_rows, rounded_length, to_host
from nha_jax.sharding import model_cache_specs, scored_specs, step_specs


class Decoder(Ends):
    """What `nha_jax.Model` computes with a cache; the parameters are made by `Model`."""

    blocks: Block

    @with_auto_axes(model_cache_specs)
    def init_cache(self, batch_size: int, *, max_length: int | None = None) -> ModelCache:
        """Makes the cache of rows without a token; max_length as for `prefill`.

        On a mesh (`jax.set_mesh`), rows and heads are divided as `nha_jax.ops.use_mesh_axes` says.

        Raises:
            ValueError: max_length is missing though a layer has full attention.
        """
        check_room(self.config.windows, max_length, 0)
        return empty_cache(self.blocks.attention, self.config.windows, batch_size, max_length)

    @with_auto_axes(step_specs)
    def prefill(
        self,
        tokens: jax.Array,
        *,
        lengths: jax.typing.ArrayLike | None = None,
        max_length: int | None = None,
        cache: ModelCache | None = None,
    ) -> tuple[jax.Array, ModelCache]:
        """Reads prompts, or a chunk of each, for `decode_step` to continue.

        Outside of `jax.jit` the rows are padded to one of a few lengths, by a quarter at most or to
        a multiple of 16, so that prompts of N lengths compile O(log N) programs.

        Args:
            tokens: [B, T] integers; the first lengths[b] of row b are read. One of those that is
                outside [0, vocab_size) makes its row NaN, here and in the cache; the rest may be
                any integers.
            lengths: [B] integers in [1, T]; with a cache in [0, T]: a row without tokens keeps its
                cache, and its logits have no meaning. None: all rows have T tokens.
            max_length: the most tokens that a row will have, prompt included. Only layers with full
                attention need and use it: their caches have this many entries.
            cache: of the tokens before, as `init_cache`, this method or `decode_step` returned it;
                it has its own max_length. None: there are none.

        Returns:
            The logits of the token after each row's last, [B, vocab_size] float32, and the cache.

        Raises:
            ValueError, TypeError: an argument has a wrong shape, dtype or value.
        """
        parts = (tokens, lengths, cache, self.embed.embedding[...])
        traced = any(isinstance(part, jax.core.Tracer) for part in jax.tree.leaves(parts))
        given, place = (tokens, None) if traced else to_host(tokens)
        ids, known = known_tokens("tokens", given, self.config.vocab_size)
        if ids.ndim != 2 or not ids.shape[1]:
            raise ValueError(f"tokens must be [batch, time], time >= 1; got shape {ids.shape}")
        batch_size, num_tokens = ids.shape
        row_lengths = None
        if lengths is not None:
            least = 1 if cache is None else 0
            row_lengths = check_lengths(lengths, batch_size, num_tokens, least)
        if cache is None:
            check_room(self.config.windows, max_length, num_tokens)
        else:
            check_cache(cache.length.shape[0], max_length, batch_size)
        # Where no layer needs it, one program serves all.
        max_length = max_length if None in self.config.windows else None
        if traced or isinstance(ids, jax.Array):
            ids, known = jnp.asarray(ids), jnp.asarray(known)
            return self._prefill(ids, known, row_lengths, cache, max_length=max_length)

        def padded(rows: np.ndarray | jax.Array, length: int) -> jax.Array:
            return jax.device_put(pad_rows(rows, length), place)

        size = rounded_length(num_tokens, multiple=16)
        if size > num_tokens:
            read = np.full(batch_size, num_tokens, np.int32) if row_lengths is None else row_lengths
            # Of an implementation that has no padding, each length is a program.
            with contextlib.suppress(NotImplementedError):
                return self._prefill(
                    padded(ids, size), padded(known, size), jax.device_put(read), cache,
                    max_length=max_length,
                )  # fmt: skip
        ids, known = padded(ids, num_tokens), padded(known, num_tokens)
        return self._prefill(ids, known, row_lengths, cache, max_length=max_length)

    @compiled("max_length")
    def _prefill(
        self,
        tokens: jax.Array,
        known: jax.Array,
        row_lengths: jax.Array | None,
        cache: ModelCache | None,
        *,
        max_length: int | None,
    ) -> tuple[jax.Array, ModelCache]:
        """Does what `prefill` does, of checked arguments."""
        hidden, after = self._read_chunk(tokens, known, row_lengths, cache, max_length)
        read = after.length if cache is None else after.length - cache.length
        last = jnp.maximum(read[:, None, None] - 1, 0)
        hidden = jnp.take_along_axis(hidden, last, axis=1)  # [B, T, hidden] -> [B, 1, hidden]
        return self.logits(self.norm(hidden))[:, 0], after

    def _read_chunk(
        self,
        tokens: jax.Array,
        known: jax.Array,
        row_lengths: jax.Array | None,
        cache: ModelCache | None,
        max_length: int | None,
    ) -> tuple[jax.Array, ModelCache]:
        """Runs the layers on the next tokens of each row; arguments as for `_prefill`.

        Returns:
            The last layer's output at all tokens, [B, T, hidden_size], and the cache after them.
        """
        batch_size, num_tokens = tokens.shape
        positions = jnp.arange(num_tokens, dtype=jnp.int32)
        if row_lengths is not None:
            known |= positions[None] >= row_lengths[:, None]  # or not read
        rope = self._rope(positions if cache is None else cache.length[:, None] + positions[None])

        def prefill(
            block: Block,
            hidden: jax.Array,
            cache: LayerCache | None,
            shared: Any,
            window_size: int | None,
        ) -> tuple[jax.Array, LayerCache]:
            rope, row_lengths = shared
            return block.prefill(
                hidden,
                window_size=window_size,
                rope=rope,
                lengths=row_lengths,
                max_length=max_length,
                cache=cache,
            )

        period = len(self.config.window_period)
        caches = None if cache is None else stack_layers(cache.layers, period)
        hidden = nan_unless(known, self._embed(tokens))
        hidden, caches = scan_blocks(
            prefill,
            self.blocks,
            hidden,
            self.config.window_period,
            caches,
            shared=(rope, row_lengths),
        )
        if row_lengths is None:
            row_lengths = jnp.full(batch_size, num_tokens, jnp.int32)
        length = row_lengths if cache is None else cache.length + row_lengths
        layers = unstack_layers(caches, self.config.num_layers // period)
        return hidden, ModelCache(layers, length)

    @with_auto_axes(scored_specs)
    def score_tokens(
        self,
        tokens: jax.typing.ArrayLike,
        targets: jax.typing.ArrayLike,
        cache: ModelCache,
        *,
        lengths: jax.typing.ArrayLike,
    ) -> tuple[jax.Array, jax.Array, ModelCache]:
        """Reads the next tokens of each row, and says how likely the model found given targets.

        `nha_jax.score` calls it chunk by chunk. The logits are computed for a few tokens at a time
        and never stored for all of them.

        Args:
            tokens: [B, T] integers in [0, vocab_size); the first lengths[b] of row b are read.
            targets: [B, T] integers in [0, vocab_size), the token after each.
            cache: of the tokens before, as `init_cache`, `prefill` or this method returned it.
            lengths: [B] integers in [0, T].

        Returns:
            The targets' natural log-probabilities, [B, T] float32; whether each is the likeliest
            token, [B, T] bool, both without a meaning past a row's length; and the cache after the
            tokens.

        Raises:
            ValueError, TypeError: an argument has a wrong shape, dtype or value.
        """
        ids, known = check_tokens("tokens", tokens, self.config.vocab_size)
        targets, known_targets = check_tokens("targets", targets, self.config.vocab_size)
        if ids.ndim != 2 or not ids.shape[1] or targets.shape != ids.shape:
            raise ValueError(
                "tokens and targets must be [batch, time], time >= 1, of one shape; got shapes "
                f"{ids.shape} and {targets.shape}"
            )
        check_cache(cache.length.shape[0], None, ids.shape[0])
        row_lengths = check_lengths(lengths, ids.shape[0], ids.shape[1], least=0)
        return self._score_tokens(ids, known, targets, known_targets, cache, row_lengths)

    @compiled()
    def _score_tokens(
        self,
        tokens: jax.Array,
        known: jax.Array,
        targets: jax.Array,
        known_targets: jax.Array,
        cache: ModelCache,
        lengths: jax.Array,
    ) -> tuple[jax.Array, jax.Array, ModelCache]:
        """Does what `score_tokens` does, of checked arguments."""
        hidden, after = self._read_chunk(tokens, known, lengths, cache, None)
        hidden = self.norm(hidden)

        def score(hidden: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
            every = jax.nn.log_softmax(self.logits(hidden), axis=-1)
            chosen = jnp.take_along_axis(every, targets[..., None], axis=-1)[..., 0]
            return chosen, every.argmax(axis=-1) == targets

        log_probability, greedy = jax.lax.map(
            lambda x: score(*x), (hidden.swapaxes(0, 1), targets.swapaxes(0, 1)), batch_size=16
        )
        log_probability = jnp.where(known_targets, log_probability.swapaxes(0, 1), jnp.nan)
        return log_probability, greedy.swapaxes(0, 1), after

    @with_auto_axes(step_specs)
    def decode_step(
        self, tokens: jax.Array, cache: ModelCache, *, active: jax.Array | None = None
    ) -> tuple[jax.Array, ModelCache]:
        """Reads one more token of each row.

        Args:
            tokens: [B] integers, the next token of each row. One outside [0, vocab_size) makes its
                row NaN, here and in the cache, unless the row is not active.
            cache: as `prefill`, `init_cache` or this method returned it. With full attention in a
                layer, no row may get longer than the max_length of its cache: the oldest tokens
                would be overwritten.
            active: [B] bool; rows where it is False keep their cache, and their logits have no
                meaning. None: all are active.

        Returns:
            The logits of the token after these, [B, vocab_size] float32, and the cache.

        Raises:
            ValueError, TypeError: tokens have a wrong shape or dtype.
        """
        tokens, known = check_tokens("tokens", tokens, self.config.vocab_size)
        if tokens.shape != cache.length.shape:
            raise ValueError(
                f"tokens must be [batch] as in the cache, {cache.length.shape}; "
                f"got shape {tokens.shape}"
            )
        return self._decode_step(tokens, known, cache, active)

    @compiled()
    def _decode_step(
        self, tokens: jax.Array, known: jax.Array, cache: ModelCache, active: jax.Array | None
    ) -> tuple[jax.Array, ModelCache]:
        """Does what `decode_step` does, of checked arguments."""
        rope = self._rope(cache.length[:, None])
        if active is not None:
            known |= ~active
        hidden, layers = nan_unless(known[:, None], self._embed(tokens[:, None])), []
        # A scan over the layers would copy every cache into its stack and out of it.
        for index, (layer, window_size) in enumerate(
            zip(cache.layers, self.config.windows, strict=True)
        ):
            hidden, layer = block_of_layer(self.blocks, index).decode_step(
                hidden, layer, window_size=window_size, rope=rope, active=active
            )
            layers.append(layer)
        length = cache.length + (1 if active is None else active.astype(jnp.int32))
        return self.logits(self.norm(hidden))[:, 0], ModelCache(tuple(layers), length)
