"""Rewards: is the completion right? One grader a task, one status a completion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from eepo_fast.config import RewardConfig
from eepo_fast.rewards.arithmetic import ArithmeticGrader
from eepo_fast.rewards.math import MathGrader
from eepo_fast.types import Grade, Problem

__all__ = ["ArithmeticGrader", "Grader", "MathGrader", "make_grader"]


class Grader(Protocol):
    def start(self) -> None:
        """Be ready, or raise a UserError: called before a run's folder is made."""

    def grade(self, problems: Sequence[Problem], completions: Sequence[str]) -> list[Grade]:
        """One grade a completion, in order."""

    def close(self) -> None: ...


def make_grader(task: str, settings: RewardConfig) -> Grader:
    """The grader of `data.train`: the procedural task has its own verifier, all else an exact mathematical answer."""
    if task == "arithmetic":
        return ArithmeticGrader()
    return MathGrader(settings.mode, step_seconds=settings.step_seconds)
