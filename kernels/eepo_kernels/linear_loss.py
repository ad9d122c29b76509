"""hidden · Wᵀ -> per-token statistics -> any per-token loss -> gradients, without ever holding the logits [N, V].

The logits exist one chunk of rows at a time. `fused_linear_loss` makes the gradients while a chunk's logits are at
hand, so that a loss whose coefficients are non-zero on a share f of the rows costs 1 + 2f matrix products.

Statistics in their stable form, with z the logits over the temperature, k the target, M₂ = max_{j≠k} z_j,
e_j = exp(z_j - M₂), s = Σ_{j≠k} e_j and d = z_k - M₂ - log s:

    log p     = -softplus(-d)
    log(1-p)  = -softplus(d)
    H         = -p log p - (1-p) log(1-p) + (1-p) (log s - Σ e_j (z_j - M₂) / s)

Every term of H is ≥ 0, so nothing cancels. Gradients, for upstream a (log p), b (H) and c (log(1-p)):

    dz_k      =  a (1-p) - b p (log p + H) - c p
    dz_j      = (e_j / s) [-a (1-p) - b (1-p) (log p_j + H) + c p],   log p_j = log(1-p) + z_j - M₂ - log s

Shapes: N tokens, n rows of a chunk, D hidden size, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus

from eepo_kernels import reference
from eepo_kernels.reference import LossFn, TokenStats

BACKENDS = ("auto", "torch", "reference")
LIVE_BUFFERS = 3  # [n, V] buffers alive at once: shifted logits, their exponentials, the packed rows of the gradient
MASKED = -1e30  # stands for a logit of -inf after the shift: exp gives 0, and 0 * MASKED is 0 where 0 * inf is NaN


def default_chunk_bytes(device: torch.device) -> int:
    return 3 << 30 if device.type == "cuda" else 128 << 20


def _check(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, temperature: float, backend: str):
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, found {backend!r}")
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"expected hidden [N, D] and weight [V, D], found {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if hidden.dtype != weight.dtype or not hidden.is_floating_point():
        raise ValueError(
            f"expected hidden and weight of one floating dtype, found {hidden.dtype} and {weight.dtype}; under "
            "autocast, cast both first"
        )
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(
            f"expected targets [{hidden.shape[0]}] of int64, found {tuple(targets.shape)} of {targets.dtype}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"expected bias [{weight.shape[0]}], found {tuple(bias.shape)}")
    if len({t.device for t in (hidden, weight, targets)}) > 1:
        raise ValueError(
            f"expected one device, found hidden on {hidden.device}, weight on {weight.device}, targets on "
            f"{targets.device}"
        )
    if not temperature > 0:
        raise ValueError(f"temperature: expected a number above 0, found {temperature}")
    # On a GPU the check would be a host synchronisation; there `gather` asserts on the device.
    if not targets.is_cuda and targets.numel() and not 0 <= int(targets.min()) <= int(targets.max()) < len(weight):
        raise ValueError(
            f"targets: expected values in [0, {len(weight)}), found {int(targets.min())} to {int(targets.max())}"
        )


class _Chunk:
    """The logits of n rows, reduced to statistics and kept as two [n, V] buffers until their gradient is made."""

    def __init__(self, logits: Tensor, targets: Tensor):
        """logits: [n, V] fp32 or float64, over the temperature; overwritten. targets: [n] int64."""
        self.index = targets[:, None]
        target_logits = logits.gather(1, self.index)
        logits.scatter_(1, self.index, -torch.inf)
        shift = logits.amax(1, keepdim=True)
        # A row whose other logits are all -inf has no scale of its own; any finite shift leaves their exponentials 0.
        shift = torch.where(shift == -torch.inf, target_logits.clamp_min(torch.finfo(logits.dtype).min), shift)
        self.shifted = logits.sub_(shift).clamp_(min=MASKED)
        self.exp = self.shifted.exp()
        self.total = self.exp.sum(1, keepdim=True)
        log_total = self.total.log()
        weighted = torch.bmm(self.exp[:, None], self.shifted[:, :, None]).squeeze(2)
        lead = target_logits - shift - log_total
        self.logp, self.log1mp = -softplus(-lead), -softplus(lead)
        self.p, self.q = self.logp.exp(), self.log1mp.exp()
        rest = torch.where(self.total > 0, log_total - weighted / self.total, 0.0)
        p_log_p = torch.where(self.p > 0, self.p * self.logp, torch.where(self.p == 0, 0.0, self.p))
        q_log_q = torch.where(self.q > 0, self.q * self.log1mp, torch.where(self.q == 0, 0.0, self.q))
        self.entropy = -p_log_p - q_log_q + self.q * rest
        self.log_total = log_total

    def stats(self) -> TokenStats:
        return TokenStats(self.logp.squeeze(1), self.entropy.squeeze(1), self.log1mp.squeeze(1))

    def grad_logits(self, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        """dL/dz [n, V] for upstream gradients a, b, c [n] of (logprobs, entropy, log1mp). Consumes the buffers."""
        a, b, c = a[:, None], b[:, None], c[:, None]
        finite_log_total = torch.where(self.total > 0, self.log_total, 0.0)
        finite_logp = self.logp.clamp_min(MASKED)
        constant = c * self.p - a * self.q - b * self.q * (self.log1mp.clamp_min(MASKED) - finite_log_total)
        constant = constant - b * self.q * self.entropy
        inverse = torch.where(self.total > 0, 1 / self.total, 0.0)
        grad = self.shifted.mul_(-b * self.q * inverse).add_(constant * inverse).mul_(self.exp)
        target_grad = a * self.q - c * self.p - b * self.p * (finite_logp + self.entropy)
        return grad.scatter_(1, self.index, target_grad)


class _Head:
    """The head's weight in the dtype the logits are computed in, and the products with it."""

    def __init__(self, weight: Tensor, bias: Tensor | None, temperature: float):
        self.compute_dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self.fp32_out = weight.is_cuda and weight.dtype in (torch.float16, torch.bfloat16)
        # bf16 logits are too coarse for exp of a difference. A GPU's GEMM hands out fp32; a CPU's needs fp32 inputs.
        self.weight = weight if self.fp32_out else weight.to(self.compute_dtype)
        self.bias = None if bias is None else bias.to(self.compute_dtype)
        self.temperature = temperature

    def chunk(self, hidden: Tensor, targets: Tensor) -> _Chunk:
        if self.fp32_out:
            logits = torch.mm(hidden, self.weight.T, out_dtype=torch.float32)
        else:
            logits = torch.mm(hidden.to(self.compute_dtype), self.weight.T)
        if self.bias is not None:
            logits.add_(self.bias)
        return _Chunk(logits.div_(self.temperature), targets)

    def backward(self, chunk: _Chunk, hidden: Tensor, grads: list[Tensor], rows: slice, outputs: list[Tensor | None]):
        """Add the gradients of one chunk to `outputs` = [dX [N, D], dW [V, D], db [V]], None where not wanted.
        Rows whose three coefficients are all zero cost nothing here."""
        active = torch.stack([g != 0 for g in grads]).any(0).nonzero().squeeze(1)
        if active.numel() == 0:
            return
        grad_logits = chunk.grad_logits(*grads).div_(self.temperature)
        if active.numel() < len(grad_logits):
            grad_logits, hidden = grad_logits[active], hidden[active]
        d_hidden, d_weight, d_bias = outputs
        if self.fp32_out:
            half = grad_logits.to(self.weight.dtype)
            if d_hidden is not None:
                d_hidden[rows][active] = torch.mm(half, self.weight, out_dtype=torch.float32).to(d_hidden.dtype)
            if d_weight is not None:
                torch.addmm(d_weight, half.T, hidden, out_dtype=torch.float32, out=d_weight)
        else:
            if d_hidden is not None:
                d_hidden[rows][active] = torch.mm(grad_logits, self.weight).to(d_hidden.dtype)
            if d_weight is not None:
                d_weight.addmm_(grad_logits.T, hidden.to(self.compute_dtype))
        if d_bias is not None:
            d_bias.add_(grad_logits.sum(0))

    def row_slices(self, num_rows: int, chunk_bytes: int) -> list[slice]:
        row_bytes = LIVE_BUFFERS * len(self.weight) * self.compute_dtype.itemsize
        step = max(1, chunk_bytes // row_bytes)
        return [slice(i, min(i + step, num_rows)) for i in range(0, num_rows, step)]

    def empty_grads(self, hidden: Tensor, needs: tuple[bool, bool, bool]) -> list[Tensor | None]:
        """Gradients of the weight and bias are summed over chunks, so in fp32; those of hidden are written once."""
        return [
            torch.zeros_like(hidden) if needs[0] else None,
            torch.zeros_like(self.weight, dtype=self.compute_dtype) if needs[1] else None,
            torch.zeros_like(self.weight[:, 0], dtype=self.compute_dtype) if needs[2] else None,
        ]


def _empty_stats(hidden: Tensor, dtype: torch.dtype) -> TokenStats:
    return TokenStats(*(torch.empty(len(hidden), dtype=dtype, device=hidden.device) for _ in range(3)))


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, temperature, chunk_bytes):
        head = _Head(weight, bias, temperature)
        out = _empty_stats(hidden, head.compute_dtype)
        for rows in head.row_slices(len(targets), chunk_bytes):
            for whole, part in zip(out[:3], head.chunk(hidden[rows], targets[rows]).stats()[:3], strict=True):
                whole[rows] = part
        ctx.save_for_backward(hidden, weight, targets, *(() if bias is None else (bias,)))
        ctx.temperature, ctx.chunk_bytes = temperature, chunk_bytes
        return out[:3]

    @staticmethod
    def backward(ctx, *upstream):
        hidden, weight, targets, *rest = ctx.saved_tensors
        bias = rest[0] if rest else None
        head = _Head(weight, bias, ctx.temperature)
        outputs = head.empty_grads(hidden, ctx.needs_input_grad[:3])
        for rows in head.row_slices(len(targets), ctx.chunk_bytes):
            grads = [g[rows] for g in upstream]
            if any(bool((g != 0).any()) for g in grads):
                head.backward(head.chunk(hidden[rows], targets[rows]), hidden[rows], grads, rows, outputs)
        inputs = (hidden, weight, bias)
        return (*(None if g is None else g.to(i.dtype) for g, i in zip(outputs, inputs, strict=True)), None, None, None)


