"""Asks why the policy's own reward is a little lower with EEPO: what the seeds that lose more have in common."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable

import numpy as np
from claims import training_entropy
from numbers_of import MEASURES, Run, mean_of, score, text

from eepo_fast.compare.numbers import interval

Pair = tuple[Run, Run]
"""A method's run, EEPO's where nothing else is said, and GRPO's of one seed."""

KEPT = "entropy kept in training, over GRPO's, mnat"
CAUSES: dict[str, Callable[[Run, Run], float]] = {
    "share of tokens that the gate lets forget": lambda eepo, grpo: mean_of(eepo, "unlearn/active_fraction"),
    "KL of the step, nats a token": lambda eepo, grpo: mean_of(eepo, "unlearn/kl"),
    "stage 2's reward over stage 1's": lambda eepo, grpo: (
        mean_of(eepo, "reward/stage2") / mean_of(eepo, "reward/stage1")
    ),
    "share of stage 2's tokens that are clipped": lambda eepo, grpo: mean_of(eepo, "policy/clip_fraction_stage2"),
    KEPT: lambda eepo, grpo: training_entropy(eepo) - training_entropy(grpo),
}
PERIODS = {"1 to 15": slice(0, 3), "16 to 75": slice(3, 15), "76 to 150": slice(15, 30)}
"""Iterations, as points of a curve."""


def own_reward(eepo: Run, grpo: Run) -> float:
    return MEASURES["reward, stage 1"](eepo) - MEASURES["reward, stage 1"](grpo)


def greedy(eepo: Run, grpo: Run) -> float:
    return score(eepo, "in", "greedy") - score(grpo, "in", "greedy")


def correlation(xs: list[float], ys: list[float]) -> tuple[float, float, float]:
    """Returns Pearson's correlation, with the 95% interval of Fisher's z."""
    r = float(np.corrcoef(xs, ys)[0, 1])
    half = statistics.NormalDist().inv_cdf(0.975) / math.sqrt(len(xs) - 3)
    return r, math.tanh(math.atanh(r) - half), math.tanh(math.atanh(r) + half)


def causes(pairs: list[Pair], names: dict[str, str]) -> list[str]:
    """Returns a row for each of CAUSES in names: {its name there: its name in the table}."""
    effects = [[effect(*pair) for pair in pairs] for effect in (own_reward, greedy)]
    rows = []
    for name, shown in names.items():
        xs = [CAUSES[name](*pair) for pair in pairs]
        found = [text(correlation(xs, ys), 2) for ys in effects]
        rows.append(f"| {shown} | {statistics.fmean(xs):.3g} | {' | '.join(found)} |")
    return rows


def lost(pairs: list[Pair], period: slice) -> str:
    """Returns stage 1's reward over GRPO's in a part of training, points."""
    means = [[statistics.fmean(run["curves"]["reward/stage1"][period]) for run in pair] for pair in pairs]
    return text(interval([100 * (mine - grpo) for mine, grpo in means]))


def why(pairs: list[Pair], random_step: list[Pair]) -> list[str]:
    """Correlates over seeds, and says when in training the difference comes; beside it the random step's."""
    lines = ["| of a seed | mean | correlation with stage 1's reward over GRPO's | with greedy over GRPO's, `in` |"]
    lines += ["| --- | ---: | ---: | ---: |"]
    lines += causes(pairs, {name: name for name in CAUSES})
    lines += causes(random_step, {KEPT: "the same of a run with the random step"})
    lines += [
        "",
        "| iterations | stage 1's reward over GRPO's, points | with the random step |",
        "| --- | ---: | ---: |",
    ]
    lines += [f"| {name} | {lost(pairs, period)} | {lost(random_step, period)} |" for name, period in PERIODS.items()]
    return [*lines, ""]
