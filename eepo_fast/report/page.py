"""Writes index.html: the numbers are tables in the page, the curves are data that page.js draws.

Everything that comes from a run goes through `escape` or, as JSON, through `script`: a completion, a name or a setting
is shown as text, whatever is written in it.
"""

import json
import time
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from eepo_fast.evaluation.tables import NAMES, metrics_of, percent
from eepo_fast.report.panels import TROUBLE, Panel, Trace, colour, late_mean, pass_at_k, phases_of, window_for
from eepo_fast.report.rollouts import summaries
from eepo_fast.report.runs import Group, Run, differing

ASSETS = Path(__file__).parent / "assets"
SUMMARY = (
    ("reward/mean", "reward", "{:.3f}"),
    ("reward/stage1", "stage 1", "{:.3f}"),
    ("reward/stage2", "stage 2", "{:.3f}"),
    ("entropy/stage1", "entropy, stage 1", "{:.3f}"),
    ("entropy/stage2", "stage 2", "{:.3f}"),
    ("group/unique_fraction", "different answers", "{:.1%}"),
    ("length/mean", "length", "{:.0f}"),
    ("unlearn/active_fraction", "gate open", "{:.1%}"),
    ("unlearn/applied", "forget steps taken", "{:.0%}"),
    ("unlearn/retention", "retention", "{:.3f}"),
    ("unlearn/kl", "KL(θ'‖θ)", "{:.4f}"),
    ("time/iteration_s", "s an iteration", "{:.1f}"),
    ("tokens/per_second", "tokens a second", "{:,.0f}"),
)


def write_page(
    runs: Sequence[Run], groups: Sequence[Group], panels: Sequence[Panel], pictures: Sequence[Path], out: Path
) -> Path:
    parts = {
        "title": escape(title(groups)),
        "key": colour_key(groups),
        "head": head(runs),
        "summary": summary(groups),
        "trouble": trouble(runs),
        "evaluations": evaluations(runs),
        "phases": phase_table(groups),
        "settings": settings(runs),
        "pictures": " · ".join(f'<a href="{path.name}">{path.name}</a>' for path in pictures),
        "data": script({"charts": charts(groups, panels), "runs": [summaries(run) for run in runs]}),
    }
    text = (ASSETS / "template.html").read_text(encoding="utf-8")
    for name, part in parts.items():  # the data last: no mark inside it is replaced
        text = text.replace(f"<!--{name}-->", part)
    path = out / "index.html"
    path.write_text(text, encoding="utf-8")
    return path


def title(groups: Sequence[Group]) -> str:
    """Returns the groups' names, or how many runs there are where the names are too long for a heading."""
    names = ", ".join(group.label for group in groups)
    return names if len(names) <= 60 else f"{sum(len(group.runs) for group in groups)} runs"


def colour_key(groups: Sequence[Group]) -> str:
    """Returns the key to the groups' colours; nothing for one group, whose charts tell its lines apart themselves."""
    if len(groups) == 1:
        return ""
    items = []
    for g, group in enumerate(groups):
        items.append(f'<span><i style="background:{colour(groups, g, 0)}"></i>{escape(group.label)}</span>')
    return f'<p class="key">{"".join(items)}</p>'


def script(value: Any) -> str:
    """Returns a value as JSON that no text in it can break out of."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns an HTML table. Cells are text; the first column names its row."""
    lines = ["".join(f"<th scope=col>{escape(cell)}</th>" for cell in header)]
    for first, *rest in rows:
        lines.append(f"<th scope=row>{escape(first)}</th>" + "".join(f"<td>{escape(cell)}</td>" for cell in rest))
    body = "".join(f"<tr>{line}</tr>\n" for line in lines)
    return f"<div class=scroll><table>{body}</table></div>"


def head(runs: Sequence[Run]) -> str:
    rows = []
    for run in runs:
        total = run.ending["total"] if run.ending else run.settings.get("train.iterations")
        reason = run.ending["reason"] if run.ending else "running, or killed"
        reason += f": {run.ending['message']}" if run.ending and run.ending["message"] else ""
        method = "EEPO" if run.settings.get("eepo.enabled") else "GRPO"
        method += " + AEPO" if run.settings.get("aepo.enabled") else ""
        chosen = [str(run.settings.get(key)) for key in ("model.path", "data.train", "run.seed")]
        last = f"{run.steps[-1]} of {total}" if total else str(run.steps[-1])
        rows.append([run.name, method, *chosen, last, reason])
    names = ("run", "method", "model", "data", "seed", "iterations", "ended")
    return table(names, rows) + f"<p class=note>Written {time.strftime('%Y-%m-%d %H:%M')}.</p>"


def summary(groups: Sequence[Group]) -> str:
    shown = [s for s in SUMMARY if any(late_mean(group, s[0]) is not None for group in groups)]
    rows = []
    for group in groups:
        values = [late_mean(group, key) for key, _, _ in shown]
        cells = ["" if v is None else form.format(v) for v, (_, _, form) in zip(values, shown, strict=True)]
        rows.append([group.label, *cells])
    return table(["mean of the last fifth", *(label for _, label, _ in shown)], rows)


