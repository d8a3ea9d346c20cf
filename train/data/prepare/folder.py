"""Prepares a folder of tokens: its settings, its lock, what is left to do, and its manifest."""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from nha_jax.tokenizer.interface import Tokenizer
from train.data.chat_template import TEMPLATE_FILE, ChatTemplate
from train.data.input_files import exists_as_folder, find_files
from train.data.packed_files import is_packed, naming
from train.data.prepare.documents import RECORD_FORMATS
from train.data.prepare.file_groups import companions_of, gather
from train.data.prepare.options import PrepareOptions
from train.data.prepare.raw_files import divide_file, holds_records, is_text, may_hold_records
from train.data.prepare.shard_jobs import ShardJob, ShardRules, WrittenShards, divide_into_jobs
from train.data.prepare.workers import run_jobs
from train.data.prepared_folder import (
    FORMAT,
    FORMAT_WITH_MASKS,
    MANIFEST_FILE,
    SPLITS,
    WORK_FOLDER,
    Manifest,
    is_prepared,
    is_unfinished,
)
from train.data.token_shards import ShardRecord
from train.data.tokenizers import path_of_option, tokenizer_of_option
from train.errors import ConfigError, DataError, describe_differences
from train.paths import input_path, user_path
from train.storage.atomic import remove_unfinished, write_atomically, write_if_changed
from train.storage.small_json import read_whole

_SETTINGS_FILE = "settings.json"

MAX_SHARDS = 100_000
"""How many shards a folder may be divided into: each costs files, and time whenever it is read."""

_WORKERS_PER_CORE = 4


def prepare(options: PrepareOptions) -> Manifest:
    """Prepares a folder, or goes on where it was stopped; a finished one is left as it is.

    Raises:
        ConfigError: an option or an input cannot be used, or the folder holds something else.
        DataError: an input is damaged, or the folder cannot be written.
    """
    out = user_path(options.out, "OUT").absolute()
    tokenizer = tokenizer_of_option(options.tokenizer, options.end_token)
    files = _files(options.inputs, out)
    records = next(filter(holds_records, files), None)
    if records is not None and options.record_format is None:
        raise ConfigError(f"{records}: --record-format is needed: {', '.join(RECORD_FORMATS)}")
    if options.has_marks:
        _check_records(files)
    template = _chat_template(options)
    _check_sizes(files, options.shard_bytes)
    parts = [part for path in files for part in divide_file(path, options.shard_bytes)]
    jobs = divide_into_jobs(parts, options.shard_bytes)
    rules = ShardRules(
        text_key=options.text_key,
        held_out_fraction=options.held_out_fraction,
        skip_bad=options.skip_bad,
        dtype="uint16" if tokenizer.vocabulary_size <= 1 << 16 else "uint32",
        record_format=options.record_format if records else None,
        instructions=options.instructions(template),
    )
    settings = {
        "inputs": _describe(files),
        "tokenizer": tokenizer.name,
        **({"begin_tokens": list(tokenizer.begin_tokens)} if tokenizer.begin_tokens else {}),
        "end_token": tokenizer.end_token,
        **{name: value for name, value in asdict(rules).items() if value is not None},
        "shard_bytes": options.shard_bytes,
    }
    with _opened(out, options.out, settings):
        if _finished_manifest(out) is None:
            files_beside = {**tokenizer.files, **({TEMPLATE_FILE: template} if template else {})}
            for name, content in files_beside.items():
                write_atomically(out / name, content)
            written = _run_missing_jobs(out, jobs, tokenizer, rules, options.workers)
            if _describe(files) != settings["inputs"]:
                raise DataError(
                    f"{options.out}: an input changed while it was read; delete this folder, and "
                    "run the same command again"
                )
            _manifest(written, tokenizer, rules, settings).write(out)
        shutil.rmtree(out / WORK_FOLDER)
    return Manifest.read(out)


