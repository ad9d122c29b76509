"""What the fused head costs and how it behaves inside programs: GEMMs, memory, autocast, compile, checkpointing."""

import logging

import pytest
import torch
from eepo_kernels import fused_linear_loss, linear_logprobs, linear_loss, reference
from torch.nn.functional import cross_entropy, embedding
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

N, D, V = 60, 16, 200
BACKENDS = ["torch", "triton"]
both = pytest.mark.parametrize("backend", BACKENDS)


def make(dtype=torch.float32, n=N, d=D, v=V, device="cpu"):
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(n, d, generator=g), torch.randn(v, d, generator=g) / d**0.5
    targets = torch.randint(0, v, (n,), generator=g).to(device)
    return hidden.to(device, dtype).requires_grad_(), weight.to(device, dtype).requires_grad_(), targets


def nll(stats, rows):
    return -stats.logprobs


def share_of_rows(f):
    """NLL on a share f of the rows, spread over all of them."""

    def loss_fn(stats, rows):
        kept = (rows * 7919) % 100 < 100 * f
        return torch.where(kept, -stats.logprobs, 0.0)

    return loss_fn


@both
@pytest.mark.parametrize("f", [0.0, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("budget", [1 << 30, 20_000])
def test_gemm_count_is_one_plus_two_f(backend, f, budget):
    hidden, weight, targets = make(n=100)
    with FlopCounterMode(display=False) as counter:
        fused_linear_loss(hidden, weight, targets, share_of_rows(f), backend=backend, chunk_bytes=budget)[0].backward()
    gemm = 2 * 100 * D * V
    # The row statistics of the PyTorch path are a product of [1, V] and [V, 1] a row.
    row_products = 2 * 100 * V if backend == "torch" else 0
    assert counter.get_total_flops() - row_products == pytest.approx((1 + 2 * f) * gemm)


@both
def test_scoring_costs_one_gemm_and_its_gradient_three_for_the_rows_that_have_one(backend, monkeypatch):
    """The operator hides its products from the counter, so the rows that go through the head are counted."""
    counted = []
    real = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, **kwargs: counted.append(len(a)) or real(a, b, **kwargs))
    hidden, weight, targets = make(n=100)
    stats = linear_logprobs(hidden, weight, targets, backend=backend)
    assert sum(counted) == 100
    torch.where(torch.arange(100) < 30, stats.entropy, 0.0).sum().backward()
    assert sum(counted) == 100 + 30 + 30  # logits again and dX; dW is an addmm


@both
@pytest.mark.parametrize("budget", [1 << 30, 20_000])
def test_packed_rows_find_their_places(backend, budget):
    """Rows of all chunks, a few of each, end up in one product: dX must land where each came from."""
    tensors, truth = [], []
    for op, kwargs in (
        (fused_linear_loss, {"backend": backend, "chunk_bytes": budget}),
        (reference.fused_linear_loss, {}),
    ):
        hidden, weight, targets = make(torch.float32 if kwargs else torch.float64)
        loss, _ = op(hidden, weight, targets, share_of_rows(0.3), **kwargs)
        (tensors if kwargs else truth).extend(torch.autograd.grad(loss, (hidden, weight)))
    for found, expected in zip(tensors, truth, strict=True):
        assert torch.allclose(found.double(), expected, atol=1e-6)
    zero_rows = truth[0].abs().sum(1) == 0
    assert zero_rows.any() and torch.equal(tensors[0][zero_rows], torch.zeros_like(tensors[0][zero_rows]))


def test_a_masked_token_costs_nothing_even_when_it_is_nan():
    hidden, weight, targets = make()
    with torch.no_grad():
        hidden[5] = torch.nan
    loss, stats = fused_linear_loss(hidden, weight, targets, lambda s, r: torch.where(r == 5, 0.0, -s.logprobs))
    loss.backward()
    assert stats.logprobs[5].isnan() and weight.grad.isfinite().all() and torch.equal(hidden.grad[5], torch.zeros(D))


@pytest.mark.parametrize("f", [1.0, 0.3])
@pytest.mark.parametrize("budget_mib", [4, 16])
def test_memory_stays_in_the_budget(count_allocations, f, budget_mib):
    """Beside the outputs dX and dW, whatever N is; plain logits take more than ten times as much."""
    n, d, v = 700, 8, 30_001
    hidden, weight, targets = make(n=n, d=d, v=v)
    budget = budget_mib << 20

    def fused():
        fused_linear_loss(hidden, weight, targets, share_of_rows(f), chunk_bytes=budget)[0].backward()

    outputs = (n * d + v * d) * 4
    found = count_allocations(fused)
    assert found.peak_bytes - outputs <= 1.05 * budget
    assert found.peak_bytes - outputs > 0.3 * budget, "the budget should be used"
    hidden.grad = weight.grad = None
    plain = count_allocations(lambda: cross_entropy(hidden @ weight.T, targets).backward())
    assert plain.largest_bytes >= n * v * 4


def test_scoring_stays_in_the_budget(count_allocations):
    hidden, weight, targets = make(n=700, d=8, v=30_001)
    with torch.no_grad():
        found = count_allocations(lambda: linear_logprobs(hidden, weight, targets, chunk_bytes=8 << 20))
    assert 4 << 20 < found.peak_bytes <= 1.05 * (8 << 20)


@pytest.mark.gpu
@pytest.mark.parametrize("f", [1.0, 0.2])
def test_memory_on_a_gpu(f):
    """The size that matters: 32,768 tokens of a vocabulary of 151,936, in the default budget."""
    n, d, v = 32_768, 2048, 151_936
    hidden = torch.randn(n, d, device="cuda", dtype=torch.bfloat16).requires_grad_()
    weight = (torch.randn(v, d, device="cuda", dtype=torch.bfloat16) / 45).requires_grad_()
    targets = torch.randint(0, v, (n,), device="cuda")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    kept = fused_linear_loss(hidden, weight, targets, share_of_rows(f))
    forward = torch.cuda.max_memory_allocated() - before
    outputs = n * d * 2 + v * d * 4  # dX, and dW in fp32
    assert kept[0].isfinite() and forward - outputs <= 1.05 * (3 << 30)


@both
def test_the_gradient_scales_with_the_upstream_one_and_is_used_once(backend):
    hidden, weight, targets = make()
    loss, _ = fused_linear_loss(hidden, weight, targets, nll, backend=backend)
    (once,) = torch.autograd.grad(loss, weight, retain_graph=True)
    once = once.clone()
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation|second time"):
        torch.autograd.grad(loss, weight)
    loss, _ = fused_linear_loss(hidden, weight, targets, nll, backend=backend)
    (half,) = torch.autograd.grad(loss * 0.5, weight)
    assert torch.allclose(half, once / 2)


def test_tied_embeddings_get_one_gradient():
    _, weight, targets = make()
    inputs = torch.arange(N) % V

    def loss_with(op, weight):
        return op(embedding(inputs, weight).tanh(), weight, targets, nll)[0]

    (found,) = torch.autograd.grad(loss_with(fused_linear_loss, weight), weight)
    exact = weight.detach().double().requires_grad_()
    (truth,) = torch.autograd.grad(loss_with(reference.fused_linear_loss, exact), exact)
    assert torch.allclose(found.double(), truth, atol=1e-6)


@both
def test_autocast_multiplies_in_its_dtype_and_keeps_the_masters_gradient(backend):
    """hidden in bf16, as the model's last layer gives it; the head's weight and its gradient in fp32."""
    hidden, weight, targets = make()
    low = hidden.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss, stats = fused_linear_loss(low, weight, targets, nll, backend=backend)
        scored = linear_logprobs(low, weight, targets, backend=backend)
        loss.backward()
    exact_weight = weight.detach().bfloat16().double().requires_grad_()
    exact_hidden = low.detach().double().requires_grad_()
    truth, _ = reference.fused_linear_loss(exact_hidden, exact_weight, targets, nll)
    truth.backward()
    assert stats.logprobs.dtype == weight.grad.dtype == torch.float32 and low.grad.dtype == torch.bfloat16
    assert torch.equal(stats.logprobs, scored.logprobs)
    assert loss.item() == pytest.approx(truth.item(), rel=1e-6)
    # Nothing in between was rounded to 16 bits: products inside must not fall under autocast again.
    assert torch.allclose(weight.grad.double(), exact_weight.grad, atol=1e-5)
    assert torch.allclose(low.grad.double(), exact_hidden.grad, rtol=2**-8, atol=1e-6)


def test_without_autocast_two_dtypes_are_refused():
    hidden, weight, targets = make()
    with pytest.raises(ValueError, match=r"one floating dtype, found torch.bfloat16 and torch.float32; cast one"):
        linear_logprobs(hidden.bfloat16(), weight, targets)


def test_scoring_compiles_into_one_graph():
    hidden, weight, targets = make()

    def score(hidden, weight):
        stats = linear_logprobs(hidden * 2, weight, targets, temperature=0.7)
        return (stats.logprobs + stats.entropy).sum()

    expected = torch.autograd.grad(score(hidden, weight), (hidden, weight))
    compiled = torch.compile(score, backend="aot_eager", fullgraph=True)
    found = torch.autograd.grad(compiled(hidden, weight), (hidden, weight))
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_the_fused_loss_is_a_graph_break():
    hidden, weight, targets = make()

    def loss(hidden, weight):
        return fused_linear_loss((hidden * 2).tanh(), weight, targets, nll)[0] * 3

    expected = torch.autograd.grad(loss(hidden, weight), (hidden, weight))
    found = torch.autograd.grad(torch.compile(loss, backend="aot_eager")(hidden, weight), (hidden, weight))
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    torch.compiler.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(loss, backend="aot_eager", fullgraph=True)(hidden, weight)


@both
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_activation_checkpointing(backend, use_reentrant, fused):
    hidden, weight, targets = make()

    def loss(hidden, weight):
        hidden = hidden.sin()
        if fused:
            return fused_linear_loss(hidden, weight, targets, nll, backend=backend)[0]
        return -linear_logprobs(hidden, weight, targets, backend=backend).logprobs.sum()

    expected = torch.autograd.grad(loss(hidden, weight), (hidden, weight))
    checkpoint(loss, hidden, weight, use_reentrant=use_reentrant).backward()
    assert torch.equal(hidden.grad, expected[0]) and torch.equal(weight.grad, expected[1])


@both
def test_expanded_upstream_gradients(backend):
    """`.sum()` hands back one number seen [N] times, with stride 0."""
    hidden, weight, targets = make()
    (found,) = torch.autograd.grad(linear_logprobs(hidden, weight, targets, backend=backend).logprobs.sum(), weight)
    (expected,) = torch.autograd.grad(-fused_linear_loss(hidden, weight, targets, nll)[0], weight)
    assert torch.allclose(found, expected, atol=1e-6)


def test_auto_says_once_what_it_chose(caplog):
    hidden, weight, targets = make()
    linear_loss._auto_backend.cache_clear()
    with caplog.at_level(logging.INFO, logger="eepo_kernels"):
        for _ in range(3):
            linear_logprobs(hidden, weight, targets)
    assert [r.getMessage() for r in caplog.records] == ["fused head: backend torch (cpu tensors)"]


def test_a_backend_that_cannot_run_is_refused(monkeypatch):
    hidden, weight, targets = make()
    with pytest.raises(ValueError, match="float64; use torch"):
        linear_logprobs(hidden.double(), weight.double(), targets, backend="triton")
    with pytest.raises(ValueError, match=r"backend: expected one of auto, triton, torch, reference, found 'cuda'"):
        linear_logprobs(hidden, weight, targets, backend="cuda")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="backend: triton needs CUDA tensors, found cpu"):
        linear_logprobs(hidden, weight, targets, backend="triton")
    with pytest.raises(ValueError, match="chunk_bytes: expected a number of bytes above 0"):
        linear_logprobs(hidden, weight, targets, chunk_bytes=0)
