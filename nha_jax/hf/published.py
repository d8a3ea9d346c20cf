"""Models trained from scratch by the paper's authors, in their format (JusenD/NHA, type "nha").

Two generations of that code compute different things (`nha_jax.hf.published_generations`); here is
what they share. Layers of full attention and empty slots are treated as in hybridised models
(`nha_jax.hf.published_hybrid`).
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from nha_jax.config import DType, ModelConfig
from nha_jax.hf.config import (
    FREE_FIELDS,
    HARMLESS,
    ImportedConfig,
    computing_dtype,
    unknown_notice,
)
from nha_jax.hf.families import PUBLISHED_FAMILY
from nha_jax.hf.fields import (
    COUNT,
    COUNT_OR_NULL,
    DTYPE,
    FLAG,
    LAYERS,
    POSITIVE,
    POSITIVE_OR_NULL,
    Required,
    is_empty,
    layer_count,
    listed,
    refused,
    wrong_architecture,
)
from nha_jax.hf.published_generations import (
    SHIFT,
    find_generation,
    generation_notices,
    other_generation_notice,
    read_arithmetic,
    write_arithmetic,
)
from nha_jax.hf.published_hybrid import empty_slots_notice, fixed_slots, without_slots
from nha_jax.hf.published_windows import KEYS, shortest_window_size
from nha_jax.hf.tensors import published_table

PUBLISHED_FIELDS: dict[str, Any] = {
    "value_activation": "silu",
    "output_norm": True,
    "qk_norm": False,
    "attention_bias": "none",
    "rope_scaling": None,
    "experts": None,
}
"""Fields of a `ModelConfig` that make up the published architecture."""

OUTPUT_NORM_EPS = 1e-5
"""What the authors' code adds in the norm after the attention, whatever norm_eps says.

It calls fla's rms_norm_linear, whose default this is, without an eps."""

# With other values of these keys, the original computes something that a `Model` does not.
_REQUIRED: Required = {
    "hidden_act": (lambda value: value in ("swish", "silu"), "'swish'"),
    "conv_bias": (is_empty, "false: convolutions here have no bias"),
    "attn": (
        is_empty,
        "null: it names layers of full attention with heads of their own, without gates, slots "
        "and norm, and all layers of a model here are alike",
    ),
    "rope_scaling": (is_empty, "null: the authors' code reads it and rotates as without it"),
    "quantization_config": (is_empty, "weights that are not quantized"),
}

_KINDS: Required = {
    "vocab_size": COUNT,
    "num_hidden_layers": LAYERS,
    "num_kv_heads": COUNT_OR_NULL,
    "intermediate_size": COUNT_OR_NULL,
    "hidden_ratio": POSITIVE_OR_NULL,
    "use_short_conv": FLAG,
    "conv_size": COUNT_OR_NULL,
    "gate_logit_normalizer": POSITIVE,
    "rope_theta": POSITIVE,
    "norm_eps": POSITIVE,
    "output_norm_eps": POSITIVE,
    "elementwise_affine": FLAG,
    "initializer_range": POSITIVE,
    "tie_word_embeddings": FLAG,
    "dtype": DTYPE,
    "torch_dtype": DTYPE,
}

_HEADS: Required = {
    "hidden_size": COUNT,
    "num_heads": COUNT,
    **dict.fromkeys(("expand_k", "expand_v", "exapnd_k", "exapnd_v"), POSITIVE),
}
"""The keys that the sizes of heads follow from."""

# Keys for training, or for how the original computes the same thing; gates and norms that its code
# reads about, and computes as if it had not.
_WITHOUT_EFFECT = {
    "use_output_gate", "use_norm",
    "fuse_cross_entropy", "fuse_norm", "fuse_swiglu", "max_position_embeddings", "norm_first",
    "num_attention_heads", "num_key_value_heads", "rand_window", "gsa_aux_loss_enable",
    "gsa_aux_loss_coeff", "gsa_aux_loss_target_ratio",
}  # fmt: skip


