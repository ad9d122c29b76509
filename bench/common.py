"""Timing and the record of a bench: device, versions, commit, command."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from torch.profiler import ProfilerActivity, profile


def interleaved(variants: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Median seconds of each variant, run in turns, so that a noisy machine slows all of them alike."""
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


class Allocations(NamedTuple):
    peak_bytes: int
    """Most bytes alive at once, beyond what was there before."""
    largest_bytes: int


def count_allocations(run: Callable[[], object]) -> Allocations:
    """The memory that `run` asks for on a CPU, allocation by allocation."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as prof:
        run()
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    assert sizes, "the profiler saw no allocation"
    alive = peak = 0
    for size in sizes:
        alive += size
        peak = max(peak, alive)
    return Allocations(peak, max(sizes))


def peak_bytes(run: Callable[[], object]) -> int:
    """Most bytes alive at once during `run`, on the GPU if there is one, beyond what was there before."""
    if not torch.cuda.is_available():
        return count_allocations(run).peak_bytes
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def parser_with_defaults(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    parser.add_argument("--repeats", type=int, default=5)
    return parser


def parse_args(description: str) -> argparse.Namespace:
    return parser_with_defaults(description).parse_args()


def record(rows: list[dict], out: Path | None, **top: float) -> None:
    """top: numbers that stand beside the rows."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    for row in rows:
        print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
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
