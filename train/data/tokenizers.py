"""Tokenizers that a user's options and folders name."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import nha_jax
from nha_jax.storage.folder import is_beside_weights
from nha_jax.storage.json_objects import DamagedFileError
from nha_jax.tokenizer.as_bytes import ByteTokenizer
from nha_jax.tokenizer.files import TOKENIZER_FILE
from nha_jax.tokenizer.from_file import FileTokenizer
from nha_jax.tokenizer.interface import Tokenizer
from train.errors import ConfigError, DataError
from train.paths import check_ends, input_path

_OPTION = "--end-token"


@contextlib.contextmanager
def tokenizer_errors() -> Iterator[None]:
    """Turns what `nha_jax.tokenizer` raises of files into errors that `nha` prints as one line."""
    try:
        yield
    except DamagedFileError as error:
        raise DataError(str(error)) from None
    except (ValueError, ImportError) as error:
        raise ConfigError(str(error)) from None
    except OSError as error:
        raise DataError(f"{error.filename}: cannot read it: {error.strerror}") from None


def load_tokenizer(folder: Path, end_token: str | None = None) -> Tokenizer:
    """Loads the tokenizer whose files lie in a folder; see `nha_jax.load_tokenizer`.

    Raises:
        ConfigError: a file is no tokenizer or has no such token, a package is not installed, or the
            model was imported without its tokenizer.
        DataError: one of the files is missing or damaged.
    """
    with tokenizer_errors():
        return nha_jax.load_tokenizer(folder, end_token=end_token, option=_OPTION)


def tokenizer_of_option(name: str | None, end_token: str | None = None) -> Tokenizer:
    """Loads the tokenizer that the option --tokenizer names: a file or a folder; None: bytes.

    Raises:
        ConfigError, DataError: see `load_tokenizer` and `tokenizer_of_file`; or a folder has none.
    """
    if name is None:
        return ByteTokenizer()
    path = path_of_option(name)
    if path.is_dir():
        tokenizer = load_tokenizer(path, end_token)
        if not tokenizer.files:
            raise ConfigError(f"--tokenizer = {str(path)!r}: holds no {TOKENIZER_FILE}")
        return tokenizer
    check_ends(path, "--tokenizer")
    return tokenizer_of_file(path, end_token)


def path_of_option(name: str) -> Path:
    """Finds what the option --tokenizer names; of a folder in a store all but weights is copied."""
    return input_path(name, "--tokenizer", is_beside_weights)


def tokenizer_of_file(path: Path, end_token: str | None) -> Tokenizer:
    """Loads the tokenizer that a tokenizer.json alone defines.

    Raises:
        ConfigError: the file cannot be read, is no tokenizer or has no such token, or the package
            tokenizers is not installed.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"--tokenizer = {str(path)!r}: cannot read it: {error.strerror}"
        ) from None
    with tokenizer_errors():
        return FileTokenizer({TOKENIZER_FILE: content}, end_token, str(path), _OPTION)
