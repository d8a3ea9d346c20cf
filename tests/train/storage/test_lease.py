"""Tests of train/storage/lease.py: in a store one process at a time owns a run."""

import json
import time
from collections.abc import Iterator

import pytest

from nha_jax.storage.stores import Store
from tests.support.stores import FaultyStore, connected, serve
from train.errors import ConfigError, TrainingError
from train.storage.lease import OWNERS, Lease

pytestmark = pytest.mark.slow

SECONDS = 1.5


@pytest.fixture(scope="module", params=["gs", "s3"])
def server(request: pytest.FixtureRequest) -> Iterator[FaultyStore]:
    with serve(request.param) as store:
        yield store


@pytest.fixture
def store(server: FaultyStore, request: pytest.FixtureRequest) -> Iterator[Store]:
    with connected(server):
        yield Store(f"{server.url}/{request.node.name.split('[')[0]}")


def move_away(store: Store) -> None:
    """Lets the newest owner be of another machine, whose processes cannot be seen from here."""
    newest = max(name for name in store.files(OWNERS) if name.endswith(".json"))
    owner = json.loads(store.read(newest))
    store.write(newest, json.dumps({**owner, "host": "far-away"}).encode())


def test_the_next_owner_begins_at_once_after_a_release(store: Store) -> None:
    for _ in range(4):
        lease = Lease(store, SECONDS)
        began = time.monotonic()
        lease.take()
        assert time.monotonic() - began < SECONDS
        lease.release()
    assert len([name for name in store.files(OWNERS) if name.endswith(".json")]) == 2


def test_a_living_owner_keeps_its_place(store: Store) -> None:
    first = Lease(store, SECONDS)
    first.take()
    move_away(store)
    with pytest.raises(ConfigError, match=r"another process is training .*far-away"):
        Lease(store, SECONDS).take()
    first.check()
    first.release()


def test_a_silent_owner_loses_its_place_and_notices(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    first = Lease(store, SECONDS)
    first.take()
    move_away(store)
    first._ended.set()  # as if it were stopped, or cut off
    time.sleep(0.5)
    second, began = Lease(store, SECONDS), time.monotonic()
    second.take()
    assert time.monotonic() - began > SECONDS
    assert "far-away was training here; waiting" in capsys.readouterr().err
    with pytest.raises(TrainingError, match="another process has taken over this run"):
        first.check()
    assert not first.is_held
    second.check()
    second.release()


def test_an_owner_that_died_on_this_machine_is_not_waited_for(store: Store) -> None:
    first = Lease(store, SECONDS)
    first.take()
    first._ended.set()
    newest = max(name for name in store.files(OWNERS) if name.endswith(".json"))
    owner = json.loads(store.read(newest))
    store.write(newest, json.dumps({**owner, "pid": 2**30}).encode())  # no process has it
    began = time.monotonic()
    second = Lease(store, SECONDS)
    second.take()
    assert time.monotonic() - began < SECONDS
    second.release()


def test_a_lease_outlives_an_outage(server: FaultyStore, store: Store) -> None:
    lease = Lease(store, SECONDS)
    lease.take()
    with server.outage():
        time.sleep(1.0)
    lease.check()
    lease.release()
