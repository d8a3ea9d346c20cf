"""Files that belong together: a dataset that was saved in several, tokens and their index."""

from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from train.data.packed_files import naming
from train.errors import ConfigError, DataError
from train.storage.small_json import parse, read_whole

_INDEX_SUFFIX, _TOKENS_SUFFIX = ".idx", ".bin"

# What `datasets` of Hugging Face writes beside the Arrow files of a dataset, and beside the
# datasets of several splits.
_STATE_FILE, _INFO_FILE, _SPLITS_FILE = "state.json", "dataset_info.json", "dataset_dict.json"


def gather(files: Iterable[Path]) -> list[Path]:
    """Adds the files that others do not go without, and leaves out those that hold no documents.

    - Of a saved dataset (`datasets.Dataset.save_to_disk`), whose folder has a state.json that
      names them, only the files of its rows are left: not its descriptions, nor its caches.
    - Of tokens with an index beside them, both are there.

    Args:
        files: the files that the user has named, in order.

    Returns:
        Each file once, in the order of the first that it belongs to.

    Raises:
        ConfigError: an index is without its tokens.
        DataError: a file of a saved dataset is missing.
    """
    files = list(files)
    rows = {path.parent: _rows_of(path) for path in files if path.name == _STATE_FILE}
    saved = {folder: names for folder, names in rows.items() if names is not None}
    found: dict[Path, None] = {}
    for path in files:
        if path.parent in saved:
            found |= dict.fromkeys(saved[path.parent])
        elif path.name != _SPLITS_FILE or not _are_splits(path):
            found |= dict.fromkeys(_with_its_index(path))
    return list(found)


def _rows_of(state: Path) -> list[Path] | None:
    """Returns the files that the state.json of a saved dataset names; None if it is another's."""
    if not (state.parent / _INFO_FILE).exists():
        return None
    try:
        with naming(state, ConfigError):
            content = parse(state.read_bytes(), dict[str, Any])
        names = [Path(each["filename"]).name for each in content["_data_files"]]
    except (ValueError, TypeError, KeyError):
        raise DataError(f"{state}: damaged: it does not name the dataset's files") from None
    _check_there(state, names)
    return [state.parent / name for name in names]


def _are_splits(path: Path) -> bool:
    """Says whether a dataset_dict.json is that of saved datasets, which all must be there."""
    with naming(path, ConfigError):
        splits = (read_whole(path, dict[str, Any]) or {}).get("splits")
    if not isinstance(splits, list):
        return False
    _check_there(path, [f"{split}/{_STATE_FILE}" for split in splits])
    return True


def _check_there(path: Path, names: Iterable[str]) -> None:
    for name in names:
        if not (path.parent / name).is_file():
            raise DataError(f"{path}: names {name}, which is missing")


def index_of(tokens: Path) -> Path:
    """Returns where the index of a file of tokens is, if it has one."""
    return tokens.with_suffix(_INDEX_SUFFIX)


def companions_of(name: str) -> list[str]:
    """Names the file that must be beside one of tokens, or beside an index, if there is one."""
    path = PurePosixPath(name)
    other = {_TOKENS_SUFFIX: _INDEX_SUFFIX, _INDEX_SUFFIX: _TOKENS_SUFFIX}.get(path.suffix.lower())
    return [str(path.with_suffix(other))] if other else []


def _with_its_index(path: Path) -> Iterator[Path]:
    suffix = path.suffix.lower()
    tokens = path if suffix == _TOKENS_SUFFIX else path.with_suffix(_TOKENS_SUFFIX)
    index = path if suffix == _INDEX_SUFFIX else index_of(path)
    if suffix == _INDEX_SUFFIX and not tokens.exists():
        raise ConfigError(f"{path}: the tokens that it is the index of are missing: {tokens.name}")
    if suffix in (_INDEX_SUFFIX, _TOKENS_SUFFIX) and index.exists():
        yield from (tokens, index)
    else:
        yield path
