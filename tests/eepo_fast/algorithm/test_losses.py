"""Losses against plain references written from the paper's Eq. 2 to 10, token by token."""

import math

import pytest
import torch
from eepo_kernels import TokenStats, fused_linear_loss
from torch.nn.functional import log_softmax

from eepo_fast.algorithm.losses import (
    PolicyTokens,
    clipped_log1mp,
    gate_open,
    low_variance_kl,
    nll_loss,
    policy_loss,
    reinforce_loss,
    unlearning_loss,
)
from eepo_fast.algorithm.policy_losses import LOSSES


def plain_gate(entropies, alpha, window):
    """One response, by the definition: mean over the last m tokens, the window cut off at the start."""
    result = []
    for t in range(len(entropies)):
        last = entropies[max(0, t - window + 1) : t + 1]
        result.append(sum(last) / len(last) < alpha)
    return result


@pytest.mark.parametrize("window", [1, 2, 3, 10])
@pytest.mark.parametrize("lengths", [[5], [1], [3, 1, 4], [2, 2, 2, 7]])
def test_gate_runs_inside_each_response(window, lengths):
    g = torch.Generator().manual_seed(sum(lengths))
    entropies = [(torch.rand(n, generator=g) * 0.6).tolist() for n in lengths]
    flat = torch.tensor([e for part in entropies for e in part])
    starts = torch.tensor([sum(lengths[:i]) for i, n in enumerate(lengths) for _ in range(n)])
    expected = [is_open for e in entropies for is_open in plain_gate(e, 0.3, window)]
    assert gate_open(flat, torch.arange(len(flat)), starts, 0.3, window).tolist() == expected
    by_chunk = [gate_open(flat[: i + 1], torch.tensor([i]), starts, 0.3, window).item() for i in range(len(flat))]
    assert by_chunk == expected


def test_gate_at_the_threshold_is_closed():
    entropy = torch.tensor([0.25, 0.25])
    assert gate_open(entropy, torch.arange(2), torch.zeros(2, dtype=torch.int64), 0.25, 3).tolist() == [False, False]


def log1mp_of(p):
    return torch.log1p(-torch.tensor(p, dtype=torch.float64)).requires_grad_()


@pytest.mark.parametrize(
    "p, mode, value, slope",
    [
        (0.5, "literal", math.log(0.5), 1.0),
        (0.99995, "literal", math.log(1e-4), 0.0),
        (0.99995, "saturate", math.log(1e-4), 1.0),
        (1e-5, "literal", math.log1p(-1e-4), 0.0),
        (1e-5, "saturate", math.log1p(-1e-4), 0.0),
    ],
)
def test_clip_of_the_complementary_loss(test_config, p, mode, value, slope):
    log1mp = log1mp_of(p)
    clipped = clipped_log1mp(log1mp, test_config(eepo={"clip_gradient": mode}).eepo)
    (grad,) = torch.autograd.grad(clipped, log1mp)
    assert clipped.item() == pytest.approx(value, rel=1e-12) and grad.item() == slope


