"""Makes per-token statistics, any per-token loss and gradients of hidden · Wᵀ, without ever holding the logits [N, V].

The logits exist one chunk of rows at a time, in fp32. `fused_linear_loss` makes the gradients while a chunk's logits
are at hand: rows with a non-zero coefficient are packed, across chunks, into a buffer of their own, which goes through
the two gradient GEMMs whenever it is full. A loss whose coefficients are non-zero on a share f of the rows costs
1 + 2f matrix products. How many rows are packed has to be known on the host; on a GPU it is read one chunk late, while
the next chunk's GEMM runs.

Buffers and products are in `linear_chunks.py`, the mathematics of a row in `row_stats_torch.py`, and its Triton kernels
in `row_stats.py`.

Shapes: N tokens, n rows of a chunk, m rows of the gradient buffer, D hidden size, V vocabulary.
"""

import functools
import importlib.util
import logging
import os

import torch
from torch import Tensor

from eepo_kernels import reference
from eepo_kernels.linear_chunks import GradientPack, Head, HostRead, Options, Pending, default_chunk_bytes
from eepo_kernels.ranges import ranged
from eepo_kernels.reference import LossFn, TokenStats

log = logging.getLogger(__name__)

BACKENDS = ("auto", "triton", "torch", "reference")
TEMPERATURES = (1e-6, 1e6)


@functools.cache
def _auto_backend(device_type: str, device_index: int | None) -> str:
    """Returns the backend for `auto`, and says it in the log once a device."""
    if device_type != "cuda":
        backend, why = "torch", f"{device_type} tensors"
    elif importlib.util.find_spec("triton") is None:
        backend, why = "torch", "triton is not installed; install it for the fused row kernels"
    elif torch.cuda.get_device_capability(device_index) < (8, 0):
        backend, why = "torch", "the Triton kernels need compute capability 8.0"
    else:
        backend, why = "triton", "CUDA tensors"
    log.log(logging.WARNING if device_type == "cuda" and backend == "torch" else logging.INFO,
            "fused head: backend %s (%s)", backend, why)  # fmt: skip
    return backend


def _resolve_backend(backend: str, hidden: Tensor) -> str:
    if backend == "auto":
        half_or_single = hidden.dtype in (torch.float32, torch.bfloat16, torch.float16)
        return _auto_backend(hidden.device.type, hidden.device.index) if half_or_single else "torch"
    if backend == "triton":
        if hidden.dtype == torch.float64:
            raise ValueError("backend: triton takes fp32, bf16 and fp16, found float64; use torch")
        if not hidden.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError(
                f"backend: triton needs CUDA tensors, found {hidden.device}; use torch, or set TRITON_INTERPRET=1 "
                "before the first import to run its kernels in the interpreter"
            )
    return backend