def _chat_template(options: PrepareOptions) -> bytes | None:
    """Reads the chat template of dialogues: that of a file, or else of the tokenizer's folder."""
    if not options.chat:
        return None
    if options.chat_template is not None:
        path = input_path(options.chat_template, "--chat-template")
        with naming(path, ConfigError, "--chat-template: cannot read it"):
            content = path.read_bytes()
        ChatTemplate.decode(content, {}, path)
        return content
    folder = None if options.tokenizer is None else path_of_option(options.tokenizer)
    if folder is None or not folder.is_dir():
        raise ConfigError(
            "--chat: no chat template; expected --chat-template FILE, or a folder that has one as "
            "--tokenizer"
        )
    return ChatTemplate.of(folder, "Give one by --chat-template FILE").source.encode()


def _files(inputs: Sequence[str], out: Path) -> list[Path]:
    """Finds the files of all inputs; lists each once, in order, but none that was prepared."""
    files: dict[Path, None] = {}
    for pattern in inputs:
        found = find_files(pattern, "INPUT", companions_of)
        if not found and exists_as_folder(pattern, "INPUT"):
            raise ConfigError(f"{pattern}: no file in this folder that is not hidden")
        if not found:
            raise ConfigError(f"{pattern}: no such file or folder, and nothing matches it")
        files |= dict.fromkeys(path.absolute() for _, path in found)
    begun = is_prepared(out) or is_unfinished(out)  # maybe in a folder that is an input
    return gather([path for path in files if not (begun and path.is_relative_to(out))])


def _check_records(files: Sequence[Path]) -> None:
    """Raises ConfigError if a file has no records, whose fields marked text is in."""
    for path in files:
        if not may_hold_records(path):
            raise ConfigError(
                f"{path}: it has no fields; --chat and --prompt-field read JSON lines, tables, "
                "ArrayRecord files and archives of JSON lines"
            )


