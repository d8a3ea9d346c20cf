"""Tests of nha_jax/storage/stores.py, against servers that speak the stores' protocols."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from nha_jax.storage.stores import NotInStoreError, Store, StoreError, is_in_store, local_copy
from tests.support.stores import FaultyStore, connected, serve


@pytest.fixture(scope="module", params=["gs", "s3"])
def server(request: pytest.FixtureRequest) -> Iterator[FaultyStore]:
    with serve(request.param) as store:
        yield store


@pytest.fixture
def store(server: FaultyStore, request: pytest.FixtureRequest) -> Iterator[Store]:
    with connected(server):
        yield Store(f"{server.url}/{request.node.name.split('[')[0]}")


@pytest.mark.parametrize(
    ("text", "served"),
    [
        ("gs://b/x", True),
        ("s3://b", True),
        ("runs/x", False),
        ("hdfs://b/x", False),
        ("gs:/b", False),
    ],
)
def test_what_is_in_a_store(text: str, served: bool) -> None:
    assert is_in_store(text) == served


@pytest.mark.parametrize("url", ["hdfs://host/x", "memory://x", "gs://", "s3:///x", "runs/x"])
def test_a_url_of_nothing_served_is_refused_by_name(url: str) -> None:
    with pytest.raises(ValueError, match=r"expected a (path|bucket)") as refused:
        Store(url)
    assert repr(url) in str(refused.value)


@pytest.mark.slow
def test_objects_come_back_as_they_were_written(store: Store, tmp_path: Path) -> None:
    assert store.files() == {}
    store.write("a/one.bin", bytes(range(256)))
    store.write("two.txt", b"")
    assert store.files() == {"a/one.bin": 256, "two.txt": 0}
    assert store.files("a") == {"a/one.bin": 256}
    assert store.read("a/one.bin") == bytes(range(256))
    assert store.read("a/one.bin", 10, 20) == bytes(range(10, 20))
    assert (store / "a").read("one.bin", 250) == bytes(range(250, 256))
    store.write("a/one.bin", b"other")
    assert store.read("a/one.bin") == b"other"
    assert store.exists("a")
    assert store.exists("two.txt")
    assert not store.exists("three")
    store.remove(["two.txt", "never"])
    assert store.files() == {"a/one.bin": 5}
    with pytest.raises(NotInStoreError, match=r"two\.txt: cannot read it: no such object"):
        store.read("two.txt")
    store.write("a/below/two.bin", b"2")
    store.move("a", "moved")
    assert store.files() == {"moved/below/two.bin": 1, "moved/one.bin": 5}
    (tmp_path / "x").write_bytes(b"x" * 100_000)
    store.upload([(tmp_path / "x", "b/x"), (tmp_path / "x", "b/y")])
    copy = local_copy(f"{store.url}/b")
    assert {path.name: path.stat().st_size for path in copy.iterdir()} == {
        "x": 100_000,
        "y": 100_000,
    }
    assert local_copy(f"{store.url}/b/x").read_bytes() == b"x" * 100_000


@pytest.mark.slow
def test_of_many_that_create_an_object_one_wins(store: Store) -> None:
    won = []
    threads = [
        threading.Thread(target=lambda n=n: won.append(store.create("owner", b"%d" % n)))
        for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(won) == [False] * 7 + [True]


@pytest.mark.slow
def test_what_passes_is_waited_for(server: FaultyStore, store: Store) -> None:
    store.write("x", b"x" * 50_000)
    server.failing = 3
    assert store.read("x") == b"x" * 50_000
    server.failing = 3
    store.write("y", b"y")
    assert store.read("y") == b"y"
    server.cut = 2
    assert store.read("x") == b"x" * 50_000
    with server.outage():
        threading.Timer(2.0, server.away.clear).start()
        assert store.read("x") == b"x" * 50_000


@pytest.mark.slow
def test_a_store_that_stays_away_is_one_line(server: FaultyStore) -> None:
    waited = pytest.raises(StoreError, match=r"x: cannot read it, tried for \d+ s")
    with connected(server, patience=3.0), server.outage(), waited as raised:
        Store(server.url).read("x")
    assert not raised.value.wrong_input
    assert "\n" not in str(raised.value)


@pytest.mark.slow
def test_a_bucket_that_is_not_there_is_one_line(server: FaultyStore) -> None:
    refused = pytest.raises(NotInStoreError, match="nowhere/x: cannot write it")
    with connected(server), refused as raised:
        Store(f"{server.scheme}://nowhere").write("x", b"")
    assert raised.value.wrong_input


@pytest.mark.slow
def test_missing_credentials_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with serve("s3") as server, connected(server):
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        with pytest.raises(StoreError, match="no credentials") as raised:
            Store(server.url).read("x")
    assert raised.value.wrong_input


@pytest.mark.slow
def test_a_model_and_an_adapter_come_back(store: Store) -> None:
    import chex
    from flax import nnx

    import nha_jax

    config = nha_jax.ModelConfig(
        vocab_size=64, num_layers=2, hidden_size=32, num_query_heads=2, num_slots=4, window_size=8
    )
    model = nha_jax.Model(config, rngs=nnx.Rngs(0))
    nha_jax.save(f"{store}/model", model)
    assert sorted((store / "model").files()) == ["config.json", "model.safetensors"]
    loaded = nha_jax.load(f"{store}/model")
    chex.assert_trees_all_equal(nnx.state(loaded), nnx.state(model))
    assert nha_jax.load_tokenizer(f"{store}/model").name == "bytes"
    with pytest.raises(FileExistsError, match="pass overwrite=True"):
        nha_jax.save(f"{store}/model", model)
    other = nha_jax.Model(config, rngs=nnx.Rngs(1))
    nha_jax.save(f"{store}/model", other, overwrite=True)
    chex.assert_trees_all_equal(nnx.state(nha_jax.load(f"{store}/model")), nnx.state(other))
    store.write("texts/a.txt", b"mine")
    with pytest.raises(FileExistsError, match=r"has no config\.json, and is left as it is"):
        nha_jax.save(f"{store}/texts", model, overwrite=True)
    assert store.files("texts") == {"texts/a.txt": 4}
    adapted = nha_jax.add_adapter(model, nha_jax.Adapter(rank=2), rngs=nnx.Rngs(2))
    nha_jax.save_adapter(f"{store}/adapter", adapted)
    again = nha_jax.load_adapter(f"{store}/adapter", model)
    chex.assert_trees_all_equal(nnx.state(again), nnx.state(adapted))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        nha_jax.load(f"{store}/nowhere")