@pytest.mark.parametrize("loss", ["complementary", "nll"])
@pytest.mark.parametrize("gate", ["token", "always"])
def test_unlearning_loss_and_gradient_against_the_formula(test_config, loss, gate):
    """Logits as parameters (hidden = one-hot rows), two responses of 4 and 3 tokens, float64."""
    config = test_config(eepo={"loss": loss, "gate": gate, "alpha": 0.9}).eepo
    g = torch.Generator().manual_seed(3)
    logits = (torch.randn(7, 5, generator=g, dtype=torch.float64) * 3).requires_grad_()
    targets = torch.tensor([0, 1, 2, 3, 4, 0, 1])
    lengths, temperature = [4, 3], 0.9
    weights = torch.tensor([1 / (n * 2) for n in lengths for _ in range(n)], dtype=torch.float64)
    starts = torch.tensor([0] * 4 + [4] * 3)
    loss_fn = unlearning_loss(config, starts, weights)
    found, _ = _fused_on_logits(logits, targets, loss_fn, temperature)
    (found_grad,) = torch.autograd.grad(found, logits)

    log_p = log_softmax(logits / temperature, -1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    expected = torch.zeros((), dtype=torch.float64)
    for start, n in zip([0, 4], lengths, strict=True):
        gates = plain_gate(entropy[start : start + n].tolist(), config.alpha, config.window)
        for t in range(n):
            p = log_p[start + t, targets[start + t]].exp()
            value = torch.log(1 - p.clamp(1e-4, 1 - 1e-4)) if loss == "complementary" else -torch.log(p)
            if gate == "always" or gates[t]:
                expected = expected + value / n / 2
    (expected_grad,) = torch.autograd.grad(expected, logits)
    assert found.item() == pytest.approx(expected.item(), rel=1e-9) and found.item() != 0
    assert torch.allclose(found_grad, expected_grad, rtol=1e-9, atol=1e-12)


def _fused_on_logits(logits, targets, loss_fn, temperature):
    """The fused head with the identity as weight, so that `hidden` is the logits; three rows a chunk."""
    v = logits.shape[1]
    eye = torch.eye(v, dtype=logits.dtype)
    return fused_linear_loss(logits, eye, targets, loss_fn, temperature=temperature, chunk_bytes=3 * 2 * v * 8)


def make_tokens(n, **changes):
    g = torch.Generator().manual_seed(1)
    values = dict(
        advantages=torch.tensor([1.5, -0.7, 0.0] * n, dtype=torch.float64)[:n],
        old_logprobs=-torch.rand(n, generator=g).double() * 2,
        on_policy=torch.arange(n) % 4 == 0,
        sampler=torch.full((n,), math.inf),
        weights=torch.full((n,), 1 / n, dtype=torch.float64),
        starts=torch.zeros(n, dtype=torch.int64),
        ref_logprobs=-torch.rand(n, generator=g).double() * 2,
    )
    return PolicyTokens(**{**values, **changes})


@pytest.mark.parametrize("clip_high", [0.2, 0.28])
def test_grpo_loss_and_gradient_against_the_formula(test_config, clip_high):
    n = 24
    config = test_config(grpo={"clip_high": clip_high, "kl_coef": 0.1, "entropy_coef": 0.05}).grpo
    g = torch.Generator().manual_seed(2)
    logits = torch.randn(n, 6, generator=g, dtype=torch.float64).requires_grad_()
    targets = torch.randint(0, 6, (n,), generator=g)
    tokens = make_tokens(n)
    tokens.weights[5] = 0.0
    found, _ = _fused_on_logits(logits, targets, policy_loss(config, tokens), 1.0)
    (found_grad,) = torch.autograd.grad(found, logits)

    log_p = log_softmax(logits, -1)
    expected = torch.zeros((), dtype=torch.float64)
    hit = set()
    for t in range(n):
        if t == 5:
            continue
        lp = log_p[t, targets[t]]
        old = lp.detach() if t % 4 == 0 else tokens.old_logprobs[t]
        ratio, a = (lp - old).exp(), tokens.advantages[t]
        low, high = 1 - config.clip_low, 1 + config.clip_high
        clipped = min(max(ratio.item(), low), high)
        inside = ratio < high if a > 0 else ratio > low
        objective = ratio * a if inside else clipped * a
        hit.add("low" if ratio < low else "high" if ratio > high else "inside")
        d = tokens.ref_logprobs[t] - lp
        kl = d.exp() - d - 1
        entropy = -(log_p[t].exp() * log_p[t]).sum()
        expected = expected + (-objective + 0.1 * kl - 0.05 * entropy) / n
    (expected_grad,) = torch.autograd.grad(expected, logits)
    assert hit == {"low", "high", "inside"}
    assert found.item() == pytest.approx(expected.item(), rel=1e-9)
    assert torch.allclose(found_grad, expected_grad, rtol=1e-9, atol=1e-12)


def test_zero_advantages_give_a_finite_loss_and_no_gradient(test_config):
    logits = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    tokens = make_tokens(6, advantages=torch.zeros(6).double(), ref_logprobs=None)
    loss, _ = _fused_on_logits(logits, torch.zeros(6, dtype=torch.int64), policy_loss(test_config().grpo, tokens), 1.0)
    (grad,) = torch.autograd.grad(loss, logits)
    assert loss.item() == 0 and grad.abs().max() == 0


def test_a_left_out_token_cannot_spoil_the_sum(test_config):
    tokens = make_tokens(4, ref_logprobs=None)
    tokens.weights[1], tokens.old_logprobs[1], tokens.advantages[1] = 0.0, math.nan, math.nan
    stats = TokenStats(*(torch.full((4,), -0.5, dtype=torch.float64) for _ in range(3)))
    losses = policy_loss(test_config().grpo, tokens)(stats, torch.arange(4))
    assert losses.isfinite().all() and losses[1] == 0


def test_low_variance_kl_is_never_negative_and_never_overflows():
    d = torch.tensor([-200.0, -1.0, 0.0, 1.0, 200.0])
    kl = low_variance_kl(-d, torch.zeros(5))
    assert torch.all(kl >= 0) and kl[2] == 0 and kl.isfinite().all()


def test_low_variance_kl_is_exact_where_it_is_small():
    """exp(d) - d - 1 in fp32 is noise there."""
    d = torch.logspace(-4, 0, 50) * torch.tensor([1.0, -1.0]).repeat(25)
    expected = torch.expm1(d.double()) - d.double()
    kl = low_variance_kl(-d, torch.zeros(50))
    assert torch.allclose(kl.double(), expected, rtol=1e-2, atol=0)
    assert ((d.exp() - d - 1 - expected) / expected).abs().max() > 0.5, "the control"


def test_nll_and_reinforce_against_the_formula(test_config):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(12, 6, generator=g, dtype=torch.float64).requires_grad_()
    weight = torch.randn(20, 6, generator=g, dtype=torch.float64)
    targets = torch.randint(0, 20, (12,), generator=g)
    advantages, weights = torch.randn(12, generator=g).double(), torch.rand(12, generator=g).double()
    weights[4] = 0
    logp = log_softmax(hidden @ weight.T, -1).gather(1, targets[:, None]).squeeze(1)
    expected = {nll_loss(weights): (-weights * logp).sum(), reinforce_loss(advantages, weights): None}
    expected[list(expected)[1]] = (-weights * advantages * logp).sum()
    for loss_fn, value in expected.items():
        found, _ = fused_linear_loss(hidden, weight, targets, loss_fn, chunk_bytes=3000)
        assert found.item() == pytest.approx(value.item(), rel=1e-9)
        pair = [torch.autograd.grad(x, hidden, retain_graph=True)[0] for x in (found, value)]
        assert torch.allclose(*pair, atol=1e-12)


def test_reinforce_is_grpo_on_policy(test_config):
    """At a ratio of 1 the two have one gradient, clip or not."""
    hidden = torch.randn(9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    weight, targets = torch.randn(7, 4, dtype=torch.float64), torch.arange(9) % 7
    advantages, weights = torch.linspace(-1, 1, 9), torch.full((9,), 1 / 9)
    tokens = PolicyTokens(
        advantages,
        torch.zeros(9),
        torch.ones(9, dtype=torch.bool),
        torch.full((9,), math.inf),
        weights,
        torch.zeros(9, dtype=torch.int64),
    )
    grpo = test_config(grpo={"kl_coef": 0.0, "entropy_coef": 0.0}).grpo
    losses = (policy_loss(grpo, tokens), reinforce_loss(advantages, weights))
    grads = [torch.autograd.grad(fused_linear_loss(hidden, weight, targets, f)[0], hidden)[0] for f in losses]
    assert torch.allclose(*grads, atol=1e-12) and grads[0].abs().sum() > 0


@pytest.mark.parametrize("name", ["nll", "reinforce", *LOSSES])
@pytest.mark.parametrize("poison", ["hidden", "advantage", "old nan", "old -inf", "old far", "ref"])
def test_a_left_out_token_poisons_no_gradient(test_config, name, poison):
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(20, 6, generator=g), torch.randn(9, 6, generator=g).requires_grad_()
    targets, advantages, weights = torch.arange(20) % 9, torch.randn(20, generator=g), torch.full((20,), 0.05)
    old, ref = torch.full((20,), -2.0), torch.full((20,), -2.0)
    weights[5] = 0
    column = {"hidden": hidden, "advantage": advantages, "ref": ref}.get(poison, old)
    column[5] = {"old -inf": -math.inf, "old far": -200.0}.get(poison, math.nan)
    hidden.requires_grad_()
    none, starts = torch.zeros(20, dtype=torch.bool), torch.arange(20) // 10 * 10
    tokens = PolicyTokens(advantages, old, none, torch.full((20,), math.inf), weights, starts, ref)
    loss = {"loss": name} if name in LOSSES else {}
    config = test_config(eepo={"enabled": False}, grpo={"kl_coef": 0.1, "entropy_coef": 0.1, **loss}).grpo
    loss_fn = {
        "nll": nll_loss(weights),
        "reinforce": reinforce_loss(advantages, weights),
    }.get(name, policy_loss(config, tokens))
    loss, _ = fused_linear_loss(hidden, weight, targets, loss_fn)
    loss.backward()
    assert loss.isfinite() and weight.grad.isfinite().all() and torch.equal(hidden.grad[5], torch.zeros(6))
    assert hidden.grad[4].abs().sum() > 0
