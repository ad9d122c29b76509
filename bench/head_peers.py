"""Has the fused head's peers, which users would take instead, as calls: (hidden, weight, targets, weights) -> loss.

Two tasks. `entropy`: log-prob and entropy of every token, any upstream gradient on both; the loss is
Σ_t w_t (-log p_t - ENTROPY_COEF · H_t). `nll`: cross-entropy only, which more libraries have; Σ_t w_t (-log p_t), w
equal for all tokens, and left-out tokens marked as the library wants them marked.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch
from eepo_kernels import fused_linear_loss
from torch import Tensor
from torch.nn.functional import cross_entropy

ENTROPY_COEF = 0.01
IGNORE = -100
SURROGATE = ("liger grpo",)
"""Peers whose loss has the NLL's gradient and another value."""
Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class NotHere(Exception):
    """Says why this peer cannot run here."""


def _need_gpu(why: str) -> None:
    if not torch.cuda.is_available():
        raise NotHere(why)


def _naive_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    logp = torch.log_softmax((hidden @ weight.T).float(), -1)
    entropy = -(logp.exp() * logp).sum(-1)
    return (weights * (-logp.gather(1, targets[:, None]).squeeze(1) - ENTROPY_COEF * entropy)).sum()


def _naive_nll(hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    return (weights * cross_entropy((hidden @ weight.T).float(), targets, reduction="none")).sum()


def naive_entropy() -> Loss:
    return _naive_entropy


def naive_nll() -> Loss:
    return _naive_nll


def compiled_entropy() -> Loss:
    return torch.compile(_naive_entropy)


def compiled_nll() -> Loss:
    return torch.compile(_naive_nll)


def eepo_entropy() -> Loss:
    def loss(hidden, weight, targets, weights):
        def loss_fn(stats, rows):
            return weights[rows] * (-stats.logprobs - ENTROPY_COEF * stats.entropy)

        return fused_linear_loss(hidden, weight, targets, loss_fn)[0]

    return loss


def eepo_nll() -> Loss:
    def loss(hidden, weight, targets, weights):
        return fused_linear_loss(hidden, weight, targets, lambda stats, rows: weights[rows] * -stats.logprobs)[0]

    return loss


def trl_entropy() -> Loss:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    def loss(hidden, weight, targets, weights):
        logp, entropy, *_ = ChunkedLogProbFunction.apply(
            hidden, weight, None, targets, 1.0, 32_768, None, 1.0, ("entropy",)
        )
        return (weights * (-logp - ENTROPY_COEF * entropy)).sum()

    return loss


def unsloth_entropy() -> Loss:
    # by its file: the package's own import asks for unsloth itself, and that for a GPU
    package = importlib.util.find_spec("unsloth_zoo")
    if package is None:
        raise NotHere("not installed")
    file = Path(package.origin).parent / "fused_losses" / "fused_linear.py"
    spec = importlib.util.spec_from_file_location("unsloth_fused_linear", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    fused_linear_logprobs = module.fused_linear_logprobs

    def loss(hidden, weight, targets, weights):
        logp, entropy = fused_linear_logprobs(hidden, weight, targets, return_entropy=True)
        return (weights * (-logp - ENTROPY_COEF * entropy)).sum()

    return loss


def verl_entropy() -> Loss:
    _need_gpu("CUDA only")
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    def loss(hidden, weight, targets, weights):
        logp, entropy = linear_cross_entropy(hidden, weight, targets, 1.0, "none")
        return (weights * (-logp - ENTROPY_COEF * entropy)).sum()

    return loss


def _marked(targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Marks left-out tokens, and returns the one weight of all others."""
    return torch.where(weights > 0, targets, IGNORE), weights.max()


def liger_nll() -> Loss:
    _need_gpu("CUDA only")
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    def loss(hidden, weight, targets, weights):
        marked, scale = _marked(targets, weights)
        found = LigerFusedLinearCrossEntropyFunction.apply(
            hidden, weight, marked, None, None, IGNORE, 0.0, 0.0, "sum", None, False, torch.float32
        )
        return (found[0] if isinstance(found, tuple) else found) * scale

    return loss


def liger_grpo_nll() -> Loss:
    """Runs Liger's chunked GRPO with advantage 1 and no old log-probs: the gradient of the NLL's token mean."""
    _need_gpu("compiled for CUDA")
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    op = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, loss_type="bnpo", chunk_size=1)

    def loss(hidden, weight, targets, weights):
        sequences = 8
        mask = (weights > 0).view(sequences, -1).float()
        shaped = hidden.view(sequences, -1, hidden.shape[1])
        advantages = torch.ones(sequences, device=hidden.device)
        found = op(shaped, weight, targets.view(sequences, -1), mask, advantages)
        return (found[0] if isinstance(found, tuple) else found) * weights.sum()

    return loss


def quack_nll() -> Loss:
    _need_gpu("CUDA only")
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    def loss(hidden, weight, targets, weights):
        marked, scale = _marked(targets, weights)
        return chunked_linear_cross_entropy(hidden, weight, marked, reduction="sum") * scale

    return loss


def cut_cross_entropy_nll() -> Loss:
    _need_gpu("CUDA only")
    from cut_cross_entropy import linear_cross_entropy

    def loss(hidden, weight, targets, weights):
        marked, scale = _marked(targets, weights)
        return linear_cross_entropy(hidden, weight, marked, reduction="sum", impl="cce") * scale

    return loss


TASKS: dict[str, dict[str, Callable[[], Loss]]] = {
    "entropy": {
        "eepo": eepo_entropy,
        "naive": naive_entropy,
        "torch.compile": compiled_entropy,
        "trl": trl_entropy,
        "unsloth": unsloth_entropy,
        "verl": verl_entropy,
    },
    "nll": {
        "eepo": eepo_nll,
        "naive": naive_nll,
        "torch.compile": compiled_nll,
        "liger": liger_nll,
        "liger grpo": liger_grpo_nll,
        "quack": quack_nll,
        "cut-cross-entropy": cut_cross_entropy_nll,
    },
}
