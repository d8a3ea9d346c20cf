"""Threads take turns."""

import threading

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
        while not turns._door.locked():
            pass
    with turns:
        order.append("took it again")
    thread.join()
    assert order == ["waited", "took it again"]
