"""Pretrained models hybridised by the authors of Native Hybrid Attention, in their format.

The format is that of the model's family in transformers with a gate projection in every layer, as
JusenD/NHA writes and reads it. Two things that its code does and the paper does not are left out:

- a layer of full attention there sees the last 2048 tokens; here it sees all;
- such a layer of its Qwen2 does not attend to empty slots; here all layers do, or none does.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from nha_jax.config import DType, ModelConfig
from nha_jax.hf.config import ImportedConfig, find_problems, from_hf_config, to_hf_config
from nha_jax.hf.families import FAMILIES, HYBRID_SUFFIX, HYBRIDS, find_family
from nha_jax.hf.fields import layer_count, listed, wrong_architecture
from nha_jax.hf.published_windows import (
    KEYS,
    full_layers_notice,
    read_windows,
    shortest_window_size,
    write_windows,
)
from nha_jax.hf.tensors import hybrid_table
from nha_jax.scalars import is_count, shown

GATE_LOGIT_NORMALIZER = 8
"""The gate_logit_normalizer of hybridised models: a constant of the authors' code."""

_PUBLISHED_SLOTS = {"slot_feature_map": "identity", "slot_delay": None}
"""Fields of a `ModelConfig` that the authors' code has no other values of."""

# Keys that the family of transformers lacks. rand_window is for training; empty_slots is written
# by us, and the authors' code ignores it.
_OWN_KEYS = {"num_slots", *KEYS, "rand_window", "empty_slots"}


def read_hybrid(
    fields: Mapping[str, Any], *, param_dtype: DType = "float32", **chosen: Any
) -> ImportedConfig:
    """Translates the config.json of a hybridised model; arguments and errors of `from_hf_config`.

    Slots and windows are the original's, unless other windows are chosen. Empty slots are attended
    to, as in the authors' code, unless the file is one that we wrote and says "mask".
    """
    family, plain = HYBRIDS[fields["model_type"]], without_gates(fields)
    values = {**family.defaults, **fields}
    windows, wrong = read_windows(values, layer_count(values))
    problems = [
        *wrong_architecture(values, family.architecture),
        *find_problems(plain, find_family(plain)),
        *fixed_slots(values["num_slots"], chosen),
        *wrong,
    ]
    if problems:
        raise ValueError(listed(problems))
    own = {
        "num_slots": values["num_slots"],
        "window_size": windows,
        "empty_slots": values.get("empty_slots", "attend"),
        "gate_logit_normalizer": GATE_LOGIT_NORMALIZER,
    }
    original = from_hf_config(plain, param_dtype=param_dtype, **own | chosen)
    config = dataclasses.replace(original.config, window_size=shortest_window_size(original.config))
    notices = (*original.notices, *hybrid_notices(config, family.model_type))
    return ImportedConfig(family, config, hybrid_table, notices)


def without_gates(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the config.json of the same model before it was hybridised."""
    plain = {key: value for key, value in fields.items() if key not in _OWN_KEYS}
    family = FAMILIES[str(fields["model_type"]).removesuffix(HYBRID_SUFFIX)]
    return plain | {"model_type": family.model_type, "architectures": [family.architecture]}


def fixed_slots(num_slots: object, chosen: Mapping[str, Any]) -> list[str]:
    """Lists what is wrong with the slots of a checkpoint that has gates, or with those chosen."""
    if not is_count(num_slots):
        return [f"num_slots = {shown(num_slots)}: expected at least 1"]
    if chosen.get("num_slots", num_slots) != num_slots:
        return [
            f"num_slots = {shown(chosen['num_slots'])} was chosen, and the gates are of {num_slots}"
        ]
    return []


def write_hybrid(config: ModelConfig, plain: Mapping[str, Any]) -> dict[str, Any]:
    """Writes the config.json of a hybridised model, from that of the same model at window None.

    Args:
        config: of the model.
        plain: as `to_hf_config` gives it.

    Raises:
        ValueError: the authors' code cannot compute this; one line names every field in the way.
    """
    if plain["model_type"] + HYBRID_SUFFIX not in HYBRIDS:  # a Mistral: write it as a Llama
        own = ("architectures", "model_type")
        plain = {**plain, **{key: to_hf_config(config)[key] for key in own}}
    family = HYBRIDS[plain["model_type"] + HYBRID_SUFFIX]
    problems = without_slots(config)
    for field, expected in _PUBLISHED_SLOTS.items():
        if getattr(config, field) != expected:
            problems.append(f"{field} = {getattr(config, field)!r}: expected {expected!r}")
    if config.gate_logit_normalizer != GATE_LOGIT_NORMALIZER:
        problems.append(
            f"gate_logit_normalizer = {config.gate_logit_normalizer}: expected "
            f"{GATE_LOGIT_NORMALIZER}"
        )
    if family.model_type == "llama_nha" and config.attention_bias != "none":
        problems.append(f"attention_bias = {config.attention_bias!r}: expected 'none'")
    width = config.num_query_heads * config.key_dim
    if family.model_type == "qwen2_nha" and width != config.hidden_size:
        problems.append(f"key_dim = {config.key_dim}: expected hidden_size / num_query_heads")
    if problems:
        raise ValueError(f"the authors' code cannot compute this model: {'; '.join(problems)}")
    return {
        **plain,
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "num_slots": config.num_slots,
        **write_windows(config.windows),
        "rand_window": False,
        "empty_slots": config.empty_slots,
    }


def hybrid_notices(config: ModelConfig, model_type: str) -> tuple[str, ...]:
    """Describes where the authors' code computes something else than the model."""
    notices = full_layers_notice(config.windows)
    if notices and model_type == "qwen2_nha" and config.empty_slots == "attend":
        notices += ("in those of a Qwen2 it does not attend to empty slots, as this model does",)
    return notices + empty_slots_notice(config)


def empty_slots_notice(config: ModelConfig) -> tuple[str, ...]:
    """Returns the notice about masked empty slots; empty for a model that attends to them."""
    if config.empty_slots == "attend":
        return ()
    return (
        "the authors' code lets the first tokens attend to empty slots, which this model masks: "
        "its outputs there are other than the model's",
    )


def without_slots(config: ModelConfig) -> list[str]:
    """Lists what is wrong with a model without slots, which neither of the authors' formats has."""
    return [] if config.num_slots else ["num_slots = 0: expected at least 1"]
