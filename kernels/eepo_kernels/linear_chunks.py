"""Works for `linear_loss.py`: buffers in a byte budget, the three GEMMs, and rows packed for two of them.

Shapes: N tokens, n rows of a chunk, m rows of the gradient buffer, D hidden size, V vocabulary.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from eepo_kernels.row_stats_torch import TorchRows

CHUNK_BUFFERS = {"triton": 2, "torch": 3, "torch half": 4}
"""fp32 [n, V] buffers alive at once. triton: the chunk and the next one. torch: shifted logits, their exponentials, and
the rows among them that have a gradient, which take another one on their way to half precision."""
PACK_RATIO = 3
"""m / n. Wide gradient GEMMs matter more than wide forward ones: each reads and writes all of dW in fp32."""
FP16_TARGET = 16.0
"""Largest coefficient of the first chunk after scaling: room for 4,096 times as much later, and for p down to 4e-9."""
PACK_ALIGNMENT = 4
"""Rows go through the gradient GEMMs in multiples of so many, the last ones with zeros: a CPU's GEMM of 1, 2 or 11 rows
adds its 150,000 terms up in one sequence, which costs a digit (7e-6 where 12 rows have 6e-7)."""
ROW_ALIGNMENT = 16
"""Rows of the buffers start at multiples of so many elements, whatever V is: GEMMs and 16-byte loads ask for it."""


def default_chunk_bytes(device: torch.device) -> int:
    return 3 << 30 if device.type == "cuda" else 128 << 20


class HostRead:
    """Takes a small device tensor to the host. `read` waits for it alone, not for what was enqueued after it."""

    def __init__(self, value: Tensor):
        self.host, self.event = value, None
        if value.is_cuda:
            self.host = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
            self.host.copy_(value, non_blocking=True)
            self.event = torch.cuda.current_stream(value.device).record_event()

    def read(self) -> list[int]:
        if self.event is not None:
            self.event.synchronize()
        return self.host.tolist()


class Options(NamedTuple):
    temperature: float
    softcap: float
    """The cap of the logits, before the temperature; 0: none."""
    chunk_bytes: int
    backend: str
    dtype: torch.dtype
    """The dtype of the GEMMs' inputs."""


class Head:
    """Holds the head's weight in the dtype the logits are computed in, the buffers, and the products with them."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, options: Options, with_grad: bool):
        self.stats_dtype = torch.float64 if options.dtype == torch.float64 else torch.float32
        # bf16 logits are too coarse for exp of a difference. A GPU's GEMM hands out fp32; a CPU's needs fp32 inputs.
        self.gemm_dtype = options.dtype if weight.is_cuda else self.stats_dtype
        self.input_dtype = options.dtype
        same, wide = self.gemm_dtype == self.stats_dtype, self.stats_dtype
        self.mm: Callable[..., Tensor] = torch.mm if same else partial(torch.mm, out_dtype=wide)
        self.addmm: Callable[..., Tensor] = torch.addmm if same else partial(torch.addmm, out_dtype=wide)
        self.weight = self.rounded(weight)
        self.bias = None if bias is None else bias.detach().to(self.stats_dtype).contiguous()
        self.temperature, self.softcap = options.temperature, options.softcap
        if options.backend == "triton":
            from eepo_kernels.row_stats import TritonRows

            self.rows_class: type[TritonRows] | type[TorchRows] = TritonRows
        else:
            self.rows_class = TorchRows
        # The row count is read one chunk late, so that a chunk stays while the next one's logits are made.
        self.num_slots = 2 if options.backend == "triton" and with_grad else 1
        self.step, self.pack_rows = self._sizes(len(hidden), options, with_grad)
        self.buffers = [self.empty_rows(self.step, self.stats_dtype) for _ in range(self.num_slots)]

    def _sizes(self, num_rows: int, options: Options, with_grad: bool) -> tuple[int, int]:
        """Returns (n, m) from the byte budget: at least one row each, and no more than there are."""
        width, depth = self.weight.shape
        logits_bytes = _padded(width) * self.stats_dtype.itemsize
        if not with_grad:
            buffers = 1 if options.backend == "triton" else 2
            return _whole_tiles(options.chunk_bytes // (buffers * logits_bytes), num_rows), 0
        half = options.backend == "torch" and self.gemm_dtype != self.stats_dtype
        buffers = CHUNK_BUFFERS["torch half" if half else options.backend]
        buffers += options.softcap > 0 and options.backend == "torch"  # slopes of the cap
        # a packed row: its dlogits, its hidden state, and dX in fp32 and in the dtype of its place
        pack_bytes = (_padded(width) + depth) * self.gemm_dtype.itemsize + depth * (self.stats_dtype.itemsize + 4)
        step = _whole_tiles(options.chunk_bytes // (buffers * logits_bytes + PACK_RATIO * pack_bytes), num_rows)
        packed = PACK_RATIO * step
        return step, min(packed - packed % PACK_ALIGNMENT if packed > PACK_ALIGNMENT else packed, num_rows)

    def empty_rows(self, num_rows: int, dtype: torch.dtype) -> Tensor:
        """Returns an empty [num_rows, V], each row aligned."""
        width = self.weight.shape[0]
        return torch.empty(num_rows, _padded(width), dtype=dtype, device=self.weight.device)[:, :width]

    def rounded(self, tensor: Tensor) -> Tensor:
        """Returns a tensor in the dtype of the GEMMs, with the values that autocast's dtype can hold."""
        return tensor.to(self.input_dtype).to(self.gemm_dtype)

    def slices(self, num_rows: int) -> list[slice]:
        return [slice(i, min(i + self.step, num_rows)) for i in range(0, num_rows, self.step)]

    def logits(self, hidden: Tensor, turn: int) -> Tensor:
        """Returns the logits [n, V] in the buffer of this turn, before bias and temperature."""
        out = self.buffers[turn % self.num_slots][: len(hidden)]
        return self.mm(self.rounded(hidden), self.weight.T, out=out)

    def rows(self, logits: Tensor, targets: Tensor):
        return self.rows_class(logits, targets, self.bias, self.temperature, self.softcap)


