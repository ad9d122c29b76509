"""Draws the study's figures, one function each, after the paper's. `final`: {method: {seed: run}} with the base."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from numbers_of import LAST, MEASURES, PLACES, Run, bands, by_step, ending, load_runs, mean_curve, score

from eepo_fast.compare.numbers import interval, paired

COLOURS = {
    "base": "#000000", "grpo": "#c44e52", "eepo": "#1f77b4", "eepo_random": "#7f7f7f", "high_temperature": "#dd8452",
    "entropy_bonus": "#55a868", "clip_higher": "#8172b3", "more_rollouts": "#937860", "aepo": "#da3b93",
    "eepo_aepo": "#17becf", "eepo_nll": "#bcbd22", "eepo_always": "#64b5cd", "eepo_multistep": "#f2a6c8",
    "eepo_iteration_gate": "#0b5d1e",
}  # fmt: skip
PLACE_TITLES = {"in": "trained-on kind", "larger": "larger numbers", "more": "more numbers"}
EVERY = 5

Final = dict[str, dict[int, Run]]


def _axes(columns: int, rows: int = 1, height: float = 3.6, **options):
    figure, axes = plt.subplots(rows, columns, figsize=(4.4 * columns, height * rows), constrained_layout=True,
                                squeeze=False, **options)  # fmt: skip
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure, path: Path) -> None:
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _band(axis, x, means, halves, label: str, colour: str, style: str = "-", **options) -> None:
    axis.plot(x, means, style, color=colour, label=label, **options)
    axis.fill_between(x, means - halves, means + halves, color=colour, alpha=0.13, linewidth=0)


def _curve(axis, runs: dict[int, Run], key: str, label: str, colour: str, style: str = "-") -> None:
    means, halves = mean_curve(runs, key)
    _band(axis, EVERY * (np.arange(len(means)) + 0.5), means, halves, f"{label}, {len(runs)} seeds", colour, style)


def forest(final: Final, path: Path) -> None:
    """Draws Table 1 as differences to GRPO, paired by seed, with their intervals."""
    names = [n for n in reversed(final) if n != "grpo"]
    figure, axes = _axes(3, 2, 0.24 * len(names) + 1.1, sharey=True)
    for axis, (title, value) in zip(axes.flat, MEASURES.items(), strict=True):
        axis.axvline(0, color="#bbbbbb", linewidth=1)
        for i, name in enumerate(names):
            found = paired(final[name], final["grpo"], value)
            if found and found[3] > 1:
                axis.errorbar(found[0], i, xerr=found[0] - found[1], fmt="o", markersize=4, color=COLOURS[name])
        axis.set_yticks(range(len(names)), names, fontsize=8)
        unit = "" if "mnat" in title else ", points"
        axis.set_title(f"{title}{unit}, minus GRPO's", fontsize=9)
    _save(figure, path)


def stages(final: Final, path: Path) -> None:
    """Draws the paper's Figure 6: entropy, reward and length of the two stages of EEPO, and of GRPO."""
    figure, axes = _axes(3)
    units = {"entropy": "nats a token", "reward": "mean reward", "length": "tokens (axis does not begin at 0)"}
    for axis, (key, unit) in zip(axes.flat, units.items(), strict=True):
        _curve(axis, final["grpo"], f"{key}/stage1", "GRPO", COLOURS["grpo"])
        _curve(axis, final["eepo"], f"{key}/stage1", "EEPO, stage 1", COLOURS["eepo"])
        _curve(axis, final["eepo"], f"{key}/stage2", "EEPO, stage 2", "#7fb7e0", "--")
        axis.set(xlabel="iteration", ylabel=unit, title=key)
    axes[0][0].legend(frameon=False, fontsize=8)
    _save(figure, path)


