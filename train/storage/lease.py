"""The right to write in a run's folder in an object store, where no file can be locked.

Whoever wants to train there makes the next of `owner/00000001.json`, `owner/00000002.json`, ...,
which a store lets one process alone do, and from then on writes a new content into the object
`.beat` beside it every few seconds. An owner whose beat stands still for as long as the lease lasts
is dead, or cut off, and the next one may come; no clock is compared with another. An owner that
finds a higher number than its own has lost the folder, and writes nothing more.
"""

import contextlib
import json
import os
import re
import socket
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from nha_jax.storage.stores import Store, StoreError
from train.errors import ConfigError, TrainingError
from train.storage.small_json import parse

OWNERS = "owner"

_SECONDS = 60.0
_BEATS = 6  # in the time that a lease lasts
RELEASED = b"released"
_NUMBER = re.compile(OWNERS + r"/(\d+)\.json")


class Lease:
    """The right to write below a folder in a store, for one process."""

    def __init__(self, store: Store, seconds: float = _SECONDS):
        """Takes nothing yet.

        Args:
            store: the folder.
            seconds: how long an owner may be silent before another takes its place.
        """
        self._store, self._seconds = store, seconds
        self._number: int | None = None
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def take(self) -> None:
        """Becomes the owner, once the one before has gone or has been silent for long enough.

        Raises:
            ConfigError: another process is training in the folder.
            StoreError: the store cannot be written to.
        """
        last = max(self._numbers(), default=0)
        if last:
            self._wait_for_end(last)
        owner = {**_this_process(), "token": uuid.uuid4().hex}
        name = _name(last + 1)
        if not self._store.create(f"{name}.json", json.dumps(owner).encode()):
            raise self._refusal(last + 1)
        self._number = last + 1
        self._beat(0)
        old = [number for number in self._numbers() if number < last]
        self._store.remove(_name(n) + suffix for n in old for suffix in (".json", ".beat"))
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._thread.start()

    @property
    def is_held(self) -> bool:
        """Whether this process became the owner and, as far as it knows, still is."""
        return self._number is not None

    def check(self) -> None:
        """Raises TrainingError if another process has become the owner; nothing, if never taken."""
        if self._number is not None and max(self._numbers(), default=0) > self._number:
            self._number = None
            raise TrainingError(
                f"{self._store}: another process has taken over this run, as this one was silent "
                f"for more than {self._seconds:.0f} s; it goes on there"
            )

    def release(self, *, say_so: bool = True) -> None:
        """Ends the lease; the next owner begins at once, or waits if the store is not told.

        Args:
            say_so: whether to tell the store, for which one that is away would be waited for.
        """
        self._ended.set()
        if self._thread is not None:
            self._thread.join(timeout=1.0)
        if self._number is not None and say_so:
            with contextlib.suppress(StoreError):
                self._store.write(f"{_name(self._number)}.beat", RELEASED)

    def _keep(self) -> None:
        """Beats until the lease is released; runs in a thread."""
        beats = 0
        while not self._ended.wait(self._seconds / _BEATS):
            beats += 1
            with contextlib.suppress(StoreError):
                self._beat(beats)

    def _beat(self, count: int) -> None:
        if self._number is not None and not self._ended.is_set():
            self._store.write(f"{_name(self._number)}.beat", str(count).encode())

    def _numbers(self) -> list[int]:
        found = map(_NUMBER.fullmatch, self._store.files(OWNERS))
        return [int(match[1]) for match in found if match]

    def _wait_for_end(self, number: int) -> None:
        """Returns when the owner of this number has ended; raises ConfigError if it is alive."""
        seen = self._last_beat(number)
        if seen == RELEASED or self._died_here(number):
            return
        print(
            f"nha: {self._store}: {self._describe(number)} was training here; waiting "
            f"{self._seconds:.0f} s to see whether it still is",
            file=sys.stderr,
            flush=True,
        )
        end = time.monotonic() + self._seconds
        while time.monotonic() < end:
            time.sleep(min(self._seconds / _BEATS, 5.0))
            beat = self._last_beat(number)
            if beat == RELEASED:
                return
            if beat != seen:
                raise self._refusal(number)

    def _last_beat(self, number: int) -> bytes:
        try:
            return self._store.read(f"{_name(number)}.beat")
        except FileNotFoundError:  # killed before its first
            return b""

    def _died_here(self, number: int) -> bool:
        """Whether the owner was a process of this machine that is gone."""
        owner, here = self._owner(number), _this_process()
        if any(owner.get(key) != here[key] for key in ("host", "boot")):
            return False
        return owner.get("pid") != here["pid"] and not Path(f"/proc/{owner.get('pid')}").exists()

    def _owner(self, number: int) -> dict[str, Any]:
        try:
            return parse(self._store.read(f"{_name(number)}.json"), dict[str, Any])
        except (FileNotFoundError, ValueError):
            return {}

    def _describe(self, number: int) -> str:
        owner = self._owner(number)
        return f"process {owner.get('pid', '?')} of {owner.get('host', 'another machine')}"

    def _refusal(self, number: int) -> ConfigError:
        return ConfigError(
            f"run = {self._store.url!r}: another process is training in this folder: "
            f"{self._describe(number)}"
        )


def _name(number: int) -> str:
    return f"{OWNERS}/{number:08d}"


def _this_process() -> dict[str, Any]:
    """What tells this process from others; the boot is that of the machine, or of the container."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    namespace = Path("/proc/self/ns/pid")
    parts = [
        boot.read_text().strip() if boot.exists() else "",
        os.readlink(namespace) if namespace.exists() else "",
    ]
    return {"host": socket.gethostname(), "pid": os.getpid(), "boot": " ".join(parts)}
