"""AEPO: entropy held at a target by REINFORCE on right answers that the policy gave at another temperature.

`mode: term` (default), as the formula: ∇J = ∇J_GRPO + coef · E_{o ~ π_θ^T}[R · ∇log π_θ(o | q)], T = temperature_high
where the policy's entropy is below the target, else temperature_low. log π_θ is at temperature 1.

`mode: replace`, as the authors' released code: extra groups for the first quarter of the prompts at T; samples whose
advantage in their own group is above 0.05 get the advantage 1; num_samples of them, or all where they are fewer, take
the place of the first rows of the ordinary batch, with old log-probs at temperature 1; above the target, half as many.

Deviations from the paper:
- The term is a mean over the tokens of all extra samples, right or not, as GRPO's is over its batch's, so that `coef`
  weighs one token mean against another; with several updates an iteration each gets its share of the samples.
- The entropy compared is the mean entropy of the policy over the tokens that the last iteration's update was on (with
  EEPO also those of stage 2, in replace mode the replacing ones too), and 0 before the first, as released.
- Only right samples are in the term: with a `reward.function` that gives negative rewards, those samples are left out,
  where the formula's expectation is over all.
- Without a right sample there is no term (the released code stops there).

The samples come from θ: they are drawn before anything is forgotten.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from eepo_fast.algorithm.advantages import set_advantages
from eepo_fast.algorithm.losses import reinforce_loss
from eepo_fast.config import AepoConfig
from eepo_fast.config.schema import SHARE_OF_PROMPTS
from eepo_fast.policy.micro_batches import MicroBatch
from eepo_fast.policy.module import Policy
from eepo_fast.rollout.engine import Request, make_requests
from eepo_fast.types import Prompt, Rollout, RolloutBatch

AEPO_STAGE = 3  # of the extra samples: their seeds, and how the rollout log tells them apart
SMALLEST_ADVANTAGE = 0.05


@dataclass
class ExtraSamples:
    """The extra samples of an iteration and what they were for."""

    temperature: float
    entropy: float
    """The policy's, that the target was compared with."""
    rollouts: list[Rollout]
    used: list[Rollout] = field(default_factory=list)
    """Those that give a gradient."""
    num_positive: int = 0
    """Right ones (term), or with a large enough advantage (replace)."""
    grad_norm: float = 0.0
    """‖∇‖ of what they add to the loss, at θ; 0 without a term."""


def choose_temperature(config: AepoConfig, entropy: float) -> float:
    return config.temperature_high if entropy < config.target_entropy else config.temperature_low


def extra_requests(
    config: AepoConfig, prompts: Sequence[Prompt], group_size: int, run_seed: int, step: int
) -> list[Request]:
    """term: num_samples, as even over the prompts as they go. replace: a group for each of the first quarter."""
    if config.mode == "replace":
        chosen = prompts[: max(1, len(prompts) // SHARE_OF_PROMPTS)]
        return make_requests(chosen, AEPO_STAGE, range(group_size), run_seed, step)
    each, more = divmod(config.num_samples, len(prompts))
    counts = [each + (i < more) for i in range(len(prompts))]
    return [
        request
        for prompt, count in zip(prompts, counts, strict=True)
        if count
        for request in make_requests([prompt], AEPO_STAGE, range(count), run_seed, step)
    ]


def choose_samples(config: AepoConfig, extra: ExtraSamples, group_size: int, batch_size: int) -> None:
    """Once they are graded: which of them are used, and with which advantage. batch_size: of the ordinary batch."""
    if config.mode == "term":
        extra.used = [r for r in extra.rollouts if r.reward is not None and r.reward > 0]
        extra.num_positive = len(extra.used)
        for r in extra.used:
            r.advantage = r.reward
        return
    set_advantages(RolloutBatch(extra.rollouts, group_size))
    positive = [r for r in extra.rollouts if r.advantage > SMALLEST_ADVANTAGE]
    extra.num_positive = len(positive)
    count = min(config.num_samples, batch_size, len(positive))
    extra.used = positive[: count if extra.entropy <= config.target_entropy else count // 2]
    for r in extra.used:
        r.advantage = 1.0


def term_shares(extra: ExtraSamples, num_updates: int) -> list[tuple[list[Rollout], int]]:
    """Of each update: its right samples, and the tokens of all its samples, right or not, that their mean is over."""
    used = {id(r) for r in extra.used}
    shares = []
    for u in range(num_updates):
        known = [r for r in extra.rollouts[u::num_updates] if r.reward is not None]
        shares.append(([r for r in known if id(r) in used], sum(r.num_tokens for r in known)))
    return shares


def term_loss(micro: MicroBatch, weights: dict[int, float]):
    """-coef · mean of R log π over a micro-batch's tokens; weights: coef / tokens, by id() of the extra samples."""
    return reinforce_loss(
        micro.per_token([r.advantage for r in micro.rollouts]),
        micro.per_token([weights.get(id(r), 0.0) for r in micro.rollouts]),
    )


def measure(policy: Policy, rollouts: Sequence[Rollout], weights: dict[int, float]) -> float:
    """‖∇‖ of `term_loss` over these rollouts at the policy's weights, which are left alone."""
    gradient = policy.gradient()
    for micro in policy.micro_batches(rollouts):
        gradient.add(policy.loss(micro, term_loss(micro, weights))[0])
    return gradient.norm()


def aepo_metrics(extra: ExtraSamples | None) -> dict[str, float]:
    if extra is None:
        return {}
    rewards = [r.reward for r in extra.rollouts if r.reward is not None]
    return {
        "aepo/temperature": extra.temperature,
        "aepo/entropy": extra.entropy,
        "aepo/num_samples": len(extra.rollouts),
        "aepo/num_positive": extra.num_positive,
        "aepo/num_used": len(extra.used),
        "aepo/reward": sum(rewards) / len(rewards) if rewards else math.nan,
        "aepo/grad_norm": extra.grad_norm,
        "tokens/aepo": sum(r.num_tokens for r in extra.rollouts),
    }
