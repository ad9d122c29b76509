"""One iteration: what it works with, what it has found out, and its phases, of which stages.py makes a method.

Around every phase: it is announced, timed and named in profiles (`phase`), and tried again with smaller micro-batches
where memory runs out (`within_memory`). What goes on beside sampling is `ahead` (overlap.py).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import torch
from eepo_kernels import ForgetStats
from eepo_kernels.ranges import named

from eepo_fast.algorithm.ablations import find_ablation
from eepo_fast.algorithm.forget import Unlearning, compute_unlearning
from eepo_fast.algorithm.guards import Result, check_version, within_memory
from eepo_fast.algorithm.in_flight import nearest
from eepo_fast.algorithm.losses import Term
from eepo_fast.algorithm.overlap import Ahead, set_ref_logprobs, share_ref_logprobs
from eepo_fast.algorithm.step_size import add_step, with_length
from eepo_fast.config import Config
from eepo_fast.data.prompts import completion_text
from eepo_fast.distributed import World
from eepo_fast.policy.module import Policy
from eepo_fast.rewards import Grader
from eepo_fast.rollout.engine import OnProgress, RolloutEngine, SampleRequest, Sampling, continuation, make_requests
from eepo_fast.rollout.exchange import generate_everywhere, score_everywhere
from eepo_fast.types import Grade, Group, Prompt, Rollout, RolloutBatch, TrainerState, WeightsVersion

MOST = 0.9  # of a stage's completions: what comes after them is waiting for the last


@dataclass
class Setup:
    """What all iterations of a run share."""

    config: Config
    _: KW_ONLY
    policy: Policy
    reference: Policy | None
    engine: RolloutEngine
    grader: Grader
    prompts: Sequence[Prompt]
    tokenizer: object
    stop_token_ids: Sequence[int]
    state: TrainerState = field(default_factory=TrainerState)
    total: int | None = None
    """Iterations of the whole run, where it has an end."""
    on_phase: Callable[[str], None] = lambda phase: None
    """Is told the name of each phase when it begins."""
    at_safe_point: Callable[[], None] = lambda: None
    """Is called between phases while the policy is still untouched; may raise Interrupted, which leaves `state` and the
    policy as they were after the last iteration."""
    on_graded: Callable[[RolloutBatch], None] = lambda batch: None
    """Is shown what an iteration is about to train on, while the policy is still untouched; all ranks see the same. It
    may raise a UserError, shared."""

    @property
    def world(self) -> World:
        return self.policy.world


class Addition(Protocol):
    """What a method adds to the stages: completions of its own, sampled from θ, and a term of the loss. It is made anew
    for each iteration, whose state it is."""

    rollouts: list[Rollout]

    def sample(self, it: Iteration) -> None:
        """Samples `rollouts`, while the engine holds θ."""

    def choose(self, it: Iteration, rows: list[Rollout]) -> list[Rollout]:
        """Returns the rows of the policy's loss, once all completions are graded. rows: what they are without it."""

    def terms(self, update: int, num_updates: int) -> list[Term]:
        """Returns what it adds to the loss of one of the iteration's updates, which are counted from 0."""

    def metrics(self) -> dict[str, float]:
        """Returns what it has to say in metrics.jsonl."""


