"""Threads take turns."""

import threading
import time

from nha_jax.generation.turns import Turns


def test_whoever_waits_is_next():
    turns, order, waiting = Turns(), [], threading.Event()

    def wait():
        waiting.set()
        with turns:
            order.append("waited")

    with turns:
        thread = threading.Thread(target=wait)
        thread.start()
        waiting.wait()
        deadline = time.monotonic() + 30
        while not turns._door.locked() and time.monotonic() < deadline:
            time.sleep(0.001)
        assert turns._door.locked()
    with turns:
        order.append("took it again")
    thread.join()
    assert order == ["waited", "took it again"]
