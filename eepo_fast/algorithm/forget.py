"""The forget step's gradient: ∇L over stage 1 (Eq. 10), computed on the policy's weights and never touching them.

Deviations from the paper:
- The gate: Eq. 4, 5 and 10 gate each token (`gate: token`, the default); Algorithm 1 gates the iteration
  (`gate: iteration`: mean token entropy of stage 1, averaged over the last `window` iterations).
- `reduction: batch_mean` averages L over the whole stage-1 batch as Eq. 10 is written; Algorithm 1 samples one prompt.
  `prompt_sum` gives each prompt the step it would have had alone.
- `direction: random` (a control) takes a random direction as long as ∇L in its place.
- More than one step (an ablation) follows the gradient at θ' on a temporary copy; the engine applies their sum at once.

Counts, sums and decisions are over all ranks: each rank ends with the same `Unlearning`, but for its share of ∇L.
"""

from __future__ import annotations

import copy
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from eepo_kernels.ranges import named
from torch import Tensor

from eepo_fast.algorithm.losses import gate_open, unlearning_loss
from eepo_fast.config import EepoConfig
from eepo_fast.policy.micro_batches import MicroBatch
from eepo_fast.policy.module import Gradient, Policy, gather_columns
from eepo_fast.policy.plain import TorchPolicy
from eepo_fast.types import Rollout

if TYPE_CHECKING:
    from eepo_fast.algorithm.overlap import StreamedUnlearning


@dataclass
class Unlearning:
    """What the unlearning pass over stage 1 found. Per-token lists are keyed by id() of the rollout."""

    gradient: Gradient | None
    """Sum over the steps of ∇L; None once it is used."""
    loss: float
    grad_norm: float
    """‖∇L‖ at θ, of the first step; with `gate: iteration` before the gate."""
    active_fraction: float
    """Share of stage-1 tokens whose gate is open."""
    mean_entropy: float
    apply: bool
    """False: gate closed everywhere, a non-finite gradient, or too long a step; nothing is written."""
    finite: bool = True
    too_long: bool = False
    """The step would have been longer than `max_step`."""
    resampled: bool = False
    """Stage 2 showed that the step went further than `max_kl`, and was sampled again from the policy."""
    hidden_s: float = 0.0
    """Seconds of it that went on beside sampling, on a thread of their own."""
    kl: float = math.nan
    """KL(θ'‖θ) as stage 2's first samples had it: nats a token."""
    logprobs: dict[int, list[float]] = field(default_factory=dict)
    entropy: dict[int, list[float]] = field(default_factory=dict)
    gate: dict[int, list[float]] = field(default_factory=dict)
    change: dict[int, list[float]] = field(default_factory=dict)
    """What the forget step did to a token's log-prob in the engine; with `log.token_details`."""


def compute_unlearning(
    policy: Policy,
    rollouts: Sequence[Rollout],
    config: EepoConfig,
    entropy_window: list[float],
    seed: str = "",
    streamed: StreamedUnlearning | None = None,
) -> Unlearning:
    """∇L over stage 1 and what the pass learned on the way. `entropy_window`: mean entropies of earlier iterations'
    first stages, for `gate: iteration`; this iteration's is appended. seed: of `direction: random`, for this step.
    streamed: what was begun while they were sampled."""
    result = (streamed.finish(rollouts) if streamed else None) or _one_step(policy, rollouts, config)
    entropy_window.append(result.mean_entropy)
    del entropy_window[: -config.window]
    if config.gate == "iteration":
        is_open = sum(entropy_window) / len(entropy_window) < config.alpha
        result.active_fraction = float(is_open)
        result.gate = {key: [float(is_open)] * len(values) for key, values in result.gate.items()}
    result.finite = math.isfinite(result.grad_norm)
    result.apply = result.finite and result.active_fraction > 0 and result.grad_norm > 0
    if result.apply and config.num_steps > 1:
        _further_steps(policy, rollouts, config, result)
    if result.apply:
        longest = config.max_step * policy.weights_norm
        norm = result.grad_norm if config.num_steps == 1 else result.gradient.norm()
        result.too_long = not config.learning_rate * norm <= longest
        result.apply = not result.too_long
    if result.apply and config.direction == "random":
        _randomise(result.gradient.tensors, seed)
    return result


