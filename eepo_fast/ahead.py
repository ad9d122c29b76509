"""Work on completions that have ended, while others are still being sampled: grading, and scores of a fixed model.

Unlearning does so too: unlearn.StreamedUnlearning.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from eepo_fast.background import Background, TokenQueue
from eepo_fast.distributed import World
from eepo_fast.policy.module import Policy
from eepo_fast.rewards import Grader
from eepo_fast.types import Grade, Rollout


class ScoredAhead:
    """Log-probs of a model that does not change (the reference), where it may be asked while an engine samples."""

    def __init__(self, policy: Policy, background: Background):
        assert policy.stream_tokens is not None
        self.policy, self.background = policy, background
        self.known: dict[int, list[float]] = {}
        self.gave_up = False
        self.queue = TokenQueue(policy.stream_tokens, lambda batch: background.run(self._score, batch))

    def take(self, rollout: Rollout) -> None:
        if rollout.num_tokens and not self.gave_up:
            self.queue.put(rollout)

    def _score(self, batch: list[Rollout]) -> None:
        try:
            if not self.gave_up:
                self.known.update(self.policy.score(batch)[0])
        except torch.OutOfMemoryError:  # beside the engine; there is room when it sleeps
            self.gave_up = True

    def score(self, rollouts: Sequence[Rollout]) -> dict[int, list[float]]:
        """Of all of them, by id(): what is known already, and the rest now."""
        self.background.wait()
        rest = [r for r in rollouts if id(r) not in self.known]
        self.known.update(self.policy.score(rest)[0])
        return {id(r): self.known[id(r)] for r in rollouts}


class GradedAhead:
    """Grades of completions, a chunk at a time on a thread of its own, where the grader may be called from one."""

    def __init__(self, grader: Grader, decode: Callable[[Rollout], str], *, chunk: int, seconds: float):
        """chunk: completions graded at once. seconds: for all of an iteration's answers."""
        self.grader, self.decode, self.chunk, self.seconds = grader, decode, chunk, seconds
        self.background = Background(threaded=grader.beside_sampling)
        self.waiting: list[Rollout] = []
        self.known: dict[tuple, Grade] = {}

    def take(self, rollout: Rollout) -> None:
        if not self.grader.beside_sampling:
            return
        self.waiting.append(rollout)
        if len(self.waiting) >= self.chunk:
            chunk, self.waiting = self.waiting, []
            self.background.run(self._grade, chunk, [self.decode(r) for r in chunk])

    def _grade(self, rollouts: Sequence[Rollout], completions: Sequence[str]) -> None:
        started = time.monotonic()
        limit = {"seconds": self.seconds} if self.grader.beside_sampling else {}
        grades = self.grader.grade([r.prompt.problem for r in rollouts], completions, **limit)
        self.seconds = max(0.0, self.seconds - (time.monotonic() - started))
        self.known.update(zip(map(_key, rollouts), grades, strict=True))

    def grades(self, rollouts: Sequence[Rollout], world: World) -> list[Grade]:
        """Of all of them, on every rank: what is known anywhere, and the rest now, each rank its share."""
        self.background.wait()
        known = {key: grade for part in world.gather(self.known) for key, grade in part.items()}
        mine = [r for r in rollouts if _key(r) not in known][world.rank :: world.size]
        self.known = {}
        self._grade(mine, [r.completion for r in mine])
        known |= {key: grade for part in world.gather(self.known) for key, grade in part.items()}
        return [known[_key(r)] for r in rollouts]

    def close(self) -> None:
        self.background.close()


def _key(rollout: Rollout) -> tuple:
    """The same on every rank."""
    return rollout.prompt.id, rollout.stage, rollout.sample_index, rollout.weights_version
