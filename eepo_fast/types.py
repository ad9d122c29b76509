"""The nouns of the program. A leaf: imports nothing of ours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, NamedTuple

AEPO_STAGE = 3  # the stage of AEPO's extra samples: their seeds, and how the rollout log tells them apart


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


Message = dict[str, str]  # of a conversation: its role and its content


@dataclass(frozen=True)
class Problem:
    id: str
    problem: str
    """Its text; of a conversation, what the user said last."""
    answer: str
    source: str = ""
    messages: list[Message] = field(default_factory=list, compare=False)
    """The conversation that it was given as; none where it was given as text."""
    columns: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """All of its row, for a `reward.function`; nothing where there is none."""


@dataclass(frozen=True)
class Prompt:
    """A problem as the model reads it."""

    problem: Problem
    text: str
    token_ids: list[int]

    @property
    def id(self) -> str:
        return self.problem.id


@dataclass(frozen=True)
class Segment:
    """Tokens of a completion that the same weights sampled in a row; the stop token is one of them."""

    tokens: list[int]
    rollout_logprobs: list[float]
    """Each token's log-prob under the weights that sampled it, in nats, at the sampling temperature."""
    weights_version: WeightsVersion
    stage: int | None = None
    """The stage in which it was sampled, where that is not the one in which its completion began."""


@dataclass(eq=False)  # two completions are never the same one, whatever they say
class Rollout:
    """One sampled completion. What an iteration finds out about its tokens is kept in columns: lists with one number a
    token, None where nothing has been found out."""

    prompt: Prompt
    stage: int
    sample_index: int
    """The place in the prompt's group, counted over both stages."""
    segments: list[Segment]
    """One for most; one more for each time that the completion was stopped and went on."""
    finished: bool
    """True: it ended with a stop token. False: it was cut off at the limit."""
    completion: str = ""
    reward: float | None = None
    """None where grading timed out or failed: a missing reward, not a zero."""
    status: str = ""
    advantage: float = 0.0
    preempted: bool = False
    """It was stopped half-way, so that the others need not wait; it goes on under other weights."""
    begun: int = 0
    """The iteration in which it was begun, counted from 0."""
    prox_logprobs: list[float] | None = None
    """Log-probs under the policy's weights as the iteration finds them."""
    old_logprobs: list[float] | None = None
    """What the ratio of Eq. 3 divides by; inf, or None, where the update's own forward pass says it."""
    ref_logprobs: list[float] | None = None
    """Log-probs under the fixed reference model."""
    entropy: list[float] | None = None
    """The policy's entropy at each token, in nats, at the same weights as `prox_logprobs`."""
    gate: list[float] | None = None
    """1 for a token that is forgotten, 0 for one that the gate leaves alone."""
    high_covariance: list[float] | None = None
    """1 for a token that `grpo.loss: kl_cov` holds back, else 0."""
    forget_change: list[float] | None = None
    """How much the forget step changed each token's log-prob in the engine."""

    @property
    def token_ids(self) -> list[int]:
        return [token for segment in self.segments for token in segment.tokens]

    @property
    def rollout_logprobs(self) -> list[float]:
        return [logprob for segment in self.segments for logprob in segment.rollout_logprobs]

    @property
    def num_tokens(self) -> int:
        return sum(len(segment.tokens) for segment in self.segments)

    @property
    def weights_version(self) -> WeightsVersion:
        """The weights that sampled the last token."""
        return self.segments[-1].weights_version

    @property
    def num_before(self) -> int:
        """How many tokens were sampled before the completion went on under other weights, the last time; 0 where it
        never did."""
        return sum(count for *_, count in self.spans[:-1])

    @property
    def spans(self) -> list[tuple[int, bool, int]]:
        """Policy version, whether forgetful, and number of tokens of all that the same weights sampled in a row."""
        by_weights = groupby(self.segments, key=lambda segment: segment.weights_version)
        return [(*version, sum(len(s.tokens) for s in segments)) for version, segments in by_weights]

    @property
    def token_versions(self) -> list[WeightsVersion]:
        """The weights that sampled each token."""
        return [segment.weights_version for segment in self.segments for _ in segment.tokens]

    @property
    def segment_stages(self) -> list[int]:
        """The stage in which each segment was sampled."""
        return [segment.stage or self.stage for segment in self.segments]

    @property
    def token_stages(self) -> list[int]:
        return [stage for stage, s in zip(self.segment_stages, self.segments, strict=True) for _ in s.tokens]


@dataclass(eq=False)
class Group:
    """A prompt's completions, from when they are begun until they are trained on."""

    prompt: Prompt
    begun: int
    """The iteration in which that was, counted from 0; with the prompt's id, what it is known by."""
    rollouts: list[Rollout] = field(default_factory=list)
    """None yet where it has only been opened, then all, in the order of their sample indices."""

    @property
    def is_whole(self) -> bool:
        return not any(r.preempted for r in self.rollouts)


class Cursor(NamedTuple):
    """How far a run has come through its prompts."""

    epoch: int = 0
    position: int = 0
    postponed: tuple[int, ...] = ()
    """Prompts that one iteration met twice, at the end of an epoch and at the start of the next; they come next."""


@dataclass
class RolloutBatch:
    """All rollouts of an iteration: `group_size` of every prompt, a prompt's group side by side, stage 1 first."""

    rollouts: list[Rollout]
    group_size: int
    extra: list[Rollout] = field(default_factory=list)
    """Completions that a method sampled beside the groups, such as AEPO's (stage 3)."""

    @classmethod
    def of(cls, groups: Sequence[Group], group_size: int) -> RolloutBatch:
        """Returns the batch of groups, which are whole."""
        for group in groups:
            assert group.is_whole and [r.sample_index for r in group.rollouts] == list(range(group_size))
        return cls([r for group in groups for r in group.rollouts], group_size)

    def groups(self) -> list[list[Rollout]]:
        return [self.rollouts[i : i + self.group_size] for i in range(0, len(self.rollouts), self.group_size)]

    def stage(self, stage: int) -> list[Rollout]:
        return [r for r in self.rollouts if r.stage == stage]


@dataclass
class TrainerState:
    """What a checkpoint needs beside weights and optimizer."""

    step: int = 0
    """Iterations done."""
    policy_version: int = 0
    """Policy updates done."""
    entropy_window: list[float] = field(default_factory=list)
    """Stage-1 entropies of the last iterations, for `eepo.gate: iteration`."""
    entropy: float = 0.0
    """The policy's entropy in its last update, in nats, for AEPO; 0 before the first."""
    bad_updates: int = 0
    """Updates dropped in a row because their gradient was not finite."""
    forget_steps: list[tuple[float, float | None]] = field(default_factory=list)
    """(η, KL(θ'‖θ)) of the last two forget steps, for `eepo.step: kl`; None where it was too long."""
    cursor: Cursor | None = None
    """None before the first iteration, and in checkpoints of older versions."""
    missing: int = 0
    """Groups that `grpo.dynamic_sampling` has left out and not made up for yet."""
    groups: list[Group] = field(default_factory=list)
    """Those that have been begun and not been trained on, oldest first, for `rollout.carry`."""


@dataclass(frozen=True)
class Grade:
    reward: float
    status: str
    """ok, no_answer, timeout, too_large or error."""
    seconds: float
