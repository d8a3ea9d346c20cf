"""Models of the published architecture, in the format of its authors (JusenD/NHA, "nha").

The paper and the code of its time are followed. That code has a feature map among its options and
uses none: queries and keys reach the slots as they are. Later versions of it apply the map, leave
the logits unscaled, and let tokens be in the window and the slots at once; their config.json has a
gsa_kv_shift, and is refused. Layers of full attention and empty slots are as for hybridised models
(`nha_jax.hf.published_hybrid`).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from nha_jax.config import DType, ModelConfig
from nha_jax.hf.config import (
    CHOSEN,
    HARMLESS,
    Original,
    Required,
    computing_dtype,
    listed,
    nothing,
    refused,
    unknown_notice,
)
from nha_jax.hf.families import NATIVE
from nha_jax.hf.published_hybrid import empty_slots_notice, fixed_slots, unpublished
from nha_jax.hf.published_windows import (
    KEYS,
    full_layers_notice,
    read_layout,
    shortest,
    write_layout,
)
from nha_jax.hf.tensors import native_table

PUBLISHED: dict[str, Any] = {
    "value_activation": "silu",
    "output_norm": True,
    "qk_norm": False,
    "attention_bias": "none",
    "rope_scaling": None,
    "experts": None,
}
"""What makes a `ModelConfig` one of the published architecture."""


# What the original would compute otherwise than we do, unless the key says the usual.
_REQUIRED: Required = {
    "feature_map": (lambda value: value in ("swish", "relu", None), "'swish' or 'relu'"),
    "hidden_act": (lambda value: value in ("swish", "silu"), "'swish'"),
    "conv_bias": (nothing, "false"),
    "use_output_gate": (nothing, "false"),
    "use_norm": (bool, "true"),
    "elementwise_affine": (bool, "true"),
    "attn": (nothing, "null: its layers have no gates"),
    "rope_scaling": (nothing, "null"),
    "gsa_kv_shift": (
        lambda value: value is None,
        "a model of the paper's time, whose config has no such key: later code computes "
        "something else",
    ),
    "quantization_config": (nothing, "weights that are not quantized"),
}

# Of training, and of how the original computes the same.
_WITHOUT_EFFECT = {
    "fuse_cross_entropy", "fuse_norm", "fuse_swiglu", "max_position_embeddings", "norm_first",
    "num_attention_heads", "num_key_value_heads", "rand_window", "gsa_aux_loss_enable",
    "gsa_aux_loss_coeff", "gsa_aux_loss_target_ratio",
}  # fmt: skip


def read_native(
    fields: Mapping[str, Any], *, param_dtype: DType = "float32", **chosen: Any
) -> Original:
    """What the config.json of a model of the published architecture says.

    Slots and windows are the original's, unless other windows are chosen.

    Args:
        fields: the parsed config.json.
        param_dtype: of the parameters.
        chosen: other fields of `ModelConfig`, of `nha_jax.hf.config.CHOSEN`.

    Raises:
        ValueError: keys say what cannot be computed; one line names every one of them with its
            value and what is expected. Or `chosen` has a field that the original determines.
    """
    if wrong := sorted(set(chosen) - set(CHOSEN)):
        raise ValueError(f"{', '.join(wrong)} cannot be chosen: the original determines it")
    values = {**NATIVE.defaults, **fields}
    architectures = values.get("architectures") or []
    problems = refused(values, _REQUIRED)
    if architectures not in ([], [NATIVE.architecture]):
        problems.append(f"architectures = {architectures!r}: expected {NATIVE.architecture!r}")
    windows, wrong = read_layout(values, values["num_hidden_layers"])
    problems += wrong
    key_dim, value_dim, wrong = _head_sizes(values)
    problems += wrong
    num_slots = key_dim if values["num_slots"] is None else values["num_slots"]
    problems += fixed_slots(num_slots, chosen)
    if problems:
        raise ValueError(listed(problems))
    own = {
        "num_slots": num_slots,
        "window_size": windows,
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
            tie_embeddings=values["tie_word_embeddings"],
            initializer_range=values["initializer_range"],
            **PUBLISHED | own | chosen,
            param_dtype=param_dtype,
        )
    except ValueError as error:
        raise ValueError(listed([str(error)])) from None
    config = dataclasses.replace(config, window_size=shortest(config))
    known = {*NATIVE.defaults, *KEYS, *_REQUIRED, *_WITHOUT_EFFECT, *HARMLESS}
    known |= {"expand_k", "expand_v", "empty_slots"}
    notices = (*unknown_notice(sorted(set(fields) - known)), *native_notices(config))
    return Original(NATIVE, config, native_table, notices)


def native_notices(config: ModelConfig) -> tuple[str, ...]:
    """Where the authors' code computes otherwise than the model."""
    return full_layers_notice(config.windows) + empty_slots_notice(config)


