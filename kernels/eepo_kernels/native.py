"""Finds the compiled weight update (csrc/) and its checksums, and hands them a table of matrices.

All of it is plain ctypes, without torch's headers. `_C` is the CPU part, `_C_cuda` the CUDA one; a build without a
compiler has neither, and PyTorch serves.
"""

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
CHECKED_FIELDS = 6  # of EepoChecked
NUM_SUMS = 4
BLOCKS_PER_SM = 15  # an SM holds 3 blocks of a forget step at once, or 5 of a sync: no last round is half empty
FUNCTIONS = {
    "cpu": ("eepo_weight_update_cpu", "eepo_checksums_cpu"),
    "cuda": ("eepo_weight_update_cuda", "eepo_checksums_cuda", "eepo_piece_size", "eepo_cuda_error"),
}


class Update(ctypes.Structure):
    _fields_ = [
        ("operation", ctypes.c_int64),
        ("eta", ctypes.c_float),
        ("step", ctypes.c_uint32),
        ("seed", ctypes.c_uint32),
    ]

    @classmethod
    def of(cls, operation: int, eta: float = 0.0, step: int = 0, seed: int = 0) -> "Update":
        return cls(operation, eta, step & 0xFFFFFFFF, seed & 0xFFFFFFFF)


@functools.cache
def library(device_type: str) -> ctypes.CDLL | None:
    """Returns the compiled update for this kind of device, or None where the build has none."""
    spec = importlib.util.find_spec({"cpu": "eepo_kernels._C", "cuda": "eepo_kernels._C_cuda"}[device_type])
    if spec is None or spec.origin is None:
        return None
    try:
        loaded = ctypes.CDLL(spec.origin)
    except OSError as error:
        log.warning("weight update: %s cannot be loaded: %s", spec.origin, error)
        return None
    if lacking := [name for name in FUNCTIONS[device_type] if not hasattr(loaded, name)]:
        log.warning(
            "weight update: %s was built from other sources, without %s; `pip install -e .` builds it again, and "
            "PyTorch does the same work until then, slowly", spec.origin, lacking[0],
        )  # fmt: skip
        return None
    if device_type == "cuda":
        loaded.eepo_piece_size.restype = ctypes.c_int64
        loaded.eepo_cuda_error.restype = ctypes.c_char_p
    return loaded


def _loaded(device_type: str) -> ctypes.CDLL:
    found = library(device_type)
    assert found is not None, f"the build has none for {device_type}: whoever calls this has asked"
    return found


def as_rows(tensor: Tensor) -> tuple[int, int, int] | None:
    """Returns (rows, columns, row stride) of a tensor seen as a matrix with contiguous rows; None if it is not one."""
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
    """Returns [tensors, FIELDS] int64, EepoMatrix a row. Every pair has one shape and rows that are contiguous."""
    table = []
    for d, s, key, offset, flat_stride in zip(dst, src, keys, offsets, row_strides, strict=True):
        d_matrix, s_matrix = as_rows(d), as_rows(s)
        assert d_matrix is not None and s_matrix is not None, "whoever calls this has asked"
        (num_rows, num_columns, d_stride), (s_rows, _, s_stride) = d_matrix, s_matrix
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
    """Applies `update` to every matrix of `table` (a CPU tensor), and returns the four sums, float64 [4] on `device`;
    on a GPU nothing waits for it."""
    if device.type == "cpu":
        sums = torch.zeros(NUM_SUMS, dtype=torch.float64)
        _loaded("cpu").eepo_weight_update_cpu(
            ctypes.c_void_p(table.data_ptr()), ctypes.c_int64(len(table)), ctypes.byref(update),
            ctypes.c_void_p(sums.data_ptr()), ctypes.c_int32(torch.get_num_threads()),
        )  # fmt: skip
        return sums
    return _run_cuda(table, update, device)


