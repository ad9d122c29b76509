"""What a program on the fake device does: memory by storage, waits of the host, launches of Triton kernels.

Numbers do not exist here; where the program reads one it is given SCALAR, and lists of it.
"""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
GIB = 1 << 30
SCALAR = 0.5
OURS = ("eepo_fast", "eepo_kernels", "bench")


def caller() -> str:
    """The innermost function of ours on the stack."""
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if any(room in path.parts for room in OURS) and "tests" not in path.parts:
            return f"{path.stem}.{frame.f_code.co_qualname}"
        frame = frame.f_back
    return "outside"


class Fake(FakeTensorMode):
    avoid_device_init = True  # torch.tensor(…, device="cuda") is made on the host and moved, never on the device itself


class Phase:
    """Bytes on the device while it lasted."""

    def __init__(self, start: int):
        self.start = self.peak = start
        self.kept = 0
        """Between a forward pass and its backward pass, where a scene notes it."""
        self.layer = 0
        """Of it what one layer more would add."""
        self.end = 0
        self.explained: Counter[str] = Counter()

    @property
    def beyond(self) -> float:
        """GiB at the peak beyond what was there before."""
        return (self.peak - self.start) / GIB


class Trace(TorchDispatchMode):
    """Over FakeTensorMode; `with Trace.begin() as trace`."""

    def __init__(self):
        super().__init__()
        self.alive: Counter[str] = Counter()
        self.sizes: dict[int, tuple] = {}
        self.pinned: set[int] = set()
        self.phases: dict[str, Phase] = {}
        self.waits: Counter[str] = Counter()
        """Where the host waits for the device, by function of ours."""
        self.running: list[Phase] = []
        self.explained: Counter[str] | None = None
        """Where it is set to a Counter: bytes by where they were asked for, at the peak of each outermost phase."""
        self.instead: dict = {}
        """Operators whose insides are traced, and not taken for one operation: their Python functions."""
        self.transient: dict = {}
        """Operators that hold more than they return while they run: functions of the arguments, in bytes."""
        self.updates: Counter[int] = Counter()
        """Launches of the compiled weight update, by operation."""
        self.host_peak = 0
        """Bytes on the host."""
        self.calls: Counter[str] = Counter()
        """Of each operator."""

    @classmethod
    @contextmanager
    def begin(cls) -> Iterator[Trace]:
        trace = cls()
        tolist, pinned, tensor = FakeTensor.tolist, Tensor.is_pinned, torch.tensor
        FakeTensor.tolist = lambda t: trace._tolist(t)

        def remembered(data, **options) -> Tensor:
            made = tensor(data, **options)
            made.known = data  # what the host knows, it may ask for
            return made

        torch.tensor, FakeTensor.__deepcopy__ = remembered, _deepcopied
        Tensor.is_pinned = lambda t, *_: t.untyped_storage()._cdata in trace.pinned
        try:
            with Fake(allow_non_fake_inputs=True) as trace.fake, trace:
                yield trace
        finally:
            FakeTensor.tolist, Tensor.is_pinned, torch.tensor = tolist, pinned, tensor
            del FakeTensor.__deepcopy__

    @contextmanager
    def phase(self, name: str) -> Iterator[Phase]:
        """Phases may lie in one another."""
        found = Phase(self.alive["cuda"])
        self.running.append(found)
        yield found
        self.running.remove(found)
        found.end = self.alive["cuda"]
        found.explained, self.explained = self.explained or Counter(), self.explained and Counter()
        if name not in self.phases or self.phases[name].peak < found.peak:
            self.phases[name] = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.calls[str(func)] += 1
        if func in self.instead:
            with self:
                return self.instead[func](*args, **kwargs)
        if func is aten._local_scalar_dense.default:
            self._wait(args[0], "item")
            return _scalar(args[0].dtype)
        if func in (aten.equal.default, aten.allclose.default):
            self._wait(args[0], "equal")
            return True
        if func in (aten.nonzero.default, aten.masked_select.default):
            self._wait(args[0], "nonzero")
        if func is aten.repeat_interleave.Tensor and getattr(args[0], "known", None):
            kwargs = {**kwargs, "output_size": sum(args[0].known)}
        if func is aten.is_pinned.default:
            return args[0].untyped_storage()._cdata in self.pinned
        if func is aten._pin_memory.default:
            return self._seen(self._pin(aten.clone.default(args[0])))
        pin = kwargs.get("pin_memory")
        kwargs = {k: v for k, v in kwargs.items() if k != "pin_memory"} if pin else kwargs
        if func in self.transient:
            self._measure(self.transient[func](*args, **kwargs))
        out = func(*args, **kwargs)
        if pin:
            self._pin(out)
        if func in (aten.expand.default, aten.view.default) and out.shape == args[0].shape:
            out.known = getattr(args[0], "known", None)
        if func is aten._to_copy.default:
            self._copied(args[0], out, kwargs.get("non_blocking", False), fresh=True)
        elif func is aten.copy_.default:
            self._copied(args[1], args[0], kwargs.get("non_blocking", (*args, False)[2]), fresh=False)
        return self._seen(out)

    def _pin(self, tensor: Tensor) -> Tensor:
        self.pinned.add(tensor.untyped_storage()._cdata)
        return tensor

    def _copied(self, source: Tensor, target: Tensor, non_blocking: bool, *, fresh: bool) -> None:
        if source.device.type == target.device.type:
            return
        host = target if target.device.type == "cpu" else source
        pinned = host.untyped_storage()._cdata in self.pinned or (fresh and host is target and non_blocking)
        if not (pinned and non_blocking) and source.numel():
            self.waits[f"copy in {caller()}"] += 1

    def _wait(self, tensor: Tensor, what: str) -> None:
        if tensor.device.type == "cuda":
            self.waits[f"{what} in {caller()}"] += 1

    def _tolist(self, tensor: Tensor) -> list:
        self._wait(tensor, "tolist")

        def nested(shape) -> list:
            return [nested(shape[1:]) for _ in range(shape[0])] if shape else _scalar(tensor.dtype)

        return nested(tuple(tensor.shape))

    def weight_update(self, dst: list[Tensor], update, device: torch.device) -> Tensor:
        """Stands for the compiled weight update: its four sums."""
        assert {t.device.type for t in dst} == {"cuda"} == {device.type}
        self.updates[update.operation] += 1
        return torch.zeros(4, dtype=torch.float64, device=device)

    # -- memory

    def _seen(self, out):
        for t in tree_leaves(out):
            if isinstance(t, Tensor):
                self._hold(t)
        self._measure()
        return out

    def _hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.sizes:
            return
        size, device = storage.nbytes(), tensor.device.type
        where = _line() if self.explained is not None else ""

        def freed(_, key=key, size=size, device=device) -> None:
            self.alive[device] -= size
            del self.sizes[key]
            self.pinned.discard(key)

        self.sizes[key] = (weakref.ref(storage, freed), size, device, where)
        self.alive[device] += size

    def _measure(self, more: int = 0) -> None:
        alive = self.alive["cuda"] + more
        self.host_peak = max(self.host_peak, self.alive["cpu"])
        for phase in self.running:
            if alive > phase.peak:
                if self.explained is not None and phase is self.running[0]:
                    self.explained = Counter()
                    for _, size, device, where in self.sizes.values():
                        self.explained[where] += size if device == "cuda" else 0
                    self.explained["transient"] = more
                phase.peak = alive


