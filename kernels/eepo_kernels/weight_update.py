"""`sync` and `forget` are the two in-place updates of an engine's weights, for a whole model in one launch; by
`checksums` an engine knows that it holds what the last of them has left.

The work is done by csrc/ (CUDA, and its CPU twin), or by `weight_update_torch.py` where nothing was compiled; all three
give the same bits.
"""

import functools
import hashlib
import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from eepo_kernels import native
from eepo_kernels.ranges import ranged
from eepo_kernels.weight_update_torch import checksum, forget_run

log = logging.getLogger(__name__)

ROUNDINGS = ("nearest", "stochastic")
BACKENDS = ("auto", "native", "torch")


class ForgetStats:
    """Says what a forget step did, over all tensors: intended = η·g, applied = new value - old value. On a GPU the sums
    are read when first asked for, so that the update itself waits for nothing."""

    def __init__(self, sums: Tensor, num_weights: int):
        """Takes sums, float64 [4]: ⟨applied, intended⟩, ‖intended‖², ‖applied‖², ‖applied - intended‖²; and
        num_weights, elements that were read and written."""
        self.sums = sums
        self.num_weights = num_weights

    @functools.cached_property
    def _sums(self) -> list[float]:
        return self.sums.tolist()

    @property
    def retention(self) -> float:
        """Is ⟨applied, intended⟩ / ‖intended‖²: 1 for an exact step; NaN where nothing was intended."""
        return self._sums[0] / self._sums[1] if self._sums[1] else float("nan")

    @property
    def noise_ratio(self) -> float:
        """Is ‖applied - intended‖ / ‖intended‖; NaN where nothing was intended."""
        return (self._sums[3] / self._sums[1]) ** 0.5 if self._sums[1] else float("nan")

    @property
    def intended_norm(self) -> float:
        return self._sums[1] ** 0.5

    @property
    def applied_norm(self) -> float:
        return self._sums[2] ** 0.5


