"""The files of a tokenizer, and what they say of the tokens that begin and end a text."""

from collections.abc import Mapping
from pathlib import Path
from reprlib import repr as shown
from typing import Any

from nha_jax.storage.json_objects import DamagedFileError, parse_object

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
GENERATION_CONFIG_FILE = "generation_config.json"

TOKENIZER_FILES = (TOKENIZER_FILE, TOKENIZER_CONFIG_FILE, SPECIAL_TOKENS_FILE)
"""The files that a tokenizer may have; the first of them it must have."""


def read_objects(files: Mapping[str, bytes], folder: Path) -> dict[str, dict[str, Any]]:
    """Parses tokenizer_config.json and special_tokens_map.json, as far as they are there.

    Args:
        files: content by name.
        folder: where the files lie, for error messages.

    Returns:
        The parsed objects by file name.

    Raises:
        DamagedFileError: one of the two is no JSON object, or a field that is read has a wrong
            type; one line names every such field.
    """
    names = (TOKENIZER_CONFIG_FILE, SPECIAL_TOKENS_FILE)
    found = {name: parse_object(files[name], folder / name) for name in names if name in files}
    problems = [
        f"{folder / name}: {problem}" for name in found for problem in _wrong_fields(found[name])
    ]
    if problems:
        raise DamagedFileError("; ".join(problems))
    return found


def _wrong_fields(values: Mapping[str, Any]) -> list[str]:
    """Describes the fields about special tokens that hold something else than transformers has."""
    problems = []
    for kind in ("bos_token", "eos_token"):
        value = values.get(kind)
        name = value.get("content") if isinstance(value, dict) else value
        if value is not None and not isinstance(name, str):
            problems.append(f"{kind} = {shown(value)}: expected the token's text")
    asked = values.get("add_bos_token")
    if not isinstance(asked, bool | None):
        problems.append(f"add_bos_token = {shown(asked)}: expected true or false")
    return problems


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
        if value is not None:
            return value["content"] if isinstance(value, dict) else value
    return None


def end_tokens(folder: Path) -> tuple[int, ...]:
    """Finds the tokens that end a text: eos_token_id of generation_config.json or config.json.

    Numbers that no token has, such as -1, are left out.

    Raises:
        DamagedFileError: one of the two files is damaged.
        OSError: one of the two cannot be read.
    """
    for path in (folder / GENERATION_CONFIG_FILE, folder / "config.json"):
        if path.is_file():
            values = parse_object(path.read_bytes(), path)
            if problems := wrong_end_tokens(values):
                raise DamagedFileError(f"{path}: {problems[0]}")
            numbers = tuple(x for x in _end_token_ids(values) if 0 <= x < 2**31)
            if numbers:
                return numbers
    return ()


def wrong_end_tokens(values: Mapping[str, Any]) -> list[str]:
    """Describes the problem of eos_token_id, if it holds no numbers."""
    if all(isinstance(x, int) and not isinstance(x, bool) for x in _end_token_ids(values)):
        return []
    given = shown(values["eos_token_id"])
    return [f"eos_token_id = {given}: expected a token's number, a list of them, or null"]


def _end_token_ids(values: Mapping[str, Any]) -> list[Any]:
    value = values.get("eos_token_id")
    if value is None:
        return []
    return value if isinstance(value, list) else [value]
