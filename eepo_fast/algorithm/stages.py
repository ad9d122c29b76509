"""How an iteration's completions are sampled: in one stage (GRPO), or in two with a forget step between them (EEPO,
Algorithm 1). θ is the policy, θ' what the engine holds.

Deviations from the paper:
- Where stage 2 shows that the step went further than `eepo.max_kl`, it is taken back, and stage 2 sampled from θ.
- With `rollout.quorum` below 1, stage 1 does not wait for its longest answers: ∇L is of those that have ended, and the
  others go on after the step, under θ'. With `rollout.carry` stage 2 does not either, and they go on in the next
  iteration, under its θ: ∇L is then of those that have ended and that θ alone has sampled, so that long answers are
  forgotten less (`length/unlearned` beside `length/stage1`).
- The length of the step may follow a KL: step_size.py.
- `eepo.temperature`: stage 2 may be sampled at another temperature than stage 1. Its log-probs are those at its own, so
  that what has sampled it counts as other weights, with its ratio and its importance weight; what `eepo.max_kl` is held
  against is of step and temperature together.

θ' is never put back by an inverse step: the next iteration's `sync` makes it θ again.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from eepo_fast.algorithm.guards import forget_kl
from eepo_fast.algorithm.iteration import Iteration
from eepo_fast.rollout.exchange import mean_lengths
from eepo_fast.types import Rollout


class Stages(Protocol):
    def sample(self, it: Iteration) -> list[Rollout]:
        """Samples `group_size` completions of each of the iteration's prompts, and goes on with what was carried; the
        same on every rank, in any order. While the engine holds θ it samples the iteration's additions."""


class OneStage:
    """GRPO: the whole group is sampled from the policy."""

    def sample(self, it: Iteration) -> list[Rollout]:
        it.sync()
        requests = [*it.rest(it.carried, 1), *it.requests(1, range(it.config.rollout.group_size))]
        rollouts = it.generate_last(1, requests)
        it.sample_additions()
        it.at_safe_point()
        return rollouts


class TwoStage:
    """EEPO: half of the group is sampled from θ, the other from θ', which has forgotten what the first half says."""

    def sample(self, it: Iteration) -> list[Rollout]:
        group_size, quorum = it.config.rollout.group_size, it.config.rollout.quorum
        half = group_size // 2
        it.sync()  # θ' ← θ
        requests = [*it.rest(it.carried, 1), *it.requests(1, range(half))]
        sampled = it.generate("stage1", requests, quorum=quorum, unlearns=True)
        ended, cut = [r for r in sampled if not r.preempted], [r for r in sampled if r.preempted]
        it.sample_additions()  # from θ: nothing is forgotten yet
        it.at_safe_point()
        stage1 = [r for r in ended if it.is_of_theta(r)]
        unlearning = it.unlearn(stage1)  # ∇L
        if unlearning.apply:
            it.forget(unlearning, stage1)  # θ' ← θ' + η∇L
        it.at_safe_point()
        requests = [*it.rest(cut, 2), *it.requests(2, range(half, group_size))]
        lengths, temperature = mean_lengths(stage1), it.config.eepo.temperature
        sampled = it.generate_last(2, requests, lengths=lengths, forgotten=unlearning.apply, temperature=temperature)
        if unlearning.apply and went_too_far(it, sampled, 2):
            it.take_back(sampled)  # θ' ← θ
            sampled = it.generate_last(2, requests, lengths=lengths, temperature=temperature)
        if temperature not in (None, it.sampling.temperature):
            count_as_others(sampled)
        return [*ended, *sampled]


def went_too_far(it: Iteration, sampled: Sequence[Rollout], stage: int) -> bool:
    """Returns whether the step went beyond its `max_kl`, and keeps what it found. sampled: after the step, in this
    stage, of whose own completions all tokens are of the engine's weights."""
    assert it.unlearning is not None
    own = [r for r in sampled if r.stage == stage and r.begun == it.seed[1]]
    found = it.unlearning
    with it.phase("kl_guard"):
        found.kl, found.kl_low_variance = it.within_memory(it.policy, lambda: forget_kl(it.policy, own))
    found.resampled = bool(own) and not found.kl <= it.eepo.max_kl
    return found.resampled


def count_as_others(rollouts: Sequence[Rollout]) -> None:
    """Marks what has been sampled in stage 2, by whatever weights, as not the policy's own: it was at another
    temperature, of which its log-probs are."""
    for r in rollouts:
        r.segments = [
            replace(s, weights_version=s.weights_version._replace(forgotten=True)) if stage == 2 else s
            for s, stage in zip(r.segments, r.segment_stages, strict=True)
        ]
