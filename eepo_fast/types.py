"""The nouns of the program. A leaf: imports nothing of ours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple


class UserError(Exception):
    """A user's mistake. The command line prints the message alone, on one line, and exits with 2."""

    def __init__(self, message: str, *, shared: bool = False):
        """shared: all ranks raise it; then the first one alone says it."""
        super().__init__(message)
        self.shared = shared


class EngineError(Exception):
    """The rollout engine does not hold the weights it should, or was asked for something in a state that forbids it."""


class Interrupted(Exception):
    """The run was asked to leave; the policy is as it was after its last whole iteration."""


class WeightsVersion(NamedTuple):
    """Which weights sampled a token: those of policy step `policy_version`, or their forgetful copy."""

    policy_version: int
    forgotten: bool


@dataclass(frozen=True)
class Problem:
    id: str
    problem: str
    answer: str
    source: str = ""


@dataclass(frozen=True)
class Prompt:
    """A problem as the model reads it."""

    problem: Problem
    text: str
    token_ids: list[int]

    @property
    def id(self) -> str:
        return self.problem.id


@dataclass
class Rollout:
    """One sampled completion; per-token lists have one entry a completion token, the stop token included."""

    prompt: Prompt
    stage: int
    sample_index: int
    """Position in the prompt's group, over both stages."""
    token_ids: list[int]
    rollout_logprobs: list[float]
    weights_version: WeightsVersion
    finished: bool
    """Ended with a stop token; False: cut off at the limit."""
    completion: str = ""
    reward: float | None = None
    """None where grading timed out or failed: a missing reward, not a zero."""
    status: str = ""
    advantage: float = 0.0
    preempted: bool = False
    """Stopped half-way, so that the others need not wait; it goes on under other weights."""
    num_before: int = 0
    """Of a completion that was preempted: its first tokens, sampled before the forget step, from the policy."""
    details: dict[str, list[float]] = field(default_factory=dict)
    """Further per-token numbers for the rollout log."""

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def forgotten(self) -> list[bool]:
        """Of each token: was it sampled from forgetful weights?"""
        last = self.weights_version.forgotten
        return [False] * self.num_before + [last] * (self.num_tokens - self.num_before)

    @property
    def token_stages(self) -> list[int]:
        """Of each token: what went on after the forget step is of stage 2 from there."""
        if not self.num_before:
            return [self.stage] * self.num_tokens
        return [self.stage] * self.num_before + [2] * (self.num_tokens - self.num_before)

    def continued(self, rest: Rollout) -> Rollout:
        """This completion, preempted, and what was sampled after it."""
        return replace(
            self,
            token_ids=self.token_ids + rest.token_ids,
            rollout_logprobs=self.rollout_logprobs + rest.rollout_logprobs,
            weights_version=rest.weights_version,
            finished=rest.finished,
            preempted=rest.preempted,
            num_before=self.num_tokens,
        )


@dataclass
class RolloutBatch:
    """All rollouts of an iteration: `group_size` of every prompt, a prompt's group side by side, stage 1 first."""

    rollouts: list[Rollout]
    group_size: int
    extra: list[Rollout] = field(default_factory=list)
    """AEPO's, drawn at another temperature, stage 3; in no group."""

    @classmethod
    def of(cls, rollouts: Sequence[Rollout], prompts: Sequence[Prompt], group_size: int, extra: list[Rollout]):
        """Rollouts in any order."""
        order = {p.id: i for i, p in enumerate(prompts)}
        grouped = sorted(rollouts, key=lambda r: (order[r.prompt.id], r.sample_index))
        batch = cls(grouped, group_size, extra)
        assert all(len(g) == group_size and len({r.prompt.id for r in g}) == 1 for g in batch.groups())
        return batch

    def groups(self) -> list[list[Rollout]]:
        return [self.rollouts[i : i + self.group_size] for i in range(0, len(self.rollouts), self.group_size)]

    def stage(self, stage: int) -> list[Rollout]:
        return [r for r in self.rollouts if r.stage == stage]


@dataclass(frozen=True)
class Grade:
    reward: float
    status: str
    """ok, no_answer, timeout, too_large or error."""
    seconds: float