class _FusedLinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, loss_fn, temperature, chunk_bytes):
        head = _Head(weight, bias, temperature)
        out = _empty_stats(hidden, head.compute_dtype)
        needs = ctx.needs_input_grad[:3]
        outputs = head.empty_grads(hidden, needs)
        loss = torch.zeros((), dtype=torch.float64, device=hidden.device)
        for rows in head.row_slices(len(targets), chunk_bytes):
            chunk = head.chunk(hidden[rows], targets[rows])
            stats = chunk.stats()
            for whole, part in zip(out[:3], stats[:3], strict=True):
                whole[rows] = part
            history = TokenStats(*(s[: rows.stop] for s in out[:3]))
            indices = torch.arange(rows.start, rows.stop, device=targets.device)
            part_loss, grads = _loss_and_coefficients(loss_fn, stats, history, indices)
            loss += part_loss
            if any(needs):
                head.backward(chunk, hidden[rows], grads, rows, outputs)
        ctx.save_for_backward(*(g for g in outputs if g is not None))
        ctx.dtypes = [None if i is None else i.dtype for i in (hidden, weight, bias)]
        result = (loss.to(head.compute_dtype), *out[:3])
        ctx.mark_non_differentiable(*result[1:])
        return result

    @staticmethod
    def backward(ctx, upstream, *_):
        saved = iter(ctx.saved_tensors)
        grads = [
            (next(saved) * upstream).to(dtype) if needed else None
            for needed, dtype in zip(ctx.needs_input_grad[:3], ctx.dtypes, strict=True)
        ]
        return *grads, None, None, None, None


