"""The decoder-only language model: `Model`, with its forward pass over whole sequences."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx

from nha_jax.argument_checks import (
    check_hidden,
    check_segments_and_positions,
)
from nha_jax.compiled import compiled
from nha_jax.config import ModelConfig
from nha_jax.decoder import Decoder
from nha_jax.layers import Block, LayerDiagnostics
from nha_jax.layers.attention_core import AttentionCore
from nha_jax.layers.diagnostics import Diagnostics
from nha_jax.layers.layer_stack import (
    block_of_layer,
    in_layer_order,
    scan_blocks,
    stacked_blocks,
)
from nha_jax.layers.parameters import normal, rms_norm
from nha_jax.layers.projection import linear
from nha_jax.ops import SlotWeightGradient
from nha_jax.ops.mesh.division import shard_tokens
from nha_jax.ops.mesh.explicit import with_auto_axes
from nha_jax.ops.types import check_choices, check_window_size
from nha_jax.sharding import (
    diagnostics_specs,
    hidden_specs,
    logits_specs,
)
from nha_jax.summary import summary


class Model(Decoder):
    """A language model of Native Hybrid Attention blocks (arXiv 2510.07019).

    embedding -> num_layers blocks -> RMSNorm -> head. The blocks are one stacked module, `blocks`,
    each of whose parameters has a leading axis "layers"; it is the same for all windows. The
    forward scans over the repetitions of the window period, so that the time to compile does not
    grow with depth. Every parameter names its axes (see `nha_jax.layers.LOGICAL_AXES`); no mesh is
    needed to build or to run the model.

        config = ModelConfig.preset("nha-tiny")
        model = Model(config, rngs=nnx.Rngs(0))
        logits = model(tokens)
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        """Makes a model with random parameters, in config.param_dtype, on the default device.

        The embedding and the projections are normal with the standard deviation
        config.initializer_range, which config.mup_base_width changes by the place of each; norms
        are 1, biases 0, and the taps of the convolutions uniform within +-1/sqrt(conv_width).

        Args:
            config: sizes, windows and dtypes; it has checked them itself.
            rngs: the random numbers, of which the stream "params" is taken, or the default one:
                `nnx.Rngs(0)`. Equal seeds give equal parameters. Nothing else is random, so that
                no call of the model needs any.

        Raises:
            AttributeError: rngs has neither of the two streams.
        """
        self.config = config
        self.embed = nnx.Embed(
            config.vocab_size,
            config.hidden_size,
            param_dtype=jnp.dtype(config.param_dtype),
            embedding_init=normal(config, "vocab", "embed"),
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

    def __repr__(self) -> str:
        """Describes the model in a few lines; `print(model.blocks)` shows the modules in it."""
        parameters = jax.tree.leaves(nnx.state(self, nnx.Param))
        return summary(type(self).__name__, self.config, parameters)

    __str__ = __repr__  # nnx has one of its own

    @with_auto_axes(logits_specs)
    def __call__(
        self,
        tokens: jax.Array,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
    ) -> jax.Array:
        """Computes the logits of the token that follows each token.

        Args:
            tokens: [B, T] integers in [0, vocab_size). Any other, above or below, gives NaN there
                and to the rest of its segment, and changes nothing in other segments.
            segment_ids: [B, T] integers. Adjacent tokens of equal ids make up a segment, and see
                only their own. 0 is padding: its tokens may be any integers and change nothing,
                and its logits have no meaning. None: one segment.
            positions: [T] or [B, T] integers for the rotary embedding; None: counted from the
                first token of each segment.

        Returns:
            [B, T, vocab_size] float32.

        Raises:
            ValueError, TypeError: an argument has a wrong shape or dtype; the message names it.
        """
        return self._sharded_logits(self.hidden_states(tokens, segment_ids, positions))

    @compiled()
    def _sharded_logits(self, hidden: jax.Array) -> jax.Array:
        return shard_tokens(self.logits(hidden), heads=self.config.vocab_size)

    @with_auto_axes(hidden_specs)
    def hidden_states(
        self,
        tokens: jax.Array,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
    ) -> jax.Array:
        """Computes the input of the head: [B, T, hidden_size] float32; 0 at padding.

        Arguments as for a call; where a token outside [0, vocab_size) makes logits NaN, it is NaN.
        """
        hidden, _ = self._forward(tokens, segment_ids, positions, diagnose=None)
        return hidden

    @with_auto_axes(diagnostics_specs)
    def diagnose(
        self,
        tokens: jax.Array,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
        *,
        slot_weight_gradient: SlotWeightGradient = "all",
    ) -> Diagnostics:
        """Runs the forward, and shows each layer's softmax mass on the slots, and its gates.

        This costs little more than the forward, and can be part of a loss. Where no token has left
        the window yet (everywhere, with window None), the mass is that of the empty slots; with
        `empty_slots="mask"` it is 0.

            seen = model.diagnose(tokens)
            logits = model.logits(seen.hidden)  # as model(tokens)
            seen.slot_weight.mean((1, 2))  # [num_layers, Hq]: how much each head reads from slots
            jnp.log(2) / -seen.log_decay.mean((1, 2))  # [num_layers, Hkv, M]: half-lives in tokens

        Arguments and errors as for a call; slot_weight_gradient as for `nha_jax.nha_attention`.
        """
        check_choices(slot_weight_gradient=slot_weight_gradient)
        hidden, layers = self._forward(
            tokens, segment_ids, positions, diagnose=slot_weight_gradient
        )
        return Diagnostics(hidden, layers.slot_weight, layers.log_decay)

    @with_auto_axes(hidden_specs)
    def apply_layer(
        self,
        index: int | jax.Array,
        hidden: jax.Array,
        window_size: int | None,
        *,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
    ) -> jax.Array:
        """Runs one layer, with any window.

        `embed_tokens`, then this for all layers in order, then `norm` is `hidden_states`.

        Args:
            index: which layer, in [0, num_layers). It may be traced, so that one compiled
                function serves every layer with this window; it is then clamped to the range.
            hidden: [B, T, hidden_size] in config.dtype, the output of the layer before; what it
                holds at padding changes nothing.
            window_size: how many of the last tokens are kept exactly (W); None for full attention.
            segment_ids, positions: as for a call.

        Returns:
            [B, T, hidden_size] in config.dtype.

        Raises:
            ValueError, TypeError: an argument has a wrong shape, dtype or value.
        """
        num_layers = self.config.num_layers
        if not isinstance(index, jax.core.Tracer) and not 0 <= int(index) < num_layers:
            raise ValueError(f"index={index} must be within [0, num_layers={num_layers})")
        hidden = check_hidden("hidden", hidden, self.config.hidden_size)
        segment_ids, positions = check_segments_and_positions(
            hidden.shape[:2], segment_ids, positions
        )
        check_window_size(window_size)
        return self._apply_layer(index, hidden, segment_ids, positions, window_size=window_size)

    @compiled("window_size")
    def _apply_layer(
        self,
        index: int | jax.Array,
        hidden: jax.Array,
        segment_ids: jax.Array | None,
        positions: jax.Array,
        *,
        window_size: int | None,
    ) -> jax.Array:
        """Does what `apply_layer` does, of checked arguments."""
        return block_of_layer(self.blocks, index)(
            hidden, window_size=window_size, rope=self._rope(positions), segment_ids=segment_ids
        )

    def with_windows(self, window_size: int | Sequence[int | None] | None) -> Self:
        """Returns the model with other windows; the parameters are shared, not copied.

        Args:
            window_size: as `ModelConfig.window_size`.

        Raises:
            ValueError: the pattern does not divide the number of layers.
        """
        windows = tuple(window_size) if isinstance(window_size, Sequence) else window_size
        return self._with_config(window_size=windows)

    def with_implementation(self, implementation: str | None) -> Self:
        """Returns the model with another implementation; the parameters are shared, not copied.

        Args:
            implementation: as `ModelConfig.implementation`; None: the fastest that serves.

        Raises:
            ValueError: there is no implementation of this name.
        """
        return self._with_config(implementation=implementation)

    def _with_config(self, **changes: Any) -> Self:
        """Returns a model of a changed config, under which it has the same parameters: these."""
        config = dataclasses.replace(self.config, **changes)
        model = nnx.merge(*nnx.split(self))
        for _, module in nnx.iter_modules(model):
            if isinstance(module, AttentionCore):
                module.config = config.layer
            elif hasattr(module, "config"):
                module.config = config
        return model

    def _forward(
        self,
        tokens: jax.Array,
        segment_ids: jax.Array | None,
        positions: jax.Array | None,
        *,
        diagnose: SlotWeightGradient | None,
    ) -> tuple[jax.Array, Any]:
        """Computes the head's input, and all layers' diagnostics in one tree.

        diagnose: how the slot weights are differentiated; None: no diagnostics are wanted.
        """
        read = self._read(tokens, segment_ids, positions)
        return self._run_layers(*read, diagnose=diagnose)

    @compiled("diagnose")
    def _run_layers(
        self,
        tokens: jax.Array,
        known: jax.Array,
        segment_ids: jax.Array | None,
        positions: jax.Array,
        *,
        diagnose: SlotWeightGradient | None,
    ) -> tuple[jax.Array, LayerDiagnostics | None]:
        """Does what `_forward` does, of checked arguments."""

        def forward(
            block: Block, hidden: jax.Array, cache: None, shared: Any, window_size: int | None
        ) -> tuple[jax.Array, LayerDiagnostics | None]:
            rope, segment_ids = shared
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
            self._embed(tokens),
            self.config.window_period,
            shared=(self._rope(positions), segment_ids),
            remat=self.config.remat,
        )
        hidden = self._end(hidden, known, segment_ids)
        return hidden, None if diagnose is None else in_layer_order(layers)


def abstract_model(
    config: ModelConfig, kind: type[Model] = Model
) -> tuple[nnx.GraphDef[Model], nnx.State]:
    """Describes the model of a config by shapes and dtypes; nothing is computed or allocated.

    Args:
        config: of the model.
        kind: `Model`, or a subclass of it.

    Returns:
        The model's graph and its state, as `nnx.split` does, with a `jax.ShapeDtypeStruct` in place
        of each array. Once arrays are put there, `nnx.merge` makes the model of both.
    """
    # jax's eval_shape: under a mesh, nnx's would look for the logical axes among the mesh's.
    return jax.eval_shape(lambda: nnx.split(kind(config, rngs=nnx.Rngs(0))))
