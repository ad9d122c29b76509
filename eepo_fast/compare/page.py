"""Writes what a comparison found: README.md and index.html with the same tables, curves.png, and two CSV files."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from itertools import cycle, pairwise
from pathlib import Path
from typing import Any

from eepo_fast.compare.numbers import (
    Interval,
    Result,
    Results,
    differences_csv,
    interval,
    measures_csv,
    over_seeds,
    paired,
    read_results,
    value_of,
    verdict,
)
from eepo_fast.compare.plan import Plan
from eepo_fast.compare.stamps import Stamp, changes, declared
from eepo_fast.report.page import ASSETS, table
from eepo_fast.report.panels import COLOURS, SOLID, Trace
from eepo_fast.report.runs import Values

FEW_COLUMNS = 7  # measures a table; more do not fit a page
FEW_POINTS = 10  # of a curve, which are marked


@dataclass(frozen=True)
class Section:
    title: str
    text: str = ""
    header: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    picture: str = ""
    words: bool = False
    """Whether the cells are words, which stand on the left; numbers stand on the right."""


def write_comparison(plan: Plan, out: Path, stamps: Sequence[Stamp]) -> Path:
    """Writes the page from the runs that are there; what is not there yet is said. Returns index.html."""
    results = read_results(out, plan)
    (out / "measures.csv").write_text(measures_csv(plan, results), encoding="utf-8")
    (out / "differences.csv").write_text(differences_csv(plan, results), encoding="utf-8")
    sections = [*_head(plan, results, stamps), *_claims(plan, results, stamps), *_differences(plan, results)]
    sections += _values(plan, results)
    if draw_curves(plan, results, out / "curves.png"):
        text = "Means over seeds (how many there are), and their 95% intervals; of long runs, running means."
        sections.append(Section("Over training", text, picture="curves.png"))
    if (out / "report" / "index.html").is_file():
        sections.append(Section("Run by run", "Curves, settings and completions of each run: report/index.html."))
    (out / "README.md").write_text(to_markdown(plan.name, sections), encoding="utf-8")
    page = out / "index.html"
    page.write_text(to_html(plan.name, sections), encoding="utf-8")
    return page


def _head(plan: Plan, results: Results, stamps: Sequence[Stamp]) -> list[Section]:
    missing = [f"{name}-{s}" for name, runs in results.items() for s in plan.seeds if s not in runs]
    rows = [
        [name, f"{len(results[name])} of {len(plan.seeds)}", " ".join(m.about.split())]
        for name, m in plan.methods.items()
    ]
    text = " ".join(plan.about.split())
    finished = [run for runs in results.values() for run in runs.values()]
    unknown = [label for label, m in plan.all_measures().items() if all(value_of(run, m) is None for run in finished)]
    if finished and unknown:
        text += f"\n\nNo run has: {', '.join(unknown)}. Is the metric's name right?"
    if missing:
        shown = ", ".join(missing[:8]) + (", …" if len(missing) > 8 else "")
        text += f"\n\nNot all runs are there yet: {len(missing)} of {len(plan.methods) * len(plan.seeds)} are missing "
        text += f"({shown})."
    when = {False: "before the first run", True: "after runs were there"}
    first = stamps[0]
    text += f"\n\nDeclared {first['declared']}, sha256 {first['sha256'][:12]}, {when[first['after_runs']]}."
    for before, later in pairwise(stamps):
        text += f" Changed {later['declared']}, {when[later['after_runs']]}: {changes(before, later)}."
    return [Section("What was run", text.strip(), ("method", "runs", ""), rows, words=True)]


def _claims(plan: Plan, results: Results, stamps: Sequence[Stamp]) -> list[Section]:
    if not plan.claims:
        return []
    rows = []
    for claim in plan.claims:
        found, held, strict = verdict(claim, plan, results, _digits(plan, claim.measure) + 1)
        asked = f"{claim.measure}: {claim.method} − {claim.against} > {claim.margin:g}"
        rows.append([claim.says + _declared_late(declared(claim, plan), stamps), asked, found, held, strict])
    num = len(plan.claims)
    text = (
        "A claim holds where the whole 95% interval of the differences, paired by seed, lies above its margin: “no” "
        "where all of it lies below, “not shown” where it holds the margin. Of "
        f"{num} claims that are all false, {0.025 * num:.2g} would hold by chance on average: the last column has "
        f"intervals at 1 − 0.05/{num} (Bonferroni)."
    )
    header = ("claim", "asked", "found", "holds", f"holds, of {num} at once")
    return [Section("Claims", text, header, rows, words=True)]


def _declared_late(claim: dict[str, Any], stamps: Sequence[Stamp]) -> str:
    """Returns a note where a claim was first declared when runs were there."""
    first = next((s for s in stamps if claim in s["plan"]["claims"]), None)
    return " (declared after runs were there)" if first is not None and first["after_runs"] else ""


def _parts(plan: Plan) -> list[list[str]]:
    """Returns the measures' labels, as many together as fit a table."""
    labels = list(plan.all_measures())
    return [labels[i : i + FEW_COLUMNS] for i in range(0, len(labels), FEW_COLUMNS)]


