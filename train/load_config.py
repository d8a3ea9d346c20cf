"""Reading a configuration: a YAML file and `--dotted.key=value` options become a `TrainConfig`.

Every mistake is a `ConfigError` of one line: the dotted key, the value, what was expected.
"""

import difflib
import functools
import json
import re
import sys
import typing
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pydantic

from nha_jax import ModelConfig
from train.config import TrainConfig
from train.config_keys import describe, keys
from train.errors import ConfigError, cut
from train.paths import hide_bytes, show_bytes
from train.phases import phases_of
from train.renamed_keys import RENAMED_KEYS, rename_key, rename_keys
from train.shipped_configs import find_config
from train.stage_config import StageConfig
from train.storage.initial_model import has_config, read_config
from train.storage.run_folder import RunFolder
from train.windows import WINDOWS_KEY, read_windows
from train.yaml_text import read_yaml

PRESET_KEY = "preset"
INITIAL_MODEL_KEY = "initial_model"
_SCHEDULE_KEY = "window_schedule"  # in the section of the model, though no part of a model
_PARAM_DTYPE, _FROZEN_DTYPE = "param_dtype", "frozen_dtype"
_BITS = {"seed": 32, "model.num_layers": 16}  # of integers that are not counts of 31 bits
_BITS_OF_PERIODS = 63  # "never" may be written as a large number
_MOST_BYTES = 1 << 20


def load_config(path: str, overrides: Sequence[tuple[str, str]] = ()) -> TrainConfig:
    """Reads, overrides and checks a configuration.

    Args:
        path: a YAML file, or the name of one that comes with nha_jax, e.g. "quickstart".
        overrides: (dotted key, YAML text) pairs, applied in order.

    Returns:
        The checked configuration. A key under an old name costs a line on stderr.

    Raises:
        ConfigError: one line naming the key and the value.
    """
    values = _rename(_read(path))
    for name, text in overrides:
        new = _rename_option(name)
        key = next((key for key in keys() if key.name == new), None)
        annotation = key.annotation if key else Any
        value = read_yaml(hide_bytes(text), cut(f"--{name}={text}"), annotation, new)
        _override(values, new, show_bytes(value))
    values = _rename(values)  # an override may have given a whole section
    _check_names(values, TrainConfig, "")
    _check_integers(values, "")
    values = {key: value for key, value in values.items() if value is not None}
    values = _fill_model(_take_schedule(_read_windows_file(values)))
    config = validate(_fill_stages(values))
    try:
        phases_of(config)
    except ValueError as error:  # the stages have been checked, under the windows of the end
        raise ConfigError(f"model.{_SCHEDULE_KEY}: {error}") from None
    return config


def _read(path: str) -> dict[str, Any]:
    try:
        with find_config(path).open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the configuration: {error.strerror}") from None
    if len(content) > _MOST_BYTES:
        raise ConfigError(f"{path}: larger than {_MOST_BYTES} bytes: no configuration")
    try:
        text = content.decode()
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: the configuration is not UTF-8 text") from None
    values = read_yaml(text, path, TrainConfig)
    if not isinstance(values, dict):
        found = "none" if values is None else _show(values)
        raise ConfigError(f"{path}: expected `key: value` lines, found {found}")
    return values


def _rename(values: dict[str, Any]) -> dict[str, Any]:
    """Gives keys their present names, and warns of each old one."""
    try:
        renamed, found = rename_keys(values)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    for old in found:
        _warn_of_old_name(old, RENAMED_KEYS[old])
    return renamed


def _rename_option(name: str) -> str:
    """Gives the key of an override its present name, and warns if it has the old one."""
    new = rename_key(name)
    if new != name:
        _warn_of_old_name(name, new)
    return new


def _warn_of_old_name(old: str, new: str) -> None:
    print(f"nha: {old} is now called {new}; the old name still works", file=sys.stderr)


def _override(values: dict[str, Any], name: str, value: Any) -> None:
    """Sets a dotted key, and makes the sections that it lies in."""
    *parents, last = name.split(".")
    for parent in parents:
        child = values.get(parent)
        if child is None:
            child = values[parent] = {}
        if not isinstance(child, dict):
            raise _unknown_key(name, value)
        values = child
    values[last] = value


def _check_names(values: Mapping[str, Any], section: type, prefix: str) -> None:
    """Raises ConfigError if a value, at any depth, has a key that the section has not."""
    known = {key.name.removeprefix(prefix): key for key in keys(section, prefix)}
    for name, value in values.items():
        if prefix == "model." and name in (PRESET_KEY, _SCHEDULE_KEY):
            continue
        key = known.get(name) if "." not in str(name) else None
        if key is None:
            raise _unknown_key(f"{prefix}{name}", value, [prefix + name for name in known])
        if key.section and isinstance(value, dict):
            _check_names(value, key.section, f"{key.name}.")


