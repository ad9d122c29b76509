"""SIGTERM and SIGUSR1 ask a run to save and to leave. The main thread alone may listen."""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

from eepo_fast.types import Interrupted

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
ONE_REQUEST_S = 2.0  # launchers pass on to a process what its whole group was sent: one request, told twice


def leave(code: int) -> NoReturn:
    """Ends this process at once: nothing is saved or cleaned up, but the cursor that a live panel hides is shown."""
    with suppress(OSError, ValueError, AttributeError):
        if sys.stdout.isatty():
            sys.stdout.write("\x1b[?25h")
            sys.stdout.flush()
    os._exit(code)


class LeaveRequest:
    """Knows whether this process was asked to leave, and by which signal."""

    def __init__(self) -> None:
        self.name: str | None = None
        self._first = 0.0

    def receive(self, number: int) -> None:
        if number not in SIGNALS:
            return
        if self.name is None:
            self.name, self._first = signal.Signals(number).name, time.monotonic()
        elif time.monotonic() - self._first > ONE_REQUEST_S:  # whoever asks again wants no saving
            leave(128 + number)

    def raise_if_asked(self) -> None:
        if self.name is not None:
            raise Interrupted


@contextmanager
def listening() -> Iterator[LeaveRequest]:
    """Gives the signals to the request inside, and afterwards to whom they went before. A thread takes them: the main
    one may be waiting for other ranks, where Python calls no handler."""
    request = LeaveRequest()
    if threading.current_thread() is not threading.main_thread():  # no other thread can listen
        yield request
        return
    inside, outside = socket.socketpair()
    outside.setblocking(False)

    def take() -> None:
        while numbers := inside.recv(64):
            for number in numbers:
                request.receive(number)

    thread = threading.Thread(target=take, name="signals", daemon=True)
    thread.start()
    wakeup = signal.set_wakeup_fd(outside.fileno(), warn_on_full_buffer=False)
    before = {number: signal.signal(number, lambda *args: None) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(wakeup)
        outside.close()
        thread.join()
        inside.close()


def exit_code(name: str) -> int:
    """Returns the exit code that shells have for a process that a signal has ended."""
    return 128 + signal.Signals[name]
