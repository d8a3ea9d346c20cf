"""The sampling that a model's authors recommend, from `generation_config.json`."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from train.data.tokenizer.files import GENERATION_CONFIG_FILE, end_tokens, read_object
from train.errors import DataError


@dataclass(frozen=True)
class GenerationDefaults:
    """The sampling options of a `generation_config.json`.

    Attributes:
        sampling: values by field of `nha_jax.SamplingOptions`.
        stop_tokens: tokens that end a text.
    """

    sampling: Mapping[str, float]
    stop_tokens: tuple[int, ...]

    @classmethod
    def of(cls, folder: Path) -> Self:
        """Reads a folder's defaults; they are empty if it has no such file or the file sets none.

        Raises:
            DataError: the file is damaged or cannot be read.
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
    """Selects the options that have an effect: files also list options at their neutral values."""
    neutral = {"top_k": 0, "top_p": 1, "min_p": 0, "repetition_penalty": 1}
    given = {name: values.get(name) for name in ("temperature", *neutral)}
    if values.get("do_sample") is False:
        penalty = given["repetition_penalty"]
        given = {"temperature": 0, "repetition_penalty": penalty}
    for name, x in given.items():
        if x is not None and (not isinstance(x, int | float) or isinstance(x, bool)):
            raise DataError(f"{path}: {name} = {x!r}: expected a number")
    return {name: x for name, x in given.items() if x is not None and x != neutral.get(name)}