def _check(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, temperature: float) -> torch.dtype:
    """Returns the GEMMs' dtype: under autocast it is autocast's, as for `torch.nn.functional.linear`."""
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"expected hidden [N, D] and weight [V, D], found {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    device = hidden.device.type
    autocast = torch.is_autocast_enabled(device) and hidden.dtype != torch.float64
    if not (hidden.is_floating_point() and weight.is_floating_point()) or (
        hidden.dtype != weight.dtype and not autocast
    ):
        raise ValueError(
            f"expected hidden and weight of one floating dtype, found {hidden.dtype} and {weight.dtype}; cast one of "
            "them, or call under torch.autocast"
        )
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(
            f"expected targets [{hidden.shape[0]}] of int64, found {tuple(targets.shape)} of {targets.dtype}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"expected bias [{weight.shape[0]}], found {tuple(bias.shape)}")
    if bias is not None and (bias.dtype != weight.dtype if not autocast else not bias.is_floating_point()):
        raise ValueError(f"expected bias in the dtype of weight, {weight.dtype}, found {bias.dtype}")
    devices = {"hidden": hidden, "weight": weight, "targets": targets} | ({} if bias is None else {"bias": bias})
    if len({t.device for t in devices.values()}) > 1:
        found = ", ".join(f"{name} on {t.device}" for name, t in devices.items())
        raise ValueError(f"expected one device, found {found}")
    low, high = TEMPERATURES
    if not low <= temperature <= high:
        raise ValueError(f"temperature: expected a number from {low:g} to {high:g}, found {temperature}")
    return torch.get_autocast_dtype(device) if autocast else hidden.dtype


def _settings(
    hidden, weight, targets, bias, temperature, chunk_bytes, backend, logit_scale=1.0, softcap=None
) -> Options:  # fmt: skip
    """Checks all that can be checked without looking at values; `auto` is still to be resolved. A scale is the
    temperature's inverse, and the softcap of scaled logits is another one of those that are not."""
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, found {backend!r}")
    for name, value in (("logit_scale", logit_scale), ("softcap", 1.0 if softcap is None else softcap)):
        if not 0 < value < float("inf"):
            raise ValueError(f"{name}: expected a number above 0, found {value}")
    temperature, softcap = temperature / logit_scale, 0.0 if softcap is None else softcap / logit_scale
    dtype = _check(hidden, weight, targets, bias, temperature)
    if chunk_bytes is None:
        chunk_bytes = default_chunk_bytes(hidden.device)
    elif chunk_bytes < 1:
        raise ValueError(f"chunk_bytes: expected a number of bytes above 0, found {chunk_bytes}")
    return Options(float(temperature), float(softcap), chunk_bytes, backend, dtype)


class _TargetCheck:
    """Asks at the start whether all targets are in [0, V); the answer is read once the first GEMM is on its way."""

    def __init__(self, targets: Tensor, num_words: int):
        self.num_words = num_words
        self.range = HostRead(torch.stack(targets.aminmax())) if targets.numel() else None

    def raise_if_wrong(self) -> None:
        lowest, highest = self.range.read() if self.range is not None else (0, 0)
        if lowest < 0 or highest >= self.num_words:
            raise ValueError(f"targets: expected values in [0, {self.num_words}), found {lowest} to {highest}")


def _empty_stats(hidden: Tensor, dtype: torch.dtype) -> TokenStats:
    logprobs, entropy, log1mp = (torch.empty(len(hidden), dtype=dtype, device=hidden.device) for _ in range(3))
    return TokenStats(logprobs, entropy, log1mp)


def _fill(whole: TokenStats, part: TokenStats, rows: slice) -> None:
    for target, values in zip(whole[:3], part[:3], strict=True):
        target[rows] = values


def _no_autocast(hidden: Tensor):
    return torch.autocast(hidden.device.type, enabled=False)


def _packed(gradients: list[Tensor | None]) -> list[Tensor]:
    """Makes a gradient that nobody asked for empty, since an operator's outputs cannot be None."""
    return [torch.empty(0) if g is None else g for g in gradients]


@torch.library.custom_op("eepo_kernels::linear_logprobs", mutates_args=())
def _linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    softcap: float,
    chunk_bytes: int,
    backend: str,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    with _no_autocast(hidden):
        check = _TargetCheck(targets, len(weight))
        options = Options(temperature, softcap, chunk_bytes, _resolve_backend(backend, hidden), dtype)
        head = Head(hidden, weight, bias, options, with_grad=False)
        out = _empty_stats(hidden, head.stats_dtype)
        for turn, rows in enumerate(head.slices(len(targets))):
            logits = head.logits(hidden[rows], turn)
            if turn == 0:
                check.raise_if_wrong()
            _fill(out, head.rows(logits, targets[rows]).stats(), rows)
        return out[:3]


@_linear_logprobs.register_fake
def _(hidden, weight, bias, targets, temperature, softcap, chunk_bytes, backend, dtype):
    stats_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    return tuple(hidden.new_empty(hidden.shape[0], dtype=stats_dtype) for _ in range(3))


@torch.library.custom_op("eepo_kernels::linear_logprobs_backward", mutates_args=())
def _linear_logprobs_backward(
    upstream: list[Tensor],
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    softcap: float,
    chunk_bytes: int,
    backend: str,
    dtype: torch.dtype,
    needs: list[bool],
) -> list[Tensor]:
    """Recomputes the logits of the rows that have an upstream gradient, and of no others."""
    with _no_autocast(hidden):
        tokens = torch.stack([g != 0 for g in upstream]).any(0).nonzero().squeeze(1)
        options = Options(temperature, softcap, chunk_bytes, _resolve_backend(backend, hidden), dtype)
        head = Head(hidden, weight, bias, options, with_grad=True)
        pack = GradientPack(head, hidden, weight, bias, needs)
        for turn, part in enumerate(head.slices(len(tokens))):
            chosen = tokens[part]
            rows = head.rows(head.logits(hidden[chosen], turn), targets[chosen])
            everything = torch.arange(len(chosen), device=tokens.device)
            pack.add(rows, everything, len(chosen), [g[chosen] for g in upstream], chosen)
        pairs = zip(pack.outputs(), (hidden, weight, bias), strict=True)
        return _packed([g if g is None or i is None else g.to(i.dtype) for g, i in pairs])


@_linear_logprobs_backward.register_fake
def _(upstream, hidden, weight, bias, targets, temperature, softcap, chunk_bytes, backend, dtype, needs):
    inputs = (hidden, weight, bias)
    return _packed([torch.empty_like(i) if need else None for i, need in zip(inputs, needs, strict=True)])


def _save_inputs(ctx, inputs, output):
    tensors, ctx.settings = inputs[:4], inputs[4:]
    ctx.save_for_backward(*tensors)


def _backward(ctx, *upstream):
    needs = list(ctx.needs_input_grad[:3])
    grads = _linear_logprobs_backward(list(upstream), *ctx.saved_tensors, *ctx.settings, needs)
    nothing = [None] * (1 + len(ctx.settings))
    return *(g if need else None for g, need in zip(grads, needs, strict=True)), *nothing


_linear_logprobs.register_autograd(_backward, setup_context=_save_inputs)


class _FusedLinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, loss_fn, options, grad_enabled):
        ctx.needs = needs = [need and grad_enabled for need in ctx.needs_input_grad[:3]]
        with _no_autocast(hidden):
            loss, stats, gradients = _forward_with_gradients(hidden, weight, bias, targets, loss_fn, options, needs)
        ctx.save_for_backward(*(g for g in gradients if g is not None))
        ctx.dtypes = [None if i is None else i.dtype for i in (hidden, weight, bias)]
        ctx.mark_non_differentiable(*stats[:3])
        return loss, *stats[:3]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream, *_):  # type: ignore[bad-override]  # torch's hints take any arguments
        """Scales the gradients in place, so that they are not there twice; autograd refuses a second use of them."""
        saved = iter(ctx.saved_tensors)
        grads = []
        for needed, dtype in zip(ctx.needs, ctx.dtypes, strict=True):
            grad = next(saved) if needed else None
            if needed:
                out = grad if grad.dtype == dtype else torch.empty_like(grad, dtype=dtype)
                grad = torch.mul(grad, upstream, out=out)
            grads.append(grad)
        return *grads, None, None, None, None


