"""The attention layer as a model runs it: window and rotary tables are arguments of each call.

Here are its parameters and its arithmetic. `nha_jax.layers.attention` makes them a layer that
stands by itself.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from nha_jax.layer_config import LayerConfig
from nha_jax.layers.convolution import ShortConvolution
from nha_jax.layers.parameters import rms_norm
from nha_jax.layers.projection import linear
from nha_jax.ops import (
    NHAState,
    Rope,
    SlotWeightGradient,
    decode_step,
    init_state,
    nha_attention,
    resize_state,
)
from nha_jax.ops.mesh.division import shard_tokens

Projections = tuple[jax.Array, jax.Array, jax.Array]


class ConvolutionState(NamedTuple):
    """The last conv_width - 1 inputs of the short convolutions, oldest first, in config.dtype."""

    query: jax.Array  # [B, conv_width - 1, Hq * K]
    key: jax.Array  # [B, conv_width - 1, Hkv * K]
    value: jax.Array  # [B, conv_width - 1, Hkv * V]


class LayerCache(NamedTuple):
    """What one layer keeps of the tokens so far, for the next prefill or decode step."""

    attention: NHAState
    convolution: ConvolutionState | None  # None: the layer has no short convolution


class LayerDiagnostics(NamedTuple):
    """What one layer did with its tokens, as `nha_jax.Diagnostics` holds it for all layers.

    Entries of `log_decay` at padding have no meaning.
    """

    slot_weight: jax.Array  # [B, T, Hq] float32, the softmax mass on the slots; 0 at padding
    log_decay: jax.Array  # [B, T, Hkv, M] float32, natural log of the gate


class AttentionCore(nnx.Module):
    """What `nha_jax.NHAttention` is made of and computes, whose docstring says what that is.

    Its methods check nothing, and take the window and the rotary tables, which the layers of a
    model share and which no parameter depends on.
    """

    def __init__(self, config: LayerConfig, *, rngs: nnx.Rngs):
        """Makes the parameters at random; `nha_jax.NHAttention` says how."""
        self.config = config
        hidden = config.hidden_size
        query_size = config.num_heads * config.key_dim
        key_size = config.num_kv_heads * config.key_dim
        value_size = config.num_kv_heads * config.value_dim
        slot_size = config.num_kv_heads * config.num_slots
        output_size = config.num_heads * config.value_dim
        bias = config.attention_bias != "none"
        kv_axes = ("embed", "kv_heads")
        self.q_proj = linear(
            config, hidden, query_size, ("embed", "heads"), use_bias=bias, rngs=rngs
        )
        self.k_proj = linear(config, hidden, key_size, kv_axes, use_bias=bias, rngs=rngs)
        self.v_proj = linear(config, hidden, value_size, kv_axes, use_bias=bias, rngs=rngs)
        if config.num_slots:
            self.f_proj = linear(
                config,
                hidden,
                slot_size,
                kv_axes,
                rngs=rngs,
                preferred_element_type=jnp.float32,
            )
        if config.conv_width:
            self.q_conv = ShortConvolution(config, query_size, "heads", rngs=rngs)
            self.k_conv = ShortConvolution(config, key_size, "kv_heads", rngs=rngs)
            self.v_conv = ShortConvolution(config, value_size, "kv_heads", rngs=rngs)
        if config.qk_norm:
            self.q_norm = rms_norm(config, config.key_dim, "norm", rngs=rngs)
            self.k_norm = rms_norm(config, config.key_dim, "norm", rngs=rngs)
        if config.output_norm:
            eps = config.output_norm_eps
            self.o_norm = rms_norm(config, output_size, "heads", eps=eps, rngs=rngs)
        self.o_proj = linear(
            config,
            output_size,
            hidden,
            ("heads", "embed"),
            use_bias=config.attention_bias == "all",
            rngs=rngs,
        )

    def forward(
        self,
        inputs: jax.Array,
        *,
        window_size: int | None,
        rope: Rope | None,
        segment_ids: jax.Array | None,
        diagnose: SlotWeightGradient | None,
    ) -> tuple[jax.Array, LayerDiagnostics | None]:
        """Runs the layer on whole sequences.

        Args:
            inputs: [B, T, hidden_size], of any floating dtype; padding must be finite.
            window_size: how many of the last tokens are kept exactly (W); None for full attention.
            rope: the tables of the rotary embedding at the tokens' positions, as
                `nha_jax.ops.rope_tables` makes them; None: nothing is rotated.
            segment_ids: [B, T] integers, as for `nha_jax.nha_attention`. None: one segment.
            diagnose: how the slot weight is differentiated, as `nha_attention`'s
                slot_weight_gradient; None: no diagnostics, the second result is None.

        Returns:
            [B, T, hidden_size] in config.dtype, o_proj(0) at padding, and what the layer did.

        Raises:
            ValueError, TypeError, NotImplementedError: as `nha_jax.nha_attention`.
        """
        operator = self._operator(window_size=window_size, rope=rope, segment_ids=segment_ids)
        heads = self._heads(*self._convolve(self._projections(inputs), segment_ids))
        log_decay = self._log_decay(inputs)
        if diagnose is None:
            return self._output(operator(*heads, log_decay)), None
        attended, _, slot_weight = operator(
            *heads, log_decay, return_slot_weight=True, slot_weight_gradient=diagnose
        )
        return self._output(attended), LayerDiagnostics(slot_weight, log_decay)

    def forward_prompt(
        self,
        inputs: jax.Array,
        *,
        window_size: int | None,
        rope: Rope | None,
        lengths: jax.Array | None = None,
        max_length: int | None = None,
        cache: LayerCache | None = None,
    ) -> tuple[jax.Array, LayerCache]:
        """Runs the layer on prompts, and returns the cache after each row's last token too.

        Args:
            inputs: [B, T, hidden_size], the rows padded on the right.
            window_size, rope: as for `forward`.
            lengths: [B] integers, the number of tokens in each row; None: all T.
            max_length: how many tokens the cache of a layer with window_size=None holds; None: as
                many as `cache` does, or T without one.
            cache: of the tokens before these; None: there are none.

        Returns:
            [B, T, hidden_size] in config.dtype, and the cache.
        """
        batch_size, num_tokens, _ = inputs.shape
        segment_ids = None
        if lengths is None:
            lengths = jnp.full(batch_size, num_tokens, jnp.int32)
        else:
            real = jnp.arange(num_tokens, dtype=jnp.int32)[None] < lengths[:, None]
            segment_ids = real.astype(jnp.int32)
        projections = self._projections(inputs)
        convolution = None
        taps: tuple[jax.Array | None, ...] = (None,) * 3
        if self.config.conv_width:
            if cache is not None:
                taps = cache.convolution or taps
            convolution = ConvolutionState(
                *(
                    conv.state_after(projection, lengths, before)
                    for conv, projection, before in zip(
                        self._convolutions(), projections, taps, strict=True
                    )
                )
            )
        projections = self._convolve(projections, segment_ids, taps)
        operator = self._operator(window_size=window_size, rope=rope, segment_ids=segment_ids)
        attended, state, _ = operator(
            *self._heads(*projections),
            self._log_decay(inputs),
            initial_state=None if cache is None else cache.attention,
            return_state=True,
        )
        if window_size is None:
            room = num_tokens if cache is None else cache.attention.capacity
            state = resize_state(state, room if max_length is None else max_length)
        return self._output(attended), LayerCache(state, convolution)

    def new_cache(
        self, batch_size: int, *, window_size: int | None, max_length: int | None
    ) -> LayerCache:
        """Makes the cache of rows without a token; window_size and max_length as above."""
        config = self.config
        dtype = jnp.dtype(config.dtype)
        state = init_state(
            batch_size,
            num_kv_heads=config.num_kv_heads,
            num_slots=config.num_slots,
            key_dim=config.key_dim,
            value_dim=config.value_dim,
            window_size=window_size,
            dtype=dtype,
            max_length=max_length,
        )
        if not config.conv_width:
            return LayerCache(state, None)
        taps = (
            jnp.zeros((batch_size, config.conv_width - 1, conv.channels), dtype)
            for conv in self._convolutions()
        )
        return LayerCache(state, ConvolutionState(*taps))

    def forward_token(
        self,
        inputs: jax.Array,
        cache: LayerCache,
        *,
        window_size: int | None,
        rope: Rope | None,
        active: jax.Array | None = None,
    ) -> tuple[jax.Array, LayerCache]:
        """Runs the layer on one more token of each row.

        Args:
            inputs: [B, 1, hidden_size].
            cache: as `forward_prompt`, `new_cache` or this method returned it.
            window_size, rope: as for `forward`.
            active: [B] bool; rows where it is False keep their cache. None: all are active.

        Returns:
            [B, 1, hidden_size] in config.dtype, and the cache.
        """
        projections = self._projections(inputs)
        convolution = cache.convolution
        if convolution is not None:
            steps = [
                conv.decode_step(projection, state)
                for conv, projection, state in zip(
                    self._convolutions(), projections, convolution, strict=True
                )
            ]
            query, key, value = (output for output, _ in steps)
            projections = query, key, value
            convolution = ConvolutionState(*(state for _, state in steps))
            if active is not None:
                convolution = jax.tree.map(
                    lambda new, old: jnp.where(active[:, None, None], new, old),
                    convolution,
                    cache.convolution,
                )
        attended, state = decode_step(
            *self._heads(*projections),
            self._log_decay(inputs),
            cache.attention,
            window_size=window_size,
            rope=rope,
            scale=self.config.attention_scale,
            slot_feature_map=self.config.slot_feature_map,
            slot_delay=self.config.slot_delay,
            empty_slots=self.config.empty_slots,
            active=active,
            implementation=self.config.implementation,
        )
        return self._output(attended), LayerCache(state, convolution)

    def _projections(self, inputs: jax.Array) -> Projections:
        query = shard_tokens(self.q_proj(inputs), heads=self.config.num_heads)
        key, value = (
            shard_tokens(project(inputs), heads=self.config.num_kv_heads)
            for project in (self.k_proj, self.v_proj)
        )
        return query, key, value

    def _convolutions(self) -> tuple[ShortConvolution, ShortConvolution, ShortConvolution]:
        return self.q_conv, self.k_conv, self.v_conv

    def _convolve(
        self,
        projections: Projections,
        segment_ids: jax.Array | None,
        taps: Sequence[jax.Array | None] = (None, None, None),
    ) -> Projections:
        if not self.config.conv_width:
            return projections
        query, key, value = (
            conv(projection, segment_ids, before)
            for conv, projection, before in zip(
                self._convolutions(), projections, taps, strict=True
            )
        )
        return query, key, value

    def _heads(self, query: jax.Array, key: jax.Array, value: jax.Array) -> Projections:
        """Splits heads: [B, T, heads * size] -> [B, T, heads, size]; norms and activates them."""
        config, leading = self.config, query.shape[:-1]
        query = query.reshape(*leading, config.num_heads, config.key_dim)
        key = key.reshape(*leading, config.num_kv_heads, config.key_dim)
        value = value.reshape(*leading, config.num_kv_heads, config.value_dim)
        if config.qk_norm:
            query = self.q_norm(query).astype(query.dtype)
            key = self.k_norm(key).astype(key.dtype)
        return query, key, jax.nn.silu(value) if config.value_activation == "silu" else value

    def _operator(
        self, *, window_size: int | None, rope: Rope | None, segment_ids: jax.Array | None
    ) -> Callable[..., Any]:
        """Returns `nha_attention` with every option of this layer and call filled in."""
        return functools.partial(
            nha_attention,
            window_size=window_size,
            rope=rope,
            segment_ids=segment_ids,
            scale=self.config.attention_scale,
            slot_feature_map=self.config.slot_feature_map,
            slot_delay=self.config.slot_delay,
            empty_slots=self.config.empty_slots,
            implementation=self.config.implementation,
            kernel_options=self.config.kernel_options,
        )

    def _log_decay(self, inputs: jax.Array) -> jax.Array:
        """Computes the log decays, below 0: [B, T, hidden_size] -> [B, T, Hkv, M] float32."""
        shape = (*inputs.shape[:-1], self.config.num_kv_heads, self.config.num_slots)
        if not self.config.num_slots:
            return jnp.zeros(shape, jnp.float32)
        logits = self.f_proj(inputs).astype(jnp.float32).reshape(shape)
        return jax.nn.log_sigmoid(logits) / self.config.gate_logit_normalizer

    def _output(self, attended: jax.Array) -> jax.Array:
        """Applies silu, norm and output projection: [B, T, Hq, V] -> [B, T, hidden_size]."""
        outputs = attended.reshape(*attended.shape[:-2], -1)
        return self.o_proj(
            self.o_norm(jax.nn.silu(outputs)) if self.config.output_norm else outputs
        )
