"""Runs Triton kernels over the rows of a chunk of logits: one pass for the statistics, one for the gradient.

Both are bound by memory: `row_stats_fwd_kernel` reads each logit once; `row_grad_kernel` reads it once more and writes
its gradient, for the rows that have one, packed. The mathematics is that of `row_stats_torch.py`, their twin.

Bias, softcap and temperature are applied on the way in, so that the chunk stays what the GEMM wrote. One program a
row, on grid x (y ends at 65,535); row offsets in int64 (row * stride passes 2^31).

Shapes: n rows, k of them with a gradient, V vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from eepo_kernels.reference import TokenStats

BLOCK_V = 1024
NUM_WARPS = 4  # 8 logits a thread: two 16-byte loads in flight
LAUNCH = {"BLOCK_V": BLOCK_V, "num_warps": NUM_WARPS, "enable_fp_fusion": True}
ROW_ALIGNMENT = tl.constexpr(16)
LOAD_BITS = tl.constexpr(128)
MASKED = tl.constexpr(-1e28)
"""Stands for a logit of -inf: differences of two stay finite, where -inf - -inf is NaN, and so do a row's sums of them
at the lowest temperature."""
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def log1p_unit(y):
    """Returns log(1 + y), y in [0, 1], to about 2 ulp: the series of 2 atanh(y / (2 + y)). Fast logs fail near 1."""
    w = y / (2.0 + y)
    w2 = w * w
    series = 1.0 / 15.0
    series = series * w2 + 1.0 / 13.0
    series = series * w2 + 1.0 / 11.0
    series = series * w2 + 1.0 / 9.0
    series = series * w2 + 1.0 / 7.0
    series = series * w2 + 1.0 / 5.0
    series = series * w2 + 1.0 / 3.0
    series = series * w2 + 1.0
    return 2.0 * w * series


@triton.jit
def softplus(x):
    return tl.maximum(x, 0.0) + log1p_unit(tl.exp(-tl.abs(x)))


@triton.jit
def tanh(x):
    """Computes the hyperbolic tangent to about 2 ulp: near 0 its series, where 1 - e^-2x has lost its digits."""
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    x2 = x * x
    near = 62.0 / 2835.0 - x2 * (1382.0 / 155925.0)
    near = x2 * (1.0 / 3.0 - x2 * (2.0 / 15.0 - x2 * (17.0 / 315.0 - x2 * near)))
    return tl.where(tl.abs(x) < 0.25, x - x * near, tl.where(x < 0, -far, far))


@triton.jit
def cap_slope(x):
    """Returns 1 - tanh²(x), exact where tanh(x) is 1."""
    e = tl.exp(-2.0 * tl.abs(x))
    return 4.0 * e / ((1.0 + e) * (1.0 + e))


@triton.jit
def load_raw(logits_ptr, bias_ptr, cols, V, HAS_BIAS: tl.constexpr, CUT: tl.constexpr):
    """Returns logit + bias in fp32; with CUT anything from V on."""
    if CUT:
        z = tl.load(logits_ptr + cols, mask=cols < padded(V), other=0.0).to(tl.float32)
        if HAS_BIAS:
            z += tl.load(bias_ptr + cols, mask=cols < V, other=0.0).to(tl.float32)
    else:
        z = tl.load(logits_ptr + cols).to(tl.float32)
        if HAS_BIAS:
            z += tl.load(bias_ptr + cols).to(tl.float32)
    return z


@triton.jit
def to_logits(raw, cols, V, softcap, CUT: tl.constexpr, HAS_CAP: tl.constexpr):
    """Returns what `load_raw` gave, capped; MASKED where that is -inf and, with CUT, from V on. The temperature divides
    differences of these, not the logits: at an offset of 1e4 one rounding less of a thousandth."""
    z = softcap * tanh(raw / softcap) if HAS_CAP else raw
    if CUT:
        z = tl.where(cols < V, z, MASKED)
    # a NaN stays one
    return tl.maximum(z, MASKED, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def load_logits(
    logits_ptr, bias_ptr, cols, V, softcap, HAS_BIAS: tl.constexpr, CUT: tl.constexpr, HAS_CAP: tl.constexpr
):
    raw = load_raw(logits_ptr, bias_ptr, cols, V, HAS_BIAS, CUT)
    return to_logits(raw, cols, V, softcap, CUT, HAS_CAP)


@triton.jit
def padded(V):
    """Returns the end of a row with its padding: a mask that ends there leaves 16-byte accesses whole, whatever V."""
    return tl.cdiv(V, ROW_ALIGNMENT) * ROW_ALIGNMENT


@triton.jit
def merge(m, s, w, z, scale):
    """Merges a block z [groups, lanes] into the running maxima m [groups] and sums s, w [groups, lanes]: one
    exponential a logit, and one a group for what its maximum has moved by."""
    top = tl.maximum(m, tl.max(z, 1))
    step = ((m - top) * scale)[:, None]
    decay = tl.exp2(step)
    delta = (z - top[:, None]) * scale
    e = tl.exp2(delta)
    return top, s * decay + e, (w + s * step) * decay + e * delta


# A row reads one number through each of these. They may begin anywhere, and one compiled kernel serves all places.
ANY_ALIGNMENT = ["targets_ptr", "index_ptr"]


@triton.jit(do_not_specialize_on_alignment=ANY_ALIGNMENT)
def row_stats_fwd_kernel(
    logits_ptr,
    bias_ptr,
    targets_ptr,
    logprobs_ptr,
    entropy_ptr,
    log1mp_ptr,
    shift_ptr,
    total_ptr,
    stride_n,
    V,
    inverse_temperature,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Every lane keeps s = Σ e^δ and w = Σ e^δ δ over its logits but the target's, for δ = (z-m)/T; the lanes of one
    16-byte load share their running maximum m. All are merged once at the end. In the loop δ is in units of log 2.

    The target's block and the last one come first, so that the loop over the others compares no column with anything.
    """
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride_n
    wanted = tl.load(targets_ptr + row)
    # A wrong index never becomes a wild read: the row is NaN.
    valid = (wanted >= 0) & (wanted < V)
    target = tl.where(valid, wanted, 0).to(tl.int32)
    z_target = load_logits(logits_ptr, bias_ptr, target, V, softcap, HAS_BIAS, True, HAS_CAP)
    z_target = tl.where(z_target == MASKED, float("-inf"), tl.where(valid, z_target, float("nan")))

    LANES: tl.constexpr = LOAD_BITS // logits_ptr.dtype.element_ty.primitive_bitwidth
    GROUPS: tl.constexpr = BLOCK_V // LANES
    scale = inverse_temperature * LOG2_E
    block = tl.arange(0, GROUPS)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    m = tl.full([GROUPS], MASKED, tl.float32)
    s = tl.zeros([GROUPS, LANES], tl.float32)
    w = tl.zeros([GROUPS, LANES], tl.float32)

    target_block, num_whole = target // BLOCK_V, V // BLOCK_V
    cols = target_block * BLOCK_V + block
    z = load_logits(logits_ptr, bias_ptr, cols, V, softcap, HAS_BIAS, True, HAS_CAP)
    m, s, w = merge(m, s, w, tl.where(cols == target, MASKED, z), scale)
    if (num_whole * BLOCK_V < V) & (target_block != num_whole):
        z = load_logits(logits_ptr, bias_ptr, num_whole * BLOCK_V + block, V, softcap, HAS_BIAS, True, HAS_CAP)
        m, s, w = merge(m, s, w, z, scale)
    for i in range(0, num_whole - (target_block < num_whole).to(tl.int32)):
        start = (i + (i >= target_block).to(tl.int32)) * BLOCK_V
        z = load_logits(logits_ptr, bias_ptr, start + block, V, softcap, HAS_BIAS, False, HAS_CAP)
        m, s, w = merge(m, s, w, z, scale)

    s = tl.where((m == MASKED)[:, None], 0.0, s)  # such a group has met no logit above -inf
    shift = tl.max(m, 0)
    below = ((m - shift) * scale)[:, None]
    rescale = tl.exp2(below)
    total = tl.sum(tl.sum(s * rescale, 1), 0)
    weighted = tl.sum(tl.sum((w + s * below) * rescale, 1), 0) * LN_2
    log_total = tl.log(total)
    lead = (z_target - shift) * inverse_temperature - log_total
    logp = -softplus(-lead)
    log1mp = -softplus(lead)
    p = tl.exp(logp)
    q = tl.exp(log1mp)
    # 0 log 0 = 0; the comparisons are such that NaN stays NaN
    p_log_p = tl.where(p == 0.0, 0.0, p * logp)
    q_log_q = tl.where(q == 0.0, 0.0, q * log1mp)
    rest = tl.where(total == 0.0, 0.0, log_total - weighted / total)
    tl.store(logprobs_ptr + row, logp)
    tl.store(log1mp_ptr + row, log1mp)
    tl.store(entropy_ptr + row, q * rest - p_log_p - q_log_q)
    tl.store(shift_ptr + row, shift)
    tl.store(total_ptr + row, total)


