"""Exact mathematical answers, by math-verify in worker processes that are killed at a wall clock."""

from __future__ import annotations

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

from eepo_fast.rewards.extract import extract_answer, has_digit_gap, is_text, normalise
from eepo_fast.types import Grade, Problem, UserError

ANSWER_SECONDS = 4.5  # parse, verify and kill end within the 5 s that `grade` promises
START_SECONDS = 120.0
MAX_CHARACTERS = 2000


@dataclass
class _Job:
    index: int
    gold: str
    answer: str
    started: float = 0.0


class _Worker:
    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "eepo_fast.rewards.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
        )
        self.job: _Job | None = None
        self.ready = False
        self.started = time.monotonic()

    def send(self, job: _Job) -> None:
        job.started = time.monotonic()
        self.job = job
        with suppress(BrokenPipeError):  # it just died: its end of file says so to the loop
            self.process.stdin.write(json.dumps([job.gold, job.answer]) + "\n")
            self.process.stdin.flush()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        with suppress(BrokenPipeError):  # closing flushes what the dead process never read
            self.process.stdin.close()
        self.process.stdout.close()


class MathGrader:
    """Grades final answers. Workers start at the first answer that string comparison cannot settle, and stay."""

    def __init__(self, num_workers: int | None = None, answer_seconds: float = ANSWER_SECONDS):
        self.num_workers = num_workers or max(1, min(8, os.cpu_count() or 1))
        self.answer_seconds = answer_seconds
        self.workers: list[_Worker] = []

    def start(self) -> None:
        """Start a worker and see its self-test pass; UserError where it does not."""
        grades: list[Grade | None] = [None]
        self._run(deque([_Job(0, "\\frac{1}{2}", "0.5")]), grades)
        if grades[0].reward != 1.0:
            raise UserError(f"grader: its self-test gave {grades[0]}; reinstall math-verify and its dependencies")

    def grade(self, problems: Sequence[Problem], completions: Sequence[str]) -> list[Grade]:
        """Extract each completion's final answer and compare it with the problem's; the problem's text is not read."""
        answers = [extract_answer(completion) for completion in completions]
        return self.grade_answers([p.answer for p in problems], answers)

    def grade_answers(self, golds: Sequence[str], answers: Sequence[str | None]) -> list[Grade]:
        grades: list[Grade | None] = [None] * len(golds)
        jobs: deque[_Job] = deque()
        for i, (gold, answer) in enumerate(zip(golds, answers, strict=True)):
            start = time.perf_counter()
            settled = _without_worker(gold, answer)
            if settled is None:
                jobs.append(_Job(i, normalise(gold), normalise(answer)))
            else:
                grades[i] = Grade(*settled, time.perf_counter() - start)
        if jobs:
            self._run(jobs, grades)
        assert all(g is not None for g in grades)
        return grades

    def _run(self, jobs: deque[_Job], grades: list[Grade | None]) -> None:
        remaining = len(jobs)
        while remaining:
            for worker in [w for w in self.workers if w.ready and w.job is None and w.process.poll() is not None]:
                self._replace(worker)  # died between two jobs, so no answer is to blame
            while len(self.workers) < min(self.num_workers, remaining):
                self.workers.append(_Worker())
            for worker in self.workers:
                if worker.ready and worker.job is None and jobs:
                    worker.send(jobs.popleft())
            for worker, line in self._wait():
                if line is None:
                    self._replace(worker)
                    if worker.job is None:
                        raise UserError("grader: its self-test failed; reinstall math-verify and its dependencies")
                    # it died by itself (a C extension aborting, the kernel's out-of-memory killer)
                    grades[worker.job.index] = Grade(0.0, "error", time.monotonic() - worker.job.started)
                    remaining -= 1
                elif worker.job is None:
                    worker.ready = True
                else:
                    result = json.loads(line)
                    seconds = time.monotonic() - worker.job.started
                    grades[worker.job.index] = Grade(result["reward"], result["status"], seconds)
                    worker.job = None
                    remaining -= 1
            remaining -= self._kill_overdue(grades)

    def _wait(self) -> list[tuple[_Worker, str | None]]:
        """(worker, its line, or None at its end) of all workers with something to say within a tenth of a second."""
        with selectors.DefaultSelector() as selector:
            for worker in self.workers:
                if worker.job is not None or not worker.ready:
                    selector.register(worker.process.stdout, selectors.EVENT_READ, worker)
            events = selector.select(timeout=0.1)
        return [(key.data, key.data.process.stdout.readline() or None) for key, _ in events]

    def _kill_overdue(self, grades: list[Grade | None]) -> int:
        killed = 0
        for worker in list(self.workers):
            now = time.monotonic()
            if not worker.ready and now - worker.started > START_SECONDS:
                raise UserError(f"grader: no answer from its self-test within {START_SECONDS:.0f} s")
            if worker.job is not None and now - worker.job.started > self.answer_seconds:
                self._replace(worker)
                grades[worker.job.index] = Grade(0.0, "timeout", time.monotonic() - worker.job.started)
                killed += 1
        return killed

    def _replace(self, worker: _Worker) -> None:
        worker.kill()
        self.workers.remove(worker)

    def close(self) -> None:
        for worker in self.workers:
            worker.kill()
        self.workers.clear()


def _without_worker(gold: str, answer: str | None) -> tuple[float, str] | None:
    """(reward, status) where comparing strings is enough; None where mathematics is needed."""
    if not gold.strip():
        return 0.0, "error"
    if answer is None or not answer.strip():
        return 0.0, "no_answer"
    if len(answer) > MAX_CHARACTERS:
        return 0.0, "too_large"
    if len(gold) > MAX_CHARACTERS:
        return 0.0, "error"
    left, right = normalise(gold), normalise(answer)
    if left == right:
        return 1.0, "ok"
    if is_text(left) or has_digit_gap(left) or has_digit_gap(right):
        return float(left.casefold() == right.casefold()), "ok"
    if _is_integer(left) and _is_integer(right):
        return float(int(left) == int(right)), "ok"
    return None


def _is_integer(text: str) -> bool:
    return text.isascii() and text.lstrip("+-").isdigit() and len(text) - len(text.lstrip("+-")) <= 1
