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
import time
import zlib
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from eepo_kernels.ranges import named
from torch import Tensor

from eepo_fast.config import EepoConfig
from eepo_fast.losses import gate_open, unlearning_loss
from eepo_fast.policy.micro_batches import MicroBatch, input_length
from eepo_fast.policy.module import Gradient, Policy, gather_columns
from eepo_fast.policy.plain import TorchPolicy
from eepo_fast.types import Rollout


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
        self.loss, self.num_open, self.num_tokens, self.entropy_sum = 0.0, 0, 0, 0.0
        self.columns: tuple[dict[int, list[float]], ...] = ({}, {}, {})

    def _scale(self, num_completions: int, num_prompts: int) -> float:
        return (num_prompts if self.config.reduction == "prompt_sum" else 1) / max(1, num_completions)

    def rescale(self, num_completions: int, num_prompts: int) -> None:
        """As many of them have come as these, and not as many as were expected."""
        factor = self._scale(num_completions, num_prompts) / self.scale
        if factor != 1:
            self.loss *= factor
            for tensor in self.gradient.tensors.values():
                tensor *= factor

    def add(self, rollouts: Sequence[Rollout]) -> None:
        for batch in self.policy.micro_batches(rollouts):
            # an empty response is counted in the mean over responses and has no token to weigh
            weights = batch.per_token([self.scale / r.num_tokens for r in batch.rollouts])
            part, stats = self.policy.loss(batch, unlearning_loss(self.config, batch.starts, weights))
            with named("micro-batch backward"):
                self.gradient.add(part)
            self.loss += float(part.detach())
            is_open = _gate(batch, stats.entropy, self.config)
            self.num_open += int(is_open.sum())
            self.num_tokens += is_open.numel()
            self.entropy_sum += float(stats.entropy.sum(dtype=torch.float64))
            for column, values in zip(self.columns, (stats.logprobs, stats.entropy, is_open.float()), strict=True):
                column.update(zip(map(id, batch.rollouts), batch.split(values), strict=True))

    def result(self, rollouts: Sequence[Rollout]) -> Unlearning:
        """rollouts: all of them."""
        sums = [self.loss, self.num_open, self.num_tokens, self.entropy_sum]
        loss, num_open, num_tokens, entropy_sum = self.policy.world.total(sums)
        logprobs, entropy, gate = gather_columns(self.policy.world, rollouts, self.columns)
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


class StreamedUnlearning:
    """∇L of completions that have finished, computed while others are still being sampled: between two steps of the
    engine on a CPU, on a thread and a CUDA stream of its own on a GPU. Where memory does not suffice for both, it gives
    up, and the pass is made after the stage."""

    def __init__(self, policy: Policy, config: EepoConfig, num_completions: int, num_prompts: int, *, threaded: bool):
        assert policy.stream_tokens is not None
        self.policy = policy
        self.whole: GradientPass | None = GradientPass(policy, config, num_completions, num_prompts)
        self.waiting: list[Rollout] = []
        self.waiting_tokens = 0
        self.spans: list[tuple[float, float]] = []
        """When it was worked on."""
        self.gave_up = False
        self.pool = ThreadPoolExecutor(1, "unlearn") if threaded else None
        self.pending: list[Future] = []
        self.stream = torch.cuda.Stream() if threaded and torch.cuda.is_available() else None

    def take(self, rollout: Rollout) -> None:
        """A completion that has finished; a micro-batch of them is worked on at once."""
        if self.whole is None or not rollout.num_tokens:
            return
        if self.waiting and self.waiting_tokens + input_length(rollout) > self.policy.stream_tokens:
            batch, self.waiting, self.waiting_tokens = self.waiting, [], 0
            if self.pool is None:
                self._work(batch)
            else:
                self.pending.append(self.pool.submit(self._work, batch))
        self.waiting.append(rollout)
        self.waiting_tokens += input_length(rollout)

    def _work(self, batch: list[Rollout]) -> None:
        started = time.perf_counter()
        try:
            if self.whole is not None:
                with torch.enable_grad(), torch.cuda.stream(self.stream):  # engines sample without
                    self.whole.add(batch)
                if self.stream is not None:
                    self.stream.synchronize()
        except torch.OutOfMemoryError:
            self.whole, self.gave_up = None, True
        self.spans.append((started, time.perf_counter()))

    def seconds_until(self, moment: float) -> float:
        """Spent on it before a moment of `time.perf_counter`."""
        return sum(max(0.0, min(end, moment) - start) for start, end in self.spans)

    def close(self) -> None:
        """What has not begun is not begun; nothing goes on behind."""
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)

    def finish(self, rollouts: Sequence[Rollout]) -> Unlearning | None:
        """What the pass found over all of stage 1, the rest of it worked on now; None where it has given up."""
        for future in self.pending:
            future.result()
        self.close()
        whole, self.whole = self.whole, None  # a call after an error begins anew
        if whole is None:
            return None
        assert set(whole.columns[0]) <= set(map(id, rollouts)), "an engine returns the objects that it has handed over"
        whole.add([r for r in rollouts if id(r) not in whole.columns[0]])
        whole.rescale(len(rollouts), len({r.prompt.id for r in rollouts}))
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
