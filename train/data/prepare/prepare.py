"""`nha data prepare`: raw files into a folder of token shards, in parallel, resumable."""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from train.config import require
from train.data.input_files import find_files
from train.data.prepare.piece_workers import make_pieces
from train.data.prepare.pieces import Piece, PieceRecord, Rules, group
from train.data.prepare.raw_documents import divide
from train.data.prepared import MANIFEST_FILE, SPLITS, WORK_FOLDER, Manifest
from train.data.token_shards import ShardRecord
from train.data.tokenizer.files import TOKENIZER_FILE
from train.data.tokenizer.tokenizer import ByteTokenizer, FileTokenizer, Tokenizer, load_tokenizer
from train.differences import differences
from train.errors import ConfigError, DataError
from train.storage.atomic import remove_unfinished, write_atomically

_SETTINGS_FILE = "settings.json"


@dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """What `nha data prepare` was asked for; see its help."""

    out: str
    inputs: Sequence[str]
    tokenizer: str | None = None
    end_token: str | None = None
    text_key: str = "text"
    held_out_fraction: float = 0.005
    shard_bytes: int = 64 << 20
    skip_bad: bool = False
    workers: int | None = None

    def __post_init__(self) -> None:
        fraction = self.held_out_fraction
        require(0 <= fraction < 1, "--held-out-fraction", fraction, "0 or more, below 1")
        require(self.shard_bytes >= 1, "--shard-bytes", self.shard_bytes, "at least 1")
        require(self.workers is None or self.workers >= 1, "--workers", self.workers, "at least 1")
        require(
            self.end_token is None or self.tokenizer is not None,
            "--end-token", self.end_token, "--tokenizer with it; of bytes it is fixed",
        )  # fmt: skip


def prepare(options: PrepareOptions) -> Manifest:
    """Prepares a folder, or goes on where it was stopped; nothing is done for a finished one.

    Raises:
        ConfigError: an option or input cannot be used, or the folder holds something else.
        DataError: an input is damaged, or the folder cannot be written.
    """
    tokenizer = _tokenizer(options)
    files = _files(options.inputs)
    parts = [part for path in files for part in divide(path, options.shard_bytes)]
    pieces = group(parts, options.shard_bytes)
    rules = Rules(
        text_key=options.text_key,
        held_out_fraction=options.held_out_fraction,
        skip_bad=options.skip_bad,
        dtype="uint16" if tokenizer.vocabulary_size <= 1 << 16 else "uint32",
    )
    settings = {
        "inputs": _describe(files),
        "tokenizer": tokenizer.name,
        **({"begin_tokens": list(tokenizer.begin_tokens)} if tokenizer.begin_tokens else {}),
        "end_token": tokenizer.end_token,
        **asdict(rules),
        "shard_bytes": options.shard_bytes,
    }
    out = Path(options.out).expanduser().absolute()
    with _opened(out, options.out, settings):
        if not (out / MANIFEST_FILE).exists():
            for name, content in tokenizer.files.items():
                write_atomically(out / name, content)
            records = _make_pieces(out, pieces, tokenizer, rules, options.workers)
            _manifest(records, tokenizer, rules, settings).write(out)
        shutil.rmtree(out / WORK_FOLDER)
    return Manifest.read(out)


def _tokenizer(options: PrepareOptions) -> Tokenizer:
    if options.tokenizer is None:
        return ByteTokenizer()
    path = Path(options.tokenizer).expanduser()
    if path.is_dir():
        tokenizer = load_tokenizer(path, options.end_token)
        if not tokenizer.files:
            raise ConfigError(f"--tokenizer = {str(path)!r}: holds no {TOKENIZER_FILE}")
        return tokenizer
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"--tokenizer = {str(path)!r}: cannot read it: {error.strerror}"
        ) from None
    return FileTokenizer({TOKENIZER_FILE: content}, options.end_token, str(path))


def _files(inputs: Sequence[str]) -> list[Path]:
    """The files of all inputs, each once, in order."""
    files: dict[Path, None] = {}
    for pattern in inputs:
        found = find_files(pattern)
        if not found:
            raise ConfigError(f"{pattern}: no such file or folder, and nothing matches it")
        files |= dict.fromkeys(path.absolute() for _, path in found)
    return list(files)


