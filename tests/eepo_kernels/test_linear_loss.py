"""The fused head against float64: statistics, losses and gradients, and what plain PyTorch gets in the same dtype.

Every test of numbers runs for each place the head runs in: PyTorch and Triton's interpreter on a CPU (fp32 only: the
interpreter is wrong in bf16), and both on CUDA in every dtype under the marker `gpu`.
"""

import math
from typing import NamedTuple

import pytest
import torch
from eepo_kernels import TokenStats, fused_linear_loss, linear_logprobs, reference
from torch.nn.functional import softplus


class Place(NamedTuple):
    device: str
    backend: str
    dtype: torch.dtype = torch.float32

    def put(self, tensor):
        """A leaf of this place's device and dtype."""
        return None if tensor is None else tensor.detach().to(self.device, self.dtype).requires_grad_()


def place_id(place):
    return "-".join([place.device, place.backend, str(place.dtype).removeprefix("torch.")])


CPU = [Place("cpu", "torch")]
if not torch.cuda.is_available():  # the interpreter is chosen for a whole process, in conftest.py
    CPU.append(Place("cpu", "triton"))
GPU = [
    pytest.param(Place("cuda", backend, dtype), marks=pytest.mark.gpu)
    for backend in ("torch", "triton")
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
]
GPU_FP32 = [param for param in GPU if param.values[0].dtype == torch.float32]
everywhere = pytest.mark.parametrize("place", [*CPU, *GPU], ids=place_id)
everywhere_fp32 = pytest.mark.parametrize("place", [*CPU, *GPU_FP32], ids=place_id)

SHAPES = [  # N, D, V
    (1, 8, 5),  # one row; V below every block and tile
    (13, 16, 50),  # nothing a power of two: masks on every side
    (16, 32, 1024),  # whole tiles: V is exactly one block of the row kernels
    (11, 24, 1000),  # V a multiple of 8 and not of 16: rows are padded for 16-byte accesses
    (7, 8, 2101),  # an odd V of more than two blocks: the running maximum is merged, the last block cut off
]


def mixed_loss(stats: TokenStats, rows):
    """Uses every statistic and the index, and leaves a third of the rows alone."""
    return torch.where(rows % 3 == 0, 0.0, stats.logprobs * 0.7 - 0.2 * stats.entropy + 0.1 * stats.log1mp)


def inputs(shape, *, scale=1.0, offset=0.0, bias=False, seed=0):
    """float64 leaves (hidden, weight, bias) and targets."""
    n, d, v = shape
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=g, dtype=torch.float64) * scale
    weight = torch.randn(v, d, generator=g, dtype=torch.float64) / math.sqrt(d)
    targets = torch.randint(0, v, (n,), generator=g)
    b = torch.randn(v, generator=g, dtype=torch.float64) + offset if bias or offset else None
    return [None if t is None else t.requires_grad_() for t in (hidden, weight, b)], targets


def evaluate(op, tensors, targets, **kwargs):
    hidden, weight, bias = tensors
    loss, stats = op(hidden, weight, targets, mixed_loss, bias=bias, temperature=0.8, **kwargs)
    leaves = [t for t in tensors if t is not None]
    return [x.cpu() for x in (*stats[:3], loss, *torch.autograd.grad(loss, leaves))]


def relative_error(found, truth):
    return ((found.double() - truth.double()).norm() / truth.double().norm().clamp_min(1e-30)).item()


def errors_of_plain_torch(tensors, targets, truth):
    """What autograd through all the logits gets in this dtype. A GEMM of one row adds up in another order than one of
    many, so it is asked for the statistics both ways."""
    plain = evaluate(reference.fused_linear_loss, tensors, targets)
    errors = [relative_error(p, t) for p, t in zip(plain, truth, strict=True)]
    hidden, weight, bias = [None if t is None else t.detach() for t in tensors]
    rows = [
        reference.linear_logprobs(h, weight, t, bias=bias, temperature=0.8)
        for h, t in zip(hidden[:, None], targets[:, None], strict=True)
    ]
    by_row = [relative_error(torch.cat([r[i] for r in rows]).cpu(), truth[i]) for i in range(3)]
    return [max(e, by_row[i]) if i < 3 else e for i, e in enumerate(errors)]


