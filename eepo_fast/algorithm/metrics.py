"""The numbers of an iteration, under the keys that `metrics.jsonl` keeps.

NaN where a number does not exist (retention without a forget step).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from eepo_kernels import ForgetStats, TokenStats
from torch import Tensor

from eepo_fast.algorithm.advantages import overlong_penalty
from eepo_fast.algorithm.forget import Unlearning
from eepo_fast.algorithm.iteration import Iteration
from eepo_fast.algorithm.losses import PolicyTokens, low_variance_kl
from eepo_fast.algorithm.policy_losses import find_loss, sequence_means
from eepo_fast.algorithm.ratio import finite_ratio, has_finite_logprobs, importance_weights, log_importance
from eepo_fast.config import Config, EepoConfig, GrpoConfig
from eepo_fast.distributed import World
from eepo_fast.policy.micro_batches import MicroBatch
from eepo_fast.types import AEPO_STAGE, Rollout, RolloutBatch, WeightsVersion

SIGNS = {"positive": 1, "negative": -1}  # of the advantage
CLIPPED = [f"policy/clip_{kind}_stage{s}_{sign}" for kind in ("fraction", "weight") for s in (1, 2) for sign in SIGNS]


@dataclass
class _Mean:
    """A mean, on the device until `settle`: a micro-batch's statistics are no reason to wait for its backward pass."""

    total: Tensor | float = 0.0
    count: Tensor | float = 0.0

    def add(self, values: Tensor, kept: Tensor, weights: Tensor | None = None) -> None:
        """Adds the values that are kept (bool), which count as their weights say."""
        weights = kept if weights is None else torch.where(kept, weights, 0.0)
        self.total = self.total + torch.where(kept, values, 0.0).sum(dtype=torch.float64)
        self.count = self.count + weights.sum(dtype=torch.float64)

    def settle(self) -> None:
        self.total, self.count = float(self.total), float(self.count)

    @property
    def value(self) -> float:
        return float(self.total) / float(self.count) if self.count else math.nan