def watched(final: Final, path: Path) -> None:
    """Draws Figures 2 and 7a: accuracy against entropy and over training, in and out of distribution, on the first 125
    held-out problems, which are easier than the rest; the tables' sets share most of them."""
    figure, axes = _axes(3, 2)
    for row, place in enumerate(("in", "more")):
        for name in ("grpo", "eepo"):
            runs = list(final[name].values())
            steps = [line["step"] for line in runs[0]["watched"]]
            found = {
                metric: bands([[100 * run["watched"][k][f"eval/{place}/{metric}"] for run in runs]
                               for k in range(len(steps))])
                for metric in ("greedy", "pass@8")
            }  # fmt: skip
            entropy = [
                statistics.fmean(run["curves"]["entropy/stage1"][min(s // EVERY, 30) - 1] for run in runs)
                for s in steps
            ]
            colour, label = COLOURS[name], f"{name.upper()}, {len(runs)} seeds"
            axes[row][0].plot(entropy, found["greedy"][0], "o-", color=colour, markersize=3, label=label)
            axes[row][0].annotate("end", (entropy[-1], found["greedy"][0][-1]), fontsize=7, color=colour)
            for axis, metric in zip(axes[row][1:], found, strict=True):
                _band(axis, steps, *found[metric], label, colour)
                axis.set(xlabel="iteration", title=f"{metric}, percent, {PLACE_TITLES[place]}")
        axes[row][0].set(xlabel="entropy of stage 1, nats a token (falls to the right)", ylabel="greedy, percent",
                         title=f"greedy against entropy, {PLACE_TITLES[place]}")  # fmt: skip
        axes[row][0].invert_xaxis()
    axes[0][1].legend(frameon=False, fontsize=8)
    _save(figure, path)


def pass_at_k(final: Final, ks: Sequence[int], path: Path) -> None:
    """Draws Figure 7b: pass@k of the last policy, by set."""
    figure, axes = _axes(len(PLACES), 2)
    for axis, place in zip(axes[1], PLACES, strict=True):
        found = [paired(final["eepo"], final["grpo"], lambda r, k=k, p=place: score(r, p, f"pass@{k}")) for k in ks]
        means, lows = (np.array([each[i] for each in found]) for i in (0, 1))
        axis.axhline(0, color="#bbbbbb", linewidth=1)
        _band(
            axis, range(len(ks)), means, means - lows, "EEPO minus GRPO, by seed", COLOURS["eepo"], "o-", markersize=3
        )
        axis.set_xticks(range(len(ks)), list(map(str, ks)))
        axis.set(xlabel="k", ylabel="points", title=f"EEPO minus GRPO, {PLACE_TITLES[place]}")
    for axis, place in zip(axes[0], PLACES, strict=True):
        for name in ("base", "grpo", "eepo"):
            runs = list(final[name].values())[: 1 if name == "base" else None]
            found = bands([[score(run, place, f"pass@{k}") for run in runs] for k in ks])
            label = name if name == "base" else f"{name.upper()}, {len(runs)} seeds"
            _band(axis, range(len(ks)), *found, label, COLOURS[name], "o-", markersize=3)
        axis.set_xticks(range(len(ks)), list(map(str, ks)))
        axis.set(xlabel="k", ylabel="percent", title=f"pass@k, {PLACE_TITLES[place]}")
    axes[0][0].legend(frameon=False, fontsize=8)
    _save(figure, path)


def sweeps(out: Path, path: Path, methods: dict, chosen: dict[str, float]) -> None:
    """Draws Figure 5: every method's score over its own setting: the tuning seeds as dots, their mean as a line, what
    was taken as a ring, and EEPO's of these as a line through all."""
    tuned = load_runs(out, "tune")

    def scores(name: str, value: float) -> list[float]:
        return [100 * run["score"] for run in tuned.get(f"{name}-{value:g}", {}).values()]

    names = [n for n in methods if n in chosen]
    rows = -(-len(names) // 4)
    figure, axes = _axes(min(4, len(names)), rows, 2.9, sharey=True)
    for axis, name in zip(axes.flat, names, strict=False):
        values = methods[name].values
        means = [float(np.mean(scores(name, v))) for v in values]
        axis.plot(range(len(values)), means, color=COLOURS[name])
        for k, value in enumerate(values):
            axis.plot([k] * len(scores(name, value)), scores(name, value), ".", color=COLOURS[name], alpha=0.5)
        place = values.index(chosen[name])
        axis.plot(place, means[place], "o", markersize=11, markerfacecolor="none", color=COLOURS[name])
        axis.set_xticks(range(len(values)), [f"{v:g}" for v in values], fontsize=8)
        axis.set(title=name, xlabel=methods[name].key)
        taken = scores("eepo", chosen["eepo"])
        axis.axhspan(min(taken), max(taken), color="#888888", alpha=0.15, linewidth=0)
        axis.axhline(np.mean(taken), color="#888888", linestyle="--", linewidth=1, label="EEPO's, and its two seeds")
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    for axis in axes[:, 0]:
        axis.set(ylabel="(pass@1 + pass@16) / 2, percent")
    axes.flat[0].legend(frameon=False, fontsize=8)
    _save(figure, path)


def sampled(run: Run) -> float:
    """Returns the tokens of an iteration, AEPO's with them."""
    curves = run["curves"]
    return float(np.mean(curves["tokens/generated"]) + np.mean(curves.get("tokens/aepo", 0.0)))


def costs(final: Final, ratios: dict[str, list[float]], path: Path) -> None:
    """Draws Figure 8: seconds of an iteration against GRPO's (ratios, by method), tokens sampled, and the completions'
    length, each pair or run a dot."""
    names = [n for n in COLOURS if n in final and n != "base"]
    panels = {
        "seconds of an iteration, GRPO = 1": ratios,
        "tokens sampled an iteration": {name: list(map(sampled, final[name].values())) for name in names},
        f"tokens of an answer, last {LAST * EVERY} iterations":
            {name: [ending(run, "length/mean") for run in final[name].values()] for name in names},
    }  # fmt: skip
    figure, axes = _axes(3, 1, 0.28 * len(names) + 1.2, sharey=True)
    for axis, (title, values) in zip(axes.flat, panels.items(), strict=True):
        for i, name in enumerate(names):
            found = values.get(name)
            if not found:
                continue
            axis.barh(i, statistics.median(found), color=COLOURS[name], alpha=0.5)
            axis.plot(found, [i] * len(found), ".", color=COLOURS[name], markersize=4)
        axis.set_title(title, fontsize=9)
        axis.set_yticks(range(len(names)), names, fontsize=8)
    _save(figure, path)


def targets(out: Path, path: Path) -> None:
    """Draws AEPO's Figure 1: the policy's entropy over training, by target (dotted)."""
    kinds = {"targets": "coefficient as tuned", "targets_strong": "a strong term"}
    figure, axes = _axes(len(kinds), height=4.2)
    grpo = load_runs(out, "final").get("grpo", {})
    for axis, (phase, title) in zip(axes.flat, kinds.items(), strict=True):
        found = load_runs(out, phase)
        values = sorted(float(name.rpartition("-")[2]) for name in found)
        shades = plt.cm.viridis(np.linspace(0.0, 0.85, len(values)))
        for value, colour in zip(values, shades, strict=True):
            _curve(axis, found[f"aepo-{value:g}"], "entropy/policy", f"target {value:g}", colour)
            axis.axhline(value, color=colour, linestyle=":", linewidth=1)
        if grpo:
            _curve(axis, grpo, "entropy/policy", "GRPO", COLOURS["grpo"], "--")
        axis.set(xlabel="iteration", ylabel="nats a token", title=f"AEPO: entropy of the policy, {title}")
        axis.legend(frameon=False, fontsize=7)
    _save(figure, path)


def mass(content: dict, path: Path) -> None:
    """Draws Figure 4: probability of what stage 1 said, before and after the forget step, and where the mass went."""
    figure, axes = _axes(2, height=3.8)
    scatter, changes = axes.flat
    before, after = (np.array([row[f"stage1_{k}"] for row in content["prompts"]]) for k in ("before", "after"))
    scatter.plot([0, 1], [0, 1], color="#bbbbbb", linewidth=0.8)
    scatter.scatter(before, after, s=8, color=COLOURS["eepo"])
    scatter.set(xlabel="before", ylabel="after", title="probability of a prompt's stage-1 answers")
    changes.axvline(0, color="#bbbbbb", linewidth=1)
    colours = ("#1f77b4", "#7fb7e0", "#c44e52", "#e6a5a7")
    for k, colour in enumerate(colours):
        moved = [100 * (row["mass_after"][k] - row["mass_before"][k]) for row in content["prompts"]]
        mean, low, *_ = interval(by_step(content["prompts"], moved))
        changes.errorbar(mean, -k, xerr=mean - low, fmt="o", color=colour)
    changes.set_yticks([-k for k in range(len(content["kinds"]))], content["kinds"], fontsize=8)
    changes.set(xlabel="points, 95% over forget steps", title="change of the share of new samples")
    _save(figure, path)
