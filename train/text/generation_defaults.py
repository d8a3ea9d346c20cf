"""The sampling that a model's authors recommend, from `generation_config.json`."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from nha_jax.hf.fields import FLAG, INDEX_OR_NULL, POSITIVE_OR_NULL, Required, refused
from nha_jax.scalars import is_number
from nha_jax.storage.json_objects import parse_object
from nha_jax.tokenizer.files import (
    GENERATION_CONFIG_FILE,
    end_tokens,
    wrong_end_tokens,
)
from train.data.tokenizers import tokenizer_errors
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
    def of(cls, folder: Path, vocab_size: int) -> Self:
        """Reads a folder's defaults; they are empty if it has no such file or the file sets none.

        What transformers ignores is ignored: limits that exclude no token, and end tokens that the
        model cannot write.

        Args:
            folder: of a run or a saved model.
            vocab_size: the model's.

        Raises:
            DataError: the file is damaged or cannot be read; one line names every wrong field.
        """
        path = folder / GENERATION_CONFIG_FILE
        if not path.is_file():
            return cls({}, ())
        with tokenizer_errors():
            values = parse_object(path.read_bytes(), path)
        greedy = values.get("do_sample") is False
        kinds = {name: kind for name, kind in _KINDS.items() if not greedy or name in _GREEDY}
        if problems := refused(values, kinds) + wrong_end_tokens(values):
            raise DataError(f"{path}: {'; '.join(problems)}")
        with tokenizer_errors():
            stop = tuple(token for token in end_tokens(folder) if token < vocab_size)
        return cls(_sampling(values, vocab_size, greedy=greedy), stop)


_KINDS: Required = {
    "do_sample": FLAG,
    "temperature": (lambda x: x is None or (is_number(x) and x >= 0), "a number of at least 0"),
    "top_k": INDEX_OR_NULL,
    "top_p": (lambda x: x is None or (is_number(x) and x >= 0), "a number from 0 to 1"),
    "min_p": (lambda x: x is None or (is_number(x) and 0 <= x <= 1), "a number from 0 to 1"),
    "repetition_penalty": POSITIVE_OR_NULL,
}

_GREEDY = ("do_sample", "repetition_penalty")
"""The keys that are read if do_sample is false."""


def _sampling(values: Mapping[str, Any], vocab_size: int, *, greedy: bool) -> dict[str, float]:
    """Selects the options that have an effect: files also list options at their neutral values."""
    given = {name: values.get(name) for name in _KINDS if name not in _GREEDY}
    given["repetition_penalty"] = values.get("repetition_penalty")
    if greedy:
        given = {"temperature": 0, "repetition_penalty": given["repetition_penalty"]}
    neutral = {"top_k": 0, "min_p": 0, "repetition_penalty": 1}
    found = {name: x for name, x in given.items() if x is not None and x != neutral.get(name)}
    if found.get("top_k", 0) >= vocab_size:
        del found["top_k"]
    top_p = found.pop("top_p", 1)
    if top_p == 0:  # the likeliest token alone
        found["top_k"] = 1
    elif top_p < 1:
        found["top_p"] = top_p
    return found