class Iteration:
    """The state of one iteration, made at its start and closed at its end."""

    def __init__(self, setup: Setup, groups: list[Group], additions: list[Addition], progress: OnProgress | None):
        self.setup, self.groups, self.additions, self.progress = setup, groups, additions, progress
        self.prompts = [group.prompt for group in groups if group.begun == setup.state.step]
        """Those of the groups that this iteration begins."""
        self.carried = [r for group in groups for r in group.rollouts if r.preempted]
        self.num_asked = len(self.carried) + len(self.prompts) * setup.config.rollout.group_size
        """How many completions it works on."""
        self.tokens_before = sum(r.num_tokens for group in groups for r in group.rollouts)
        """What those have said already."""
        self.config, self.policy, self.engine, self.world = setup.config, setup.policy, setup.engine, setup.world
        rollout, state = setup.config.rollout, setup.state
        self.sampling = Sampling(rollout.temperature, rollout.max_new_tokens, tuple(setup.stop_token_ids))
        step = setup.config.psn.step if setup.config.psn.enabled else setup.config.eepo
        self.eepo = with_length(step, state.forget_steps)
        """The step on the engine's weights, with this iteration's η as its learning_rate."""
        self.seed = (setup.config.run.seed, state.step)
        self.theta = WeightsVersion(state.policy_version, False)
        """The weights of the policy, as the iteration finds them."""
        self.entropy_window = state.entropy_window
        """Stage 1's mean entropies in the last iterations, in nats; with this one's once it is known."""
        self.ahead = Ahead(setup.config, setup.grader, self.decode, setup.reference, self.world)
        self.unlearning: Unlearning | None = None
        self.forget_stats: ForgetStats | None = None
        self.started = self.sampled_at = time.perf_counter()
        self.times: dict[str, float] = {}
        """Seconds by phase."""
        self.waiting_s = 0.0
        """Seconds of sampling in which `MOST` of a stage's completions had ended, and all were waited for."""
        self.out_of_memory = 0
        """How often micro-batches were halved."""

    def close(self) -> None:
        self.ahead.close()

    # -- around every phase

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self.setup.on_phase(name)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        with named(name):
            yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times[name] = self.times.get(name, 0.0) + time.perf_counter() - start

    def within_memory(self, policy: Policy, compute: Callable[[], Result]) -> Result:
        result, halvings = within_memory(policy, compute)
        self.out_of_memory += halvings
        return result

    def at_safe_point(self) -> None:
        self.setup.at_safe_point()

    def put_to_sleep(self, phase: str) -> None:
        """Lets the engine sleep, in a run where it does. phase: what waiting for that is counted as."""
        self.ahead.put_to_sleep(self.engine, self.phase(phase))

    # -- the phases that stages are made of

    def sync(self) -> None:
        with self.phase("sync"):
            self.engine.sync(self.policy.weights(), self.theta)

    def requests(self, stage: int, sample_indices: Sequence[int]) -> list[SampleRequest]:
        return make_requests(self.prompts, stage, sample_indices, *self.seed)

    def rest(self, rollouts: Sequence[Rollout], stage: int) -> list[SampleRequest]:
        return continuation(rollouts, stage, *self.seed)

    def is_of_theta(self, rollout: Rollout) -> bool:
        """Returns whether the policy's present weights alone have sampled it."""
        return all(segment.weights_version == self.theta for segment in rollout.segments)

    def generate(
        self,
        name: str,
        requests: Sequence[SampleRequest],
        *,
        forgotten: bool = False,
        quorum: float = 1.0,
        lengths: Mapping[str, float] | None = None,
        temperature: float | None = None,
        unlearns: bool = False,
    ) -> list[Rollout]:
        """Samples on all engines; returns the completions, in one order on every rank. forgotten: whether the engine's
        weights must be the forgetful ones. lengths: the expected tokens of an answer, by prompt; without them prompts
        are dealt out by their own length. unlearns: unlearning begins with each completion that has ended and is wholly
        of these weights, if it may."""
        sampling = self.sampling if temperature is None else replace(self.sampling, temperature=temperature)
        lengths = lengths or {}
        num_samples = sum(len(r.seeds) for r in requests)
        sizes = num_samples, len(self.prompts)
        streamed = self.ahead.stream(self.policy, self.eepo, *sizes) if unlearns else None
        # the longest first, and before them what has been long already: what begins late is waited for
        requests = sorted(requests, key=lambda r: (not r.before, -lengths.get(r.prompt.id, 0.0)))
        costs = [len(r.token_ids) + len(r.seeds) * lengths.get(r.prompt.id, 0.0) for r in requests]
        ends: dict[tuple, float] = {}  # once each, where sampling has begun again

        def finished(rollout: Rollout) -> None:
            ends[rollout.begun, rollout.prompt.id, rollout.sample_index] = time.perf_counter()
            if streamed is not None and self.is_of_theta(rollout):
                streamed.take(rollout)
            self.ahead.take(rollout)

        with self.phase(f"rollout_{name}"):
            rollouts = generate_everywhere(
                self.ahead.beside(self.engine, streamed),
                requests,
                sampling,
                expected_tokens=costs,
                world=self.world,
                ranks_per_engine=self.config.rollout.tensor_parallel,
                decode=self.decode,
                progress=self.progress,
                finished=finished,
                quorum=quorum,
            )
            self.sampled_at = time.perf_counter()
        if quorum == 1 and ends:
            most = sorted(ends.values())[math.ceil(MOST * len(ends)) - 1]
            self.waiting_s += self.sampled_at - most
            if streamed is not None and self.ahead.unlearning.pool is None:  # between the engine's steps
                self.waiting_s -= streamed.seconds_until(math.inf) - streamed.seconds_until(most)
        expected = self.theta._replace(forgotten=forgotten)
        check_version(rollouts, expected, requests)
        return rollouts

    def generate_last(self, stage: int, requests: Sequence[SampleRequest], **options: Any) -> list[Rollout]:
        """Samples an iteration's last stage as `generate` does. With `rollout.carry` it ends when its quorum has ended,
        with what has been carried as often as it may; and then goes on until as many groups are whole as are trained
        on."""
        rollout, size = self.config.rollout, self.config.train.prompts_per_iteration
        name, step = f"stage{stage}", self.seed[1]
        if not rollout.carry or len(self.groups) <= size:
            return self.generate(name, requests, **options)
        requests = [replace(r, must_end=bool(r.before) and step - r.begun >= rollout.carry) for r in requests]
        sampled = self.generate(name, requests, quorum=rollout.quorum, **options)
        while (found := nearest(self.groups, size, sampled))[0]:
            chosen, share = found
            cut = [r for r in sampled if r.preempted]
            more = zip(self.rest(cut, stage), cut, strict=True)
            requests = [replace(request, counts=r in chosen) for request, r in more]
            ended = [r for r in sampled if not r.preempted]
            sampled = [*ended, *self.generate(name, requests, quorum=share, **options)]
        return sampled

    def decode(self, rollout: Rollout) -> str:
        return completion_text(self.setup.tokenizer, rollout.token_ids, self.sampling.stop_token_ids)

    def sample_additions(self) -> None:
        for addition in self.additions:
            addition.sample(self)

    def unlearn(self, stage1: Sequence[Rollout]) -> Unlearning:
        """Finishes ∇L over stage 1, of which some may have been done while completions were sampled."""
        self.put_to_sleep("unlearn")
        streamed, ablation = self.ahead.streamed, find_ablation(self.eepo, self.seed)
        ended, hidden = self.sampled_at, self.ahead.unlearning.pool is not None
        if streamed is not None and not hidden:  # but done in between
            self.times["rollout_stage1"] -= streamed.seconds_until(ended)
            self.times["unlearn"] = streamed.seconds_until(ended)

        def compute() -> Unlearning:
            begun = streamed.hand_over() if streamed is not None else None
            config, window = self.eepo, self.entropy_window
            return compute_unlearning(self.policy, stage1, config, window, begun=begun, ablation=ablation)

        with self.phase("unlearn"):
            found = self.within_memory(self.policy, compute)
        if streamed is not None:
            self.out_of_memory += streamed.gave_up
            found.hidden_s = streamed.seconds_until(ended) if hidden else 0.0
        self.unlearning, self.entropy_window = found, found.entropy_window
        self.eepo = self.eepo.model_copy(update={"learning_rate": found.learning_rate})
        found.gradient = found.gradient if found.apply else None
        return found

    def forget(self, unlearning: Unlearning, rollouts: Sequence[Rollout]) -> None:
        """Takes the step. With `log.token_details` the engine says how it changes the rollouts' log-probs."""
        assert unlearning.gradient is not None
        before, (seed, step) = self._engine_logprobs(rollouts), self.seed
        with self.phase("forget"):
            gradient, config = unlearning.gradient, self.eepo
            self.forget_stats = self.policy.forget(self.engine, gradient, config, seed=seed, step=step)
            unlearning.gradient = gradient = None  # its memory is wanted
        after = self._engine_logprobs(rollouts)
        if before is not None and after is not None:
            for r, old, new in zip(rollouts, before, after, strict=True):
                r.forget_change = [b - a for a, b in zip(old, new, strict=True)]

    def _engine_logprobs(self, rollouts: Sequence[Rollout]) -> list[list[float]] | None:
        if not self.config.log.token_details:
            return None
        temperature, ranks = self.sampling.temperature, self.config.rollout.tensor_parallel
        with self.phase("token_details"):
            return score_everywhere(self.engine, rollouts, temperature, world=self.world, ranks_per_engine=ranks)

    def take_back(self, sampled: Sequence[Rollout]) -> None:
        """Undoes the forget step; what θ' has sampled does not count."""
        self.ahead.drop(sampled)
        self.sync()

    # -- what the next iteration goes by

    def remember(self, entropy: float) -> None:
        """Keeps it in the run's state. entropy: the policy's in the updates, in nats; NaN where there is none."""
        state, found = self.setup.state, self.unlearning
        state.entropy_window = self.entropy_window
        state.entropy = state.entropy if math.isnan(entropy) else entropy  # NaN: no reward was known
        if found is not None and self.eepo.step == "kl":
            kl = found.kl if found.resampled else found.kl_low_variance
            rate, too_far = self.eepo.learning_rate, found.too_long or found.resampled
            state.forget_steps = add_step(state.forget_steps, rate, kl, taken=found.apply, too_far=too_far)

    # -- grades and scores

    def grades(self, rollouts: Sequence[Rollout]) -> list[Grade]:
        with self.phase("reward"):
            return self.ahead.graded.grades(rollouts, self.world)

    def set_ref_logprobs(self, rollouts: Sequence[Rollout]) -> None:
        """Scores completions under the reference, if there is one; some may have been while others were sampled."""
        reference = self.setup.reference
        if reference is not None:
            with self.phase("ref_logprobs"):
                self.ahead.scoring.wait()
                if self.ahead.scored is not None:
                    share_ref_logprobs(rollouts, self.world)
                self.within_memory(reference, partial(set_ref_logprobs, reference, rollouts))

    def set_prox_logprobs(self, phase: str, rollouts: Sequence[Rollout]) -> None:
        """Scores completions under θ."""
        if not rollouts:
            return
        with self.phase(phase):
            scores = self.within_memory(self.policy, partial(self.policy.score, rollouts))
        for r, logprobs, entropy in zip(rollouts, *scores, strict=True):
            r.prox_logprobs, r.entropy = logprobs, entropy
