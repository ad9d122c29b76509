"""The fused head against float64: statistics, losses and gradients, and what plain PyTorch gets in the same dtype."""

import math

import pytest
import torch
from eepo_kernels import TokenStats, fused_linear_loss, linear_logprobs, reference
from torch.nn.functional import softplus

SHAPES = [
    (1, 8, 5),  # one row
    (37, 16, 50),  # nothing a power of two
    (64, 32, 1024),  # whole tiles
    (33, 24, 1000),  # V a multiple of 8, N not
]


def mixed_loss(stats: TokenStats, rows):
    """Uses every statistic and the index, and leaves a third of the rows alone."""
    return torch.where(rows % 3 == 0, 0.0, stats.logprobs * 0.7 - 0.2 * stats.entropy + 0.1 * stats.log1mp)


def inputs(shape, dtype, *, scale=1.0, offset=0.0, bias=False, seed=0):
    n, d, v = shape
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=g, dtype=torch.float64) * scale
    weight = torch.randn(v, d, generator=g, dtype=torch.float64) / math.sqrt(d)
    targets = torch.randint(0, v, (n,), generator=g)
    b = torch.randn(v, generator=g, dtype=torch.float64) + offset if bias or offset else None
    return [None if t is None else t.to(dtype).requires_grad_() for t in (hidden, weight, b)], targets


def evaluate(op, tensors, targets, **kwargs):
    hidden, weight, bias = tensors
    loss, stats = op(hidden, weight, targets, mixed_loss, bias=bias, temperature=0.8, **kwargs)
    leaves = [t for t in tensors if t is not None]
    return [*stats[:3], loss, *torch.autograd.grad(loss, leaves)]


def relative_error(found, truth):
    return ((found.double() - truth.double()).norm() / truth.double().norm().clamp_min(1e-30)).item()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0], ids=["flat", "random", "peaked"])
@pytest.mark.parametrize("bias", [False, True])
def test_error_is_bounded_by_plain_torch(shape, scale, bias):
    exact, targets = inputs(shape, torch.float64, scale=scale, bias=bias)
    truth = evaluate(reference.fused_linear_loss, exact, targets)
    single = [None if t is None else t.detach().float().requires_grad_() for t in exact]
    plain = evaluate(reference.fused_linear_loss, single, targets)
    plain = [relative_error(p, t) for p, t in zip(plain, truth, strict=True)]
    # A GEMM of one row adds up in another order than one of many, so plain PyTorch is asked for both.
    hidden, weight, b = [None if t is None else t.detach() for t in single]
    rows = [
        reference.linear_logprobs(h, weight, t, bias=b, temperature=0.8)
        for h, t in zip(hidden[:, None], targets[:, None], strict=True)
    ]
    by_row = [relative_error(torch.cat([r[i] for r in rows]), truth[i]) for i in range(3)]
    for chunk_bytes in (1 << 30, 1):  # all rows at once, one row a chunk
        found = evaluate(fused_linear_loss, single, targets, chunk_bytes=chunk_bytes)
        for i, (f, t) in enumerate(zip(found, truth, strict=True)):
            allowed = max(plain[i], by_row[i] if i < 3 else 0.0)
            assert relative_error(f, t) <= 1.5 * allowed + 2e-6


def test_large_offset_does_not_cost_accuracy():
    exact, targets = inputs((16, 8, 40), torch.float64, offset=1e4)
    single = [t.detach().float().requires_grad_() for t in exact]
    truth = evaluate(reference.fused_linear_loss, exact, targets)
    plain = evaluate(reference.fused_linear_loss, single, targets)
    found = evaluate(fused_linear_loss, single, targets)
    for f, p, t in zip(found, plain, truth, strict=True):
        assert relative_error(f, t) <= 1.5 * relative_error(p, t) + 2e-6


LEADS = [-13.8, -5.0, 0.0, 1.0, 5.0, 20.0, 50.0, 88.0, 200.0]  # target ahead by this: p from 1e-6 to 1 - e^-200


