"""SIGTERM and SIGUSR1: a run is asked to save and to leave. The main thread alone may listen."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from eepo_fast.types import Interrupted

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
ONE_REQUEST_S = 2.0  # launchers pass on to a process what its whole group was sent: one request, told twice


class Request:
    """Whether this process was asked to leave, and by which signal."""

    def __init__(self) -> None:
        self.name: str | None = None
        self._first = 0.0

    def receive(self, number: int, frame: FrameType | None = None) -> None:
        if self.name is None:
            self.name, self._first = signal.Signals(number).name, time.monotonic()
        elif time.monotonic() - self._first > ONE_REQUEST_S:  # whoever asks again wants no saving
            os._exit(128 + number)

    def raise_if_asked(self) -> None:
        if self.name is not None:
            raise Interrupted


@contextmanager
def listening() -> Iterator[Request]:
    """The signals go to the request inside; afterwards to whom they went before. Only the main thread can listen."""
    request = Request()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, request.receive) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def exit_code(name: str) -> int:
    """As shells have it for a process that a signal has ended."""
    return 128 + signal.Signals[name]
