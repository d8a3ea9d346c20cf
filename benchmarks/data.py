"""Times `nha data prepare` against its tokenizer alone and by the kind of input, and the loader
against what training needs.

    uv run python benchmarks/data.py [--only TABLE] [--megabytes N] [--workers N] [--turns N]

It prints Markdown tables. The text is modules of Python's standard library, over and over, as JSON
lines. The tokenizers are that of bytes, and a byte-level BPE of 32,000 tokens that is trained here.
"""

import argparse
import io
import itertools
import json
import logging
import multiprocessing
import os
import shutil
import statistics
import struct
import sysconfig
import tarfile
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import tokenizers
import zstandard
from array_record.python.array_record_module import ArrayRecordWriter
from tokenizers import decoders, models, pre_tokenizers, trainers

from nha_jax.tokenizer.as_bytes import ByteTokenizer
from nha_jax.tokenizer.files import TOKENIZER_FILE
from nha_jax.tokenizer.from_file import FileTokenizer
from nha_jax.tokenizer.interface import Tokenizer
from train.data.prepare.folder import PrepareOptions, prepare
from train.data.prepare.raw_files import divide_file
from train.data.prepare.shard_jobs import ShardRules, divide_into_jobs, write_shards

VOCABULARY = 32_000
BATCH_SIZE, SEQUENCE_LENGTH = 8, 2048
STORE_BATCHES = 100
V5E_FLOPS, MFU = 197e12, 0.4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=100, help="of text")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--seconds", type=float, default=5, help="of loading, for each figure")
    parser.add_argument("--turns", type=int, default=5, help="of reading each kind of input")
    parser.add_argument(
        "--only", choices=["prepare", "kinds", "store"], help="(prepare: and the loader)"
    )
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    try:
        texts = some_texts(options.megabytes * 10**6)
        if options.only == "store":
            store_table(folder, texts, options.turns)
            return
        if options.only != "kinds":
            raw = folder / "raw.jsonl"
            raw.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
            tokenizer_file = train_tokenizer(texts[:500], folder / "tokenizer.json")
            prepare_table(folder, texts, [None, tokenizer_file], sorted({1, options.workers}))
            loader_table(folder, options.seconds)
        if options.only != "prepare":
            kinds_table(folder, texts, options.turns)
    finally:
        shutil.rmtree(folder)


def some_texts(size: int) -> list[str]:
    """Returns Python's top-level modules, repeated up to `size` characters."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    modules = [file.read_text(errors="replace") for file in files]
    total = itertools.accumulate(map(len, itertools.cycle(modules)))
    count = next(n for n, characters in enumerate(total, 1) if characters >= size)
    return list(itertools.islice(itertools.cycle(modules), count))


def train_tokenizer(texts: Sequence[str], path: Path) -> Path:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(path))
    return path


def prepare_table(
    folder: Path, texts: list[str], files: Sequence[Path | None], workers: Sequence[int]
) -> None:
    """Prints the speed of `nha data prepare`, and of the tokenizer alone on texts in memory.

    CPU seconds are those of all its processes together; who else uses the machine matters little.
    """
    size = sum(len(text.encode()) for text in texts) / 1e6
    print(f"{size:.0f} MB of text in {len(texts):,} documents; prepare / the tokenizer alone:\n")
    print("| tokenizer | workers | MB/s | MB a CPU second |\n" + "| --- " * 4 + "|")
    for file, count in itertools.product(files, workers):
        name = "BPE" if file else "bytes"
        start, cpu_start = time.perf_counter(), sum(os.times()[:4])
        prepare(
            PrepareOptions(
                out=str(folder / f"{name}-{count}"),
                inputs=[str(folder / "raw.jsonl")],
                tokenizer=str(file) if file else None,
                shard_bytes=8 << 20,
                workers=count,
            )
        )
        wall, cpu = time.perf_counter() - start, sum(os.times()[:4]) - cpu_start
        with multiprocessing.get_context("spawn").Pool(count) as pool:
            shares = [(file, texts[n::count]) for n in range(count)]
            seconds = np.array(pool.starmap(seconds_to_encode, shares, chunksize=1))
        alone, alone_cpu = size / seconds[:, 0].max(), size / seconds[:, 1].sum()
        print(
            f"| {name} | {count} | {size / wall:.1f} / {alone:.1f} | "
            f"{size / cpu:.1f} / {alone_cpu:.1f} |",
            flush=True,
        )


def seconds_to_encode(file: Path | None, texts: Sequence[str]) -> tuple[float, float]:
    """Returns the seconds on the clock, and those of the CPU."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer: Tokenizer = ByteTokenizer()
    if file:
        tokenizer = FileTokenizer({TOKENIZER_FILE: file.read_bytes()}, None, str(file))
    start, cpu_start = time.perf_counter(), time.process_time()
    for first in range(0, len(texts), 64):
        tokenizer.encode_documents(texts[first : first + 64])
    return time.perf_counter() - start, time.process_time() - cpu_start