@triton.jit(do_not_specialize_on_alignment=ANY_ALIGNMENT)
def row_grad_kernel(
    logits_ptr,
    bias_ptr,
    targets_ptr,
    logprobs_ptr,
    entropy_ptr,
    log1mp_ptr,
    shift_ptr,
    total_ptr,
    a_ptr,
    b_ptr,
    c_ptr,
    index_ptr,
    grad_ptr,
    stride_n,
    stride_k,
    V,
    inverse_temperature,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Makes row i of the gradient from row `index[i]` of the logits; upstream: a (log p), b (entropy), c (log1mp)."""
    out = tl.program_id(0).to(tl.int64)
    row = tl.load(index_ptr + out)
    logits_ptr += row * stride_n
    grad_ptr += out * stride_k
    target = tl.load(targets_ptr + row)
    a = tl.load(a_ptr + row) * inverse_temperature
    b = tl.load(b_ptr + row) * inverse_temperature
    c = tl.load(c_ptr + row) * inverse_temperature
    logp = tl.load(logprobs_ptr + row)
    log1mp = tl.load(log1mp_ptr + row)
    entropy = tl.load(entropy_ptr + row)
    shift = tl.load(shift_ptr + row)
    total = tl.load(total_ptr + row)

    p = tl.exp(logp)
    q = tl.exp(log1mp)
    alone = total == 0.0  # no other token has a probability
    log_total = tl.where(alone, 0.0, tl.log(total))
    inverse_total = tl.where(alone, 0.0, 1.0 / total)
    finite_logp = tl.where(logp == float("-inf"), MASKED, logp)
    finite_log1mp = tl.where(log1mp == float("-inf"), MASKED, log1mp)
    target_grad = a * q - c * p - b * p * (finite_logp + entropy)
    scale = inverse_temperature * LOG2_E
    slope = -b * q * inverse_total * LN_2
    constant = (c * p - a * q - b * q * (finite_log1mp - log_total + entropy)) * inverse_total
    block = tl.arange(0, BLOCK_V)
    whole = V // BLOCK_V * BLOCK_V
    for start in range(0, whole, BLOCK_V):
        raw = load_raw(logits_ptr, bias_ptr, start + block, V, HAS_BIAS, False)
        shifted = (to_logits(raw, start + block, V, softcap, False, HAS_CAP) - shift) * scale
        grad = tl.exp2(shifted) * (constant + slope * shifted)
        if HAS_CAP:
            grad *= cap_slope(raw / softcap)
        tl.store(grad_ptr + start + block, grad.to(grad_ptr.dtype.element_ty))
    if whole < V:
        cols = whole + block
        raw = load_raw(logits_ptr, bias_ptr, cols, V, HAS_BIAS, True)
        shifted = (to_logits(raw, cols, V, softcap, True, HAS_CAP) - shift) * scale
        grad = tl.exp2(shifted) * (constant + slope * shifted)
        if HAS_CAP:
            grad *= cap_slope(raw / softcap)
        grad = tl.where(cols < V, grad, 0.0)
        tl.store(grad_ptr + cols, grad.to(grad_ptr.dtype.element_ty), mask=cols < padded(V))
    tl.debug_barrier()  # whichever thread wrote the target's place has done so
    in_row = (target >= 0) & (target < V)
    if HAS_CAP:
        at = tl.where(in_row, target, 0)
        target_grad *= cap_slope(load_raw(logits_ptr, bias_ptr, at, V, HAS_BIAS, True) / softcap)
    tl.store(grad_ptr + target, target_grad.to(grad_ptr.dtype.element_ty), mask=in_row)


def _aligned(indices: Tensor) -> Tensor:
    """Returns contiguous indices that begin at a multiple of 16 bytes: a part of a chunk may begin anywhere, and Triton
    compiles a kernel a second time, in mid-run, for an address that is no multiple."""
    indices = indices.contiguous()
    return indices.clone() if indices.storage_offset() * indices.itemsize % 16 else indices


def _has_padded_rows(matrix: Tensor) -> bool:
    return matrix.stride(1) == 1 and matrix.stride(0) % ROW_ALIGNMENT.value == 0


class TritonRows:
    """Holds the statistics of a chunk's rows, and the chunk itself until their gradient is made."""

    def __init__(self, logits: Tensor, targets: Tensor, bias: Tensor | None, temperature: float, softcap: float = 0.0):
        """Takes logits [n, V], left as they are, rows padded to ROW_ALIGNMENT; targets [n] int64; bias [V] or None. A
        softcap of 0 is none."""
        n = len(logits)
        assert _has_padded_rows(logits)
        targets = _aligned(targets)
        self.logits, self.targets, self.temperature = logits, targets, temperature
        self.softcap, self.flags = softcap, {"HAS_BIAS": bias is not None, "HAS_CAP": softcap > 0}
        self.bias = logits if bias is None else bias  # a kernel takes no None
        self.columns = [torch.empty(n, dtype=torch.float32, device=logits.device) for _ in range(5)]
        with torch.cuda.device_of(logits):  # Triton launches on the current device
            row_stats_fwd_kernel[(n,)](
                logits,
                self.bias,
                targets,
                *self.columns,
                logits.stride(0),
                logits.shape[1],
                1.0 / temperature,
                softcap,
                **self.flags,
                **LAUNCH,
            )

    def stats(self) -> TokenStats:
        return TokenStats(self.columns[0], self.columns[1], self.columns[2])

    def write_grads(self, index: Tensor, coefficients: list[Tensor], out: Tensor) -> None:
        """Writes dL/dlogits of rows `index` [k] int64 to out [k, V], for `coefficients` [n] each, as in the kernel. The
        padding of out is overwritten with zeros."""
        assert _has_padded_rows(out) and all(c.is_contiguous() for c in coefficients)
        with torch.cuda.device_of(out):
            row_grad_kernel[(len(index),)](
                self.logits,
                self.bias,
                self.targets,
                *self.columns,
                *coefficients,
                _aligned(index),
                out,
                self.logits.stride(0),
                out.stride(0),
                self.logits.shape[1],
                1.0 / self.temperature,
                self.softcap,
                **self.flags,
                **LAUNCH,
            )
