"""The first quarter of an hour on a real GPU, within five minutes: `make gpu-check OUT=bench/results/h200`.

Every step is a process with a time limit, and has its result on disk when it ends; one that fails does not stop the
next. Nothing is fetched: vLLM, DeepSpeed, Liger and flash-attn are used where they are installed, and named where not.
The last lines say what passed, failed and was left out, and the speeds against their goals.

The library of csrc/ is built before the tests, which need it. --rehearse goes through the same steps on a CPU, small:
what is wrong with a step is not found out on a GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
NEEDED = (
    "torch",
    "triton",
    "transformers",
    "pydantic",
    "math-verify",
    "datasets",
    "pytest",
    "pytest-timeout",
    "setuptools",
)
OPTIONAL = ("vllm", "deepspeed", "liger-kernel", "flash-attn")
LIMIT_S = 300  # of all steps together
LAST_WORDS_S = 4  # of its limit, for one that is ended


@dataclass(frozen=True)
class Step:
    name: str
    command: list[str]
    """What follows the interpreter; OUT stands for the file of its JSON."""
    limit_s: float
    rehearsal: list[str]
    """The command for a CPU, small."""


PYTEST = ["-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", "-o", "addopts=--import-mode=importlib"]
MEASURES = ["bench/gpu_measures.py"]
SHORT = ["--lengths", "bench/lengths/long_tail.json"]  # an eighth of real ones: an eager engine's steps are many
COMMANDS = "command_line or resuming"  # a process or several each
STEPS = [
    Step("machine", [*MEASURES, "machine", "--out", "OUT"], 15, [*MEASURES, "machine", "--out", "OUT"]),
    Step("build", ["setup.py", "build_ext", "--inplace"], 40, ["setup.py", "build_ext", "--build-lib", "OUT.lib"]),
    Step(
        "kernel_tests",
        [*PYTEST, "-m", "gpu", "tests/eepo_kernels", "tests/eepo_fast/algorithm/test_host_sync.py"],
        50,
        [*PYTEST, "-k", "test_contract_of_every_backend", "tests/eepo_kernels"],
    ),
    Step("head", ["bench/bench_linear_loss.py", "--shape", "8192", "2048", "151936", "--shares", "1", "0.2",
                  "--repeats", "3", "--peers", "naive", "liger", "quack", "--out", "OUT"], 30,
         ["bench/bench_linear_loss.py", "--shape", "64", "32", "1024", "--shares", "1", "--repeats", "1", "--peers",
          "naive", "--out", "OUT"]),
    Step("weight_update", [*MEASURES, "weight_update", "--out", "OUT"], 25,
         [*MEASURES, "weight_update", "--small", "--out", "OUT"]),
    Step("memory", [*MEASURES, "memory", "--out", "OUT"], 20, [*MEASURES, "memory", "--small", "--out", "OUT"]),
    Step("iteration", ["bench/bench_iteration.py", "--pairs", "1", "--prompts", "4", *SHORT, "--out", "OUT"], 30,
         ["bench/bench_iteration.py", "--pairs", "1", "--prompts", "2", "--group-size", "4", "--out", "OUT"]),
    Step("path_tests", [*PYTEST, "-m", "gpu", "-k", f"not ({COMMANDS})", "tests/gpu"], 35,
         [*PYTEST, "--collect-only", "-m", "gpu", "tests/gpu"]),
    Step("command_tests", [*PYTEST, "-m", "gpu", "-k", COMMANDS, "tests/gpu"], 55,
         [*PYTEST, "-m", "slow", "-k", "command_line and torch and hf", "tests/gpu"]),
]  # fmt: skip

# step, key of its rows, what it is, the least and the most that all found may be
GOALS = [
    ("head", "over_floor", "loss and gradients over (1 + 2f) GEMMs, Triton", 0.0, 1.3),
    ("weight_update", "forget_kernel_ms", "forget's kernel at 3B, ms", 0.0, 8.0),
    ("weight_update", "forget_ms", "a forget step at 3B, all of it, ms", 0.0, 12.0),
    ("weight_update", "stochastic_over_copy", "forget over a copy of its bytes", 0.0, 1.6),
    ("memory", "measured_over_estimate", "peak memory over its estimate", 0.9, 1.1),
]


def run_step(step: Step, out: Path, rehearse: bool) -> dict:
    """Runs a step, and writes OUT/NAME.log and OUT/NAME.result.json: outcome `passed`, `failed` or `timed out`."""
    file = out / f"{step.name}.json"
    file.unlink(missing_ok=True)
    words = [str(file) + w.removeprefix("OUT") if w.startswith("OUT") else w
             for w in (step.rehearsal if rehearse else step.command)]  # fmt: skip
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths.strip(os.pathsep), "HF_HUB_OFFLINE": "1"}
    environment["EEPO_BUILD_CUDA"] = "0" if rehearse else "1"
    started, log = time.monotonic(), out / f"{step.name}.log"
    with log.open("w", encoding="utf-8") as printed:
        process = subprocess.Popen(
            [sys.executable, *words], cwd=ROOT, env=environment, stdout=printed, stderr=subprocess.STDOUT,
            start_new_session=True, preexec_fn=listen_to_interrupts,
        )  # fmt: skip
        try:
            code = process.wait(None if rehearse else step.limit_s - LAST_WORDS_S)
            outcome = "passed" if code == 0 else f"failed (exit code {code})"
        except subprocess.TimeoutExpired:
            end(process)
            outcome = f"failed (not done within {step.limit_s:.0f} s)"
    text = log.read_text(encoding="utf-8", errors="replace").strip()
    result = {
        "step": step.name,
        "outcome": outcome,
        "seconds": time.monotonic() - started,
        "last_line": text.splitlines()[-1][:300] if text else "",
        "rows": json.loads(file.read_text(encoding="utf-8"))["rows"] if file.is_file() else [],
    }
    (out / f"{step.name}.result.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    return result


def listen_to_interrupts() -> None:
    """Makes a child hear interrupts: a shell has what it starts in the background ignore them, and children do, too."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def end(process: subprocess.Popen) -> None:
    """Ends a step and all that it has started: what stayed would hold the GPU's memory. Asked first, pytest reports."""
    os.killpg(process.pid, signal.SIGINT)
    with suppress(subprocess.TimeoutExpired):
        process.wait(LAST_WORDS_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def figures(results: list[dict]) -> list[str]:
    """Returns a line for each goal: what was found, or that nothing was."""
    rows = {result["step"]: result["rows"] for result in results}
    lines = []
    for step, key, what, least, goal in GOALS:
        found = [row[key] for row in rows.get(step, []) if key in row and row.get("peer", "eepo") == "eepo"]
        if not found:
            lines.append(f"{what}: not measured (goal {goal:g})")
        else:
            met = least <= min(found) and max(found) <= goal
            shown = f"{min(found):.3g} to {max(found):.3g}" if least else f"{max(found):.3g}"
            lines.append(f"{what}: {shown} (goal {goal:g}: {'met' if met else 'missed'})")
    return lines


def missing(names: tuple[str, ...]) -> list[str]:
    module = {"liger-kernel": "liger_kernel", "pytest-timeout": "pytest_timeout"}
    return [name for name in names if importlib.util.find_spec(module.get(name, name.replace("-", "_"))) is None]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="a folder, such as bench/results/h200")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, small")
    parser.add_argument("--only", nargs="+", choices=[step.name for step in STEPS], help="these steps")
    args = parser.parse_args()
    assert sum(step.limit_s for step in STEPS) <= LIMIT_S
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if lacking := missing(NEEDED):
        print(f"not installed, and needed: {', '.join(lacking)}", flush=True)
    if not args.rehearse and shutil.which("nvcc") is None:
        print("nvcc is not on the PATH: csrc is not built, and the weight update not timed", flush=True)
    results = []
    for step in STEPS:
        if args.only and step.name not in args.only:
            continue
        results.append(run_step(step, out, args.rehearse))
        print(f"{step.name}: {results[-1]['outcome']}, {results[-1]['seconds']:.0f} s", flush=True)
    summary = ["", "rehearsed on a CPU: no figure is a GPU's" if args.rehearse else "measured on this GPU"]
    summary += [f"{r['step']}: {r['outcome']}; {r['last_line']}" for r in results]
    summary += [f"not installed, so left out: {name}" for name in missing(OPTIONAL)]
    summary += [] if args.rehearse else figures(results)
    (out / "summary.txt").write_text("\n".join(summary).strip() + "\n", encoding="utf-8")
    print("\n".join(summary))
    return 0 if all(r["outcome"] == "passed" for r in results) else 1


if __name__ == "__main__":
    sys.exit(main())
