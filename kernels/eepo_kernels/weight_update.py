"""`sync` and `forget`: the two in-place updates of an engine's weights, over many tensors at once.

The random bits of stochastic rounding come from Philox-4x32-10, a counter-based generator: key = the tensor's 64-bit
key, counter = (flat index // 8, step, seed). They depend on nothing else, so that any device, world size or tensor
layout that updates the same element draws the same bits.

η·g + w is one fused multiply-add in fp32. PyTorch has no such op for tensors, so it is made from float64 with rounding
to odd, which makes the second rounding, to fp32, exact.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ROUNDINGS = ("nearest", "stochastic")
SLICE = 1 << 18  # elements worked on at a time: bounds the float64 and int64 scratch, and stays in cache
LANES = 8  # 16-bit draws of one Philox call
MASK32 = 0xFFFFFFFF


@dataclass(frozen=True)
class ForgetStats:
    """What a forget step did, over all tensors: intended = η·g, applied = new value - old value."""

    retention: float
    """⟨applied, intended⟩ / ‖intended‖². 1 for an exact step; NaN where nothing was intended."""
    noise_ratio: float
    """‖applied - intended‖ / ‖intended‖. NaN where nothing was intended."""
    intended_norm: float
    applied_norm: float


def tensor_key(name: str) -> int:
    """64-bit key of a source tensor's name. Tied tensors share the key of the name they are stored under."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def philox(counter: Tensor, key: int, step: int, seed: int) -> list[Tensor]:
    """Philox-4x32-10 (Salmon et al. 2011). counter [n] int64; returns four [n] int64 tensors of 32 random bits."""
    c0, c1 = counter & MASK32, (counter >> 32) & MASK32
    c2, c3 = torch.full_like(counter, step & MASK32), torch.full_like(counter, seed & MASK32)
    k0, k1 = key & MASK32, key >> 32
    for _ in range(10):
        # int64 products wrap, which leaves their 64 bits right; the shift's sign bits are masked off
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = ((p1 >> 32) & MASK32) ^ c1 ^ k0, p1 & MASK32, ((p0 >> 32) & MASK32) ^ c3 ^ k1, p0 & MASK32
        k0, k1 = (k0 + 0x9E3779B9) & MASK32, (k1 + 0xBB67AE85) & MASK32
    return [c0, c1, c2, c3]


def random_bits(start: int, count: int, key: int, step: int, seed: int, device: torch.device) -> Tensor:
    """16 random bits for each flat index in [start, start + count), as int64 [count]."""
    first, last = start // LANES, (start + count + LANES - 1) // LANES
    words = philox(torch.arange(first, last, device=device), key, step, seed)
    halves = torch.stack([h for w in words for h in (w & 0xFFFF, w >> 16)], dim=1).flatten()
    return halves[start - first * LANES :][:count]


def fused_multiply_add(weight: Tensor, gradient: Tensor, eta: float) -> Tensor:
    """weight + eta·gradient with a single rounding to fp32. weight and gradient [n], any dtype up to fp32."""
    a = weight.double()
    b = gradient.double() * torch.tensor(eta, dtype=torch.float32, device=weight.device).double()
    total = a + b
    shadow = total - a
    error = (a - (total - shadow)) + (b - shadow)  # TwoSum: total + error is exact
    bits = total.view(torch.int64)
    away = ((error > 0) == (total > 0)).to(torch.int64) * 2 - 1
    odd = torch.where((error != 0) & (bits & 1 == 0), bits + away, bits)
    return odd.view(torch.float64).float()


def round_stochastic(x: Tensor, dtype: torch.dtype, bits: Tensor) -> Tensor:
    """x [n] fp32 to bf16 or fp16, up in magnitude with the probability that makes it unbiased; bits [n] in [0, 2¹⁶)."""
    raw = x.view(torch.int32)
    bits = bits.to(torch.int32)
    if dtype == torch.bfloat16:
        return ((raw + bits) & ~0xFFFF).view(torch.float32).to(dtype)
    normal = ((raw + (bits >> 3)) & ~0x1FFF).view(torch.float32)
    scaled = x.abs() * 2.0**24  # below 2^-14 the spacing of fp16 is 2^-24 throughout
    lower = scaled.floor()
    subnormal = torch.copysign((lower + (bits < (scaled - lower) * 65536)) * 2.0**-24, x)
    return torch.where(x.abs() < 2.0**-14, subnormal, normal).to(dtype)


def sync(dst: Sequence[Tensor], master: Sequence[Tensor]) -> None:
    """dst ← nearest(master), in place, for every pair of tensors of one shape."""
    for d, m in zip(dst, master, strict=True):
        if d.shape != m.shape:
            raise ValueError(f"expected pairs of one shape, found {tuple(d.shape)} and {tuple(m.shape)}")
    with torch.no_grad():
        torch._foreach_copy_(list(dst), list(master))


@torch.no_grad()
def forget(
    dst: Sequence[Tensor],
    gradient: Sequence[Tensor],
    *,
    eta: float,
    keys: Sequence[int],
    offsets: Sequence[int],
    rounding: str = "stochastic",
    seed: int = 0,
    step: int = 0,
) -> ForgetStats:
    """dst ← round(dst + eta·gradient), in place; an element whose gradient is zero keeps its bits.

    dst: contiguous fp32, bf16 or fp16. gradient: same shapes, fp32 or narrower, finite. keys: `tensor_key` of each
    source tensor; offsets: flat index of dst's first element in the unsharded source. rounding: "stochastic" or
    "nearest"; fp32 destinations take the fp32 sum as it is. seed, step: any integers, their low 32 bits are used.
    """
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding: expected one of {', '.join(ROUNDINGS)}, found {rounding!r}")
    sums = [0.0, 0.0, 0.0, 0.0]  # ⟨applied, intended⟩, ‖intended‖², ‖applied‖², ‖applied - intended‖²
    for weight, grad, key, offset in zip(dst, gradient, keys, offsets, strict=True):
        if weight.shape != grad.shape or not weight.is_contiguous():
            raise ValueError(
                f"expected contiguous weights shaped like their gradient, found {tuple(weight.shape)} and "
                f"{tuple(grad.shape)}"
            )
        weight, grad = weight.view(-1), grad.reshape(-1)
        for i in range(0, weight.numel(), SLICE):
            part, g = weight[i : i + SLICE], grad[i : i + SLICE]
            updated = fused_multiply_add(part, g, eta)
            if rounding == "stochastic" and part.dtype != torch.float32:
                bits = random_bits(offset + i, part.numel(), key, step, seed, part.device)
                updated = round_stochastic(updated, part.dtype, bits)
            updated = torch.where(g == 0, part, updated.to(part.dtype))
            intended = g.double() * eta
            applied = updated.double() - part.double()
            part.copy_(updated)
            noise = applied - intended
            for k, (x, y) in enumerate([(applied, intended), (intended, intended), (applied, applied), (noise, noise)]):
                sums[k] += float(x @ y)
    dot, intended_sq, applied_sq, noise_sq = sums
    if intended_sq == 0:
        return ForgetStats(float("nan"), float("nan"), 0.0, applied_sq**0.5)
    return ForgetStats(dot / intended_sq, (noise_sq / intended_sq) ** 0.5, intended_sq**0.5, applied_sq**0.5)