def _run_cuda(table: Tensor, update: Update, device: torch.device) -> Tensor:
    """Launches once for each pair of dtypes among the matrices: most models have one."""
    cuda = _loaded("cuda")
    pairs = table[:, -2] * len(DTYPES) + table[:, -1]
    groups = [table[pairs == pair] for pair in pairs.unique()]
    pieces = [_pieces(group[:, 2] * group[:, 3]) for group in groups]
    with torch.cuda.device(device):
        sums = torch.zeros(NUM_SUMS, dtype=torch.float64, device=device)
        tables = [part for group, (first, _) in zip(groups, pieces, strict=True) for part in (group, first)]
        on_device = _to_device(tables, device)
        most = _num_blocks(max((count for _, count in pieces), default=0), device)
        partial = torch.empty(most * NUM_SUMS, dtype=torch.float64, device=device)
        blocks_done = torch.zeros(1, dtype=torch.int32, device=device)
        for i, (group, (_, num_pieces)) in enumerate(zip(groups, pieces, strict=True)):
            if num_pieces == 0:
                continue
            code = cuda.eepo_weight_update_cuda(
                ctypes.c_void_p(on_device[2 * i].data_ptr()), ctypes.c_void_p(on_device[2 * i + 1].data_ptr()),
                ctypes.c_int32(len(group)), ctypes.c_int64(num_pieces), ctypes.byref(update),
                ctypes.c_void_p(partial.data_ptr()), ctypes.c_void_p(blocks_done.data_ptr()),
                ctypes.c_void_p(sums.data_ptr()), ctypes.c_int32(_num_blocks(num_pieces, device)),
                ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream),
                ctypes.c_int64(int(group[0, -2])), ctypes.c_int64(int(group[0, -1])),
            )  # fmt: skip
            _raise_if_failed(code, cuda)
    return sums


def _pieces(num_elements: Tensor) -> tuple[Tensor, int]:
    """Returns (pieces before each of these matrices, of all of them); a block of a GPU takes a piece at a time."""
    size = _loaded("cuda").eepo_piece_size()
    pieces = (num_elements + size - 1) // size
    return pieces.cumsum(0) - pieces, int(pieces.sum())


def _num_blocks(num_pieces: int, device: torch.device) -> int:
    return min(num_pieces, BLOCKS_PER_SM * torch.cuda.get_device_properties(device).multi_processor_count)


def _to_device(tables: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Moves all tables in one copy, which the host does not wait for."""
    if not tables:
        return []
    whole = torch.cat([table.flatten() for table in tables]).pin_memory().to(device, non_blocking=True)
    return list(whole.split([table.numel() for table in tables]))


def _raise_if_failed(code: int, cuda: ctypes.CDLL) -> None:
    if code:
        raise RuntimeError(f"weight update: CUDA error {code}: {cuda.eepo_cuda_error(code).decode()}")


def checksum_table(tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> Tensor:
    """Returns [tensors, CHECKED_FIELDS] int64, EepoChecked a row. A tensor of one dimension is a column."""
    table = []
    for t, dtype in zip(tensors, dtypes, strict=True):
        columns = t.shape[-1] if t.dim() > 1 else 1
        stride = columns if t.is_contiguous() else t.stride(-2)
        num_rows = t.numel() // columns if columns else 0
        table.append((t.data_ptr(), num_rows, columns, stride, DTYPES[t.dtype], DTYPES[dtype]))
    return torch.tensor(table, dtype=torch.int64).view(-1, CHECKED_FIELDS)


def run_checksums(table: Tensor, device: torch.device) -> Tensor:
    """Returns the checksum of every matrix of `table` (a CPU tensor), int64 on `device`; on a GPU in one launch that
    nothing waits for."""
    if device.type == "cpu":
        sums = torch.empty(len(table), dtype=torch.int64)
        _loaded("cpu").eepo_checksums_cpu(
            ctypes.c_void_p(table.data_ptr()), ctypes.c_int64(len(table)), ctypes.c_void_p(sums.data_ptr()),
            ctypes.c_int32(torch.get_num_threads()),
        )  # fmt: skip
        return sums
    return _run_checksums_cuda(table, device)


def _run_checksums_cuda(table: Tensor, device: torch.device) -> Tensor:
    cuda = _loaded("cuda")
    first_piece, num_pieces = _pieces(table[:, 1] * table[:, 2])
    with torch.cuda.device(device):
        sums = torch.zeros(len(table), dtype=torch.int64, device=device)
        if num_pieces == 0:
            return sums
        matrices, first = _to_device([table, first_piece], device)
        code = cuda.eepo_checksums_cuda(
            ctypes.c_void_p(matrices.data_ptr()), ctypes.c_void_p(first.data_ptr()), ctypes.c_int32(len(table)),
            ctypes.c_int64(num_pieces), ctypes.c_void_p(sums.data_ptr()),
            ctypes.c_int32(_num_blocks(num_pieces, device)),
            ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream),
        )  # fmt: skip
    _raise_if_failed(code, cuda)
    return sums
