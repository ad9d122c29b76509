"""Work on completions that have ended, while others are still being sampled: grading, and scores of a fixed model.

Unlearning does so too: unlearn.StreamedUnlearning.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Sequence

import torch

from eepo_fast.background import Background, TokenQueue
from eepo_fast.config import Config
from eepo_fast.distributed import World
from eepo_fast.policy.module import Policy
from eepo_fast.rewards import Grader
from eepo_fast.rollout.engine import Request, RolloutEngine, Sampling
from eepo_fast.types import Grade, Rollout
from eepo_fast.unlearn import StreamedUnlearning

CHUNKS_GRADED = 8  # so many of an iteration's completions are graded at once, while others are being sampled


class ScoredAhead:
    """Log-probs of a model that does not change (the reference), where it may be asked while an engine samples."""

    def __init__(self, policy: Policy, background: Background):
        assert policy.stream_tokens is not None
        self.policy, self.background = policy, background
        self.known: dict[int, tuple[Rollout, list[float]]] = {}
        """By id(), and with the rollout: another must not get its id()."""
        self.gave_up = False
        self.put_off = 0
        """Batches for which there was no room beside the engine; scored after the stage."""
        self.queue = TokenQueue(policy.stream_tokens, lambda batch: background.run(self._score, batch))

    def take(self, rollout: Rollout) -> None:
        if rollout.num_tokens and not self.gave_up:
            self.queue.put(rollout)

    def _score(self, batch: list[Rollout]) -> None:
        try:
            if self.gave_up:
                return
            if self.background.has_room(self.policy.pass_bytes(gradient=False)):
                self._remember(batch)
            else:
                self.put_off += 1
        except torch.OutOfMemoryError:  # beside the engine; there is room when it sleeps
            self.gave_up = True

    def _remember(self, rollouts: Sequence[Rollout]) -> None:
        found = self.policy.score(rollouts)[0]
        self.known.update({id(r): (r, found[id(r)]) for r in rollouts if id(r) in found})

    def score(self, rollouts: Sequence[Rollout]) -> dict[int, list[float]]:
        """Of all of them, by id(): what is known already, and the rest now."""
        self.background.wait()
        self._remember([r for r in rollouts if id(r) not in self.known])
        return {id(r): self.known[id(r)][1] for r in rollouts if id(r) in self.known}


class Yielding:
    """An engine's sampling, where something else has memory beside it: if it runs out, that is given up, and sampling
    begins again, once. Seeds are a request's own, so that the same comes of it."""

    def __init__(self, engine: RolloutEngine, give_up: Callable[[list[Rollout]], None]):
        """give_up: told what has been handed over, which does not count."""
        self.engine, self.give_up = engine, give_up

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, progress, finished: Callable[[Rollout], None], quorum
    ) -> list[Rollout]:
        handed: list[Rollout] = []

        def noted(rollout: Rollout) -> None:
            handed.append(rollout)
            finished(rollout)

        try:
            return self.engine.generate(requests, sampling, progress, noted, quorum)
        except torch.OutOfMemoryError:
            pass  # what follows is outside the handler, whose traceback holds memory
        self.give_up(handed)
        gc.collect()
        torch.cuda.empty_cache()
        return self.engine.generate(requests, sampling, progress, finished, quorum)


