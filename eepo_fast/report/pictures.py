"""Draws the report's PNGs: every panel of curves, pass@k, and time by phase."""

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from eepo_fast.report.panels import Panel, Trace, colour, pass_at_k, phases_of, smooth, window_for
from eepo_fast.report.runs import Group

PICTURES = ("curves.png", "time.png", "pass_at_k.png")
DASHES = {"solid": "-", "dash": "--", "dot": ":"}
COLUMNS = 3


@contextmanager
def style() -> Iterator[None]:
    """Sets what all pictures have in common."""
    with warnings.catch_warnings(), plt.rc_context({"axes.spines.top": False, "axes.spines.right": False}):
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # a name in a script that no font here has
        yield


def draw_all(groups: Sequence[Group], panels: Sequence[Panel], folder: Path) -> list[Path]:
    """Those that there is something for are drawn, and their paths returned; earlier ones are removed."""
    curves, times, pass_at_ks = paths = [folder / name for name in PICTURES]
    for path in paths:
        path.unlink(missing_ok=True)
    if panels:
        names = [(group.label, colour(groups, g, 0)) for g, group in enumerate(groups)] if len(groups) > 1 else []
        draw_grid([(p.title, p.unit, p.traces(groups), p.levels(groups)) for p in panels], names, curves)
    draw_phases(groups, times)
    if sets := pass_at_k(groups):
        draw_pass_at_k(sets, pass_at_ks)
    return [path for path in paths if path.exists()]


@style()
def draw_grid(
    panels: Sequence[tuple[str, str, Sequence[Trace], Sequence[float]]], names: Sequence[tuple[str, str]], path: Path
) -> None:
    """Draws panels of (title, unit, curves, heights of horizontal lines) side by side. names: (label, colour), one key
    for all of them."""
    num_rows = math.ceil(len(panels) / COLUMNS)
    figure, axes = plt.subplots(
        num_rows, COLUMNS, figsize=(5 * COLUMNS, 3.4 * num_rows), constrained_layout=True, squeeze=False
    )
    for axis, (title, unit, traces, levels) in zip(axes.flat, panels, strict=False):
        for trace in traces:
            draw_trace(axis, trace, trace.label)
        for level in levels:
            axis.axhline(level, color="black", linewidth=0.6, linestyle=":")
        axis.set(title=title, xlabel="iteration", ylabel=unit)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False, fontsize=7)
    for axis in list(axes.flat)[len(panels) :]:
        axis.remove()
    if names:
        handles = [plt.Line2D([], [], color=colour) for _, colour in names]
        figure.legend(handles, [named(n) for n, _ in names], loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_trace(axis: plt.Axes, trace: Trace, label: str | None) -> None:
    """Draws a curve through what is known of it, and its band where that is everything."""
    window = 1 if trace.sparse else window_for(len(trace.x))
    known = [k for k, v in enumerate(trace.y) if v is not None]
    marks: dict[str, Any] = {"marker": "o", "markersize": 3} if trace.sparse else {}
    x, y = [trace.x[k] for k in known], smooth(trace.y, window)[known]
    axis.plot(x, y, DASHES[trace.style], color=trace.colour, label=label, **marks)
    if trace.band is not None and len(known) == len(trace.x):
        low, high = (smooth(values, window) for values in trace.band)
        axis.fill_between(x, low, high, color=trace.colour, alpha=0.15, lw=0)


def named(label: str) -> str:
    return f" {label}"  # matplotlib leaves labels out that begin with an underscore


@style()
def draw_phases(groups: Sequence[Group], path: Path) -> None:
    figure, axis = plt.subplots(figsize=(10, 1.4 + 0.5 * len(groups)), constrained_layout=True)
    left = np.zeros(len(groups))
    for i, (name, widths) in enumerate(phases_of(groups).items()):
        axis.barh([named(g.label) for g in groups], widths, left=left, label=name, color=plt.get_cmap("tab20")(i % 20))
        left += widths
    axis.set(xlabel="seconds an iteration, without the first")
    axis.invert_yaxis()
    axis.legend(frameon=False, fontsize=7, ncol=6, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    figure.savefig(path, dpi=110)
    plt.close(figure)


@style()
def draw_pass_at_k(sets: dict[str, list[Trace]], path: Path) -> None:
    figure, axes = plt.subplots(1, len(sets), figsize=(4.6 * len(sets), 3.6), constrained_layout=True, squeeze=False)
    for axis, (name, traces) in zip(axes.flat, sets.items(), strict=True):
        for trace in traces:
            if trace.x:
                draw_trace(axis, trace, named(trace.name))
        axis.set_xscale("log", base=2)
        axis.set(title=f"pass@k on {name}, last evaluation", xlabel="k", ylabel="percent solved")
        axis.legend(frameon=False, fontsize=7)
    figure.savefig(path, dpi=110)
    plt.close(figure)
