"""What the fused head costs and how it behaves inside programs: GEMMs, memory, autocast, compile, checkpointing."""

import logging

import pytest
import torch
from eepo_kernels import fused_linear_loss, linear_logprobs, linear_loss, reference
from torch.nn.functional import cross_entropy, embedding
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

N, D, V = 60, 16, 200
BACKENDS = ["torch"] if torch.cuda.is_available() else ["torch", "triton"]  # as in test_linear_loss.py
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
    found = counter.get_total_flops()
    filled_up = 2 * 3 * 2 * D * V  # the last rows go through both gradient GEMMs in a multiple of 4
    assert (1 + 2 * f) * gemm <= found <= (1 + 2 * f) * gemm + filled_up


@both
def test_scoring_is_one_gemm_and_gradients_three_for_their_rows(backend, monkeypatch):
    """The operator hides its products from the counter, so the rows that go through the head are counted."""
    counted = []
    real = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, **kwargs: counted.append(len(a)) or real(a, b, **kwargs))
    hidden, weight, targets = make(n=100)
    stats = linear_logprobs(hidden, weight, targets, backend=backend)
    assert sum(counted) == 100
    torch.where(torch.arange(100) < 30, stats.entropy, 0.0).sum().backward()
    assert sum(counted) == 100 + 30 + 32  # logits again and dX, filled up to a multiple of 4; dW is an addmm


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


@both
@pytest.mark.parametrize("f", [1.0, 0.3])
@pytest.mark.parametrize("share", [10, 4])
def test_memory_stays_in_the_budget(count_allocations, backend, f, share):
    """Beside the outputs dX and dW, whatever N is; plain logits take several times as much."""
    n, d, v = (700, 8, 30_001) if backend == "torch" else (240, 8, 5_001)  # the interpreter is slow
    hidden, weight, targets = make(n=n, d=d, v=v)
    budget = n * v * 4 // share

    def fused():
        fused_linear_loss(hidden, weight, targets, share_of_rows(f), chunk_bytes=budget, backend=backend)[0].backward()

    outputs = (n * d + v * d) * 4
    found = count_allocations(fused)
    assert found.peak_bytes - outputs <= 1.05 * budget
    assert found.peak_bytes - outputs > 0.5 * budget, "the budget should be used"
    hidden.grad = weight.grad = None
    plain = count_allocations(lambda: cross_entropy(hidden @ weight.T, targets).backward())
    assert plain.largest_bytes >= n * v * 4


@both
def test_scoring_stays_in_the_budget(count_allocations, backend):
    hidden, weight, targets = make(n=60, d=8, v=20_001)
    budget = 60 * 20_001 * 4 // 8
    with torch.no_grad():
        found = count_allocations(lambda: linear_logprobs(hidden, weight, targets, chunk_bytes=budget, backend=backend))
    assert budget / 2 < found.peak_bytes <= 1.05 * budget


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
def test_the_gradient_scales_with_its_upstream_and_is_used_once(backend):
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
def test_autocast_sets_the_products_dtype_and_no_gradient_s(backend):
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


@pytest.mark.parametrize(
    "capability, backend",
    [((7, 5), "torch"), ((8, 0), "triton"), ((9, 0), "triton"), ((10, 3), "triton"), ((12, 0), "triton")],
)
def test_auto_asks_for_at_least_8_0_and_no_exact_chip(monkeypatch, caplog, capability, backend):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    linear_loss._auto_backend.cache_clear()
    with caplog.at_level(logging.INFO, logger="eepo_kernels"):
        assert linear_loss._auto_backend("cuda", 0) == backend
    linear_loss._auto_backend.cache_clear()
    assert [r.levelno for r in caplog.records] == [logging.WARNING if backend == "torch" else logging.INFO]


@both
@pytest.mark.parametrize("name", ["logprobs", "entropy", "log1mp"])
def test_a_loss_of_one_statistic_alone(backend, name):
    """Rows are active if any coefficient is not zero, whichever it is."""
    hidden, weight, targets = make(n=20)
    loss, _ = fused_linear_loss(hidden, weight, targets, lambda s, r: getattr(s, name), backend=backend)
    found = torch.autograd.grad(loss, (hidden, weight))
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    truth = torch.autograd.grad(reference.fused_linear_loss(*exact, targets, lambda s, r: getattr(s, name))[0], exact)
    for a, b in zip(found, truth, strict=True):
        assert torch.allclose(a.double(), b, atol=1e-6)


@both
def test_strided_inputs(backend):
    hidden, weight, targets = make(n=20)
    plain = linear_logprobs(hidden, weight, targets, backend=backend)
    wide = torch.stack([targets, targets], 1)[:, 0], torch.cat([hidden, hidden], 1)[:, :D], weight.T.contiguous().T
    strided = linear_logprobs(wide[1], wide[2], wide[0], backend=backend)
    same = linear_logprobs(hidden, weight, targets[:1].expand(20), backend=backend)
    assert torch.allclose(plain.entropy, strided.entropy) and torch.allclose(plain.logprobs, strided.logprobs)
    assert torch.allclose(same.entropy, plain.entropy)


@both
def test_no_gradient_is_made_where_none_is_wanted(backend):
    hidden, weight, targets = make(n=100)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context, FlopCounterMode(display=False) as counter:
            fused_linear_loss(hidden, weight, targets, nll, backend=backend)
        assert counter.get_total_flops() < 1.2 * 2 * 100 * D * V