@dataclass
class UpdateStats:
    """Sums over the micro-batches of an iteration's updates. Stages as in `Rollout.token_stages`."""

    loss: Tensor | float = 0.0
    non_finite_losses: Tensor | int = 0
    """Micro-batches whose loss is not finite."""
    non_finite_ratios: Tensor | int = 0
    """Tokens that were left out because their ratio is too large to compute with."""
    grad_norms: list[float] = field(default_factory=list)
    skipped: int = 0
    learning_rate: float = math.nan
    """The last update's."""
    means: dict[str, _Mean] = field(default_factory=dict)

    def add_micro_batch(
        self,
        config: Config,
        micro: MicroBatch,
        tokens: PolicyTokens,
        stats: TokenStats,
        loss: Tensor,
        first_update: bool,
    ) -> None:
        self.loss = self.loss + loss.double()
        self.non_finite_losses = self.non_finite_losses + ~loss.isfinite()
        rows = torch.arange(len(stats.logprobs), device=stats.logprobs.device)
        old_logprobs = tokens.old(stats.logprobs, rows)
        log_ratio = stats.logprobs - old_logprobs
        known, usable = tokens.weights > 0, finite_ratio(log_ratio)
        self.non_finite_ratios = self.non_finite_ratios + (known & ~usable).sum()
        kept, kind = known & usable, find_loss(config.grpo)
        if kind.of_sequences:
            log_ratio = sequence_means(log_ratio, kept, tokens.starts)
        ratio = log_ratio.exp()
        stage = micro.concatenate([r.token_stages for r in micro.rollouts])
        self._add("entropy/policy", stats.entropy, kept)
        weight = ratio * tokens.advantages.abs()
        if config.grpo.ratio == "decoupled":
            log_weights = log_importance(old_logprobs, tokens.sampler)
            if kind.of_sequences:
                log_weights = sequence_means(log_weights, kept, tokens.starts)
            weight = weight * importance_weights(log_weights, config.grpo.ratio_cap)
        cut = kind.is_cut(ratio, tokens.advantages, config.grpo) if kind.is_cut else None
        if tokens.high_covariance is not None:
            self._add("policy/high_covariance", tokens.high_covariance, kept)
        for s in (1, 2):
            chosen = kept & (stage == s)
            self._add(f"policy/ratio_mean_stage{s}", ratio, chosen)
            if cut is None:
                continue
            self._add(f"policy/clip_fraction_stage{s}", cut.float(), chosen)
            for sign, factor in SIGNS.items():
                signed = chosen & (factor * tokens.advantages > 0)
                self._add(f"policy/clip_fraction_stage{s}_{sign}", cut.float(), signed)
                self._add(f"policy/clip_weight_stage{s}_{sign}", torch.where(cut, weight, 0.0), signed, weight)
        if tokens.ref_logprobs is not None:
            self._add("policy/kl", low_variance_kl(stats.logprobs, tokens.ref_logprobs), kept)
        if first_update:  # the weights are still θ, so these compare θ with the engine
            sampled = micro.concatenate([r.rollout_logprobs for r in micro.rollouts])
            # AEPO's samples carry log-probs at their own temperature
            own = (tokens.sampler == math.inf) & (stage < AEPO_STAGE)
            self._add("rollout/logprob_gap", (sampled - stats.logprobs).abs(), own)
            self._add_importance(config.grpo, tokens, stats.logprobs, kept)

    def _add_importance(self, config: GrpoConfig, tokens: PolicyTokens, logprobs: Tensor, kept: Tensor) -> None:
        """Adds what π_θ/μ says of how well other weights sample for θ; as they are used, cut off at the cap, for
        `policy/ess`."""
        weights, cap = log_importance(logprobs, tokens.sampler).exp(), config.ratio_cap
        kept = kept & weights.isfinite()
        chosen, used = (
            kept & (tokens.sampler != math.inf),
            weights.clamp(max=cap) if config.ratio == "decoupled" else weights,
        )
        self._add("weight", used, kept)
        self._add("weight squared", used.square(), kept)
        self._add("policy/weight_mean", weights, chosen)
        self._add("policy/weight_tail", (weights > cap).float(), chosen)

    def add(self, other: UpdateStats) -> None:
        """Adds those of another mini-batch."""
        self.loss = self.loss + other.loss
        self.non_finite_losses = self.non_finite_losses + other.non_finite_losses
        self.non_finite_ratios = self.non_finite_ratios + other.non_finite_ratios
        for name, mean in other.means.items():
            mine = self.means.setdefault(name, _Mean())
            mine.total, mine.count = mine.total + mean.total, mine.count + mean.count

    def add_other_ranks(self, world: World) -> None:
        """Puts the sums over all ranks, as plain numbers, in the place of this rank's own."""
        sums = [float(self.loss), float(self.non_finite_losses), float(self.non_finite_ratios)]
        self.loss, losses, ratios = world.total(sums)
        self.non_finite_losses, self.non_finite_ratios = int(losses), int(ratios)
        for mean in self.means.values():
            mean.settle()
        if world.size == 1:
            return
        mine = {name: (mean.total, mean.count) for name, mean in self.means.items()}
        self.means = {}
        for part in world.gather(mine):
            for name, (total, count) in part.items():
                mean = self.means.setdefault(name, _Mean())
                mean.total, mean.count = mean.total + total, mean.count + count

    def _add(self, name: str, values: Tensor, kept: Tensor, weights: Tensor | None = None) -> None:
        self.means.setdefault(name, _Mean()).add(values, kept, weights)

    def mean(self, name: str) -> float:
        return self.means[name].value if name in self.means else math.nan


