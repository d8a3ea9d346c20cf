"""What `data.corpus` names, as token streams: text files, prepared folders, mixtures of these."""

import hashlib
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from train.config import DataConfig
from train.data.hashing import in_fraction
from train.data.input_files import find_files, walk
from train.data.prepared import Prepared, is_prepared, is_unfinished
from train.data.tokenizer.tokenizer import END_OF_DOCUMENT, ByteTokenizer, Tokenizer, join_documents
from train.errors import ConfigError

STDLIB = "stdlib"

# Packages that are not Python's own, and tables and manuals that a program wrote.
_STDLIB_EXCLUDED = {"__pycache__", "dist-packages", "encodings", "pydoc_data", "site-packages"}


class TokenSource(Protocol):
    """A stream of documents, each closed by the end-of-document token. Its `len` is in tokens.

    Attributes:
        num_documents: how many there are.
        text_bytes: of the documents' text, as UTF-8.
    """

    @property
    def num_documents(self) -> int: ...
    @property
    def text_bytes(self) -> int: ...

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens `start` to `stop`, [stop - start], integers.

        Raises:
            DataError: a file is missing or damaged.
        """

    def documents(self, start: int, stop: int) -> np.ndarray:
        """Of the same tokens, the number of each one's document, [stop - start] int64."""

    def text(self, limit: int) -> bytes:
        """The text of the first `limit` tokens, one document after the other."""


@dataclass(frozen=True)
class Documents:
    """A `TokenSource` of bytes in memory.

    Attributes:
        names: one per document.
        tokens: [N] uint16.
        ends: [documents] int64, where each document's tokens end (exclusive).
    """

    names: tuple[str, ...]
    tokens: np.ndarray
    ends: np.ndarray

    @property
    def num_documents(self) -> int:
        return len(self.ends)

    @property
    def text_bytes(self) -> int:
        return len(self.tokens) - len(self.ends)

    def __len__(self) -> int:
        return len(self.tokens)

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.tokens[start:stop]

    def documents(self, start: int, stop: int) -> np.ndarray:
        return np.searchsorted(self.ends, np.arange(start, stop), side="right")

    def text(self, limit: int) -> bytes:
        tokens = self.tokens[:limit]
        return tokens[tokens != END_OF_DOCUMENT].astype(np.uint8).tobytes()


@dataclass(frozen=True)
class Part:
    """The training or the held-out part of a corpus: one token source, or several with weights.

    Attributes:
        sources: the token sources.
        weights: the share of windows that is drawn from each; they add up to 1.
    """

    sources: tuple[TokenSource, ...]
    weights: tuple[float, ...] = (1.0,)

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.sources))

    @property
    def num_documents(self) -> int:
        return sum(source.num_documents for source in self.sources)

    @property
    def bytes_per_target(self) -> float:
        """Bytes of text that a target stands for, in the mean; 1 for tokens that are bytes.

        All tokens but the first of a document are targets. Bits per target over this are bits
        per byte.
        """
        return sum(
            weight * source.text_bytes / max(len(source) - source.num_documents, 1)
            for weight, source in zip(self.weights, self.sources, strict=True)
        )

    def text(self, limit: int) -> bytes:
        """The text of about the first `limit` tokens, from every source by its weight."""
        return b"".join(
            source.text(round(limit * weight))
            for weight, source in zip(self.weights, self.sources, strict=True)
        )