def assert_as_good_as_plain_torch(place, batches, budgets):
    """Against float64 on the very numbers that the place's dtype holds; root mean square over the batches, each
    (float64 leaves, targets): over one batch an error may be small by luck, in either method. The loss is one number,
    and log(1 - p) has the norm of the few rows with a large p."""
    allowed, errors = [], {chunk_bytes: [] for chunk_bytes in budgets}
    for exact, targets in batches:
        tensors, targets = [place.put(t) for t in exact], targets.to(place.device)
        exact = [None if t is None else t.detach().double().cpu().requires_grad_() for t in tensors]
        truth = evaluate(reference.fused_linear_loss, exact, targets.cpu())
        allowed.append(errors_of_plain_torch(tensors, targets, truth))
        for chunk_bytes in budgets:
            found = evaluate(fused_linear_loss, tensors, targets, chunk_bytes=chunk_bytes, backend=place.backend)
            errors[chunk_bytes].append([relative_error(f, t) for f, t in zip(found, truth, strict=True)])
    for chunk_bytes in budgets:
        for name, error, bound in zip(NAMES, rms(errors[chunk_bytes]), rms(allowed), strict=False):
            assert error <= 1.5 * bound + 2e-6, f"{name}, {chunk_bytes} bytes"


def rms(rows):
    return torch.tensor(rows, dtype=torch.float64).square().mean(0).sqrt().tolist()


NAMES = ["logprobs", "entropy", "log1mp", "loss", "dX", "dW", "db"]
ALL_ROWS, ONE_ROW = 1 << 30, 1  # bytes a chunk


