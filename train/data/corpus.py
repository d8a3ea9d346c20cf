"""The corpus that `data.corpus` names: text files, prepared folders, or a task to draw."""

import hashlib
import os
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nha_jax.tokenizer.as_bytes import ByteTokenizer, join_documents
from nha_jax.tokenizer.interface import Tokenizer
from train.config import DataConfig
from train.data.held_out import is_file_held_out
from train.data.input_files import exists_as_folder, find_files, walk
from train.data.packed_files import naming, open_unpacked
from train.data.prepare.raw_files import is_text
from train.data.prepared_folder import PreparedFolder, is_prepared, is_unfinished
from train.data.recall import Mqar, fingerprint, is_drawn, splits, tokenizer_of
from train.data.token_source import Split, TokensInMemory
from train.errors import ConfigError
from train.paths import user_location

STDLIB = "stdlib"

# Installed packages, which are not Python's own, and tables and manuals that a program wrote.
_STDLIB_EXCLUDED = {"__pycache__", "dist-packages", "encodings", "pydoc_data", "site-packages"}


@dataclass(frozen=True)
class Corpus:
    """The two splits of a corpus; no document is in both.

    Attributes:
        name: data.corpus, for messages.
        training: what the model learns from.
        held_out: what the model is measured on.
        tokenizer: what turned the text into tokens.
        fingerprint: a hash of every name and byte, which tells one corpus from another.
        chat_template: chat_template.jinja of its dialogues; None: it has none.
    """

    name: str
    training: Split
    held_out: Split
    tokenizer: Tokenizer
    fingerprint: str
    chat_template: bytes | None = None

    @property
    def bytes_per_target(self) -> float:
        """`Split.bytes_per_target` of the held-out split."""
        return self.held_out.bytes_per_target

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises ConfigError if the corpus has tokens that a model of `vocab_size` cannot read."""
        needed = self.tokenizer.vocabulary_size
        if vocab_size < needed:
            raise ConfigError(
                f"model.vocab_size = {vocab_size}: expected at least {needed}, the vocabulary of "
                f"data.corpus = {self.name}"
            )


def load_corpus(config: DataConfig) -> Corpus:
    """Opens the corpus that `config` names.

    Text files are read into memory; the tokens of prepared folders are read when they are needed.

    Raises:
        ConfigError: the corpus is missing, empty, or too small to split.
        DataError: a file of a prepared folder is missing or damaged.
    """
    cache_bytes = int(config.cache_gib * 2**30)
    if isinstance(config.corpus, dict):
        return _load_mixture(config.corpus, config.mixture_schedule or {}, cache_bytes)
    if is_drawn(config.corpus):
        return _drawn(config.corpus, config.sequence_length)
    folder = user_location(config.corpus, "data.corpus")
    if isinstance(folder, Path) and is_unfinished(folder):
        raise ConfigError(
            f"data.corpus = {config.corpus!r}: `nha data prepare` has not finished there; "
            "run it again"
        )
    if is_prepared(folder):
        return _from_prepared(repr(config.corpus), [PreparedFolder.open(folder, cache_bytes)])
    return _load_text(config.corpus, config.held_out_fraction)


def _drawn(corpus: str, length: int) -> Corpus:
    """Makes a corpus of examples that are drawn when they are needed."""
    task = Mqar.parse(corpus)
    training, held_out = (Split((examples,)) for examples in splits(task, length))
    return Corpus(corpus, training, held_out, tokenizer_of(task), fingerprint(task, length))


def _load_mixture(
    weights: dict[str, float], schedule: dict[int, dict[str, float]], cache_bytes: int
) -> Corpus:
    """Opens several prepared folders.

    Args:
        weights: a weight for each folder's path.
        schedule: the weights that training has from each of these steps on.
        cache_bytes: see `PreparedFolder.open`.
    """
    folders: list[PreparedFolder] = []
    names = sorted(weights)  # so that the order in the configuration does not matter
    for name in names:
        folder = user_location(name, f"data.corpus.{name}")
        if not is_prepared(folder):
            raise ConfigError(
                f"data.corpus.{name}: expected a folder that `nha data prepare` wrote; mixtures "
                "are of such folders only"
            )
        prepared = PreparedFolder.open(folder, cache_bytes)
        if folders and prepared.tokenizer.name != folders[0].tokenizer.name:
            raise ConfigError(
                f"data.corpus.{name}: its tokenizer is not that of {min(weights)}; prepare "
                "all folders of a mixture with the same one"
            )
        folders.append(prepared)

    def shares(weights: dict[str, float]) -> tuple[float, ...]:
        return tuple(weights.get(name, 0) / sum(weights.values()) for name in names)

    phases = tuple((step, shares(schedule[step])) for step in sorted(schedule))
    return _from_prepared(", ".join(names), folders, shares(weights), phases)


def _from_prepared(
    name: str,
    folders: Sequence[PreparedFolder],
    weights: tuple[float, ...] = (1.0,),
    schedule: tuple[tuple[int, tuple[float, ...]], ...] = (),
) -> Corpus:
    """Makes a corpus of prepared folders; see `Split` of their weights and the schedule."""
    for prepared in folders:
        for split, purpose in ((prepared.training, "training"), (prepared.held_out, "evaluation")):
            if not split.num_targets or not split.target_bytes:
                raise ConfigError(
                    f"data.corpus = {name}: {prepared.folder} has no token to predict "
                    f"for {purpose}; prepare more text or another --held-out-fraction"
                )
    templates = {prepared.chat_template for prepared in folders} - {None}
    if len(templates) > 1:
        raise ConfigError(
            f"data.corpus = {name}: its dialogues are written by {len(templates)} chat templates, "
            "and a model has one; prepare them by the same --chat-template"
        )
    fingerprints = "\0".join(prepared.manifest.fingerprint for prepared in folders)
    return Corpus(
        name,
        Split(tuple(prepared.training for prepared in folders), weights, schedule),
        Split(tuple(prepared.held_out for prepared in folders), weights),
        folders[0].tokenizer,
        hashlib.sha256(fingerprints.encode()).hexdigest()[:16],
        next(iter(templates), None),
    )


def _load_text(corpus: str, held_out_fraction: float) -> Corpus:
    """Reads a corpus of text files, each of which is a document."""
    contents = [(name, _read(path)) for name, path in _text_files(corpus)]
    contents = [(name, content) for name, content in contents if content]
    if not contents:
        raise ConfigError(f"data.corpus = {corpus!r}: found no text in it")
    held_out = [is_file_held_out(name, held_out_fraction) for name, _ in contents]
    splits = [
        [document for document, out in zip(contents, held_out, strict=True) if out == wanted]
        for wanted in (False, True)
    ]
    for split, purpose in zip(splits, ("training", "evaluation"), strict=True):
        if not split:
            raise ConfigError(
                f"data.corpus = {corpus!r}: its {len(contents)} file(s) leave none for "
                f"{purpose} at data.held_out_fraction = {held_out_fraction}; "
                "divide the text over more files or change the fraction"
            )
    digest = hashlib.sha256()
    for name, content in contents:
        digest.update(os.fsencode(name) + f"\0{len(content)}\0".encode())
        digest.update(content)
    training, evaluation = (Split((_in_memory(split),)) for split in splits)
    return Corpus(repr(corpus), training, evaluation, ByteTokenizer(), digest.hexdigest()[:16])


def _text_files(corpus: str) -> list[tuple[str, Path]]:
    """Returns (relative name, path) of each file, sorted by name."""
    if corpus == STDLIB:
        return [
            (name, path)
            for name, path in walk(Path(sysconfig.get_paths()["stdlib"]))
            if name.endswith(".py") and _STDLIB_EXCLUDED.isdisjoint(Path(name).parts)
        ]
    files = find_files(corpus, "data.corpus")
    if not files and not exists_as_folder(corpus, "data.corpus"):
        raise ConfigError(
            f"data.corpus = {corpus!r}: no such folder, and no file matches it; expected a "
            f"prepared folder, a folder or glob of text files, or {STDLIB}"
        )
    return files


def _read(path: Path) -> bytes:
    """Reads a file's text, unpacked; what is no text is for `nha data prepare`."""
    if not is_text(path):
        raise ConfigError(
            f"data.corpus: {path} is no text; what is not packed otherwise than as .gz and .zst, "
            "`nha data prepare` reads"
        )
    with naming(path, ConfigError, "data.corpus: cannot read it"), open_unpacked(path) as file:
        return file.read()


def _in_memory(documents: Sequence[tuple[str, bytes]]) -> TokensInMemory:
    """Joins documents, each a name and its content."""
    tokens, ends = join_documents([content for _, content in documents])
    return TokensInMemory(tuple(name for name, _ in documents), tokens, ends)
