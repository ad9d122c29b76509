"""The forget step's gradient: ∇L over stage 1 (Eq. 10), computed on the policy's weights and never touching them.

Deviations from the paper:
- The gate: Eq. 4, 5 and 10 gate each token (`gate: token`, the default); Algorithm 1 gates the iteration
  (`gate: iteration`: mean token entropy of stage 1, averaged over the last `window` iterations).
- `reduction: batch_mean` averages L over the whole stage-1 batch as Eq. 10 is written; Algorithm 1 samples one prompt.
  `prompt_sum` gives each prompt the step it would have had alone.
- A step longer than `max_step` of the weights' norm is not taken, or with `step: kl` made that long (the paper has no
  such bound).
- Other steps than one along ∇L (`num_steps`, `direction`) are ablations: ablations.py.

Counts, sums and decisions are over all ranks: each rank ends with the same `Unlearning`, but for its share of ∇L.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from eepo_kernels.ranges import named
from torch import Tensor

from eepo_fast.algorithm.losses import gate_open, unlearning_loss
from eepo_fast.config import EepoConfig
from eepo_fast.policy.micro_batches import MicroBatch
from eepo_fast.policy.module import Gradient, Policy, gather_columns
from eepo_fast.types import Rollout


@dataclass
class Unlearning:
    """What the unlearning pass over stage 1 found, beside the columns that it has filled in the rollouts:
    `prox_logprobs`, `entropy` and `gate`."""

    gradient: Gradient | None
    """∇L, or what an ablation puts in its place; None once it is used."""
    loss: float
    grad_norm: float
    """‖∇L‖ at θ; with `gate: iteration` before the gate."""
    active_fraction: float
    """The share of stage-1 tokens whose gate is open."""
    mean_entropy: float
    mean_length: float
    """Mean number of tokens of stage 1's completions."""
    apply: bool
    """False: gate closed everywhere, a non-finite gradient, or too long a step; nothing is written."""
    entropy_window: list[float] = field(default_factory=list)
    """Stage 1's mean entropies in the last iterations, this one included, in nats."""
    finite: bool = True
    too_long: bool = False
    """The step would have been longer than `max_step`."""
    learning_rate: float = math.nan
    """η of the step, if it is taken: with `step: kl` no longer than `max_step` allows."""
    resampled: bool = False
    """Stage 2 showed that the step went further than `max_kl`, and was sampled again from the policy."""
    hidden_s: float = 0.0
    """Seconds of it that went on beside sampling, on a thread of their own."""
    kl: float = math.nan
    """KL(θ'‖θ) as stage 2's own completions have it, in nats a token."""
    kl_low_variance: float = math.nan
    """The same, by the estimate that varies less."""


Ablation = Callable[[Unlearning, Policy, Sequence[Rollout]], None]
"""A function that puts another step in the gradient's place; it may find that this cannot be taken."""


def compute_unlearning(
    policy: Policy,
    rollouts: Sequence[Rollout],
    config: EepoConfig,
    entropy_window: Sequence[float],
    *,
    begun: GradientPass | None = None,
    ablation: Ablation | None = None,
) -> Unlearning:
    """Computes ∇L over stage 1 and decides whether the step is taken. entropy_window: mean entropies of earlier
    iterations' first stages, for `gate: iteration`. begun: this rank's pass over those of them that ended early."""
    whole = GradientPass(policy, config, len(rollouts), count_prompts(rollouts))
    whole.take_over(begun, rollouts)
    found = whole.finish(rollouts)
    found.entropy_window = [*entropy_window, *([found.mean_entropy] if rollouts else [])][-config.window :]
    if config.gate == "iteration" and rollouts:
        is_open = float(sum(found.entropy_window) / len(found.entropy_window) < config.alpha)
        found.active_fraction = is_open
        for r in rollouts:
            r.gate = [is_open] * r.num_tokens
    found.finite = math.isfinite(found.grad_norm)
    found.apply = found.finite and found.active_fraction > 0 and found.grad_norm > 0
    norm = found.grad_norm
    if found.apply and ablation is not None:
        ablation(found, policy, rollouts)
        assert found.gradient is not None
        norm = found.gradient.norm()
    found.learning_rate = config.learning_rate
    if found.apply:
        longest = config.max_step * policy.weights_norm
        found.too_long = not config.learning_rate * norm <= longest
        if found.too_long and config.step == "kl" and math.isfinite(norm):
            found.learning_rate, found.too_long = longest / norm, False
        found.apply = not found.too_long
    return found