def _head_sizes(values: Mapping[str, Any]) -> tuple[int, int, list[str]]:
    """Of a head's key and value, and what is wrong with the keys."""
    width, heads = values["hidden_size"], values["num_heads"]
    problems, sizes = [], []
    for part in "kv":
        # Misspelt in the code, and again as it should be in the files that it writes.
        share = values.get(f"expand_{part}", values[f"exapnd_{part}"])
        if int(width * share) % heads:
            problems.append(f"expand_{part} = {share}: does not divide into {heads} heads")
        sizes.append(max(int(width * share) // heads, 1))
    if sizes[1] * heads != width:
        problems.append(f"expand_v = {share}: expected 1, since g_norm is as wide as the model")
    return sizes[0], sizes[1], problems


def _mlp_size(values: Mapping[str, Any]) -> int:
    """2/3 of hidden_ratio times the width, up to a multiple of 256, where it is not told."""
    if values["intermediate_size"] is not None:
        return values["intermediate_size"]
    ratio = 4 if values["hidden_ratio"] is None else values["hidden_ratio"]
    return 256 * -(-int(values["hidden_size"] * ratio * 2 / 3) // 256)


def write_native(config: ModelConfig) -> dict[str, Any]:
    """The config.json of a model of the published architecture.

    Raises:
        ValueError: the authors' code cannot compute this; one line names every field in the way.
    """
    problems = [
        f"{field} = {getattr(config, field)!r}: expected {value!r}"
        for field, value in PUBLISHED.items()
        if getattr(config, field) != value
    ]
    problems += unpublished(config)
    width, heads = config.hidden_size, config.num_query_heads
    if heads * config.value_dim != width:
        problems.append(f"value_dim = {config.value_dim}: expected hidden_size / num_query_heads")
    share = heads * config.key_dim / width
    if int(width * share) != heads * config.key_dim:
        problems.append(f"key_dim = {config.key_dim}: its share of hidden_size is no exact number")
    if problems:
        raise ValueError(f"the authors' code cannot compute this model: {'; '.join(problems)}")
    return {
        "architectures": [NATIVE.architecture],
        "model_type": NATIVE.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": width,
        "num_hidden_layers": config.num_layers,
        "num_heads": heads,
        "num_kv_heads": config.num_kv_heads,
        "expand_k": share,
        "exapnd_k": share,
        "expand_v": 1,
        "exapnd_v": 1,
        "num_slots": config.num_slots,
        **write_layout(config.windows),
        "gate_logit_normalizer": config.gate_logit_normalizer,
        "feature_map": "swish",
        "use_short_conv": config.conv_width > 0,
        "conv_size": config.conv_width or 4,
        "conv_bias": False,
        "intermediate_size": config.mlp_size,
        "hidden_act": "swish",
        "norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "initializer_range": config.initializer_range,
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": config.param_dtype,
        "empty_slots": config.empty_slots,
    }