def read_published(
    fields: Mapping[str, Any], *, param_dtype: DType = "float32", **chosen: Any
) -> ImportedConfig:
    """Translates the config.json of a model of the published architecture.

    Slots and windows are the original's, unless other windows are chosen.

    Args:
        fields: the parsed config.json.
        param_dtype: the dtype of the parameters.
        chosen: values for any of `nha_jax.hf.config.FREE_FIELDS`.

    Raises:
        ValueError: keys ask for what a `Model` does not compute; one line names each of them, its
            value and what is expected. Or `chosen` has a field that config.json determines.
    """
    if wrong := sorted(set(chosen) - set(FREE_FIELDS)):
        raise ValueError(f"{', '.join(wrong)} cannot be chosen: the original determines it")
    values = {**PUBLISHED_FAMILY.defaults, **fields}
    wrong_heads = refused(values, _HEADS)
    problems = wrong_architecture(values, PUBLISHED_FAMILY.architecture)
    problems += [*refused(values, _REQUIRED), *refused(values, _KINDS), *wrong_heads]
    generation, wrong = find_generation(fields)
    problems += wrong
    arithmetic, wrong = read_arithmetic(values, generation, layer_count(values))
    problems += wrong
    key_dim, value_dim, wrong = (1, 1, []) if wrong_heads else _head_sizes(values)
    problems += wrong
    num_slots = key_dim if values["num_slots"] is None else values["num_slots"]
    problems += fixed_slots(num_slots, chosen)
    if problems:
        raise ValueError(listed(problems))
    own = {
        "num_slots": num_slots,
        "window_size": arithmetic.windows,
        "slot_feature_map": arithmetic.slot_feature_map,
        "gate_logit_normalizer": values["gate_logit_normalizer"],
        "empty_slots": values.get("empty_slots", "attend"),
        "dtype": computing_dtype(fields),
    }
    try:
        config = ModelConfig(
            vocab_size=values["vocab_size"],
            num_layers=values["num_hidden_layers"],
            hidden_size=values["hidden_size"],
            num_query_heads=values["num_heads"],
            num_kv_heads=values["num_kv_heads"],
            key_dim=key_dim,
            value_dim=value_dim,
            mlp_size=_mlp_size(values),
            conv_width=values["conv_size"] if values["use_short_conv"] else 0,
            rope_theta=values["rope_theta"],
            norm_eps=values["norm_eps"],
            output_norm_eps=_output_norm_eps(values),
            attention_scale=arithmetic.attention_scale,
            slot_delay=arithmetic.slot_delay,
            tie_embeddings=bool(values["tie_word_embeddings"]),
            initializer_range=values["initializer_range"],
            **PUBLISHED_FIELDS | own | chosen,
            param_dtype=param_dtype,
        )
    except ValueError as error:
        raise ValueError(listed([str(error)])) from None
    config = dataclasses.replace(config, window_size=shortest_window_size(config))
    known = {*PUBLISHED_FAMILY.defaults, *KEYS, *_KINDS, *_REQUIRED, *_WITHOUT_EFFECT, *HARMLESS}
    known |= {"expand_k", "expand_v", "feature_map", SHIFT, "empty_slots"}
    notices = (*unknown_notice(sorted(set(fields) - known)), *_differences(config))
    scaled = bool(values.get("elementwise_affine", True))
    table = functools.partial(published_table, output_norm_scale=scaled)
    return ImportedConfig(PUBLISHED_FAMILY, config, table, notices)


def published_notices(config: ModelConfig) -> tuple[str, ...]:
    """Describes where the authors' code computes something else of what we write than the model."""
    return _differences(config) + other_generation_notice(config)


def _differences(config: ModelConfig) -> tuple[str, ...]:
    """Describes where the code of the model's own generation computes something else."""
    notices = generation_notices(config) + empty_slots_notice(config)
    eps = _resolved_eps(config)
    if eps != OUTPUT_NORM_EPS:
        notices += (
            f"in the norm after the attention the authors' code adds {OUTPUT_NORM_EPS}, whatever "
            f"norm_eps is, and this model {eps}",
        )
    return notices


