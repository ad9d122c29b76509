"""Grades in worker processes that can be killed: one answer at a time, with limits for an answer and for a call."""

import json
import os
import selectors
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from eepo_fast.types import Grade, UserError

START_SECONDS = 120.0
MEMORY_BYTES = 2 << 30  # of address space; a fresh worker has 0.3 of it
RECYCLE_AFTER = 2000  # answers; sympy's caches grow
BROKEN = "reinstall math-verify and its dependencies"


@dataclass
class Job:
    index: int
    mode: str
    gold: str
    answer: str
    started: float = 0.0


class Worker:
    def __init__(self, memory_bytes: int):
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "eepo_fast.rewards.worker", str(memory_bytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
        )
        assert self.process.stdin and self.process.stdout
        self.stdin, self.stdout = self.process.stdin, self.process.stdout
        self.job: Job | None = None
        self.ready = False
        self.started = time.monotonic()
        self.answered = 0

    def send(self, job: Job) -> None:
        job.started = time.monotonic()
        self.job = job
        with suppress(BrokenPipeError):  # the worker just died: the loop finds its end of file
            self.stdin.write(json.dumps([job.mode, job.gold, job.answer]) + "\n")
            self.stdin.flush()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        with suppress(BrokenPipeError):  # closing flushes what the dead process never read
            self.stdin.close()
        self.stdout.close()


class Pool:
    """Keeps workers, which start when they are needed, and stay. One that has answered RECYCLE_AFTER times is replaced:
    it goes on until the one that takes its place has passed its self-test, so that nobody waits."""

    def __init__(
        self, num_workers: int | None, answer_seconds: float, memory_bytes: int = MEMORY_BYTES,
        recycle_after: int = RECYCLE_AFTER,
    ):  # fmt: skip
        self.num_workers = num_workers or max(1, min(8, os.cpu_count() or 1))
        self.answer_seconds, self.memory_bytes, self.recycle_after = answer_seconds, memory_bytes, recycle_after
        self.workers: list[Worker] = []

    def run(self, jobs: Sequence[Job], deadline: float | None = None) -> dict[int, Grade]:
        """Returns a grade for each job's index. What is not done by `deadline` (of time.monotonic) is a `timeout`.
        UserError where a worker cannot start or fails its self-test."""
        waiting = deque(jobs)
        grades: dict[int, Grade] = {}
        while len(grades) < len(jobs):
            if deadline is not None and time.monotonic() > deadline:
                self._give_up(waiting, grades)
                break
            self._keep_up(len(jobs) - len(grades))
            for worker in self.workers:
                if worker.ready and worker.job is None and waiting:
                    worker.send(waiting.popleft())
            for worker, line in self._wait():
                self._receive(worker, line, grades)
            self._kill_overdue(grades)
        assert len(grades) == len(jobs)
        return grades

    def _keep_up(self, remaining: int) -> None:
        """Sees that there are enough workers, none of them dead or worn out."""
        for worker in [w for w in self.workers if w.ready and w.job is None and w.process.poll() is not None]:
            self._remove(worker)  # died between two jobs, so no answer is to blame
        worn = [w for w in self.workers if w.answered >= self.recycle_after]
        fresh = len(self.workers) - len(worn)
        while fresh < min(self.num_workers, max(remaining, len(worn))):
            self.workers.append(Worker(self.memory_bytes))
            fresh += 1
        num_ready = sum(w.ready for w in self.workers if w not in worn)
        for worker in [w for w in worn if w.job is None][:num_ready]:
            self._remove(worker)

    def _receive(self, worker: Worker, line: str | None, grades: dict[int, Grade]) -> None:
        job = worker.job
        if line is None:
            self._remove(worker)
            if job is None:
                raise UserError(f"grader: its self-test failed; {BROKEN}")
            # it died by itself (a C extension aborting, the kernel's out-of-memory killer)
            grades[job.index] = Grade(0.0, "error", time.monotonic() - job.started)
        elif job is None:
            worker.ready = True
        else:
            result = json.loads(line)
            grades[job.index] = Grade(result["reward"], result["status"], time.monotonic() - job.started)
            worker.job = None
            worker.answered += 1

    def _wait(self) -> list[tuple[Worker, str | None]]:
        """Returns (worker, its line, or None at its end) of all workers that have something to say within 0.1 s."""
        with selectors.DefaultSelector() as selector:
            for worker in self.workers:
                if worker.job is not None or not worker.ready:
                    selector.register(worker.stdout, selectors.EVENT_READ, worker)
            events = selector.select(timeout=0.1)
        return [(key.data, key.data.stdout.readline() or None) for key, _ in events]

    def _kill_overdue(self, grades: dict[int, Grade]) -> None:
        for worker in list(self.workers):
            now = time.monotonic()
            if not worker.ready and now - worker.started > START_SECONDS:
                raise UserError(f"grader: no answer from its self-test within {START_SECONDS:.0f} s; {BROKEN}")
            if worker.job is not None and now - worker.job.started > self.answer_seconds:
                self._time_out(worker, worker.job, grades)

    def _give_up(self, waiting: deque[Job], grades: dict[int, Grade]) -> None:
        for worker, job in [(w, w.job) for w in self.workers]:
            if job is not None:
                self._time_out(worker, job, grades)
        grades.update({job.index: Grade(0.0, "timeout", 0.0) for job in waiting})

    def _time_out(self, worker: Worker, job: Job, grades: dict[int, Grade]) -> None:
        self._remove(worker)
        grades[job.index] = Grade(0.0, "timeout", time.monotonic() - job.started)

    def _remove(self, worker: Worker) -> None:
        worker.kill()
        self.workers.remove(worker)

    def close(self) -> None:
        for worker in self.workers:
            worker.kill()
        self.workers.clear()
