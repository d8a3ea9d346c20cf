"""The config.json of a transformers model, and the `ModelConfig` that computes the same."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from nha_jax.config import AttentionBias, DType, ModelConfig
from nha_jax.config_parts import Experts
from nha_jax.hf.families import FAMILIES, Family, find_family
from nha_jax.hf.fields import (
    COUNT,
    COUNT_OR_NULL,
    DTYPE,
    FLAG,
    INDEX_OR_NULL,
    LAYERS,
    POSITIVE,
    Required,
    is_empty,
    listed,
    refused,
)
from nha_jax.hf.rope import read_rope, write_rope
from nha_jax.hf.tensors import Entry, converted_table

PLAIN_ATTENTION: dict[str, Any] = {
    "value_activation": "identity",
    "output_norm": False,
    "attention_scale": None,
    "conv_width": 0,
    "empty_slots": "mask",
}
"""Fields of a `ModelConfig` with which window None is a pretrained model's plain attention."""

FREE_FIELDS = (
    "num_slots", "window_size", "gate_logit_normalizer", "slot_feature_map", "empty_slots", "dtype",
    "param_dtype", "remat", "implementation", "kernel_options",
)  # fmt: skip
"""Fields of `ModelConfig` that a config.json does not determine, so that the user may choose."""


@dataclass(frozen=True)
class ImportedConfig:
    """What a config.json says, in our terms.

    Fields:
        family: the model type that it names.
        config: of the model that computes the same.
        table: lists, for the config, where each parameter lies in the checkpoint.
        notices: sentences for the user: where the model differs, and which keys were ignored.
    """

    family: Family
    config: ModelConfig
    table: Callable[[ModelConfig], tuple[Entry, ...]]
    notices: tuple[str, ...]


_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
)  # fmt: skip

_ROPE_KEYS = ("rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings")

# Keys for bookkeeping, for training, or for other programs: they change no logits.
HARMLESS = frozenset({
    "_attn_implementation", "_name_or_path", "architectures", "attention_dropout",
    "attn_implementation", "bos_token", "bos_token_id", "chunk_size_feed_forward", "dtype",
    "eos_token", "eos_token_id", "id2label", "label2id", "max_length", "model_type",
    "output_attentions", "output_hidden_states", "output_router_logits", "pad_token",
    "pad_token_id", "problem_type", "return_dict", "router_aux_loss_coef", "tokenizer_class",
    "torch_dtype", "transformers_version", "unk_token_id", "use_cache",
})  # fmt: skip

_LAYER_TYPES = ("full_attention", "sliding_attention")

# With other values of these keys, transformers computes something that a `Model` does not.
_REQUIRED: Required = {
    "hidden_act": (lambda value: value in ("silu", "swish"), "'silu'"),
    "attention_bias": (lambda value: value in (None, False, True), "true or false"),
    "mlp_bias": (is_empty, "false"),
    "pretraining_tp": (lambda value: value in (None, 1), "1"),
    "partial_rotary_factor": (lambda value: value in (None, 1), "1"),
    "quantization_config": (is_empty, "weights that are not quantized"),
    "per_layer_config": (is_empty, "the same config for every layer"),
    "is_encoder_decoder": (is_empty, "false"),
    "add_cross_attention": (is_empty, "false"),
    "mlp_only_layers": (is_empty, "[]: experts in every layer"),
    "decoder_sparse_step": (lambda value: value in (None, 1), "1: experts in every layer"),
    "layer_types": (
        lambda value: (
            value is None
            or (isinstance(value, list) and all(each in _LAYER_TYPES for each in value))
        ),
        "'full_attention' or 'sliding_attention' for every layer",
    ),
}


_KINDS: Required = {
    "vocab_size": COUNT,
    "hidden_size": COUNT,
    "intermediate_size": COUNT,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": COUNT,
    "num_key_value_heads": COUNT_OR_NULL,
    "head_dim": COUNT_OR_NULL,
    "rms_norm_eps": POSITIVE,
    "initializer_range": POSITIVE,
    "tie_word_embeddings": FLAG,
    "max_position_embeddings": COUNT_OR_NULL,
    "use_sliding_window": FLAG,
    "sliding_window": INDEX_OR_NULL,
    "max_window_layers": INDEX_OR_NULL,
    "num_experts": COUNT,
    "num_local_experts": COUNT,
    "num_experts_per_tok": COUNT,
    "moe_intermediate_size": COUNT,
    "norm_topk_prob": FLAG,
    "dtype": DTYPE,
    "torch_dtype": DTYPE,
}
"""What the keys that become numbers and flags may hold, as far as a family reads them."""


