"""The files of a tokenizer, and what they say of the tokens that begin and end a text."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from train.errors import DataError
from train.storage.small_json import parse

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
GENERATION_CONFIG_FILE = "generation_config.json"

TOKENIZER_FILES = (TOKENIZER_FILE, TOKENIZER_CONFIG_FILE, SPECIAL_TOKENS_FILE)
"""The files that a tokenizer may have; the first of them it must have."""


def read_object(content: bytes, where: object) -> dict[str, Any]:
    """Parses a file's content as a JSON object.

    Raises:
        DataError: the content is no JSON object; the message begins with `where`.
    """
    try:
        return parse(content, dict[str, Any])
    except ValueError as error:
        raise DataError(f"{where}: damaged: {error}; expected a JSON object") from None


def read_objects(files: Mapping[str, bytes], folder: Path) -> dict[str, dict[str, Any]]:
    """Parses tokenizer_config.json and special_tokens_map.json, as far as they are there.

    Args:
        files: content by name.
        folder: where the files lie, for error messages.

    Returns:
        The parsed objects by file name.

    Raises:
        DataError: one of the two is no JSON object.
    """
    names = (TOKENIZER_CONFIG_FILE, SPECIAL_TOKENS_FILE)
    return {name: read_object(files[name], folder / name) for name in names if name in files}


def special_token(settings: Mapping[str, Mapping[str, Any]], kind: str) -> str | None:
    """Finds the name of a special token.

    tokenizer_config.json goes before special_tokens_map.json. Each holds the name itself or an
    object whose "content" is the name.

    Args:
        settings: what `read_objects` returned.
        kind: "eos_token", "bos_token", ...

    Returns:
        The name, or None if neither file has it.
    """
    for name in (TOKENIZER_CONFIG_FILE, SPECIAL_TOKENS_FILE):
        value = settings.get(name, {}).get(kind)
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            return value
    return None


def end_tokens(folder: Path) -> tuple[int, ...]:
    """Finds the tokens that end a text: eos_token_id of generation_config.json or config.json.

    Raises:
        DataError: one of the two files is damaged.
        OSError: one of the two cannot be read.
    """
    for path in (folder / GENERATION_CONFIG_FILE, folder / "config.json"):
        if path.is_file():
            value = read_object(path.read_bytes(), path).get("eos_token_id")
            values = value if isinstance(value, list) else [value]
            numbers = tuple(x for x in values if isinstance(x, int) and not isinstance(x, bool))
            if numbers:
                return numbers
    return ()
