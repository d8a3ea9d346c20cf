"""The configuration of Native Hybrid Attention models for transformers."""

from typing import Any

from transformers import PreTrainedConfig


class NHAConfig(PreTrainedConfig):
    """Sizes and options of a decoder-only Native Hybrid Attention language model.

    Keys that other models of transformers have are called as theirs.

    Args:
        vocab_size: number of tokens in the vocabulary.
        hidden_size: width of the hidden states between the layers.
        intermediate_size: width of the SwiGLU.
        num_hidden_layers: number of layers.
        num_attention_heads: query heads (Hq) of every layer.
        num_key_value_heads: key/value heads (Hkv), each shared by Hq / Hkv query heads.
        head_dim: size of a head's query and key (K).
        v_head_dim: size of a head's value (V).
        num_slots: slots per key/value head (M); with 0 the window alone is read.
        window_sizes: for every layer, how many of the last tokens it keeps exactly (W): 0 for slots
            alone, None for full attention. The parameters do not depend on it: a model may be
            loaded with others. None: full attention in every layer.
        conv_width: taps of the short convolution on query, key and value; 0 for no convolution.
        gate_logit_normalizer: divides the logarithm of the gate.
        value_activation: "silu" or "identity", applied to the value.
        output_norm: whether a layer gives o_proj(RMSNorm(silu(o))) rather than o_proj(o).
        output_norm_eps: added to the mean square in that norm; None for rms_norm_eps.
        qk_norm: whether each head's query and key first go through an RMSNorm of their own.
        attention_scale: multiplies the attention's logits; None for head_dim**-0.5.
        attention_bias: which projections have a bias: "none"; "qkv"; "all", that of the output too.
        slot_feature_map: "identity", "silu" or "relu", applied to query and key before they meet
            the slots.
        slot_delay: how many steps after its own a token enters the slots, at most every window, in
            which it may then still be; None for the layer's window.
        empty_slots: whether queries "attend" to slots that hold nothing yet, with logit 0 and value
            0, or "mask" them.
        rope_theta: base of the rotary embedding of the window's queries and keys.
        rotary_scaling: how its frequencies were changed for a longer context, a mapping with
            `kind` ("linear", "llama3" or "yarn") and that kind's numbers; None for unchanged ones.
        num_experts: SwiGLUs of a mixture in place of one; 0 for one SwiGLU.
        num_experts_per_tok: how many of them every token goes to.
        moe_intermediate_size: width of each of them.
        norm_topk_prob: whether the weights of a token's experts are scaled to add up to 1.
        rms_norm_eps: added to the mean square in every RMSNorm.
        tie_word_embeddings: whether the head is the embedding table.
        initializer_range: standard deviation of embedding and projections at the start.
    """

    model_type = "nha_jax"

    def __init__(
        self,
        vocab_size: int = 32000,
        hidden_size: int = 1024,
        intermediate_size: int = 2816,
        num_hidden_layers: int = 24,
        num_attention_heads: int = 4,
        num_key_value_heads: int = 4,
        head_dim: int = 256,
        v_head_dim: int = 256,
        num_slots: int = 64,
        window_sizes: list[int | None] | None = None,
        conv_width: int = 0,
        gate_logit_normalizer: float = 8.0,
        value_activation: str = "silu",
        output_norm: bool = True,
        output_norm_eps: float | None = None,
        qk_norm: bool = False,
        attention_scale: float | None = None,
        attention_bias: str = "none",
        slot_feature_map: str = "identity",
        slot_delay: int | None = None,
        empty_slots: str = "attend",
        rope_theta: float = 10000.0,
        rotary_scaling: dict[str, Any] | None = None,
        num_experts: int = 0,
        num_experts_per_tok: int = 0,
        moe_intermediate_size: int = 0,
        norm_topk_prob: bool = True,
        rms_norm_eps: float = 1e-6,
        tie_word_embeddings: bool = False,
        initializer_range: float = 0.02,
        bos_token_id: int | None = None,
        eos_token_id: int | list[int] | None = None,
        pad_token_id: int | None = None,
        **kwargs: Any,
    ):
        window_sizes = [None] * num_hidden_layers if window_sizes is None else list(window_sizes)
        if len(window_sizes) != num_hidden_layers:
            raise ValueError(
                f"window_sizes has {len(window_sizes)} entries; expected one for each of "
                f"num_hidden_layers={num_hidden_layers} layers"
            )
        if slot_delay is not None and any(W is None or slot_delay > W for W in window_sizes):
            raise ValueError(f"slot_delay={slot_delay} must be at most every one of window_sizes")
        if not num_slots and 0 in window_sizes:
            raise ValueError("window_sizes has a layer without a window, and num_slots=0 no slots")
        own = {name: value for name, value in locals().items() if name in OWN_KEYS}
        for name, value in own.items():
            setattr(self, name, value)
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)
        self.tie_word_embeddings = tie_word_embeddings
        self.bos_token_id, self.eos_token_id = bos_token_id, eos_token_id
        self.pad_token_id = pad_token_id

    def to_diff_dict(self) -> dict[str, Any]:
        """Lists what config.json holds: every key of ours, also where it equals its default."""
        return super().to_diff_dict() | {name: getattr(self, name) for name in OWN_KEYS}


OWN_KEYS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "v_head_dim", "num_slots", "window_sizes", "conv_width",
    "gate_logit_normalizer", "value_activation", "output_norm", "output_norm_eps", "qk_norm",
    "attention_scale", "attention_bias", "slot_feature_map", "slot_delay", "empty_slots",
    "rope_theta", "rotary_scaling", "num_experts", "num_experts_per_tok", "moe_intermediate_size",
    "norm_topk_prob", "rms_norm_eps", "tie_word_embeddings", "initializer_range",
)  # fmt: skip
"""The keys of config.json that say what the model computes."""
