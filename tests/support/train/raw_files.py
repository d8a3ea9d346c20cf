"""Raw text in every format, a tokenizer for it, and `nha data prepare` in this process."""

import gzip
import io
import itertools
import json
import struct
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import tokenizers
import zstandard
from array_record.python import array_record_module
from numpy.typing import ArrayLike
from tokenizers import decoders, models, pre_tokenizers, trainers

from nha_jax.tokenizer.as_bytes import END_OF_DOCUMENT, ByteTokenizer
from train.cli import main
from train.data.prepare.documents import Document, PlainText, Reading
from train.data.prepare.raw_files import divide_file, read_documents

TEXTS = [
    *(f"{n} lines of a document, {'and more ' * (n % 23)}" for n in range(120)),
    "naïve Ελλάδα 日本語 😀",
    "it says </s> in the middle",
    "",
    "line\nafter line\n",
]
DOCUMENTS = [text for text in TEXTS if text]


def train_tokenizer(path: Path, size: int, alphabet: list[str]) -> Path:
    """A byte-level BPE, saved with truncation switched on."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<pad>", "</s>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.enable_truncation(5)
    tokenizer.save(str(path))
    return path


def json_lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"id": 1, "text": text}) + "\n\n" for text in texts).encode()


def write_text(folder: Path) -> None:
    for n, text in enumerate(TEXTS):
        (folder / f"{n:03}.md").write_text(text)


def write_json_lines(folder: Path) -> None:
    (folder / "all.jsonl").write_bytes(json_lines(TEXTS))


def write_gzip(folder: Path) -> None:
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(json_lines(TEXTS[:50])))
    (folder / "b.json.gz").write_bytes(gzip.compress(json_lines(TEXTS[50:])))


def write_zstandard(folder: Path) -> None:
    frames = [zstandard.compress(json_lines(part)) for part in (TEXTS[:50], TEXTS[50:])]
    (folder / "a.jsonl.zst").write_bytes(b"".join(frames))


def write_parquet(folder: Path) -> None:
    table = pyarrow.table({"id": range(len(TEXTS)), "text": TEXTS})
    pyarrow.parquet.write_table(table, folder / "a.parquet", row_group_size=30)


def write_saved_dataset(folder: Path) -> None:
    """What `datasets.Dataset.save_to_disk` writes, and a cache of `map` beside it."""
    names = [f"data-{n:05}-of-00003.arrow" for n in range(3)]
    for n, name in enumerate([*names, "cache-0.arrow"]):
        table = pyarrow.table({"text": TEXTS[n * 50 : (n + 1) * 50] if n < 3 else ["cached"]})
        with pyarrow.ipc.new_stream(folder / name, table.schema) as writer:
            writer.write_table(table, max_chunksize=7)
    state = {"_data_files": [{"filename": name} for name in names], "_split": "train"}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text(json.dumps({"features": {"text": {}}}))


def tar(files: dict[str, bytes]) -> bytes:
    """An archive of files by name, with a folder, long names and a description of pax in it."""
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w", format=tarfile.PAX_FORMAT) as archive:
        folder = tarfile.TarInfo("a folder")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return raw.getvalue()


def write_tar(folder: Path) -> None:
    files = {f"./a folder/{n:03}" + "é" * 60 + ".md": text for n, text in enumerate(TEXTS[:40])}
    content = {name: text.encode() for name, text in files.items()}
    content[".hidden.txt"] = b"hidden"
    content["b.txt.gz"] = gzip.compress(TEXTS[40].encode())
    content["c.jsonl.zst"] = zstandard.compress(json_lines(TEXTS[41:80]))
    (folder / "a.tar").write_bytes(tar(content))
    (folder / "b.tar.gz").write_bytes(gzip.compress(tar({"c.jsonl": json_lines(TEXTS[80:])})))


def array_record(records: list[bytes], options: str = "group_size:4") -> bytes:
    """An ArrayRecord file."""
    with tempfile.NamedTemporaryFile(suffix=".array_record") as file:
        writer = array_record_module.ArrayRecordWriter(file.name, options)
        for record in records:
            writer.write(record)
        writer.close()
        return Path(file.name).read_bytes()


def write_array_record(folder: Path) -> None:
    records = [json.dumps({"text": text}).encode() for text in TEXTS]
    (folder / "a.array_record").write_bytes(array_record(records))


def llmc(tokens: ArrayLike, dtype: str = "<u2") -> bytes:
    """A file of tokens as llm.c writes it."""
    magic, version = {"<u2": (20240520, 1), "<u4": (20240801, 7)}[dtype]
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, np.size(tokens)
    return header.tobytes() + np.asarray(tokens).astype(dtype).tobytes()


def write_llmc(folder: Path) -> None:
    tokens = [[END_OF_DOCUMENT, *text.encode()] for text in TEXTS]
    (folder / "a.bin").write_bytes(llmc(np.concatenate(tokens)))


MEGATRON_TYPES = {"u1": 1, "i1": 2, "<i2": 3, "<i4": 4, "<i8": 5, "<u2": 8}


def write_megatron_files(
    folder: Path, documents: list[list[list[int]]], dtype: str = "<u2"
) -> None:
    """Tokens and their index as Megatron-LM writes them, of documents, which are of sequences."""
    sequences = [sequence for document in documents for sequence in document]
    lengths = np.array([len(sequence) for sequence in sequences], "<i4")
    ends = np.cumsum(lengths, dtype="<i8") * np.dtype(dtype).itemsize
    counts = [len(document) for document in documents]
    firsts = np.cumsum([0, *counts], dtype="<i8")
    header = b"MMIDIDX\0\0" + struct.pack(
        "<QBQQ", 1, MEGATRON_TYPES[dtype], len(sequences), len(firsts)
    )
    pointers = ends - lengths * np.dtype(dtype).itemsize
    index = header + lengths.tobytes() + pointers.astype("<i8").tobytes() + firsts.tobytes()
    (folder / "a.idx").write_bytes(index)
    (folder / "a.bin").write_bytes(np.array([*itertools.chain(*sequences)], dtype).tobytes())


def write_megatron(folder: Path) -> None:
    """Documents of one sequence, of several, and with and without an end token."""
    documents = []
    for n, text in enumerate(TEXTS):
        tokens = [*text.encode(), *[END_OF_DOCUMENT][: n % 2]]
        documents.append([tokens[:5], tokens[5:]] if n % 3 else [tokens])
    write_megatron_files(folder, documents)


FORMATS = [
    write_text,
    write_json_lines,
    write_gzip,
    write_zstandard,
    write_parquet,
    write_saved_dataset,
    write_tar,
]


def read_raw(path: Path, part_bytes: int = 1000, **rules: Any) -> tuple[list[Document], list[str]]:
    """The documents of a file and what is wrong with others, as `--skip-bad` reads them."""
    bad: list[str] = []
    form = PlainText(rules.pop("text_key", "text"))
    reading = Reading(
        **{"form": form, "tokenizer": ByteTokenizer(), **rules},
        bad=lambda error: bad.append(str(error)),
        progress=lambda size: None,
    )
    parts = divide_file(path, part_bytes)
    return [document for part in parts for document in read_documents(part, reading)], bad


def prepare(out: Path, *arguments: object) -> int:
    return main(["data", "prepare", str(out), *map(str, arguments)])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
