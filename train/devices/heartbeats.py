"""What each process of a run last told the others: where it is, and that it is alive."""

import contextlib
import json
import threading
from collections.abc import Callable
from typing import Any

import jax
from jax._src import distributed

_FOLDER = "nha/heartbeats"
_INTERVAL = 2.0

Beat = dict[str, Any]


class Heartbeats:
    """Tells the other processes every two seconds where this one is; a context manager.

    They meet in the key-value store of `jax.distributed`. A process that is alone tells nobody.
    """

    def __init__(self, describe: Callable[[], Beat]):
        """Tells nobody yet; `describe` gives what to tell, as JSON can hold it."""
        self._describe = describe
        self._ended = threading.Event()
        self._count = 0

    def __enter__(self) -> "Heartbeats":
        if jax.process_count() > 1:
            threading.Thread(target=self._keep, name="heartbeats", daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()

    def read(self, seconds: float = 5.0) -> dict[int, Beat] | None:
        """Reads what every process last told, with "count", which each beat raises.

        Args:
            seconds: how long to wait for the process that keeps it, the first.

        Returns:
            By the number of the process; None if the first does not answer. Of a process that is
            alone, its own.
        """
        if jax.process_count() == 1:
            return {0: {**self._describe(), "count": 0}}
        found: dict[int, Beat] = {}
        answered = threading.Event()

        def ask() -> None:
            with contextlib.suppress(Exception):  # the first process has gone
                for key, value in _client().key_value_dir_get(_FOLDER):
                    found[int(key.rsplit("/", 1)[-1])] = json.loads(value)
                answered.set()

        threading.Thread(target=ask, daemon=True).start()
        return found if answered.wait(seconds) else None

    def _keep(self) -> None:
        while not self._ended.wait(_INTERVAL):
            self._count += 1
            beat = json.dumps({**self._describe(), "count": self._count})
            with contextlib.suppress(Exception):  # the watchdog says who does not answer
                key = f"{_FOLDER}/{jax.process_index()}"
                _client().key_value_set(key, beat, allow_overwrite=True)


def _client() -> Any:
    # There is no public way to the store; Orbax takes this one too.
    return distributed.global_state.client
