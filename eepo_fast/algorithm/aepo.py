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

import math
from collections.abc import Sequence
from functools import partial

from eepo_kernels.reference import LossFn
from torch import Tensor

from eepo_fast.algorithm.advantages import group_advantages
from eepo_fast.algorithm.iteration import Iteration
from eepo_fast.algorithm.losses import Term, num_known_tokens, reinforce_loss
from eepo_fast.config import AepoConfig
from eepo_fast.config.methods import SHARE_OF_PROMPTS
from eepo_fast.policy.micro_batches import MicroBatch
from eepo_fast.policy.module import Policy
from eepo_fast.rollout.engine import SampleRequest, make_requests
from eepo_fast.types import AEPO_STAGE, Prompt, Rollout, RolloutBatch

SMALLEST_ADVANTAGE = 0.05


class Aepo:
    """An `Addition`: the extra samples of an iteration, and what became of them."""

    def __init__(self, config: AepoConfig, entropy: float):
        """entropy: the policy's in its last update, in nats, which the target is compared with."""
        self.config, self.entropy = config, entropy
        self.temperature = config.temperature_high if entropy < config.target_entropy else config.temperature_low
        self.rollouts: list[Rollout] = []
        self.used: list[Rollout] = []
        """Those that give a gradient."""
        self.num_positive = 0
        """How many are right (term), or have a large enough advantage (replace)."""
        self.grad_norm = 0.0
        """The norm of the gradient of what they add to the loss, at θ; 0 without a term."""

    def sample(self, it: Iteration) -> None:
        requests = extra_requests(self.config, it.prompts, it.config.rollout.group_size, *it.seed)
        self.rollouts = it.generate("aepo", requests, temperature=self.temperature)

    def choose(self, it: Iteration, rows: list[Rollout]) -> list[Rollout]:
        """Chooses which samples are used, and with which advantage; in replace mode they take the first rows' place."""
        self.choose_samples(it.config.rollout.group_size, len(rows))
        rows = rows if self.config.mode == "term" else [*self.used, *rows[len(self.used) :]]
        if self.used:
            scale, over = (self.config.coef, self.rollouts) if self.config.mode == "term" else (1.0, rows)
            term = _term(self.used, scale / num_known_tokens(over))
            with it.phase("aepo_norm"):
                self.grad_norm = it.within_memory(it.policy, partial(measure, it.policy, term))
        return rows

    def choose_samples(self, group_size: int, batch_size: int) -> None:
        """Takes the ordinary batch's number of completions as batch_size."""
        if self.config.mode == "term":
            self.used = [r for r in self.rollouts if r.reward is not None and r.reward > 0]
            self.num_positive = len(self.used)
            for r in self.used:
                r.advantage = r.reward or 0.0
            return
        for rollouts in RolloutBatch(self.rollouts, group_size).groups():
            for r, advantage in zip(rollouts, group_advantages([r.reward for r in rollouts]), strict=True):
                r.advantage = advantage
        positive = [r for r in self.rollouts if r.advantage > SMALLEST_ADVANTAGE]
        self.num_positive = len(positive)
        count = min(self.config.num_samples, batch_size, len(positive))
        self.used = positive[: count if self.entropy <= self.config.target_entropy else count // 2]
        for r in self.used:
            r.advantage = 1.0

    def terms(self, update: int, num_updates: int) -> list[Term]:
        """Returns the term of one update over its share of the samples, whose mean is over right ones and others."""
        share = self.rollouts[update::num_updates] if self.config.mode == "term" else []
        used = set(self.used)
        right = [r for r in share if r in used]
        return [_term(right, self.config.coef / num_known_tokens(share))] if right else []

    def metrics(self) -> dict[str, float]:
        rewards = [r.reward for r in self.rollouts if r.reward is not None]
        return {
            "aepo/temperature": self.temperature,
            "aepo/entropy": self.entropy,
            "aepo/num_samples": len(self.rollouts),
            "aepo/num_positive": self.num_positive,
            "aepo/num_used": len(self.used),
            "aepo/reward": sum(rewards) / len(rewards) if rewards else math.nan,
            "aepo/grad_norm": self.grad_norm,
            "tokens/aepo": sum(r.num_tokens for r in self.rollouts),
        }


def extra_requests(
    config: AepoConfig, prompts: Sequence[Prompt], group_size: int, run_seed: int, step: int
) -> list[SampleRequest]:
    """Returns, in term mode, requests for num_samples, as even over the prompts as they go; in replace mode for a group
    of each of the first quarter."""
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


def _term(samples: Sequence[Rollout], weight: float) -> Term:
    """Returns -Σ weight · R log π over the samples' tokens; weight: coef / tokens."""
    return Term(samples, weight, _sample_loss)


def _sample_loss(micro: MicroBatch, weights: Tensor) -> LossFn:
    return reinforce_loss(micro.per_token([r.advantage for r in micro.rollouts]), weights)


def measure(policy: Policy, term: Term) -> float:
    """Returns ‖∇‖ of a term at the policy's weights, which are left alone."""
    gradient = policy.gradient()
    for micro in policy.micro_batches(term.rollouts):
        gradient.add(policy.loss(micro, term.of(micro))[0])
    return gradient.norm()