def _forward_with_gradients(hidden, weight, bias, targets, loss_fn, options, needs):
    """Returns (loss, statistics, [dX, dW, db] with None where not needed)."""
    check = _TargetCheck(targets, len(weight))
    options = options._replace(backend=_resolve_backend(options.backend, hidden))
    head = Head(hidden, weight, bias, options, with_grad=any(needs))
    pack = GradientPack(head, hidden, weight, bias, needs) if any(needs) else None
    out = _empty_stats(hidden, head.stats_dtype)
    loss = torch.zeros((), dtype=torch.float64, device=hidden.device)
    waiting = None
    for turn, rows in enumerate(head.slices(len(targets))):
        logits = head.logits(hidden[rows], turn)
        if turn == 0:
            check.raise_if_wrong()
        if waiting is not None:
            waiting.add_to(pack)
            waiting = None
        chunk = head.rows(logits, targets[rows])
        _fill(out, chunk.stats(), rows)
        history = TokenStats(*(s[: rows.stop] for s in out[:3]))
        tokens = torch.arange(rows.start, rows.stop, device=targets.device)
        part_loss, coefficients = _loss_and_coefficients(loss_fn, chunk.stats(), history, tokens, check=turn == 0)
        loss += part_loss
        if pack is not None:
            waiting = Pending(chunk, coefficients, tokens)
            if head.num_slots == 1:
                waiting.add_to(pack)
                waiting = None
        del chunk  # its buffers must be free before the next one's are made
    if waiting is not None:
        waiting.add_to(pack)
    return loss.to(head.stats_dtype), out, [None] * 3 if pack is None else pack.outputs()