def iteration_metrics(it: Iteration, batch: RolloutBatch, num_trained: int, update: UpdateStats) -> dict[str, float]:
    """Returns the row that metrics.jsonl gets for an iteration, which is done. num_trained: groups that it has trained
    on."""
    rollouts, groups, unlearning = batch.rollouts, batch.groups(), it.unlearning
    stages = {s: batch.stage(s) for s in (1, 2)}
    it.times["iteration"] = time.perf_counter() - it.started
    everything = [r for group in it.groups for r in group.rollouts]
    num_sampled = sum(r.num_tokens for r in everything) - it.tokens_before
    statuses, gap = [r.status for r in rollouts], _logprob_gap(stages[1], it.theta)
    result: dict[str, float] = {
        "step": it.seed[1] + 1,
        "policy_version": it.theta.policy_version,
        "reward/mean": _mean(r.reward for r in rollouts),
        "reward/stage1": _mean(r.reward for r in stages[1]),
        "reward/stage2": _mean(r.reward for r in stages[2]),
        "reward/missing": sum(r.reward is None for r in rollouts),
        **{f"reward/status_{s}": statuses.count(s) for s in ("ok", "no_answer", "timeout", "too_large", "error")},
        "entropy/policy": update.mean("entropy/policy"),
        "entropy/stage1": _sampled_entropy(rollouts, 1),
        "entropy/stage2": _sampled_entropy(rollouts, 2),
        "unlearn/hidden_s": unlearning.hidden_s if unlearning else math.nan,
        "unlearn/stragglers": _mean(2 in r.segment_stages for r in stages[1]) if unlearning else math.nan,
        "length/mean": _mean(r.num_tokens for r in rollouts),
        "length/stage1": _mean(r.num_tokens for r in stages[1]),
        "length/stage2": _mean(r.num_tokens for r in stages[2]),
        "length/unlearned": unlearning.mean_length if unlearning else math.nan,
        "length/truncated_fraction": _mean(not r.finished for r in rollouts),
        "group/unique_fraction": _mean(len({r.completion for r in g}) / len(g) for g in groups),
        "group/all_equal_fraction": _mean(len({r.reward for r in g if r.reward is not None}) <= 1 for g in groups),
        "group/filtered": len(groups) - num_trained,
        **_advantage_metrics(it.config, rollouts),
        **_unlearn_metrics(unlearning, it.forget_stats, it.eepo),
        "unlearn/kl": unlearning.kl if unlearning else math.nan,
        "unlearn/kl_low_variance": unlearning.kl_low_variance if unlearning else math.nan,
        "policy/loss": float(update.loss) / len(update.grad_norms) if update.grad_norms else math.nan,
        "policy/grad_norm": _mean(update.grad_norms),
        "policy/learning_rate": update.learning_rate,
        "policy/updates_skipped": update.skipped,
        "policy/non_finite_losses": int(update.non_finite_losses),
        "policy/out_of_memory": it.out_of_memory,
        "policy/kl": update.mean("policy/kl"),
        "policy/non_finite_ratios": int(update.non_finite_ratios),
        "policy/ess": update.mean("weight") ** 2 / (update.mean("weight squared") or math.nan),
        **{name: update.mean(name) for name in ("policy/weight_mean", "policy/weight_tail", *CLIPPED)},
        "policy/high_covariance": update.mean("policy/high_covariance"),
        **{
            f"policy/{name}_stage{s}": update.mean(f"policy/{name}_stage{s}")
            for name in ("clip_fraction", "ratio_mean")
            for s in (1, 2)
        },
        **_carry_metrics(it, rollouts),
        "rollout/non_finite_logprobs": sum(not has_finite_logprobs(r) for r in rollouts),
        "rollout/logprob_gap": update.mean("rollout/logprob_gap") if math.isnan(gap) else gap,
        **{f"time/{name}_s": value for name, value in it.times.items()},
        "time/waiting_s": it.waiting_s,
        "tokens/generated": num_sampled,
        "tokens/per_second": num_sampled / it.times["iteration"],
        **it.ahead.metrics(),
    }
    for addition in it.additions:
        result |= addition.metrics()
    return result