def _loss_and_coefficients(loss_fn: LossFn, stats: TokenStats, history: TokenStats, rows: Tensor):
    """Sum of the chunk's losses and its derivative in each statistic: [n] each, zeros where the loss ignores one."""
    leaves = [s.detach().requires_grad_() for s in stats[:3]]
    with torch.enable_grad():
        losses = loss_fn(TokenStats(*leaves, history=history), rows)
        assert losses.shape == rows.shape, f"loss_fn must return {tuple(rows.shape)}, not {tuple(losses.shape)}"
        total = losses.sum(dtype=torch.float64)
    if not total.requires_grad:
        return total, [torch.zeros_like(leaf) for leaf in leaves]
    grads = torch.autograd.grad(total, leaves, allow_unused=True)
    return total.detach(), [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True)]


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    chunk_bytes: int | None = None,
    backend: str = "auto",
) -> TokenStats:
    """Log-prob, entropy and log(1 - p) of `targets` under softmax((hidden · weightᵀ + bias) / temperature).

    hidden [N, D] and weight [V, D] of one dtype, targets [N] int64, bias [V]. Statistics are fp32 (float64 for float64
    inputs). Differentiable in hidden, weight and bias: the backward pass recomputes the logits chunk by chunk.
    `chunk_bytes` bounds the memory held beside inputs and outputs. ValueError on shapes, dtypes, devices or targets
    that do not fit.
    """
    _check(hidden, weight, targets, bias, temperature, backend)
    if backend == "reference":
        return reference.linear_logprobs(hidden, weight, targets, bias=bias, temperature=temperature)
    chunk_bytes = chunk_bytes or default_chunk_bytes(hidden.device)
    return TokenStats(*_LinearLogprobs.apply(hidden, weight, bias, targets, temperature, chunk_bytes))


def fused_linear_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    loss_fn: LossFn,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    chunk_bytes: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, TokenStats]:
    """Sum of a per-token loss over the targets, differentiable in hidden, weight and bias, and the statistics.

    Shapes, dtypes, errors as `linear_logprobs`. `loss_fn(stats, rows)` gets a chunk's statistics (differentiated) and
    its token indices and returns weighted losses [n]; it must be pure and may look back through `stats.history`.
    Gradients are made in this call, while a chunk's logits exist; the statistics returned are detached.
    """
    _check(hidden, weight, targets, bias, temperature, backend)
    if backend == "reference":
        return reference.fused_linear_loss(hidden, weight, targets, loss_fn, bias=bias, temperature=temperature)
    chunk_bytes = chunk_bytes or default_chunk_bytes(hidden.device)
    loss, *stats = _FusedLinearLoss.apply(hidden, weight, bias, targets, loss_fn, temperature, chunk_bytes)
    return loss, TokenStats(*stats)
