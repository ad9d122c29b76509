"""Computes a chunk's row statistics and their gradient in PyTorch: what runs on a CPU, and the twin of `row_stats.py`.

The stable form, with z the logits over the temperature, k the target, M₂ = max_{j≠k} z_j, e_j = exp(z_j - M₂),
s = Σ_{j≠k} e_j and d = z_k - M₂ - log s:

    log p     = -softplus(-d)
    log(1-p)  = -softplus(d)
    H         = -p log p - (1-p) log(1-p) + (1-p) (log s - Σ e_j (z_j - M₂) / s)

Every term of H is ≥ 0, so nothing cancels. Gradients, for upstream a (log p), b (H) and c (log(1-p)):

    dz_k      =  a (1-p) - b p (log p + H) - c p
    dz_j      = (e_j / s) [-a (1-p) - b (1-p) (log p_j + H) + c p],   log p_j = log(1-p) + z_j - M₂ - log s

With a softcap c the logits are c tanh(x / c) of what the GEMM wrote, and each gradient is multiplied by
1 - tanh²(x / c).

Shapes: n rows, k of them with a gradient, V vocabulary.
"""

import torch
from torch import Tensor
from torch.nn.functional import softplus

from eepo_kernels.reference import TokenStats

MASKED = -1e30  # stands for a logit of -inf after the shift: exp gives 0, and 0 * MASKED is 0 where 0 * inf is NaN


BLOCK = 8192  # columns multiplied at a time: the products stay in cache


def _sum_of_products(a: Tensor, b: Tensor) -> Tensor:
    """Returns Σ_j a_ij b_ij, [n, 1], without the [n, V] products and with `sum`'s accuracy: a dot product of a BLAS
    adds its 150,000 terms up in sequence, and the entropy loses two digits."""
    total = torch.zeros_like(a[:, :1])
    for start in range(0, a.shape[1], BLOCK):
        block = slice(start, start + BLOCK)
        total += (a[:, block] * b[:, block]).sum(1, keepdim=True)
    return total


class TorchRows:
    """Holds the statistics, and until the gradient is made two [n, V] buffers: shifted logits and exponentials."""

    def __init__(self, logits: Tensor, targets: Tensor, bias: Tensor | None, temperature: float, softcap: float = 0.0):
        """Takes logits [n, V] fp32 or float64, which are overwritten; targets [n] int64; bias [V] or None. A softcap of
        0 is none."""
        if bias is not None:
            logits.add_(bias)
        if softcap:
            logits.div_(softcap).tanh_().mul_(softcap)
        self.temperature, self.softcap = temperature, softcap
        self.target = targets[:, None]
        target_logits = logits.gather(1, self.target)
        logits.scatter_(1, self.target, -torch.inf)
        shift = logits.amax(1, keepdim=True)
        # A row whose other logits are all -inf has no scale of its own; any finite shift leaves their exponentials 0.
        shift = torch.where(shift == -torch.inf, target_logits.clamp_min(torch.finfo(logits.dtype).min), shift)
        # The temperature divides differences, not logits: at an offset of 1e4 one rounding less of a thousandth.
        self.shifted = logits.sub_(shift)
        if temperature != 1:
            self.shifted.div_(temperature)
        self.shifted.clamp_(min=MASKED)
        self.exp = self.shifted.exp()
        self.total = self.exp.sum(1, keepdim=True)
        self.log_total = self.total.log()
        weighted = _sum_of_products(self.exp, self.shifted)
        self.shift: Tensor | None = shift  # until the slopes of the cap are made
        self.target_logits = target_logits
        lead = (target_logits - shift) / temperature - self.log_total
        self.logp, self.log1mp = -softplus(-lead), -softplus(lead)
        self.p, self.q = self.logp.exp(), self.log1mp.exp()
        rest = torch.where(self.total == 0, 0.0, self.log_total - weighted / self.total)
        # 0 log 0 = 0; the comparisons are such that NaN stays NaN
        p_log_p = torch.where(self.p == 0, 0.0, self.p * self.logp)
        q_log_q = torch.where(self.q == 0, 0.0, self.q * self.log1mp)
        self.entropy = self.q * rest - p_log_p - q_log_q

    def stats(self) -> TokenStats:
        return TokenStats(self.logp.squeeze(1), self.entropy.squeeze(1), self.log1mp.squeeze(1))

    def write_grads(self, index: Tensor, coefficients: list[Tensor], out: Tensor) -> None:
        """Writes dL/dlogits of rows `index` [k] int64 to out [k, V], for `coefficients` a, b, c [n] each. A call for
        all of the rows consumes the buffers."""
        a, b, c = (x[:, None] / self.temperature for x in coefficients)
        slope_of_target = self._apply_cap_slopes()
        alone = self.total == 0  # no other token has a probability
        log_total = torch.where(alone, 0.0, self.log_total)
        inverse_total = torch.where(alone, 0.0, 1 / self.total)
        log_p_shift = torch.where(self.log1mp == -torch.inf, MASKED, self.log1mp) - log_total
        logp = torch.where(self.logp == -torch.inf, MASKED, self.logp)
        target_grad = (a * self.q - c * self.p - b * self.p * (logp + self.entropy)) * slope_of_target
        slope = -b * self.q * inverse_total
        constant = (c * self.p - a * self.q - b * self.q * (log_p_shift + self.entropy)) * inverse_total
        if len(index) == len(self.shifted):
            factor = self.shifted.mul_(slope).add_(constant)
            torch.mul(factor, self.exp, out=out)
        else:
            factor = self.shifted[index].mul_(slope[index]).add_(constant[index])
            if out.dtype == factor.dtype:
                torch.index_select(self.exp, 0, index, out=out)
                out.mul_(factor)
            else:
                torch.mul(factor, self.exp[index], out=out)
        out.scatter_(1, self.target[index], target_grad[index].to(out.dtype))

    def _apply_cap_slopes(self) -> Tensor | float:
        """Multiplies the exponentials, once, by the derivative of the cap at each logit, and returns the target's."""
        if not self.softcap:
            return 1.0
        slope_of_target = 1 - (self.target_logits / self.softcap).square()
        if self.shift is not None:
            slopes = self.shifted.mul(self.temperature / self.softcap).add_(self.shift / self.softcap)
            # the target's place, which is overwritten, stands far outside
            self.exp.mul_(slopes.clamp_(-1, 1).square_().neg_().add_(1))
            self.shift = None
        return slope_of_target
