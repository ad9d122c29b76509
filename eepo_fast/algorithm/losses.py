"""Losses of single tokens, in closed form, as `loss_fn`s for the fused head: (statistics, token indices) -> weighted
losses.

Deviations from the paper:
- Eq. 2 averages over the tokens of one group; here the token mean is over the whole mini-batch, so that long groups do
  not weigh less a token than short ones (what the framework of the paper's own runs does).
- Eq. 8 gives no value for ε_L and ε_R: 1e-4 each, our choice.
- Algorithm 1 and Eq. 9-11 disagree on the sign of the forget step. Eq. 11's ascent on log(1 - p) is the one that makes
  sampled tokens less likely, and the one used.
- Eq. 5 divides by the window's length always; here a window that is cut off at a response's start is the mean of what
  is in it, for the first tokens would else always pass for sure ones.
- The exponent of Eq. 2's KL estimate is kept within ±10, beyond which it has no gradient: one token must not make an
  infinite loss. It is differentiated as a loss; over tokens that θ sampled, its expected gradient is that of
  KL(π_ref ‖ π_θ), the other way round than its value.
- The KL and entropy terms of stage 2's tokens are means over what θ' sampled, without importance weights.
- `eepo.loss: nll`, `clip_gradient: saturate` and `gate: always` are not the paper's method, but ablations and an offer.

Shapes: N tokens of a micro-batch, n of them in a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from eepo_kernels import TokenStats
from eepo_kernels.reference import LossFn
from torch import Tensor

from eepo_fast.algorithm.policy_losses import ChunkTokens, find_loss, sequence_means
from eepo_fast.algorithm.ratio import finite_ratio, importance_weights, log_importance, sampler_logprobs
from eepo_fast.config import Config, EepoConfig, GrpoConfig
from eepo_fast.policy.micro_batches import MicroBatch
from eepo_fast.policy.module import WholeLoss
from eepo_fast.types import Rollout, WeightsVersion

MAX_KL_EXPONENT = 10.0


def gate_open(entropy: Tensor, rows: Tensor, starts: Tensor, alpha: float, window: int) -> Tensor:
    """Returns I_t of Eq. 4 and 5, bool [n], for tokens `rows` [n]: whether the mean entropy of the last `window`
    tokens is below `alpha`.

    entropy: [at least rows.max() + 1], of the micro-batch's tokens in order; starts: [N] int64, index of the first
    token of each token's own response, at which the window is cut off.
    """
    index = rows[:, None] - torch.arange(window, device=rows.device)
    inside = index >= starts[rows][:, None]
    values = entropy[index.clamp_min(0)]
    mean = torch.where(inside, values, 0.0).sum(1) / inside.sum(1)
    return mean < alpha


def clipped_log1mp(log1mp: Tensor, config: EepoConfig) -> Tensor:
    """Returns log(1 - clip(p, ε_L, 1 - ε_R)), Eq. 8 and 9.

    The literal clip has no gradient outside its range, so that the most dominant tokens of all are left alone;
    `clip_gradient: saturate` keeps the gradient of the unclipped log(1 - p), which is bounded, above 1 - ε_R.
    """
    clipped = log1mp.clamp(math.log(config.prob_ceiling_gap), math.log1p(-config.prob_floor))
    if config.clip_gradient == "saturate":
        above = log1mp < math.log(config.prob_ceiling_gap)
        return torch.where(above, log1mp + (clipped - log1mp).detach(), clipped)
    return clipped


def _kept(keep: Tensor, values: Tensor) -> Tensor:
    """Replaces the values of left-out tokens before anything is computed from them: a NaN or infinity there, times a
    weight or a gradient of 0, would be a NaN in the sum of all."""
    return torch.where(keep, values, 0.0)


def nll_loss(weights: Tensor) -> LossFn:
    """Returns -log p of every token, weighted; weights [N] fp32. A token of weight 0 is left out."""

    def loss_fn(stats: TokenStats, rows: Tensor) -> Tensor:
        w = weights[rows]
        return w * -_kept(w > 0, stats.logprobs)

    return loss_fn


def reinforce_loss(advantages: Tensor, weights: Tensor) -> LossFn:
    """Returns -A log p of every token, weighted, to be descended: REINFORCE, whose gradient is GRPO's at a ratio of 1.
    advantages, weights: [N] fp32. A token of weight 0 is left out."""

    def loss_fn(stats: TokenStats, rows: Tensor) -> Tensor:
        w = weights[rows]
        return w * -_kept(w > 0, advantages[rows]) * _kept(w > 0, stats.logprobs)

    return loss_fn


def unlearning_loss(config: EepoConfig, starts: Tensor, weights: Tensor) -> LossFn:
    """Returns L of Eq. 10, to be ascended. starts [N] as in `gate_open`; weights [N] fp32: 1 / (T_k · number of
    responses)."""

    def loss_fn(stats: TokenStats, rows: Tensor) -> Tensor:
        losses = clipped_log1mp(stats.log1mp, config) if config.loss == "complementary" else -stats.logprobs
        if config.gate == "token":
            assert stats.history is not None
            is_open = gate_open(stats.history.entropy, rows, starts, config.alpha, config.window)
            losses = torch.where(is_open, losses, 0.0)
        return weights[rows] * losses

    return loss_fn


@dataclass(frozen=True)
class Term:
    """What a method adds to an update's loss: the loss of its own completions' tokens, each with the same weight."""

    rollouts: Sequence[Rollout]
    weight: float
    loss: Callable[[MicroBatch, Tensor], LossFn]
    """Makes the loss of a micro-batch's tokens from their weights [N]."""

    @cached_property
    def members(self) -> frozenset[Rollout]:
        return frozenset(self.rollouts)

    def of(self, micro: MicroBatch) -> LossFn:
        return self.loss(micro, token_weights(micro, self.members, self.weight))


