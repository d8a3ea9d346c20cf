"""`NHAttention`: the attention layer of the models, and of anyone's own Transformer."""

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx

from nha_jax.argument_checks import (
    check_cache,
    check_count,
    check_hidden,
    check_lengths,
    check_room,
    check_segments_and_positions,
)
from nha_jax.compiled import compiled
from nha_jax.config_parts import RopeScaling
from nha_jax.layer_config import AttentionBias, LayerConfig, ValueActivation
from nha_jax.layers import specs
from nha_jax.layers.attention_core import AttentionCore, LayerCache, LayerDiagnostics
from nha_jax.ops import KernelOptions, Rope, SlotWeightGradient, rope_tables
from nha_jax.ops.mesh.division import divide_over_mesh
from nha_jax.ops.mesh.explicit import with_auto_axes
from nha_jax.ops.padding import clear_padding
from nha_jax.ops.types import EmptySlots, SlotFeatureMap, check_choices


class NHAttention(AttentionCore):
    """The layer of Native Hybrid Attention (Du et al., arXiv 2510.07019), in a model or alone.

        query, key, value = conv(q_proj(x)), conv(k_proj(x)), silu(conv(v_proj(x)))
        log_decay = logsigmoid(f_proj(x)) / gate_logit_normalizer
        result = o_proj(RMSNorm(silu(nha_attention(query, key, value, log_decay))))

    conv is the short convolution, or the identity with conv_width=0; the decays are computed in
    float32, and the norm runs over all heads together. This is the published layer;
    value_activation, output_norm, qk_norm and attention_bias turn it into the attention of a
    pretrained model whose weights it takes over.

        layer = NHAttention(512, 8, window_size=64, rngs=nnx.Rngs(0))
        outputs = layer(x)  # [B, T, 512] -> [B, T, 512]
        outputs, cache = layer.prefill(x[:, :-1])
        last, cache = layer.decode_step(x[:, -1:], cache)  # [B, 1, 512], as outputs[:, -1:] of x

    It is causal, and adds no residual and no norm of its input. No mesh is needed; for those who
    have one, parameters name their axes (`nha_jax.layers.LOGICAL_AXES`), which
    `nha_jax.sharding.named_shardings` reads. `layer.config` has the arguments, all filled in.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        key_dim: int | None = None,
        value_dim: int | None = None,
        num_slots: int = 64,
        window_size: int | None = 64,
        conv_width: int = 4,
        gate_logit_normalizer: float = 8.0,
        value_activation: ValueActivation = "silu",
        output_norm: bool = True,
        output_norm_eps: float | None = None,
        qk_norm: bool = False,
        attention_scale: float | None = None,
        attention_bias: AttentionBias = "none",
        rope_theta: float | None = 10000.0,
        rope_scaling: RopeScaling | None = None,
        norm_eps: float = 1e-6,
        slot_feature_map: SlotFeatureMap = "identity",
        slot_delay: int | None = None,
        empty_slots: EmptySlots = "attend",
        initializer_range: float = 0.02,
        dtype: jax.typing.DTypeLike = "float32",
        param_dtype: jax.typing.DTypeLike = "float32",
        implementation: str | None = None,
        kernel_options: KernelOptions | None = None,
        rngs: nnx.Rngs,
    ):
        """Makes a layer with random parameters, in param_dtype, on the default device.

        The projections are normal with the standard deviation initializer_range, norms are 1,
        biases 0, and the taps of the convolutions uniform within +-1/sqrt(conv_width).

        Args:
            hidden_size: width of its inputs and outputs.
            num_heads: query heads (Hq).
            num_kv_heads: key/value heads (Hkv), each shared by Hq / Hkv query heads; None for Hq.
            key_dim: size of a head's query and key (K); even, unless rope_theta is None. None for
                hidden_size / num_heads.
            value_dim: size of a head's value (V); None for key_dim.
            num_slots: slots per key/value head (M); with 0 the window alone is read.
            window_size: how many of the last tokens are kept exactly (W): 0 for slots alone, None
                for full attention. No parameter depends on it: see `with_window`.
            conv_width: taps of the short convolution on query, key and value; 0 for no convolution.
            gate_logit_normalizer: divides the logarithm of the gate.
            value_activation: "silu" or "identity", applied to the value before it is attended to or
                enters the slots.
            output_norm: whether the layer gives o_proj(RMSNorm(silu(o))) rather than o_proj(o).
            output_norm_eps: added to the mean square there; None for norm_eps.
            qk_norm: whether each head's query and key first go through an RMSNorm of their own.
            attention_scale: multiplies the attention's logits; None for key_dim ** -0.5.
            attention_bias: which projections have a bias: "none"; "qkv", those of query, key and
                value; "all", that of the output too. The gate's never has one.
            rope_theta: base of the rotary embedding of the window's queries and keys; None: the
                layer rotates nothing by itself.
            rope_scaling: how its frequencies were changed for a longer context, as
                `nha_jax.config_parts.RopeScaling` or a mapping of its fields.
            norm_eps: added to the mean square in every RMSNorm.
            slot_feature_map, slot_delay, empty_slots, implementation, kernel_options: as for
                `nha_jax.nha_attention`; decode steps take the implementation too.
            initializer_range: standard deviation of the projections at the start.
            dtype: "float32" or "bfloat16", of the computation; norms, softmax and decays are
                float32 in any case.
            param_dtype: "float32" or "bfloat16", of the parameters.
            rngs: the random numbers, of which the stream "params" is taken, or the default one:
                `nnx.Rngs(0)`. Nothing else is random.

        Raises:
            ValueError: an argument is out of its range or does not fit another; one line names the
                argument, its value and the fix.
            AttributeError: rngs has neither of the two streams.
        """
        config = LayerConfig(
            hidden_size=hidden_size,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            key_dim=key_dim,
            value_dim=value_dim,
            num_slots=num_slots,
            window_size=window_size,
            conv_width=conv_width,
            gate_logit_normalizer=gate_logit_normalizer,
            value_activation=value_activation,
            output_norm=output_norm,
            output_norm_eps=output_norm_eps,
            qk_norm=qk_norm,
            attention_scale=attention_scale,
            attention_bias=attention_bias,
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            norm_eps=norm_eps,
            slot_feature_map=slot_feature_map,
            slot_delay=slot_delay,
            empty_slots=empty_slots,
            initializer_range=initializer_range,
            dtype=dtype,
            param_dtype=param_dtype,
            implementation=implementation,
            kernel_options=kernel_options,
        )
        super().__init__(config, rngs=rngs)

    @with_auto_axes(specs.of_outputs)
    def __call__(
        self,
        inputs: jax.Array,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
        *,
        rope: Rope | None = None,
    ) -> jax.Array:
        """Runs the layer on whole sequences.

        Args:
            inputs: [B, T, hidden_size], of any floating dtype. A single sequence is `x[None]`.
            segment_ids: [B, T] integers. Adjacent tokens of equal ids make up a segment, and see
                only their own. 0 is padding: it may hold anything, and its outputs are o_proj(0).
                None: one segment.
            positions: [T] or [B, T] integers for the rotary embedding; None: counted from the
                first token of each segment.
            rope: tables (cos, sin) of your own in place of the layer's, each [T, K/2] or
                [B, T, K/2], as `nha_jax.ops.rope_tables` makes them.

        Returns:
            [B, T, hidden_size] in the layer's dtype.

        Raises:
            ValueError, TypeError: an argument has a wrong shape or dtype; the message names it.
            NotImplementedError: the implementation named cannot serve; the message says why.
        """
        arguments = self._checked(inputs, segment_ids, positions, rope)
        outputs, _ = self._forward(*arguments, diagnose=None)
        return outputs

    @with_auto_axes(specs.of_diagnosed)
    def diagnose(
        self,
        inputs: jax.Array,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
        *,
        rope: Rope | None = None,
        slot_weight_gradient: SlotWeightGradient = "all",
    ) -> tuple[jax.Array, LayerDiagnostics]:
        """Returns what a call returns, and the softmax mass on the slots and the gates with it.

        The other arguments and errors are those of a call; slot_weight_gradient is as for
        `nha_jax.nha_attention`.
        """
        check_choices(slot_weight_gradient=slot_weight_gradient)
        arguments = self._checked(inputs, segment_ids, positions, rope)
        return self._forward(*arguments, diagnose=slot_weight_gradient)

    @with_auto_axes(specs.of_cache)
    def init_cache(self, batch_size: int, *, max_length: int | None = None) -> LayerCache:
        """Makes the cache of rows without a token.

        With a finite window its size never grows, and depends on no length.

        Args:
            batch_size: number of rows (B).
            max_length: the most tokens that a row will have; a layer with window_size=None needs
                it, and no other uses it.

        Raises:
            ValueError: max_length is missing though the layer needs it, or one is below 1.
        """
        batch_size = check_count("batch_size", batch_size)
        window_size = self.config.window_size
        check_room((window_size,), max_length, 0)
        cache = self.new_cache(batch_size, window_size=window_size, max_length=max_length)
        division = divide_over_mesh(batch_size, self.config.num_kv_heads)
        return division.place(cache, specs.divided_cache(cache, division))

    @with_auto_axes(specs.of_step)
    def prefill(
        self,
        inputs: jax.Array,
        *,
        lengths: jax.typing.ArrayLike | None = None,
        max_length: int | None = None,
        cache: LayerCache | None = None,
        positions: jax.Array | None = None,
        rope: Rope | None = None,
    ) -> tuple[jax.Array, LayerCache]:
        """Reads prompts, or a chunk of each, for `decode_step` to continue.

        Args:
            inputs: [B, T, hidden_size]; the first lengths[b] tokens of row b are read, and the
                rest may be anything.
            lengths: [B] integers in [1, T]; with a cache in [0, T]. None: all rows have T tokens.
            max_length: the most tokens that a row will have, these included. Only a layer with
                window_size=None needs and uses it.
            cache: of the tokens before, as `init_cache`, this method or `decode_step` returned it;
                it has its own max_length. None: there are none.
            positions, rope: as for a call; left out, positions go on from the cache.

        Returns:
            [B, T, hidden_size] in the layer's dtype, without meaning behind a row's length, and the
            cache after each row's last token.

        Raises:
            ValueError, TypeError: an argument has a wrong shape, dtype or value.
            NotImplementedError: the implementation named cannot serve; the message says why.
        """
        inputs, _, positions, rope = self._checked(inputs, None, positions, rope, cache, max_length)
        batch_size, num_tokens, _ = inputs.shape
        if lengths is not None:
            lengths = check_lengths(lengths, batch_size, num_tokens, least=int(cache is None))
        if cache is None:
            check_room((self.config.window_size,), max_length, num_tokens)
        if self.config.window_size is not None:
            max_length = None  # one program serves all
        return self._prefill(inputs, lengths, cache, positions, rope, max_length=max_length)

    @with_auto_axes(specs.of_step)
    def decode_step(
        self,
        inputs: jax.Array,
        cache: LayerCache,
        *,
        active: jax.Array | None = None,
        positions: jax.Array | None = None,
        rope: Rope | None = None,
    ) -> tuple[jax.Array, LayerCache]:
        """Reads one more token of each row.

        Args:
            inputs: [B, 1, hidden_size].
            cache: as `prefill`, `init_cache` or this method returned it. With window_size=None no
                row may get longer than its max_length: the oldest tokens would be overwritten.
            active: [B] bool; rows where it is False keep their cache, and their outputs have no
                meaning. None: all are active.
            positions, rope: as for a call; left out, positions go on from the cache.

        Returns:
            [B, 1, hidden_size] in the layer's dtype, and the cache.

        Raises:
            ValueError, TypeError: an argument has a wrong shape, dtype or value.
            NotImplementedError: the implementation named cannot serve; the message says why.
        """
        inputs, _, positions, rope = self._checked(inputs, None, positions, rope, cache)
        if inputs.shape[1] != 1:
            raise ValueError(f"inputs must be one token of each row, got shape {inputs.shape}")
        return self._decode_step(inputs, cache, active, positions, rope)

    def with_window(self, window_size: int | None) -> Self:
        """Returns the layer with another window; the parameters are shared, not copied.

        Raises:
            ValueError: window_size is out of its range.
        """
        layer = nnx.merge(*nnx.split(self))
        layer.config = dataclasses.replace(self.config, window_size=window_size)
        return layer

    @compiled("diagnose")
    def _forward(
        self,
        inputs: jax.Array,
        segment_ids: jax.Array | None,
        positions: jax.Array | None,
        rope: Rope | None,
        *,
        diagnose: SlotWeightGradient | None,
    ) -> tuple[jax.Array, Any]:
        """Does what `diagnose` does, of checked arguments; None: without diagnostics."""
        if segment_ids is not None:
            inputs = clear_padding(segment_ids, inputs)
        return self.forward(
            inputs,
            window_size=self.config.window_size,
            rope=self._tables(positions, rope),
            segment_ids=segment_ids,
            diagnose=diagnose,
        )

    @compiled("max_length")
    def _prefill(
        self,
        inputs: jax.Array,
        lengths: jax.Array | None,
        cache: LayerCache | None,
        positions: jax.Array | None,
        rope: Rope | None,
        *,
        max_length: int | None,
    ) -> tuple[jax.Array, LayerCache]:
        """Does what `prefill` does, of checked arguments."""
        if lengths is not None:
            real = jnp.arange(inputs.shape[1], dtype=jnp.int32)[None] < lengths[:, None]
            inputs = clear_padding(real.astype(jnp.int32), inputs)
        return self.forward_prompt(
            inputs,
            window_size=self.config.window_size,
            rope=self._tables(positions, rope),
            lengths=lengths,
            max_length=max_length,
            cache=cache,
        )

    @compiled()
    def _decode_step(
        self,
        inputs: jax.Array,
        cache: LayerCache,
        active: jax.Array | None,
        positions: jax.Array | None,
        rope: Rope | None,
    ) -> tuple[jax.Array, LayerCache]:
        """Does what `decode_step` does, of checked arguments."""
        return self.forward_token(
            inputs,
            cache,
            window_size=self.config.window_size,
            rope=self._tables(positions, rope),
            active=active,
        )

    def _checked(
        self,
        inputs: jax.Array,
        segment_ids: jax.Array | None,
        positions: jax.Array | None,
        rope: Rope | None,
        cache: LayerCache | None = None,
        max_length: int | None = None,
    ) -> tuple[jax.Array, jax.Array | None, jax.Array | None, Rope | None]:
        """Checks the arguments of a call, and fills in the positions that its tables need."""
        inputs = check_hidden("inputs", inputs, self.config.hidden_size)
        rotates = rope is None and self.config.rope_theta is not None
        if positions is not None and not rotates:
            why = "rope is given" if rope is not None else "the layer has rope_theta=None"
            raise ValueError(f"positions make the layer's rotary tables, but {why}: leave them out")
        if cache is not None:
            before = cache.attention.length
            check_cache(before.shape[0], max_length, inputs.shape[0], "inputs")
            if positions is None:
                positions = before[:, None] + jnp.arange(inputs.shape[1], dtype=jnp.int32)[None]
        segment_ids, positions = check_segments_and_positions(
            inputs.shape[:2], segment_ids, positions
        )
        return inputs, segment_ids, positions if rotates else None, rope

    def _tables(self, positions: jax.Array | None, rope: Rope | None) -> Rope | None:
        """Makes the rotary tables of a call, if it has none of its own."""
        config = self.config
        if positions is None or config.rope_theta is None:
            return rope
        return rope_tables(positions, config.key_dim, config.rope_theta, config.rope_scaling)
