"""SIGTERM, SIGUSR1, SIGINT (Ctrl-C) and SIGHUP (a lost terminal) ask a run to save and to leave. The main thread alone
may listen.
"""

import atexit
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import NoReturn

from eepo_fast.console import forgiving
from eepo_fast.types import Interrupted

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
LEFT_IGNORED = (signal.SIGINT, signal.SIGHUP)  # where they are: by nohup, and in a script's background
ONE_REQUEST_S = 2.0  # launchers pass on to a process what its whole group was sent: one request, told twice
ONE_INTERRUPT_S = 0.3  # the same of Ctrl-C without a launcher: whoever is in a hurry presses it again


def leave(code: int) -> NoReturn:
    """Ends this process at once: nothing is saved or cleaned up, but the cursor that a live panel hides is shown."""
    with suppress(OSError, ValueError, AttributeError):
        if sys.stdout.isatty():
            sys.stdout.write("\x1b[?25h")
            sys.stdout.flush()
    os._exit(code)


def end_rank(command: Callable[[], int]) -> NoReturn:
    """Runs a launched rank's command and ends its process, without the interpreter's own end. What DeepSpeed holds on
    to keeps gloo's threads alive after the process groups are destroyed, and one that is at work when the interpreter
    ends turns the exit code into an abort's, now and then."""
    try:
        code: object = command()
    except SystemExit as error:
        code = error.code
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        code = 1
    atexit._run_exitfuncs()
    with forgiving():
        pass  # flushes what an exit function has printed
    os._exit(code if isinstance(code, int) else int(code is not None))


class LeaveRequest:
    """Knows whether this process was asked to leave, and by which signal."""

    def __init__(self) -> None:
        self.name: str | None = None
        self._first = 0.0
        self.on_asked: Callable[[str], None] = lambda name: None
        """Is told the signal's name when it comes, in another thread than the main one."""
        self.before_leaving_at_once: Callable[[str], None] = lambda name: None
        """Is told the name of the signal after which nothing is saved any more, in that thread, too."""

    def receive(self, number: int) -> None:
        if number not in SIGNALS:
            return
        name, alone = signal.Signals(number).name, os.environ.get("WORLD_SIZE", "1") == "1"
        one_request_s = min(ONE_INTERRUPT_S, ONE_REQUEST_S) if number == signal.SIGINT and alone else ONE_REQUEST_S
        if self.name is None:
            self.name, self._first = name, time.monotonic()
            self.on_asked(name)
        elif time.monotonic() - self._first > one_request_s:  # whoever asks again wants no saving
            with suppress(Exception):
                self.before_leaving_at_once(name)
            leave(128 + number)

    def raise_if_asked(self) -> None:
        if self.name is not None:
            raise Interrupted


def say_leaving(name: str) -> None:
    """Says at a terminal, whose Ctrl-C is not answered at once, what is going on."""
    if name == "SIGINT":
        print("eepo-fast: saving, then leaving; press Ctrl-C once more to leave at once", file=sys.stderr, flush=True)


def heard(numbers: Sequence[signal.Signals] = SIGNALS) -> list[signal.Signals]:
    """Returns the signals that are listened to: not what this process was started to ignore."""
    return [n for n in numbers if n not in LEFT_IGNORED or signal.getsignal(n) != signal.SIG_IGN]


class Stopped(SystemExit):
    """A signal that is not listened to has ended this process in order."""


@contextmanager
def leaving_at_once() -> Iterator[None]:
    """Raises Stopped on SIGTERM and SIGHUP, so that what is open is closed: a run that loads, or has ended, has nothing
    to save."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        raise Stopped(128 + number)

    before = {number: signal.signal(number, stop) for number in heard((signal.SIGTERM, signal.SIGHUP))}
    try:
        yield
    except Stopped as stopped:
        name = signal.Signals(int(str(stopped)) - 128).name
        print(f"eepo-fast: left on {name}; there was nothing to save", file=sys.stderr)
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
    before = {number: signal.signal(number, lambda *args: None) for number in heard()}
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
