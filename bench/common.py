"""Times a bench and writes its record: device, versions, commit, command."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import torch
import transformers
from torch.profiler import ProfilerActivity, profile


def interleaved(variants: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Returns the median seconds of each variant, run in turns, so that a noisy machine slows all of them alike."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(repeats + 1):  # the first turn warms up
        for name, run in variants.items():
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


class CpuAllocations:
    """Counts the memory that is asked for on a CPU while it is entered, allocation by allocation."""

    peak_bytes: int
    """Most bytes alive at once, beyond what was there before."""
    largest_bytes: int

    def __enter__(self) -> CpuAllocations:
        self.profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True)
        self.profile.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self.profile.__exit__(*error)
        events = [e for e in self.profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
        assert sizes, "the profiler saw no allocation"
        self.peak_bytes, self.largest_bytes = max(accumulate(sizes, initial=0)), max(sizes)


class CudaAllocations:
    """Counts the same on a GPU; one at a time."""

    peak_bytes: int

    def __enter__(self) -> CudaAllocations:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self.before = torch.cuda.memory_allocated()
        return self

    def __exit__(self, *error) -> None:
        torch.cuda.synchronize()
        self.peak_bytes = torch.cuda.max_memory_allocated() - self.before


def allocations() -> CpuAllocations | CudaAllocations:
    return CudaAllocations() if torch.cuda.is_available() else CpuAllocations()


def count_allocations(run: Callable[[], object]) -> CpuAllocations:
    with CpuAllocations() as found:
        run()
    return found


def peak_bytes(run: Callable[[], object]) -> int:
    with allocations() as found:
        run()
    return found.peak_bytes


def parser_with_defaults(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    parser.add_argument("--repeats", type=int, default=5)
    return parser


def parse_args(description: str) -> argparse.Namespace:
    return parser_with_defaults(description).parse_args()


def described(values: dict) -> str:
    """Returns one line, and one more for each dictionary in it."""
    flat = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in values.items() if not isinstance(v, dict)}
    lines = ["  ".join(f"{k} {v}" for k, v in flat.items())]
    lines += [f"  {k}: {described(v)}" for k, v in values.items() if isinstance(v, dict)]
    return "\n".join(lines)


def record(rows: list[dict], out: Path | None, **top: float | str) -> None:
    """Prints and keeps the rows. top: numbers that stand beside them."""
    for row in rows:
        print(described(row))
    keep(rows, out, **top)


def keep(rows: list[dict], out: Path | None, **top: float | str) -> None:
    """Keeps what is there so far: a bench that is ended leaves that."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "device": device,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "commit": git.stdout.strip(),
            "command": " ".join(sys.argv),
            **top,
            "rows": rows,
        }
        out.write_text(json.dumps(content, indent=1), encoding="utf-8")
