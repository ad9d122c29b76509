"""The probability ratio of Eq. 3 in its three forms (`grpo.ratio`), its clip, and the importance weight beside it.

With μ what sampled a token (θ' in stage 2, an older θ or θ' where a completion was carried over, else θ) and π_prox
the policy at the start of the update, a token's loss is

- sampler: the clip of π_θ/μ around 1, the paper's sentence. What θ' moved by more than the clip range has no gradient
  in the first update already, and more so where the answer was wrong: stage 2's gradient is biased by that.
- decoupled: min(π_prox/μ, ratio_cap) times the clip of π_θ/π_prox around 1. The importance weight and the trust region
  are apart (decoupled PPO). A token's weight corrects the choice of that token, up to the cap, and nothing else: what
  came before it and what follows, and so the reward, are still what θ' makes of it. (Without bias would be the product
  of all weights of an answer, and useless: its variance grows with every token.)
- policy: the clip of π_θ/π_prox around 1, as if θ had sampled the token: biased by all that θ' differs from θ.

Where θ sampled a token they are the same. What an engine said of a token is never replaced by what θ says of it now.
Deviations from the paper:
- `decoupled` and `policy` are not in it.
- A token whose ratio is too large for its dtype is left out, and counted.

Shapes: N tokens of a micro-batch, n of them in a chunk.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from eepo_fast.config import GrpoConfig
from eepo_fast.types import Rollout, WeightsVersion


def has_finite_logprobs(rollout: Rollout) -> bool:
    return all(map(math.isfinite, rollout.rollout_logprobs))


def lacks_prox_logprobs(rollout: Rollout, config: GrpoConfig, theta: WeightsVersion) -> bool:
    """Returns whether the ratio needs log-probs of the policy that nobody has computed yet."""
    by_others = all(version != theta for version in rollout.token_versions) and has_finite_logprobs(rollout)
    return rollout.prox_logprobs is None and not (by_others and config.ratio == "sampler")


def set_old_logprobs(rollouts: Sequence[Rollout], config: GrpoConfig, theta: WeightsVersion) -> None:
    """Sets what each token's ratio divides by: the log-prob at θ, or inf if the update's own forward pass will say it;
    with `sampler`, where θ did not sample the token, what the engine reported."""
    for r in rollouts:
        r.old_logprobs = r.prox_logprobs or [math.inf] * r.num_tokens
        if config.ratio == "sampler" and has_finite_logprobs(r):
            sampled = zip(r.rollout_logprobs, r.old_logprobs, r.token_versions, strict=True)
            r.old_logprobs = [prox if version == theta else mu for mu, prox, version in sampled]


def sampler_logprobs(rollout: Rollout, theta: WeightsVersion) -> list[float]:
    """Returns log μ of the tokens that other weights than θ sampled, and inf for those of θ, which weigh 1."""
    pairs = zip(rollout.rollout_logprobs, rollout.token_versions, strict=True)
    return [math.inf if version == theta else mu for mu, version in pairs]


def finite_ratio(log_ratio: Tensor) -> Tensor:
    """Returns bool [n]: whether a ratio can be computed with. One that is no number is let through: not the sampler is
    at fault then, but the policy, and its update must not be made."""
    return ~log_ratio.exp().isposinf()


def log_importance(prox_logprobs: Tensor, sampler: Tensor) -> Tensor:
    """Returns log π_prox/μ, [n], without gradient; sampler [n] as `sampler_logprobs`."""
    return torch.where(sampler == math.inf, 0.0, prox_logprobs.detach() - sampler)


def importance_weights(log_weights: Tensor, cap: float) -> Tensor:
    """Returns min(π_prox/μ, cap), [n]."""
    return log_weights.clamp(max=math.log(cap)).exp()


def clipped(ratio: Tensor, config: GrpoConfig) -> Tensor:
    return ratio.clamp(1 - config.clip_low, 1 + config.clip_high)


def is_cut(ratio: Tensor, advantages: Tensor, config: GrpoConfig) -> Tensor:
    """Returns bool [n]: whether the minimum of Eq. 2 takes the clipped ratio, so that the token has no gradient."""
    return clipped(ratio, config) * advantages < ratio * advantages
