"""Ctrl-C and SIGTERM as a request to stop at the next step."""

import os
import signal
from types import FrameType
from typing import Any, Self


class Interruption:
    """Notes the first SIGINT or SIGTERM that comes while it is open, which then ends nothing.

    Attributes:
        signal: the signal that came; None before.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            # None: the handler was installed outside of Python, and cannot be put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        # A second signal means nothing more: launchers often pass on what the terminal has sent
        # already. Whoever cannot wait may kill -9: a run resumes from that, too.
        if self.signal is None:
            self.signal = signal.Signals(number)
            # Not print: the signal may have come in the middle of a print.
            message = f"\n{self.signal.name}: finishing this step, then saving\n"
            os.write(2, message.encode())
