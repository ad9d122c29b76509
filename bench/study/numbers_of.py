"""Turns the study's finished runs into numbers: what is measured, means, paired differences and their intervals."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from eepo_fast.compare.numbers import interval

LAST = 5  # points of a curve, five iterations each: its end
PLACES = ("in", "larger", "more")

Run = dict[str, Any]
Triple = tuple[float, float, float]
"""(mean, low, high)."""


def load_runs(out: Path, phase: str) -> dict[str, dict[int, Run]]:
    """Returns {method: {seed: run}} of a phase; when tuning, {method-value: …}."""
    found: dict[str, dict[int, Run]] = {}
    for path in sorted((out / "runs" / phase).glob("*.json")):
        name, _, seed = path.stem.rpartition("-")
        found.setdefault(name, {})[int(seed)] = json.loads(path.read_text())
    return found


def score(run: Run, place: str, metric: str) -> float:
    """Returns the score of a set (in, larger, more), in percent."""
    return 100 * run["sets"][place]["metrics"][metric]["value"]


def average(metric: str) -> Callable[[Run], float]:
    """Returns what averages a score over the three sets, in percent."""
    return lambda run: statistics.fmean(score(run, place, metric) for place in PLACES)


def ending(run: Run, key: str) -> float | None:
    """Returns the mean of a curve over its end; None where it has no value there."""
    known = [v for v in run.get("curves", {}).get(key, [])[-LAST:] if v is not None]
    return statistics.fmean(known) if known else None


def scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else factor * value


def mean_of(run: Run, key: str, points: int = 0) -> float:
    """Returns the mean of a curve's points, or of its last ones."""
    return statistics.fmean(v for v in run["curves"][key][-points:] if v is not None)


MEASURES: dict[str, Callable[[Run], float | None]] = {
    "greedy": average("greedy"),
    "pass@1": average("pass@1"),
    "pass@16": average("pass@16"),
    "entropy, mnat": lambda run: scaled(run["sets"]["in"].get("entropy"), 1000),
    "unique of 32": lambda run: score(run, "in", "unique"),
    "reward, stage 1": lambda run: scaled(ending(run, "reward/stage1"), 100),
}
"""Measures of a run's last policy on held-out problems, percent (the mean of three sets) but for the two that say
otherwise: the entropy of a token at temperature 1, and different completions of 32, both of the kind trained on. None
where a run does not have it. The last is training's own, over the last iterations, at its sampling temperature."""


def text(triple: tuple[float, ...], digits: int = 1) -> str:
    mean, low, high = triple[:3]
    return f"{mean:+z.{digits}f} ({low:+z.{digits}f} to {high:+z.{digits}f})"


def by_step(prompts: list[dict], values: list[float]) -> list[float]:
    """Returns the mean over the prompts of each forget step."""
    found: dict[int, list[float]] = {}
    for prompt, value in zip(prompts, values, strict=True):
        found.setdefault(prompt["step"], []).append(value)
    return list(map(statistics.fmean, found.values()))


def plain(triple: tuple[float, ...], digits: int = 1) -> str:
    """Writes a value that is no difference."""
    mean, low, high = triple[:3]
    return f"{mean:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def mean_curve(runs: dict[int, Run], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns (mean, half width of the 95% interval) over seeds, point by point; NaN where no seed has a value."""
    columns = [run["curves"][key] for run in runs.values() if key in run["curves"]]
    return bands([[v for v in point if v is not None] for point in zip(*columns, strict=True)])


def bands(points: list[list[float]]) -> tuple[np.ndarray, np.ndarray]:
    means = [statistics.fmean(point) if point else math.nan for point in points]
    halves = [mean - interval(point)[1] if len(point) > 1 else 0.0 for mean, point in zip(means, points, strict=True)]
    return np.array(means), np.array(halves)
