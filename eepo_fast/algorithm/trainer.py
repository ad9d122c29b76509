"""One iteration of EEPO (Algorithm 1), readable top to bottom in `Trainer.iteration`. With eepo.enabled=false: GRPO.

Deviations from the paper are listed where they are made: losses.py, forget.py, aepo.py. Here: the policy is updated on
mini-batches of `train.prompts_per_update` prompts in sampling order.

Every rank runs this with the same prompts and holds the whole batch; sampling, grading and the model's passes are
shared out inside the calls. One process is a world of one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from eepo_kernels.ranges import named

from eepo_fast.algorithm import aepo, details
from eepo_fast.algorithm import metrics as M
from eepo_fast.algorithm.advantages import set_advantages
from eepo_fast.algorithm.forget import Unlearning, compute_unlearning
from eepo_fast.algorithm.guards import (
    check_updates,
    check_version,
    forgotten_kl,
    has_finite_logprobs,
    loud,
    within_memory,
)
from eepo_fast.algorithm.losses import GrpoTokens, grpo_loss, sum_of
from eepo_fast.algorithm.overlap import Ahead, StreamedUnlearning
from eepo_fast.config import Config
from eepo_fast.data.problems import prompt_indices
from eepo_fast.policy.module import Policy
from eepo_fast.rewards import Grader
from eepo_fast.rollout.engine import Progress, Request, RolloutEngine, Sampling, continuation, make_requests
from eepo_fast.rollout.exchange import generate_everywhere, mean_lengths
from eepo_fast.types import Prompt, Rollout, RolloutBatch, WeightsVersion


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
    """Of the policy in its last update, for AEPO; 0 before the first."""
    bad_updates: int = 0
    """Updates dropped in a row, for their gradient was not finite."""


class Trainer:
    def __init__(
        self,
        config: Config,
        *,
        policy: Policy,
        reference: Policy | None,
        engine: RolloutEngine,
        grader: Grader,
        prompts: Sequence[Prompt],
        tokenizer,
        stop_token_ids: Sequence[int],
        state: TrainerState | None = None,
        entering: Callable[[str], None] = lambda phase: None,
        between: Callable[[], None] = lambda: None,
    ):
        """entering: told the name of each phase. between: called between phases while the policy is still untouched;
        may raise Interrupted, which leaves `state` and the policy as they were after the last iteration."""
        self.entering, self.between = entering, between
        self.config = config
        self.policy, self.reference, self.engine, self.grader = policy, reference, engine, grader
        self.world = policy.world
        self.prompts, self.tokenizer = prompts, tokenizer
        self.sampling = Sampling(config.rollout.temperature, config.rollout.max_new_tokens, tuple(stop_token_ids))
        self.state = state or TrainerState()
        self.times: dict[str, float] = {}

    def iteration(self, progress: Progress | None = None) -> tuple[RolloutBatch, dict[str, float]]:
        """One iteration: its rollouts and its metrics. `state.step` counts it only when all of it is done."""
        self.ahead = Ahead(self.config, self.grader, self._decode, self.reference, self.world)
        try:
            return self._iteration(progress)
        finally:
            self.ahead.close()

    def _iteration(self, progress: Progress | None) -> tuple[RolloutBatch, dict[str, float]]:
        started, self.times = time.perf_counter(), {}
        eepo, group_size = self.config.eepo, self.config.rollout.group_size
        prompts = self._next_prompts()
        version, window = self.state.policy_version, list(self.state.entropy_window)
        self.out_of_memory = 0

        with self._timed("sync"):
            self.engine.sync(self.policy.weights(), WeightsVersion(version, False))  # θ' ← θ
        first_half = range(group_size // 2 if eepo.enabled else group_size)
        streamed = self._stream(len(first_half) * len(prompts), len(prompts)) if eepo.enabled else None
        requests = make_requests(prompts, 1, first_half, *self._seed())
        quorum = eepo.quorum if eepo.enabled else 1.0
        sampled = self._generate(requests, "stage1", progress, quorum=quorum, streamed=streamed)
        rollouts, stragglers = [r for r in sampled if not r.preempted], [r for r in sampled if r.preempted]
        # from θ: nothing is forgotten yet
        extra = self._extra_samples(prompts, progress) if self.config.aepo.enabled else None
        self.between()
        unlearning, forgotten = None, None
        if eepo.enabled:
            self.ahead.put_to_sleep(self.engine, self._timed("unlearn"))
            unlearning, window = self._unlearn(rollouts, window, streamed)
            if unlearning.apply:
                before = self._engine_logprobs(rollouts)
                with self._timed("forget"):
                    forgotten = self.policy.forget(  # θ' ← θ' + η∇L
                        self.engine, unlearning.gradient, eepo, seed=self.config.run.seed, step=self.state.step
                    )
                after = self._engine_logprobs(rollouts)
                unlearning.change = details.change(before, after)
            unlearning.gradient = None
            self.between()
            rest = continuation(stragglers, self.sampling.max_new_tokens, *self._seed())
            requests = [*rest, *make_requests(prompts, 2, range(len(first_half), group_size), *self._seed())]
            lengths = mean_lengths(rollouts)
            sampled = self._generate(requests, "stage2", progress, lengths=lengths, forgotten=unlearning.apply)
            if unlearning.apply and self._went_too_far(unlearning, sampled[len(rest) :]):
                self.ahead.drop(sampled)
                with self._timed("sync"):
                    self.engine.sync(self.policy.weights(), WeightsVersion(version, False))
                sampled = self._generate(requests, "stage2", progress, lengths=lengths)
            for first, last in zip(stragglers, sampled[: len(rest)], strict=True):
                rollouts.append(first.continued(last))
                rollouts[-1].completion = self._decode(rollouts[-1])
            rollouts += sampled[len(rest) :]
        batch = RolloutBatch.of(rollouts, prompts, group_size, extra.rollouts if extra else [])
        self.ahead.put_to_sleep(self.engine, self._timed("ref_logprobs"))

        self._grade([*batch.rollouts, *batch.extra])
        set_advantages(batch)
        rows = self._rows(batch, extra)
        old_logprobs = self._old_logprobs(rows, unlearning)
        ref_logprobs = self._ref_logprobs(rows)
        if self.config.log.token_details:
            self._add_details(batch, unlearning)
        self.between()
        with self._timed("update"):
            update = self._update(rows, old_logprobs, ref_logprobs, extra)

        self.state.step += 1
        self.state.entropy_window = window
        entropy = update.mean("entropy/policy")
        self.state.entropy = self.state.entropy if math.isnan(entropy) else entropy  # NaN: no reward was known
        self.times["iteration"] = time.perf_counter() - started
        metrics = M.iteration_metrics(
            batch,
            step=self.state.step,
            policy_version=version,
            unlearning=unlearning,
            forgotten=forgotten,
            update=update,
            eta=eepo.learning_rate,
            times=self.times,
            out_of_memory=self.out_of_memory,
        )
        return batch, {**metrics, **self.ahead.metrics(), **aepo.aepo_metrics(extra)}

    def _next_prompts(self) -> list[Prompt]:
        train = self.config.train
        indices = prompt_indices(self.state.step, len(self.prompts), train.prompts_per_iteration, self.config.run.seed)
        return [self.prompts[i] for i in indices]

    def _generate(
        self,
        requests: Sequence[Request],
        name: str,
        progress: Progress | None = None,
        *,
        lengths: Mapping[str, float] | None = None,
        temperature: float | None = None,
        forgotten: bool = False,
        streamed: StreamedUnlearning | None = None,
        quorum: float = 1.0,
    ) -> list[Rollout]:
        """lengths: expected, of an answer, by prompt; without them prompts are dealt out by their own length.
        forgotten: whether the engine's weights must be the forgetful ones."""
        sampling = self.sampling if temperature is None else replace(self.sampling, temperature=temperature)
        lengths = lengths or {}
        costs = [len(r.prompt.token_ids) + len(r.seeds) * lengths.get(r.prompt.id, 0.0) for r in requests]

        def finished(rollout: Rollout) -> None:
            if streamed is not None:
                streamed.take(rollout)
            if name != "stage2" or rollout.stage == 2:  # the rest of a straggler is not a completion
                self.ahead.take(rollout)

        with self._timed(f"rollout_{name}"):
            rollouts = generate_everywhere(
                self.ahead.beside(self.engine, streamed),
                requests,
                sampling,
                expected_tokens=costs,
                world=self.world,
                ranks_per_engine=self.config.rollout.tensor_parallel,
                decode=self._decode,
                progress=progress,
                finished=finished,
                quorum=quorum,
            )
            self.sampled_at = time.perf_counter()
        expected = WeightsVersion(self.state.policy_version, forgotten)
        check_version(rollouts, expected, [r.stage for r in requests for _ in r.seeds])
        return rollouts

    def _stream(self, num_completions: int, num_prompts: int) -> StreamedUnlearning | None:
        """Unlearning that begins while stage 1 is sampled."""
        if self.policy.stream_tokens is None:  # it has to wait
            return None
        return StreamedUnlearning(self.policy, self.config.eepo, num_completions, num_prompts, self.ahead.unlearning)

    def _unlearn(
        self, stage1: Sequence[Rollout], window: list[float], streamed: StreamedUnlearning | None
    ) -> tuple[Unlearning, list[float]]:
        """What the unlearning pass found, and the entropy window with this iteration in it."""
        ended, hidden = self.sampled_at, self.ahead.unlearning.pool is not None
        if streamed is not None and not hidden:  # but done in between
            self.times["rollout_stage1"] -= streamed.seconds_until(ended)
            self.times["unlearn"] = streamed.seconds_until(ended)

        def compute() -> tuple[Unlearning, list[float]]:
            entropies = list(window)
            seed = "|".join(map(str, self._seed()))
            return compute_unlearning(self.policy, stage1, self.config.eepo, entropies, seed, streamed), entropies

        with self._timed("unlearn"):
            found = self._within_memory(self.policy, compute)
        if streamed is not None:
            self.out_of_memory += streamed.gave_up
            found[0].hidden_s = streamed.seconds_until(ended) if hidden else 0.0
        return found

    def _went_too_far(self, unlearning: Unlearning, stage2: Sequence[Rollout]) -> bool:
        with self._timed("kl_guard"):
            unlearning.kl = self._within_memory(self.policy, lambda: forgotten_kl(self.policy, stage2))
        unlearning.resampled = not unlearning.kl <= self.config.eepo.max_kl
        return unlearning.resampled

    def _within_memory(self, policy: Policy, compute: Callable[[], Any]) -> Any:
        result, halvings = within_memory(policy, compute)
        self.out_of_memory += halvings
        return result

    def _seed(self) -> tuple[int, int]:
        return self.config.run.seed, self.state.step

    def _extra_samples(self, prompts: Sequence[Prompt], progress: Progress | None) -> aepo.ExtraSamples:
        config, entropy = self.config.aepo, self.state.entropy
        temperature = aepo.choose_temperature(config, entropy)
        requests = aepo.extra_requests(config, prompts, self.config.rollout.group_size, *self._seed())
        return aepo.ExtraSamples(
            temperature, entropy, self._generate(requests, "aepo", progress, temperature=temperature)
        )

    def _rows(self, batch: RolloutBatch, extra: aepo.ExtraSamples | None) -> list[Rollout]:
        """What GRPO's loss is over: the batch, where `aepo.mode: replace` has not put its samples in its first rows."""
        config = self.config.aepo
        if extra is None:
            return batch.rollouts
        aepo.choose_samples(config, extra, batch.group_size, len(batch.rollouts))
        rows = batch.rollouts if config.mode == "term" else [*extra.used, *batch.rollouts[len(extra.used) :]]
        if extra.used:
            scale, over = (config.coef, extra.rollouts) if config.mode == "term" else (1.0, rows)
            tokens = sum(r.num_tokens for r in over if r.reward is not None)
            with self._timed("aepo_norm"):
                weights = {id(r): scale / tokens for r in extra.used}
                measure = partial(aepo.measure, self.policy, extra.used, weights)
                extra.grad_norm = self._within_memory(self.policy, measure)
        return rows

    def _decode(self, rollout: Rollout) -> str:
        ids = rollout.token_ids
        ids = ids[:-1] if ids and ids[-1] in self.sampling.stop_token_ids else ids
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def _grade(self, rollouts: Sequence[Rollout]) -> None:
        with self._timed("reward"):
            grades = self.ahead.graded.grades(rollouts, self.world)
        for rollout, grade in zip(rollouts, grades, strict=True):
            rollout.status = grade.status
            known = grade.status not in ("timeout", "error") and math.isfinite(grade.reward)
            known = known and has_finite_logprobs(rollout)
            rollout.reward = grade.reward if known else None

    def _old_logprobs(self, rows: Sequence[Rollout], unlearning: Unlearning | None) -> dict[int, list[float]]:
        """Denominators of Eq. 3's ratio, by id() of the rollout.

        Tokens that θ' sampled: what the engine reported. Tokens that θ sampled: recomputed at θ: by the unlearning pass
        already; else by the update's own forward where that is the first, and by a scoring pass where it is not.
        """
        forgotten = [r for r in rows if r.weights_version.forgotten and has_finite_logprobs(r)]
        old = {id(r): r.rollout_logprobs for r in forgotten if not r.num_before}
        if unlearning is not None:
            old.update(unlearning.logprobs)
        first_update = self.config.train.prompts_per_update * self.config.rollout.group_size
        missing = list({id(r): r for r in rows[first_update:] if id(r) not in old}.values())
        if missing:
            with self._timed("old_logprobs"):
                old.update(self._within_memory(self.policy, lambda: self.policy.score(missing)[0]))
        for r in forgotten:  # each token by whose weights sampled it; inf: as the update's own forward finds
            if r.num_before:
                before = old.get(id(r), [math.inf] * r.num_before)[: r.num_before]
                old[id(r)] = before + r.rollout_logprobs[r.num_before :]
        return old

    def _ref_logprobs(self, rows: Sequence[Rollout]) -> dict[int, list[float]]:
        if self.reference is None:
            return {}
        ahead = self.ahead.scored
        score = ahead.score if ahead else lambda rollouts: self.reference.score(rollouts)[0]
        with self._timed("ref_logprobs"):
            return self._within_memory(self.reference, lambda: score(rows))

    def _engine_logprobs(self, rollouts: Sequence[Rollout]) -> dict[int, list[float]]:
        """Nothing without token_details."""
        if not self.config.log.token_details:
            return {}
        shared = dict(world=self.world, ranks_per_engine=self.config.rollout.tensor_parallel)
        with self._timed("token_details"):
            return details.engine_logprobs(self.engine, rollouts, self.sampling.temperature, **shared)

    def _add_details(self, batch: RolloutBatch, unlearning: Unlearning | None) -> None:
        with self._timed("token_details"):
            rest = details.unseen(batch.rollouts, unlearning)
            scored = self._within_memory(self.policy, lambda: self.policy.score(rest))
        details.add_details(batch.rollouts, unlearning, scored)

    def _update(self, rows: Sequence[Rollout], old: dict, ref: dict, extra: aepo.ExtraSamples | None) -> M.UpdateStats:
        """Policy updates over mini-batches; loss sums are over a mini-batch's tokens, whatever the micro-batches."""
        stats, config = M.UpdateStats(), self.config
        size = config.train.prompts_per_update * config.rollout.group_size
        starts = range(0, len(rows), size)
        shares = [([], 0)] * len(starts)
        if extra is not None and config.aepo.mode == "term":
            shares = aepo.term_shares(extra, len(starts))
        for start, (samples, num_tokens) in zip(starts, shares, strict=True):
            mini_batch = rows[start : start + size]
            term = {id(r): config.aepo.coef / num_tokens for r in samples}
            accumulate = partial(self._accumulate, mini_batch, samples, old, ref, term, first=start == 0)
            stats.add(self._within_memory(self.policy, accumulate))
            norm, applied = self.policy.step()
            stats.grad_norms.append(norm)
            self.state.bad_updates = 0 if applied else self.state.bad_updates + 1
            check_updates(self.state.bad_updates, self.state.step, norm)
            stats.skipped += not applied
            self.state.policy_version += applied
        stats.add_other_ranks(self.world)
        return stats

    def _accumulate(
        self,
        mini_batch: Sequence[Rollout],
        samples: Sequence[Rollout],
        old: dict,
        ref: dict,
        term: dict,
        *,
        first: bool,
    ) -> M.UpdateStats:
        """Add the gradient of a mini-batch, and of AEPO's samples by their weights in `term`."""
        stats = M.UpdateStats()
        counted = sum(r.num_tokens for r in mini_batch if r.reward is not None)
        weights = {id(r): 1 / max(1, counted) for r in mini_batch if r.reward is not None}
        for micro in self.policy.micro_batches([*mini_batch, *samples]):
            tokens = GrpoTokens.of(micro, weights, old, ref)
            loss_fn = grpo_loss(self.config.grpo, tokens)
            if term:
                loss_fn = sum_of(loss_fn, aepo.term_loss(micro, term))
            loss, token_stats = self.policy.backward(micro, loud(loss_fn))
            stats.add_micro_batch(self.config, micro, tokens, token_stats, loss, first)
        return stats

    @contextmanager
    def _timed(self, name: str):
        self.entering(name)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        with named(name):
            yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times[name] = self.times.get(name, 0.0) + time.perf_counter() - start
