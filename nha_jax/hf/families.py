"""The model types that can be imported: of transformers, and of the paper's authors."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from nha_jax.config import AttentionBias
from nha_jax.scalars import shown


@dataclass(frozen=True, kw_only=True)
class Family:
    """What a model type implies beyond what its config.json says.

    Fields:
        model_type, architecture: how config.json names it.
        defaults: the values that transformers uses for keys that config.json leaves out.
        attention_bias: which projections have a bias, as in `ModelConfig`; None: config.json's
            attention_bias says whether "all" or "none".
        qk_norm: whether every head's query and key go through an RMSNorm.
        experts: whether every layer has a mixture of experts.
        slides: which layers see no more than sliding_window tokens: "never" none, "always" all;
            where use_sliding_window is true, "named" those that layer_types or max_window_layers
            name, and "asked" all.
    """

    model_type: str
    architecture: str
    defaults: Mapping[str, Any]
    attention_bias: AttentionBias | None = "none"
    qk_norm: bool = False
    experts: bool = False
    slides: Literal["never", "always", "named", "asked"] = "never"


def _family(model_type: str, architecture: str, defaults: dict[str, Any], **fields) -> Family:
    shared = {"num_key_value_heads": None, "head_dim": None, "rms_norm_eps": 1e-6,
              "initializer_range": 0.02, "tie_word_embeddings": False, "attention_bias": False,
              "hidden_act": "silu"}  # fmt: skip
    return Family(
        model_type=model_type, architecture=architecture, defaults=shared | defaults, **fields
    )


_QWEN = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        _family(
            "llama",
            "LlamaForCausalLM",
            {"max_position_embeddings": 2048},
            attention_bias=None,
        ),
        _family(
            "mistral",
            "MistralForCausalLM",
            {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
            slides="always",
        ),
        _family("qwen2", "Qwen2ForCausalLM", _QWEN, attention_bias="qkv", slides="named"),
        _family(
            "qwen3",
            "Qwen3ForCausalLM",
            _QWEN | {"head_dim": 128},
            attention_bias=None,
            qk_norm=True,
            slides="named",
        ),
        _family(
            "qwen3_moe",
            "Qwen3MoeForCausalLM",
            _QWEN
            | {
                "num_key_value_heads": 4,
                "num_experts": 128,
                "num_experts_per_tok": 8,
                "moe_intermediate_size": 768,
                "norm_topk_prob": False,
                "mlp_only_layers": [],
                "decoder_sparse_step": 1,
            },
            attention_bias=None,
            qk_norm=True,
            experts=True,
            slides="asked",
        ),
    )
}


HYBRID_SUFFIX = "_nha"


def _hybrid(model_type: str, architecture: str) -> Family:
    family = FAMILIES[model_type]
    name, own = model_type + HYBRID_SUFFIX, {"num_slots": 32, "window_size": 32}
    defaults = {**family.defaults, **own}
    return replace(family, model_type=name, architecture=architecture, defaults=defaults)


HYBRIDS: dict[str, Family] = {
    family.model_type: family
    for family in (
        _hybrid("llama", "LlamaNHAForCausalLM"),
        _hybrid("qwen2", "Qwen2NHAForCausalLM"),
        _hybrid("qwen3", "Qwen3NHAForCausalLM"),
        _hybrid("qwen3_moe", "Qwen3MoeNHAForCausalLM"),
    )
}
"""The families that the authors of Native Hybrid Attention hybridised, by model type.

Every layer has a gate projection besides what the family of transformers has."""

PUBLISHED_FAMILY = Family(
    model_type="nha",
    architecture="NHAForCausalLM",
    defaults={
        "hidden_size": 2048, "gate_logit_normalizer": 8, "hidden_ratio": 4,
        "intermediate_size": None, "num_hidden_layers": 24, "num_heads": 4, "num_kv_heads": None,
        "num_slots": 64, "use_short_conv": False, "conv_size": 4, "exapnd_k": 1, "exapnd_v": 1,
        "norm_eps": 1e-6, "initializer_range": 0.02, "tie_word_embeddings": False,
        "vocab_size": 32000, "rope_theta": 10000.0, "window_size": 32,
    },
)  # fmt: skip
"""The architecture that the authors of Native Hybrid Attention trained from scratch."""

OWN_CODE_FAMILY = Family(model_type="nha_jax", architecture="NHAForCausalLM", defaults={})
"""Models of any `ModelConfig`, with code for transformers beside them (`nha_jax.hf.own_code`)."""


def find_hybrid(fields: Mapping[str, Any]) -> Family | None:
    """Finds the hybridised family that a config.json names, if it names one."""
    model_type = fields.get("model_type")
    return HYBRIDS.get(model_type) if isinstance(model_type, str) else None


def find_family(fields: Mapping[str, Any]) -> Family:
    """Finds the family of transformers that a config.json names.

    Raises:
        ValueError: it names none, or one that is not supported; the message lists those that are.
    """
    model_type, architectures = fields.get("model_type"), fields.get("architectures") or []
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if model_type is None and isinstance(architectures, list):
        family = next((x for x in FAMILIES.values() if x.architecture in architectures), None)
    if family is None or architectures not in ([], [family.architecture]):
        supported = (*FAMILIES.values(), *HYBRIDS.values(), PUBLISHED_FAMILY, OWN_CODE_FAMILY)
        known = ", ".join(f"{x.model_type} ({x.architecture})" for x in supported)
        raise ValueError(
            f"config.json is of no supported model: model_type = {shown(model_type)}, "
            f"architectures = {shown(architectures)}; expected one of {known}"
        )
    return family