class GradedAhead:
    """Grades of completions, a chunk at a time on a thread of its own, where the grader may be called from one."""

    def __init__(self, grader: Grader, decode: Callable[[Rollout], str], *, chunk: int, seconds: float):
        """chunk: completions graded at once. seconds: for all of an iteration's answers."""
        self.grader, self.decode, self.chunk, self.limit = grader, decode, chunk, seconds
        self.seconds = seconds
        self.background = Background("grade", threaded=grader.beside_sampling, on_gpu=False)
        self.waiting: list[Rollout] = []
        self.known: dict[tuple, Grade] = {}

    def take(self, rollout: Rollout) -> None:
        if not self.grader.beside_sampling:
            return
        self.waiting.append(rollout)
        if len(self.waiting) >= self.chunk:
            chunk, self.waiting = self.waiting, []
            for r in chunk:
                r.completion = self.decode(r)
            self.background.run(self._grade, chunk)

    def _grade(self, rollouts: Sequence[Rollout]) -> None:
        started, completions = time.monotonic(), [r.completion for r in rollouts]
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
        self._grade(mine)
        known |= {key: grade for part in world.gather(self.known) for key, grade in part.items()}
        return [known[_key(r)] for r in rollouts]

    def drop(self, rollouts: Sequence[Rollout]) -> None:
        """They do not count, nor does the time that they took."""
        self.background.wait()
        self.seconds, dropped = self.limit, set(map(id, rollouts))
        self.waiting = [r for r in self.waiting if id(r) not in dropped]
        for r in rollouts:
            self.known.pop(_key(r), None)


class Ahead:
    """What is done with an iteration's completions before the last of them has ended."""

    def __init__(
        self, config: Config, grader: Grader, decode: Callable[[Rollout], str], reference: Policy | None, world: World
    ):
        size = config.train.prompts_per_iteration * config.rollout.group_size
        share = size / max(1, world.size // config.rollout.tensor_parallel)  # sampled here
        chunk = math.ceil(share / CHUNKS_GRADED)
        self.ranks_per_engine = config.rollout.tensor_parallel
        self.streamed: StreamedUnlearning | None = None
        self.given_up = 0
        self.leads_engine = world.rank % config.rollout.tensor_parallel == 0
        """The other ranks of an engine see the same completions."""
        self.graded = GradedAhead(grader, decode, chunk=chunk, seconds=config.reward.step_seconds)
        self.unlearning = Background("unlearn", threaded=torch.cuda.is_available())
        scoring = Background("score", threaded=torch.cuda.is_available())
        possible = scoring.pool and reference and reference.stream_tokens
        self.scored = ScoredAhead(reference, scoring) if possible else None
        """Nothing runs beside a CPU's sampling, nor where ranks would have to meet."""
        self.backgrounds = (self.graded.background, self.unlearning, scoring)

    def beside(self, engine: RolloutEngine, streamed: StreamedUnlearning | None) -> RolloutEngine | Yielding:
        """The engine to sample with, which may take back what `streamed` and the scores hold. Not where an engine is
        spread over ranks: those that have memory left wait inside it for the one that has none."""
        self.streamed = streamed or self.streamed
        alone = self.unlearning.pool is None or (streamed is None and self.scored is None)
        return engine if alone or self.ranks_per_engine > 1 else Yielding(engine, self._give_up)

    def _give_up(self, handed: list[Rollout]) -> None:
        self.given_up += 1
        if self.streamed:
            self.streamed.drop()
        if self.scored:
            self.scored.background.wait()
            self.scored.gave_up = True
        self.drop(handed)

    def metrics(self) -> dict[str, int]:
        """How often sampling ran out of memory and began again, and batches that found no room beside it."""
        waiting = [part.put_off for part in (self.streamed, self.scored) if part]
        return {"rollout/out_of_memory": self.given_up, "rollout/put_off": sum(waiting)}

    def take(self, rollout: Rollout) -> None:
        if self.leads_engine:
            self.graded.take(rollout)
        if self.scored:
            self.scored.take(rollout)

    def drop(self, rollouts: Sequence[Rollout]) -> None:
        """What was sampled is sampled again."""
        self.graded.drop(rollouts)
        if self.scored:
            self.scored.queue.drop(rollouts)

    def close(self) -> None:
        """Whatever has ended the iteration, nothing goes on behind it."""
        for background in self.backgrounds:
            background.close()


def _key(rollout: Rollout) -> tuple:
    """The same on every rank."""
    return rollout.prompt.id, rollout.stage, rollout.sample_index, rollout.weights_version
