"""csrc/weight_update_cuda.cu itself, compiled for the CPU and run through the host code that launches it on a GPU: no
weight differs by a bit from the PyTorch twin.

The launch is rewritten to a call; cuda_on_cpu/cuda_fp16.h gives threads, barriers, shuffles, half precision and the
16-byte vectors, and counts what hardware would fault on. What no CPU can show: that a fence is where a GPU needs one,
and what nvcc makes of the source (bench/compile_report.py compiles it).
"""

import contextlib
import ctypes
import functools
import platform
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from eepo_kernels import checksums, forget, native, sync, tensor_key

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "csrc" / "weight_update_cuda.cu"
FLAGS = ["-O1", "-std=c++17", "-ffp-contract=off", "-fPIC", "-shared", "-U_FORTIFY_SOURCE", "-Wno-unknown-pragmas"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LAUNCH = re.compile(r"(\w+(?:<[\w, ]+>)?)<<<([^,]+), ([^,]+), [^>]*>>>\((.*?)\);", re.DOTALL)
BLOCKS_OF_AN_H200 = 1980


def build(folder: Path, *changes: tuple[str, str]) -> ctypes.CDLL:
    """The library that native.py loads on a GPU, for this CPU. changes: (a line's part, what stands in its place)."""
    source = SOURCE.read_text()
    for old, new in changes:
        assert old in source, f"{SOURCE.name} has no {old!r} to change"
        source = source.replace(old, new)
    source, launches = LAUNCH.subn(r"launch(\2, \3, [&] { \1(\4); });", source)
    assert launches and "<<<" not in source
    file = folder / "rehearsed.cpp"
    file.write_text(source)
    machine = ["-march=x86-64-v3"] if platform.machine() == "x86_64" and "f16c" in _cpu_flags() else []
    headers = ["-I", str(Path(__file__).parent / "cuda_on_cpu"), "-I", str(SOURCE.parent)]
    command = ["g++", *FLAGS, *machine, *headers, "-o", str(folder / "rehearsed.so"), str(file)]
    subprocess.run(command, check=True)
    library = ctypes.CDLL(str(folder / "rehearsed.so"))
    library.eepo_piece_size.restype = ctypes.c_int64
    library.eepo_cuda_error.restype = ctypes.c_char_p
    library.cuda_on_cpu_faults.restype = ctypes.c_int64
    return library


def _cpu_flags() -> str:
    """fmaf and half precision by instruction, where the CPU has them; in software they are as right, and slow."""
    return Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    return build(tmp_path_factory.mktemp("cuda"))


@pytest.fixture
def on_cpu(monkeypatch):
    """From here on the host code of the CUDA path serves CPU tensors, with this library and so many blocks at most."""

    most = native.BLOCKS_PER_SM

    def use(library: ctypes.CDLL, num_blocks: int = BLOCKS_OF_AN_H200, order: int = 0) -> None:
        assert num_blocks % most == 0 or num_blocks < most
        monkeypatch.setattr(native, "library", lambda device_type: library)
        monkeypatch.setattr(native, "BLOCKS_PER_SM", min(num_blocks, most))
        properties = SimpleNamespace(multi_processor_count=max(1, num_blocks // most))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
        monkeypatch.setattr(native, "run", native._run_cuda)
        monkeypatch.setattr(native, "run_checksums", native._run_checksums_cuda)
        library.cuda_on_cpu_start(ctypes.c_uint64(order))

    return use


class Case:
    """A set of tensors to update: destinations are views of `whole`, all of which is compared."""

    def __init__(self, dtype: torch.dtype, gradient_dtype: torch.dtype, seed: int = 0):
        self.dtype, self.gradient_dtype = dtype, gradient_dtype
        self.generator = torch.Generator().manual_seed(seed)
        self.whole: list[torch.Tensor] = []
        self.views, self.gradients, self.offsets, self.row_strides = [], [], [], []

    def numbers(self, *shape: int) -> torch.Tensor:
        exponents = torch.randint(-18, 4, shape, generator=self.generator)
        return torch.randn(*shape, generator=self.generator) * 2.0**exponents

    def add(self, view, gradient, offset: int = 0, row_stride: int | None = None) -> None:
        self.views.append(view)
        self.gradients.append(gradient)
        self.offsets.append(offset)
        self.row_strides.append(row_stride if row_stride is not None else view.shape[-1])

    def dst(self, *shape: int) -> torch.Tensor:
        self.whole.append(self.numbers(*shape).to(self.dtype))
        self.whole[-1].view(-1)[::11] = -0.0  # the one value that a step of zero would change
        return self.whole[-1]

    def gradient(self, *shape: int) -> torch.Tensor:
        """Half of the elements of a step's size or above, a third zero."""
        g = self.numbers(*shape) * 2.0**-6
        return torch.where(torch.rand(shape, generator=self.generator) < 0.3, 0.0, g).to(self.gradient_dtype)

    def run(self, rounding: str, backend: str):
        keys = [tensor_key(str(i)) for i in range(len(self.views))]
        layout = dict(keys=keys, offsets=self.offsets, row_strides=self.row_strides)
        return forget(
            self.views, self.gradients, eta=0.3, rounding=rounding, seed=-3, step=1 << 33 | 9, backend=backend, **layout
        )


def every_layout(dtype: torch.dtype, gradient_dtype: torch.dtype) -> Case:
    """All that a plan may hand out: alignment, lengths, rows of wider matrices, shards of rows and of columns."""
    case = Case(dtype, gradient_dtype)
    for start in (0, 1, 3, 4, 7):  # elements: addresses that 16 bytes do and do not divide, of either tensor
        for gradient_start in (0, 2, 5):
            case.add(case.dst(4000)[start : start + 3001], case.gradient(4000)[gradient_start : gradient_start + 3001])
    for offset in (1, 5, 8, 12, (1 << 34) + 3):  # a shard may begin inside a group of random bits
        case.add(case.dst(1024), case.gradient(1024), offset)
    case.add(case.dst(20_011), case.gradient(20_011), 13)  # three pieces
    case.add(case.dst(1), case.gradient(1), 5)
    case.add(case.dst(0), case.gradient(0))
    case.add(case.dst(40, 64)[:, 16:48], case.gradient(40, 32))  # rows inside a wider destination, whole vectors
    case.add(case.dst(40, 50)[:, 11:41], case.gradient(40, 30))  # and cut vectors
    case.add(case.dst(60, 256)[:, 32:224], case.gradient(60, 192))  # two pieces; a thread comes to every column
    case.add(case.dst(5, 4096)[:, 16:2576], case.gradient(5, 2560))  # rows longer than a block's step
    whole = case.gradient(64, 96)
    case.add(case.dst(64, 32), whole[:, 32:64], 32, 96)  # a shard of columns, its gradient a view of the whole
    case.add(case.dst(64, 31), whole[:, 5:36], 5, 96)
    case.add(case.dst(64, 32), case.gradient(64, 32), 36, 96)  # begins inside a group of random bits
    case.add(case.dst(3, 5, 7), case.gradient(3, 5, 7), 11)
    return case


def many_tensors(dtype: torch.dtype) -> Case:
    """More pieces than blocks: every block has several, most of them a whole tensor."""
    case = Case(dtype, torch.float32)
    for i in range(1100):
        case.add(case.dst(24 + i % 17), case.gradient(24 + i % 17), i)
    case.add(case.dst(40_000), case.gradient(40_000))
    return case


def bits_of(case: Case) -> list[torch.Tensor]:
    return [w.view(torch.int32 if case.dtype == torch.float32 else torch.int16).clone() for w in case.whole]


@functools.cache
def by_pytorch(make, dtypes: tuple, rounding: str) -> tuple[list[torch.Tensor], dict[str, float]]:
    """(bits, figures) of a case after the update in PyTorch."""
    case = make(*dtypes)
    found = figures(case.run(rounding, "torch"))
    return bits_of(case), found


def figures(stats) -> dict[str, float]:
    return {n: getattr(stats, n) for n in ("retention", "noise_ratio", "intended_norm", "applied_norm")}


def differences(library: ctypes.CDLL, make, dtypes: tuple, rounding: str) -> tuple[int, list[float]]:
    """Weights whose bits the CUDA source and PyTorch disagree on, their memory's surroundings included; one more for
    every figure that is off, and for everything that a GPU would fault on. And the sums."""
    expected, expected_figures = by_pytorch(make, dtypes, rounding)
    case = make(*dtypes)
    stats = case.run(rounding, "native")
    different = sum(int((a != b).sum()) for a, b in zip(bits_of(case), expected, strict=True))
    off = figures(stats) != pytest.approx(expected_figures, rel=1e-4, abs=1e-5)
    return different + off + library.cuda_on_cpu_faults(), stats.sums.tolist()


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("gradient", DTYPES)
@pytest.mark.parametrize("dst", DTYPES)
def test_every_layout_and_dtype(rehearsed, on_cpu, dst, gradient, rounding):
    on_cpu(rehearsed)
    assert differences(rehearsed, every_layout, (DTYPES[dst], DTYPES[gradient]), rounding)[0] == 0


@pytest.mark.parametrize("num_blocks", [1, 2, 8, BLOCKS_OF_AN_H200])
def test_any_number_of_blocks_in_any_order(rehearsed, on_cpu, num_blocks):
    """The same weights, and the very same sums whichever block comes last."""
    sums = []
    for order in (0, 1):
        on_cpu(rehearsed, num_blocks, order)
        different, found = differences(rehearsed, many_tensors, (torch.bfloat16,), "stochastic")
        assert different == 0
        sums.append(found)
    assert sums[0] == sums[1]


@pytest.mark.parametrize("src", DTYPES)
@pytest.mark.parametrize("dst", DTYPES)
def test_sync_rounds_like_pytorch(rehearsed, on_cpu, dst, src):
    special = torch.tensor(
        [0.0, -0.0, 1 + 2**-8, 1 + 3 * 2**-8, 6e-8, -3e-5, 1e-40, 65519.0, 65520.0, torch.inf, torch.nan]
    )
    generator = torch.Generator().manual_seed(0)
    ordinary = torch.randn(9000, generator=generator) * 2.0 ** torch.randint(-20, 10, (9000,), generator=generator)
    master = torch.cat([special, ordinary]).to(DTYPES[src])
    expected, found = master.to(DTYPES[dst]), torch.zeros(len(master), dtype=DTYPES[dst])
    on_cpu(rehearsed)
    sync([found], [master], backend="native")
    as_bits = torch.int32 if dst == "fp32" else torch.int16
    number = ~expected.isnan()
    assert torch.equal(found.view(as_bits)[number], expected.view(as_bits)[number])
    assert torch.equal(found.isnan(), expected.isnan()) and rehearsed.cuda_on_cpu_faults() == 0


def checked(dtype: torch.dtype) -> list[torch.Tensor]:
    """Columns, matrices of one piece and of several, rows that vectors of 16 bytes fit into and not, a shard's view."""
    case = Case(dtype, torch.float32)
    whole = [
        case.dst(*shape) for shape in ((7,), (2048,), (40, 64), (3, 5, 7), (129, 192), (40, 50), (1, 20_011), (0, 4))
    ]
    return [*whole, case.dst(40, 64)[:, 16:48], case.dst(40, 50)[:, 11:41], case.dst(4001)[1:].view(5, 800)]


@pytest.mark.parametrize("num_blocks", [3, BLOCKS_OF_AN_H200])
@pytest.mark.parametrize("as_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_checksums_are_those_of_pytorch(rehearsed, on_cpu, dtype, as_dtype, num_blocks):
    tensors = checked(DTYPES[dtype])
    dtypes = [DTYPES[as_dtype]] * len(tensors)
    expected = checksums(tensors, dtypes, backend="torch")
    on_cpu(rehearsed, num_blocks, order=1)
    assert torch.equal(checksums(tensors, dtypes, backend="native"), expected)
    assert rehearsed.cuda_on_cpu_faults() == 0


def test_dtypes_of_a_model_may_differ(rehearsed, on_cpu):
    """A launch for each pair of them; the sums are of all."""

    def make() -> Case:
        case = Case(torch.bfloat16, torch.float32)
        for i, (dst, src) in enumerate([("bf16", "fp32"), ("fp32", "fp32"), ("bf16", "bf16"), ("bf16", "fp32")]):
            case.whole.append(case.numbers(300 + i).to(DTYPES[dst]))
            case.add(case.whole[-1], (case.numbers(300 + i) * 0.1).to(DTYPES[src]), i)
        return case

    expected, found = make(), make()
    figures_of = figures(expected.run("stochastic", "torch"))
    on_cpu(rehearsed, 2)
    assert figures(found.run("stochastic", "native")) == pytest.approx(figures_of, rel=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(found.whole, expected.whole, strict=True))


FAULTS = {
    "rounds to nearest": ("STOCHASTIC ? __uint_as_float", "false ? __uint_as_float"),
    "two roundings": ("__fmaf_rn(eta, gradient, old)", "(eta * gradient + old)"),
    "the flat index without its rows": ("flat + at.row * flat_stride + at.column", "flat + at.column"),
    "the draw of another element": ("lane_of(words, flat % EEPO_LANES)", "lane_of(words, 0)"),
    "a zero gradient is rounded": ("gradient == 0.0f ? old : updated", "updated"),
    "16 bytes at any address": ("((m.dst | m.src) & 15) == 0 && ", ""),
    "the last piece is whole": (
        "for (; e + VECTOR <= last; e += STEP, at.step()) {",
        "for (; e < last; e += STEP, at.step()) {",
    ),
    "a row too far": ("if (column >= columns) column", "if (column > columns) column"),
    "a block adds up what is not written": ("gridDim.x - 1", "gridDim.x / 2"),
    "a barrier in one warp alone": ("  if (!is_last) return;", "  if (!is_last && threadIdx.x < 32) return;"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_source_is_seen(tmp_path, on_cpu, fault):
    """Negative control: the line changed, and the comparison fails."""
    library = build(tmp_path, FAULTS[fault])
    on_cpu(library, order=1)
    about_blocks = "block" in fault or "barrier" in fault
    what = (many_tensors, (torch.bfloat16,)) if about_blocks else (every_layout, (torch.bfloat16, torch.float32))
    assert differences(library, *what, "stochastic")[0] > 0


@pytest.mark.parametrize("change", [("(at.row + 1) *", "at.row *"), ("(int32_t)all[i] >> 16", "all[i] >> 16")])
def test_a_fault_in_the_checksum_is_seen(tmp_path, on_cpu, change):
    tensors = checked(torch.bfloat16)
    expected = checksums(tensors, backend="torch")
    on_cpu(build(tmp_path, change))
    assert not torch.equal(checksums(tensors, backend="native"), expected)
