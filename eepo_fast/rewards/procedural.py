"""Verifies procedural tasks: what they have in common, and those whose answer is one number in a place of its own."""

import re
import time
from abc import abstractmethod
from collections.abc import Sequence
from typing import Protocol

from eepo_fast.types import Grade, Problem

PATTERNS = {
    "progressions": re.compile(r"\s*(\d{1,9})"),  # the next term; what a longer completion goes on with is not read
    "two_ways": re.compile(r"\s*[AB](\d{1,9})\s*\Z"),
}


class ProceduralGrader(Protocol):
    """Grades with `judge`, answer by answer."""

    beside_sampling: bool = False  # it takes too little time to be worth a thread

    @abstractmethod
    def judge(self, problem: Problem, completion: str) -> tuple[float, str]:
        """Returns (reward, status)."""

    def start(self) -> None:
        return  # there is nothing to start

    def grade(
        self, problems: Sequence[Problem], completions: Sequence[str], *, seconds: float | None = None
    ) -> list[Grade]:
        grades = []
        for problem, completion in zip(problems, completions, strict=True):
            start = time.perf_counter()
            reward, status = self.judge(problem, completion)
            grades.append(Grade(reward, status, time.perf_counter() - start))
        return grades

    def unreadable(self, golds: Sequence[str]) -> list[int]:
        return []  # problems are made here, and their answers with them

    def close(self) -> None:
        return


class NumberGrader(ProceduralGrader):
    """Rewards a completion whose number is the problem's answer."""

    def __init__(self, task: str):
        self.pattern = PATTERNS[task]

    def judge(self, problem: Problem, completion: str) -> tuple[float, str]:
        found = self.pattern.match(completion)
        return (float(int(found[1]) == int(problem.answer)), "ok") if found else (0.0, "no_answer")
