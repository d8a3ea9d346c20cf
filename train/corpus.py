"""Text files as byte tokens, split by file into training and held-out documents."""

import glob
import hashlib
import os
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from train.errors import ConfigError
from train.sections import DataConfig

END_OF_DOCUMENT = 256
"""The token after each document; tokens below it are byte values."""

STDLIB = "stdlib"

# Packages that are not Python's own, and tables and manuals that a program wrote.
_STDLIB_EXCLUDED = {"__pycache__", "dist-packages", "encodings", "pydoc_data", "site-packages"}


@dataclass(frozen=True)
class Documents:
    """Documents one after the other, each closed by END_OF_DOCUMENT.

    Attributes:
        names: one per document.
        tokens: [N] uint16.
        ends: [documents] int64, where each document's tokens end (exclusive).
    """

    names: tuple[str, ...]
    tokens: np.ndarray
    ends: np.ndarray

    @property
    def text(self) -> bytes:
        """All documents' bytes without the end tokens."""
        return self.tokens[self.tokens != END_OF_DOCUMENT].astype(np.uint8).tobytes()


@dataclass(frozen=True)
class Corpus:
    """The two parts of a corpus; no file is in both.

    Attributes:
        training: what the model learns from.
        held_out: what it is measured on.
        fingerprint: hash of every name and byte: another corpus has another one.
    """

    training: Documents
    held_out: Documents
    fingerprint: str


def load_corpus(config: DataConfig) -> Corpus:
    """Reads and splits the corpus `config` names.

    Raises:
        ConfigError: it is missing, empty, or too small to split by file.
    """
    if isinstance(config.corpus, dict):
        raise ConfigError(f"data.corpus = {config.corpus!r}: mixtures are of prepared folders only")
    files = _find_files(config.corpus)
    contents = [(name, _read(path)) for name, path in files]
    contents = [(name, content) for name, content in contents if content]
    if not contents:
        raise ConfigError(f"data.corpus = {config.corpus!r}: found no text in it")
    held_out = [is_held_out(name, config.held_out_fraction) for name, _ in contents]
    parts = [
        [document for document, out in zip(contents, held_out, strict=True) if out == wanted]
        for wanted in (False, True)
    ]
    for part, purpose in zip(parts, ("training", "evaluation"), strict=True):
        if not part:
            raise ConfigError(
                f"data.corpus = {config.corpus!r}: its {len(contents)} file(s) leave none for "
                f"{purpose} at data.held_out_fraction = {config.held_out_fraction}; "
                "divide the text over more files or change the fraction"
            )
    digest = hashlib.sha256()
    for name, content in contents:
        digest.update(f"{name}\0{len(content)}\0".encode())
        digest.update(content)
    training, evaluation = (_concatenate(part) for part in parts)
    return Corpus(training, evaluation, digest.hexdigest()[:16])


def is_held_out(name: str, fraction: float) -> bool:
    """Whether a file is kept for evaluation: decided by its relative name alone.

    So a file stays on its side when others are added or the folder moves.
    """
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def _find_files(corpus: str) -> list[tuple[str, Path]]:
    """(relative name, path) of each file, sorted by name."""
    if corpus == STDLIB:
        root = Path(sysconfig.get_paths()["stdlib"])
        return [
            (name, path)
            for name, path in _walk(root)
            if name.endswith(".py") and _STDLIB_EXCLUDED.isdisjoint(Path(name).parts)
        ]
    path = Path(corpus).expanduser()
    if path.is_dir():
        return _walk(path)
    matches = sorted(Path(match) for match in glob.glob(str(path), recursive=True))
    matches = [match for match in matches if match.is_file()]
    if not matches:
        raise ConfigError(
            f"data.corpus = {corpus!r}: no such folder, and no file matches it; "
            f"expected a folder or glob of text files, or {STDLIB}"
        )
    root = Path(os.path.commonpath([match.parent for match in matches]))
    return [(match.relative_to(root).as_posix(), match) for match in matches]


def _walk(root: Path) -> list[tuple[str, Path]]:
    files = (path for path in root.rglob("*") if path.is_file())
    names = ((path.relative_to(root).as_posix(), path) for path in files)
    return sorted(
        (name, path)
        for name, path in names
        if not any(part.startswith(".") for part in name.split("/"))
    )


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"data.corpus: cannot read {path}: {error.strerror}") from None


def _concatenate(documents: Sequence[tuple[str, bytes]]) -> Documents:
    lengths = np.array([len(content) + 1 for _, content in documents], np.int64)
    ends = np.cumsum(lengths)
    tokens = np.full(ends[-1], END_OF_DOCUMENT, np.uint16)
    for (_, content), end in zip(documents, ends, strict=True):
        tokens[end - 1 - len(content) : end - 1] = np.frombuffer(content, np.uint8)
    return Documents(tuple(name for name, _ in documents), tokens, ends)
