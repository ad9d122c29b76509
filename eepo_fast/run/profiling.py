"""`eepo-fast profile` puts a few iterations under torch's profiler, or marks them for Nsight Systems, and sums them up.

Nothing is written but the trace: no run folder, no checkpoint, no evaluation. The first iterations are left out: they
pay for compilation, allocation and caches.
"""

import os
import shlex
import shutil
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from eepo_kernels import ranges
from rich.table import Table

from eepo_fast.config import Config
from eepo_fast.disk import make_folder, writing
from eepo_fast.distributed import World
from eepo_fast.rewards import make_grader
from eepo_fast.run.build import loaded_parts
from eepo_fast.run.display import NOT_PHASES, Display
from eepo_fast.run.plan import check_world
from eepo_fast.types import UserError

MIB = 2**20
NUM_OPS = 15


@dataclass
class Peaks:
    """Keeps the most memory that each phase had: of the GPU's allocator, or of the process on a CPU."""

    phase: str = ""
    bytes: dict[str, int] = field(default_factory=dict)

    def enter(self, phase: str) -> None:
        peak = take_peak()
        if self.phase:
            self.bytes[self.phase] = max(self.bytes.get(self.phase, 0), peak)
        self.phase = phase


def take_peak() -> int:
    """Returns the peak in bytes since the last call; on a CPU since its process began, where the kernel resets none."""
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return peak
    status = Path("/proc/self/status").read_text(encoding="ascii")
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak of resident memory starts again
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


@dataclass(frozen=True)
class Capture:
    iterations: int
    skip: int
    """Iterations that come before those, to warm up."""
    out: Path
    nsys: bool
    """Whether the window is marked for Nsight Systems in place of being traced."""
    command: list[str]
    """The command line, for the one that starts Nsight Systems."""


def profile(config: Config, capture: Capture, world: World, display: Display) -> None:
    """Profiles a few iterations. All ranks call this; each writes a trace."""
    out, nsys = capture.out, capture.nsys
    if nsys and not torch.cuda.is_available():
        raise UserError("--nsys: expected a CUDA device, found none; without --nsys torch's profiler traces a CPU, too")
    with world.agree():
        check_world(config, world.size, int(os.environ.get("LOCAL_WORLD_SIZE", world.size)))
        if world.is_main:
            with writing(f"--out: {out}", "choose another"):
                make_folder(out)
    peaks, rows = Peaks(), []
    ranges.enable(True)
    with world.agree():
        grader = make_grader(config.data.train, config.reward)
    with closing(grader):
        with world.agree():
            grader.start()
        with loaded_parts(config, grader, world, display) as parts:
            trainer = parts.trainer(config, grader)
            trainer.on_phase = peaks.enter
            for i in range(capture.skip):
                display.say(f"iteration {i + 1} of {capture.skip} to warm up")
                trainer.iteration()
            peaks.phase, peaks.bytes = "", {}
            tracer = nullcontext() if nsys else torch.profiler.profile()
            with window(nsys), tracer as trace:
                for _ in range(capture.iterations):
                    with ranges.named("iteration"):
                        rows.append(trainer.iteration()[1])
            peaks.enter("")
    if trace is not None:
        path = out / f"trace-rank{world.rank}.json.gz"
        with writing(f"--out: {out}", "make room, or choose another"):
            trace.export_chrome_trace(str(path))
        display.say(f"trace: {path} (open it with ui.perfetto.dev or chrome://tracing)")
    show(rows, peaks, trace, display)
    if not nsys:
        say_nsys(out, capture.command, display)


@contextmanager
def window(nsys: bool) -> Iterator[None]:
    """Marks what Nsight Systems captures."""
    if not nsys:
        yield
        return
    torch.cuda.profiler.start()
    try:
        yield
    finally:
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def show(rows: list[dict[str, float]], peaks: Peaks, trace: Any, display: Display) -> None:
    whole = sum(row["time/iteration_s"] for row in rows) / len(rows)
    names = [key for key in rows[-1] if key.startswith("time/") and key not in NOT_PHASES]
    seconds = {key[5:-2]: sum(row.get(key, 0.0) for row in rows) / len(rows) for key in names}
    seconds["other"] = max(0.0, whole - sum(seconds.values()))
    table = Table(title=f"mean of {len(rows)} iterations: {whole:.2f} s", box=None, pad_edge=False)
    for name in ("phase", "seconds", "share", "peak MiB"):
        table.add_column(name, justify="left" if name == "phase" else "right")
    for name, value in sorted(seconds.items(), key=lambda item: -item[1]):
        peak = peaks.bytes.get(name)
        table.add_row(name, f"{value:.3f}", f"{value / whole:.1%}", "" if peak is None else f"{peak / MIB:,.0f}")
    display.console.print(table)
    speed, tokens = rows[-1]["tokens/per_second"], rows[-1]["tokens/generated"]
    display.say(f"{speed:,.0f} tokens a second, {tokens:,.0f} an iteration")
    if trace is not None:
        key = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        display.say(trace.key_averages().table(sort_by=key, row_limit=NUM_OPS, max_name_column_width=48))


def say_nsys(out: Path, command: list[str], display: Display) -> None:
    if shutil.which("nsys") is None:
        display.say("Nsight Systems (nsys) is not installed: no command for it")
        return
    options = "-t cuda,nvtx,osrt,cublas --capture-range=cudaProfilerApi --capture-range-end=stop --force-overwrite=true"
    target = f"-o {shlex.quote(str(out / 'iterations'))} {shlex.join([*command, '--nsys'])}"
    display.say(f"the same window in Nsight Systems:\n  nsys profile {options} {target}")
