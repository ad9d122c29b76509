"""The loss of a policy's token, by `grpo.loss`: a few lines each. What they share (the mean over tokens, importance
weights, KL, entropy) is around them, in losses.py.

r is the ratio of `grpo.ratio`, A the advantage. A loss of sequences sees, in the place of each token's log r, its mean
over the completion: it needs whole completions, where the others are computed with the head, chunk by chunk.

Shapes: n tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from eepo_fast.algorithm.ratio import clipped, is_cut
from eepo_fast.config import GrpoConfig
from eepo_fast.own import find_guarded, is_own
from eepo_fast.types import Rollout, UserError


class ChunkTokens(NamedTuple):
    """Is what a loss is made of; each [n], fp32. Tokens that are left out have zeros, and weigh nothing."""

    log_ratio: Tensor
    """log r, with gradient; in a loss of sequences the mean over the completion."""
    logprobs: Tensor
    """log π_θ, with gradient."""
    advantages: Tensor
    high_covariance: Tensor | None
    """1 for the tokens that `mark_high_covariance` has marked, else 0; None where it has marked none."""


class PolicyLoss(NamedTuple):
    losses: Callable[[GrpoConfig, ChunkTokens], Tensor]
    """Returns the loss of each token [n], to be descended."""
    is_cut: Callable[[Tensor, Tensor, GrpoConfig], Tensor] | None
    """(r, A) [n] each -> bool [n]: which tokens the clip takes something from; None where there is no clip, or none
    that is known here."""
    of_sequences: bool = False
    mark: Callable[[Sequence[Rollout], Container[Rollout], GrpoConfig], None] | None = None
    """Fills the columns that it reads, of an update's completions, before the first update: they have their
    `prox_logprobs` then. Takes those that are in the loss, too."""


def ppo(config: GrpoConfig, tokens: ChunkTokens) -> Tensor:
    """Returns -min(r A, clip(r) A) (Eq. 2; `grpo.clip_low`, `grpo.clip_high`). Of sequences it is GSPO's (arXiv
    2507.18071): s = exp(mean of log r) in the place of r; with `grpo.aggregation: sequence` the mean over a batch's
    completions of -min(s A, clip(s) A)."""
    ratio, advantages = tokens.log_ratio.exp(), tokens.advantages
    return -torch.minimum(ratio * advantages, clipped(ratio, config) * advantages)


def cispo(config: GrpoConfig, tokens: ChunkTokens) -> Tensor:
    """Returns -clip(r) A log π_θ, the clipped ratio without gradient (CISPO, arXiv 2506.13585): a token beyond the clip
    weighs less, and is never without a gradient."""
    ratio = clipped(tokens.log_ratio.detach().exp(), config)
    return -ratio * tokens.advantages * tokens.logprobs


def kl_cov(config: GrpoConfig, tokens: ChunkTokens) -> Tensor:
    """Returns -r A, and `grpo.cov_coef` · |log r| on top for tokens of high covariance (KL-Cov, arXiv 2505.22617, as
    its authors' code has the KL). Nothing is clipped. Where r is 1, as in an iteration's first update, |log r| has no
    gradient: it needs more updates than one an iteration."""
    surrogate = -tokens.log_ratio.exp() * tokens.advantages
    if tokens.high_covariance is None:
        return surrogate
    return surrogate + config.cov_coef * tokens.high_covariance * tokens.log_ratio.abs()


def is_beyond(ratio: Tensor, advantages: Tensor, config: GrpoConfig) -> Tensor:
    """Returns where the ratio itself is clipped, whatever the advantage."""
    return clipped(ratio, config) != ratio


def mark_high_covariance(rollouts: Sequence[Rollout], counted: Container[Rollout], config: GrpoConfig) -> None:
    """Marks, of an update's tokens, the share `grpo.cov_share` with the highest (log π_θ - mean) · (A - mean), at least
    one: those that take most from the entropy. The completions have their `prox_logprobs`; those that are not counted
    have no part, nor has a token whose log-prob is not finite.

    Deviation from KL-Cov, whose code takes the log-probs of each pass and the tokens of each micro-batch: they are
    those at the iteration's start, and of the whole update, so that how it is cut up makes no difference."""
    known = [r for r in rollouts if r in counted and r.num_tokens]
    for r in rollouts:
        r.high_covariance = [0.0] * r.num_tokens
    if not known:
        return
    logprobs = torch.tensor([p for r in known for p in r.prox_logprobs or ()], dtype=torch.float64)
    advantages = torch.tensor([r.advantage for r in known for _ in range(r.num_tokens)], dtype=torch.float64)
    finite = logprobs.isfinite()
    covariance = (logprobs - logprobs[finite].mean()) * (advantages - advantages[finite].mean())
    chosen = torch.zeros(len(logprobs))
    highest = torch.where(finite, covariance, -torch.inf).topk(max(1, int(config.cov_share * int(finite.sum()))))
    chosen[highest.indices] = finite[highest.indices].float()
    for r, marks in zip(known, chosen.split([r.num_tokens for r in known]), strict=True):
        r.high_covariance = marks.tolist()


LOSSES = {
    "ppo": PolicyLoss(ppo, is_cut),
    "gspo": PolicyLoss(ppo, is_cut, of_sequences=True),
    "cispo": PolicyLoss(cispo, is_beyond),
    "kl_cov": PolicyLoss(kl_cov, None, mark=mark_high_covariance),
}


def find_loss(config: GrpoConfig) -> PolicyLoss:
    """Returns the config's loss. A function of the user's own is one of sequences where it says so: `fn.of_sequences =
    True`."""
    if not is_own(config.loss):
        return LOSSES[config.loss]
    function = find_guarded("grpo.loss", config.loss)

    def losses(config: GrpoConfig, tokens: ChunkTokens) -> Tensor:
        found = function(config, tokens)
        shape = tuple(tokens.log_ratio.shape)
        if not isinstance(found, Tensor) or tuple(found.shape) != shape or not found.requires_grad:
            kind = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise UserError(
                f"grpo.loss: expected of {config.loss} a loss for each token, a tensor of shape {shape} made of "
                f"tokens.log_ratio or tokens.logprobs, found {kind}"
            )
        return found

    return PolicyLoss(losses, None, getattr(function, "of_sequences", False))


def sequence_means(values: Tensor, keep: Tensor, starts: Tensor) -> Tensor:
    """Returns, for each token, the mean of `values` over the kept tokens (bool) of its completion, [n]; 0 for a token
    that is left out. starts: int64 [n], the index of each completion's first token."""
    kept = torch.where(keep, values, 0.0)
    totals = torch.zeros_like(values).index_add(0, starts, kept)
    counts = torch.zeros_like(values).index_add(0, starts, keep.to(values.dtype))
    return torch.where(keep, (totals / counts.clamp_min(1))[starts], 0.0)
