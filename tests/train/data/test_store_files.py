"""Tests of train/data/store_files.py: tokens in an object store, read through a cache."""

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from nha_jax.storage.stores import Store
from tests.support.stores import FaultyStore, connected, serve
from train.config import DataConfig
from train.data.batches import Sequences, training_batches
from train.data.corpus import Corpus, load_corpus
from train.data.store_files import CHUNK_BYTES, ChunkCache, cache_folder
from train.errors import DataError

CHUNK = 1000


def sizes(folder: Path) -> list[int]:
    return [path.stat().st_size for path in folder.rglob("*") if path.is_file()]


class Source:
    """Chunks that are made when they are asked for, and how often each was."""

    def __init__(self) -> None:
        self.loads: list[int] = []

    def read(self, cache: ChunkCache, number: int, start: int = 0, stop: int = CHUNK) -> bytes:
        def load() -> bytes:
            self.loads.append(number)
            return bytes([number]) * CHUNK

        return cache.read(f"chunk {number}", start, stop, load)


def test_a_chunk_is_loaded_once(tmp_path: Path) -> None:
    source, cache = Source(), ChunkCache(tmp_path, 10 * CHUNK)
    assert source.read(cache, 1, 10, 20) == bytes([1]) * 10
    assert source.read(cache, 1) == bytes([1]) * CHUNK
    assert source.read(ChunkCache(tmp_path, 10 * CHUNK), 1, 990, 1000) == bytes([1]) * 10
    assert source.loads == [1]


def test_the_least_used_go_and_the_bound_holds(tmp_path: Path) -> None:
    source, cache = Source(), ChunkCache(tmp_path, 10 * CHUNK)
    for number in range(30):
        source.read(cache, number)
        source.read(cache, 0)  # used all the time
        assert sum(sizes(tmp_path)) <= 10 * CHUNK
    assert source.loads == list(range(30))
    source.read(cache, 1)  # gone long ago
    assert source.loads[30:] == [1]


def test_threads_that_want_a_chunk_load_it_once(tmp_path: Path) -> None:
    source, cache = Source(), ChunkCache(tmp_path, 100 * CHUNK)
    found: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: found.extend(source.read(cache, n) for n in range(20)))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(source.loads) == list(range(20))
    assert found.count(bytes([7]) * CHUNK) == 8


def test_a_cut_or_forgotten_chunk_is_loaded_again(tmp_path: Path) -> None:
    source, cache = Source(), ChunkCache(tmp_path, 100 * CHUNK)
    source.read(cache, 3)
    (path,) = (path for path in tmp_path.rglob("*") if path.is_file())
    path.write_bytes(b"")  # as a crash leaves it
    assert source.read(cache, 3) == bytes([3]) * CHUNK
    cache.forget("chunk 3")
    assert source.read(cache, 3) == bytes([3]) * CHUNK
    assert source.loads == [3, 3, 3]


def test_a_full_disk_costs_the_next_fetch_and_no_more(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way of a folder")
    source, cache = Source(), ChunkCache(tmp_path / "file" / "cache", 10 * CHUNK)
    for _ in range(2):
        assert source.read(cache, 5, 1, 3) == bytes([5]) * 2
    assert source.loads == [5, 5]


@pytest.fixture(scope="module", params=["gs", "s3"])
def server(request: pytest.FixtureRequest) -> Iterator[FaultyStore]:
    with serve(request.param) as store:
        yield store


@pytest.fixture
def store(
    server: FaultyStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[FaultyStore]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with connected(server, 3.0):
        yield server


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared bytes of some megabytes, in two shards or more."""
    from train.cli import main

    folder = tmp_path_factory.mktemp("prepared")
    random = np.random.default_rng(0)
    for number in range(12):
        words = random.integers(0, 10**6, 100_000)
        (folder / f"{number:02}.txt").write_text(" ".join(map(str, words)))
    out = folder / "out"
    assert (
        main(["data", "prepare", str(out), str(folder / "*.txt"), "--held-out-fraction=0.2"]) == 0
    )
    return out


def upload(prepared: Path, store: FaultyStore, name: str) -> Store:
    there = Store(f"{store.url}/{name}")
    there.upload((path, path.name) for path in prepared.iterdir() if path.is_file())
    return there


def corpus_of(location: str, cache_gib: float = 1.0) -> Corpus:
    return load_corpus(DataConfig(corpus=location, sequence_length=64, cache_gib=cache_gib))


def some_batches(corpus: Corpus, count: int = 40) -> list[np.ndarray]:
    batches = training_batches(Sequences(corpus.training, 64), 8, 0, 0)
    return [next(batches)["tokens"] for _ in range(count)]


@pytest.mark.slow
def test_batches_are_those_of_the_folder(store: FaultyStore, prepared: Path) -> None:
    there = upload(prepared, store, "batches")
    local, remote = corpus_of(str(prepared)), corpus_of(there.url)
    assert local.fingerprint == remote.fingerprint
    np.testing.assert_array_equal(some_batches(local), some_batches(remote))
    before = store.bytes_read("tokens")
    np.testing.assert_array_equal(some_batches(local), some_batches(corpus_of(there.url)))
    # All of it was on the disk, but for what the reading ahead of a few more batches takes.
    assert store.bytes_read("tokens") - before < before / 10
    bound = 16 * CHUNK_BYTES
    np.testing.assert_array_equal(
        some_batches(local), some_batches(corpus_of(there.url, bound / 2**30))
    )
    assert sum(sizes(cache_folder())) <= bound


@pytest.mark.slow
def test_a_store_that_answers_with_errors_only_costs_time(
    store: FaultyStore, prepared: Path
) -> None:
    there = upload(prepared, store, "errors")
    local, remote = corpus_of(str(prepared)), corpus_of(there.url)
    store.failing, store.cut = 3, 2
    np.testing.assert_array_equal(some_batches(local), some_batches(remote))


@pytest.mark.slow
def test_a_damaged_copy_is_fetched_again_and_a_damaged_object_named(
    store: FaultyStore, prepared: Path
) -> None:
    there = upload(prepared, store, "damage")
    expected = some_batches(corpus_of(there.url))
    for path in cache_folder().rglob("*"):
        if path.is_file():
            path.write_bytes(bytes(path.stat().st_size))
    np.testing.assert_array_equal(expected, some_batches(corpus_of(there.url)))
    name = next(name for name in there.files() if name.startswith("training-00000.tokens"))
    for path in cache_folder().rglob("*"):
        if path.is_file():
            path.unlink()
    there.write(name, bytes(len(there.read(name))))
    with pytest.raises(DataError, match=rf"{there.url}/{name}: damaged: the checksum of bytes"):
        some_batches(corpus_of(there.url))
    there.write(name, b"short")
    with pytest.raises(DataError, match=rf"{name}: damaged: it has 5 bytes instead"):
        corpus_of(there.url)
    there.remove([name])
    with pytest.raises(DataError, match=rf"{name}: cannot read it: it is not there"):
        corpus_of(there.url)


@pytest.mark.slow
def test_text_files_in_a_store_are_a_corpus(store: FaultyStore, tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(6):
        (folder / f"{number}.txt").write_text(f"text {number} " * 50)
    there = upload(folder, store, "texts")
    local, remote = corpus_of(str(folder)), corpus_of(there.url)
    assert local.fingerprint == remote.fingerprint
    np.testing.assert_array_equal(some_batches(local, 3), some_batches(remote, 3))
