"""How an iteration's completions are sampled: in one stage (GRPO), or in two with a forget step between them (EEPO,
Algorithm 1). θ is the policy, θ' what the engine holds.

Deviations from the paper:
- Where stage 2 shows that the step went further than `eepo.max_kl`, it is taken back, and stage 2 sampled from θ.
- With `eepo.quorum` below 1, stage 1 does not wait for its longest answers: ∇L is of those that have ended, and the
  others go on after the step, under θ'.
- The length of the step may follow a KL: step_size.py.

θ' is never put back by an inverse step: the next iteration's `sync` makes it θ again.
"""

from collections.abc import Sequence
from typing import Protocol

from eepo_fast.algorithm.guards import forget_kl
from eepo_fast.algorithm.iteration import Iteration
from eepo_fast.rollout.engine import continuation
from eepo_fast.rollout.exchange import mean_lengths
from eepo_fast.types import Rollout


class Stages(Protocol):
    def sample(self, it: Iteration) -> list[Rollout]:
        """Samples `group_size` completions of each prompt, the same on every rank, in any order. While the engine holds
        θ it samples the iteration's additions."""


class OneStage:
    """GRPO: the whole group is sampled from the policy."""

    def sample(self, it: Iteration) -> list[Rollout]:
        it.sync()
        rollouts = it.generate("stage1", it.requests(1, range(it.config.rollout.group_size)))
        it.sample_additions()
        it.at_safe_point()
        return rollouts


class TwoStage:
    """EEPO: half of the group is sampled from θ, the other from θ', which has forgotten what the first half says."""

    def sample(self, it: Iteration) -> list[Rollout]:
        config, group_size = it.config.eepo, it.config.rollout.group_size
        half = group_size // 2
        it.sync()  # θ' ← θ
        sampled = it.generate("stage1", it.requests(1, range(half)), quorum=config.quorum, unlearns=True)
        stage1, stragglers = [r for r in sampled if not r.preempted], [r for r in sampled if r.preempted]
        it.sample_additions()  # from θ: nothing is forgotten yet
        it.at_safe_point()
        unlearning = it.unlearn(stage1)  # ∇L
        if unlearning.apply:
            it.forget(unlearning, stage1)  # θ' ← θ' + η∇L
        it.at_safe_point()
        rest = continuation(stragglers, 2, *it.seed)
        requests = [*rest, *it.requests(2, range(half, group_size))]
        lengths = mean_lengths(stage1)
        sampled = it.generate("stage2", requests, lengths=lengths, forgotten=unlearning.apply)
        if unlearning.apply and self.went_too_far(it, sampled[len(rest) :]):
            it.take_back(sampled)  # θ' ← θ
            sampled = it.generate("stage2", requests, lengths=lengths)
        return [*stage1, *sampled]

    def went_too_far(self, it: Iteration, stage2: Sequence[Rollout]) -> bool:
        assert it.unlearning is not None
        with it.phase("kl_guard"):
            it.unlearning.kl = it.within_memory(it.policy, lambda: forget_kl(it.policy, stage2))
        it.unlearning.resampled = not it.unlearning.kl <= it.config.eepo.max_kl
        return it.unlearning.resampled