def _randomise(tensors: dict[str, Tensor], seed: str) -> None:
    """A random direction as long as the gradient, in its place: normal, drawn for each weight by its name."""
    length = math.sqrt(sum(float(g.double().square().sum()) for g in tensors.values()))
    for name, tensor in tensors.items():
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}|{name}".encode()))
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    drawn = math.sqrt(sum(float(g.double().square().sum()) for g in tensors.values()))
    for tensor in tensors.values():
        tensor *= length / drawn


class GradientPass:
    """∇L over completions that come in parts: the same terms, summed in another order. Its result needs all of them."""

    def __init__(self, policy: Policy, config: EepoConfig, num_completions: int, num_prompts: int):
        self.policy, self.config = policy, config
        self.scale = self._scale(num_completions, num_prompts)
        self.gradient = policy.gradient()
        self.sums = torch.zeros(4, dtype=torch.float64, device=next(policy.model.parameters()).device)
        """Loss, open gates, tokens and entropy, fp64; on the device, so that no micro-batch waits for another."""
        self.parts: list[tuple[MicroBatch, tuple[Tensor, ...]]] = []
        """Log-probs, entropy and gate of what is done."""
        self.done: set[int] = set()

    def _scale(self, num_completions: int, num_prompts: int) -> float:
        return (num_prompts if self.config.reduction == "prompt_sum" else 1) / max(1, num_completions)

    def rescale(self, num_completions: int, num_prompts: int) -> None:
        """As many of them have come as these, and not as many as were expected."""
        factor = self._scale(num_completions, num_prompts) / self.scale
        if factor != 1:
            self.sums[0] *= factor
            for tensor in self.gradient.tensors.values():
                tensor *= factor

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
            self.done.update(map(id, batch.rollouts))

    def result(self, rollouts: Sequence[Rollout]) -> Unlearning:
        """rollouts: all of them."""
        loss, num_open, num_tokens, entropy_sum = self.policy.world.total(self.sums.tolist())
        columns: tuple[dict[int, list[float]], ...] = ({}, {}, {})
        for batch, parts in self.parts:
            for column, values in zip(columns, parts, strict=True):
                column.update(zip(map(id, batch.rollouts), batch.split(values), strict=True))
        logprobs, entropy, gate = gather_columns(self.policy.world, rollouts, columns)
        return Unlearning(
            gradient=self.gradient,
            loss=loss,
            grad_norm=self.gradient.norm(),
            active_fraction=num_open / max(1, num_tokens),
            mean_entropy=entropy_sum / max(1, num_tokens),
            apply=False,
            logprobs=logprobs,
            entropy=entropy,
            gate=gate,
        )


def _one_step(policy: Policy, rollouts: Sequence[Rollout], config: EepoConfig) -> Unlearning:
    whole = GradientPass(policy, config, len(rollouts), len({r.prompt.id for r in rollouts}))
    whole.add(rollouts)
    return whole.result(rollouts)


def _gate(batch: MicroBatch, entropy: Tensor, config: EepoConfig) -> Tensor:
    rows = torch.arange(len(entropy), device=entropy.device)
    if config.gate == "token":
        return gate_open(entropy, rows, batch.starts, config.alpha, config.window)
    return torch.ones_like(rows, dtype=torch.bool)


def _further_steps(policy: TorchPolicy, rollouts: Sequence[Rollout], config: EepoConfig, first: Unlearning) -> None:
    """Steps 2 to num_steps at θ', on a temporary copy in the policy's precision; their sum becomes first.gradient."""
    moved = policy.with_model(copy.deepcopy(policy.model))
    latest, total = first.gradient.tensors, {name: g.clone() for name, g in first.gradient.tensors.items()}
    for _ in range(config.num_steps - 1):
        with torch.no_grad():
            for name, parameter in moved.model.named_parameters():
                parameter.add_(latest[name], alpha=config.learning_rate)
        step = _one_step(moved, rollouts, config)
        if not math.isfinite(step.grad_norm):
            first.finite = first.apply = False
            return
        latest = step.gradient.tensors
        for name in total:
            total[name] += latest[name]
    first.gradient.tensors = total