@pytest.mark.parametrize("scale", [1.0, 65536.0])
def test_fp16_gradients_of_a_mean_over_many_tokens(scale):
    """1/N is below what fp16 resolves beside a loss scale; with one, dX and dW must not have lost it on the way."""
    hidden, weight, targets = make(n=40)
    half = [t.detach().half().requires_grad_() for t in (hidden, weight)]
    loss, _ = fused_linear_loss(*half, targets, lambda s, r: -s.logprobs * (0.1 / 32768))
    found = torch.autograd.grad(loss * scale, half)
    exact = [t.detach().double().requires_grad_() for t in half]
    truth = torch.autograd.grad(
        reference.fused_linear_loss(*exact, targets, lambda s, r: -s.logprobs * (0.1 / 32768))[0], exact
    )
    for a, b in zip(found, truth, strict=True):
        error = ((a.double() / scale - b).norm() / b.norm()).item()
        assert error < (2e-3 if scale > 1 else 0.2)  # unscaled, the results themselves are subnormal


def test_a_loss_that_depends_on_another_leaf_is_refused():
    hidden, weight, targets = make()
    extra = torch.ones(N, requires_grad=True)
    with pytest.raises(
        ValueError, match=r"loss_fn: expected a function of the statistics alone, found a tensor of shape \(60,\)"
    ):
        fused_linear_loss(hidden, weight, targets, lambda s, r: s.logprobs * extra[r])
    fused_linear_loss(hidden, weight, targets, lambda s, r: s.logprobs * extra.detach()[r])


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_contract_of_every_backend(backend):
    """Statistics in fp32 whatever the inputs, wrong targets, biases and temperatures named, under autocast too."""
    hidden, weight, targets = make()
    low = hidden.detach().bfloat16(), weight.detach().bfloat16()
    if backend != "triton":  # the interpreter is wrong in bf16
        assert linear_logprobs(*low, targets, backend=backend).logprobs.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        stats = linear_logprobs(low[0], weight, targets, backend=backend)
        assert stats.entropy.dtype == torch.float32
        assert torch.allclose(stats.entropy, linear_logprobs(*low, targets, backend="torch").entropy, atol=1e-5)
    for wrong in ({"targets": targets + V}, {"bias": torch.zeros(V, dtype=torch.int64)}, {"temperature": 0.0},
                  {"temperature": float("inf")}, {"temperature": float("nan")}):  # fmt: skip
        inputs = {"hidden": hidden, "weight": weight, "targets": targets, **wrong}
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}.*expected|expected {next(iter(wrong))}"):
            linear_logprobs(**inputs, backend=backend)


@both
def test_a_target_of_probability_zero(backend):
    """Its logit is -inf: log p is -inf, log(1 - p) is 0, the entropy that of the others, and no gradient is NaN."""
    hidden, weight, targets = make(n=4, v=6)
    bias = torch.zeros(6)
    bias[targets[0]] = -torch.inf
    stats = linear_logprobs(hidden, weight, targets, bias=bias, backend=backend)
    others = torch.cat([(hidden @ weight.T)[0, : targets[0]], (hidden @ weight.T)[0, targets[0] + 1 :]]).log_softmax(0)
    assert stats.logprobs[0] == -torch.inf and stats.log1mp[0] == 0
    assert stats.entropy[0].item() == pytest.approx(-(others.exp() * others).sum().item(), rel=1e-5)
    (grad,) = torch.autograd.grad((stats.entropy + stats.log1mp).sum(), hidden)
    assert grad.isfinite().all()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
def test_the_kernels_alone_never_read_outside():
    """A wrong target that reaches the kernel is a NaN row; 16-bit logits are as good as fp32 ones."""
    from eepo_kernels.row_stats import TritonRows

    logits = torch.randn(3, 32)
    rows = TritonRows(logits, torch.tensor([1, 1 << 40, -5]), None, 1.0)
    assert rows.stats().logprobs.isnan().tolist() == [False, True, True]
    half = TritonRows(logits.half(), torch.tensor([1, 2, 3]), None, 0.7).stats()
    full = TritonRows(logits.half().float(), torch.tensor([1, 2, 3]), None, 0.7).stats()
    # not bit for bit: a 16-byte load, which shares a running maximum, holds eight of these and four of those
    for name in ("entropy", "logprobs"):
        torch.testing.assert_close(getattr(half, name), getattr(full, name), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("num_active", [1, 2, 3, 11])
def test_few_rows_are_as_accurate_as_many(num_active):
    """A sum of 150,000 terms in sequence loses a digit; how many rows a GEMM has must not decide on it."""
    hidden, weight, targets = make(n=num_active, d=128, v=151_936)
    loss, _ = fused_linear_loss(hidden, weight, targets, lambda s, r: s.entropy - s.logprobs)
    (found,) = torch.autograd.grad(loss, hidden)
    exact = hidden.detach().double().requires_grad_()
    truth, _ = fused_linear_loss(exact, weight.detach().double(), targets, lambda s, r: s.entropy - s.logprobs)
    (expected,) = torch.autograd.grad(truth, exact)
    assert ((found.double() - expected).norm() / expected.norm()).item() < 2e-6