def trouble(runs: Sequence[Run]) -> str:
    """Returns a table of what was left out or went wrong over the whole run, or a line that says that nothing did."""
    rows = []
    for key, text in TROUBLE.items():
        counts = [sum(v for v in run.values(key) if v is not None) for run in runs]
        if any(counts):
            rows.append([f"{text} ({key})", *(f"{count:.0f}" for count in counts)])
    # counted from the run's start, not iteration by iteration
    failures = [max((v for v in run.values("checkpoint/failures") if v is not None), default=0) for run in runs]
    if any(failures):
        rows.append(["checkpoints that could not be written (checkpoint/failures)", *(f"{n:.0f}" for n in failures)])
    if not rows:
        return "<p>Nothing was left out, dropped or taken back.</p>"
    return table(["over the whole run", *(run.name for run in runs)], rows)


def evaluations(runs: Sequence[Run]) -> str:
    parts = []
    last = [(run, run.evaluations[max(run.evaluations)]) for run in runs if run.evaluations]
    metrics = list(dict.fromkeys(metric for _, results in last for metric in metrics_of(results)))
    for name in dict.fromkeys(name for _, results in last for name in results["sets"]):
        rows = []
        for run, results in last:
            if part := results["sets"].get(name):
                cells = [percent(part["metrics"].get(metric)) for metric in metrics]
                rows.append([run.name, str(max(run.evaluations)), *cells, str(part["num_problems"])])
        header = [name, "after iteration", *(NAMES.get(metric, metric) for metric in metrics), "problems"]
        parts.append(table(header, rows))
    if not parts:
        return "<p>No evaluation while training: <code>evaluation.every</code> and <code>evaluation.data</code>.</p>"
    return "".join(parts) + "<p class=note>Percent, with 95% bootstrap intervals over problems.</p>"


def phase_table(groups: Sequence[Group]) -> str:
    found = phases_of(groups)
    totals = [sum(column) for column in zip(*found.values(), strict=True)]
    rows = [
        [name, *(f"{s:.3g} s, {s / total:.1%}" if total else "" for s, total in zip(seconds, totals, strict=True))]
        for name, seconds in found.items()
    ]
    return table(["phase, mean of an iteration", *(group.label for group in groups)], rows)


def settings(runs: Sequence[Run]) -> str:
    keys = list(dict.fromkeys(key for run in runs for key in run.settings))
    names = [run.name for run in runs]

    def rows(chosen: Sequence[str]) -> list[list[str]]:
        return [[key, *(json.dumps(r.settings[key]) if key in r.settings else "" for r in runs)] for key in chosen]

    parts = []
    if len(runs) > 1:
        different = differing(runs)
        parts.append("<h3>What differs</h3>")
        parts.append(table(["setting", *names], rows(different)) if different else "<p>Nothing but the names.</p>")
    whole = table(["setting", *names], rows(keys))
    return "".join(parts) + f"<details><summary>All {len(keys)} settings</summary>{whole}</details>"


def charts(groups: Sequence[Group], panels: Sequence[Panel]) -> list[dict[str, Any]]:
    """Returns what page.js draws; it smooths the curves itself, over a window that the reader sets."""
    found = []
    for panel in panels:
        curves = [curve(trace) for trace in panel.traces(groups)]
        window = window_for(max(len(run.rows) for group in groups for run in group.runs))
        found.append(
            {"title": panel.title, "unit": panel.unit, "text": panel.text, "curves": curves}
            | {"levels": panel.levels(groups), "level": panel.level, "x": "", "window": window}
        )
    return [*found, *(pass_at_k_chart(*item) for item in pass_at_k(groups).items()), phase_chart(groups)]


def curve(trace: Trace) -> dict[str, Any]:
    band = dict(zip(("low", "high"), map(rounded, trace.band), strict=True)) if trace.band else {}
    look = {"colour": trace.colour, "dash": trace.style, "sparse": trace.sparse}
    return {"name": trace.name, "x": trace.x, "y": rounded(trace.y), **band, **look}


def pass_at_k_chart(name: str, traces: Sequence[Trace]) -> dict[str, Any]:
    curves = [curve(trace) for trace in traces]
    text = "At the last evaluation. Band: 95% over problems, or from the lowest to the highest seed."
    shown = {"title": f"pass@k on {name}", "unit": "percent solved", "text": text, "curves": curves, "levels": []}
    return shown | {"x": "k", "log": True, "section": "evaluation"}


def phase_chart(groups: Sequence[Group]) -> dict[str, Any]:
    bars = [{"name": name, "x": rounded(seconds)} for name, seconds in phases_of(groups).items()]
    shown = {"title": "Time by phase", "unit": "", "text": "Mean of an iteration, without the first.", "bars": bars}
    return shown | {"labels": [group.label for group in groups], "x": "seconds an iteration", "section": "time"}


def rounded(values: Sequence[float | None]) -> list[float | None]:
    return [None if v is None else float(f"{v:.5g}") for v in values]
