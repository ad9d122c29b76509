"""Measures seconds of an iteration against GRPO's, in turns and alone on the machine: the study's own runs share
theirs, and were not all made on the same day.

They are the first iterations from the base, where the gate is less open than later: for EEPO's own cost see
bench/bench_iteration.py.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from pathlib import Path

from methods import SHARED, run_config

PAIRS = 3
ITERATIONS = 8
FIRST = 2  # iterations before it are left out: they build what the later ones have


def seconds(name: str, overrides: list[str], seed: int) -> float:
    """Returns the median of an iteration of a short run."""
    from eepo_fast.run.build import train
    from eepo_fast.run.display import Display

    with tempfile.TemporaryDirectory() as root:
        config = run_config(name, [*overrides, f"train.iterations={ITERATIONS}"], seed, root)
        folder = train(config, display=Display.silent())
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(line["time/iteration_s"] for line in lines[FIRST:])


def measure(file: Path, settings: dict[str, list[str]]) -> None:
    """Adds {method: its seconds over GRPO's, a ratio a pair} of the methods that `file` lacks. settings: overrides of
    each method."""
    known = json.loads(file.read_text()) if file.exists() else {}
    for name, overrides in settings.items():
        if name in known or name == SHARED:
            continue
        pairs = [(seconds(name, overrides, k), seconds(SHARED, settings[SHARED], k)) for k in range(PAIRS)]
        known[name] = [round(mine / grpo, 3) for mine, grpo in pairs]
        file.write_text(json.dumps(known, indent=1) + "\n")
        print(f"seconds {name}: {known[name]}", flush=True)