@pytest.mark.parametrize("offset", [-1e4, 0.0, 1e4])
def test_stable_form_from_tiny_p_to_a_target_far_ahead(offset):
    """DESIGN's bound, 4e-6 relative in fp32, on logits that fp32 holds exactly."""
    leads = torch.tensor(LEADS, dtype=torch.float64).mul(64).round().div(64)
    logits = torch.zeros(len(LEADS), 2, dtype=torch.float64) + offset
    logits[:, 0] += leads
    targets = torch.zeros(len(LEADS), dtype=torch.int64)
    eye = torch.eye(2)
    stats = linear_logprobs(logits.float(), eye, targets)
    log_p, log_q = -softplus(-leads), -softplus(leads)
    truth = {"logprobs": log_p, "log1mp": log_q, "entropy": -log_p.exp() * log_p - log_q.exp() * log_q}
    for name, value in truth.items():
        found = getattr(stats, name).double()
        assert torch.all((found - value).abs() <= 4e-6 * value.abs() + 1e-44), name


@pytest.mark.parametrize("name", ["logprobs", "entropy", "log1mp"])
def test_gradients_of_the_stable_form(name):
    leads = torch.tensor(LEADS, dtype=torch.float64)
    logits = torch.zeros(len(LEADS), 3, dtype=torch.float64)
    logits[:, 0], logits[:, 2] = leads, -0.5
    targets = torch.zeros(len(LEADS), dtype=torch.int64)
    eye = torch.eye(3)
    single = logits.float().requires_grad_()
    (found,) = torch.autograd.grad(getattr(linear_logprobs(single, eye, targets), name).sum(), single)
    # closed forms in p and 1 - p, each from its own side, so that the truth is exact where float64 autograd cancels
    log_total = math.log1p(math.exp(-0.5))
    d = leads - log_total
    p, q = torch.sigmoid(d), torch.sigmoid(-d)
    rest = torch.softmax(torch.tensor([0.0, -0.5], dtype=torch.float64), 0)
    log_p, log_q = torch.nn.functional.logsigmoid(d), torch.nn.functional.logsigmoid(-d)
    entropy = -p * log_p - q * log_q - q * (rest * rest.log()).sum()
    if name == "logprobs":
        target, others = q, -q[:, None] * rest
    elif name == "log1mp":
        target, others = -p, p[:, None] * rest
    else:
        target = -p * (log_p + entropy)
        others = -q[:, None] * rest * (log_q[:, None] + rest.log() + entropy[:, None])
    truth = torch.cat([target[:, None], others], 1)
    assert torch.all((found.double() - truth).abs() <= 4e-6 * truth.abs() + 2e-7 * q[:, None] + 1e-44)


def test_subtracting_from_one_would_fail():
    """Negative control: 1 - p in fp32 has nothing left where the target leads by 20."""
    p = torch.softmax(torch.tensor([20.0, 0.0]), 0)[0]
    assert torch.log(1 - p).isinf()


def test_minus_infinity_contributes_nothing():
    logits = torch.tensor([[1.0, -torch.inf, 0.5], [0.2, 0.3, -torch.inf]], dtype=torch.float64)
    eye, targets = torch.eye(3, dtype=torch.float64), torch.tensor([0, 1])
    hidden = torch.nan_to_num(logits, neginf=0.0).requires_grad_()
    bias = torch.zeros(3, dtype=torch.float64)
    for row in range(2):
        bias = torch.where(logits[row] == -torch.inf, -torch.inf, 0.0)
        stats = linear_logprobs(hidden[row : row + 1], eye, targets[row : row + 1], bias=bias)
        kept = logits[row][logits[row] > -torch.inf].log_softmax(0)
        assert torch.allclose(stats.entropy, -(kept.exp() * kept).sum())
        (grad,) = torch.autograd.grad(sum(s.sum() for s in stats[:3]), hidden)
        assert grad.isfinite().all()


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_gradcheck(backend):
    tensors, targets = inputs((5, 4, 7), torch.float64, bias=True)

    def statistics(hidden, weight, bias):
        return tuple(linear_logprobs(hidden, weight, targets, bias=bias, backend=backend, chunk_bytes=100)[:3])

    assert torch.autograd.gradcheck(statistics, tensors)


