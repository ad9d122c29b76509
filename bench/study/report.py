"""Writes the tables, figures and the page of the study, from the runs that are there.

    python bench/study/report.py [--out bench/results/study]

What is not run yet is left out, and said.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import figures
from claims import OURS, PAPER, Final, claims, verdicts
from methods import FIRST_SEED, METHODS, TARGET_ENTROPY, TUNING_SEEDS
from numbers_of import (
    MEASURES,
    PLACES,
    Run,
    average,
    by_step,
    ending,
    load_runs,
    mean_of,
    plain,
    score,
    text,
)
from run import KS, SMALLEST_RATIO, STRONG, best_value, stage_ratio
from seconds import PAIRS
from why import Pair, why

from eepo_fast.compare.numbers import interval, paired

METRICS = ("greedy", "pass@1", "pass@16")
BY_SET = ("greedy", *(f"pass@{k}" for k in KS), "unique")
STAGE_COLUMNS = {
    "entropy (mnat)": ("entropy/stage", 1000, 1),
    "reward (%)": ("reward/stage", 100, 1),
    "tokens": ("length/stage", 1, 2),
    "clipped (%)": ("policy/clip_fraction_stage", 100, 2),
}
"""{what: (metric's key without the stage, factor, digits)}."""
EXPLORED = {"7e-3": "final_0.007", "5e-3": "final_0.005"}
"""The runs of the seeds before FIRST_SEED, by η; GRPO's are with the first."""


def table(heads: list[str], rows: list[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(heads) + " |", "| --- |" + " ---: |" * (len(heads) - 1)]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows), ""]


def scores(final: Final) -> list[str]:
    """Returns the paper's Table 1 at this scale."""
    heads = ["method", "seeds", *(f"{place} {metric}" for place in PLACES for metric in METRICS), "average greedy"]
    rows = []
    for name, runs in final.items():
        cells = [
            f"{interval([score(r, place, metric) for r in runs.values()])[0]:.1f}"
            for place in PLACES
            for metric in METRICS
        ]
        mean = interval([average("greedy")(r) for r in runs.values()])
        shown = plain(mean) if len(runs) > 1 and name != "base" else f"{mean[0]:.1f}"
        rows.append([name, "" if name == "base" else str(len(runs)), *cells, shown])
    return table(heads, rows)


def differences(final: Final, against: str) -> list[str]:
    """Returns every method minus one, paired by seed."""
    rows = []
    for name, runs in final.items():
        if name != against and len(runs.keys() & final[against].keys()) > 1:
            found = [paired(runs, final[against], value) for value in MEASURES.values()]
            cells = [text(each) if each else "" for each in found]
            rows.append([name, str(found[0][3]), *cells])
    return table([f"minus {against}", "pairs", *MEASURES], rows)


def by_set(final: Final) -> list[str]:
    """Returns EEPO minus GRPO on every set."""
    rows = []
    for place in PLACES:
        found = [paired(final["eepo"], final["grpo"], lambda r, m=m, p=place: score(r, p, m)) for m in BY_SET]
        rows.append([place, *map(text, found)])
    return table(["eepo minus grpo", *BY_SET], rows)


def stages(final: Final) -> list[str]:
    """Returns the numbers of the paper's Figure 6: what the two stages were like over training."""
    rows = []
    for name, runs in final.items():
        if "entropy/stage2" not in next(iter(runs.values())).get("curves", {}):
            continue
        cells = []
        for key, factor, digits in STAGE_COLUMNS.values():
            for stage in (1, 2):
                mean = statistics.fmean(mean_of(r, f"{key}{stage}") for r in runs.values())
                cells.append(f"{factor * mean:.{digits}f}")
        gate = statistics.fmean(mean_of(r, "unlearn/active_fraction") for r in runs.values())
        moved = [mean_of(r, "unlearn/kl") for r in runs.values() if "unlearn/kl" in r["curves"]]  # the gate opened
        rows.append([name, *cells, f"{gate:.2f}", f"{statistics.fmean(moved):.4f}" if moved else ""])
    heads = [f"{what}, stage {stage}" for what in STAGE_COLUMNS for stage in (1, 2)]
    return table(["method", *heads, "share forgotten", "KL of the step, nats a token"], rows)


def costs(final: Final, ratios: dict[str, list[float]]) -> list[str]:
    """Returns the numbers of the paper's Figure 8. ratios: of seconds, by method."""
    rows = []
    for name, runs in final.items():
        if name == "base":
            continue
        known = ratios.get(name)
        seconds = f"{statistics.median(known):.2f} ({min(known):.2f} to {max(known):.2f})" if known else ""
        sampled = statistics.fmean(figures.sampled(r) for r in runs.values())
        length = statistics.fmean(ending(r, "length/mean") for r in runs.values())
        rows.append([name, seconds, f"{sampled:.0f}", f"{length:.2f}"])
    heads = ["method", "seconds of an iteration over GRPO's", "tokens sampled an iteration", "tokens an answer"]
    return table(heads, rows)


def choices(out: Path) -> list[str]:
    """Returns what the sweeps tried, values that are no longer swept too, and what was taken."""
    tuned, rows = load_runs(out, "tune"), []
    for name, best in taken(out).items():
        found = {float(key[len(name) + 1 :]): runs for key, runs in tuned.items() if key.rpartition("-")[0] == name}
        cells = []
        for value, runs in sorted(found.items()):
            ratio = statistics.fmean(map(stage_ratio, runs.values()))
            mean = 100 * statistics.fmean(r["score"] for r in runs.values())
            cell = f"{value:g}: {mean:.1f}" + (f" ({ratio:.3f})" if ratio != 1 else "")
            cells.append(f"**{cell}**" if value == best else cell)
        rows.append([name, f"`{METHODS[name].key}`", ", ".join(cells)])
    return table(["method", "setting", "tried: mean score of the tuning seeds, percent"], rows)


def taken(out: Path) -> dict[str, float]:
    """Returns the value that each method's sweep chose, of those whose sweeps are done."""
    tuned = load_runs(out, "tune")
    done = [
        name
        for name, m in METHODS.items()
        if m.values and all(len(tuned.get(f"{name}-{v:g}", {})) == len(TUNING_SEEDS) for v in m.values)
    ]
    return {name: best_value(out, name) for name in done}


def target_table(runs: dict[str, dict[int, Run]]) -> list[str]:
    """Returns the paper's summary of AEPO's Figure 1 in numbers, and how far entropy follows the targets."""
    rows, names = [], sorted(runs, key=lambda n: float(n.rpartition("-")[2]))
    for name in names:
        part = runs[name].values()
        entropy = plain(interval([ending(r, "entropy/policy") for r in part]), 3)
        cells = [f"{interval([score(r, 'in', m) for r in part])[0]:.1f}" for m in ("greedy", "pass@16")]
        rows.append([name.rpartition("-")[2], str(len(part)), entropy, *cells])
    if not names:
        return ["Not run yet.", ""]
    lowest, highest = names[0], names[-1]
    found = paired(runs[highest], runs[lowest], lambda r: ending(r, "entropy/policy"))
    apart = float(highest.rpartition("-")[2]) - float(lowest.rpartition("-")[2])
    return [
        *table(["target entropy", "seeds", "entropy at the end", "greedy, in", "pass@16, in"], rows),
        f"From the lowest target to the highest, {apart:.2f} apart, entropy changes by {text(found, 3)}.",
        "",
    ]


def mass_table(content: dict) -> list[str]:
    """Returns the numbers of the paper's Figure 4; intervals over forget steps, one for all prompts of a batch."""
    prompts, rows = content["prompts"], []
    columns = {"probability of the answers of stage 1": [(p["stage1_before"], p["stage1_after"]) for p in prompts]}
    for k, kind in enumerate(content["kinds"]):
        columns[f"new samples: {kind}"] = [(p["mass_before"][k], p["mass_after"][k]) for p in prompts]
    for name, values in columns.items():
        before, after = (100 * statistics.fmean(column) for column in zip(*values, strict=True))
        change = interval(by_step(prompts, [100 * (b - a) for a, b in values]))
        rows.append([name, f"{before:.1f}", f"{after:.1f}", text(change)])
    moved = (by_step(prompts, [100 * (p["mass_after"][k] - p["mass_before"][k]) for p in prompts]) for k in (2, 3))
    right, wrong = map(interval, moved)
    return [
        *table(["percent", "before", "after", "change, points, 95% over steps"], rows),
        f"Of answers that stage 1 did not give, right ones change by {text(right)} points and wrong ones by "
        f"{text(wrong)}.",
        "",
    ]


def pairs_of(out: Path, final: Final, name: str) -> list[Pair]:
    """Returns (the method's run, GRPO's) of every seed at the η that was taken, those of the exploration too."""
    every = (load_runs(out, EXPLORED["7e-3"]), final)
    return [(runs[name][s], runs["grpo"][s]) for runs in every for s in runs[name] if s in runs["grpo"]]


def explored(out: Path) -> list[str]:
    """Returns what the seeds before the final ones gave, which the rule for η was changed on."""
    parts = []
    grpo = load_runs(out, EXPLORED["7e-3"]).get("grpo")
    if not grpo:
        return ["They are not there."]
    for eta, phase in EXPLORED.items():
        runs = load_runs(out, phase)
        final = {"grpo": grpo, "eepo": runs["eepo"], "eepo_random": runs["eepo_random"]}
        parts += [f"η = {eta}:", "", *claims(runs["eepo"], grpo), "", *differences(final, "grpo")]
    return parts


def with_base(out: Path, final: Final) -> Final:
    """Returns the model that all begin with, under every seed, before the final runs."""
    base = json.loads((out / "base.json").read_text())
    return {"base": {seed: base for runs in final.values() for seed in runs}} | final


def results(out: Path, final: Final) -> list[str]:
    figures.forest(final, out / "table1.png")
    figures.stages(final, out / "figure6_stages.png")
    figures.watched(final, out / "figure2_7_training.png")
    figures.pass_at_k(final, KS, out / "figure7_pass_at_k.png")
    times = out / "seconds.json"
    ratios = {"grpo": [1.0]} | (json.loads(times.read_text()) if times.exists() else {})
    figures.costs(final, ratios, out / "figure8_costs.png")
    eepo = {name: runs for name, runs in final.items() if name.startswith("eepo")}
    return [
        "## The claims",
        f"Seeds {FIRST_SEED} and up, each run once, with η and the seeds settled before; measures and margins were "
        "fixed while the first of them ran, before a number of theirs was read. The row on the trained-on kind was "
        "added after.",
        "",
        *claims(final["eepo"], final["grpo"]),
        "",
        *((Path(__file__).parent / "findings.md").read_text().splitlines()),
        "",
        "## What the paper says, and what showed here",
        *verdicts(final, PAPER, "the paper says"),
        "",
        "What the study adds:",
        "",
        *verdicts(final, OURS, "the question"),
        "",
        "## Every method",
        *scores(final),
        *differences(final, "grpo"),
        *by_set(final),
        (Path(__file__).parent / "measures.md").read_text(),
        "![differences](table1.png)",
        "",
        "## Ablations and the random control",
        *differences(eepo, "eepo"),
        "## Training",
        *stages(final),
        "![stages](figure6_stages.png)",
        "",
        "![training](figure2_7_training.png)",
        "",
        "![pass@k](figure7_pass_at_k.png)",
        "",
        "## Cost",
        "Seconds: each method in turns with GRPO, nothing beside them, the first iterations from the base; the median "
        f"of {PAIRS} pairs and their range (a higher temperature or clip and the entropy term do the work of GRPO: "
        "theirs is the noise of a pair). The gate is open for a third of the tokens there, for a half at the end; "
        "`bench/bench_iteration.py` has EEPO's cost in parts.",
        "",
        *costs(final, ratios),
        "![costs](figure8_costs.png)",
        "",
    ]


def page(out: Path) -> str:
    final = load_runs(out, "final")
    final = {name: final[name] for name in METHODS if name in final}
    parts = [(Path(__file__).parent / "preface.md").read_text()]
    counts = {name: (len(final.get(name, {})), method.num_seeds) for name, method in METHODS.items()}
    missing = [f"{name} ({found} of {wanted})" for name, (found, wanted) in counts.items() if found < wanted]
    if missing:
        parts += ["Not finished: " + ", ".join(missing) + ".", ""]
    if {"grpo", "eepo"} <= final.keys():
        parts += results(out, with_base(out, final))
    if (out / "forget_mass.json").exists():
        mass = json.loads((out / "forget_mass.json").read_text())
        figures.mass(mass, out / "figure4_mass.png")
        parts += ["## Where the mass goes", f"One forget step on {mass['prompts_a_step']} prompts from the policy that "
                  f"GRPO ends with, {len(mass['prompts'])} prompts in all, 128 new samples of each before and after.",
                  "", *mass_table(mass), "![mass](figure4_mass.png)", ""]  # fmt: skip
        pairs, random_step = (pairs_of(out, final, name) for name in ("eepo", "eepo_random"))
        parts += [(Path(__file__).parent / "why.md").read_text(), *why(pairs, random_step)]
    if "eepo" in taken(out):
        figures.sweeps(out, out / "figure5_sweeps.png", METHODS, taken(out))
    parts += [
        f"## Sweeps (seeds {', '.join(map(str, TUNING_SEEDS))})",
        "Score: mean of pass@1 and pass@16 on validation problems; in brackets stage 2's reward over stage 1's where "
        "anything was forgotten. Taken: the best score; of a forget step the largest whose ratio is at least "
        f"{SMALLEST_RATIO}.",
        "",
        *choices(out),
        "![sweeps](figure5_sweeps.png)",
        "",
        f"## AEPO's target (elsewhere {TARGET_ENTROPY})",
        "With the coefficient that its sweep chose, and the paper's temperatures (entropy never reaches 0.45 here, so "
        "that the two highest are one run):",
        "",
        *target_table(load_runs(out, "targets")),
        f"With a term strong enough to hold entropy up ({', '.join(f'`{s}`' for s in STRONG)}):",
        "",
        *target_table(load_runs(out, "targets_strong")),
        "![targets](aepo_targets.png)",
        "",
        "## What was explored before",
        f"Seeds 0 to {FIRST_SEED - 1}. η was chosen knowing what these gave: they describe, and confirm nothing.",
        "",
        *explored(out),
    ]
    figures.targets(out, out / "aepo_targets.png")
    return "\n".join(parts).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench/results/study"))
    args = parser.parse_args()
    (args.out / "README.md").write_text(page(args.out))
    print(f"{args.out / 'README.md'}")


if __name__ == "__main__":
    main()
