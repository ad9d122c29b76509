"""A control for the forget step: `eepo.direction: temperature` forgets nothing, but samples stage 2 from θ at a higher
temperature. With `eepo.step: kl` it goes as far from θ as a forget step does, in no direction of its own.

`eepo.learning_rate` is how much hotter: T = rollout.temperature · (1 + η). What is sampled at T has its log-probs at T
and counts as sampled by θ', with its ratio, its importance weight and its guard.
"""

import math

from eepo_fast.algorithm.forget import Unlearning
from eepo_fast.algorithm.iteration import Iteration
from eepo_fast.algorithm.stages import count_as_others, went_too_far
from eepo_fast.rollout.exchange import mean_lengths
from eepo_fast.types import Rollout


class HotterStage:
    """The second half of the group is sampled from θ as the first is, but hotter."""

    def sample(self, it: Iteration) -> list[Rollout]:
        half, group_size = it.config.rollout.group_size // 2, it.config.rollout.group_size
        it.sync()
        stage1 = it.generate("stage1", it.requests(1, range(half)))
        it.sample_additions()
        it.at_safe_point()
        nan = math.nan  # nothing is computed of them
        it.unlearning = Unlearning(
            gradient=None, loss=nan, grad_norm=nan, active_fraction=nan, mean_entropy=nan, mean_length=nan, apply=True
        )
        requests, lengths = it.requests(2, range(half, group_size)), mean_lengths(stage1)
        temperature = it.sampling.temperature * (1 + it.eepo.learning_rate)
        stage2 = it.generate("stage2", requests, lengths=lengths, temperature=temperature)
        if went_too_far(it, stage2, 2):
            it.take_back(stage2)
            return [*stage1, *it.generate("stage2", requests, lengths=lengths)]
        count_as_others(stage2)
        return [*stage1, *stage2]
