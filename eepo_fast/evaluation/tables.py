"""Writes an evaluation's results as JSON, CSV and Markdown, a column a benchmark and an unweighted average in percent,
and several evaluations side by side, a row each."""

import csv
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from eepo_fast.evaluation.pass_at_k import average, summarise
from eepo_fast.evaluation.samples import Row
from eepo_fast.types import UserError

NAMES = {"greedy": "greedy pass@1", "unique": "different completions"}


def make_results(model: str, settings: dict[str, Any], sets: dict[str, list[Row]], ks: list[int]) -> dict[str, Any]:
    """Returns the content of results.json. model: its name in tables; settings: all else that numbers depend on."""
    return {
        "model": model,
        "settings": settings,
        "sets": {name: summarise(rows, ks) for name, rows in sets.items()},
        "average": average(sets, ks),
    }


def write_results(folder: Path, results: dict[str, Any]) -> None:
    """Writes results.csv, results.md and, once they are there, results.json: with it an evaluation is done."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.csv").write_text(to_csv(results), encoding="utf-8")
    (folder / "results.md").write_text(to_markdown(results), encoding="utf-8")
    temporary = folder / "results.tmp"
    temporary.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    temporary.replace(folder / "results.json")


def cells(results: dict[str, Any], metric: str) -> list[dict[str, float] | None]:
    """Returns a metric on every set, then their average; None where a set has it not."""
    return [*(part["metrics"].get(metric) for part in results["sets"].values()), results["average"].get(metric)]


def metrics_of(results: dict[str, Any]) -> list[str]:
    """Returns every metric that some set has, in their order."""
    return list(dict.fromkeys(name for part in results["sets"].values() for name in part["metrics"]))


def to_csv(results: dict[str, Any]) -> str:
    """Returns a line for each metric of each set and of the average, as fractions."""
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


def percent(cell: dict[str, float] | None) -> str:
    return "" if cell is None else f"{100 * cell['value']:.1f} ({100 * cell['low']:.1f} to {100 * cell['high']:.1f})"


def _line(label: str, cells: Iterable[Any]) -> str:
    return f"| {label} | {' | '.join(map(str, cells))} |"


def to_markdown(results: dict[str, Any]) -> str:
    """Returns a table of percents with one decimal, each with its 95% interval."""
    names = [*results["sets"], "average"]
    lines = [_line(results["model"], names), "| --- |" + " ---: |" * len(names)]
    for metric in metrics_of(results):
        lines.append(_line(NAMES.get(metric, metric), map(percent, cells(results, metric))))
    parts = list(results["sets"].values())
    rows: dict[str, list] = {
        "problems": [p["num_problems"] for p in parts],
        "samples a problem": [p["num_samples"] for p in parts],
    }
    if any(p["length"] is not None for p in parts):
        lengths = [(p["length"], p["truncated_fraction"]) for p in parts]
        rows["mean length of all completions, tokens"] = ["" if n is None else f"{n:.0f}" for n, _ in lengths]
        rows["cut off, of all completions"] = ["" if cut is None else f"{100 * cut:.1f}" for _, cut in lengths]
    for status in ("no_answer", "timeout", "too_large", "error"):
        if any(counts := [p["status"].get(status, 0) for p in parts]):
            rows[status] = counts
    lines += [_line(label, row) + " |" for label, row in rows.items()]  # they have no average
    plain = {key: value for key, value in results["settings"].items() if not isinstance(value, dict | list)}
    settings = ", ".join(f"{key} {value}" for key, value in plain.items())
    return "\n".join([*lines, "", f"Percent, with 95% bootstrap intervals over problems. {settings}.", ""])


def join(folders: Sequence[Path], metric: str, form: str = "markdown") -> str:
    """Returns a table of one metric: a row an evaluation, a column a set, and the average; percent in Markdown,
    fractions in csv and json. UserError where they are not of the same sets, graded in the same mode, sampled at the
    same temperature."""
    found = [_read_results(folder) for folder in folders]
    for folder, results in zip(folders, found, strict=True):
        for key in ("data", "grading", "temperature"):
            mine, first = (_of_sets(r, key) for r in (results, found[0]))
            # greedy completions have no temperature, and of completions made elsewhere it is not known
            matters = key != "temperature" or (metric != "greedy" and None not in (mine, first))
            if matters and mine != first:
                raise UserError(
                    f"tables: {folder} and {folders[0]} cannot be compared: expected the same {key}, found {mine} and "
                    f"{first}"
                )
        if metric not in results["average"]:
            known = ", ".join(results["average"])
            raise UserError(f"--metric: {folder} has no {metric} on all of its sets; it has {known}")
    names = list(found[0]["sets"])
    models = [", step ".join(str(x) for x in (r["model"], r["settings"].get("step")) if x is not None) for r in found]
    rows = []
    for model, folder, results in zip(models, folders, found, strict=True):
        parts = [*(results["sets"][name]["metrics"][metric] for name in names), results["average"][metric]]
        label = model if models.count(model) == 1 else f"{model} ({folder})"
        rows.append([label, *(cell["value"] for cell in parts)])
    return _write(form, metric, [*names, "average"], rows)


def _write(form: str, metric: str, columns: list[str], rows: list[list]) -> str:
    if form == "json":
        content = [{"model": label, metric: dict(zip(columns, values, strict=True))} for label, *values in rows]
        return json.dumps(content, indent=1)
    if form == "csv":
        out = io.StringIO()
        csv.writer(out, lineterminator="\n").writerows([[metric, *columns], *rows])
        return out.getvalue().rstrip()
    lines = [_line(f"{NAMES.get(metric, metric)}, percent", columns), "| --- |" + " ---: |" * len(columns)]
    lines += [_line(label, [f"{100 * v:.1f}" for v in values]) for label, *values in rows]
    return "\n".join(lines)


def _of_sets(results: dict[str, Any], key: str) -> Any:
    """Returns a setting; of the sets, names and the beginnings of checksums, enough to say what differs."""
    value = results["settings"].get(key)
    return {name: value[name][:12] for name in sorted(value)} if key == "data" else value


def _read_results(folder: Path) -> dict[str, Any]:
    path = folder / "results.json"
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        if results["settings"]["data"].keys() != results["sets"].keys():
            raise ValueError
    except OSError as error:
        raise UserError(f"tables: {path} cannot be read: {error.strerror}; give the --out of an evaluation") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"tables: {path} is not the results of `eepo-fast eval`; give the --out of one") from None
    return results
