"""What lies beside a `tokenizer.json` and says which of its tokens begin and end a text."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from train.errors import DataError

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
GENERATION_CONFIG_FILE = "generation_config.json"

TOKENIZER_FILES = (TOKENIZER_FILE, TOKENIZER_CONFIG_FILE, SPECIAL_TOKENS_FILE)
"""What a tokenizer is made of; the first of them is needed."""


def read_object(content: bytes, where: object) -> dict[str, Any]:
    """A JSON object.

    Raises:
        DataError: it is none; the message calls it `where`.
    """
    try:
        values = json.loads(content)
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise DataError(f"{where}: damaged: expected a JSON object")
    return values


def read_objects(files: Mapping[str, bytes], folder: Path) -> dict[str, dict[str, Any]]:
    """Those of `files` that are settings, by name; DataError as of `read_object`."""
    names = (TOKENIZER_CONFIG_FILE, SPECIAL_TOKENS_FILE)
    return {name: read_object(files[name], folder / name) for name in names if name in files}


def special_token(settings: Mapping[str, Mapping[str, Any]], kind: str) -> str | None:
    """The name of a special token: "eos_token", "bos_token", ...; None where none is told.

    tokenizer_config.json is asked before special_tokens_map.json; each holds a text or an object
    with the text as its "content".
    """
    for name in (TOKENIZER_CONFIG_FILE, SPECIAL_TOKENS_FILE):
        value = settings.get(name, {}).get(kind)
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            return value
    return None


def end_tokens(folder: Path) -> tuple[int, ...]:
    """The tokens that end a text, by eos_token_id of generation_config.json or config.json.

    Raises:
        DataError: one of the two is damaged.
        OSError: one cannot be read.
    """
    for path in (folder / GENERATION_CONFIG_FILE, folder / "config.json"):
        if path.is_file():
            value = read_object(path.read_bytes(), path).get("eos_token_id")
            values = value if isinstance(value, list) else [value]
            numbers = tuple(x for x in values if isinstance(x, int) and not isinstance(x, bool))
            if numbers:
                return numbers
    return ()
