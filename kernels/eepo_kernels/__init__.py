"""Has the kernels of EEPO: the LM head fused with any per-token loss, and in-place weight updates."""

from eepo_kernels.linear_loss import fused_linear_loss, linear_logprobs
from eepo_kernels.reference import TokenStats
from eepo_kernels.weight_update import ForgetStats, checksums, forget, sync, tensor_key

__all__ = [
    "ForgetStats",
    "TokenStats",
    "checksums",
    "forget",
    "fused_linear_loss",
    "linear_logprobs",
    "sync",
    "tensor_key",
]
