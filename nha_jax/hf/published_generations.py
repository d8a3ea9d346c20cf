"""The two generations of the authors' code, which compute different things from one format.

    what is computed               of the paper's time        later
    the slots read                 q, k                       feature_map(q), feature_map(k)
    a token enters the slots       as it leaves the window    gsa_kv_shift steps after its own
    tokens in the window           window_size                window_size + 1
    scale of the logits            key_dim ** -0.5            1
    layers of full attention       by block_size              none

Both know the keys of the other, or ignore them. The configuration class of the paper's time writes
block_size into every file and the later one gsa_kv_shift, which tells them apart.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from nha_jax.config import ModelConfig
from nha_jax.hf.fields import Required, is_empty, refused
from nha_jax.hf.published_windows import (
    Windows,
    full_layers_notice,
    read_windows,
    write_windows,
)
from nha_jax.ops.types import SlotFeatureMap
from nha_jax.scalars import is_count, shown

Generation = Literal["paper", "later"]

SHIFT = "gsa_kv_shift"

_FEATURE_MAPS: dict[str, SlotFeatureMap] = {"swish": "silu", "relu": "relu"}
_LEARNED = "'swish' or 'relu': that of 't2r' is a layer of its own"

_REQUIRED_OF: dict[Generation, Required] = {
    # That code makes the feature map, and then passes queries and keys by it.
    "paper": {"feature_map": (lambda value: value in (*_FEATURE_MAPS, None), _LEARNED)},
    "later": {
        "feature_map": (lambda value: value in _FEATURE_MAPS, _LEARNED),
        "block_size": (is_empty, "null: the later code has no layers of full attention by it"),
        "window_size": (lambda value: is_count(value, 1), "a whole number of at least 1"),
    },
}


@dataclass(frozen=True)
class Arithmetic:
    """What a generation makes of the keys that it reads in its own way: fields of `ModelConfig`."""

    windows: Windows
    slot_feature_map: SlotFeatureMap = "identity"
    slot_delay: int | None = None
    attention_scale: float | None = None


def find_generation(fields: Mapping[str, Any]) -> tuple[Generation, list[str]]:
    """Says which generation wrote a config.json; returns it and what is wrong if none has."""
    if SHIFT in fields:
        return "later", []
    missing = (
        f'{SHIFT} is missing, and so is block_size: expected "{SHIFT}": 0 if the authors\' later '
        'code trained the model, or "block_size": null if that of the paper\'s time did; they '
        "compute different things"
    )
    return "paper", [] if "block_size" in fields else [missing]


def read_arithmetic(
    values: Mapping[str, Any], generation: Generation, num_layers: int
) -> tuple[Arithmetic, list[str]]:
    """Reads what the generations treat differently; returns it and what is wrong with the keys."""
    problems = refused(values, _REQUIRED_OF[generation])
    if generation == "paper":
        windows, wrong = read_windows(values, num_layers)
        return Arithmetic(windows), problems + wrong
    window, shift = values["window_size"], values[SHIFT]
    if not is_count(shift, 0):
        problems.append(f"{SHIFT} = {shown(shift)}: expected a whole number of at least 0")
    elif is_count(window, 1) and shift > window + 1:
        problems.append(
            f"{SHIFT} = {shown(shift)}: expected at most window_size + 1 = {window + 1}; beyond it "
            "tokens are neither in the window nor in the slots"
        )
    if problems:
        return Arithmetic((None,) * num_layers), problems
    feature_map = _FEATURE_MAPS[values.get("feature_map", "swish")]
    return Arithmetic((window + 1,) * num_layers, feature_map, shift, 1.0), []


def is_later(config: ModelConfig) -> bool:
    """Whether only the later generation may compute a model."""
    return (
        config.slot_delay is not None
        or config.slot_feature_map != "identity"
        or config.attention_scale not in (None, config.key_dim**-0.5)
    )


def write_arithmetic(config: ModelConfig) -> tuple[dict[str, Any], list[str]]:
    """Writes the keys that the generations treat differently; returns them and what is in the way.

    Raises:
        ValueError: the paper's generation has no windows like the config's.
    """
    if not is_later(config):
        return write_windows(config.windows) | {"feature_map": "swish"}, []
    window, *others = set(config.windows)
    problems = []
    if config.attention_scale != 1:
        problems.append(f"attention_scale = {config.attention_scale}: expected 1")
    if config.slot_feature_map == "identity":
        problems.append("slot_feature_map = 'identity': expected 'silu' or 'relu'")
    if others or window is None or window < 2:
        problems.append(
            f"window_size = {config.window_size}: expected one of at least 2 for all layers"
        )
    if problems:
        return {}, problems
    assert window is not None
    names = {ours: theirs for theirs, ours in _FEATURE_MAPS.items()}
    return {
        "window_size": window - 1,
        "feature_map": names[config.slot_feature_map],
        SHIFT: window if config.slot_delay is None else config.slot_delay,
    }, []


def generation_notices(config: ModelConfig) -> tuple[str, ...]:
    """Describes where the code of the generation computes something else than the model."""
    if not is_later(config):
        return full_layers_notice(config.windows)
    return (
        "the authors' code generates other texts than its own forward pass means, as it adds half "
        "of the window's output to half of the slots'; this model generates by the forward pass",
    )


def other_generation_notice(config: ModelConfig) -> tuple[str, ...]:
    """Returns the notice about the generation that reads a file of the other as its own."""
    if is_later(config):
        return ()
    return (
        "the authors' code of the paper's time computes this model; their later code reads the "
        "same files and computes something else",
    )
