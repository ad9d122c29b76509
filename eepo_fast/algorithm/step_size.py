"""The length of the forget step: `eepo.step: fixed` takes η as it is set; with `kl` it is changed from step to step, so
that KL(θ'‖θ) stays what `eepo.target_kl` says.

Deviations from the paper, whose η is fixed: `kl`. A fixed η is no strength: the gradient grows as the policy becomes
certain, and with short answers (1/T_k) the same η went from 0.005 to 0.8 nats a token within seven iterations.

KL grows as η^b, b = 2 for a short step; b is the slope of the last two steps in log-log (a secant), within SLOPES, for
between two iterations it is not η alone that changes. What is measured is the mean over what stage 2's guard scores
(guards.py) of exp(d) - d - 1, d = log π_θ - log π_θ', which varies less from sample to sample than `unlearn/kl`, the
mean of -d.
"""

import math
from collections.abc import Sequence

from eepo_fast.config import EepoConfig

Step = tuple[float, float | None]
"""(η, KL(θ'‖θ) in nats a token; None where it was too long to be taken)."""
SLOPES = (2.0, 4.0)  # less than 2 would answer noise with more of it
CHANGES = (1 / 8, 8.0)  # of η, from one step to the next
TOO_LONG = 0.5  # change after a step whose KL is not known, but that it was too long
TOO_CLOSE = 1.1  # two steps whose lengths differ by less say nothing of the slope


def with_length(config: EepoConfig, steps: Sequence[Step]) -> EepoConfig:
    """Returns the config with the η of the next step as its learning_rate. steps: the last ones, the latest last."""
    if config.step == "fixed" or not steps:
        return config
    rate = steps[-1][0] * min(max(_change(config.target_kl, steps), CHANGES[0]), CHANGES[1])
    return config.model_copy(update={"learning_rate": rate})


def _change(target: float, steps: Sequence[Step]) -> float:
    """Returns what to multiply η by, before it is bounded."""
    kl = steps[-1][1]
    if kl is None:
        return TOO_LONG
    return (target / kl) ** (1 / _slope(steps)) if kl > 0 else math.inf


def _slope(steps: Sequence[Step]) -> float:
    if len(steps) > 1:
        (before, kl_before), (rate, kl) = steps[-2:]
        apart = max(rate, before) > TOO_CLOSE * min(rate, before) > 0
        if kl is not None and kl_before is not None and kl > 0 < kl_before and apart:
            return min(max(math.log(kl / kl_before) / math.log(rate / before), SLOPES[0]), SLOPES[1])
    return 2.0


def add_step(steps: Sequence[Step], rate: float, kl: float, *, taken: bool, too_far: bool) -> list[Step]:
    """Returns the last two steps, this one included. kl: as measured, NaN where nothing was. too_far: it was longer
    than `max_step`, or is taken back. A step that was not taken for another reason says nothing of its length."""
    if too_far:
        return [*steps[-1:], (rate, kl if math.isfinite(kl) else None)]
    return [*steps[-1:], (rate, kl)] if taken and math.isfinite(kl) else list(steps)