def _output_norm_eps(values: Mapping[str, Any]) -> float | None:
    """Returns what is added in the norm after the attention; None where it is norm_eps.

    Files that we wrote say it (output_norm_eps), or, by earlier versions, mean norm_eps; what tells
    these is their empty_slots. The authors' have neither.
    """
    ours = values["norm_eps"] if "empty_slots" in values else OUTPUT_NORM_EPS
    eps = values.get("output_norm_eps", ours)
    return None if eps == values["norm_eps"] else eps


def _resolved_eps(config: ModelConfig) -> float:
    return config.norm_eps if config.output_norm_eps is None else config.output_norm_eps


def _head_sizes(values: Mapping[str, Any]) -> tuple[int, int, list[str]]:
    """Returns key_dim and value_dim, and what is wrong with the keys that they come from."""
    width, heads = values["hidden_size"], values["num_heads"]
    problems, sizes = [], []
    for part in "kv":
        # The authors' code misspells the key; the files that it writes also have the right one.
        ratio = values.get(f"expand_{part}", values[f"exapnd_{part}"])
        if int(width * ratio) % heads:
            problems.append(f"expand_{part} = {ratio}: does not divide into {heads} heads")
        sizes.append(max(int(width * ratio) // heads, 1))
    if sizes[1] * heads != width:
        problems.append(f"expand_v = {ratio}: expected 1, since g_norm is as wide as the model")
    return sizes[0], sizes[1], problems


def _mlp_size(values: Mapping[str, Any]) -> int:
    """Returns intermediate_size; if unset, 2/3 hidden_ratio hidden_size, rounded up to 256s."""
    if values["intermediate_size"] is not None:
        return values["intermediate_size"]
    ratio = 4 if values["hidden_ratio"] is None else values["hidden_ratio"]
    return 256 * -(-int(values["hidden_size"] * ratio * 2 / 3) // 256)


def write_published(config: ModelConfig) -> dict[str, Any]:
    """Writes the config.json of a model of the published architecture.

    Raises:
        ValueError: the authors' code cannot compute this; one line names every field in the way.
    """
    problems = [
        f"{field} = {getattr(config, field)!r}: expected {value!r}"
        for field, value in PUBLISHED_FIELDS.items()
        if getattr(config, field) != value
    ]
    arithmetic, wrong = write_arithmetic(config)
    problems += [*without_slots(config), *wrong]
    width, heads = config.hidden_size, config.num_query_heads
    if heads * config.value_dim != width:
        problems.append(f"value_dim = {config.value_dim}: expected hidden_size / num_query_heads")
    key_ratio = heads * config.key_dim / width
    if int(width * key_ratio) != heads * config.key_dim:
        problems.append(f"key_dim = {config.key_dim}: its share of hidden_size is no exact number")
    if problems:
        raise ValueError(f"the authors' code cannot compute this model: {'; '.join(problems)}")
    return {
        "architectures": [PUBLISHED_FAMILY.architecture],
        "model_type": PUBLISHED_FAMILY.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": width,
        "num_hidden_layers": config.num_layers,
        "num_heads": heads,
        "num_kv_heads": config.num_kv_heads,
        "expand_k": key_ratio,
        "exapnd_k": key_ratio,
        "expand_v": 1,
        "exapnd_v": 1,
        "num_slots": config.num_slots,
        **arithmetic,
        "gate_logit_normalizer": config.gate_logit_normalizer,
        "use_short_conv": config.conv_width > 0,
        "conv_size": config.conv_width or 4,
        "conv_bias": False,
        "intermediate_size": config.mlp_size,
        "hidden_act": "swish",
        "norm_eps": config.norm_eps,
        "output_norm_eps": _resolved_eps(config),
        "elementwise_affine": True,
        "rope_theta": config.rope_theta,
        "initializer_range": config.initializer_range,
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": config.param_dtype,
        "empty_slots": config.empty_slots,
    }