@everywhere
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0], ids=["flat", "random", "peaked"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_error_is_bounded_by_plain_torch(place, shape, scale, bias):
    batches = [inputs(shape, scale=scale, bias=bias, seed=seed) for seed in range(4)]
    several_chunks = 24 * shape[2] * shape[0] // 3
    assert_as_good_as_plain_torch(place, batches, (ALL_ROWS, several_chunks))


@everywhere
@pytest.mark.parametrize("offset", [-1e4, 1e4])
def test_large_offset_does_not_cost_accuracy(place, offset):
    batches = [inputs((16, 8, 40), offset=offset, seed=seed) for seed in range(8)]
    assert_as_good_as_plain_torch(place, batches, (ALL_ROWS,))


@everywhere
def test_peaked_to_one(place):
    """Targets that are the most likely token by far: p from 1 - 1e-3 to 1 - 1e-7 and beyond."""
    batches = []
    for seed in range(4):
        exact, _ = inputs((20, 32, 300), seed=seed)
        with torch.no_grad():
            exact[0] *= torch.linspace(1, 8, 20, dtype=torch.float64)[:, None]
        batches.append((exact, (exact[0] @ exact[1].T).argmax(1)))
    assert_as_good_as_plain_torch(place, batches, (ALL_ROWS, ONE_ROW))


@everywhere
@pytest.mark.parametrize("v", [49_152, 128_256, 151_936, 262_144])
def test_real_vocabularies(place, v):
    """Those of SmolLM2, Llama 3, Qwen and Gemma: hundreds of blocks a row. D is wide enough for the GEMM of a CPU
    to add up in pairs."""
    assert_as_good_as_plain_torch(place, [inputs((4, 64, v), scale=3.0)], (ALL_ROWS,))


@everywhere
def test_error_does_not_grow_with_the_number_of_chunks(place):
    """Sums in 16 bits would: each chunk's dW rounds what all those before it have added up."""
    exact, targets = inputs((128, 16, 64))
    tensors, targets = [place.put(t) for t in exact], targets.to(place.device)
    exact = [None if t is None else t.detach().double().cpu().requires_grad_() for t in tensors]
    truth = evaluate(reference.fused_linear_loss, exact, targets.cpu())
    per_row = {"torch": 24, "triton": 20}[place.backend] * 64  # what the head holds a row, its packed rows included
    errors = {}
    for chunks in (1, 2, 8, 64):
        budget = per_row * (128 // chunks)
        found = evaluate(fused_linear_loss, tensors, targets, backend=place.backend, chunk_bytes=budget)
        errors[chunks] = [relative_error(f, t) for f, t in zip(found, truth, strict=True)]
    for one, many in zip(errors[1], errors[64], strict=True):
        assert many <= 1.5 * one + 2e-6


LEADS = [-13.8, -5.0, 0.0, 1.0, 5.0, 20.0, 50.0, 88.0, 200.0]  # target ahead by this: p from 1e-6 to 1 - e^-200


@everywhere_fp32
@pytest.mark.parametrize("offset", [-1e4, 0.0, 1e4])
def test_stable_form_from_tiny_p_to_a_target_far_ahead(place, offset):
    """The bound is 4e-6 relative in fp32, on logits that fp32 holds exactly."""
    leads = torch.tensor(LEADS, dtype=torch.float64).mul(64).round().div(64)
    logits = torch.zeros(len(LEADS), 2, dtype=torch.float64) + offset
    logits[:, 0] += leads
    targets = torch.zeros(len(LEADS), dtype=torch.int64)
    stats = logits_stats(place, logits, targets)
    log_p, log_q = -softplus(-leads), -softplus(leads)
    truth = {"logprobs": log_p, "log1mp": log_q, "entropy": -log_p.exp() * log_p - log_q.exp() * log_q}
    for name, value in truth.items():
        found = getattr(stats, name).detach().double().cpu()
        # a GPU's exp gives 0 for results below the smallest normal number
        assert torch.all((found - value).abs() <= 4e-6 * value.abs() + torch.finfo(torch.float32).tiny), name


def logits_stats(place, logits, targets):
    """The statistics of given logits: hidden states are the logits, the head is the identity."""
    hidden = logits if logits.requires_grad else place.put(logits)
    weight = torch.eye(logits.shape[1], device=place.device)
    return linear_logprobs(hidden, weight, targets.to(place.device), backend=place.backend)


@everywhere_fp32
@pytest.mark.parametrize("name", ["logprobs", "entropy", "log1mp"])
def test_gradients_of_the_stable_form(place, name):
    leads = torch.tensor(LEADS, dtype=torch.float64)
    logits = torch.zeros(len(LEADS), 3, dtype=torch.float64)
    logits[:, 0], logits[:, 2] = leads, -0.5
    targets = torch.zeros(len(LEADS), dtype=torch.int64)
    single = place.put(logits)
    (found,) = torch.autograd.grad(getattr(logits_stats(place, single, targets), name).sum(), single)
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
    tiny = torch.finfo(torch.float32).tiny
    assert torch.all((found.double().cpu() - truth).abs() <= 4e-6 * truth.abs() + 2e-7 * q[:, None] + tiny)


def test_subtracting_from_one_would_fail():
    """Negative control: 1 - p in fp32 has nothing left where the target leads by 20."""
    p = torch.softmax(torch.tensor([20.0, 0.0]), 0)[0]
    assert torch.log(1 - p).isinf()


@everywhere_fp32
def test_minus_infinity_contributes_nothing(place):
    logits = torch.tensor([[1.0, -torch.inf, 0.5], [0.2, 0.3, -torch.inf]], dtype=torch.float64)
    weight, targets = torch.eye(3, device=place.device), torch.tensor([0, 1], device=place.device)
    hidden = place.put(torch.nan_to_num(logits, neginf=0.0))
    for row in range(2):
        bias = torch.where(logits[row] == -torch.inf, -torch.inf, 0.0).float().to(place.device)
        one = slice(row, row + 1)
        stats = linear_logprobs(hidden[one], weight, targets[one], bias=bias, backend=place.backend)
        kept = logits[row][logits[row] > -torch.inf].log_softmax(0)
        assert stats.entropy.item() == pytest.approx(-(kept.exp() * kept).sum().item(), rel=1e-6)
        (grad,) = torch.autograd.grad(sum(s.sum() for s in stats[:3]), hidden)
        assert grad.isfinite().all()


@everywhere_fp32
def test_the_only_word_there_is(place):
    """V = 1, or all other logits at -inf: p = 1, no entropy, log(1 - p) = -inf and no NaN in the gradients."""
    hidden = place.put(torch.ones(2, 4))
    targets = torch.zeros(2, dtype=torch.int64, device=place.device)
    weight = torch.ones(1, 4, device=place.device)
    stats = linear_logprobs(hidden, weight, targets, backend=place.backend)
    assert stats.logprobs.tolist() == [0, 0] and stats.entropy.tolist() == [0, 0]
    assert stats.log1mp.tolist() == [-math.inf, -math.inf]
    (grad,) = torch.autograd.grad((stats.logprobs + stats.entropy).sum(), hidden)
    assert grad.tolist() == [[0] * 4] * 2


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_gradcheck(backend):
    tensors, targets = inputs((5, 4, 7), bias=True)

    def statistics(hidden, weight, bias):
        return tuple(linear_logprobs(hidden, weight, targets, bias=bias, backend=backend, chunk_bytes=100)[:3])

    assert torch.autograd.gradcheck(statistics, tensors)


@everywhere_fp32
def test_history_covers_all_tokens_up_to_the_chunk(place):
    exact, targets = inputs((10, 4, 6))
    tensors = [place.put(t) for t in exact]
    seen, chunks = [], []

    def loss_fn(stats, rows):
        assert stats.history.entropy.shape[0] == rows[-1] + 1
        assert torch.equal(stats.history.entropy[rows], stats.entropy.detach())
        seen.extend(rows.tolist())
        chunks.append(len(rows))
        return stats.logprobs

    budget = 3 * 16 * 24
    fused_linear_loss(
        tensors[0], tensors[1], targets.to(place.device), loss_fn, chunk_bytes=budget, backend=place.backend
    )
    assert seen == list(range(10)) and len(chunks) > 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_on_a_cpu(dtype):
    """Plain PyTorch in that dtype rounds the logits, this does not."""
    batches = [inputs((24, 16, 80), seed=seed) for seed in range(4)]
    assert_as_good_as_plain_torch(Place("cpu", "torch", dtype), batches, (ALL_ROWS, ONE_ROW))


@everywhere_fp32
def test_nan_stays_in_its_row(place):
    exact, targets = inputs((6, 4, 9))
    hidden, weight = place.put(exact[0]), place.put(exact[1])
    with torch.no_grad():
        hidden[2] = torch.nan
    loss, stats = fused_linear_loss(hidden, weight, targets.to(place.device), mixed_loss, backend=place.backend)
    expected = [False, False, True, False, False, False]
    assert all(values.isnan().tolist() == expected for values in stats[:3])
    (grad,) = torch.autograd.grad(loss, hidden)
    assert grad.isnan().all(1).tolist() == expected == grad.isnan().any(1).tolist()


@everywhere
def test_empty_batch(place):
    exact, targets = inputs((1, 4, 9), bias=True)
    hidden, weight, bias = (place.put(t) for t in exact)
    none = targets[:0].to(place.device)
    loss, stats = fused_linear_loss(hidden[:0], weight, none, mixed_loss, bias=bias, backend=place.backend)
    loss.backward()
    assert loss == 0 and stats.entropy.shape == (0,) and weight.grad.abs().sum() == 0 == bias.grad.abs().sum()
    stats = linear_logprobs(hidden[:0], weight, none, backend=place.backend)
    weight.grad = None
    stats.entropy.sum().backward()
    assert stats.logprobs.shape == (0,) and weight.grad.abs().sum() == 0


@everywhere_fp32
@pytest.mark.parametrize("wrong", [-1, 9, 1 << 40])
def test_a_wrong_target_is_named(place, wrong):
    exact, targets = inputs((6, 4, 9))
    hidden, weight, targets = place.put(exact[0]), place.put(exact[1]), targets.to(place.device)
    targets[3] = wrong
    for op in (linear_logprobs, lambda *args, **kwargs: fused_linear_loss(*args, mixed_loss, **kwargs)):
        with pytest.raises(ValueError, match=r"targets: expected values in \[0, 9\), found"):
            op(hidden, weight, targets, backend=place.backend)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda h, w, t: (h[:, :3], w, t), "expected hidden [N, D] and weight [V, D]"),
        (lambda h, w, t: (h.double(), w, t), "one floating dtype"),
        (lambda h, w, t: (h, w, t.int()), "int64"),
        (lambda h, w, t: (h, w, t[:2]), "expected targets [6]"),
    ],
)
def test_wrong_inputs_are_named(change, words):
    (hidden, weight, _), targets = inputs((6, 4, 9))
    hidden, weight = hidden.detach().float(), weight.detach().float()
    with pytest.raises(ValueError) as error:
        linear_logprobs(*change(hidden, weight, targets))
    assert words in str(error.value)


