"""What runs beside sampling, on completions that have ended: the gradient of unlearning, grading, and scores of a fixed
model. Each has a thread, and on a GPU a CUDA stream of its own; on a CPU, where threads would take the engine's cores,
unlearning is done between two of its steps."""

import functools
import gc
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext

import torch

from eepo_fast.algorithm.forget import GradientPass
from eepo_fast.config import Config, EepoConfig
from eepo_fast.distributed import World
from eepo_fast.policy.micro_batches import input_length
from eepo_fast.policy.module import Policy
from eepo_fast.rewards import Grader
from eepo_fast.rollout.engine import CanGenerate, OnProgress, RolloutEngine, SampleRequest, Sampling
from eepo_fast.types import Grade, Rollout

CHUNKS_GRADED = 8  # so many of an iteration's completions are graded at once, while others are being sampled
SPARE_BYTES = 1 << 30  # left to the engine: its sampling step asks for memory of its own


@functools.cache
def side_stream(name: str) -> torch.cuda.Stream:
    """Returns one stream for all iterations: what PyTorch's allocator keeps it keeps for a stream."""
    return torch.cuda.Stream()


class Background:
    """Does work on a thread, with a CUDA stream of its own on a GPU; or without a thread, when it is given."""

    def __init__(self, name: str, *, threaded: bool, on_gpu: bool = True):
        """Takes on_gpu: whether the work is the GPU's, where there is one."""
        on_gpu = on_gpu and threaded and torch.cuda.is_available()
        self.stream = side_stream(name) if on_gpu else None
        device = torch.cuda.current_device() if on_gpu else None
        enter = (lambda: torch.cuda.set_device(device)) if on_gpu else None  # a new thread's is the first
        self.pool = ThreadPoolExecutor(1, name, initializer=enter) if threaded else None
        self.pending: list[Future] = []

    def run(self, work: Callable, *arguments) -> None:
        if self.pool is None:
            work(*arguments)
        else:
            self.pending.append(self.pool.submit(self._run, work, *arguments))

    def _run(self, work: Callable, *arguments) -> None:
        with torch.cuda.stream(self.stream) if self.stream else nullcontext():
            work(*arguments)
        self.synchronize()

    def synchronize(self) -> None:
        """Waits until its stream has done what it was given."""
        if self.stream is not None:
            self.stream.synchronize()

    def has_room(self, num_bytes: float) -> bool:
        """Returns whether its stream can have so much, and the engine what a step takes. What PyTorch keeps for the
        stream counts as free, and what it keeps for others where all of a segment is unused: it gives that back before
        it runs out."""
        if self.stream is None:
            return True
        kept = 0
        for segment in torch.cuda.memory_snapshot():
            if segment["stream"] == self.stream.cuda_stream or not segment["allocated_size"]:
                kept += segment["total_size"] - segment["allocated_size"]
        return num_bytes + SPARE_BYTES <= torch.cuda.mem_get_info()[0] + kept

    def wait(self) -> None:
        """Waits for all that was given; raises what it raised."""
        for future in self.pending:
            future.result()
        self.pending.clear()

    def close(self) -> None:
        """Leaves undone what has not begun, and waits for the rest."""
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)


class TokenQueue:
    """Gives completions on in batches of at most so many tokens, in the order in which they come."""

    def __init__(self, most: int, give: Callable[[list[Rollout]], None]):
        self.most, self.give = most, give
        self.waiting: list[Rollout] = []
        self.num_tokens = 0

    def put(self, rollout: Rollout) -> None:
        length = input_length(rollout)
        if self.waiting and self.num_tokens + length > self.most:
            batch, self.waiting, self.num_tokens = self.waiting, [], 0
            self.give(batch)
        self.waiting.append(rollout)
        self.num_tokens += length

    def drop(self, rollouts: Sequence[Rollout]) -> None:
        """Forgets those of them that have not been given yet."""
        dropped = set(rollouts)
        self.waiting = [r for r in self.waiting if r not in dropped]
        self.num_tokens = sum(map(input_length, self.waiting))