def kinds_table(folder: Path, texts: list[str], turns: int) -> None:
    """Prints how fast each kind of input becomes shards of bytes, in one process.

    The kinds take turns. CPU seconds count, as who else uses the machine matters little to them.
    """
    size = sum(len(text.encode()) for text in texts) / 1e6
    paths = write_kinds(folder, texts)
    seconds: dict[str, list[float]] = {kind: [] for kind in paths}
    for _ in range(turns):
        for kind, path in paths.items():
            seconds[kind].append(seconds_to_prepare(path, folder))
    medians = {kind: statistics.median(times) for kind, times in seconds.items()}
    print(f"\n{size:.0f} MB of text to shards of bytes, medians of {turns} turns:\n")
    print("| input | MB of text a CPU second | of JSON lines' |\n" + "| --- " * 3 + "|")
    for kind, median in medians.items():
        ratio = medians["JSON lines"] / median
        print(f"| {kind} | {size / median:.0f} | {ratio:.2f} |", flush=True)


def write_kinds(folder: Path, texts: list[str]) -> dict[str, Path]:
    """Writes the texts as each kind of input."""
    paths = {
        "JSON lines": folder / "a.jsonl",
        "JSON lines, .zst": folder / "a.jsonl.zst",
        "parquet": folder / "a.parquet",
        "Arrow": folder / "a.arrow",
        "ArrayRecord": folder / "a.array_record",
        "tar of text": folder / "a.tar",
        "tokens of llm.c": folder / "llmc" / "a.bin",
        "tokens of Megatron-LM": folder / "megatron" / "a.bin",
    }
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    paths["JSON lines"].write_bytes(lines)
    paths["JSON lines, .zst"].write_bytes(zstandard.compress(lines))
    table = pyarrow.table({"text": texts})
    pyarrow.parquet.write_table(table, paths["parquet"], row_group_size=1000)
    with pyarrow.ipc.new_stream(paths["Arrow"], table.schema) as stream:
        stream.write_table(table, max_chunksize=1000)
    records = ArrayRecordWriter(str(paths["ArrayRecord"]), "group_size:1")
    for text in texts:
        records.write(text.encode())
    records.close()
    with tarfile.open(paths["tar of text"], "w") as archive:
        for number, text in enumerate(texts):
            member = tarfile.TarInfo(f"{number}.txt")
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))
    for kind in ("llmc", "megatron"):
        (folder / kind).mkdir()
    tokens, ends = ByteTokenizer().encode_documents(texts)
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(tokens)
    paths["tokens of llm.c"].write_bytes(header.tobytes() + tokens.astype("<u2").tobytes())
    megatron = paths["tokens of Megatron-LM"]
    megatron.write_bytes(tokens.astype("<u2").tobytes())
    lengths = np.diff(ends, prepend=0)
    megatron.with_suffix(".idx").write_bytes(
        struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, len(ends), len(ends) + 1)
        + lengths.astype("<i4").tobytes()
        + (2 * (ends - lengths)).astype("<i8").tobytes()
        + np.arange(len(ends) + 1, dtype="<i8").tobytes()
    )
    return paths


def seconds_to_prepare(path: Path, folder: Path) -> float:
    """Returns the CPU seconds in which a file becomes shards of bytes."""
    rules = ShardRules("text", 0.005, False, "uint16", "text")
    start = time.process_time()
    jobs = divide_into_jobs(divide_file(path, 8 << 20), 8 << 20)
    for number, job in enumerate(jobs):
        write_shards(number, job, folder, ByteTokenizer(), rules, lambda size, tokens: None)
    return time.process_time() - start


