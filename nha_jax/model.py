"""The decoder-only language model: `Model`, its forward pass, prefill and decode step."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple, Self, cast

import jax
import jax.numpy as jnp
from flax import nnx

from nha_jax.argument_checks import check_integers, check_lengths, check_segments_and_positions
from nha_jax.config import ModelConfig
from nha_jax.layers import Block, LayerCache, LayerDiagnostics
from nha_jax.layers.diagnostics import Diagnostics
from nha_jax.layers.layer_stack import (
    block_of_layer,
    in_layer_order,
    scan_blocks,
    stack_layers,
    stacked_blocks,
    unstack_layers,
)
from nha_jax.layers.parameters import linear, partitioned, rms_norm
from nha_jax.ops import Rope, SlotWeightGradient, rope_tables
from nha_jax.ops.mesh.division import divide_over_mesh, shard_tokens, shard_vocabulary


class ModelCache(NamedTuple):
    """What the model remembers of each row; for finite windows its size never grows.

    The layers' caches are arrays of their own, not one stack, so that each is updated in place.
    """

    layers: tuple[LayerCache, ...]  # num_layers
    length: jax.Array  # [B] int32, tokens so far


class Model(nnx.Module):
    """A language model of Native Hybrid Attention blocks (arXiv 2510.07019).

    embedding -> num_layers blocks -> RMSNorm -> head. All blocks live in one stacked module,
    `blocks`, each of whose parameters has a leading axis "layers": the stack is the same for
    every window layout. The forward scans over the repetitions of the window period, so the
    time to compile does not grow with depth. Every parameter names its axes (see
    `nha_jax.layers.LOGICAL_AXES`); no mesh is needed to build or to run the model.

        config = ModelConfig.preset("nha-tiny")
        model = Model(config, rngs=nnx.Rngs(0))
        logits = model(tokens)
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embed = nnx.Embed(
            config.vocab_size,
            config.hidden_size,
            param_dtype=jnp.dtype(config.param_dtype),
            embedding_init=partitioned(
                jax.nn.initializers.normal(config.initializer_range), "vocab", "embed"
            ),
            rngs=rngs,
        )
        self.blocks = stacked_blocks(config, rngs)
        self.norm = rms_norm(config, config.hidden_size, "norm", rngs=rngs)
        if not config.tie_embeddings:
            self.head = linear(
                config,
                config.hidden_size,
                config.vocab_size,
                ("embed", "vocab"),
                rngs=rngs,
                preferred_element_type=jnp.float32,
            )

    def __call__(
        self,
        tokens: jax.Array,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
    ) -> jax.Array:
        """The logits of the token that follows each token.

        Args:
            tokens: [B, T] integers in [0, vocab_size); others give NaN.
            segment_ids: [B, T] integers. A segment is a maximal run of equal ids; tokens see their
                own segment only. 0 is padding, whose logits mean nothing.
            positions: [T] or [B, T] integers for the rotary embedding; by default counted from
                each segment's first token.

        Returns:
            [B, T, vocab_size] float32.

        Raises:
            ValueError, TypeError: an argument has a wrong shape or dtype; the message names it.
        """
        logits = self.logits(self.hidden_states(tokens, segment_ids, positions))
        return shard_tokens(logits, heads=self.config.vocab_size)

    def hidden_states(
        self,
        tokens: jax.Array,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
    ) -> jax.Array:
        """What the head reads: [B, T, hidden_size] float32. Arguments as for a call."""
        hidden, _ = self._forward(tokens, segment_ids, positions, diagnose=None)
        return hidden

    def diagnose(
        self,
        tokens: jax.Array,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
        *,
        slot_weight_gradient: SlotWeightGradient = "all",
    ) -> Diagnostics:
        """The forward, and what every layer did: its softmax mass on the slots, and its gates.

        Costs little more than the forward, and can be part of a loss. Where no token has left the
        window yet (everywhere, with window None), the mass is that of the empty slots; with
        `empty_slots="mask"` it is 0.

            seen = model.diagnose(tokens)
            logits = model.logits(seen.hidden)  # as model(tokens)
            seen.slot_weight.mean((1, 2))  # [L, Hq]: how much each head reads from its slots
            jnp.log(2) / -seen.log_decay.mean((1, 2))  # [L, Hkv, M]: half-lives in tokens

        Arguments and errors as for a call; slot_weight_gradient as for `nha_jax.nha_attention`.
        """
        hidden, layers = self._forward(
            tokens, segment_ids, positions, diagnose=slot_weight_gradient
        )
        stacked = in_layer_order(layers)
        return Diagnostics(hidden, stacked.slot_weight, stacked.log_decay)

    def embed_tokens(self, tokens: jax.Array) -> jax.Array:
        """What the first layer reads: [B, T] integers -> [B, T, hidden_size] in config.dtype."""
        table = shard_vocabulary(self.embed.embedding[...], tokens)
        hidden = jnp.take(table, tokens, axis=0)  # cast after it: its gradient is a sum over tokens
        return shard_tokens(hidden.astype(jnp.dtype(self.config.dtype)))

    def apply_layer(
        self,
        index: int | jax.Array,
        hidden: jax.Array,
        window_size: int | None,
        *,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
    ) -> jax.Array:
        """One layer under any window, whatever the config says of it.

        `embed_tokens`, all layers in order and `norm` make up `hidden_states`.

        Args:
            index: which layer, in [0, num_layers). It may be traced, so that one compiled
                function serves every layer with this window; out of range it is then clamped.
            hidden: [B, T, hidden_size] in config.dtype, what the layer before gave.
            window_size: the last tokens kept exactly (W); None for full attention.
            segment_ids, positions: as for a call.

        Returns:
            [B, T, hidden_size] in config.dtype.

        Raises:
            ValueError, TypeError: an argument has a wrong shape, dtype or value.
        """
        num_layers = self.config.num_layers
        if not isinstance(index, jax.core.Tracer) and not 0 <= int(index) < num_layers:
            raise ValueError(f"index={index} must be within [0, num_layers={num_layers})")
        if hidden.ndim != 3 or hidden.shape[-1] != self.config.hidden_size:
            raise ValueError(
                f"hidden must be [batch, time, hidden_size={self.config.hidden_size}], "
                f"got shape {hidden.shape}"
            )
        segment_ids, positions = check_segments_and_positions(
            hidden.shape[:2], segment_ids, positions
        )
        return block_of_layer(self.blocks, index)(
            hidden,
            window_size=window_size,
            rope=self._rope(positions),
            segment_ids=segment_ids,
        )

    def with_windows(self, window_size: int | Sequence[int | None] | None) -> Self:
        """The same model, its parameters shared and not copied, under another window layout.

        Args:
            window_size: as `ModelConfig.window_size`.

        Raises:
            ValueError: the layout does not fit the model's number of layers.
        """
        windows = tuple(window_size) if isinstance(window_size, Sequence) else window_size
        return self._with_config(window_size=windows)

    def with_implementation(self, implementation: str | None) -> Self:
        """The same model, its parameters shared and not copied, computed in another way.

        Args:
            implementation: as `ModelConfig.implementation`; None: the fastest that serves.

        Raises:
            ValueError: there is no implementation of this name.
        """
        return self._with_config(implementation=implementation)

    def _with_config(self, **changes: Any) -> Self:
        """Shares the parameters with a model of a config changed so that it has the same ones."""
        config = dataclasses.replace(self.config, **changes)
        graph, _ = abstract_model(config, type(self))
        return cast(Self, nnx.merge(graph, nnx.state(self)))

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[..., hidden_size], as `hidden_states` gives it -> [..., vocab_size] float32."""
        if not self.config.tie_embeddings:
            return self.head(hidden)
        dtype = jnp.dtype(self.config.dtype)
        return jnp.einsum(
            "...d,vd->...v",
            hidden.astype(dtype),
            self.embed.embedding[...].astype(dtype),
            preferred_element_type=jnp.float32,
        )

    def init_cache(self, batch_size: int, *, max_length: int | None = None) -> ModelCache:
        """The cache of rows without a token; max_length as for `prefill`.

        On a mesh (`jax.set_mesh`) rows and heads are divided as `nha_jax.ops.use_mesh_axes` says.

        Raises:
            ValueError: max_length is missing though a layer has full attention.
        """
        self._check_room(max_length, 0)
        division = divide_over_mesh(batch_size, self.config.num_kv_heads)

        def layer(window_size: int | None) -> LayerCache:
            cache = self.blocks.attention.init_cache(
                batch_size, window_size=window_size, max_length=max_length
            )
            taps = jax.tree.map(lambda _: division.tokens, cache.convolution)
            return division.place(cache, LayerCache(division.state, taps))

        return ModelCache(tuple(map(layer, self.config.windows)), jnp.zeros(batch_size, jnp.int32))

    def prefill(
        self,
        tokens: jax.Array,
        *,
        lengths: jax.typing.ArrayLike | None = None,
        max_length: int | None = None,
        cache: ModelCache | None = None,
    ) -> tuple[jax.Array, ModelCache]:
        """Reads the prompts, or a chunk of each; then `decode_step` continues them.

        Args:
            tokens: [B, T] integers; row b has its lengths[b] tokens first, then anything.
            lengths: [B] integers in [1, T], or in [0, T] with a cache: a row without tokens stays
                as it is, and its logits mean nothing. None: all rows have T tokens.
            max_length: the longest a row will become, prompt included. Needed for, and used by,
                layers with full attention only; the others never run out of room.
            cache: of the tokens before, as `init_cache`, this method or `decode_step` returned it;
                it brings its own max_length. None: there are none.

        Returns:
            logits of the token after each row's last, [B, vocab_size] float32, and the cache.

        Raises:
            ValueError, TypeError: an argument has a wrong shape, dtype or value.
        """
        tokens = check_integers("tokens", tokens)
        if tokens.ndim != 2 or not tokens.shape[1]:
            raise ValueError(f"tokens must be [batch, time], time >= 1; got shape {tokens.shape}")
        batch_size, num_tokens = tokens.shape
        row_lengths = None
        if lengths is not None:
            least = 1 if cache is None else 0
            row_lengths = check_lengths(lengths, batch_size, num_tokens, least)
        if cache is None:
            self._check_room(max_length, num_tokens)
            rope = self._rope(jnp.arange(num_tokens))
        else:
            self._check_cache(cache, max_length, batch_size)
            rope = self._rope(cache.length[:, None] + jnp.arange(num_tokens))

        def prefill(
            block: Block, hidden: jax.Array, cache: LayerCache | None, window_size: int | None
        ):
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
        hidden, caches = scan_blocks(
            prefill, self.blocks, self.embed_tokens(tokens), self.config.window_period, caches
        )
        if row_lengths is None:
            row_lengths = jnp.full(batch_size, num_tokens, jnp.int32)
        last = jnp.maximum(row_lengths[:, None, None] - 1, 0)
        hidden = jnp.take_along_axis(hidden, last, axis=1)  # [B, T, hidden] -> [B, 1, hidden]
        length = row_lengths if cache is None else cache.length + row_lengths
        layers = unstack_layers(caches, self.config.num_layers // period)
        return self.logits(self.norm(hidden))[:, 0], ModelCache(layers, length)

    def decode_step(
        self, tokens: jax.Array, cache: ModelCache, *, active: jax.Array | None = None
    ) -> tuple[jax.Array, ModelCache]:
        """One more token a row.

        Args:
            tokens: [B] integers, the next token of each row.
            cache: as `prefill` or this method returned it. With full attention in a layer, no
                row's length may pass the max_length given to `prefill`: past it the oldest
                tokens would be overwritten.
            active: [B] bool; a row that is False keeps its cache, and its logits mean nothing.

        Returns:
            logits of the token after it, [B, vocab_size] float32, and the cache.

        Raises:
            ValueError, TypeError: tokens have a wrong shape or dtype.
        """
        tokens = check_integers("tokens", tokens)
        if tokens.shape != cache.length.shape:
            raise ValueError(
                f"tokens must be [batch] as in the cache, {cache.length.shape}; "
                f"got shape {tokens.shape}"
            )
        rope = self._rope(cache.length[:, None])
        hidden, layers = self.embed_tokens(tokens[:, None]), []
        # No scan over the layers: it would copy every cache into and out of its stack.
        for index, (layer, window_size) in enumerate(
            zip(cache.layers, self.config.windows, strict=True)
        ):
            hidden, layer = block_of_layer(self.blocks, index).decode_step(
                hidden, layer, window_size=window_size, rope=rope, active=active
            )
            layers.append(layer)
        length = cache.length + (1 if active is None else active.astype(jnp.int32))
        return self.logits(self.norm(hidden))[:, 0], ModelCache(tuple(layers), length)

    def _check_room(self, max_length: int | None, num_tokens: int) -> None:
        if None in self.config.windows and (max_length is None or max_length < num_tokens):
            raise ValueError(
                f"max_length={max_length}: layers with full attention (window None) keep every "
                f"token; give the longest a row will become, at least the prompt's {num_tokens}"
            )

    def _check_cache(self, cache: ModelCache, max_length: int | None, batch_size: int) -> None:
        if max_length is not None:
            raise ValueError(
                f"max_length={max_length}: the cache has its own; leave it out with a cache"
            )
        if cache.length.shape != (batch_size,):
            raise ValueError(
                f"tokens have {batch_size} rows, but the cache {cache.length.shape[0]}"
            )

    def _rope(self, positions: jax.Array) -> Rope:
        """One pair of tables for all layers."""
        config = self.config
        return rope_tables(positions, config.key_dim, config.rope_theta, config.rope_scaling)

    def _forward(
        self,
        tokens: jax.Array,
        segment_ids: jax.Array | None,
        positions: jax.Array | None,
        *,
        diagnose: SlotWeightGradient | None,
    ) -> tuple[jax.Array, tuple[LayerDiagnostics | None, ...]]:
        """What the head reads, and of each layer of the window period, stacked, what it did.

        diagnose: how the slot weights are differentiated; None: nobody asks what the layers did.
        """
        tokens = check_integers("tokens", tokens)
        if tokens.ndim != 2:
            raise ValueError(f"tokens must be [batch, time], got shape {tokens.shape}")
        segment_ids, positions = check_segments_and_positions(tokens.shape, segment_ids, positions)
        rope = self._rope(positions)

        def forward(block: Block, hidden: jax.Array, cache: None, window_size: int | None):
            return block.forward(
                hidden,
                window_size=window_size,
                rope=rope,
                segment_ids=segment_ids,
                diagnose=diagnose,
            )

        hidden, layers = scan_blocks(
            forward,
            self.blocks,
            self.embed_tokens(tokens),
            self.config.window_period,
            remat=self.config.remat,
        )
        return self.norm(hidden), layers


def abstract_model(
    config: ModelConfig, kind: type[Model] = Model
) -> tuple[nnx.GraphDef[Model], nnx.State]:
    """The model of a config without its numbers: nothing is computed or allocated.

    Args:
        config: of the model.
        kind: `Model`, or a subclass of it.

    Returns:
        The graph and the state, each of whose variables holds a `jax.ShapeDtypeStruct`.
        `nnx.merge(graph, state)` with arrays in their place is a model.
    """
    # jax's eval_shape: under a mesh, nnx's would look for the logical axes among the mesh's.
    return jax.eval_shape(lambda: nnx.split(kind(config, rngs=nnx.Rngs(0))))