def _text(found: Interval | None, digits: int, *, signed: bool) -> str:
    return "" if found is None else found.text(digits, signed=signed)


def _digits(plan: Plan, label: str) -> int:
    return 1 if plan.all_measures()[label].percent else 3


def _differences(plan: Plan, results: Results) -> list[Section]:
    base, measures, sections = results[plan.baseline], plan.all_measures(), []
    for part in _parts(plan):
        rows = []
        for name in [name for name in plan.methods if name != plan.baseline]:
            found = [paired(results[name], base, partial(value_of, measure=measures[label])) for label in part]
            pairs, cells = max((f.num_values for f in found if f), default=0), []
            for f, label in zip(found, part, strict=True):
                fewer = f", {f.num_values} pairs" if f and f.num_values < pairs else ""
                cells.append(_text(f, _digits(plan, label), signed=True) + fewer)
            rows.append([name, str(pairs), *cells])
        sections.append(Section("", "", ("method", "pairs", *part), rows))
    text = "Differences paired by seed, Student's 95% intervals, each alone; percent measures in points."
    return [Section(f"Minus {plan.baseline}", text), *sections]


def _values(plan: Plan, results: Results) -> list[Section]:
    sections = [Section("Every method", "Means over seeds, 95%.")]
    for part in _parts(plan):
        rows = []
        for name, runs in results.items():
            found = [over_seeds(runs, plan.all_measures()[label]) for label in part]
            cells = [_text(f, _digits(plan, label), signed=False) for f, label in zip(found, part, strict=True)]
            rows.append([name, str(len(runs)), *cells])
        sections.append(Section("", "", ("method", "seeds", *part), rows))
    return sections


def draw_curves(plan: Plan, results: Results, path: Path) -> bool:
    """Draws the plan's curves, a panel each; returns whether there was anything to draw."""
    from eepo_fast.report.pictures import draw_grid

    if not any(results.values()) or not plan.curves:
        return False
    colours = dict(zip(plan.methods, cycle(COLOURS), strict=False))
    panels = []
    for key in plan.curves:
        traces = [curve(results[name], name, key, colour) for name, colour in colours.items()]
        panels.append((key, "", [trace for trace in traces if trace.x], ()))
    draw_grid(panels, [(f"{name} ({len(results[name])})", colour) for name, colour in colours.items()], path)
    return True


def curve(runs: dict[int, Result], name: str, key: str, colour: str) -> Trace:
    """Returns a metric's mean over seeds, with its 95% interval, at the iterations in which some seed has it."""
    points: dict[int, list[float]] = {}
    for run in runs.values():
        for row in run["rows"]:
            if row.get(key) is not None:
                points.setdefault(row["step"], []).append(row[key])
    steps = sorted(points)
    found = [interval(points[step]) for step in steps]
    low: Values = [f.low for f in found]
    high: Values = [f.high for f in found]
    band = (low, high) if all(f.num_values > 1 for f in found) else None
    return Trace(name, steps, [f.mean for f in found], band, colour, SOLID, sparse=len(steps) < FEW_POINTS)


def to_markdown(title: str, sections: Sequence[Section]) -> str:
    parts = [f"# {title}"]
    for section in sections:
        parts += [f"## {section.title}"] if section.title else []
        parts += [section.text] if section.text else []
        if section.rows:
            marks = ["---", *["---" if section.words else "---:"] * (len(section.header) - 1)]
            lines = [section.header, marks, *section.rows]
            parts.append(
                "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
            )
        parts += [f"![{section.title}]({section.picture})"] if section.picture else []
    return "\n\n".join(parts) + "\n"


def to_html(title: str, sections: Sequence[Section]) -> str:
    parts = [f"<h1>{escape(title)}</h1>"]
    for section in sections:
        parts += [f"<h2>{escape(section.title)}</h2>"] if section.title else []
        parts += [f"<p>{escape(part)}</p>" for part in section.text.split("\n\n") if part]
        parts += [table(section.header, section.rows)] if section.rows else []
        parts += [f'<img src="{section.picture}" alt="{escape(section.title)}">'] if section.picture else []
    style = (ASSETS / "page.css").read_text(encoding="utf-8") + "img { max-width: 100%; }"
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{style}</style>'
    return f"<!doctype html><html><head>{head}</head><body><main>" + "\n".join(parts) + "</main></body></html>\n"