def _check_sizes(files: Sequence[Path], shard_bytes: int) -> None:
    """Says which files are empty; raises ConfigError if there would be too many shards."""
    sizes = {path: path.stat().st_size for path in files}
    total = sum(sizes.values())
    least = -(-total // MAX_SHARDS)
    if shard_bytes < least:
        raise ConfigError(
            f"--shard-bytes = {shard_bytes}: expected at least {least}, as the inputs have {total} "
            f"bytes and there may be {MAX_SHARDS} shards"
        )
    # A packed file or a table that holds nothing is not empty; one that is was cut.
    empty = [
        path for path, size in sizes.items() if not size and is_text(path) and not is_packed(path)
    ]
    if empty and len(empty) < len(sizes):  # of nothing but empty files one error says it all
        more = f", and {len(empty) - 1} more" if len(empty) > 1 else ""
        print(f"nha: without text, and left out: {empty[0]}{more}", file=sys.stderr)


def _describe(files: Sequence[Path]) -> str:
    """Describes the inputs in short, with a hash of their names, sizes and times of change."""
    digest, size = hashlib.sha256(), 0
    for path in files:
        with naming(path, DataError):
            status = path.stat()
        digest.update(os.fsencode(path.name))
        digest.update(f"\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
        size += status.st_size
    return f"{len(files)} files, {size} bytes, {digest.hexdigest()[:16]}"


@contextlib.contextmanager
def _opened(out: Path, shown: str, settings: dict[str, Any]) -> Iterator[None]:
    """Makes and locks the output folder, and notes `settings` in it.

    Args:
        out: the folder.
        shown: how the user wrote it.
        settings: what it is prepared from.

    Raises:
        ConfigError: the folder was prepared from other settings, holds something else, cannot be
            written, or is being prepared by another process.
        DataError: the folder cannot be written while it is open.
    """
    work = out / WORK_FOLDER
    stored = _stored_settings(out, shown)
    if stored is not None:
        differing = describe_differences(stored, settings, json.dumps)
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
            if stored is None:  # without them it is not known what the jobs were done from
                for record in work.glob(_record_name("*")):
                    record.unlink()
            write_if_changed(work / _SETTINGS_FILE, json.dumps(settings, indent=1))
            yield
        except OSError as error:
            raise DataError(f"{shown}: cannot write there: {error.strerror}") from None


def _stored_settings(out: Path, shown: str) -> dict[str, Any] | None:
    """Reads the settings that a folder was prepared from; None if there are none, or damaged."""
    if not out.exists():
        return None
    if not out.is_dir():
        raise ConfigError(f"{shown}: exists and is no folder; choose another")
    manifest = _finished_manifest(out)
    if manifest is not None:
        return dict(manifest.settings)
    settings = out / WORK_FOLDER / _SETTINGS_FILE
    if settings.exists():
        stored = read_whole(settings, dict[str, Any])
        if stored is None:
            print(f"nha: {settings}: damaged; everything is prepared again", file=sys.stderr)
        return stored
    foreign = sorted(name for name in os.listdir(out) if name != WORK_FOLDER)
    if foreign:
        raise ConfigError(
            f"{shown}: the folder exists and holds {foreign[0]!r}, but no prepared tokens; "
            "choose another"
        )
    return None


def _finished_manifest(out: Path) -> Manifest | None:
    """Reads a folder's manifest; None if it is missing, or damaged and can be made again.

    Raises:
        DataError: it is damaged, and what the jobs had written down is gone.
    """
    if not (out / MANIFEST_FILE).exists():
        return None
    try:
        return Manifest.read(out)
    except DataError:
        if (out / WORK_FOLDER / _SETTINGS_FILE).exists():
            return None
        raise


def _run_missing_jobs(
    out: Path,
    jobs: Sequence[ShardJob],
    tokenizer: Tokenizer,
    rules: ShardRules,
    workers: int | None,
) -> list[WrittenShards]:
    """Runs the jobs that were not finished before, and returns what all jobs have written."""
    record_files = [out / WORK_FOLDER / _record_name(f"{n:05}") for n in range(len(jobs))]
    records = [_finished(out, file, rules) for file in record_files]
    missing = [n for n, record in enumerate(records) if record is None]
    sizes = [sum(part.size for part in job) for job in jobs]
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

        todo = {n: jobs[n] for n in missing}
        cores = os.cpu_count() or 1
        count = min(workers or cores, cores * _WORKERS_PER_CORE, len(missing))
        for n, record in run_jobs(todo, out, tokenizer, rules, count, show):
            record.write(record_files[n])
            records[n] = record
    return [record for record in records if record is not None]


def _record_name(number: str) -> str:
    # "piece" since before jobs were called so: a stopped folder goes on.
    return f"piece-{number}.json"


def _finished(out: Path, file: Path, rules: ShardRules) -> WrittenShards | None:
    """Reads what a job has written; None if it has not finished, or it or a shard is damaged."""
    record = WrittenShards.read(file)
    if record is None:
        return None
    try:
        for shard in record.shards.values():
            shard.check_sizes(out, np.dtype(rules.dtype))
    except DataError:
        return None
    return record


def _manifest(
    written: Sequence[WrittenShards],
    tokenizer: Tokenizer,
    rules: ShardRules,
    settings: dict[str, Any],
) -> Manifest:
    """Puts together the manifest of a finished folder."""
    shards: dict[str, tuple[ShardRecord, ...]] = {
        split: tuple(job.shards[split] for job in written if split in job.shards)
        for split in SPLITS
    }
    everything = [shard for split in shards.values() for shard in split]
    if not everything:
        raise DataError("no text in all of the inputs")
    with_masks = rules.instructions is not None
    totals = {
        "tokens": sum(shard.tokens for shard in everything),
        "documents": sum(shard.documents for shard in everything),
        "text_bytes": sum(shard.text_bytes for shard in everything),
        "bad_documents": sum(job.bad for job in written),
    }
    if with_masks:
        totals |= {
            "targets": sum(shard.num_targets for shard in everything),
            "cut_documents": sum(job.cut for job in written),
            "dropped_documents": sum(job.dropped for job in written),
        }
    return Manifest(
        tokenizer=tokenizer.name,
        vocabulary_size=tokenizer.vocabulary_size,
        end_token=tokenizer.end_token,
        dtype=rules.dtype,
        settings=settings,
        totals=totals,
        shards=shards,
        format=FORMAT_WITH_MASKS if with_masks else FORMAT,
    )
