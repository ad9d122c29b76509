"""Ends a run in which nothing moves, and names what hangs.

A thread of each rank notes in the ranks' common store, once a second: how many phases (and micro-batches) its rank has
entered, in which it is, whether it waits for the others, and how long ago it last showed life. A rank that has shown
none for `timeout_s` reads what the others say. While any rank that does not wait shows life, the run moves. Else those
that do not wait, or whose notes stand still, hang: the first rank that finds it says it, and all leave.
"""

import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple, TextIO

from torch.distributed import Store

from eepo_fast.run.signals import leave

EXIT_CODE = 70  # EX_SOFTWARE
GRACE_S = 2.5  # for a store to answer, and for the other ranks to look
NOTE_S = 1.0
LOCKED_S = 60.0  # past timeout_s, after which a thread that never ran must be kept from the interpreter
COMMUNICATION = (f"torch{os.sep}distributed{os.sep}", f"deepspeed{os.sep}comm{os.sep}")


class Note(NamedTuple):
    entered: int
    phase: str
    waits: bool
    age: float
    """Seconds since the rank last showed life."""
    beat: int
    """How many notes it has written: where this stands still, its process is stopped or lost."""


class Watchdog:
    def __init__(self, rank: int, size: int, store: Store | None, timeout_s: float, end: Callable[[str | None], None]):
        """Begins to watch. store: common to all ranks; None for one alone. end: called in the watchdog's thread with
        the complaint, or None where another rank says it."""
        self.rank, self.size, self.store = rank, size, store
        self.timeout_s, self._end = timeout_s, end
        self._phase, self._since, self._count = "starting", time.monotonic(), 0
        self._beat = 0
        self._stop = threading.Event()
        self.fired = threading.Event()
        """Set once it ends the process: what the main thread meets then, such as ranks that have left, is no news."""
        self._main = threading.get_ident()
        self._write_note()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def enter(self, phase: str) -> None:
        """Hears that the main thread begins a phase, such as `rollout_stage1 of iteration 3`."""
        self._phase = phase
        self.advance()
        self._write_note()

    def advance(self) -> None:
        """Hears that it begins another part of the phase, of which every rank has as many, such as a micro-batch."""
        self._since, self._count = time.monotonic(), self._count + 1

    def alive(self) -> None:
        """Hears that the phase goes on, and may be long."""
        self._since = time.monotonic()

    def _write_note(self) -> None:
        self._beat += 1
        if self.store is not None:
            note = Note(
                self._count, self._phase, _in_communication(self._main), time.monotonic() - self._since, self._beat
            )
            self.store.set(f"eepo/note/{self.rank}", json.dumps(note))

    def _watch(self) -> None:
        while True:
            # C ends the process where this thread cannot run for long, because a call holds the interpreter
            faulthandler.dump_traceback_later(self.timeout_s + LOCKED_S, exit=True, file=_stderr())
            if self._stop.wait(min(NOTE_S, self.timeout_s / 4)):
                return
            with suppress(RuntimeError):  # a lost store is found out when it is read
                self._write_note()
            if time.monotonic() - self._since > self.timeout_s and (complaint := self._complaint()):
                self.fired.set()
                self._end(complaint if self._may_speak() else None)
                return

    def _complaint(self) -> str | None:
        """Returns what hangs; None while something moves."""
        limit = f"(run.timeout_s={self.timeout_s:g})"
        if self.store is None:
            return f"{self._phase} hangs: nothing has moved {limit}"
        before = self._read(self.store)
        time.sleep(GRACE_S)
        self._write_note()
        notes = self._read(self.store)
        if before is None or notes is None:
            return f"rank 0 hangs: its store does not answer rank {self.rank}, in {self._phase} {limit}"
        silent = [r for r in range(self.size) if r != self.rank and notes[r].beat == before[r].beat]
        working = [r for r in range(self.size) if r not in silent and not notes[r].waits]
        if any(notes[r].age < self.timeout_s for r in working):
            return None
        hanging = silent or _fewest(working, notes) or list(range(self.size))
        if len(hanging) == self.size:
            return f"all {self.size} ranks hang in {self._phase} {limit}"
        which = ", ".join(map(str, hanging[:8])) + (" …" if len(hanging) > 8 else "")
        rest = self.size - len(hanging)
        return f"rank {which} hangs in {notes[hanging[0]].phase} {limit}; {rest} of {self.size} ranks wait for it"

    def _read(self, store: Store) -> list[Note] | None:
        """Returns every rank's note; None where the store, which is on rank 0's node, does not answer."""
        found: list[Note] = []

        def read() -> None:
            with suppress(RuntimeError):
                for rank in range(self.size):
                    key = f"eepo/note/{rank}"
                    known = store.check([key])
                    found.append(Note(*json.loads(store.get(key))) if known else Note(-1, "starting", False, 0, 0))

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        reader.join(GRACE_S)
        return found if len(found) == self.size else None

    def _may_speak(self) -> bool:
        """Returns whether this rank is the first to say it."""
        if self.store is None:
            return True
        try:
            return self.store.add("eepo/said", 1) == 1
        except RuntimeError:  # the store is lost: this rank says so itself
            return True

    def let_it_end(self) -> None:
        """Waits for the end where the process is being ended."""
        if self.fired.is_set():
            time.sleep(10 * GRACE_S)

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()


def _fewest(ranks: list[int], notes: list[Note]) -> list[int]:
    """Returns those of the ranks that the others of them wait for."""
    least = min((notes[r].entered for r in ranks), default=0)
    return [r for r in ranks if notes[r].entered == least]


def _stderr() -> TextIO:
    """Returns a file that C can write to: what a notebook or a test puts in its place may be none."""
    try:
        sys.stderr.fileno()
    except (AttributeError, OSError, ValueError):
        return sys.__stderr__ or open(os.devnull, "w")  # there is none where it was closed
    return sys.stderr


def _in_communication(thread: int) -> bool:
    """Returns whether this thread is in a collective of torch's or DeepSpeed's."""
    frame, depth = sys._current_frames().get(thread), 0
    while frame is not None and depth < 8:
        if any(part in frame.f_code.co_filename for part in COMMUNICATION):
            return True
        frame, depth = frame.f_back, depth + 1
    return False


def end_process(complaint: str | None, note: Callable[[str], None], *, alone: bool) -> None:
    """Says the complaint, shows where this process's threads are, and leaves at once: what hangs could not be asked to.
    note: is told the complaint, too."""
    try:
        if complaint is not None:
            noting = threading.Thread(target=note, args=(complaint,), daemon=True)
            noting.start()
            noting.join(GRACE_S)  # the disk may be what hangs
            print(f"eepo-fast: {complaint}", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(file=_stderr(), all_threads=True)
        if not alone:  # the launcher ends all ranks when one leaves, and rank 0 holds their store: let all of them look
            time.sleep(3 * GRACE_S)
    finally:
        leave(EXIT_CODE)


@contextmanager
def watching(
    rank: int, size: int, store: Store | None, timeout_s: float, note: Callable[[str], None]
) -> Iterator[Watchdog]:
    watchdog = Watchdog(rank, size, store, timeout_s, lambda text: end_process(text, note, alone=size == 1))
    try:
        yield watchdog
    finally:
        watchdog.stop()
