"""The compiled weight update (csrc/): finding it, and handing it a table of matrices. Plain ctypes: no torch headers.

`_C` is the CPU part, `_C_cuda` the CUDA one; a build without a compiler has neither, and PyTorch serves.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import logging
from collections.abc import Sequence

import torch
from torch import Tensor

log = logging.getLogger(__name__)

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
SYNC, FORGET_NEAREST, FORGET_STOCHASTIC = 0, 1, 2
FIELDS = 11  # of EepoMatrix, int64 each
NUM_SUMS = 4
BLOCKS_PER_SM = 8


class Update(ctypes.Structure):
    _fields_ = [
        ("operation", ctypes.c_int64),
        ("eta", ctypes.c_float),
        ("step", ctypes.c_uint32),
        ("seed", ctypes.c_uint32),
    ]

    @classmethod
    def of(cls, operation: int, eta: float = 0.0, step: int = 0, seed: int = 0) -> Update:
        return cls(operation, eta, step & 0xFFFFFFFF, seed & 0xFFFFFFFF)


@functools.cache
def library(device_type: str) -> ctypes.CDLL | None:
    """The compiled update for this kind of device, or None where the build has none."""
    spec = importlib.util.find_spec({"cpu": "eepo_kernels._C", "cuda": "eepo_kernels._C_cuda"}[device_type])
    if spec is None or spec.origin is None:
        return None
    try:
        loaded = ctypes.CDLL(spec.origin)
    except OSError as error:
        log.warning("weight update: %s cannot be loaded: %s", spec.origin, error)
        return None
    if device_type == "cuda":
        loaded.eepo_piece_size.restype = ctypes.c_int64
        loaded.eepo_cuda_error.restype = ctypes.c_char_p
    return loaded


def as_rows(tensor: Tensor) -> tuple[int, int, int] | None:
    """(rows, columns, row stride) of a tensor seen as a matrix whose rows are contiguous; None if it is not one."""
    if tensor.is_contiguous():
        return 1, tensor.numel(), 0
    if tensor.dim() < 2 or tensor.stride(-1) != 1:
        return None
    columns, rows, stride = tensor.shape[-1], 1, tensor.stride(-2)
    if stride < columns and tensor.shape[-2] > 1:  # rows that overlap, as those of an expanded tensor
        return None
    expected = stride
    for size, step in zip(reversed(tensor.shape[:-1]), reversed(tensor.stride()[:-1]), strict=True):
        if size > 1 and step != expected:
            return None
        rows, expected = rows * size, expected * size
    return rows, columns, stride


def matrix_table(
    dst: Sequence[Tensor],
    src: Sequence[Tensor],
    keys: Sequence[int],
    offsets: Sequence[int],
    row_strides: Sequence[int],
) -> Tensor:
    """[tensors, FIELDS] int64, EepoMatrix a row. Every pair has one shape and rows that are contiguous."""
    table = []
    for d, s, key, offset, flat_stride in zip(dst, src, keys, offsets, row_strides, strict=True):
        num_rows, num_columns, d_stride = as_rows(d)
        s_rows, _, s_stride = as_rows(s)
        columns = d.shape[-1] if d.dim() else 1
        if d.numel() and (num_rows > 1 or s_rows > 1 or flat_stride != columns):
            # one of the two, or the source they come from, is not one run: go row by row
            num_rows, num_columns = d.numel() // columns, columns
            d_stride, s_stride = d_stride or columns, s_stride or columns
        key -= (1 << 64) if key >= 1 << 63 else 0
        layout = (d.data_ptr(), s.data_ptr(), num_rows, num_columns, d_stride, s_stride, offset, flat_stride)
        table.append((*layout, key, DTYPES[d.dtype], DTYPES[s.dtype]))
    return torch.tensor(table, dtype=torch.int64).view(-1, FIELDS)


def run(table: Tensor, update: Update, device: torch.device) -> Tensor:
    """Apply `update` to every matrix of `table` (a CPU tensor). Returns the four sums, float64 [4] on `device`; on a
    GPU nothing waits for it."""
    if device.type == "cpu":
        sums = torch.zeros(NUM_SUMS, dtype=torch.float64)
        library("cpu").eepo_weight_update_cpu(
            ctypes.c_void_p(table.data_ptr()), ctypes.c_int64(len(table)), ctypes.byref(update),
            ctypes.c_void_p(sums.data_ptr()), ctypes.c_int32(torch.get_num_threads()),
        )  # fmt: skip
        return sums
    return _run_cuda(table, update, device)


def _run_cuda(table: Tensor, update: Update, device: torch.device) -> Tensor:
    cuda = library("cuda")
    piece = cuda.eepo_piece_size()
    pieces = (table[:, 2] * table[:, 3] + piece - 1) // piece
    first_piece, num_pieces = pieces.cumsum(0) - pieces, int(pieces.sum())
    with torch.cuda.device(device):
        sums = torch.zeros(NUM_SUMS, dtype=torch.float64, device=device)
        if num_pieces == 0:
            return sums
        num_blocks = min(num_pieces, BLOCKS_PER_SM * torch.cuda.get_device_properties(device).multi_processor_count)
        on_device = torch.cat([table.flatten(), first_piece]).pin_memory().to(device, non_blocking=True)
        partial = torch.empty(num_blocks * NUM_SUMS, dtype=torch.float64, device=device)
        blocks_done = torch.zeros(1, dtype=torch.int32, device=device)
        code = cuda.eepo_weight_update_cuda(
            ctypes.c_void_p(on_device.data_ptr()), ctypes.c_void_p(on_device[table.numel() :].data_ptr()),
            ctypes.c_int32(len(table)), ctypes.c_int64(num_pieces), ctypes.byref(update),
            ctypes.c_void_p(partial.data_ptr()), ctypes.c_void_p(blocks_done.data_ptr()),
            ctypes.c_void_p(sums.data_ptr()), ctypes.c_int32(num_blocks),
            ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream),
        )  # fmt: skip
    if code:
        raise RuntimeError(f"weight update: CUDA error {code}: {cuda.eepo_cuda_error(code).decode()}")
    return sums
