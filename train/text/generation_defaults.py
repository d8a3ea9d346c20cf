"""How a model's authors want it sampled: `generation_config.json`."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from train.data.tokenizer.files import GENERATION_CONFIG_FILE, end_tokens, read_object
from train.errors import DataError


@dataclass(frozen=True)
class GenerationDefaults:
    """What `generation_config.json` says of sampling.

    Attributes:
        sampling: fields of `nha_jax.SamplingOptions` and their values.
        stop_tokens: each of which ends a text.
    """

    sampling: Mapping[str, float]
    stop_tokens: tuple[int, ...]

    @classmethod
    def of(cls, folder: Path) -> Self:
        """Those of a folder; empty if it has no such file, or the file says nothing.

        Raises:
            DataError: the file is damaged.
        """
        path = folder / GENERATION_CONFIG_FILE
        if not path.is_file():
            return cls({}, ())
        try:
            values = read_object(path.read_bytes(), path)
            return cls(_sampling(values, path), end_tokens(folder))
        except OSError as error:
            raise DataError(f"{path}: cannot read it: {error.strerror}") from None


def _sampling(values: Mapping[str, Any], path: Path) -> dict[str, float]:
    """The options that are told and do something; a file may spell out that they do nothing."""
    nothing = {"top_k": 0, "top_p": 1, "min_p": 0, "repetition_penalty": 1}
    told = {name: values.get(name) for name in ("temperature", *nothing)}
    if values.get("do_sample") is False:
        penalty = told["repetition_penalty"]
        told = {"temperature": 0, "repetition_penalty": penalty}
    for name, x in told.items():
        if x is not None and (not isinstance(x, int | float) or isinstance(x, bool)):
            raise DataError(f"{path}: {name} = {x!r}: expected a number")
    return {name: x for name, x in told.items() if x is not None and x != nothing.get(name)}