def num_known_tokens(rollouts: Sequence[Rollout]) -> int:
    """Returns what a token mean divides by: the tokens of the rollouts whose reward is known."""
    return sum(r.num_tokens for r in rollouts if r.reward is not None)


def aggregation_weights(config: Config, mini_batch: Sequence[Rollout]) -> dict[Rollout, float]:
    """Returns what each token of an update's completions weighs in the loss, by `grpo.aggregation`.

    One that is not there weighs nothing: its reward is missing, or it was cut off and `grpo.mask_truncated` is on. With
    B completions of T_k tokens each:

    - token: 1 / ΣT_k, the mean over all tokens (DAPO, Eq. 8);
    - sequence: 1 / (B T_k), the mean over completions of each one's mean (GRPO as it was first written);
    - constant: 1 / (B · `rollout.max_new_tokens`), the same whatever the lengths (Dr. GRPO)."""
    masked = config.grpo.mask_truncated
    known = [r for r in mini_batch if r.reward is not None and (r.finished or not masked)]
    if config.grpo.aggregation == "token":
        return dict.fromkeys(known, 1 / max(1, sum(r.num_tokens for r in known)))
    if config.grpo.aggregation == "constant":
        return dict.fromkeys(known, 1 / (max(1, len(known)) * config.rollout.max_new_tokens))
    return {r: 1 / (len(known) * max(1, r.num_tokens)) for r in known}


def token_weights(micro: MicroBatch, members: Container[Rollout], weight: float) -> Tensor:
    """Returns [N] fp32: `weight` for tokens of these rollouts, 0 for those of others in the micro-batch."""
    return micro.per_token([weight if r in members else 0.0 for r in micro.rollouts])


def sum_of(first: LossFn, *others: LossFn) -> LossFn:
    def loss_fn(stats: TokenStats, rows: Tensor) -> Tensor:
        return sum((other(stats, rows) for other in others), first(stats, rows))

    return loss_fn


def update_loss(config: Config, tokens: PolicyTokens, micro: MicroBatch, terms: Sequence[Term]) -> LossFn:
    """Returns what an update descends on a micro-batch: the policy's loss, and what methods add to it."""
    loss = policy_loss(config.grpo, tokens)
    whole = propagate_nonfinite(sum_of(loss, *(term.of(micro) for term in terms)))
    return WholeLoss(whole) if isinstance(loss, WholeLoss) else whole


def propagate_nonfinite(loss_fn: LossFn) -> LossFn:
    """Returns the same loss, whose gradient is no number where the loss is none: a comparison with NaN may have the
    derivative 0, and the gradient's norm is what decides whether an update is made."""

    def losses(stats: TokenStats, rows: Tensor) -> Tensor:
        found = loss_fn(stats, rows)
        return found * torch.where(found.detach().isfinite(), 1.0, math.nan)

    return losses