class StreamedUnlearning:
    """Computes ∇L of completions that have finished while others are still being sampled: between two steps of the
    engine on a CPU, on a thread and a CUDA stream of its own on a GPU. Where memory does not suffice for both, it gives
    up, and the pass is made after the stage."""

    def __init__(
        self, policy: Policy, config: EepoConfig, num_completions: int, num_prompts: int, background: Background
    ):
        assert policy.stream_tokens is not None
        self.whole: GradientPass | None = GradientPass(policy.alone(), config, num_completions, num_prompts)
        self.background = background
        self.share = 0.0 if self.whole.policy is policy else 1 / policy.world.size
        """The part of ∇L's memory that the policy's own sum takes beside this rank's when they are added up."""
        self.queue = TokenQueue(policy.stream_tokens, lambda batch: background.run(self._work, batch))
        self.spans: list[tuple[float, float]] = []
        """The times at which it was worked on: (start, end), of `time.perf_counter`."""
        self.gave_up = False
        self.put_off = 0
        """The micro-batches for which there was no room beside the engine; they are made after the stage."""

    def take(self, rollout: Rollout) -> None:
        """Takes a completion that has finished; a micro-batch of them is worked on at once."""
        if self.whole is not None and rollout.num_tokens:
            self.queue.put(rollout)

    def _work(self, batch: list[Rollout]) -> None:
        if self.whole is None:
            return
        if not self._has_room(self.whole):
            self.put_off += 1
            return
        started = time.perf_counter()
        try:
            with torch.enable_grad():  # engines sample without
                self.whole.add(batch)
            self.background.synchronize()
        except torch.OutOfMemoryError:
            self.whole, self.gave_up = None, True
        self.spans.append((started, time.perf_counter()))

    def _has_room(self, whole: GradientPass) -> bool:
        """Returns whether there is room for a micro-batch, at the first for ∇L itself, and for what follows."""
        whole_bytes = sum(4 * p.numel() for p in whole.policy.model.parameters())
        sums = (self.share if whole.done else 1 + self.share) * whole_bytes
        return self.background.has_room(whole.policy.pass_bytes(gradient=True) + sums)

    def drop(self) -> None:
        """Forgets what has been done, whose completions do not count or whose memory is needed; all is made later."""
        self.background.wait()
        self.whole = None
        self.spans.clear()

    def seconds_until(self, moment: float) -> float:
        """Returns the seconds spent on it before a moment of `time.perf_counter`."""
        return sum(max(0.0, min(end, moment) - start) for start, end in self.spans)

    def hand_over(self) -> GradientPass | None:
        """Returns what has been begun, to be finished; None where it has given up, and at a second call, which an error
        in the first one's work has led to."""
        self.background.wait()
        whole, self.whole = self.whole, None
        return whole


class ScoredAhead:
    """Scores completions with a model that does not change (the reference) while an engine samples others."""

    def __init__(self, policy: Policy, background: Background):
        assert policy.stream_tokens is not None
        self.policy, self.background = policy.alone(), background
        self.gave_up = False
        self.put_off = 0
        """The batches for which there was no room beside the engine; they are scored after the stage."""
        self.queue = TokenQueue(policy.stream_tokens, lambda batch: background.run(self._score, batch))

    def take(self, rollout: Rollout) -> None:
        if rollout.num_tokens and not self.gave_up:
            self.queue.put(rollout)

    def _score(self, batch: list[Rollout]) -> None:
        try:
            if self.gave_up:
                return
            if self.background.has_room(self.policy.pass_bytes(gradient=False)):
                set_ref_logprobs(self.policy, batch)
            else:
                self.put_off += 1
        except torch.OutOfMemoryError:  # beside the engine; there is room when it sleeps
            self.gave_up = True


def share_ref_logprobs(rollouts: Sequence[Rollout], world: World) -> None:
    """Gives every rank what others have scored ahead."""
    if world.size == 1:
        return
    mine = {i: torch.tensor(r.ref_logprobs) for i, r in enumerate(rollouts) if r.ref_logprobs is not None}
    for part in world.gather(mine):
        for i, logprobs in part.items():
            rollouts[i].ref_logprobs = logprobs.tolist()


def set_ref_logprobs(reference: Policy, rollouts: Sequence[Rollout]) -> None:
    """Scores those of them that are not scored yet."""
    rest = [r for r in rollouts if r.ref_logprobs is None]
    for r, logprobs in zip(rest, reference.score(rest).logprobs, strict=True):
        r.ref_logprobs = logprobs


