"""A scale and a soft cap between head and softmax, as Gemma, Granite and Cohere have them: against float64.

PyTorch's path and Triton's interpreter (fp32 alone) on a CPU; on CUDA every dtype, under the marker `gpu`.
"""

import math

import pytest
import torch
from eepo_kernels import fused_linear_loss, linear_logprobs, reference

CPU = [("cpu", "torch", torch.float32)] + ([] if torch.cuda.is_available() else [("cpu", "triton", torch.float32)])
GPU = [
    pytest.param(("cuda", backend, dtype), marks=pytest.mark.gpu)
    for backend in ("torch", "triton")
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
]
everywhere = pytest.mark.parametrize("place", [*CPU, *GPU], ids=lambda place: "-".join(map(str, place)))


def loss_fn(stats, rows):
    return torch.where(rows % 3 == 0, 0.0, stats.logprobs * 0.7 - 0.2 * stats.entropy + 0.1 * stats.log1mp)


def inputs(size, bias, seed=0):
    """Leaves whose logits reach about `size`, beside a word that no row can sample."""
    g = torch.Generator().manual_seed(seed)
    n, d, v = 13, 16, 2101
    hidden = torch.randn(n, d, generator=g, dtype=torch.float64) * size / 3
    weight = torch.randn(v, d, generator=g, dtype=torch.float64) / math.sqrt(d)
    b = torch.randn(v, generator=g, dtype=torch.float64) if bias else None
    return [hidden, weight, b], torch.randint(0, v, (n,), generator=g)


def plain(hidden, weight, targets, bias, scale, cap, temperature):
    """The statistics as a model writes them, from all the logits."""
    logits = hidden @ weight.T if bias is None else hidden @ weight.T + bias
    logits = logits * scale
    logits = logits if cap is None else torch.tanh(logits / cap) * cap
    return reference.token_stats(logits / temperature, targets)


def results(tensors, targets, compute):
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    loss, stats = compute(*leaves, targets)
    grads = torch.autograd.grad(loss, [leaf for leaf in leaves if leaf is not None])
    return [t.detach().double().cpu() for t in (*stats[:3], loss, *grads)]


def worst(found, truth):
    return max(float((f - t).norm() / t.norm().clamp_min(1e-30)) for f, t in zip(found, truth, strict=True))


@everywhere
@pytest.mark.parametrize("size, bias", [(0.5, False), (30, True), (300, False)])
@pytest.mark.parametrize("scale, cap", [(1.0, 30.0), (0.0625, None), (0.25, 50.0)])
def test_cap_and_scale_are_the_models(place, size, bias, scale, cap):
    """Logits far below the cap, around it and ten times beyond, where the gradient is all but gone."""
    device, backend, dtype = place
    exact, targets = inputs(size, bias)
    held = [None if t is None else t.to(dtype) for t in exact]
    exact = [None if t is None else t.double() for t in held]

    def by_hand(hidden, weight, b, targets):
        stats = plain(hidden, weight, targets, b, scale, cap, 0.8)
        return loss_fn(stats, torch.arange(len(targets))).sum(), stats

    options = {"temperature": 0.8, "logit_scale": scale, "softcap": cap}

    def fused(hidden, weight, b, targets, backend=backend):
        return fused_linear_loss(
            hidden, weight, targets, loss_fn, bias=b, chunk_bytes=200_000, backend=backend, **options
        )

    def recomputed(hidden, weight, b, targets):
        stats = linear_logprobs(hidden, weight, targets, bias=b, chunk_bytes=200_000, backend=backend, **options)
        return loss_fn(stats, torch.arange(len(targets), device=targets.device)).sum(), stats

    truth = results(exact, targets, by_hand)
    allowed = worst(results(held, targets, by_hand), truth)
    there = [None if t is None else t.to(device) for t in held]
    for compute in (fused, recomputed):
        assert worst(results(there, targets.to(device), compute), truth) <= 2 * allowed + 2e-6
    assert worst(results(held, targets, lambda *a: fused(*a, backend="reference")), truth) <= 2 * allowed + 2e-6
    if size > 1:  # the control: without them it is another distribution
        options["softcap"], options["logit_scale"] = None, 1.0
        assert worst(results(there, targets.to(device), fused), truth) > 0.1


@everywhere
def test_a_capped_impossible_word_is_possible(place):
    """A logit of -inf is -c behind the cap, as in the model."""
    device, backend, dtype = place
    bias = torch.zeros(8)
    bias[3] = -math.inf
    tensors = [t.to(device, dtype) for t in (torch.ones(2, 4), torch.zeros(8, 4), bias)]
    targets = torch.tensor([3, 1], device=device)
    found = linear_logprobs(tensors[0], tensors[1], targets, bias=tensors[2], softcap=2.0, backend=backend).logprobs
    total = math.log(7 + math.exp(-2))
    assert found.tolist() == pytest.approx([-2 - total, -total], abs=1e-5)


@pytest.mark.parametrize(
    "option", [{"softcap": 0.0}, {"softcap": -1.0}, {"logit_scale": 0.0}, {"logit_scale": math.nan}]
)
def test_a_cap_or_scale_that_cannot_be_is_named(option):
    (hidden, weight, _), targets = inputs(1, False)
    with pytest.raises(ValueError, match=rf"{next(iter(option))}: expected a number above 0, found"):
        linear_logprobs(hidden, weight, targets, **option)