@dataclass
class PolicyTokens:
    """What the policy's loss knows about the N tokens of a micro-batch; each [N], fp32 unless said."""

    advantages: Tensor
    old_logprobs: Tensor
    on_policy: Tensor
    """bool: old_logprobs are policy_logprobs, detached."""
    sampler: Tensor
    """Log-probs under what sampled them of the tokens that other weights than θ did, inf for θ's own."""
    weights: Tensor
    """A token's weight in the sum, by `grpo.aggregation`; 0 for one that is left out."""
    starts: Tensor
    """int64: the index of the first token of each token's completion."""
    ref_logprobs: Tensor | None = None
    high_covariance: Tensor | None = None
    """1 for tokens that `kl_cov` holds back, else 0; None where nothing is marked."""

    @classmethod
    def of(cls, micro: MicroBatch, weights: Tensor, theta: WeightsVersion, *, with_reference: bool) -> PolicyTokens:
        """Collects the rollouts' columns. theta: the version of θ. with_reference: whether their `ref_logprobs` are
        known."""
        old = micro.concatenate([r.old_logprobs or [math.inf] * r.num_tokens for r in micro.rollouts])
        references = None
        if with_reference:
            references = micro.concatenate([r.ref_logprobs or [0.0] * r.num_tokens for r in micro.rollouts])
        high = None
        if any(r.high_covariance for r in micro.rollouts):
            high = micro.concatenate([r.high_covariance or [0.0] * r.num_tokens for r in micro.rollouts])
        return cls(
            advantages=micro.per_token([r.advantage for r in micro.rollouts]),
            old_logprobs=torch.where(old == math.inf, 0.0, old),
            on_policy=old == math.inf,
            sampler=micro.concatenate([sampler_logprobs(r, theta) for r in micro.rollouts]),
            weights=weights,
            starts=micro.starts,
            ref_logprobs=references,
            high_covariance=high,
        )

    def old(self, policy_logprobs: Tensor, rows: Tensor) -> Tensor:
        """Returns what the ratio of tokens `rows` divides by, [n]: log-probs without gradient."""
        return torch.where(self.on_policy[rows], policy_logprobs.detach(), self.old_logprobs[rows])


def low_variance_kl(policy_logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Returns exp(d) - d - 1, d = log π_ref - log π_θ: an unbiased, non-negative estimate of KL(π_θ ‖ π_ref)."""
    d = (ref_logprobs - policy_logprobs).clamp(-MAX_KL_EXPONENT, MAX_KL_EXPONENT)
    return d.expm1() - d  # near 0 the other way cancels to noise, below 0 too


def policy_loss(config: GrpoConfig, tokens: PolicyTokens) -> LossFn:
    """Returns GRPO's loss, to be descended: that of `grpo.loss` (with ppo -J of Eq. 2), plus β·KL, minus c·H."""
    loss = find_loss(config)

    def loss_fn(stats: TokenStats, rows: Tensor) -> Tensor:
        weights = tokens.weights[rows]
        keep = weights > 0
        policy_logprobs = _kept(keep, stats.logprobs)
        old_logprobs = _kept(keep, tokens.old(policy_logprobs, rows))
        log_ratio = policy_logprobs - old_logprobs
        keep = keep & finite_ratio(log_ratio.detach())
        weights, log_ratio = _kept(keep, weights), _kept(keep, log_ratio)
        if loss.of_sequences:
            log_ratio = sequence_means(log_ratio, keep, tokens.starts[rows])
        advantages = _kept(keep, tokens.advantages[rows])
        high = None if tokens.high_covariance is None else tokens.high_covariance[rows]
        losses = loss.losses(config, ChunkTokens(log_ratio, policy_logprobs, advantages, high))
        if config.ratio == "decoupled":
            sampler = torch.where(keep, tokens.sampler[rows], math.inf)
            log_weights = log_importance(old_logprobs, sampler)
            if loss.of_sequences:
                log_weights = sequence_means(log_weights, keep, tokens.starts[rows])
            losses = losses * importance_weights(log_weights, config.ratio_cap)
        if config.kl_coef:
            assert tokens.ref_logprobs is not None
            losses = losses + config.kl_coef * low_variance_kl(policy_logprobs, _kept(keep, tokens.ref_logprobs[rows]))
        if config.entropy_coef:
            losses = losses - config.entropy_coef * _kept(keep, stats.entropy)
        return weights * losses

    return WholeLoss(loss_fn) if loss.of_sequences else loss_fn
