"""Writes what a comparison found: README.md and index.html with the same tables, curves.png, and two CSV files."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

from eepo_fast.compare.numbers import (
    Interval,
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
from eepo_fast.report.page import table
from eepo_fast.report.panels import COLOURS

FEW_COLUMNS = 7  # measures a table; more do not fit a page


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
        text = f"Means over seeds (how many there are), and their 95% intervals: {', '.join(plan.curves)}."
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
    others, sections = [name for name in plan.methods if name != plan.baseline], []
    for part in _parts(plan):
        rows = []
        for name in others:
            found = [paired(results[name], results[plan.baseline], plan.all_measures()[label]) for label in part]
            pairs = max((f.count for f in found if f), default=0)
            cells = [_text(f, _digits(plan, label), signed=True) for f, label in zip(found, part, strict=True)]
            cells = [f"{c}, {f.count} pairs" if f and f.count < pairs else c for f, c in zip(found, cells, strict=True)]
            rows.append([name, str(pairs), *cells])
        title = f"Minus {plan.baseline}" if not sections else ""
        text = (
            "Differences paired by seed, Student's 95% intervals, each alone; percent measures in points."
            if title
            else ""
        )
        sections.append(Section(title, text, ("method", "pairs", *part), rows))
    return sections


def _values(plan: Plan, results: Results) -> list[Section]:
    sections: list[Section] = []
    for part in _parts(plan):
        rows = []
        for name, runs in results.items():
            found = [over_seeds(runs, plan.all_measures()[label]) for label in part]
            cells = [_text(f, _digits(plan, label), signed=False) for f, label in zip(found, part, strict=True)]
            rows.append([name, str(len(runs)), *cells])
        title = "Every method" if not sections else ""
        sections.append(Section(title, "Means over seeds, 95%." if title else "", ("method", "seeds", *part), rows))
    return sections


def curve(results: Results, name: str, key: str) -> tuple[list[int], list[Interval]]:
    """Returns a metric of a method over the iterations in which some seed has it."""
    points: dict[int, list[float]] = {}
    for run in results[name].values():
        for row in run["rows"]:
            if row.get(key) is not None:
                points.setdefault(row["step"], []).append(row[key])
    steps = sorted(points)
    return steps, [interval(points[step]) for step in steps]


def draw_curves(plan: Plan, results: Results, path: Path) -> bool:
    """Draws the plan's curves, a panel each; returns whether there was anything to draw."""
    from matplotlib.figure import Figure

    if not any(results.values()) or not plan.curves:
        return False
    columns = min(3, len(plan.curves))
    lines = -(-len(plan.curves) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.4 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flat
    for key, axis in zip(plan.curves, axes, strict=False):
        for i, name in enumerate(plan.methods):
            steps, points = curve(results, name, key)
            colour = COLOURS[i % len(COLOURS)]
            axis.plot(steps, [p.mean for p in points], color=colour, label=f"{name} ({len(results[name])})")
            known = [(step, p) for step, p in zip(steps, points, strict=True) if p.count > 1]
            if known:
                x, bands = zip(*known, strict=True)
                axis.fill_between(x, [p.low for p in bands], [p.high for p in bands], color=colour, alpha=0.12, lw=0)
        axis.set(title=key, xlabel="iteration")
        axis.spines[["top", "right"]].set_visible(False)
    for axis in list(axes):  # panels beyond the last curve
        axis.set_visible(False)
    figure.axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)
    return True


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


STYLE = "body{font:15px system-ui,sans-serif;max-width:75rem;margin:2rem auto;padding:0 1rem;color:#222}\
table{border-collapse:collapse;margin:.8rem 0}th,td{padding:.25rem .7rem;text-align:right;border-bottom:1px solid #ddd}\
th:first-child,.words th,.words td{text-align:left}.scroll{overflow-x:auto}img{max-width:100%}"


def to_html(title: str, sections: Sequence[Section]) -> str:
    parts = [f"<h1>{escape(title)}</h1>"]
    for section in sections:
        parts += [f"<h2>{escape(section.title)}</h2>"] if section.title else []
        parts += [f"<p>{escape(part)}</p>" for part in section.text.split("\n\n") if part]
        if section.rows:
            kind = "words" if section.words else "numbers"
            parts.append(f'<div class="{kind}">{table(section.header, section.rows)}</div>')
        parts += [f'<img src="{section.picture}" alt="{escape(section.title)}">'] if section.picture else []
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
    return f"<!doctype html><html><head>{head}</head><body>" + "\n".join(parts) + "</body></html>\n"
