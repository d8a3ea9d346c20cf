"""`nha data prepare`: every format and tokenizer, resuming, the split."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from tests.support.train.raw_files import (
    DOCUMENTS,
    FORMATS,
    contents,
    json_lines,
    prepare,
    train_tokenizer,
    write_text,
)
from tests.support.train.tiny_run import LAUNCH, Nha
from train.cli import main
from train.config import DataConfig
from train.data.corpus import load_corpus
from train.data.held_out import is_document_held_out
from train.data.prepare import folder as prepare_folder
from train.data.prepared_folder import Manifest, PreparedFolder
from train.data.token_source import TokenSource
from train.errors import DataError
from train.text.loading import load_tokenizer_of


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
@pytest.mark.parametrize("write", FORMATS, ids=lambda write: write.__name__)
def test_tokens_are_those_of_a_direct_encoding(
    tmp_path: Path, tokenizer_file: Path, write: Callable[[Path], None], tokenizer: str
) -> None:
    (tmp_path / "raw").mkdir()
    write(tmp_path / "raw")
    arguments = ["--held-out-fraction=0.2", "--shard-bytes=1500", "--workers=1"]
    if tokenizer == "bpe":
        arguments.append(f"--tokenizer={tokenizer_file}")
    assert prepare(tmp_path / "out", tmp_path / "raw", *arguments) == 0
    prepared = PreparedFolder.open(tmp_path / "out")
    whole = any(name.endswith((".gz", ".zst", ".tar")) for name in os.listdir(tmp_path / "raw"))
    assert len(prepared.manifest.shards["training"]) > 1 or whole
    reference = tokenizers.Tokenizer.from_file(str(tokenizer_file))
    reference.no_truncation()
    reference.encode_special_tokens = True
    for source, held_out in ((prepared.training, False), (prepared.held_out, True)):
        texts = [text for text in DOCUMENTS if is_document_held_out(text, 0.2) == held_out]
        assert source.num_documents == len(texts)
        tokens, owner = source.read(0, len(source)), source.documents(0, len(source))
        for n, text in enumerate(texts):
            expected = (
                [*text.encode(), 256]
                if tokenizer == "bytes"
                else [*reference.encode(text).ids, reference.token_to_id("</s>")]
            )
            assert tokens[owner == n].tolist() == expected
        assert source.text_bytes == sum(len(text.encode()) for text in texts)
        assert source.text(10**6).decode() == "".join(texts)


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten thousand documents as one file of JSON lines, 3 MB."""
    generator = random.Random(0)
    texts = (f"document {n} " + "some words " * generator.randint(0, 50) for n in range(10_000))
    path = tmp_path_factory.mktemp("big") / "big.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="module")
def whole(big: Path, tokenizer_file: Path) -> dict[str, bytes]:
    """The files that one worker makes of it undisturbed."""
    assert prepare(big.parent / "whole", big, *options(tokenizer_file), "--workers=1") == 0
    return contents(big.parent / "whole")


def options(tokenizer_file: Path) -> list[str]:
    return [f"--tokenizer={tokenizer_file}", "--shard-bytes=100000", "--held-out-fraction=0.01"]


def test_the_number_of_workers_does_not_matter(
    big: Path, whole: dict[str, bytes], tokenizer_file: Path, tmp_path: Path
) -> None:
    assert prepare(tmp_path / "out", big, *options(tokenizer_file), "--workers=3") == 0
    assert contents(tmp_path / "out") == whole
    manifest = Manifest.read(tmp_path / "out")
    assert len(manifest.shards["training"]) > 20
    assert manifest.totals["documents"] == 10_000


@pytest.mark.parametrize("module", ["folder", "workers"])
def test_neither_the_command_nor_its_workers_load_jax(module: str) -> None:
    """Loading it takes seconds of every process."""
    code = f"import sys, train.data.prepare.{module}; print({{'jax', 'flax'}} & set(sys.modules))"
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "set()\n"


