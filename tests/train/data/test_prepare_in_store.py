"""`nha data prepare` from object stores and onto them, byte for byte as on the disk."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tokenizers.pre_tokenizers import ByteLevel

import nha_jax
from nha_jax.storage.stores import Store
from nha_jax.tokenizer.as_bytes import END_OF_DOCUMENT
from tests.support.stores import FaultyStore, connected, environment_of, serve
from tests.support.train.raw_files import llmc, train_tokenizer, write_megatron
from tests.support.train.tiny_run import LAUNCH
from train.cli import main
from train.data.store_files import cache_folder

pytestmark = pytest.mark.slow

OPTIONS = ["--held-out-fraction=0.2", "--shard-bytes=20000", "--workers=1"]


@pytest.fixture(scope="module", params=["gs", "s3"])
def server(request: pytest.FixtureRequest) -> Iterator[FaultyStore]:
    with serve(request.param) as store:
        yield store


@pytest.fixture
def store(
    server: FaultyStore,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> Iterator[Store]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with connected(server, 3.0):
        yield Store(f"{server.url}/{request.node.name.split('[')[0]}")


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    (folder / "below").mkdir(parents=True)
    for number in range(30):
        name = f"below/{number:02}.txt" if number % 3 else f"{number:02}.txt"
        (folder / name).write_text(f"document {number} " * 300)
    return folder


def prepare(out: object, *inputs: object) -> dict[str, bytes]:
    """Prepares a folder on the disk; returns its files."""
    assert main(["data", "prepare", str(out), *map(str, inputs), *OPTIONS]) == 0
    if isinstance(out, Store):
        return {name: out.read(name) for name in out.files()}
    return {path.name: path.read_bytes() for path in Path(str(out)).iterdir()}


def without_inputs(files: dict[str, bytes]) -> dict[str, object]:
    """The files, and of the manifest all but what the inputs were."""
    manifest = json.loads(files["manifest.json"])
    manifest["settings"].pop("inputs")
    return {**files, "manifest.json": {**manifest, "sha256": None}}


def test_a_folder_in_a_store_is_that_of_the_disk(
    store: Store, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    local, remote = prepare(tmp_path / "out", texts), prepare(store, texts)
    assert remote == local
    assert len(local) > 10
    assert not any((cache_folder().parent / "prepare").iterdir())
    capsys.readouterr()
    assert prepare(store, texts) == local  # a finished one is left as it is
    assert "uploading" not in capsys.readouterr().err
    assert main(["data", "prepare", str(store), str(texts), "--held-out-fraction=0.3"]) == 2
    assert "was prepared otherwise" in capsys.readouterr().err


def test_killed_in_the_upload_and_run_again_it_is_the_same(
    server: FaultyStore, store: Store, texts: Path, tmp_path: Path
) -> None:
    local = prepare(tmp_path / "out", texts)
    command = [sys.executable, "-c", LAUNCH, "data", "prepare", str(store), str(texts), *OPTIONS]
    server.delay = 0.5
    process = subprocess.Popen(command, env=environment_of(server), stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not store.files() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.communicate()
    server.delay = 0.0
    assert "manifest.json" not in store.files()
    server.failing = 2
    assert prepare(store, texts) == local


def test_inputs_may_be_in_a_store(store: Store, texts: Path, tmp_path: Path) -> None:
    inputs = store / "inputs"
    paths = [path for path in texts.rglob("*") if path.is_file()]
    inputs.upload((path, path.relative_to(texts).as_posix()) for path in paths)
    inputs.write(".hidden/x.txt", b"not read")
    cases = {"": "", "/*.txt": "/*.txt", "/**/1*.txt": "/**/1*.txt", "/00.txt": "/00.txt"}
    for number, (remote, local) in enumerate(cases.items()):
        expected = prepare(tmp_path / f"local-{number}", f"{texts}{local}")
        for out in (tmp_path / f"remote-{number}", store / f"out-{number}"):
            found = prepare(out, f"{inputs}{remote}")
            assert without_inputs(found) == without_inputs(expected)
    first = json.loads((tmp_path / "remote-0" / "manifest.json").read_text())["settings"]["inputs"]
    again = prepare(tmp_path / "again", inputs)
    assert json.loads(again["manifest.json"])["settings"]["inputs"] == first


def test_an_index_comes_along_with_its_tokens(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "megatron"
    folder.mkdir()
    write_megatron(folder)
    (folder / "b.bin").write_bytes(llmc([65, 66, 67, END_OF_DOCUMENT]))  # has no index
    (folder / "note.md").write_text("not read")
    store.upload((path, path.name) for path in folder.iterdir())
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    both = sizes["a.bin"] + sizes["a.idx"]
    cases = {"a.bin": both, "a.idx": both, "*.bin": both + sizes["b.bin"], "b.bin": sizes["b.bin"]}
    for number, (name, size) in enumerate(cases.items()):
        expected = prepare(tmp_path / f"local-{number}", folder / name)
        capsys.readouterr()
        for _ in range(2):  # the second time it is left as it is
            found = prepare(tmp_path / f"remote-{number}", f"{store}/{name}")
            assert without_inputs(found) == without_inputs(expected)
            assert f"downloading {size:,} bytes of {store}/{name}" in capsys.readouterr().err


def test_of_a_tokenizers_folder_no_weights_are_read(
    server: FaultyStore, store: Store, texts: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    train_tokenizer(folder / "tokenizer.json", 300, ByteLevel.alphabet())
    local = prepare(tmp_path / "local", texts, f"--tokenizer={folder}")
    store.upload((path, path.name) for path in folder.iterdir())
    weights = ("model-00001-of-00002.safetensors", "pytorch_model.bin", "checkpoints/1/data")
    for name in weights:
        store.write(name, bytes(1000))
    found = prepare(tmp_path / "remote", texts, f"--tokenizer={store}")
    assert found == local
    assert nha_jax.load_tokenizer(str(store)).name == nha_jax.load_tokenizer(folder).name
    read = [path for method, path, _ in server.requests if method == "GET"]
    assert not [path for path in read if any(name.split("/")[-1] in path for name in weights)]


def test_what_matches_nothing_is_named(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scheme = str(store).split(":")[0]
    assert main(["data", "prepare", str(tmp_path / "out"), f"{scheme}://buck*/x"]) == 2
    assert "a glob over buckets; expected one bucket's name" in capsys.readouterr().err
    store.write(".hidden/x.txt", b"not read")
    for name in (str(store), f"{store}/nothing", f"{store}/*.txt"):
        assert main(["data", "prepare", str(tmp_path / "out"), name]) == 2
        assert f"{name}: no such file or folder" in capsys.readouterr().err