def _loss_and_coefficients(loss_fn: LossFn, stats: TokenStats, history: TokenStats, rows: Tensor, check: bool):
    """Returns the sum of the chunk's losses and its derivative in each statistic: [n] each, zeros for one not used."""
    leaves = [s.detach().requires_grad_() for s in stats[:3]]
    with torch.enable_grad():
        losses = loss_fn(TokenStats(leaves[0], leaves[1], leaves[2], history), rows)
        assert losses.shape == rows.shape, f"loss_fn must return {tuple(rows.shape)}, not {tuple(losses.shape)}"
        total = losses.sum(dtype=torch.float64)
    if not total.requires_grad:
        return total, [torch.zeros_like(leaf) for leaf in leaves]
    if check:
        _refuse_other_leaves(total, leaves)
    grads = torch.autograd.grad(total, leaves, allow_unused=True)
    return total.detach(), [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True)]


def _refuse_other_leaves(total: Tensor, leaves: list[Tensor]) -> None:
    """Refuses a loss that depends on other tensors which require a gradient: it would be lost in silence."""
    seen, stack = set(), [total.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None and not any(variable is leaf for leaf in leaves):
            raise ValueError(
                "loss_fn: expected a function of the statistics alone, found a tensor of shape "
                f"{tuple(variable.shape)} that requires a gradient, which it would not get; detach it"
            )
        stack.extend(parent for parent, _ in node.next_functions)


def _reference_inputs(hidden, weight, bias, targets, options: Options) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns, for `backend="reference"`, the values that options.dtype holds, in the dtype of the statistics."""
    _TargetCheck(targets, len(weight)).raise_if_wrong()
    wide = torch.float64 if options.dtype == torch.float64 else torch.float32
    hidden, weight = (t.to(options.dtype).to(wide) for t in (hidden, weight))
    return hidden, weight, None if bias is None else bias.to(options.dtype).to(wide)


@ranged
def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    chunk_bytes: int | None = None,
    backend: str = "auto",
) -> TokenStats:
    """Returns log-prob, entropy and log(1 - p) of `targets` under softmax(z / temperature), where z is
    logit_scale · (hidden · weightᵀ + bias), and with a softcap c (Gemma 2's) c · tanh(z / c) in its place.

    hidden [N, D] and weight [V, D] of one dtype, targets [N] int64, bias [V]. Statistics are fp32 (float64 for float64
    inputs). Differentiable in hidden, weight and bias: the backward pass recomputes the logits, chunk by chunk, of the
    rows that have an upstream gradient; not twice differentiable. One operator for torch.compile.

    Under autocast the products are in autocast's dtype and each gradient in its own input's. `chunk_bytes` bounds the
    memory held beside inputs and outputs; where the weight is not in the dtype of the products (under autocast, or in
    half precision on a CPU, which multiplies in fp32) one copy of it that is comes on top.
    A NaN stays in its row. ValueError on shapes, dtypes, devices or targets that do not fit.
    """
    options = _settings(hidden, weight, targets, bias, temperature, chunk_bytes, backend, logit_scale, softcap)
    if options.backend == "reference":
        with _no_autocast(hidden):
            h, w, b = _reference_inputs(hidden, weight, bias, targets, options)
            return reference.linear_logprobs(h, w, targets, bias=b, temperature=options[0], softcap=options[1])
    return TokenStats(*_linear_logprobs(hidden, weight, bias, targets, *options))


@torch.compiler.disable
@ranged
def fused_linear_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    loss_fn: LossFn,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    chunk_bytes: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, TokenStats]:
    """Returns the sum of a per-token loss over the targets, differentiable in hidden, weight and bias, and statistics.

    Shapes, dtypes and errors are those of `linear_logprobs`. `loss_fn(stats, rows)` gets a chunk's statistics
    (differentiated) and its token indices and returns weighted losses [n]; it must be pure and may look back through
    `stats.history`. Gradients are made in this call, while a chunk's logits exist; the statistics returned are
    detached. A masked token is one whose loss is a constant, as with torch.where(mask, loss, 0): it costs no backward.
    The backward pass can be run once. torch.compile breaks its graph here, because `loss_fn` is any Python function:
    the model before it and the code behind it are compiled, this call is not, and fullgraph=True is refused.
    """
    options = _settings(hidden, weight, targets, bias, temperature, chunk_bytes, backend, logit_scale, softcap)
    if options.backend == "reference":
        with _no_autocast(hidden):
            h, w, b = _reference_inputs(hidden, weight, bias, targets, options)
            after = {"temperature": options[0], "softcap": options[1]}
            return reference.fused_linear_loss(h, w, targets, loss_fn, bias=b, **after)
    loss, *stats = _FusedLinearLoss.apply(hidden, weight, bias, targets, loss_fn, options, torch.is_grad_enabled())
    return loss, TokenStats(*stats)
