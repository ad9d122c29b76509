"""The study's finished runs as numbers: means, paired differences and their intervals."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

T_QUANTILES = {
    1: 12.706,
    2: 4.303,
    3: 3.182,
    4: 2.776,
    5: 2.571,
    6: 2.447,
    7: 2.365,
    8: 2.306,
    9: 2.262,
    10: 2.228,
    11: 2.201,
    12: 2.179,
    13: 2.160,
    14: 2.145,
    15: 2.131,
}  # two-sided 95%
LAST = 5  # points of a curve, five iterations each: its end

Run = dict[str, Any]


def load_runs(out: Path, phase: str) -> dict[str, dict[int, Run]]:
    """{method: {seed: run}} of a phase; when tuning, {method-value: …}."""
    found: dict[str, dict[int, Run]] = {}
    for path in sorted((out / "runs" / phase).glob("*.json")):
        name, _, seed = path.stem.rpartition("-")
        found.setdefault(name, {})[int(seed)] = json.loads(path.read_text())
    return found


def score(run: Run, place: str, metric: str) -> float:
    """Of a set (in, larger, more), in percent."""
    return 100 * run["sets"][place]["metrics"][metric]["value"]


def ending(run: Run, key: str) -> float | None:
    """Mean of a curve over its end; None where it has no value there."""
    known = [v for v in run["curves"].get(key, [])[-LAST:] if v is not None]
    return statistics.fmean(known) if known else None


def interval(values: list[float]) -> tuple[float, float, float]:
    """(mean, low, high): Student's 95% interval of the mean over seeds; infinite for one seed."""
    mean = statistics.fmean(values)
    if len(values) == 1:
        return mean, -math.inf, math.inf
    half = T_QUANTILES[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def paired(runs: dict[int, Run], others: dict[int, Run], value) -> tuple[float, float, float, int]:
    """(mean, low, high, seeds) of value(run) minus value(other) over the seeds that both have."""
    seeds = sorted(runs.keys() & others.keys())
    return (*interval([value(runs[s]) - value(others[s]) for s in seeds]), len(seeds))


def text(triple: tuple[float, ...], digits: int = 1) -> str:
    mean, low, high = triple[:3]
    return f"{mean:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"


def mean_curve(runs: dict[int, Run], key: str) -> tuple[list[float], list[float]]:
    """(mean, half width of the 95% interval) over seeds, point by point; NaN where no seed has a value."""
    columns = [run["curves"][key] for run in runs.values() if key in run["curves"]]
    means, halves = [], []
    for point in zip(*columns, strict=True):
        known = [v for v in point if v is not None]
        if not known:
            means.append(math.nan)
            halves.append(math.nan)
            continue
        mean, low, _ = interval(known) if len(known) > 1 else (known[0], known[0], known[0])
        means.append(mean)
        halves.append(mean - low)
    return means, halves