def count_prompts(rollouts: Sequence[Rollout]) -> int:
    return len({r.prompt.id for r in rollouts})


class GradientPass:
    """Sums ∇L over completions that may come in parts: the same terms, in another order."""

    def __init__(self, policy: Policy, config: EepoConfig, num_completions: int, num_prompts: int):
        self.policy, self.config = policy, config
        self.scale = self._scale(num_completions, num_prompts)
        self.gradient = policy.gradient()
        self.sums = torch.zeros(4, dtype=torch.float64, device=next(policy.model.parameters()).device)
        """Loss, open gates, tokens and entropy, [4] fp64; on the device, so that no micro-batch waits for another."""
        self.parts: list[tuple[MicroBatch, tuple[Tensor, ...]]] = []
        """Log-probs, entropy and gate of what is done, each [N]."""
        self.done: set[Rollout] = set()
        """Those that are added, by whatever rank."""

    def _scale(self, num_completions: int, num_prompts: int) -> float:
        return (num_prompts if self.config.reduction == "prompt_sum" else 1) / max(1, num_completions)

    def add(self, rollouts: Sequence[Rollout]) -> None:
        for batch in self.policy.micro_batches(rollouts):
            # an empty response is counted in the mean over responses and has no token to weigh
            weights = batch.per_token([self.scale / r.num_tokens for r in batch.rollouts])
            part, stats = self.policy.loss(batch, unlearning_loss(self.config, batch.starts, weights))
            with named("micro-batch backward"):
                self.gradient.add(part)
            is_open = _gate(batch, stats.entropy, self.config)
            columns = (is_open.float(), torch.ones_like(stats.entropy), stats.entropy)
            self.sums += torch.stack([part.detach().double(), *(c.sum(dtype=torch.float64) for c in columns)])
            self.parts.append((batch, (stats.logprobs, stats.entropy, is_open.float())))
            self.done.update(batch.rollouts)

    def take_over(self, begun: GradientPass | None, rollouts: Sequence[Rollout]) -> None:
        """Adds what each rank has begun alone; all ranks call this, first. begun: this rank's, None where there is
        nothing. rollouts: all of stage 1 that counts."""
        place = {r: i for i, r in enumerate(rollouts)}
        assert begun is None or begun.done <= place.keys(), "an engine returns the objects that it has handed over"
        parts = self.policy.world.gather([place[r] for r in begun.done] if begun else [])
        if not any(parts):
            return
        if begun is not None:  # whose scale is that of another number of completions, where some have not ended
            begun.sums[0] *= self.scale / begun.scale
            begun.gradient.scale(self.scale / begun.scale)
            self.sums, self.parts = begun.sums, begun.parts
        self.gradient.take_over(begun.gradient if begun else None)
        self.done = {rollouts[i] for part in parts for i in part}

    def finish(self, rollouts: Sequence[Rollout]) -> Unlearning:
        """Adds those that are not done and returns what was found, on every rank. rollouts: all of stage 1 that
        counts."""
        self.add([r for r in rollouts if r not in self.done])
        return self.result(rollouts)

    def result(self, rollouts: Sequence[Rollout]) -> Unlearning:
        world = self.policy.world
        loss, num_open, num_tokens, entropy_sum = world.total(self.sums.tolist())
        mine: dict[Rollout, tuple[Tensor, ...]] = {}
        for batch, columns in self.parts:
            cut = (batch.split(values.cpu()) for values in columns)
            mine.update(zip(batch.rollouts, zip(*cut, strict=True), strict=True))
        for r, (logprobs, entropy, gate) in gather_columns(world, rollouts, mine).items():
            r.prox_logprobs, r.entropy, r.gate = logprobs, entropy, gate
        return Unlearning(
            gradient=self.gradient,
            loss=loss,
            grad_norm=self.gradient.norm(),
            active_fraction=num_open / max(1, num_tokens),
            mean_entropy=entropy_sum / max(1, num_tokens),
            mean_length=num_tokens / len(rollouts) if rollouts else math.nan,
            apply=False,
        )


def _gate(batch: MicroBatch, entropy: Tensor, config: EepoConfig) -> Tensor:
    rows = torch.arange(len(entropy), device=entropy.device)
    if config.gate == "token":
        return gate_open(entropy, rows, batch.starts, config.alpha, config.window)
    return torch.ones_like(rows, dtype=torch.bool)
