"""Turns finished runs into numbers: measures, paired differences, and their intervals over seeds."""

import csv
import io
import json
import math
import statistics
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from eepo_fast.compare.plan import Claim, Measure, Plan
from eepo_fast.types import UserError

Result = dict[str, Any]
"""The content of OUT/results/METHOD-SEED.json."""
Results = dict[str, dict[int, Result]]
"""The results of each method, by seed."""
CONFIDENCE = 0.95


class Interval(NamedTuple):
    mean: float
    low: float
    high: float
    num_values: int

    def text(self, digits: int = 1, *, signed: bool = True) -> str:
        sign = "+z" if signed else ""
        if self.num_values < 2:
            return f"{self.mean:{sign}.{digits}f}"
        return f"{self.mean:{sign}.{digits}f} ({self.low:{sign}.{digits}f} to {self.high:{sign}.{digits}f})"


@cache
def student_quantile(freedom: int, confidence: float) -> float:
    """Returns Student's t between which and its negative lies `confidence` of the distribution."""
    import mpmath

    def outside(t: Any) -> Any:
        return mpmath.betainc(freedom / 2, 0.5, 0, freedom / (freedom + t * t), regularized=True) - (1 - confidence)

    high = 2.0
    while outside(high) > 0:
        high *= 2
    return float(mpmath.findroot(outside, (high / 2 if high > 2 else 0.01, high), solver="anderson"))


def interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """Returns Student's interval of the mean over seeds; infinite for one seed."""
    mean = statistics.fmean(values)
    if len(values) == 1:
        return Interval(mean, -math.inf, math.inf, 1)
    half = student_quantile(len(values) - 1, confidence) * statistics.stdev(values) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half, len(values))


def value_of(result: Result, measure: Measure) -> float | None:
    """Returns a measure of a run, in percent where it is a share; None where the run has it not."""
    known = [row[measure.key] for row in result["rows"] if row.get(measure.key) is not None]
    value = statistics.fmean(known[-measure.last :]) if known else None
    return value if value is None or not measure.percent else 100 * value


def over_seeds(runs: dict[int, Result], measure: Measure) -> Interval | None:
    values = [v for v in (value_of(run, measure) for run in runs.values()) if v is not None]
    return interval(values) if values else None


def paired(
    runs: dict[int, Result],
    others: dict[int, Result],
    value: Callable[[Result], float | None],
    confidence: float = CONFIDENCE,
) -> Interval | None:
    """Returns the interval of value(run) minus value(other), seed by seed; None where no seed has both."""
    pairs = [(value(runs[seed]), value(others[seed])) for seed in sorted(runs.keys() & others.keys())]
    found = [a - b for a, b in pairs if a is not None and b is not None]
    return interval(found, confidence) if found else None


def verdict(claim: Claim, plan: Plan, results: Results, digits: int) -> tuple[str, str, str]:
    """Returns what was found for a claim, whether it holds, and whether it still does when all claims are counted."""
    value = partial(value_of, measure=plan.all_measures()[claim.measure])
    runs, others = results[claim.method], results[claim.against]
    found = paired(runs, others, value)
    strict = paired(runs, others, value, 1 - (1 - CONFIDENCE) / len(plan.claims))  # Bonferroni
    if found is None or strict is None:
        return "", "no pair yet", ""
    if found.num_values < 2:
        return found.text(digits), "one pair says nothing", ""

    def answer(interval: Interval) -> str:
        return "yes" if interval.low > claim.margin else "no" if interval.high < claim.margin else "not shown"

    return found.text(digits), answer(found), answer(strict)


def read_result(path: Path) -> Result:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(f"{path}: is cut off; remove it, and its run's numbers are taken again") from None


def read_results(out: Path, plan: Plan) -> Results:
    found: Results = {name: {} for name in plan.methods}
    for name in plan.methods:
        for seed in plan.seeds:
            path = out / "results" / f"{name}-{seed}.json"
            if path.is_file():
                found[name][seed] = read_result(path)
    return found


def measures_csv(plan: Plan, results: Results) -> str:
    """Returns every measure of every run, a line each."""
    rows = [
        (name, seed, label, value)
        for label, measure in plan.all_measures().items()
        for name, runs in results.items()
        for seed, run in sorted(runs.items())
        if (value := value_of(run, measure)) is not None
    ]
    return _to_csv(("method", "seed", "measure", "value"), rows)


def differences_csv(plan: Plan, results: Results) -> str:
    """Returns every method minus the baseline on every measure."""
    rows = []
    for label, measure in plan.all_measures().items():
        for name, runs in results.items():
            found = paired(runs, results[plan.baseline], partial(value_of, measure=measure))
            if found is not None and name != plan.baseline:
                rows.append((name, plan.baseline, label, found.mean, found.low, found.high, found.num_values))
    return _to_csv(("method", "against", "measure", "difference", "low", "high", "pairs"), rows)


def _to_csv(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([[f"{v:.6g}" if isinstance(v, float) else v for v in row] for row in rows])
    return out.getvalue()
