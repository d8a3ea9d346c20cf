"""Models as transformers opens them with the code that lies beside them (type "nha_jax").

`nha_jax/hf/torch_files/` is that code: everything that a `ModelConfig` says, in PyTorch. It is
copied into each export as it is, so that `from_pretrained(folder, trust_remote_code=True)` needs
nothing but torch and transformers.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from nha_jax.config import DType, ModelConfig
from nha_jax.config_parts import Experts, RopeScaling
from nha_jax.hf.config import (
    FREE_FIELDS,
    HARMLESS,
    ImportedConfig,
    computing_dtype,
    unknown_notice,
)
from nha_jax.hf.families import OWN_CODE_FAMILY
from nha_jax.hf.fields import (
    COUNT,
    DTYPE,
    INDEX_OR_NULL,
    LAYERS,
    POSITIVE,
    POSITIVE_OR_NULL,
    Kind,
    Required,
    listed,
    refused,
    wrong_architecture,
)
from nha_jax.hf.published_windows import shortest_window_size
from nha_jax.hf.tensors import own_code_table
from nha_jax.scalars import is_count, shown

_AUTO_MAP = {
    "AutoConfig": "configuration_nha.NHAConfig",
    "AutoModel": "modeling_nha.NHAModel",
    "AutoModelForCausalLM": "modeling_nha.NHAForCausalLM",
}

_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "mlp_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_query_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "key_dim": "head_dim",
    "value_dim": "v_head_dim",
    "num_slots": "num_slots",
    "conv_width": "conv_width",
    "gate_logit_normalizer": "gate_logit_normalizer",
    "value_activation": "value_activation",
    "output_norm": "output_norm",
    "output_norm_eps": "output_norm_eps",
    "qk_norm": "qk_norm",
    "attention_scale": "attention_scale",
    "attention_bias": "attention_bias",
    "slot_feature_map": "slot_feature_map",
    "slot_delay": "slot_delay",
    "empty_slots": "empty_slots",
    "rope_theta": "rope_theta",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
    "initializer_range": "initializer_range",
}
"""Fields of `ModelConfig` -> keys of config.json that hold the same value."""

_EXPERTS = {
    "count": "num_experts",
    "per_token": "num_experts_per_tok",
    "size": "moe_intermediate_size",
    "normalize": "norm_topk_prob",
}
"""Likewise of `Experts`."""

_OTHERWISE = {"window_size", "rope_scaling", "experts", "param_dtype"}
"""Fields that are written in a form of their own."""

_OF_THE_CALL = {"dtype", "remat", "implementation", "kernel_options"}
"""Fields that say how a model is computed here, and not what it is."""

_LATER = ("output_norm_eps", "attention_scale", "slot_delay")
"""Keys that the first exports lack, where null says what those compute."""

_NEEDED = (*_KEYS.values(), "window_sizes", "rotary_scaling", *_EXPERTS.values())

_INDEX: Kind = (lambda value: is_count(value, 0), "a whole number of at least 0")

_KINDS: Required = {
    **dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads",
                     "num_key_value_heads", "head_dim", "v_head_dim"), COUNT),
    **dict.fromkeys(("num_slots", "conv_width", "num_experts", "num_experts_per_tok",
                     "moe_intermediate_size"), _INDEX),
    **dict.fromkeys(("gate_logit_normalizer", "rope_theta", "rms_norm_eps", "initializer_range"),
                    POSITIVE),
    **dict.fromkeys(("output_norm_eps", "attention_scale"), POSITIVE_OR_NULL),
    "slot_delay": INDEX_OR_NULL,
    "num_hidden_layers": LAYERS,
    "dtype": DTYPE,
    "torch_dtype": DTYPE,
}  # fmt: skip


def write_own_code_config(config: ModelConfig) -> dict[str, Any]:
    """Writes the config.json of a model for the code beside it.

    Raises:
        ValueError: that code does not compute the model; one line names every field in the way.
    """
    known = {*_KEYS, *_OTHERWISE, *_OF_THE_CALL}
    problems = [
        f"{field.name} = {getattr(config, field.name)!r}: expected {field.default!r}"
        for field in dataclasses.fields(config)
        if field.name not in known and getattr(config, field.name) != field.default
    ]
    if problems:
        raise ValueError(f"format='transformers' cannot express this: {'; '.join(problems)}")
    scaling = config.rope_scaling
    experts = {"count": 0, "per_token": 0, "size": 0, "normalize": True}
    if config.experts:
        experts = dataclasses.asdict(config.experts)
    return {
        "architectures": [OWN_CODE_FAMILY.architecture],
        "auto_map": dict(_AUTO_MAP),
        "model_type": OWN_CODE_FAMILY.model_type,
        "dtype": config.param_dtype,
        **{key: getattr(config, field) for field, key in _KEYS.items()},
        "window_sizes": list(config.windows),
        "rotary_scaling": None if scaling is None else dataclasses.asdict(scaling),
        **{key: experts[field] for field, key in _EXPERTS.items()},
    }


def read_own_code_config(
    fields: Mapping[str, Any], *, param_dtype: DType = "float32", **chosen: Any
) -> ImportedConfig:
    """Translates a config.json that `write_own_code_config` wrote, or transformers after it.

    Args:
        fields: the parsed config.json.
        param_dtype: the dtype of the parameters.
        chosen: values for any of `nha_jax.hf.config.FREE_FIELDS`; num_slots must be the original's.

    Raises:
        ValueError: keys are missing, or ask for what a `Model` does not compute; one line names
            each of them, its value and what is expected. Or `chosen` has a field that config.json
            determines.
    """
    if wrong := sorted(set(chosen) - set(FREE_FIELDS)):
        raise ValueError(f"{', '.join(wrong)} cannot be chosen: the original determines it")
    fields = {**dict.fromkeys(_LATER), **fields}
    problems = wrong_architecture(fields, OWN_CODE_FAMILY.architecture)
    problems += [f"{key} is missing" for key in _NEEDED if key not in fields]
    problems += refused(fields, _KINDS)
    own, asked = fields.get("num_slots"), chosen.get("num_slots")
    if "num_slots" in chosen and asked != own:
        problems.append(f"num_slots = {shown(asked)} was chosen, and the gates are of {shown(own)}")
    if problems:
        raise ValueError(listed(problems))
    try:
        config = _config(fields, {"param_dtype": param_dtype, **chosen})
    except (TypeError, ValueError) as error:
        raise ValueError(listed([str(error)])) from None
    known = {*_NEEDED, *HARMLESS, "auto_map"}
    return ImportedConfig(
        OWN_CODE_FAMILY, config, own_code_table, tuple(unknown_notice(sorted(set(fields) - known)))
    )


def _config(fields: Mapping[str, Any], chosen: dict[str, Any]) -> ModelConfig:
    """Builds the config; raises TypeError or ValueError if a key has no value of its kind."""
    windows, scaling = fields["window_sizes"], fields["rotary_scaling"]
    if not isinstance(windows, list) or len(windows) != fields["num_hidden_layers"]:
        raise ValueError("window_sizes: expected a list with a window for every layer")
    values: dict[str, Any] = {field: fields[key] for field, key in _KEYS.items()}
    values |= {
        "window_size": tuple(windows),
        "rope_scaling": scaling and RopeScaling(**scaling),
        "dtype": computing_dtype(fields),
    }
    if fields["num_experts"]:
        values["experts"] = Experts(**{field: fields[key] for field, key in _EXPERTS.items()})
    config = ModelConfig(**values | chosen)
    return dataclasses.replace(config, window_size=shortest_window_size(config))
