"""The forget step's gradient: ∇L over stage 1 (Eq. 10), computed on the policy's weights and never touching them.

Deviations from the paper:
- The gate: Eq. 4, 5 and 10 gate each token (`gate: token`, the default); Algorithm 1 gates the iteration
  (`gate: iteration`: mean token entropy of stage 1, averaged over the last `window` iterations).
- `reduction: batch_mean` averages L over the whole stage-1 batch as Eq. 10 is written; Algorithm 1 samples one prompt.
  `prompt_sum` gives each prompt the step it would have had alone.
- More than one step (an ablation) follows the gradient at θ' on a temporary copy; the engine applies their sum at once.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from eepo_fast.config import EepoConfig
from eepo_fast.losses import gate_open, unlearning_loss
from eepo_fast.policy import MicroBatch, TorchPolicy
from eepo_fast.types import Rollout


@dataclass
class Unlearning:
    """What the unlearning pass over stage 1 found. Per-token lists are keyed by id() of the rollout."""

    gradient: dict[str, Tensor]
    """Sum over the steps of ∇L, fp32, by weight name; None where the step is skipped."""
    loss: float
    grad_norm: float
    """‖∇L‖ at θ, of the first step; with `gate: iteration` before the gate."""
    active_fraction: float
    """Share of stage-1 tokens whose gate is open."""
    mean_entropy: float
    apply: bool
    """False: gate closed everywhere, or a non-finite gradient; nothing is written."""
    finite: bool = True
    logprobs: dict[int, list[float]] = field(default_factory=dict)
    entropy: dict[int, list[float]] = field(default_factory=dict)
    gate: dict[int, list[float]] = field(default_factory=dict)


def compute_unlearning(
    policy: TorchPolicy, rollouts: Sequence[Rollout], config: EepoConfig, entropy_window: list[float]
) -> Unlearning:
    """∇L over stage 1 and what the pass learned on the way. `entropy_window`: mean entropies of earlier iterations'
    first stages, for `gate: iteration`; this iteration's is appended."""
    result = _one_step(policy, rollouts, config)
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
    return result


def _one_step(policy: TorchPolicy, rollouts: Sequence[Rollout], config: EepoConfig) -> Unlearning:
    num_prompts = len({r.prompt.id for r in rollouts})
    scale = (num_prompts if config.reduction == "prompt_sum" else 1) / max(1, len(rollouts))
    names, parameters = zip(*policy.model.named_parameters(), strict=True)
    gradient: list[Tensor] = []
    loss, num_open, num_tokens, entropy_sum = 0.0, 0, 0, 0.0
    result = Unlearning({}, 0.0, 0.0, 0.0, 0.0, False)
    for batch in policy.micro_batches(rollouts):
        # an empty response is counted in the mean over responses and has no token to weigh
        weights = batch.per_token([scale / r.num_tokens for r in batch.rollouts])
        part, stats = policy.loss(batch, unlearning_loss(config, batch.starts, weights))
        # autograd.grad, not backward(): the policy's .grad must stay as it is
        grads = torch.autograd.grad(part, parameters, allow_unused=True)
        grads = [torch.zeros_like(p) if g is None else g for g, p in zip(grads, parameters, strict=True)]
        if gradient:
            torch._foreach_add_(gradient, grads)
        else:
            gradient = list(grads)
        loss += float(part.detach())
        is_open = _gate(batch, stats.entropy, config)
        num_open += int(is_open.sum())
        num_tokens += is_open.numel()
        entropy_sum += float(stats.entropy.sum(dtype=torch.float64))
        columns = (batch.split(stats.logprobs), batch.split(stats.entropy), batch.split(is_open.float()))
        for rollout, logprobs, entropy, gate in zip(batch.rollouts, *columns, strict=True):
            key = id(rollout)
            result.logprobs[key], result.entropy[key], result.gate[key] = logprobs, entropy, gate
    result.gradient = dict(zip(names, gradient, strict=True)) if gradient else {}
    result.loss = loss
    result.grad_norm = float(torch.nn.utils.get_total_norm(gradient)) if gradient else 0.0
    result.active_fraction = num_open / max(1, num_tokens)
    result.mean_entropy = entropy_sum / max(1, num_tokens)
    return result


def _gate(batch: MicroBatch, entropy: Tensor, config: EepoConfig) -> Tensor:
    rows = torch.arange(len(entropy), device=entropy.device)
    if config.gate == "token":
        return gate_open(entropy, rows, batch.starts, config.alpha, config.window)
    return torch.ones_like(rows, dtype=torch.bool)


def _further_steps(policy: TorchPolicy, rollouts: Sequence[Rollout], config: EepoConfig, first: Unlearning) -> None:
    """Steps 2 to num_steps at θ', on a temporary copy in the policy's precision; their sum becomes first.gradient."""
    moved = copy.copy(policy)
    moved.model = copy.deepcopy(policy.model)
    moved.head = moved.model.get_output_embeddings()
    latest = first.gradient
    total = {name: g.clone() for name, g in first.gradient.items()}
    for _ in range(config.num_steps - 1):
        with torch.no_grad():
            for name, parameter in moved.model.named_parameters():
                parameter.add_(latest[name], alpha=config.learning_rate)
        step = _one_step(moved, rollouts, config)
        if not math.isfinite(step.grad_norm):
            first.finite = first.apply = False
            return
        latest = step.gradient
        for name in total:
            total[name] += latest[name]
    first.gradient = total
