"""Tables, figures and the page of the study, from the runs that are there.

    python bench/study/report.py [--out bench/results/study]

What is not run yet is left out, and said.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import figures
from methods import METHODS, TARGET_ENTROPY, TUNING_SEEDS
from numbers_of import Run, ending, interval, load_runs, paired, score, text
from paper_claims import average_greedy, paper_claims
from run import SMALLEST_RATIO, STRONG, best_value, stage_ratio

COLUMNS = [(place, metric) for place in ("in", "larger", "more") for metric in ("greedy", "pass@1", "pass@16")]
MATTERS = 3.0  # points: a loss smaller than this is called none


def table(final: dict[str, dict[int, Run]], base: Path) -> list[str]:
    """The paper's Table 1 at this scale. base: the numbers of the model that all begin with, where they are there."""
    heads = [f"{place} {metric}" for place, metric in COLUMNS]
    lines = [
        "| method | seeds | " + " | ".join(heads) + " | greedy, average |",
        "| --- |" + " ---: |" * (len(heads) + 2),
    ]
    begin = {"base": {0: json.loads(base.read_text())}} if base.exists() else {}
    for name, runs in (begin | final).items():
        cells = [f"{interval([score(r, *c) for r in runs.values()])[0]:.1f}" for c in COLUMNS]
        average = interval([average_greedy(r) for r in runs.values()])[0]
        lines.append(f"| {name} | {len(runs)} | " + " | ".join(cells) + f" | {average:.1f} |")
    return lines


def unique(run: Run) -> float:
    """Different answers of a training group, percent, at the end."""
    return 100 * ending(run, "group/unique_fraction")


DIFFERENCES: dict[str, Callable[[Run], float]] = {
    "greedy, in": lambda r: score(r, "in", "greedy"),
    "greedy, average": average_greedy,
    "pass@16, in": lambda r: score(r, "in", "pass@16"),
    "pass@16, larger": lambda r: score(r, "larger", "pass@16"),
    "pass@16, more": lambda r: score(r, "more", "pass@16"),
    "final entropy, mnat": lambda r: 1000 * ending(r, "entropy/policy"),
    "unique answers, points": unique,
}


def differences(final: dict[str, dict[int, Run]], against: str) -> list[str]:
    """Every method minus one, paired by seed."""
    lines = [
        f"| minus {against} | pairs | " + " | ".join(DIFFERENCES) + " |",
        "| --- |" + " ---: |" * (len(DIFFERENCES) + 1),
    ]
    for name, runs in final.items():
        if name != against and runs.keys() & final[against].keys():
            found = [paired(runs, final[against], value) for value in DIFFERENCES.values()]
            lines.append(f"| {name} | {found[0][3]} | " + " | ".join(map(text, found)) + " |")
    return lines


def claims(final: dict[str, dict[int, Run]]) -> list[str]:
    """The claims that need no large model, each with its figure and whether its interval says so."""
    eepo, grpo = final["eepo"], final["grpo"]
    stage_gap = interval([1000 * (mean_of(r, "entropy/stage2") - mean_of(r, "entropy/stage1")) for r in eepo.values()])
    quality = interval([mean_of(r, "reward/stage2") / mean_of(r, "reward/stage1") for r in eepo.values()])
    length = interval([mean_of(r, "length/stage2") / mean_of(r, "length/stage1") for r in eepo.values()])
    entropy = paired(eepo, grpo, DIFFERENCES["final entropy, mnat"])
    diverse = paired(eepo, grpo, unique)
    many = paired(eepo, grpo, DIFFERENCES["pass@16, in"])
    greedy = paired(eepo, grpo, DIFFERENCES["greedy, in"])
    rows = [
        ("stage 2's entropy above stage 1's, mnat, over training", text(stage_gap), stage_gap[1] > 0),
        ("EEPO's final entropy above GRPO's, mnat", text(entropy), entropy[1] > 0),
        ("EEPO's unique answers a group above GRPO's, points", text(diverse), diverse[1] > 0),
        (f"pass@16 not below GRPO's by {MATTERS:g} points", text(many), many[1] > -MATTERS),
        (f"greedy not below GRPO's by {MATTERS:g} points", text(greedy), greedy[1] > -MATTERS),
        ("stage 2's reward at least 0.9 of stage 1's, over training", ratio(quality), quality[1] >= 0.9),
        ("stage 2's length within 10% of stage 1's", ratio(length), length[1] > 0.9 and length[2] < 1.1),
    ]  # fmt: skip
    lines = [f"| claim | EEPO, {len(eepo)} seeds | holds |", "| --- | --- | --- |"]
    return lines + [f"| {name} | {value} | {'yes' if held else 'no'} |" for name, value, held in rows]


def earlier(out: Path, final: dict[str, dict[int, Run]]) -> list[str]:
    """The same claims at the step that was taken first."""
    first = load_runs(out, "final_0.005")
    if "eepo" not in first:
        return []
    return [
        "### At η = 5e-3, which was tried first",
        *claims({"grpo": final["grpo"], "eepo": first["eepo"]}),
        "",
        *differences({"eepo": first["eepo"], "eepo_random": first["eepo_random"], "grpo": final["grpo"]}, "grpo"),
        "",
    ]


def ratio(triple: tuple[float, float, float]) -> str:
    return "{:.3f} ({:.3f} to {:.3f})".format(*triple)


