"""Threads that share an object, one at a time."""

import threading
from types import TracebackType


class Turns:
    """A lock that no thread keeps from the others by taking it again and again.

    Whoever waits for the lock holds the door to it: a thread that gives the lock back and asks for
    it at once stands behind the one that waited. It cannot be taken twice by one thread.

        with turns:
            ...
    """

    def __init__(self) -> None:
        self._door, self._lock = threading.Lock(), threading.Lock()

    def __enter__(self) -> None:
        with self._door:
            self._lock.acquire()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._lock.release()
