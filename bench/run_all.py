"""Every bench, one after the other, each within LIMIT_S: `make bench` on a CPU, `make bench-gpu` on a GPU.

    python bench/run_all.py [--out bench/results/cpu] [--only bench_packing ...]

With --out each writes its JSON there, and bench/page.py draws them. On a CPU they are made small enough to end within a
quarter of an hour together; what is committed was measured with each bench's own defaults, as its JSON says.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import torch

import eepo_fast  # noqa: F401  (it says, to the benches too, how torch's threads wait for one another)

ROOT = Path(__file__).parents[1]  # paths are relative to it: they go into the JSON
LIMIT_S = 480
SMALL = {  # on a CPU
    "bench_checkpoint": ["--repeats", "1"],
    "bench_grading": ["--repeats", "1", "--num", "600"],
    "bench_iteration": ["--pairs", "3"],
    "bench_linear_loss": ["--repeats", "1", "--shape", "1024", "512", "49152", "--shares", "1", "0.2"],
    "bench_packing": ["--repeats", "1", "--completions", "12"],
    "bench_policy_step": ["--repeats", "1", "--tokens", "2048"],
    "bench_report": ["--iterations", "40", "--completions", "256"],
    "bench_rollout": ["--repeats", "2"],
    "bench_weight_update": ["--repeats", "2", "--speed"],
}
TAIL = ["--lengths", "bench/lengths/long_tail.json"]  # an eighth of the lengths, for the embedded engine
ON_A_GPU = {
    "bench_iteration": TAIL,
    "bench_iteration_quorum": [*TAIL, "--quorum", "0.9"],
    "bench_policy_step": ["--repeats", "2"],
}


def commands(out: Path | None) -> dict[str, list[str]]:
    """Returns what to run, by name, with where its JSON goes."""
    runs = {path.stem: [] for path in sorted((ROOT / "bench").glob("bench_*.py"))}
    runs |= ON_A_GPU if torch.cuda.is_available() else SMALL
    found = {}
    for name, more in runs.items():
        file = next(p for p in (f"bench/{name}.py", f"bench/{name.rpartition('_')[0]}.py") if (ROOT / p).exists())
        target = ["--out", str(out / f"{name}.json")] if out else []
        found[name] = [sys.executable, file, *more, *target]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="a folder for their JSON, such as bench/results/cpu")
    parser.add_argument("--only", nargs="+", help="names, such as bench_packing")
    args = parser.parse_args()
    failed = []
    started = time.perf_counter()
    for name, command in commands(args.out).items():
        if args.only and name not in args.only:
            continue
        begun = time.perf_counter()
        print(f"== {' '.join(command[1:])}", flush=True)
        try:
            code = subprocess.run(command, timeout=LIMIT_S, cwd=ROOT).returncode
        except subprocess.TimeoutExpired:
            code = f"not done within {LIMIT_S} s"
        if code:
            failed.append(f"{name} ({code})")
        print(f"-- {name}: {time.perf_counter() - begun:.0f} s", flush=True)
    print(f"all of them: {time.perf_counter() - started:.0f} s")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
