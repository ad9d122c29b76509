"""Scores an evaluation: unbiased pass@k, and intervals by resampling the problems.

Greedy pass@1, sampled pass@1 (the mean of n samples) and pass@k are kept apart.
"""

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

NUM_RESAMPLES = 10_000
CONFIDENCE = 0.95


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Returns 1 - C(n - c, k) / C(n, k): the chance that k of n samples, c of them right, hold a right one."""
    if not 1 <= k <= num_samples:
        raise ValueError(f"pass@k: expected k in [1, {num_samples}], found {k}")
    if num_samples - num_correct < k:
        return 1.0
    wrong = range(num_samples - num_correct + 1, num_samples + 1)
    return 1.0 - math.prod(1.0 - k / i for i in wrong)


def scores(rows: Sequence[dict[str, Any]], ks: Sequence[int]) -> dict[str, list[float]]:
    """Returns each metric's value on every problem, in the order of the problems: `greedy` where it was sampled,
    `pass@k` where there are samples, `unique` (different completions, as a share) where there are several. A missing
    reward is not right.

    rows: of one set, as `samples.sample_set` gives them; `sample` is None for the greedy one.
    """
    problems: dict[str, list[dict]] = {}
    for row in rows:
        problems.setdefault(row["id"], []).append(row)
    result: dict[str, list[float]] = {}
    for members in problems.values():
        greedy = [row for row in members if row["sample"] is None]
        sampled = [row for row in members if row["sample"] is not None]
        if greedy:
            result.setdefault("greedy", []).append(greedy[0]["reward"] or 0.0)
        if sampled:
            num_right = sum(row["reward"] == 1.0 for row in sampled)
            for k in dict.fromkeys(ks):  # a k given twice would count every problem twice
                result.setdefault(f"pass@{k}", []).append(pass_at_k(len(sampled), num_right, k))
            if len(sampled) > 1:
                result.setdefault("unique", []).append(len({row["completion"] for row in sampled}) / len(sampled))
    return result


def interval(values: Sequence[Sequence[float]], seed: int = 0) -> tuple[float, float]:
    """Returns the 95% bootstrap interval of the unweighted average, over sets, of the means over their problems.
    Problems are drawn anew inside each set."""
    rng = np.random.default_rng(seed)
    means = np.zeros(NUM_RESAMPLES)
    for column in values:
        known = np.asarray(column)
        # how often each distinct value comes up is multinomial: the same as drawing problems, without the draws
        distinct, counts = np.unique(known, return_counts=True)
        means += rng.multinomial(len(known), counts / len(known), NUM_RESAMPLES) @ distinct / len(known)
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(means / len(values), [tail, 100 - tail])
    return float(low), float(high)


def summarise(rows: Sequence[dict[str, Any]], ks: Sequence[int]) -> dict[str, Any]:
    """Returns one set's `metrics` (value, low, high), mean `length`, `truncated_fraction` and counts of `status`, the
    latter over all completions."""
    metrics = {}
    for name, values in scores(rows, ks).items():
        low, high = interval([values])
        metrics[name] = {"value": statistics.fmean(values), "low": low, "high": high}
    known = [row for row in rows if row["num_tokens"] is not None]
    return {
        "num_problems": len({row["id"] for row in rows}),
        "num_samples": sum(row["sample"] is not None for row in rows) // max(1, len({row["id"] for row in rows})),
        "metrics": metrics,
        "length": statistics.fmean(row["num_tokens"] for row in known) if known else None,
        "truncated_fraction": statistics.fmean(not row["finished"] for row in known) if known else None,
        "status": dict(Counter(row["status"] for row in rows)),
    }


def average(sets: Mapping[str, Sequence[dict[str, Any]]], ks: Sequence[int]) -> dict[str, dict[str, float]]:
    """Returns the unweighted average over sets of every metric that all of them have."""
    found = [scores(rows, ks) for rows in sets.values()]
    result = {}
    for name in found[0]:
        if all(name in part for part in found):
            low, high = interval([part[name] for part in found])
            value = statistics.fmean(statistics.fmean(part[name]) for part in found)
            result[name] = {"value": value, "low": low, "high": high}
    return result
