"""Parameter-space noise (PSN, arXiv 2602.02555): the whole group is sampled from θ' = θ + σ ε, ε normal, drawn anew in
each iteration. The noise is put on the engine's weights in place, as a forget step is, and gone with the next sync.

With `grpo.ratio: decoupled` a token weighs min(π_θ/π_θ', `grpo.ratio_cap`), as that paper corrects for the noise.

Deviations from the paper:
- `psn.target_kl`: σ follows the KL of what was sampled by a secant (step_size.py); the paper goes by a constant
  factor. By default it stays as it is.
- Noise that has gone further than `psn.max_kl` is taken back, and the group sampled from θ.
- The noise is rounded into the engine's weights stochastically, so that what is smaller than their spacing is not lost.
"""

import math

import torch

from eepo_fast.algorithm.ablations import draw_normal
from eepo_fast.algorithm.forget import Unlearning
from eepo_fast.algorithm.iteration import Iteration
from eepo_fast.algorithm.stages import went_too_far
from eepo_fast.policy.plain import PlainGradient
from eepo_fast.types import Rollout, UserError


class NoisyStage:
    """Samples the whole group from θ'."""

    def sample(self, it: Iteration) -> list[Rollout]:
        it.sync()  # θ' ← θ
        it.sample_additions()  # from θ
        it.at_safe_point()
        nan = math.nan
        it.unlearning = Unlearning(
            gradient=draw_noise(it), loss=nan, grad_norm=nan, active_fraction=nan, mean_entropy=nan, mean_length=nan,
            apply=True, entropy_window=it.entropy_window, learning_rate=it.eepo.learning_rate,
        )  # fmt: skip
        it.forget(it.unlearning, [])  # θ' ← θ' + σ ε, and the memory of ε is free again
        it.at_safe_point()
        requests = [*it.rest(it.carried, 1), *it.requests(1, range(it.config.rollout.group_size))]
        sampled = it.generate_last(1, requests, forgotten=True)
        if went_too_far(it, sampled, 1):
            it.take_back(sampled)  # θ' ← θ
            sampled = it.generate_last(1, requests)
        return sampled


def draw_noise(it: Iteration) -> PlainGradient:
    """Returns ε, by the seeds of run, iteration and weight: 0 for weights whose names lack `psn.weights`. UserError
    where that leaves none."""
    gradient = it.policy.gradient()
    assert isinstance(gradient, PlainGradient)  # other engines are refused
    chosen = [name for name in gradient.parameters if it.config.psn.weights in name]
    if not chosen:
        raise UserError(
            f"psn.weights: expected part of a weight's name, found {it.config.psn.weights!r}; the first weight is "
            f"{next(iter(gradient.parameters))}"
        )
    for name, parameter in gradient.parameters.items():
        gradient.tensors[name] = torch.zeros(parameter.shape, device=parameter.device)
        if name in chosen:
            draw_normal(gradient.tensors[name], "|".join(["noise", *map(str, it.seed), name]))
    return gradient