def _advantage_metrics(config: Config, rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Returns what `grpo.advantage` has made of the rewards, and what was taken from those of long answers."""
    advantages = [r.advantage for r in rollouts if r.reward is not None]
    return {
        "advantage/positive": _mean(a for a in advantages if a > 0),
        "advantage/negative": _mean(a for a in advantages if a < 0),
        "advantage/zero_fraction": _mean(a == 0 for a in advantages),
        "reward/overlong": _mean(overlong_penalty(r.num_tokens, config) for r in rollouts if r.reward is not None),
    }


def _unlearn_metrics(found: Unlearning | None, stats: ForgetStats | None, config: EepoConfig) -> dict[str, float]:
    """Returns what forgetting did. Without EEPO every value is NaN but counts; `strength` is η‖∇L‖², the first-order
    change of L. config: with this iteration's η."""
    nan, eta = math.nan, config.learning_rate
    return {
        "unlearn/applied": float(found.apply and not found.resampled) if found else nan,
        "unlearn/learning_rate": eta if found else nan,
        "unlearn/active_fraction": found.active_fraction if found else nan,
        "unlearn/loss": found.loss if found else nan,
        "unlearn/grad_norm": found.grad_norm if found else nan,
        "unlearn/strength": eta * found.grad_norm**2 if found else nan,
        "unlearn/retention": stats.retention if stats else nan,
        "unlearn/noise_ratio": stats.noise_ratio if stats else nan,
        "unlearn/skipped": float(found is not None and not found.apply),
        "unlearn/non_finite": float(found is not None and not found.finite),
        "unlearn/too_long": float(found is not None and found.too_long),
        "unlearn/resampled": float(found is not None and found.resampled),
    }


def _carry_metrics(it: Iteration, trained: Sequence[Rollout]) -> dict[str, float]:
    """Returns what is in flight, and how old what is trained on is: NaN in a run without carry."""
    begun = [r for group in it.groups for r in group.rollouts]
    ages = [
        (it.theta.policy_version - s.weights_version.policy_version, len(s.tokens)) for r in trained for s in r.segments
    ]
    found = {
        "rollout/carried_fraction": sum(r.preempted for r in begun) / max(1, it.num_asked),
        "rollout/held_groups": len(it.groups) - len(trained) / it.config.rollout.group_size,
        "rollout/staleness_mean": sum(a * count for a, count in ages) / max(1, sum(count for _, count in ages)),
        "rollout/staleness_max": max(age for age, _ in ages),
        "length/begun": _mean(r.num_tokens for r in begun if r.begun == it.seed[1]),
    }
    return found if it.config.rollout.carry else dict.fromkeys(found, math.nan)


def _logprob_gap(stage1: list[Rollout], theta: WeightsVersion) -> float:
    """Returns mean |engine - policy| over what θ alone has sampled in stage 1, where both hold the same weights; NaN
    where that was not scored before the update."""
    return _mean(
        abs(a - b)
        for r in stage1
        if r.prox_logprobs is not None and {s.weights_version for s in r.segments} == {theta}
        for a, b in zip(r.rollout_logprobs, r.prox_logprobs, strict=True)
    )


def _sampled_entropy(rollouts: Sequence[Rollout], stage: int) -> float:
    """Returns -mean log-prob of the tokens of a stage, in nats: stage 2 has those, too, with which stage 1's stragglers
    went on."""
    segments = [s for r in rollouts for s, of in zip(r.segments, r.segment_stages, strict=True) if of == stage]
    return -_mean(logprob for segment in segments for logprob in segment.rollout_logprobs)


def _mean(values: Iterable[float | None]) -> float:
    known = [float(v) for v in values if v is not None]
    return math.fsum(known) / len(known) if known else math.nan