def mean_of(run: Run, key: str) -> float:
    known = [v for v in run["curves"][key] if v is not None]
    return sum(known) / len(known)


def taken(out: Path) -> dict[str, float]:
    """The value that each method's sweep chose, of those whose sweeps are done."""
    tuned = load_runs(out, "tune")
    done = [
        name
        for name, m in METHODS.items()
        if m.values and all(len(tuned.get(f"{name}-{v:g}", {})) == len(TUNING_SEEDS) for v in m.values)
    ]
    return {name: best_value(out, name) for name in done}


def choices(out: Path) -> list[str]:
    """What the sweeps chose."""
    tuned = load_runs(out, "tune")
    lines = [
        "Score: mean of pass@1 and pass@16 on validation problems; in brackets stage 2's reward over stage 1's. Taken: "
        f"the best score; of a forget step the largest whose ratio is at least {SMALLEST_RATIO}.",
        "",
        "| method | setting | tried: mean score on the tuning seeds, percent |",
        "| --- | --- | --- |",
    ]
    for name, best in taken(out).items():
        method = METHODS[name]
        found = {v: tuned[f"{name}-{v:g}"] for v in method.values}
        means = {v: 100 * sum(r["score"] for r in runs.values()) / len(runs) for v, runs in found.items()}
        ratios = {v: sum(map(stage_ratio, runs.values())) / len(runs) for v, runs in found.items()}
        shown = {v: f"{v:g}: {m:.1f}" + (f" ({ratios[v]:.2f})" if ratios[v] != 1 else "") for v, m in means.items()}
        cells = ", ".join(f"**{cell}**" if v == best else cell for v, cell in shown.items())
        lines.append(f"| {name} | `{method.key}` | {cells} |")
    return lines


def target_table(runs: dict[str, dict[int, Run]]) -> list[str]:
    lines = [
        "| target entropy | seeds | final entropy, 95% over seeds | greedy, in | pass@16, in |",
        "| ---: | ---: | ---: | ---: | ---: |",
    ]
    for name in sorted(runs, key=lambda n: float(n.rpartition("-")[2])):
        part = runs[name].values()
        mean, low, high = interval([ending(r, "entropy/policy") for r in part])
        scores = [f"{interval([score(r, 'in', m) for r in part])[0]:.1f}" for m in ("greedy", "pass@16")]
        lines.append(
            f"| {name.rpartition('-')[2]} | {len(part)} | {mean:.3f} ({low:.3f} to {high:.3f}) | {' | '.join(scores)} |"
        )
    return lines


def page(out: Path) -> str:
    final, targets, strong = (load_runs(out, phase) for phase in ("final", "targets", "targets_strong"))
    final = {name: final[name] for name in METHODS if name in final}
    parts = [(Path(__file__).parent / "preface.md").read_text()]
    missing = [
        f"{n} ({len(final.get(n, {}))} of {m.num_seeds})"
        for n, m in METHODS.items()
        if len(final.get(n, {})) < m.num_seeds
    ]
    if missing:
        parts.append("Not finished: " + ", ".join(missing) + ".")
    if {"grpo", "eepo"} <= final.keys():
        figures.stages(out, out / "figure6_stages.png")
        figures.watched(out, out / "figure2_7_training.png")
        figures.costs(out, out / "figure8_costs.png")
        figures.final_scores(out, out / "table1.png")
        parts += [
            "## The claims",
            *claims(final),
            "",
            "## What the paper says, and what showed here",
            *paper_claims(final),
            "",
            *earlier(out, final),
            "## Every method",
            *table(final, out / "base.json"),
            "",
            *differences(final, "grpo"),
        ]
        parts += ["", "![scores](table1.png)", "", "## Ablations and the random control", *differences(
            {n: r for n, r in final.items() if n.startswith("eepo")}, "eepo")]  # fmt: skip
        parts += ["", "## Training", "![stages](figure6_stages.png)", "", "![training](figure2_7_training.png)", "",
                  "![costs](figure8_costs.png)"]  # fmt: skip
    mass = out / "forget_mass.json"
    if mass.exists():
        figures.mass(json.loads(mass.read_text()), out / "figure4_mass.png")
        parts += ["", "## Where the mass goes", "![mass](figure4_mass.png)"]
    chosen = choices(out)
    if len(chosen) > 4:
        figures.sweeps(out, out / "figure5_sweeps.png", METHODS, taken(out))
        parts += [
            "",
            f"## Sweeps (seeds {', '.join(map(str, TUNING_SEEDS))})",
            *chosen,
            "",
            "![sweeps](figure5_sweeps.png)",
        ]
    if targets:
        figures.targets(out, out / "aepo_targets.png")
        parts += [
            "",
            f"## AEPO's target (elsewhere {TARGET_ENTROPY})",
            "With the coefficient that its sweep chose, and the paper's temperatures:",
            "",
            *target_table(targets),
            "",
            *(
                [
                    f"With a term strong enough to hold entropy up ({', '.join(f'`{s}`' for s in STRONG)}):",
                    "",
                    *target_table(strong),
                    "",
                ]
                if strong
                else []
            ),
            "![targets](aepo_targets.png)",
        ]
    return "\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench/results/study"))
    args = parser.parse_args()
    (args.out / "README.md").write_text(page(args.out))
    print(f"{args.out / 'README.md'}")


if __name__ == "__main__":
    main()
