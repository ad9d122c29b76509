"""A CUDA device that is not there, for PyTorch's CPU build.

`build` compiles fake_cuda.cpp; a process loads it before it imports torch (PyTorch asks once whether there is CUDA),
and calls `attach`, for what torch.cuda says in Python. Tensors have to be made under FakeTensorMode (tracing.py):
shapes, dtypes, devices and no numbers.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib
import os
import subprocess
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch
import torch._dynamo  # keeps a table of them
import torch.cuda.nvtx
from torch.utils.cpp_extension import include_paths, library_paths

SOURCE = Path(__file__).with_name("fake_cuda.cpp")
MEMORY = 140 << 30  # of an H200


def build(folder: Path) -> Path:
    """The library, compiled once for this PyTorch and this source, whoever asks first."""
    key = hashlib.sha256(SOURCE.read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    library = folder / f"fake_cuda_{key}.so"
    with (folder / "fake_cuda.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.is_file():
            made = library.with_suffix(".tmp")
            headers = [f"-I{path}" for path in include_paths()]
            where = [f"-L{path}" for path in library_paths()]
            where += [f"-Wl,-rpath,{path}" for path in library_paths()]
            command = ["g++", "-shared", "-fPIC", "-std=c++20", *headers, str(SOURCE), "-o", str(made), *where]
            subprocess.run([*command, "-lc10", "-ltorch_cpu"], check=True, timeout=120)
            made.rename(library)
    return library


class Event:
    def __init__(self, *_, **__):
        pass

    def record(self, *_) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def wait(self, *_) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Event) -> float:
        return 1.0


class Stream:
    def __init__(self, device=None, priority: int = 0, **_):
        self.priority, self.cuda_stream, self.device = priority, 0, torch.device("cuda:0")

    def synchronize(self) -> None:
        pass

    def record_event(self, *_) -> Event:
        return Event()

    def wait_stream(self, *_) -> None:
        pass

    def wait_event(self, *_) -> None:
        pass

    def query(self) -> bool:
        return True


@contextmanager
def _inside(*_, **__):
    yield


def prepare_deepspeed() -> None:
    """Before `attach`: DeepSpeed, when imported, asks PyTorch's compiler for its table, and for the kind of device."""
    os.environ["DS_ACCELERATOR"] = "cuda"
    from eepo_fast.policy.zero import import_deepspeed

    import_deepspeed()
    importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")


def attach() -> None:
    """What torch.cuda says in Python. What keeps a table of PyTorch's functions must have been imported before."""
    cuda, stream = torch.cuda, Stream()
    properties = SimpleNamespace(
        name="rehearsed", major=9, minor=0, multi_processor_count=132, total_memory=MEMORY, warp_size=32
    )
    cuda.is_available = cuda.is_initialized = lambda: True
    cuda.init = cuda._lazy_init = cuda.empty_cache = cuda.synchronize = cuda.set_device = lambda *_, **__: None
    cuda.device_count, cuda.current_device = lambda: 1, lambda: 0
    cuda.get_device_capability = lambda *_: (9, 0)
    cuda.get_device_properties, cuda.get_device_name = lambda *_: properties, lambda *_: properties.name
    cuda.mem_get_info, cuda.memory_snapshot = lambda *_: (MEMORY, MEMORY), lambda: []
    cuda.is_bf16_supported = lambda *_, **__: True
    for counter in ("memory_allocated", "max_memory_allocated", "reset_peak_memory_stats"):
        setattr(cuda, counter, lambda *_: 0)
    cuda.nvtx.range_push = cuda.nvtx.range_pop = torch.Tensor.record_stream = lambda *_: None
    cuda.is_current_stream_capturing = lambda: False
    cuda.Stream, cuda.Event = Stream, Event
    cuda.current_stream = cuda.default_stream = lambda *_: stream
    cuda.stream = cuda.device = cuda.device_of = _inside