class Yielding:
    """Samples with an engine that has others' memory beside it: if that runs out, they give theirs up, and sampling
    begins again, once. Seeds are a request's own, so that the same comes of it."""

    def __init__(self, engine: RolloutEngine, give_up: Callable[[list[Rollout]], None]):
        """Takes give_up, which is told what has been handed over: it does not count."""
        self.engine, self.give_up = engine, give_up

    def generate(
        self,
        requests: Sequence[SampleRequest],
        sampling: Sampling,
        progress: OnProgress | None = None,
        finished: Callable[[Rollout], None] | None = None,
        quorum: float = 1.0,
    ) -> list[Rollout]:
        handed: list[Rollout] = []

        def noted(rollout: Rollout) -> None:
            handed.append(rollout)
            if finished is not None:
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
    """Grades completions a chunk at a time, on a thread of its own where the grader may be called from one."""

    def __init__(self, grader: Grader, decode: Callable[[Rollout], str], *, chunk: int, seconds: float):
        """Takes chunk, how many completions are graded at once, and the seconds that all of an iteration's may take."""
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
        grades = self.grader.grade([r.prompt.problem for r in rollouts], completions, seconds=self.seconds)
        self.seconds = max(0.0, self.seconds - (time.monotonic() - started))
        self.known.update(zip(map(_key, rollouts), grades, strict=True))

    def grades(self, rollouts: Sequence[Rollout], world: World) -> list[Grade]:
        """Returns grades of all of them, on every rank; what none knows yet is graded now, each rank its share."""
        self.background.wait()
        known = {key: grade for part in world.gather(self.known) for key, grade in part.items()}
        mine = [r for r in rollouts if _key(r) not in known][world.rank :: world.size]
        self.known = {}
        with world.agree():  # a reward of the user's may end the run, on one rank alone
            self._grade(mine)
        known |= {key: grade for part in world.gather(self.known) for key, grade in part.items()}
        return [known[_key(r)] for r in rollouts]

    def drop(self, rollouts: Sequence[Rollout]) -> None:
        """Forgets completions that do not count, and the time that they took."""
        self.background.wait()
        self.seconds, dropped = self.limit, set(rollouts)
        self.waiting = [r for r in self.waiting if r not in dropped]
        for r in rollouts:
            self.known.pop(_key(r), None)


class Ahead:
    """Does what can be done with an iteration's completions before the last of them has ended."""

    def __init__(
        self, config: Config, grader: Grader, decode: Callable[[Rollout], str], reference: Policy | None, world: World
    ):
        size = config.train.prompts_per_iteration * config.rollout.group_size
        share = size / max(1, world.size // config.rollout.tensor_parallel)  # sampled here
        chunk = math.ceil(share / CHUNKS_GRADED)
        self.ranks_per_engine = config.rollout.tensor_parallel
        self.streamed: StreamedUnlearning | None = None
        self.given_up, self.sleeps = 0, config.rollout.sleep
        self.leads_engine = world.rank % config.rollout.tensor_parallel == 0
        """The other ranks of an engine see the same completions."""
        self.graded = GradedAhead(grader, decode, chunk=chunk, seconds=config.reward.step_seconds)
        self.unlearning = Background("unlearn", threaded=torch.cuda.is_available())
        self.scoring = Background("score", threaded=torch.cuda.is_available())
        self.scored: ScoredAhead | None = None
        """None on a CPU, beside whose sampling nothing runs, and where an engine is spread over ranks."""
        if self.scoring.pool and reference and reference.stream_tokens and self.ranks_per_engine == 1:
            self.scored = ScoredAhead(reference, self.scoring)
        self.backgrounds = (self.graded.background, self.unlearning, self.scoring)

    def stream(
        self, policy: Policy, config: EepoConfig, num_completions: int, num_prompts: int
    ) -> StreamedUnlearning | None:
        """Returns unlearning that begins while completions are sampled; None where it has to wait: for weights that no
        rank has whole, and where an engine is spread over ranks, which could not give up its memory on one of them."""
        if policy.stream_tokens is not None and self.ranks_per_engine == 1:
            self.streamed = StreamedUnlearning(policy, config, num_completions, num_prompts, self.unlearning)
        return self.streamed

    def beside(self, engine: RolloutEngine, streamed: StreamedUnlearning | None) -> CanGenerate:
        """Returns the engine to sample with, which may take back what `streamed` and the scores hold. Not where it is
        spread over ranks: those that have memory left wait inside it for the one that has none."""
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
        """Returns how often sampling ran out of memory and began again, and how many batches had no room beside it."""
        waiting = [part.put_off for part in (self.streamed, self.scored) if part]
        return {"rollout/out_of_memory": self.given_up, "rollout/put_off": sum(waiting)}

    def put_to_sleep(self, engine: RolloutEngine, waiting: AbstractContextManager) -> None:
        """Lets the engine sleep, in a run where it does, once nothing asks for memory, for what vLLM gives back has to
        show. waiting: is entered for the time of that."""
        if self.sleeps:
            with waiting:
                self.unlearning.wait()
                self.scoring.wait()
            engine.sleep()

    def take(self, rollout: Rollout) -> None:
        if self.leads_engine:
            self.graded.take(rollout)
        if self.scored:
            self.scored.take(rollout)

    def drop(self, rollouts: Sequence[Rollout]) -> None:
        """Forgets completions that are sampled again."""
        self.graded.drop(rollouts)
        if self.scored:
            self.scored.queue.drop(rollouts)

    def close(self) -> None:
        """Ends all threads: whatever has ended the iteration, nothing goes on behind it."""
        for background in self.backgrounds:
            background.close()


def _key(rollout: Rollout) -> tuple:
    """Returns what a completion is known by on every rank."""
    return rollout.begun, rollout.prompt.id, rollout.stage, rollout.sample_index, rollout.num_tokens
