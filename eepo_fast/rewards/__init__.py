"""Says whether a completion is right: a task has one grader, and a completion gets one status."""

from collections.abc import Sequence
from typing import Protocol

from eepo_fast.config import RewardConfig
from eepo_fast.rewards.arithmetic import ArithmeticGrader
from eepo_fast.rewards.function import FunctionGrader
from eepo_fast.rewards.math import MathGrader
from eepo_fast.rewards.procedural import PATTERNS, NumberGrader
from eepo_fast.types import Grade, Problem

__all__ = ["ArithmeticGrader", "Grader", "MathGrader", "make_answer_grader", "make_grader", "why_unreadable"]


class Grader(Protocol):
    beside_sampling: bool
    """Whether it may be called from another thread than the main one, while completions are still being sampled."""

    def start(self) -> None:
        """Gets ready, or raises a UserError; called before a run's folder is made."""

    def grade(
        self, problems: Sequence[Problem], completions: Sequence[str], *, seconds: float | None = None
    ) -> list[Grade]:
        """Returns one grade a completion, in order. seconds: what is not graded by then is a `timeout`; a grader that
        works in this very thread may let it pass."""

    def unreadable(self, golds: Sequence[str]) -> list[int]:
        """Returns the indices of the golds that no answer could be compared with."""

    def close(self) -> None: ...


def make_grader(task: str, settings: RewardConfig) -> Grader:
    """Returns the grader of training: `reward.function`, or right answers. UserError where that cannot be imported."""
    return FunctionGrader(settings.function) if settings.function else make_answer_grader(task, settings)


def make_answer_grader(task: str, settings: RewardConfig) -> Grader:
    """Returns the grader of right answers: procedural tasks have their own, all else is exact mathematics."""
    if task == "arithmetic":
        return ArithmeticGrader()
    if task in PATTERNS:
        return NumberGrader(task)
    return MathGrader(settings.mode, step_seconds=settings.step_seconds)


def why_unreadable(problem: Problem) -> str:
    """Returns what to say of a problem whose gold a grader has called unreadable."""
    return f"{problem.id}: the answer {problem.answer[:80]!r} is neither a number nor words nor mathematics"
