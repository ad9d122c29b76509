"""Verifies procedural tasks whose answer is one number, in a place that a pattern says."""

import re
import time
from collections.abc import Sequence

from eepo_fast.types import Grade, Problem

PATTERNS = {
    "progressions": re.compile(r"\s*(\d{1,9})"),  # the next term; what a longer completion goes on with is not read
    "two_ways": re.compile(r"\s*[AB](\d{1,9})\s*\Z"),
}


class NumberGrader:
    """Rewards a completion whose number is the problem's answer."""

    beside_sampling = False  # it takes too little time to be worth a thread

    def __init__(self, task: str):
        self.pattern = PATTERNS[task]

    def start(self) -> None:
        pass

    def grade(
        self, problems: Sequence[Problem], completions: Sequence[str], *, seconds: float | None = None
    ) -> list[Grade]:
        return [self._one(p.answer, c) for p, c in zip(problems, completions, strict=True)]

    def _one(self, answer: str, completion: str) -> Grade:
        start = time.perf_counter()
        found = self.pattern.match(completion)
        reward, status = (float(int(found[1]) == int(answer)), "ok") if found else (0.0, "no_answer")
        return Grade(reward, status, time.perf_counter() - start)

    def unreadable(self, golds: Sequence[str]) -> list[int]:
        return [i for i, gold in enumerate(golds) if not gold.isdecimal()]

    def close(self) -> None:
        pass