@pytest.mark.gpu
def test_offsets_beyond_two_to_the_31():
    """One chunk of more than 2^31 logits: 32-bit row offsets would wrap around."""
    n, d, v = 16_384, 64, 151_936
    g = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(n, d, generator=g, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(v, d, generator=g, device="cuda", dtype=torch.bfloat16) / 8
    targets = torch.randint(0, v, (n,), generator=g, device="cuda")
    gradients = []
    for rows, budget in ((slice(None), 40 << 30), (slice(-64, None), None)):
        part = hidden[rows].clone().requires_grad_()
        loss, stats = fused_linear_loss(part, weight, targets[rows], mixed_loss, chunk_bytes=budget)
        scored = linear_logprobs(part, weight, targets[rows], chunk_bytes=budget)
        gradients.append([*stats[:3], *scored[:3], torch.autograd.grad(loss, part)[0]])
    offset = n % 3  # mixed_loss leaves out every third row, counted from the first
    for a, b in zip(gradients[0][:6], gradients[1][:6], strict=True):
        assert relative_error(a[-64:], b) < 1e-5
    kept = (torch.arange(n - 64, n) % 3 != 0) & (torch.arange(64) % 3 != 0)
    assert offset == 1 and relative_error(gradients[0][6][-64:][kept], gradients[1][6][kept]) < 1e-2
