"""Forgets in PyTorch, bit for bit as csrc/ does: it is what serves without a compiler, and the third twin.

The random bits of stochastic rounding come from Philox-4x32-10, a counter-based generator: key = the tensor's 64-bit
key, counter = (flat index // 8, step, seed). They depend on nothing else, so that any device, world size or tensor
layout that updates the same element draws the same bits.

η·g + w is one fused multiply-add in fp32. PyTorch has no such op for tensors, so it is made from float64 with rounding
to odd, which makes the second rounding, to fp32, exact.
"""

import torch
from torch import Tensor

SLICE = 1 << 18  # elements worked on at a time: bounds the float64 and int64 scratch, and stays in cache
LANES = 8  # 16-bit draws of one Philox call
MASK32 = 0xFFFFFFFF


def philox(counter: Tensor, key: int, step: int, seed: int) -> list[Tensor]:
    """Runs Philox-4x32-10 (Salmon et al. 2011). counter [n] int64; returns four [n] int64 tensors of 32 random bits."""
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
    """Returns 16 random bits for each flat index in [start, start + count), as int64 [count]."""
    first, last = start // LANES, (start + count + LANES - 1) // LANES
    words = philox(torch.arange(first, last, device=device), key, step, seed)
    halves = torch.stack([h for w in words for h in (w & 0xFFFF, w >> 16)], dim=1).flatten()
    return halves[start - first * LANES :][:count]


def fused_multiply_add(weight: Tensor, gradient: Tensor, eta: float) -> Tensor:
    """Returns weight + eta·gradient with a single rounding to fp32. weight and gradient [n], any dtype up to fp32."""
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
    """Rounds x [n] fp32 to bf16 or fp16, up in magnitude with the unbiased probability; bits [n] in [0, 2¹⁶)."""
    raw = x.view(torch.int32)
    bits = bits.to(torch.int32)
    if dtype == torch.bfloat16:
        return ((raw + bits) & ~0xFFFF).view(torch.float32).to(dtype)
    normal = ((raw + (bits >> 3)) & ~0x1FFF).view(torch.float32)
    scaled = x.abs() * 2.0**24  # below 2^-14 the spacing of fp16 is 2^-24 throughout
    lower = scaled.floor()
    subnormal = torch.copysign((lower + (bits < (scaled - lower) * 65536)) * 2.0**-24, x)
    return torch.where(x.abs() < 2.0**-14, subnormal, normal).to(dtype)


def forget_run(weight: Tensor, gradient: Tensor, offset: int, key: int, eta: float, options: tuple) -> Tensor:
    """Forgets in one contiguous run [n] of elements whose flat indices begin at `offset`; options: (rounding, seed,
    step). Returns the four sums, float64 [4]: ⟨applied, intended⟩, ‖intended‖², ‖applied‖², ‖applied - intended‖²."""
    rounding, seed, step = options
    sums = torch.zeros(4, dtype=torch.float64, device=weight.device)
    for i in range(0, weight.numel(), SLICE):
        part, g = weight[i : i + SLICE], gradient[i : i + SLICE]
        updated = fused_multiply_add(part, g, eta)
        if part.dtype != torch.float32:
            if rounding == "stochastic":
                bits = random_bits(offset + i, part.numel(), key, step, seed, part.device)
                updated = round_stochastic(updated, part.dtype, bits)
            updated = updated.to(part.dtype)
        updated = torch.where(g == 0, part, updated)
        intended = g.double() * eta
        applied = updated.double() - part.double()
        part.copy_(updated)
        noise = applied - intended
        sums += torch.stack([applied @ intended, intended @ intended, applied @ applied, noise @ noise])
    return sums


def checksum(tensor: Tensor) -> Tensor:
    """Returns csrc/'s checksum of one tensor: a scalar on its device."""
    bits = tensor.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize])
    rows = bits.sum(-1, dtype=torch.int64).flatten() if tensor.dim() > 1 else bits.flatten().to(torch.int64)
    return (rows * torch.arange(1, len(rows) + 1, device=tensor.device)).sum()