def test_history_covers_all_tokens_up_to_the_chunk():
    tensors, targets = inputs((10, 4, 6), torch.float32)
    seen = []

    def loss_fn(stats, rows):
        assert stats.history.entropy.shape[0] == rows[-1] + 1
        assert torch.equal(stats.history.entropy[rows], stats.entropy.detach())
        seen.extend(rows.tolist())
        return stats.logprobs

    fused_linear_loss(tensors[0], tensors[1], targets, loss_fn, chunk_bytes=3 * 2 * 6 * 4)
    assert seen == list(range(10))


def test_error_does_not_grow_with_the_number_of_chunks():
    exact, targets = inputs((512, 16, 64), torch.float64)
    single = [None if t is None else t.detach().float().requires_grad_() for t in exact]
    truth = evaluate(reference.fused_linear_loss, exact, targets)
    errors = []
    for chunks in (1, 64):
        found = evaluate(fused_linear_loss, single, targets, chunk_bytes=2 * 64 * 4 * 512 // chunks)
        errors.append([relative_error(f, t) for f, t in zip(found, truth, strict=True)])
    for one, many in zip(*errors, strict=True):
        assert many <= 1.5 * one + 2e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    """Against float64 on the same rounded inputs; plain PyTorch in that dtype rounds the logits, this does not."""
    half, targets = inputs((24, 16, 80), dtype)
    exact = [None if t is None else t.detach().double().requires_grad_() for t in half]
    truth = evaluate(reference.fused_linear_loss, exact, targets)
    plain = evaluate(reference.fused_linear_loss, half, targets)
    for f, p, t in zip(evaluate(fused_linear_loss, half, targets), plain, truth, strict=True):
        assert relative_error(f, t) <= 1.5 * relative_error(p, t) + 2e-6


def test_nan_stays_in_its_row():
    (hidden, weight, _), targets = inputs((6, 4, 9), torch.float32)
    with torch.no_grad():
        hidden[2] = torch.nan
    for values in linear_logprobs(hidden, weight, targets)[:3]:
        assert values.isnan().tolist() == [False, False, True, False, False, False]


def test_empty_batch():
    (hidden, weight, _), _ = inputs((1, 4, 9), torch.float32)
    loss, stats = fused_linear_loss(hidden[:0], weight, torch.empty(0, dtype=torch.int64), mixed_loss)
    loss.backward()
    assert loss == 0 and stats.entropy.shape == (0,) and weight.grad.abs().sum() == 0


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda h, w, t: (h, w, t + 100), "targets: expected values in"),
        (lambda h, w, t: (h, w, t - 100), "targets: expected values in"),
        (lambda h, w, t: (h[:, :3], w, t), "expected hidden [N, D] and weight [V, D]"),
        (lambda h, w, t: (h.double(), w, t), "one floating dtype"),
        (lambda h, w, t: (h, w, t.int()), "int64"),
        (lambda h, w, t: (h, w, t[:2]), "expected targets [6]"),
    ],
)
def test_wrong_inputs_are_named(change, words):
    (hidden, weight, _), targets = inputs((6, 4, 9), torch.float32)
    with pytest.raises(ValueError) as error:
        linear_logprobs(*change(hidden, weight, targets))
    assert words in str(error.value)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu(dtype):
    """The PyTorch path on CUDA, where half precision takes its GEMMs out in fp32."""
    inputs_cpu, targets = inputs((64, 32, 1024), dtype)
    tensors = [None if t is None else t.detach().cuda().requires_grad_() for t in inputs_cpu]
    exact = [None if t is None else t.detach().double().requires_grad_() for t in inputs_cpu]
    truth = evaluate(reference.fused_linear_loss, exact, targets)
    plain = evaluate(reference.fused_linear_loss, tensors, targets.cuda())
    for f, p, t in zip(evaluate(fused_linear_loss, tensors, targets.cuda()), plain, truth, strict=True):
        assert relative_error(f.cpu(), t) <= 1.5 * relative_error(p.cpu(), t) + 2e-6
