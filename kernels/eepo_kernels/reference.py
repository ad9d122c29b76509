"""Has the head's ops and the rounding of `forget` in plain PyTorch, up to float64: the truth that tests compare with.

Nothing here is chunked or fused, and gradients come from autograd.

Shapes: N tokens, D hidden size, V vocabulary.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus


class TokenStats(NamedTuple):
    """Holds what a loss may know about N sampled tokens, each [N]: fp32, or float64 when the inputs are float64."""

    logprobs: Tensor
    """log p of the sampled token."""
    entropy: Tensor
    """Entropy of the whole distribution, in nats."""
    log1mp: Tensor
    """log(1 - p) of the sampled token."""
    history: "TokenStats | None" = None
    """Detached statistics of all tokens up to the end of this chunk, for causal windows; inside a `loss_fn` only."""


LossFn = Callable[[TokenStats, Tensor], Tensor]
"""(statistics of a chunk of n tokens, their indices [n] int64 in order) -> weighted per-token losses [n]. Pure."""


def token_stats(logits: Tensor, targets: Tensor) -> TokenStats:
    """Returns statistics of `targets` [N] int64 under `logits` [N, V], which already carry the temperature."""
    log_probs = torch.log_softmax(logits, dim=-1)
    target_log_probs = log_probs.gather(1, targets[:, None]).squeeze(1)
    probs = log_probs.exp()
    entropy = -(probs * log_probs.masked_fill(probs == 0, 0.0)).sum(-1)
    others = logits.scatter(1, targets[:, None], -torch.inf)
    # lse(others) - lse(all) would cancel where p is tiny
    log1mp = -softplus(logits.gather(1, targets[:, None]).squeeze(1) - torch.logsumexp(others, -1))
    return TokenStats(target_log_probs, entropy, log1mp)


def linear_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, softcap: float = 0.0
) -> Tensor:
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    return logits / temperature


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float = 0.0,
) -> TokenStats:
    """Computes `eepo_kernels.linear_logprobs` with all the logits [N, V] in memory; a softcap of 0 is none."""
    return token_stats(linear_logits(hidden, weight, bias, temperature, softcap), targets)


def fused_linear_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    loss_fn: LossFn,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float = 0.0,
) -> tuple[Tensor, TokenStats]:
    """Computes `eepo_kernels.fused_linear_loss` with all the logits [N, V] in memory and autograd's gradients."""
    stats = linear_logprobs(hidden, weight, targets, bias=bias, temperature=temperature, softcap=softcap)
    detached = TokenStats(stats.logprobs.detach(), stats.entropy.detach(), stats.log1mp.detach())
    rows = torch.arange(targets.numel(), device=targets.device)
    loss = loss_fn(stats._replace(history=detached), rows).sum()
    return loss, detached


def stochastic_round(x: Tensor, dtype: torch.dtype, uniform: Tensor) -> Tensor:
    """Rounds `x` (float64) to one of its two neighbours in `dtype`, the upper one in magnitude where `uniform` [0, 1)
    is below the distance to the lower one in units of their gap: unbiased. Finite values inside the range only."""
    nearest = x.to(dtype)
    too_far = nearest.double().abs() > x.abs()
    lower = torch.where(too_far, torch.nextafter(nearest, torch.zeros_like(nearest)), nearest)
    upper = torch.nextafter(lower, torch.where(x < 0, -torch.inf, torch.inf).to(dtype))
    gap = upper.double() - lower.double()
    fraction = (x - lower.double()) / gap
    return torch.where(uniform < fraction, upper, lower)
