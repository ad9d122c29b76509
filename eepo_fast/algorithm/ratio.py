"""The probability ratio of Eq. 3, its denominator, and its clip.

Shapes: N tokens of a micro-batch, n of them in a chunk.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from eepo_fast.config import GrpoConfig
from eepo_fast.types import Rollout


def has_finite_logprobs(rollout: Rollout) -> bool:
    return all(map(math.isfinite, rollout.rollout_logprobs))


def lacks_prox_logprobs(rollout: Rollout) -> bool:
    """Returns whether the ratio needs log-probs of the policy that nobody has computed yet."""
    forgetful = all(version.forgotten for version in rollout.token_versions) and has_finite_logprobs(rollout)
    return rollout.prox_logprobs is None and not forgetful


def set_old_logprobs(rollouts: Sequence[Rollout]) -> None:
    """Sets what each token's ratio divides by: where θ' sampled it, what the engine reported; where θ did, the log-prob
    at θ, or inf if the update's own forward pass will say it."""
    for r in rollouts:
        r.old_logprobs = r.prox_logprobs or [math.inf] * r.num_tokens
        if has_finite_logprobs(r):
            sampled = zip(r.rollout_logprobs, r.old_logprobs, r.token_versions, strict=True)
            r.old_logprobs = [mu if version.forgotten else prox for mu, prox, version in sampled]


def log_ratio(policy_logprobs: Tensor, old_logprobs: Tensor, on_policy: Tensor) -> Tensor:
    """Returns log π_θ - log π_old, [n]. on_policy: bool [n], where π_old is π_θ itself, detached."""
    return policy_logprobs - torch.where(on_policy, policy_logprobs.detach(), old_logprobs)


def clipped(ratio: Tensor, config: GrpoConfig) -> Tensor:
    return ratio.clamp(1 - config.clip_low, 1 + config.clip_high)


def is_cut(ratio: Tensor, advantages: Tensor, config: GrpoConfig) -> Tensor:
    """Returns bool [n]: whether the minimum of Eq. 2 takes the clipped ratio, so that the token has no gradient."""
    return clipped(ratio, config) * advantages < ratio * advantages