def find_problems(fields: Mapping[str, Any], family: Family) -> list[str]:
    """Describes everything in a config.json of this family that we cannot compute with."""
    values = {**family.defaults, **fields}
    read = {*_read_keys(family), "dtype", "torch_dtype"}
    kinds = {key: kind for key, kind in _KINDS.items() if key in read}
    missing = [f"{key} is missing" for key in _SIZES if key not in values]
    _, _, rope_problems, _ = read_rope(values)
    return missing + refused(values, kinds) + refused(values, _REQUIRED) + rope_problems


def from_hf_config(
    fields: Mapping[str, Any], *, param_dtype: DType = "float32", **chosen: Any
) -> ImportedConfig:
    """Translates a config.json of transformers into a `ModelConfig` that computes the same.

    The model keeps its own attention (`PLAIN_ATTENTION`) and, unless chosen otherwise, has window
    None in every layer and 64 slots; `dtype` is bfloat16 if config.json says so, else float32.

    Args:
        fields: the parsed config.json.
        param_dtype: the dtype of the parameters.
        chosen: values for any of `FREE_FIELDS`.

    Raises:
        ValueError: the architecture is not supported, or keys ask for what a `Model` does not
            compute; one line names each of them, its value and what is expected. Or `chosen` has a
            field that config.json determines.
    """
    if wrong := sorted(set(chosen) - set(FREE_FIELDS)):
        raise ValueError(
            f"{', '.join(wrong)} cannot be chosen: the original determines it; "
            f"there are {', '.join(FREE_FIELDS)}"
        )
    family = find_family(fields)
    if problems := find_problems(fields, family):
        raise ValueError(listed(problems))
    values = {**family.defaults, **fields}
    theta, scaling, _, rope_unknown = read_rope(values)
    try:
        config = ModelConfig(
            **_sizes(values, family),
            rope_theta=theta,
            rope_scaling=scaling,
            **PLAIN_ATTENTION | {"window_size": None, "dtype": computing_dtype(fields)} | chosen,
            param_dtype=param_dtype,
        )
    except ValueError as error:
        raise ValueError(listed([str(error)])) from None
    unknown = [*_unknown_keys(fields, family), *rope_unknown]
    notices = (*_sliding_notice(values, family), *unknown_notice(unknown))
    return ImportedConfig(family, config, converted_table, notices)


def to_hf_config(
    config: ModelConfig, *, max_position_embeddings: int | None = None
) -> dict[str, Any]:
    """Writes the config.json with which transformers computes what the model does at window None.

    Windows, slots and gates have no keys there and are left out.

    Args:
        config: of a model with a pretrained model's attention, as `from_hf_config` gives it.
        max_position_embeddings: the longest context in tokens; None: the length that rope_scaling
            stretches the rotations to, or without it the family's default.

    Raises:
        ValueError: no supported family computes this; one line names every field in the way.
    """
    family = _family_of(config)
    problems = [
        f"{field} = {getattr(config, field)!r}: expected {value!r}"
        for field, value in PLAIN_ATTENTION.items()
        if field != "empty_slots" and getattr(config, field) != value
    ]
    if config.value_dim != config.key_dim:
        problems.append(f"value_dim = {config.value_dim}: expected key_dim = {config.key_dim}")
    if family.attention_bias not in (None, config.attention_bias) or (
        family.attention_bias is None and config.attention_bias == "qkv"
    ):
        problems.append(f"attention_bias = {config.attention_bias!r}: expected 'none' or 'all'")
    if problems:
        raise ValueError(f"transformers has no model of this config: {'; '.join(problems)}")
    longest, scaling = family.defaults["max_position_embeddings"], config.rope_scaling
    if scaling and scaling.original_length:  # older versions derive yarn's factor from it
        longest = round(scaling.factor * scaling.original_length)
    fields: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.mlp_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_query_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.key_dim,
        "hidden_act": "silu",
        "max_position_embeddings": max_position_embeddings or longest,
        "rms_norm_eps": config.norm_eps,
        "initializer_range": config.initializer_range,
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": config.param_dtype,
        **write_rope(config.rope_theta, config.rope_scaling),
    }
    if family.attention_bias is None:
        fields["attention_bias"] = config.attention_bias == "all"
    if family.slides != "never":
        fields |= {"use_sliding_window": False, "sliding_window": None}
    if config.experts:
        fields |= {
            "num_experts": config.experts.count,
            "num_experts_per_tok": config.experts.per_token,
            "moe_intermediate_size": config.experts.size,
            "norm_topk_prob": config.experts.normalize,
            "mlp_only_layers": [],
            "decoder_sparse_step": 1,
        }
    return fields