@dataclass(frozen=True)
class Corpus:
    """The two parts of a corpus; no document is in both.

    Attributes:
        name: data.corpus, for messages.
        training: what the model learns from.
        held_out: what it is measured on.
        tokenizer: what the tokens mean.
        fingerprint: hash of every name and byte: another corpus has another one.
    """

    name: str
    training: Part
    held_out: Part
    tokenizer: Tokenizer
    fingerprint: str

    @property
    def bytes_per_target(self) -> float:
        """`Part.bytes_per_target` of the held-out part."""
        return self.held_out.bytes_per_target

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises ConfigError if a model with so many tokens cannot read this corpus."""
        needed = self.tokenizer.vocabulary_size
        if vocab_size < needed:
            raise ConfigError(
                f"model.vocab_size = {vocab_size}: expected at least {needed}, the vocabulary of "
                f"data.corpus = {self.name}"
            )


def load_corpus(config: DataConfig) -> Corpus:
    """Opens the corpus `config` names; text files are read, prepared folders only when needed.

    Raises:
        ConfigError: it is missing, empty, or too small to split.
        DataError: a file of a prepared folder is missing or damaged.
    """
    if isinstance(config.corpus, dict):
        return _load_mixture(config.corpus)
    folder = Path(config.corpus).expanduser()
    if is_unfinished(folder):
        raise ConfigError(
            f"data.corpus = {config.corpus!r}: `nha data prepare` has not finished there; "
            "run it again"
        )
    if is_prepared(folder):
        return _from_prepared(repr(config.corpus), [(Prepared.open(folder), 1.0)])
    return _load_text(config.corpus, config.held_out_fraction)


def is_held_out(name: str, fraction: float) -> bool:
    """Whether a text file is kept for evaluation: decided by its relative name alone.

    So a file stays on its side when others are added or the folder moves.
    """
    return in_fraction(name.encode("utf-8", "surrogateescape"), fraction)


def _load_mixture(weights: dict[str, float]) -> Corpus:
    sources: list[tuple[Prepared, float]] = []
    # In the order of names, so that the order in which they are written decides nothing.
    for name, weight in sorted(weights.items()):
        folder = Path(name).expanduser()
        if not is_prepared(folder):
            raise ConfigError(
                f"data.corpus.{name}: expected a folder that `nha data prepare` wrote; mixtures "
                "are of such folders only"
            )
        prepared = Prepared.open(folder)
        if sources and prepared.tokenizer.name != sources[0][0].tokenizer.name:
            raise ConfigError(
                f"data.corpus.{name}: its tokenizer is not that of {min(weights)}; prepare "
                "all folders of a mixture with the same one"
            )
        sources.append((prepared, weight / sum(weights.values())))
    return _from_prepared(", ".join(sorted(weights)), sources)


def _from_prepared(name: str, sources: Sequence[tuple[Prepared, float]]) -> Corpus:
    for prepared, _ in sources:
        for part, purpose in ((prepared.training, "training"), (prepared.held_out, "evaluation")):
            if len(part) < 2:  # a token and its target
                raise ConfigError(
                    f"data.corpus = {name}: {prepared.folder} has no document for {purpose}; "
                    "prepare more text or another --held-out-fraction"
                )
    weights = tuple(weight for _, weight in sources)
    fingerprints = "\0".join(prepared.manifest.fingerprint for prepared, _ in sources)
    return Corpus(
        name,
        Part(tuple(prepared.training for prepared, _ in sources), weights),
        Part(tuple(prepared.held_out for prepared, _ in sources), weights),
        sources[0][0].tokenizer,
        hashlib.sha256(fingerprints.encode()).hexdigest()[:16],
    )


def _load_text(corpus: str, held_out_fraction: float) -> Corpus:
    contents = [(name, _read(path)) for name, path in _text_files(corpus)]
    contents = [(name, content) for name, content in contents if content]
    if not contents:
        raise ConfigError(f"data.corpus = {corpus!r}: found no text in it")
    held_out = [is_held_out(name, held_out_fraction) for name, _ in contents]
    parts = [
        [document for document, out in zip(contents, held_out, strict=True) if out == wanted]
        for wanted in (False, True)
    ]
    for part, purpose in zip(parts, ("training", "evaluation"), strict=True):
        if not part:
            raise ConfigError(
                f"data.corpus = {corpus!r}: its {len(contents)} file(s) leave none for "
                f"{purpose} at data.held_out_fraction = {held_out_fraction}; "
                "divide the text over more files or change the fraction"
            )
    digest = hashlib.sha256()
    for name, content in contents:
        digest.update(f"{name}\0{len(content)}\0".encode())
        digest.update(content)
    training, evaluation = (Part((_documents(part),)) for part in parts)
    return Corpus(repr(corpus), training, evaluation, ByteTokenizer(), digest.hexdigest()[:16])


def _text_files(corpus: str) -> list[tuple[str, Path]]:
    """(relative name, path) of each file, sorted by name."""
    if corpus == STDLIB:
        return [
            (name, path)
            for name, path in walk(Path(sysconfig.get_paths()["stdlib"]))
            if name.endswith(".py") and _STDLIB_EXCLUDED.isdisjoint(Path(name).parts)
        ]
    files = find_files(corpus)
    if not files and not Path(corpus).expanduser().is_dir():
        raise ConfigError(
            f"data.corpus = {corpus!r}: no such folder, and no file matches it; expected a "
            f"prepared folder, a folder or glob of text files, or {STDLIB}"
        )
    return files


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"data.corpus: cannot read {path}: {error.strerror}") from None


def _documents(documents: Sequence[tuple[str, bytes]]) -> Documents:
    tokens, ends = join_documents([content for _, content in documents])
    return Documents(tuple(name for name, _ in documents), tokens, ends)