def _deepcopied(tensor: Tensor, memo: dict) -> Tensor:
    """PyTorch's own copies the memory of a storage, of which there is none here, and leaves a broken heap."""
    made = tensor.detach().clone()
    return nn.Parameter(made, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made


def _line() -> str:
    frame, found = sys._getframe(3), []
    while frame is not None and len(found) < 3:
        path = Path(frame.f_code.co_filename)
        if "rehearsal" not in path.parts and "torch" not in path.parts:
            found.append(f"{path.stem}:{frame.f_lineno}")
        frame = frame.f_back
    return " < ".join(found)


def _scalar(dtype: torch.dtype):
    if dtype == torch.bool:
        return True
    return SCALAR if dtype.is_floating_point else 0


class Launches:
    """Stands for a Triton kernel: notes what it is launched with. What Triton makes another program for: dtypes, and
    which arguments are multiples of 16 (addresses, by their place in memory that starts aligned)."""

    def __init__(self, name: str):
        self.name = name
        self.programs: Counter[tuple] = Counter()
        self.strides: Counter[tuple] = Counter()

    def __getitem__(self, grid):
        def launch(*args, **constants) -> None:
            assert 0 < grid[0] < 2**31, f"{self.name}: a grid of {grid}"
            tensors = [a for a in args if isinstance(a, Tensor)]
            assert {t.device.type for t in tensors} == {"cuda"}, f"{self.name}: {[t.device for t in tensors]}"
            self.programs[tuple(_specialised(a) for a in args)] += 1
            self.strides[tuple(t.stride() for t in tensors)] += 1

        return launch

    @property
    def misaligned(self) -> int:
        """Launches with an address that is no multiple of 16."""
        return sum(n for key, n in self.programs.items() if any(part[-1] is False for part in key if len(part) == 2))


def _specialised(argument) -> tuple:
    if isinstance(argument, Tensor):
        return str(argument.dtype), argument.storage_offset() * argument.itemsize % 16 == 0
    if isinstance(argument, int):
        return "int", argument % 16 == 0, argument == 1
    return (type(argument).__name__,)
