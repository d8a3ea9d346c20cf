"""Short causal convolution over time, with a filter for each channel."""

import jax
import jax.numpy as jnp
from flax import nnx

from nha_jax.layer_config import LayerFields
from nha_jax.layers.parameters import partitioned
from nha_jax.ops.padding import clear_padding


class ShortConvolution(nnx.Module):
    """y_t = silu(sum_i kernel[i] * x_{t - width + 1 + i}), for each channel by itself.

    The kernel is [width, channels]. A tap that would reach into another segment, or before the
    first token, reads zero.
    """

    def __init__(self, config: LayerFields, channels: int, name: str, *, rngs: nnx.Rngs):
        """Makes the filters at random, uniform within +-1/sqrt(width), in config.param_dtype.

        Args:
            config: of the model or the attention layer, whose conv_width is the width.
            channels: how many filters there are.
            name: the logical name of the kernel's second axis.
            rngs: the random numbers, as for `NHAttention`.
        """
        self.width, self.channels = config.conv_width, channels
        # The usual start of a filter with `width` inputs.
        initializer = jax.nn.initializers.variance_scaling(
            1 / 3, "fan_in", "uniform", in_axis=0, out_axis=1
        )
        shape = (self.width, channels)
        kernel = partitioned(initializer, "conv", name)(
            rngs.params(), shape, jnp.dtype(config.param_dtype)
        )
        self.kernel = nnx.Param(kernel)

    def __call__(
        self,
        inputs: jax.Array,
        segment_ids: jax.Array | None = None,
        state: jax.Array | None = None,
    ) -> jax.Array:
        """Convolves a sequence.

        Args:
            inputs: [B, T, channels].
            segment_ids: [B, T] integers; 0 is padding, whose output is 0 whatever it holds. None:
                one segment.
            state: [B, width - 1, channels], the inputs before these, as `state_after` returned
                them; they belong to segment 1. None: there are none.

        Returns:
            [B, T, channels] in the inputs' dtype.
        """
        if state is not None:
            if segment_ids is not None:
                before = jnp.ones(state.shape[:2], segment_ids.dtype)
                segment_ids = jnp.concatenate([before, segment_ids], axis=1)
            joined = jnp.concatenate([state, inputs], axis=1)
            return self(joined, segment_ids)[:, self.width - 1 :]
        kernel = self.kernel[...].astype(jnp.float32)[:, None, None]  # [width, 1, 1, channels]
        if segment_ids is not None:
            inputs = clear_padding(segment_ids, inputs)
        total = inputs.astype(jnp.float32) * kernel[-1]  # [B, T, channels]
        in_segment = None  # [B, T]: whether the tap lies in the token's own segment
        for distance in range(1, self.width):
            tap = _shift(inputs, distance).astype(jnp.float32) * kernel[-1 - distance]
            if segment_ids is not None:
                # Each id between tap and token must equal the one before it: equal ids that are not
                # adjacent make two segments.
                unchanged = _shift(segment_ids == _shift(segment_ids, 1), distance - 1)
                in_segment = unchanged if in_segment is None else in_segment & unchanged
                tap = jnp.where(in_segment[..., None], tap, 0)
            total = total + tap
        outputs = jax.nn.silu(total).astype(inputs.dtype)
        if segment_ids is not None:
            outputs = clear_padding(segment_ids, outputs)
        return outputs

    def state_after(
        self, inputs: jax.Array, lengths: jax.Array, state: jax.Array | None = None
    ) -> jax.Array:
        """Returns the last width - 1 inputs of each row, which `decode_step` needs.

        Args:
            inputs: [B, T, channels], each row one segment padded on the right.
            lengths: [B] integers, the number of tokens in each row.
            state: as this method returned it for the inputs before these; None: there are none.

        Returns:
            [B, width - 1, channels], oldest first; zeros before the first token.
        """
        if state is not None:
            inputs = jnp.concatenate([state, inputs], axis=1)
            lengths = lengths + self.width - 1
        before = jnp.arange(1 - self.width, 0, dtype=jnp.int32)
        index = lengths[:, None] + before[None]  # [B, width - 1]
        taps = jnp.take_along_axis(inputs, jnp.maximum(index, 0)[..., None], axis=1)
        return jnp.where((index >= 0)[..., None], taps, 0)

    def decode_step(self, inputs: jax.Array, state: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Convolves one more token of each row.

        Args:
            inputs: [B, 1, channels].
            state: [B, width - 1, channels], as `state_after` or this method returned it.

        Returns:
            [B, 1, channels] in the inputs' dtype, and the state after the token.
        """
        taps = jnp.concatenate([state, inputs], axis=1)  # [B, width, channels]
        kernel = self.kernel[...].astype(jnp.float32)[None]  # [1, width, channels]
        total = (taps.astype(jnp.float32) * kernel).sum(axis=1, keepdims=True)
        return jax.nn.silu(total).astype(inputs.dtype), taps[:, 1:]


def _shift(array: jax.Array, distance: int) -> jax.Array:
    """Shifts along axis 1: array[:, t - distance] at position t, zero before the first."""
    padding = [(0, 0), (distance, 0)] + [(0, 0)] * (array.ndim - 2)
    return jnp.pad(array, padding)[:, : array.shape[1]]