@pytest.mark.parametrize(("workers", "shards"), [(1, 3), (2, 8)])
def test_killed_and_run_again_it_is_the_same(
    big: Path,
    whole: dict[str, bytes],
    tokenizer_file: Path,
    tmp_path: Path,
    workers: int,
    shards: int,
) -> None:
    out = tmp_path / "out"
    arguments = ["data", "prepare", str(out), str(big), *options(tokenizer_file)]
    process = subprocess.Popen(
        [sys.executable, "-c", LAUNCH, *arguments, f"--workers={workers}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while len(list(out.glob("training-*.tokens"))) < shards:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.kill()
    process.communicate()
    assert not (out / "manifest.json").exists()
    deadline = time.monotonic() + 10
    while processes_of_session(process.pid):  # a worker follows its parent
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert main([*arguments, "--workers=1"]) == 0
    assert contents(out) == whole


def processes_of_session(session: int) -> list[int]:
    """The live processes of a session (zombies are not)."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == session and fields[0] not in "ZX":
                found.append(int(entry.name))
    return found


def test_a_killed_worker_is_said_and_the_rest_is_kept(
    big: Path, whole: dict[str, bytes], tokenizer_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = ["data", "prepare", str(out), str(big), *options(tokenizer_file)]
    process = subprocess.Popen(
        [sys.executable, "-c", LAUNCH, *arguments, "--workers=2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while not list(out.glob("training-*.tokens")):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.001)
    workers = [
        pid for pid in processes_of_session(process.pid)
        if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]  # fmt: skip
    os.kill(workers[0], signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert errors.splitlines()[-1].startswith("nha: a worker process was killed")
    assert main([*arguments, "--workers=1"]) == 0
    assert contents(out) == whole


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_ctrl_c_is_heard_in_the_middle_of_a_long_document(
    tokenizer_file: Path, tmp_path: Path, workers: int
) -> None:
    """The tokenizer is in one call for all of the document, which takes it a minute."""
    (tmp_path / "long.txt").write_text("some words of a very long document\n" * 1_500_000)
    out = tmp_path / "out"
    arguments = ["data", "prepare", str(out), str(tmp_path / "long.txt"), f"--workers={workers}"]
    process = subprocess.Popen(
        [sys.executable, "-c", LAUNCH, *arguments, f"--tokenizer={tokenizer_file}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while not list(out.glob(".*.tokens.*.tmp")):  # the worker has begun
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(3)
    start = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - start < 3  # a second, where nothing else is running
    assert process.returncode == 130
    assert errors.splitlines()[-1].startswith("nha: interrupted")
    assert "Traceback" not in errors
    deadline = time.monotonic() + 5
    while processes_of_session(process.pid):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_full_disk_is_one_line_and_the_rest_is_kept(
    big: Path, whole: dict[str, bytes], tokenizer_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = ["data", "prepare", str(out), str(big), *options(tokenizer_file), "--workers=1"]
    # A file beyond the limit fails as a full disk does, in the middle of a write.
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000)); "
    process = subprocess.run(
        [sys.executable, "-c", limit + LAUNCH, *arguments], capture_output=True, text=True
    )
    assert process.returncode == 1
    assert process.stderr.splitlines()[-1] == f"nha: {out}: cannot write there: File too large"
    assert not list(out.glob(".*.tmp"))
    assert main(arguments) == 0
    assert contents(out) == whole


@pytest.mark.parametrize("damage", ["missing", "both missing", "flipped"])
def test_a_damaged_tokenizer_is_named(whole: dict[str, bytes], tmp_path: Path, damage: str) -> None:
    for name, content in whole.items():
        (tmp_path / name).write_bytes(content)
    file = tmp_path / "tokenizer.json"
    if damage == "flipped":
        file.write_bytes(file.read_bytes().replace(b'"<pad>"', b'"<qad>"'))
    else:
        file.unlink()
    if damage == "both missing":
        (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(DataError) as error:
        PreparedFolder.open(tmp_path)
    assert str(error.value).startswith(f"{file}: ")


def test_copies_of_a_document_are_on_one_side(tmp_path: Path) -> None:
    texts = [f"text {n % 40}" for n in range(400)]
    (tmp_path / "a.jsonl").write_bytes(json_lines(texts))
    (tmp_path / "b.jsonl").write_bytes(json_lines(texts[::-1]))
    for name in ("a", "b"):
        assert prepare(tmp_path / name, tmp_path / f"{name}.jsonl", "--held-out-fraction=0.3") == 0
    folders = [PreparedFolder.open(tmp_path / name) for name in ("a", "b")]
    held_out = [set(split(folder.held_out)) for folder in folders]
    assert held_out[0] == held_out[1]
    assert 4 < len(held_out[0]) < 24
    assert not held_out[0] & set(split(folders[0].training))


def split(source: TokenSource) -> list[str]:
    """The documents of bytes."""
    text = "".join(map(chr, source.read(0, len(source))))
    return text.removesuffix(chr(256)).split(chr(256))


def test_a_finished_folder_is_left_as_it_is(tmp_path: Path) -> None:
    write_text(tmp_path)
    assert prepare(tmp_path / "out", tmp_path / "*.md") == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert prepare(tmp_path / "out", tmp_path / "*.md") == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


def test_a_folder_in_its_own_input_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "raw").mkdir()
    write_text(tmp_path / "raw")
    assert prepare(tmp_path / "whole", tmp_path / "raw", "--workers=1") == 0

    def stop(*arguments: object) -> None:
        raise DataError("stopped")

    out = tmp_path / "raw" / "out"
    with monkeypatch.context() as patched:
        patched.setattr(prepare_folder, "_manifest", stop)
        assert prepare(out, tmp_path / "raw", "--workers=1") == 1
    for _ in range(2):
        assert prepare(out, tmp_path / "raw", "--workers=1") == 0
        assert contents(out) == contents(tmp_path / "whole")


def test_another_configuration_is_refused_by_name(
    tmp_path: Path, tokenizer_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_text(tmp_path)
    assert prepare(tmp_path / "out", tmp_path / "*.md") == 0
    before = contents(tmp_path / "out")
    (tmp_path / "new.md").write_text("one more")
    arguments = [f"--tokenizer={tokenizer_file}", "--held-out-fraction=0.1"]
    assert prepare(tmp_path / "out", tmp_path / "*.md", *arguments) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    for part in (
        'inputs: "124 files',
        'tokenizer: "bytes" -> "',
        "held_out_fraction: 0.005 -> 0.1",
    ):
        assert part in error
    assert "text_key" not in error
    assert contents(tmp_path / "out") == before


def test_a_folder_of_something_else_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_text(tmp_path)
    assert prepare(tmp_path, tmp_path / "*.md") == 2
    assert "holds '000.md', but no prepared tokens" in capsys.readouterr().err


def test_an_end_token_that_is_not_there(
    tmp_path: Path, tokenizer_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    renamed = tmp_path / "renamed.json"
    renamed.write_text(tokenizer_file.read_text().replace("</s>", "<stop>"))
    assert prepare(tmp_path / "out", __file__, f"--tokenizer={renamed}") == 2
    assert "--end-token (its special tokens: <pad>, <stop>)" in capsys.readouterr().err
    assert prepare(tmp_path / "out", __file__, f"--tokenizer={renamed}", "--end-token=<end>") == 2
    assert "no such token" in capsys.readouterr().err
    assert prepare(tmp_path / "out", __file__, f"--tokenizer={renamed}", "--end-token=<stop>") == 0


def test_text_comes_out_as_it_went_in_token_by_token(tokenizer_file: Path) -> None:
    tokenizer = load_tokenizer_of(str(tokenizer_file.parent))
    for text in DOCUMENTS:
        tokens = tokenizer.encode(text)
        assert tokenizer.decode(tokens) == text
        decoder = tokenizer.decoder(tokens[:2])
        pieces = [decoder.add(int(token)) for token in tokens[2:]]
        assert tokenizer.decode(tokens[:2]) + "".join(pieces) + decoder.finish() == text
        assert not any("\ufffd" in piece for piece in pieces)
    half = tokenizer.encode("日")[:1]
    decoder = tokenizer.decoder(np.zeros(0, np.int32))
    assert (decoder.add(int(half[0])), decoder.finish()) == ("", "\ufffd")


def test_a_vocabulary_that_is_too_small_is_refused(
    nha: Nha, tmp_path: Path, tokenizer_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_text(tmp_path)
    arguments = [f"--tokenizer={tokenizer_file}", "--held-out-fraction=0.2"]
    assert prepare(tmp_path / "out", tmp_path / "*.md", *arguments) == 0
    size = PreparedFolder.open(tmp_path / "out").tokenizer.vocabulary_size
    assert main(["train", str(nha.config_file), f"--data.corpus={tmp_path / 'out'}"]) == 2
    message = f"model.vocab_size = 257: expected at least {size}, the vocabulary of data.corpus"
    assert message in capsys.readouterr().err
    assert not nha.run.exists()


def test_a_run_on_prepared_tokens_takes_the_tokenizer_along(
    nha: Nha, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # No more tokens than bytes have: the program is that of other tests, and compiled already.
    file = train_tokenizer(tmp_path / "tokenizer.json", 257, [])
    write_text(tmp_path)
    arguments = [f"--tokenizer={file}", "--held-out-fraction=0.2"]
    assert prepare(tmp_path / "out", tmp_path / "*.md", *arguments) == 0
    shown = nha.train(f"--data.corpus={tmp_path / 'out'}", "--sample.prompt=lines")
    assert "gzip -9" in shown
    corpus = load_corpus(DataConfig(corpus=str(tmp_path / "out"), sequence_length=32))
    assert corpus.held_out.bytes_per_target > 1.5
    last = nha.rows()[-1]
    bits = last["loss"] / np.log(2)
    assert last["bits_per_byte"] == pytest.approx(bits / corpus.training.bytes_per_target)
    for folder in (nha.run, nha.run / "model"):
        assert (folder / "tokenizer.json").read_bytes() == file.read_bytes()
    capsys.readouterr()
    arguments = ["--prompt", "lines of", "--max-new-tokens=4", "--temperature=0", "--json"]
    assert main(["generate", str(nha.run / "model"), *arguments]) == 0
    record = json.loads(capsys.readouterr().out)
    tokenizer = load_tokenizer_of(str(nha.run))
    written = [token for token in record["tokens"] if token != tokenizer.end_token]
    assert record["text"] == tokenizer.decode(np.array(written, int))
