"""A tiny run: a corpus of a few files and a configuration."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.shared import made_once
from tests.support.train.tiny_run import Nha


@pytest.fixture(scope="session")
def corpus() -> Path:
    """Forty files of a few hundred bytes, of which about a fifth is held out."""

    def make(folder: Path) -> None:
        for number in range(40):
            lines = [f"line {line} of file {number}: {line * number}\n" for line in range(12)]
            (folder / f"file_{number:02}.txt").write_text("".join(lines))

    return made_once("corpus", make)


@pytest.fixture(scope="session")
def tiny_values(corpus: Path) -> dict[str, Any]:
    """A configuration that compiles and trains in seconds."""
    return {
        "run": "unused",
        "steps": 120,
        "batch_size": 8,
        "model": {
            "vocab_size": 257,
            "num_layers": 1,
            "hidden_size": 32,
            "num_query_heads": 2,
            "num_slots": 8,
            "window_size": 8,
            "dtype": "float32",
            "remat": "none",
        },
        "data": {"corpus": str(corpus), "sequence_length": 32, "held_out_fraction": 0.2},
        "optimizer": {"learning_rate": 3e-3, "warmup_steps": 5},
        "evaluation": {"every": 20, "sequences": 16, "final_sequences": 32},
        "checkpoint": {"every": 15},
        "logging": {"every": 1},
        "sample": {"max_new_tokens": 4},
        "compilation_cache": None,
    }


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a file system needs root")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def nha(tmp_path: Path, tiny_values: dict[str, Any]) -> Nha:
    return Nha(tmp_path, tiny_values)


@pytest.fixture(scope="session")
def undisturbed(tiny_values: dict[str, Any]) -> Nha:
    """A finished run of the tiny configuration that nothing interrupted. Tests only read it."""

    def make(folder: Path) -> None:
        process = Nha(folder, tiny_values).start()
        output, _ = process.communicate(timeout=240)
        assert process.returncode == 0, output

    return Nha(made_once("undisturbed", make), tiny_values)


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of all bytes and what follows from 125 documents."""
    from tokenizers import pre_tokenizers  # of the extra `data`

    from tests.support.train.raw_files import train_tokenizer

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return train_tokenizer(tmp_path_factory.mktemp("bpe") / "tokenizer.json", 330, alphabet)
