"""A run in which nothing moves is ended, with the name of what hangs.

Every rank notes in the ranks' common store which phase it is in, and how many it has entered; a thread of each beats
there once a second. When a rank's phase has lasted `timeout_s`, its thread reads the notes: a rank whose beat stands
still is stopped or lost; else the ranks that have entered fewest phases are those the others wait for.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch.distributed import Store

EXIT_CODE = 70  # EX_SOFTWARE
GRACE_S = 2.5  # to see whether hearts beat, and to let the other ranks say what they know
BEAT_S = 1.0


class Watchdog:
    def __init__(self, rank: int, size: int, store: Store | None, timeout_s: float, end: Callable[[str | None], None]):
        """store: common to all ranks; None for one alone. end: called in the watchdog's thread with the complaint, or
        None where another rank says it."""
        self.rank, self.size, self.store = rank, size, store
        self.timeout_s, self._end = timeout_s, end
        self._phase, self._since, self._count = "starting", time.monotonic(), 0
        self._stop = threading.Event()
        self.fired = threading.Event()
        """Set once it ends the process: what the main thread meets then, such as ranks that have left, is no news."""
        self._note()
        targets = (self._watch, self._beat) if store is not None else (self._watch,)
        self._threads = [threading.Thread(target=target, name="watchdog", daemon=True) for target in targets]
        for thread in self._threads:
            thread.start()

    def enter(self, phase: str) -> None:
        """The main thread begins a phase, such as `rollout_stage1 of iteration 3`."""
        self._phase, self._since, self._count = phase, time.monotonic(), self._count + 1
        self._note()

    def wait(self) -> None:
        """It has done its part of the phase, and waits for the other ranks."""
        self._since, self._count = time.monotonic(), self._count + 1
        self._note()

    def alive(self) -> None:
        """The phase goes on, and may be long."""
        self._since = time.monotonic()

    def _note(self) -> None:
        if self.store is not None:
            self.store.set(f"eepo/phase/{self.rank}", json.dumps([self._count, self._phase]))

    def _watch(self) -> None:
        while not self._stop.wait(min(BEAT_S, self.timeout_s / 4)):
            if time.monotonic() - self._since > self.timeout_s:
                self.fired.set()
                self._end(self._complaint())
                return

    def _beat(self) -> None:
        beats = 0
        while not self._stop.wait(BEAT_S):
            beats += 1
            self.store.set(f"eepo/beat/{self.rank}", str(beats))

    def _read(self, kind: str) -> list[str] | None:
        """Of every rank; None where the store, which is on rank 0's node, does not answer."""
        found: list[str] = []

        def read() -> None:
            for rank in range(self.size):
                key = f"eepo/{kind}/{rank}"
                found.append(self.store.get(key).decode() if self.store.check([key]) else "")

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        reader.join(GRACE_S)
        return found if len(found) == self.size else None

    def _complaint(self) -> str | None:
        limit = f"(run.timeout_s={self.timeout_s:g})"
        if self.store is None:
            return f"{self._phase} hangs: nothing has moved {limit}"
        notes = self._read("phase")
        if notes is None:
            return f"rank 0 hangs: its store does not answer rank {self.rank}, in {self._phase} {limit}"
        entered = [tuple(json.loads(note)) if note else (-1, "starting") for note in notes]
        fewest = min(count for count, _ in entered)
        hanging = [rank for rank, (count, _) in enumerate(entered) if count == fewest]
        if len(hanging) == self.size:  # in a phase in which ranks meet
            hanging = self._silent() or hanging
        others = [rank for rank in range(self.size) if rank not in hanging]
        if self.rank != (others or hanging)[0]:
            return None
        if not others:
            return f"all {self.size} ranks hang in {self._phase} {limit}"
        which = ", ".join(map(str, hanging[:8])) + (" …" if len(hanging) > 8 else "")
        return f"rank {which} hangs in {entered[hanging[0]][1]} {limit}; {len(others)} of {self.size} ranks wait for it"

    def _silent(self) -> list[int]:
        """Ranks whose hearts do not beat."""
        before = self._read("beat")
        time.sleep(GRACE_S)
        after = self._read("beat")
        if before is None or after is None:
            return [0]
        return [rank for rank in range(self.size) if rank != self.rank and before[rank] == after[rank]]

    def let_it_end(self) -> None:
        """Where the process is being ended, wait for it."""
        if self.fired.is_set():
            time.sleep(10 * GRACE_S)

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


def end_process(complaint: str | None, note: Callable[[str], None], *, alone: bool) -> None:
    """Say it, show where this process's threads are, and leave at once: what hangs could not be asked to. note: is told
    the complaint, too."""
    if complaint is not None:
        note(complaint)
        print(f"eepo-fast: {complaint}", file=sys.stderr, flush=True)
    faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
    if not alone:  # the launcher ends all ranks when one leaves, and rank 0 holds their store: let all of them look
        time.sleep(2 * GRACE_S)
    os._exit(EXIT_CODE)


@contextmanager
def watching(
    rank: int, size: int, store: Store | None, timeout_s: float, note: Callable[[str], None]
) -> Iterator[Watchdog]:
    watchdog = Watchdog(rank, size, store, timeout_s, lambda text: end_process(text, note, alone=size == 1))
    try:
        yield watchdog
    finally:
        watchdog.stop()
