"""The keys of a config.json about the rotary embedding, in both of transformers' spellings."""

import math
from collections.abc import Mapping
from typing import Any, cast, get_args

from nha_jax.config_parts import RopeScaling, RopeScalingKind
from nha_jax.hf.fields import (
    COUNT_OR_NULL,
    FLAG,
    NUMBER_OR_NULL,
    POSITIVE,
    POSITIVE_OR_NULL,
    Required,
    refused,
)
from nha_jax.scalars import shown

DEFAULT_THETA = 10000.0

_SHARED = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
_KEYS: dict[str, dict[str, str]] = {
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "original_max_position_embeddings": "original_length",
        "low_freq_factor": "low_frequency_factor",
        "high_freq_factor": "high_frequency_factor",
    },
    "yarn": {
        "factor": "factor",
        "original_max_position_embeddings": "original_length",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "attention_factor": "attention_factor",
        "truncate": "truncate",
    },
}
"""For each kind: the key of transformers -> the field of `RopeScaling`."""

_NEEDED = {
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor"},
    "yarn": set[str](),
}
_MSCALES = ("mscale", "mscale_all_dim")

_KINDS: Required = {
    "factor": POSITIVE_OR_NULL,
    "original_max_position_embeddings": COUNT_OR_NULL,
    "low_freq_factor": POSITIVE_OR_NULL,
    "high_freq_factor": POSITIVE_OR_NULL,
    "beta_fast": POSITIVE_OR_NULL,
    "beta_slow": POSITIVE_OR_NULL,
    "attention_factor": POSITIVE_OR_NULL,
    "truncate": FLAG,
    "mscale": NUMBER_OR_NULL,
    "mscale_all_dim": NUMBER_OR_NULL,
}
_OUTSIDE = ("original_max_position_embeddings", "max_position_embeddings")


def read_rope(
    values: Mapping[str, Any],
) -> tuple[float, RopeScaling | None, list[str], list[str]]:
    """Reads the rotary embedding of a config.json.

    transformers 5 writes rope_parameters, older versions rope_theta and rope_scaling; where a file
    has several, transformers' own order of precedence holds.

    Args:
        values: config.json, the family's defaults filled in.

    Returns:
        The base, the scaling or None, what is wrong with the keys, and the keys that are unknown.
    """
    key = "rope_scaling" if values.get("rope_scaling") else "rope_parameters"
    rope = values.get(key) or {}
    if not isinstance(rope, dict) or any(isinstance(part, dict) for part in rope.values()):
        expected = "a mapping, the same for all layers"
        return DEFAULT_THETA, None, [f"{key} = {shown(rope)}: expected {expected}"], []
    inside = f"{key}."
    problems = refused(rope, {"rope_theta": POSITIVE}, inside)
    if "rope_theta" not in rope:
        problems = refused(values, {"rope_theta": POSITIVE})
    theta = rope.get("rope_theta", values.get("rope_theta", DEFAULT_THETA))
    kind, scaling = rope.get("rope_type", rope.get("type", "default")), None
    if rope.get("partial_rotary_factor") not in (None, 1):
        partial = shown(rope["partial_rotary_factor"])
        problems.append(f"{inside}partial_rotary_factor = {partial}: expected 1")
    keys: set[str] = set()
    if not isinstance(kind, str) or kind not in ("default", *_KEYS):
        known = ", ".join(map(repr, ("default", *_KEYS)))
        problems.append(f"{inside}rope_type = {shown(kind)}: expected one of {known}")
    elif kind != "default":
        keys = {*_KEYS[kind], *(_MSCALES if kind == "yarn" else ())}
        wrong = refused(rope, {name: _KINDS[name] for name in sorted(keys)}, inside)
        missing = sorted(name for name in _NEEDED[kind] if rope.get(name) is None)
        wrong += [f"{inside}{name} is missing: {kind!r} needs it" for name in missing]
        problems += wrong
        if not wrong and not refused(values, dict.fromkeys(_OUTSIDE, COUNT_OR_NULL)):
            try:
                scaling = _scaling(kind, rope, values)
            except (ArithmeticError, ValueError) as error:
                problems.append(f"{key} does not fit: {error}")
    problems += refused(values, {"original_max_position_embeddings": COUNT_OR_NULL})
    unknown = [f"{inside}{name}" for name in sorted(set(rope) - keys - set(_SHARED))]
    return theta, scaling, problems, unknown


def write_rope(theta: float, scaling: RopeScaling | None) -> dict[str, Any]:
    """Writes the keys in a form that every version of transformers reads."""
    if scaling is None:
        return {"rope_theta": theta, "rope_scaling": None}
    rope = {name: getattr(scaling, field) for name, field in _KEYS[scaling.kind].items()}
    # Older versions want numbers with a point, and do not know the key that the default leaves out.
    rope |= {"factor": float(scaling.factor), "truncate": None if scaling.truncate else False}
    given = {name: value for name, value in rope.items() if value is not None}
    return {"rope_theta": theta, "rope_scaling": {"rope_type": scaling.kind, **given}}


def _scaling(kind: str, rope: Mapping[str, Any], values: Mapping[str, Any]) -> RopeScaling:
    """Builds the scaling; raises ArithmeticError or ValueError if a value does not fit."""
    assert kind in get_args(RopeScalingKind)
    longest = values.get("max_position_embeddings")
    own = rope.get("original_max_position_embeddings") or longest
    length = values.get("original_max_position_embeddings") or own
    filled = {**rope, "original_max_position_embeddings": length}
    if kind == "yarn":
        if filled.get("factor") is None:
            if longest is None:
                raise ValueError("factor is missing, and so is max_position_embeddings")
            filled["factor"] = longest / length
        filled["attention_factor"] = _attention_factor(filled)
    fields = {field: filled.get(name) for name, field in _KEYS[kind].items()}
    given = {field: value for field, value in fields.items() if value is not None}
    return RopeScaling(kind=cast(RopeScalingKind, kind), **given)


def _attention_factor(rope: Mapping[str, Any]) -> float | None:
    """Reads attention_factor, which DeepSeek gives as a ratio of two mscales (arXiv 2405.04434)."""
    mscale, mscale_all_dim = (rope.get(name) for name in _MSCALES)
    if rope.get("attention_factor") is not None or not (mscale and mscale_all_dim):
        return rope.get("attention_factor")
    growth = 0.1 * math.log(rope["factor"])
    return (growth * mscale + 1) / (growth * mscale_all_dim + 1)