def _padded(size: int, alignment: int = ROW_ALIGNMENT) -> int:
    return -(-size // alignment) * alignment


def _whole_tiles(wanted: int, num_rows: int) -> int:
    """Returns how many rows a chunk has: many are cut to a multiple of a GEMM's tile."""
    wanted = wanted // 128 * 128 if wanted >= 256 else wanted
    return max(1, min(wanted, num_rows))


def _divisor(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 1.0, scale)


class GradientPack:
    """Gathers dlogits and hidden states of rows that have a gradient across chunks, and multiplies them when full."""

    def __init__(self, head: Head, hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: list[bool]):
        """Makes gradients: weight's and bias's are sums over chunks, so fp32; hidden's are written once, in place.

        fp16 has no room for gradients of a mean over many tokens: there all are scaled by a power of two, found from
        the first coefficients, and dX is kept in fp32 until the upstream gradient has been multiplied in.
        """
        self.head, self.hidden = head, hidden
        m, device, options_dtype = head.pack_rows, hidden.device, head.input_dtype
        self.dlogits = head.empty_rows(_padded(m, PACK_ALIGNMENT), head.gemm_dtype)
        self.packed_hidden = torch.empty(len(self.dlogits), hidden.shape[1], dtype=head.gemm_dtype, device=device)
        self.index = torch.empty(m, dtype=torch.int64, device=device)
        self.fill = 0
        fp16 = options_dtype == torch.float16
        self.scale = torch.zeros((), device=device) if fp16 else None
        self.d_hidden = torch.zeros_like(hidden, dtype=torch.float32 if fp16 else hidden.dtype) if needs[0] else None
        self.d_weight = torch.empty_like(weight, dtype=head.stats_dtype) if needs[1] else None
        self.flushed = False
        self.d_bias = torch.zeros(len(weight), dtype=head.stats_dtype, device=device) if needs[2] else None

    def add(self, rows, order: Tensor, num_active: int, coefficients: list[Tensor], tokens: Tensor) -> None:
        """Adds the first `num_active` of `order` [n]: rows of a chunk whose token indices are `tokens` [n]."""
        if self.scale is not None:
            peak = torch.stack([c.abs().amax() for c in coefficients]).amax().float()
            usable = (self.scale == 0) & (peak > 0) & peak.isfinite()
            self.scale = torch.where(usable, torch.exp2(torch.floor(torch.log2(FP16_TARGET / peak))), self.scale)
            coefficients = [c * _divisor(self.scale) for c in coefficients]
        done = 0
        while done < num_active:
            take = min(len(self.index) - self.fill, num_active - done)
            chosen, place = order[done : done + take], slice(self.fill, self.fill + take)
            rows.write_grads(chosen, coefficients, self.dlogits[place])
            torch.index_select(tokens, 0, chosen, out=self.index[place])
            self.packed_hidden[place] = self.head.rounded(self.hidden[self.index[place]])
            self.fill, done = self.fill + take, done + take
            if self.fill == len(self.index):
                self.flush()

    def flush(self) -> None:
        if self.fill == 0:
            return
        padded = _padded(self.fill, PACK_ALIGNMENT)
        dlogits, hidden = self.dlogits[:padded], self.packed_hidden[:padded]
        dlogits[self.fill :], hidden[self.fill :] = 0, 0
        if self.d_hidden is not None:
            product = self.head.mm(dlogits, self.head.weight)[: self.fill]
            if self.scale is not None:
                product /= _divisor(self.scale)
            self.d_hidden.index_copy_(0, self.index[: self.fill], product.to(self.d_hidden.dtype))
        if self.d_weight is not None:
            beta = 1 if self.flushed else 0  # the first product overwrites
            self.head.addmm(self.d_weight, dlogits.T, hidden, beta=beta, out=self.d_weight)
        if self.d_bias is not None:
            self.d_bias += dlogits.sum(0, dtype=self.d_bias.dtype)
        self.fill, self.flushed = 0, True

    def outputs(self) -> list[Tensor | None]:
        self.flush()
        if self.d_weight is not None and not self.flushed:
            self.d_weight.zero_()
        if self.scale is not None:
            for total in (self.d_weight, self.d_bias):
                if total is not None:
                    total /= _divisor(self.scale)
        return [self.d_hidden, self.d_weight, self.d_bias]


class Pending:
    """Holds a chunk whose coefficients are known and whose gradient is not made yet."""

    def __init__(self, rows, coefficients: list[Tensor], tokens: Tensor):
        """Takes coefficients, dL/d(log p, entropy, log(1-p)), [n] each, and tokens [n], the chunk's token indices."""
        active = torch.stack([c != 0 for c in coefficients]).any(0)  # NaN counts as active
        self.rows, self.coefficients, self.tokens = rows, [c.contiguous() for c in coefficients], tokens
        self.order = torch.argsort(active.to(torch.int8), descending=True, stable=True)
        self.num_active = HostRead(active.sum()[None])

    def add_to(self, pack: GradientPack) -> None:
        pack.add(self.rows, self.order, self.num_active.read()[0], self.coefficients, self.tokens)
