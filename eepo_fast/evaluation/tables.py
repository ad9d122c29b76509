"""The results of an evaluation as JSON, CSV and Markdown: a column a benchmark, an unweighted average, percent."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

from eepo_fast.evaluation.pass_at_k import average, summarise
from eepo_fast.evaluation.samples import Row

NAMES = {"greedy": "greedy pass@1", "unique": "different completions"}


def make_results(model: str, settings: dict[str, Any], sets: dict[str, list[Row]], ks: list[int]) -> dict[str, Any]:
    """model: how the tables call it; settings: all else that the numbers depend on."""
    return {
        "model": model,
        "settings": settings,
        "sets": {name: summarise(rows, ks) for name, rows in sets.items()},
        "average": average(sets, ks),
    }


def write_results(folder: Path, results: dict[str, Any]) -> None:
    """results.json, results.csv and results.md."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (folder / "results.csv").write_text(to_csv(results), encoding="utf-8")
    (folder / "results.md").write_text(to_markdown(results), encoding="utf-8")


def cells(results: dict[str, Any], metric: str) -> list[dict[str, float] | None]:
    """A metric on every set, then their average; None where a set has it not."""
    columns = [part["metrics"].get(metric) for part in results["sets"].values()]
    return [*columns, results["average"].get(metric)]


def metrics_of(results: dict[str, Any]) -> list[str]:
    """Every metric that some set has, in their order."""
    return list(dict.fromkeys(name for part in results["sets"].values() for name in part["metrics"]))


def to_csv(results: dict[str, Any]) -> str:
    """A line for each metric of each set and of the average, as fractions."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["model", "set", "metric", "value", "low", "high"])
    for metric in metrics_of(results):
        for name, cell in zip([*results["sets"], "average"], cells(results, metric), strict=True):
            if cell is not None:
                writer.writerow([results["model"], name, metric, *(f"{cell[k]:.6f}" for k in ("value", "low", "high"))])
    for name, part in results["sets"].items():
        for metric in ("length", "truncated_fraction"):
            if part[metric] is not None:
                writer.writerow([results["model"], name, metric, f"{part[metric]:.6f}", "", ""])
    return out.getvalue()


def to_markdown(results: dict[str, Any]) -> str:
    """Percent with one decimal and its 95% interval."""
    names = list(results["sets"])
    lines = [
        f"| {results['model']} | " + " | ".join([*names, "average"]) + " |",
        "| --- |" + " ---: |" * (len(names) + 1),
    ]
    for metric in metrics_of(results):
        row = [
            "" if c is None else f"{100 * c['value']:.1f} ({100 * c['low']:.1f} to {100 * c['high']:.1f})"
            for c in cells(results, metric)
        ]
        lines.append(f"| {NAMES.get(metric, metric)} | " + " | ".join(row) + " |")
    parts = list(results["sets"].values())
    lines.append("| problems | " + " | ".join(str(p["num_problems"]) for p in parts) + " | |")
    lines.append("| samples a problem | " + " | ".join(str(p["num_samples"]) for p in parts) + " | |")
    if any(p["length"] is not None for p in parts):
        row = ["" if p["length"] is None else f"{p['length']:.0f}" for p in parts]
        lines.append("| mean length, tokens | " + " | ".join(row) + " | |")
        row = ["" if p["truncated_fraction"] is None else f"{100 * p['truncated_fraction']:.1f}" for p in parts]
        lines.append("| cut off | " + " | ".join(row) + " | |")
    for status in ("no_answer", "timeout", "too_large", "error"):
        counts = [p["status"].get(status, 0) for p in parts]
        if any(counts):
            lines.append(f"| {status} | " + " | ".join(map(str, counts)) + " | |")
    plain = {key: value for key, value in results["settings"].items() if not isinstance(value, dict | list)}
    settings = ", ".join(f"{key} {value}" for key, value in plain.items())
    return "\n".join([*lines, "", f"Percent, with 95% bootstrap intervals over problems. {settings}.", ""])