def loader_table(folder: Path, seconds: float) -> None:
    """Prints the tokens a second that the loader gives, and those that training takes."""
    # Imported here, as the workers of `prepare_table` import this file and need neither jax nor
    # grain.
    import nha_jax
    from train.config import DataConfig
    from train.data.batches import Sequences
    from train.data.corpus import load_corpus

    print(
        f"\nBatches of {BATCH_SIZE} x {SEQUENCE_LENGTH}, million tokens a second / a CPU second:\n"
    )
    print("| corpus | every block checked for the first time | again |\n" + "| --- " * 3 + "|")
    for name in ("bytes", "BPE"):
        config = DataConfig(corpus=str(folder / f"{name}-1"), sequence_length=SEQUENCE_LENGTH)
        corpus = load_corpus(config)
        sequences = Sequences(corpus.training, SEQUENCE_LENGTH)
        first = tokens_per_second(sequences, seconds, len(sequences) // BATCH_SIZE)
        for source in sequences.sources:
            for index in range(len(source)):
                source[index]
        again = tokens_per_second(sequences, seconds, 1 << 30)
        print(f"| {name}, {corpus.training.num_tokens / 1e6:.0f}M tokens | {first} | {again} |")
    print("\nWhat training takes, million tokens/s:")
    for preset in ("nha-340m", "nha-1.3b"):
        flops = nha_jax.flops_per_token(nha_jax.ModelConfig.preset(preset), SEQUENCE_LENGTH)
        print(f"- {preset}, one v5e at {MFU:.0%} MFU: {MFU * V5E_FLOPS / flops / 1e6:.3f}")


def store_table(folder: Path, texts: list[str], turns: int) -> None:
    """Prints what reading shards from a store gives, with an empty cache and a full one."""
    from moto.server import ThreadedMotoServer

    from nha_jax.storage.stores import Store
    from train.config import DataConfig
    from train.data.batches import Sequences, training_batches
    from train.data.corpus import load_corpus
    from train.data.store_files import cache_folder

    raw, shards = folder / "raw.jsonl", folder / "shards"
    raw.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare(PrepareOptions(out=str(shards), inputs=[str(raw)], shard_bytes=1 << 22))
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1",
    }  # fmt: skip
    import s3fs

    s3fs.S3FileSystem().mkdir("bucket")
    store = Store("s3://bucket/shards")
    store.upload((path, path.name) for path in shards.iterdir())

    def read(place: str, cache_gib: float = 16.0) -> float:
        """Million tokens a second of the first batches."""
        config = DataConfig(corpus=place, sequence_length=SEQUENCE_LENGTH, cache_gib=cache_gib)
        sequences = Sequences(load_corpus(config).training, SEQUENCE_LENGTH)
        batches = training_batches(sequences, BATCH_SIZE, seed=0, first=0)
        began = time.perf_counter()
        for _ in range(STORE_BATCHES):
            next(batches)
        return STORE_BATCHES * BATCH_SIZE * SEQUENCE_LENGTH / 1e6 / (time.perf_counter() - began)

    def cached() -> float:
        return sum(path.stat().st_size for path in cache_folder().rglob("*") if path.is_file())

    ways: dict[str, list[float]] = {"disk": [], "empty cache": [], "full cache": [], "64 MiB": []}
    kept: dict[str, float] = {}
    for turn in range(turns):
        os.environ["XDG_CACHE_HOME"] = str(folder / f"cache-{turn}")
        ways["disk"].append(read(str(shards)))
        for way in ("empty cache", "full cache"):
            ways[way].append(read(store.url))
            kept[way] = cached()
        os.environ["XDG_CACHE_HOME"] = str(folder / f"small-cache-{turn}")
        ways["64 MiB"].append(read(store.url, 1 / 16))
        kept["64 MiB"] = cached()
    server.stop()
    size = sum(path.stat().st_size for path in shards.iterdir())
    print(f"\n{size / 1e6:.0f} MB of shards, batches of {BATCH_SIZE} x {SEQUENCE_LENGTH}:\n")
    print("| read from | million tokens/s | MB in the cache |\n| --- | --- | --- |")
    for way, rates in ways.items():
        there = f"{kept[way] / 1e6:.0f}" if way in kept else ""
        print(f"| {way} | {statistics.median(rates):.2f} | {there} |")


def tokens_per_second(sequences: Any, seconds: float, most: int) -> str:
    from train.data.batches import training_batches

    batches = training_batches(sequences, BATCH_SIZE, seed=0, first=0)
    start, cpu_start = time.perf_counter(), time.process_time()
    for count, _ in enumerate(batches, 1):
        wall, cpu = time.perf_counter() - start, time.process_time() - cpu_start
        if wall > seconds or count >= most:
            break
    tokens = count * BATCH_SIZE * SEQUENCE_LENGTH / 1e6
    return f"{tokens / wall:.1f} / {tokens / cpu:.1f}"


if __name__ == "__main__":
    main()
