"""`ModelConfig`: the sizes and options of a model, their checks, and what follows from them."""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self, get_args

import numpy as np

from nha_jax.config_parts import Experts, RopeScaling
from nha_jax.layer_config import (
    AttentionBias,
    DerivedInt,
    DType,
    LayerConfig,
    LayerFields,
    ValueActivation,
)
from nha_jax.mup import initial_factor
from nha_jax.ops.types import EmptySlots, SlotFeatureMap
from nha_jax.presets import PRESETS
from nha_jax.scalars import LARGEST_INT32, is_count, plain, shown

Remat = Literal["none", "full", "operator", "dots"]

MOST_LAYERS = 2**16
"""`ModelConfig.windows` lists every layer."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig(LayerFields):
    """Sizes and options of a decoder-only Native Hybrid Attention language model.

    Fields:
        vocab_size: number of tokens in the vocabulary.
        num_layers: number of layers.
        hidden_size: width of the hidden states between the layers.
        num_query_heads: query heads (Hq) of every layer.
        num_kv_heads: key/value heads (Hkv), each shared by Hq / Hkv query heads; None for Hq.
        key_dim: size of a head's query and key (K), even; None for hidden_size / num_query_heads.
        value_dim: size of a head's value (V); None for key_dim.
        num_slots: slots per key/value head (M); with 0 the window alone is read.
        window_size: how many of the last tokens a layer keeps exactly (W); None for full attention;
            or a pattern of both, repeated over the layers. The parameters do not depend on it.
        mlp_size: width of the SwiGLU; None for 8/3 hidden_size, rounded up to a multiple of 64.
        experts: a mixture of SwiGLUs in place of one, as `Experts` or a mapping of its fields; None
            for one SwiGLU.
        conv_width: taps of the short convolution on query, key and value; 0 for no convolution.
        gate_logit_normalizer: divides the logarithm of the gate: log_decay = logsigmoid(f) /
            gate_logit_normalizer.
        value_activation: the function applied to the value, before it is attended to or enters the
            slots.
        output_norm: whether the layer gives o_proj(RMSNorm(silu(o))) rather than o_proj(o).
        output_norm_eps: added to the mean square in that norm; None for norm_eps.
        qk_norm: whether each head's query and key first go through an RMSNorm of their own.
        attention_scale: multiplies the attention's logits; None for key_dim ** -0.5.
        attention_bias: which projections have a bias: "none"; "qkv", those of query, key and value;
            "all", that of the output too. The gate's never has one.
        rope_theta: base of the rotary embedding of the window's queries and keys.
        rope_scaling: how its frequencies were changed for a longer context, as `RopeScaling` or a
            mapping of its fields; None for unchanged ones.
        norm_eps: added to the mean square in every RMSNorm.
        tie_embeddings: whether the head is the embedding table.
        slot_feature_map: applied to query and key before they meet the slots, see
            `nha_jax.nha_attention`.
        slot_delay: how many steps after its own a token enters the slots; None for the layer's
            window. A number takes windows that are finite and at least as long, in which the token
            is then read too, see `nha_jax.nha_attention`.
        empty_slots: whether queries attend to slots that hold nothing yet, or those are masked, see
            `nha_jax.nha_attention`.
        implementation: name of the operator's implementation, which decode steps take too; None
            for the fastest that serves.
        kernel_options: options that implementations have of their own, by the implementation's
            name, e.g. {"pallas_tpu": {"chunk": 128}}, see `nha_jax.nha_attention`.
        initializer_range: standard deviation of the embedding and the projections at the start.
        mup_base_width: the hidden_size at which learning rate and initializer_range were chosen:
            both are carried over to this one by the maximal-update parametrisation (`nha_jax.mup`);
            None for the standard parametrisation.
        dtype: dtype of the computation; norms, softmax, decays and logits are float32 in any case.
        param_dtype: dtype of the parameters.
        remat: what the backward pass computes again rather than keep, block by block: "none";
            "full", everything but the block's input; "operator", all but what the attention
            operator's own backward needs, whose forward then runs once; "dots", all but that and
            the projections' and the SwiGLU's products (of experts, their router's only).

    Scalars of numpy and jax are kept as Python's numbers.

    Raises:
        ValueError: a field is out of its range or does not fit another; one line names the field,
            its value and the fix.
    """

    _owner: ClassVar[str] = "ModelConfig"
    _query_heads: ClassVar[str] = "num_query_heads"

    vocab_size: int
    num_layers: int
    hidden_size: int
    num_query_heads: int
    num_kv_heads: DerivedInt = None
    key_dim: DerivedInt = None
    value_dim: DerivedInt = None
    num_slots: int = 64
    window_size: int | tuple[int | None, ...] | None = 64
    mlp_size: DerivedInt = None
    experts: Experts | None = None
    conv_width: int = 4
    gate_logit_normalizer: float = 8.0
    value_activation: ValueActivation = "silu"
    output_norm: bool = True
    output_norm_eps: float | None = None
    qk_norm: bool = False
    attention_scale: float | None = None
    attention_bias: AttentionBias = "none"
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-6
    tie_embeddings: bool = False
    slot_feature_map: SlotFeatureMap = "identity"
    slot_delay: int | None = None
    empty_slots: EmptySlots = "attend"
    initializer_range: float = 0.02
    mup_base_width: int | None = None
    dtype: DType = "bfloat16"
    param_dtype: DType = "float32"
    remat: Remat = "full"
    implementation: str | None = None
    kernel_options: dict[str, dict[str, int]] | None = None

    def __post_init__(self) -> None:
        for each in dataclasses.fields(self):
            object.__setattr__(self, each.name, plain(getattr(self, each.name)))
        for field in ("vocab_size", "num_layers"):
            self._check_integer(field, minimum=1)
        if self.num_layers > MOST_LAYERS:
            self._reject("num_layers", f"must be at most {MOST_LAYERS}")
        self._check_layer()
        if self.rope_theta is None:
            self._check_positive("rope_theta")
        self._derive("mlp_size", 64 * -(-8 * self.hidden_size // (3 * 64)))
        if isinstance(self.window_size, list | tuple | np.ndarray):
            object.__setattr__(self, "window_size", tuple(map(plain, self.window_size)))
        self._check_window_size()
        self._check_truth("tie_embeddings")
        if self.mup_base_width is not None:
            self._check_integer("mup_base_width", minimum=1)
        self._check_choice("remat", get_args(Remat))
        self._build("experts", Experts)

    def _check_window_size(self) -> None:
        pattern = self._window_entries()
        if not pattern or not all(window is None or is_count(window, 0) for window in pattern):
            self._reject(
                "window_size",
                "must be an integer of at least 0, None (full attention), or a non-empty "
                f"pattern of these; a window is at most {LARGEST_INT32}",
            )
        if not self.num_slots and 0 in pattern:
            self._reject("window_size", "has a layer without a window, and num_slots=0 no slots")
        self._check_slot_delay(pattern)
        if self.num_layers % len(pattern):
            self._reject(
                "window_size",
                f"is a pattern of {len(pattern)} layers, which does not divide "
                f"num_layers={self.num_layers}; change one of them",
            )

    def _window_entries(self) -> tuple[int | None, ...]:
        return self.window_size if isinstance(self.window_size, tuple) else (self.window_size,)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The window of every layer: num_layers entries, None for full attention."""
        entries = self._window_entries()
        return entries * (self.num_layers // len(entries))

    @property
    def window_period(self) -> tuple[int | None, ...]:
        """The shortest pattern that, repeated, gives `windows`; its length divides num_layers."""
        return shortest_pattern(self.windows)

    @property
    def width_ratio(self) -> float:
        """hidden_size / mup_base_width, by which `nha_jax.mup` scales; 1 without the latter."""
        return self.hidden_size / (self.mup_base_width or self.hidden_size)

    @property
    def layer(self) -> LayerConfig:
        """What an attention layer of the model is made of, with the window of the first one.

        The layers differ in nothing but their windows.
        """
        names = {field.name for field in dataclasses.fields(LayerConfig)}
        shared = {name: value for name, value in vars(self).items() if name in names}
        own = {
            "num_heads": self.num_query_heads,
            "window_size": self.windows[0],
            "initializer_range": self.initializer_range_of("embed", "heads"),
        }
        return LayerConfig(**shared | own)

    def initializer_range_of(self, *axes: str) -> float:
        return self.initializer_range * initial_factor(self.width_ratio, axes)

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> Self:
        """Returns a named config, with overrides: `ModelConfig.preset("nha-340m", num_slots=32)`.

        "nha-340m" and "nha-1.3b" have the sizes published with Native Hybrid Attention (arXiv
        2510.07019): 24 layers, 4 heads, 64 slots, no short convolution, a SwiGLU of 8/3 of the
        hidden size rounded up to 256. Their embeddings are tied, which makes them 347M and 1.31B
        parameters (380M and 1.38B if untied). "nha-tiny" (0.7M) and "nha-20m" read bytes: 256
        values and one separator. "llama-3-8b" is that model as `nha_jax.from_pretrained` loads it:
        with full attention, and with gates (67M parameters) that finite windows will use.

        Raises:
            ValueError: no preset has this name; the message lists those there are.
        """
        if not isinstance(name, str) or name not in PRESETS:
            raise ValueError(f"no preset {shown(name)}; there are {', '.join(map(repr, PRESETS))}")
        return cls.from_dict(PRESETS[name] | overrides)

    def to_dict(self) -> dict[str, Any]:
        """Returns all fields as values that JSON can hold (a pattern of windows as a list)."""
        fields = dataclasses.asdict(self)
        if isinstance(self.window_size, tuple):
            fields["window_size"] = list(self.window_size)
        if self.kernel_options is not None:
            fields["kernel_options"] = {name: dict(x) for name, x in self.kernel_options.items()}
        return fields

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """Builds the config that has these fields, as `to_dict` returns them.

        A field under the name that an earlier version saved it by is read too.

        Raises:
            ValueError: a key is no field (the message suggests the nearest one), a required field
                is missing, or a value is out of range.
        """
        if not isinstance(fields, Mapping):
            raise ValueError(f"ModelConfig: expected a mapping of its fields, got {shown(fields)}")
        fields = _without_old_names(fields)
        known = {field.name: field for field in dataclasses.fields(cls)}
        for key in fields:
            if key not in known:
                nearest = difflib.get_close_matches(str(key), known, n=1)
                hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
                raise ValueError(f"ModelConfig: unknown field {shown(key)}{hint}")
        missing = [
            name
            for name, field in known.items()
            if field.default is dataclasses.MISSING and name not in fields
        ]
        if missing:
            raise ValueError(f"ModelConfig: missing {', '.join(missing)}")
        return cls(**fields)


def shortest_pattern[Entry](entries: tuple[Entry, ...]) -> tuple[Entry, ...]:
    """Gives the shortest tuple that, repeated, gives all entries."""
    lengths = (n for n in range(1, len(entries) + 1) if len(entries) % n == 0)
    patterns = (entries[:length] for length in lengths)
    return next(x for x in patterns if x * (len(entries) // len(x)) == entries)


def _without_old_names(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """Renames the fields that earlier versions saved under other names."""
    if "block_sizes" not in fields:
        return fields
    fields = dict(fields)
    block_sizes = fields.pop("block_sizes")
    if block_sizes is not None:
        fields.setdefault("kernel_options", {"pallas_tpu": block_sizes})
    return fields