def tensor_key(name: str) -> int:
    """Returns the 64-bit key of a source tensor's name. Tied tensors share the key of the name that is stored."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


@functools.cache
def _say_fallback(reason: str) -> None:
    log.warning("weight update: in PyTorch, which is slow: %s", reason)


def _why_not_native(dst: Sequence[Tensor], src: Sequence[Tensor]) -> str | None:
    """Returns why the compiled update cannot take these tensors; None if it can."""
    devices = {t.device for t in (*dst, *src)}
    if len(devices) > 1:
        return f"tensors on several devices ({', '.join(sorted(map(str, devices)))})"
    (device,) = devices
    if device.type not in ("cpu", "cuda"):
        return f"no compiled update for {device.type} tensors"
    if native.library(device.type) is None:
        return f"eepo_kernels was built without its {device.type} part (csrc/); reinstall with a compiler at hand"
    for t in (*dst, *src):
        if t.dtype not in native.DTYPES:
            return f"no compiled update for {t.dtype}"
        if native.as_rows(t) is None:
            return f"a tensor of shape {tuple(t.shape)} and strides {t.stride()} has no contiguous rows"
    return None


def _use_native(dst: Sequence[Tensor], src: Sequence[Tensor], backend: str) -> bool:
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, found {backend!r}")
    if backend == "torch" or not dst:
        return False
    reason = _why_not_native(dst, src)
    if reason is not None and backend == "native":
        raise ValueError(f"backend: native cannot take these tensors: {reason}")
    if reason is not None:
        _say_fallback(reason)
    return reason is None


def _check_shapes(dst: Sequence[Tensor], src: Sequence[Tensor]) -> None:
    for d, s in zip(dst, src, strict=True):
        if d.shape != s.shape:
            raise ValueError(f"expected pairs of one shape, found {tuple(d.shape)} and {tuple(s.shape)}")


def _row_strides(dst: Sequence[Tensor], row_strides: Sequence[int] | None) -> Sequence[int]:
    return [d.shape[-1] if d.dim() else 1 for d in dst] if row_strides is None else row_strides


@ranged
@torch.no_grad()
def sync(dst: Sequence[Tensor], master: Sequence[Tensor], *, backend: str = "auto") -> None:
    """Sets dst ← nearest(master) in place, for every pair of tensors of one shape: fp32, bf16 or fp16, rows contiguous.

    Raises a ValueError on shapes that differ; `backend` as in `forget`.
    """
    _check_shapes(dst, master)
    if _use_native(dst, master, backend):
        zeros = [0] * len(dst)
        table = native.matrix_table(dst, master, zeros, zeros, _row_strides(dst, None))
        native.run(table, native.Update.of(native.SYNC), dst[0].device)
    else:
        torch._foreach_copy_(list(dst), list(master))


@ranged
@torch.no_grad()
def forget(
    dst: Sequence[Tensor],
    gradient: Sequence[Tensor],
    *,
    eta: float,
    keys: Sequence[int],
    offsets: Sequence[int],
    row_strides: Sequence[int] | None = None,
    rounding: str = "stochastic",
    seed: int = 0,
    step: int = 0,
    backend: str = "auto",
) -> ForgetStats:
    """Sets dst ← round(dst + eta·gradient) in place; an element whose gradient is zero keeps its bits.

    dst: fp32, bf16 or fp16, rows contiguous. gradient: same shapes, any of these dtypes, finite. keys: `tensor_key` of
    each source tensor; offsets: flat index of dst's first element in the unsharded source; row_strides: how far apart
    two rows (of the last dimension) of dst are in it, in elements: dst's own number of columns, unless columns were
    sharded. rounding: "stochastic" or "nearest"; fp32 destinations take the fp32 sum as it is. seed, step: any
    integers, their low 32 bits are used. backend: "native" (csrc/), "torch", or "auto": native where it was built and
    can take the tensors. ValueError on shapes, rounding or backend that do not fit.
    """
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding: expected one of {', '.join(ROUNDINGS)}, found {rounding!r}")
    _check_shapes(dst, gradient)
    row_strides = _row_strides(dst, row_strides)
    num_weights = sum(d.numel() for d in dst)
    if _use_native(dst, gradient, backend):
        table = native.matrix_table(dst, gradient, keys, offsets, row_strides)
        operation = native.FORGET_STOCHASTIC if rounding == "stochastic" else native.FORGET_NEAREST
        update = native.Update.of(operation, eta, step, seed)
        return ForgetStats(native.run(table, update, dst[0].device), num_weights)
    sums = torch.zeros(4, dtype=torch.float64, device=dst[0].device if dst else "cpu")
    for weight, grad, key, offset, stride in zip(dst, gradient, keys, offsets, row_strides, strict=True):
        columns = weight.shape[-1] if weight.dim() else 1
        whole = weight.is_contiguous() and stride == columns
        runs = [weight.view(-1)] if whole else _rows_of(weight)
        grads = [grad.reshape(-1)] if whole else grad.reshape(-1, columns)
        for i, (run, g) in enumerate(zip(runs, grads, strict=True)):
            sums += forget_run(run, g, offset + i * stride, key, eta, (rounding, seed, step))
    return ForgetStats(sums, num_weights)


def _rows_of(weight: Tensor) -> list[Tensor]:
    """Returns views of the rows of the last dimension."""
    return [row for part in weight for row in _rows_of(part)] if weight.dim() > 1 else [weight]


@ranged
@torch.no_grad()
def checksums(
    tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype] | None = None, *, backend: str = "auto"
) -> Tensor:
    """Returns int64 [tensors]: each tensor's bits as signed integers, a row's sum times its number from 1, modulo 2⁶⁴.

    tensors: fp32, bf16 or fp16, rows contiguous; one of one dimension is a column. dtypes: what each is rounded to
    first, to nearest, so that a checksum says what a `sync` of it must leave. Computed on the tensors' device, in one
    launch that reads them once; `backend` as in `forget`.
    """
    dtypes = [t.dtype for t in tensors] if dtypes is None else dtypes
    if not tensors:
        return torch.zeros(0, dtype=torch.int64)
    if _use_native(tensors, [], backend):
        return native.run_checksums(native.checksum_table(tensors, dtypes), tensors[0].device)
    return torch.stack([checksum(t.to(dtype)) for t, dtype in zip(tensors, dtypes, strict=True)])
