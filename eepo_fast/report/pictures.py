"""Draws the report's PNGs: every panel of curves, pass@k, and time by phase."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from eepo_fast.report.panels import COLOURS, Panel, levels_of, phases
from eepo_fast.report.runs import Group, Values

PICTURES = ("curves.png", "time.png", "pass_at_k.png")
DASHES = {"solid": "-", "dash": "--", "dot": ":"}
COLUMNS = 3


def draw_all(groups: Sequence[Group], panels: Sequence[Panel], folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    curves, times, pass_at_ks = (folder / name for name in PICTURES)
    paths = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # a name in a script that no font here has
        if panels:
            draw_curves(groups, panels, curves)
            paths.append(curves)
        draw_phases(groups, times)
        paths.append(times)
        if sets := evaluated(groups):
            draw_pass_at_k(groups, sets, pass_at_ks)
            paths.append(pass_at_ks)
    return paths


def smooth(values: Values, window: int) -> np.ndarray:
    """Returns the centred running mean over what is there."""
    series = np.array([np.nan if v is None else v for v in values], dtype=float)
    known, filled = np.isfinite(series), np.nan_to_num(series)
    kernel = np.ones(2 * (window // 2) + 1)
    middle = slice(window // 2, window // 2 + len(series))
    sums, counts = (np.convolve(part, kernel)[middle] for part in (filled, known.astype(float)))
    return np.where(known, sums / np.maximum(counts, 1), np.nan)


def window_for(num_iterations: int) -> int:
    """Returns the running mean's width, which is odd: it takes as many iterations before as after."""
    return 2 * (num_iterations // 40) + 1


def colour(groups: Sequence[Group], group: int, line: int) -> str:
    """Returns a line's colour where there is one group, else its group's: then the dashes tell the lines apart."""
    return COLOURS[(line if len(groups) == 1 else group) % len(COLOURS)]


def draw_curves(groups: Sequence[Group], panels: Sequence[Panel], path: Path) -> None:
    num_rows = math.ceil(len(panels) / COLUMNS)
    figure, axes = plt.subplots(
        num_rows, COLUMNS, figsize=(5 * COLUMNS, 3.4 * num_rows), constrained_layout=True, squeeze=False
    )
    for axis, panel in zip(axes.flat, panels, strict=False):
        for g, group in enumerate(groups):
            for i, line in enumerate(panel.lines):
                steps, mean, low, high = group.band(line.key)
                if not any(v is not None for v in mean):
                    continue
                window, shade = window_for(len(steps)), colour(groups, g, i)
                label = line.label if len(groups) == 1 else (line.label if g == 0 and len(panel.lines) > 1 else None)
                known = [k for k, v in enumerate(mean) if v is not None]
                if len(known) < len(steps):  # a metric that only some iterations have
                    at, points = [steps[k] for k in known], [mean[k] for k in known]
                    axis.plot(at, points, DASHES[line.style], marker="o", markersize=3, color=shade, label=label)
                    continue
                axis.plot(steps, smooth(mean, window), DASHES[line.style], color=shade, label=label)
                if len(group.runs) > 1:
                    axis.fill_between(steps, smooth(low, window), smooth(high, window), color=shade, alpha=0.15, lw=0)
        for level in levels_of(panel, groups):
            axis.axhline(level, color="black", linewidth=0.6, linestyle=":")
        axis.set(title=panel.title, xlabel="iteration", ylabel=panel.unit)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False, fontsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in list(axes.flat)[len(panels) :]:
        axis.remove()
    if len(groups) > 1:  # one key for all panels: a colour a group
        handles = [plt.Line2D([], [], color=colour(groups, g, 0)) for g in range(len(groups))]
        figure.legend(handles, [named(group) for group in groups], loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def named(group: Group) -> str:
    return f" {group.label}"  # matplotlib leaves labels out that begin with an underscore


def draw_phases(groups: Sequence[Group], path: Path) -> None:
    figure, axis = plt.subplots(figsize=(10, 1.4 + 0.5 * len(groups)), constrained_layout=True)
    found = [phases(group) for group in groups]
    names = list(dict.fromkeys(name for part in found for name in part))
    left = np.zeros(len(groups))
    for i, name in enumerate(names):
        widths = np.array([part.get(name, 0.0) for part in found])
        axis.barh([named(g) for g in groups], widths, left=left, label=name, color=plt.get_cmap("tab20")(i % 20))
        left += widths
    axis.set(xlabel="seconds an iteration, without the first")
    axis.invert_yaxis()
    axis.legend(frameon=False, fontsize=7, ncol=6, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def evaluated(groups: Sequence[Group]) -> list[str]:
    """Returns the evaluation sets that some run's last evaluation has pass@k of."""
    names = {}
    for group in groups:
        for run in group.runs:
            for name, part in last_evaluation(run).items():
                if any(metric.startswith("pass@") for metric in part["metrics"]):
                    names[name] = None
    return list(names)


def last_evaluation(run) -> dict[str, dict]:
    return run.evaluations[max(run.evaluations)]["sets"] if run.evaluations else {}


def pass_at_k(group: Group, name: str) -> dict[int, tuple[float, float, float]]:
    """Returns k to (mean, low, high): the range over several seeds, or one run's interval over problems."""
    cells: dict[int, list[dict]] = {}
    for run in group.runs:
        for metric, cell in last_evaluation(run).get(name, {"metrics": {}})["metrics"].items():
            if metric.startswith("pass@"):
                cells.setdefault(int(metric[5:]), []).append(cell)
    return {
        k: (
            sum(c["value"] for c in found) / len(found),
            min(c["value" if len(found) > 1 else "low"] for c in found),
            max(c["value" if len(found) > 1 else "high"] for c in found),
        )
        for k, found in sorted(cells.items())
    }


def draw_pass_at_k(groups: Sequence[Group], sets: Sequence[str], path: Path) -> None:
    figure, axes = plt.subplots(1, len(sets), figsize=(4.6 * len(sets), 3.6), constrained_layout=True, squeeze=False)
    for axis, name in zip(axes.flat, sets, strict=True):
        for g, group in enumerate(groups):
            if not (found := pass_at_k(group, name)):
                continue
            value, low, high = ([100 * cell[i] for cell in found.values()] for i in range(3))
            axis.plot(list(found), value, marker="o", markersize=3, color=COLOURS[g % len(COLOURS)], label=named(group))
            axis.fill_between(list(found), low, high, color=COLOURS[g % len(COLOURS)], alpha=0.15, lw=0)
        axis.set_xscale("log", base=2)
        axis.set(title=f"pass@k on {name}, last evaluation", xlabel="k", ylabel="percent solved")
        axis.legend(frameon=False, fontsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
