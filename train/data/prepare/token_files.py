"""Files of tokens: Megatron's, which have an index beside them, or else llm.c's."""

from collections.abc import Iterator
from pathlib import Path

from train.data.prepare.documents import FileFormat, FilePart, Reading, TokenizedText
from train.data.prepare.file_groups import index_of
from train.data.prepare.llmc_tokens import divide_llmc, read_llmc
from train.data.prepare.megatron_tokens import divide_megatron, read_megatron


def _divide(path: Path, part_bytes: int) -> list[FilePart]:
    return (divide_megatron if index_of(path).exists() else divide_llmc)(path, part_bytes)


def _read(part: FilePart, reading: Reading) -> Iterator[TokenizedText]:
    return (read_megatron if index_of(part.path).exists() else read_llmc)(part, reading)


TOKENS = FileFormat(_divide, _read)

INDEX = FileFormat(lambda path, part_bytes: [], lambda part, reading: iter(()))
"""What is read with the tokens beside it, and by itself holds none."""