@functools.cache
def _integer_bits() -> dict[str, int]:
    """How many bits the integers under each key that takes some may have."""
    counting = [key.name for key in keys() if int in _types_in(key.annotation)]
    periods = {name: _BITS_OF_PERIODS for name in counting if "every" in name}
    return dict.fromkeys(counting, 31) | periods | _BITS


def _types_in(annotation: Any) -> set[Any]:
    return {annotation}.union(*map(_types_in, typing.get_args(annotation)))


def _check_integers(value: Any, name: str, bits: int | None = None) -> None:
    """Raises ConfigError if an integer, at any depth, is larger than what it counts can be."""
    bits = _integer_bits().get(name, bits)
    if isinstance(value, Mapping):
        for key, child in value.items():
            _check_integers(child, f"{name}.{key}".lstrip("."), bits)
    elif isinstance(value, list):
        for child in value:
            _check_integers(child, name, bits)
    elif bits and isinstance(value, int) and not -(2**bits) <= value < 2**bits:
        raise ConfigError(f"{name} = {_show(value)}: expected an integer below 2**{bits}")


def _unknown_key(name: str, value: Any, beside: Sequence[str] = ()) -> ConfigError:
    """Words the error of a key that does not exist, with the closest key that does.

    Args:
        name: the dotted name.
        value: what was given for it.
        beside: keys of the same section, if that is one of those that may be repeated.
    """
    known = [key.name for key in keys() if not (key.is_section and "." in name)]
    known += [f"model.{PRESET_KEY}", *(key for key in beside if key not in known)]
    parent, _, last = name.rpartition(".")
    by_last = {key.rpartition(".")[2]: key for key in known}
    close = [by_last[last]] if last in by_last else []
    close = close or difflib.get_close_matches(name, known, n=1, cutoff=0.8)
    close = close or [by_last[m] for m in difflib.get_close_matches(last, by_last, n=1, cutoff=0.7)]
    siblings = [key.removeprefix(f"{parent}.") for key in known if key.startswith(f"{parent}.")]
    if close:
        hint = f"did you mean {close[0]}?"
    elif siblings:
        hint = f"{parent} has {', '.join(siblings)}"
    else:
        hint = "`nha train --help` lists them all"
    return ConfigError(f"{name} = {_show(value)}: there is no such key; {hint}")


def _read_windows_file(values: dict[str, Any]) -> dict[str, Any]:
    """Replaces a `model.window_size` that names the result of an `nha search` by its windows."""
    model = values.get("model")
    if not isinstance(model, dict):
        return values
    path = model.get(WINDOWS_KEY)
    if not isinstance(path, str) or not path.endswith(".json"):
        return values
    windows = read_windows(path, f"model.{WINDOWS_KEY}")
    return {**values, "model": {**model, WINDOWS_KEY: windows}}


def _take_schedule(values: dict[str, Any]) -> dict[str, Any]:
    """Takes `model.window_schedule` out of the section `model`, whose other keys are a model's."""
    model = values.get("model")
    if not isinstance(model, dict) or _SCHEDULE_KEY not in model:
        return values
    rest = {key: value for key, value in model.items() if key != _SCHEDULE_KEY}
    return {**values, "model": rest, _SCHEDULE_KEY: model[_SCHEDULE_KEY]}


def _fill_stages(values: dict[str, Any]) -> dict[str, Any]:
    """Completes each stage's sections by the run's, and `steps` by the sum of theirs.

    Raises:
        ConfigError: a stage would not be valid as a run of its own; the line names it.
    """
    stages = values.get("stages")
    if not stages:
        return values
    if not isinstance(stages, list):
        raise ConfigError(f"stages = {_show(stages)}: expected a list, each a section of keys")
    filled, total = [], 0
    for number, stage in enumerate(stages):
        if not isinstance(stage, dict) or not isinstance(stage.get("name"), str):
            raise ConfigError(f"stages.{number} = {_show(stage)}: expected keys, a name among them")
        where = f"stages.{stage['name']}"
        _check_names(stage, StageConfig, f"{where}.")
        stage = {key: value for key, value in stage.items() if value is not None}
        for section in ("optimizer", "loss"):
            own, general = stage.get(section), values.get(section)
            if isinstance(own, dict) and isinstance(general, dict):
                stage[section] = general | own
        filled.append(stage)
        alone = {**values, **stage}
        for key in ("name", "stages", _SCHEDULE_KEY) + (() if "steps" in stage else ("steps",)):
            alone.pop(key, None)
        try:
            _check_integers(alone, "")
            total += validate(alone).steps
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None
    return {"steps": total, **values, "stages": filled}