def _family_of(config: ModelConfig) -> Family:
    """Picks the family with no more features than the config needs."""
    if config.experts:
        return FAMILIES["qwen3_moe"]
    if config.qk_norm:
        return FAMILIES["qwen3"]
    return FAMILIES["qwen2" if config.attention_bias == "qkv" else "llama"]


def _sizes(values: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """Reads the fields of `ModelConfig` that config.json gives as numbers and flags."""
    bias: AttentionBias | None = family.attention_bias
    if bias is None:
        bias = "all" if values["attention_bias"] else "none"
    experts = None
    if family.experts:
        experts = Experts(
            count=values.get("num_local_experts", values["num_experts"]),
            per_token=values["num_experts_per_tok"],
            size=values["moe_intermediate_size"],
            normalize=bool(values["norm_topk_prob"]),
        )
    return {
        "vocab_size": values["vocab_size"],
        "num_layers": values["num_hidden_layers"],
        "hidden_size": values["hidden_size"],
        "num_query_heads": values["num_attention_heads"],
        "num_kv_heads": values["num_key_value_heads"],
        "key_dim": values["head_dim"],
        "mlp_size": values["intermediate_size"],
        "norm_eps": values["rms_norm_eps"],
        "initializer_range": values["initializer_range"],
        "tie_embeddings": bool(values["tie_word_embeddings"]),
        "qk_norm": family.qk_norm,
        "attention_bias": bias,
        "experts": experts,
    }


def computing_dtype(fields: Mapping[str, Any]) -> DType:
    """Picks the dtype of ours that the original computes in."""
    named = str(fields.get("dtype") or fields.get("torch_dtype"))
    return "bfloat16" if named.removeprefix("torch.") == "bfloat16" else "float32"


def _sliding_notice(values: Mapping[str, Any], family: Family) -> list[str]:
    window, layers = values.get("sliding_window"), values["num_hidden_layers"]
    asked = family.slides == "always" or values.get("use_sliding_window")
    if family.slides == "never" or not asked or not window:
        return []
    if window >= (values["max_position_embeddings"] or 0):
        return []
    sliding = layers
    if family.slides == "named":
        named: list[str] | None = values.get("layer_types")
        above = max(layers - (values["max_window_layers"] or 0), 0)
        sliding = above if named is None else named.count("sliding_attention")
    if not sliding:
        return []
    return [
        f"{sliding} of {layers} layers of the original see the last {window} tokens only "
        f"(sliding_window); with window None the model equals it up to {window} tokens"
    ]


def _read_keys(family: Family) -> set[str]:
    """Names the keys that become numbers and flags, under all of their names."""
    aliases = ("num_local_experts",) if family.experts else ()
    return {*family.defaults, *_SIZES, *aliases}


def _unknown_keys(fields: Mapping[str, Any], family: Family) -> list[str]:
    known = {*_read_keys(family), *_ROPE_KEYS, *_REQUIRED, *HARMLESS}
    return sorted(set(fields) - known)


def unknown_notice(keys: Iterable[str]) -> list[str]:
    """Returns the notice about keys that have no meaning here; empty if there are none."""
    named = ", ".join(keys)
    return [f"config.json has keys that were ignored: {named}"] if named else []