def _describe(files: Sequence[Path]) -> str:
    """The inputs in short, with a hash of their names, sizes and times of change."""
    digest, size = hashlib.sha256(), 0
    for path in files:
        status = path.stat()
        digest.update(f"{path.name}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
        size += status.st_size
    return f"{len(files)} files, {size} bytes, {digest.hexdigest()[:16]}"


@contextlib.contextmanager
def _opened(out: Path, shown: str, settings: dict[str, Any]) -> Iterator[None]:
    """Makes and locks the output folder.

    Raises:
        ConfigError: it holds something else, or another process is at it.
    """
    work = out / WORK_FOLDER
    stored = _stored_settings(out, shown)
    if stored is not None:
        differing = differences(stored, settings, json.dumps)
        if differing:
            raise ConfigError(
                f"{shown}: the folder was prepared otherwise: {'; '.join(differing)}; choose "
                "another folder, the old values to go on, or delete it"
            )
    try:
        work.mkdir(parents=True, exist_ok=True)
        lock = (work / "lock").open("w")
    except OSError as error:
        raise ConfigError(f"{shown}: cannot write there: {error.strerror}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(f"{shown}: another process is preparing this folder") from None
        for folder in (out, work):
            remove_unfinished(folder)
        try:
            write_atomically(work / _SETTINGS_FILE, json.dumps(settings, indent=1))
            yield
        except OSError as error:
            raise DataError(f"{shown}: cannot write there: {error.strerror}") from None


def _stored_settings(out: Path, shown: str) -> dict[str, Any] | None:
    """What the folder is prepared from; None if nothing is there yet."""
    if not out.exists():
        return None
    if not out.is_dir():
        raise ConfigError(f"{shown}: exists and is no folder; choose another")
    if (out / MANIFEST_FILE).exists():
        return dict(Manifest.read(out).settings)
    settings = out / WORK_FOLDER / _SETTINGS_FILE
    if settings.exists():
        return json.loads(settings.read_bytes())
    foreign = sorted(name for name in os.listdir(out) if name != WORK_FOLDER)
    if foreign:
        raise ConfigError(
            f"{shown}: the folder exists and holds {foreign[0]!r}, but no prepared tokens; "
            "choose another"
        )
    return None


def _make_pieces(
    out: Path, pieces: Sequence[Piece], tokenizer: Tokenizer, rules: Rules, workers: int | None
) -> list[PieceRecord]:
    """Makes all pieces that are not on record, and records them."""
    record_files = [out / WORK_FOLDER / f"piece-{n:05}.json" for n in range(len(pieces))]
    records = [_finished(out, file, rules) for file in record_files]
    missing = [n for n, record in enumerate(records) if record is None]
    sizes = [sum(part.size for part in piece) for piece in pieces]
    done = sum(sizes) - sum(sizes[n] for n in missing)
    with tqdm(
        total=sum(sizes), initial=done, unit="B", unit_scale=True, dynamic_ncols=True,
        mininterval=0.1 if sys.stderr.isatty() else 10.0,
    ) as bar:  # fmt: skip
        tokens = 0

        def show(size: int, more_tokens: int) -> None:
            nonlocal tokens
            tokens += more_tokens
            bar.set_postfix_str(f"{tokens:,} tokens", refresh=False)
            bar.update(size)

        todo = {n: pieces[n] for n in missing}
        count = min(workers or os.cpu_count() or 1, len(missing))
        for n, record in make_pieces(todo, out, tokenizer, rules, count, show):
            record.write(record_files[n])
            records[n] = record
    return [record for record in records if record is not None]


def _finished(out: Path, file: Path, rules: Rules) -> PieceRecord | None:
    """The record of a piece whose shards are there."""
    if not file.exists():
        return None
    record = PieceRecord.read(file)
    try:
        for shard in record.shards.values():
            shard.check_sizes(out, np.dtype(rules.dtype))
    except DataError:
        return None
    return record


def _manifest(
    records: Sequence[PieceRecord], tokenizer: Tokenizer, rules: Rules, settings: dict[str, Any]
) -> Manifest:
    shards: dict[str, tuple[ShardRecord, ...]] = {
        split: tuple(record.shards[split] for record in records if split in record.shards)
        for split in SPLITS
    }
    everything = [shard for part in shards.values() for shard in part]
    if not everything:
        raise DataError("no text in all of the inputs")
    totals = {
        "tokens": sum(shard.tokens for shard in everything),
        "documents": sum(shard.documents for shard in everything),
        "text_bytes": sum(shard.text_bytes for shard in everything),
        "bad_documents": sum(record.bad for record in records),
    }
    return Manifest(
        tokenizer=tokenizer.name,
        vocabulary_size=tokenizer.vocabulary_size,
        end_token=tokenizer.end_token,
        dtype=rules.dtype,
        settings=settings,
        totals=totals,
        shards=shards,
    )