def _fill_model(values: dict[str, Any]) -> dict[str, Any]:
    """Completes the section `model` from `model.preset` or the configuration of `initial_model`.

    Keys that are given win. `model.preset` itself is not a field of the model, and is left out.
    """
    model, initial = values.get("model") or {}, values.get(INITIAL_MODEL_KEY)
    if not isinstance(model, dict):
        return values
    overrides = dict(model)
    preset = overrides.pop(PRESET_KEY, None)
    try:
        if PRESET_KEY in model:
            _check_preset(preset)
            filled = ModelConfig.preset(preset, **overrides)
        elif isinstance(initial, str):
            fields, dtypes = _initial_config(initial, values.get("run"))
            if _PARAM_DTYPE not in overrides:
                fields = fields | {_PARAM_DTYPE: dtypes.trained}
                values = {_FROZEN_DTYPE: dtypes.frozen, **values}
            filled = ModelConfig.from_dict(fields | overrides)
        else:
            return values
    except ValueError as error:
        raise _explain_value_error(error, "model") from None
    except OSError as error:
        shown = _show(initial)
        raise ConfigError(f"{INITIAL_MODEL_KEY} = {shown}: {error.strerror}") from None
    return {**values, "model": filled.to_dict()}


def _check_preset(name: Any) -> None:
    if not isinstance(name, str):
        raise ConfigError(f"model.{PRESET_KEY} = {_show(name)}: expected the name of a preset")
    try:
        ModelConfig.preset(name)
    except ValueError as error:
        raise ConfigError(f"model.{PRESET_KEY} = {_show(name)}: {error}") from None


class _Dtypes(NamedTuple):
    """What the parameters of an initial model are held in while they are trained, or not."""

    trained: str
    frozen: str | None


def _initial_config(name: str, run: Any) -> tuple[dict[str, Any], _Dtypes]:
    """Reads the initial model's configuration, or what the run stored of it if it is gone.

    Returns:
        The fields of the configuration, and the dtypes unless the user says otherwise. A file in
        bfloat16 is trained in float32, where small updates are not lost; what is not trained stays
        as the file has it. A run that has begun keeps what it has.
    """
    stored = (RunFolder(run).known_config() or {}) if isinstance(run, str) else {}
    begun = stored.get(INITIAL_MODEL_KEY) == name
    fields = stored["model"] if begun and not has_config(name) else read_config(name).to_dict()
    if begun:
        return fields, _Dtypes(stored["model"][_PARAM_DTYPE], stored.get(_FROZEN_DTYPE))
    held = fields[_PARAM_DTYPE]
    return fields, _Dtypes("float32", None if held == "float32" else held)


def validate(values: Mapping[str, Any]) -> TrainConfig:
    """Checks a whole configuration, e.g. a run's; a mistake is a ConfigError of one line."""
    # Through JSON, since pydantic's strict mode takes lists for tuples only from there.
    try:
        text = json.dumps(hide_bytes(dict(values)))
        return show_bytes(_adapter().validate_json(text, strict=True))
    except pydantic.ValidationError as error:
        raise _explain(error.errors()[0], values) from None


@functools.cache
def _adapter() -> pydantic.TypeAdapter[TrainConfig]:
    return pydantic.TypeAdapter(TrainConfig)


def _explain(error: Any, values: Mapping[str, Any]) -> ConfigError:
    """Words one of pydantic's errors as a line about one key."""
    known = {key.name: key for key in keys()}
    name = ""
    value: Any = values
    for part in error["loc"]:
        deeper = f"{name}.{part}".lstrip(".")
        deeper = f"model.{deeper}" if deeper == _SCHEDULE_KEY else deeper
        if deeper not in known:  # an index, or the member of a union that did not fit
            break
        name = deeper
        value = value.get(part) if isinstance(value, Mapping) else value
    if error["type"] == "missing":
        key = known[name]
        hint = f" ({key.help.rstrip('.')})" if key.help and not key.is_section else ""
        return ConfigError(f"{name}: missing; expected {describe(key.annotation)}{hint}")
    if error["type"] == "value_error":
        return _explain_value_error(error["ctx"]["error"], name)
    wanted = describe(known[name].annotation)
    hint = "; text goes in quotes" if wanted.startswith("text") and value is not None else ""
    return ConfigError(f"{name} = {_show(value)}: expected {wanted}{hint}")


def _explain_value_error(error: ValueError, section: str) -> ConfigError:
    """Words what a section's own check raised, with the dotted name of the key it begins with."""
    message = " ".join(str(error).split())
    message = message.removeprefix("ModelConfig: ")
    known = {key.name for key in keys()}
    starts_with_key = f"{section}.{re.split('[^a-z0-9_]', message)[0]}" in known
    separator = "." if starts_with_key else ": "
    return ConfigError(f"{section}{separator}{message}" if section else message)


def _show(value: Any) -> str:
    """Writes a value as it would stand in YAML, on one short line."""
    return cut(json.dumps(value, ensure_ascii=False))
