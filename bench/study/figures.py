"""The study's figures, one function each, after the paper's."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from numbers_of import LAST, ending, interval, load_runs, mean_curve, score

COLOURS = {
    "base": "#8c8c8c", "grpo": "#c44e52", "eepo": "#1f77b4", "eepo_random": "#7f7f7f", "high_temperature": "#dd8452",
    "entropy_bonus": "#55a868", "clip_higher": "#8172b3", "more_rollouts": "#937860", "aepo": "#da8bc3",
    "eepo_aepo": "#17becf", "eepo_nll": "#bcbd22", "eepo_always": "#64b5cd", "eepo_multistep": "#e377c2",
    "eepo_iteration_gate": "#2ca02c",
}  # fmt: skip
EVERY = 5


def _axes(columns: int, height: float = 3.8):
    figure, axes = plt.subplots(1, columns, figsize=(4.6 * columns, height), constrained_layout=True, squeeze=False)
    for axis in axes[0]:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes[0]


def _save(figure, path: Path) -> None:
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _curve(axis, runs, key: str, label: str, colour: str, style: str = "-") -> None:
    means, halves = map(np.array, mean_curve(runs, key))
    steps = EVERY * (np.arange(len(means)) + 0.5)
    axis.plot(steps, means, style, color=colour, label=f"{label}, {len(runs)} seeds")
    axis.fill_between(steps, means - halves, means + halves, color=colour, alpha=0.15, linewidth=0)


def stages(out: Path, path: Path) -> None:
    """The paper's Figure 6: entropy, reward and length of the two stages of EEPO, and of GRPO."""
    final = load_runs(out, "final")
    figure, axes = _axes(3)
    for axis, key in zip(axes, ("entropy", "reward", "length"), strict=True):
        _curve(axis, final["grpo"], f"{key}/stage1", "GRPO", COLOURS["grpo"])
        _curve(axis, final["eepo"], f"{key}/stage1", "EEPO, stage 1", COLOURS["eepo"])
        _curve(axis, final["eepo"], f"{key}/stage2", "EEPO, stage 2", "#7fb7e0", "--")
        axis.set(xlabel="iteration", title=key)
    axes[0].legend(frameon=False, fontsize=8)
    _save(figure, path)


def watched(out: Path, path: Path) -> None:
    """Figures 2 and 7: entropy against accuracy, and accuracy and pass@8 over training, in and out of distribution."""
    final = load_runs(out, "final")
    figure, axes = _axes(4)
    for name in ("grpo", "eepo"):
        runs = list(final[name].values())
        steps = [row["step"] for row in runs[0]["watched"]]
        for place, style in (("in", "-"), ("more", "--")):
            greedy, many = (
                np.mean([[100 * row[f"eval/{place}/{m}"] for row in run["watched"]] for run in runs], axis=0)
                for m in ("greedy", "pass@8")
            )
            entropy = np.mean(
                [[run["curves"]["entropy/policy"][min(s // EVERY, 30) - 1] for s in steps] for run in runs], axis=0
            )
            label = f"{name.upper()}, {'trained-on kind' if place == 'in' else 'more numbers'}"
            axes[0 if place == "in" else 1].plot(entropy, greedy, "o-", color=COLOURS[name], markersize=3, label=label)
            axes[2].plot(steps, greedy, style, color=COLOURS[name], label=label)
            axes[3].plot(steps, many, style, color=COLOURS[name], label=label)
    for axis, title in zip(axes[:2], ("in distribution", "out of distribution"), strict=True):
        axis.set(xlabel="entropy of the policy", ylabel="greedy, percent", title=f"greedy against entropy, {title}")
        axis.invert_xaxis()
        axis.legend(frameon=False, fontsize=7)
    axes[2].set(xlabel="iteration", title="greedy, percent")
    axes[3].set(xlabel="iteration", title="pass@8, percent")
    axes[3].legend(frameon=False, fontsize=7)
    _save(figure, path)


def sweeps(out: Path, path: Path, methods: dict, chosen: dict[str, float]) -> None:
    """Figure 5: every method's score over its own setting: the tuning seeds as dots, their mean as a line, what was
    taken as a ring, and EEPO's of these as a line through all."""
    tuned = load_runs(out, "tune")

    def scores(name: str, value: float) -> list[float]:
        return [100 * run["score"] for run in tuned.get(f"{name}-{value:g}", {}).values()]

    names = [n for n, m in methods.items() if n in chosen and all(scores(n, v) for v in m.values)]
    rows = -(-len(names) // 4)
    figure, axes = plt.subplots(rows, min(4, len(names)), figsize=(3.3 * min(4, len(names)), 3.2 * rows), sharey=True,
                                squeeze=False, constrained_layout=True)  # fmt: skip
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
        if "eepo" in names:
            taken = float(np.mean(scores("eepo", chosen["eepo"])))
            axis.axhline(taken, color="#888888", linestyle="--", linewidth=1, label="EEPO's")
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    for axis in axes[:, 0]:
        axis.set(ylabel="(pass@1 + pass@16) / 2, percent")
    if "eepo" in names:
        axes.flat[0].legend(frameon=False, fontsize=8)
    _save(figure, path)


def costs(out: Path, path: Path) -> None:
    """Figure 8: seconds of an iteration against GRPO's in the same study, and length of the completions."""
    final = load_runs(out, "final")
    figure, (seconds, length) = _axes(2)
    names = [n for n in COLOURS if n in final]
    grpo = np.mean([np.mean(run["curves"]["time/iteration_s"]) for run in final["grpo"].values()])
    for i, name in enumerate(names):
        ratios = [np.mean(run["curves"]["time/iteration_s"]) / grpo for run in final[name].values()]
        seconds.barh(i, np.mean(ratios), color=COLOURS[name])
        lengths = [ending(run, "length/mean") for run in final[name].values()]
        length.barh(i, np.mean(lengths), color=COLOURS[name])
    seconds.set_yticks(range(len(names)), names, fontsize=8)
    length.set_yticks(range(len(names)), [""] * len(names))
    seconds.set(title="seconds of an iteration, GRPO = 1")
    length.set(title=f"tokens a completion, last {LAST * EVERY} iterations")
    _save(figure, path)


def targets(out: Path, path: Path) -> None:
    """AEPO's Figure 1: the policy's entropy over training, by target."""
    kinds = {"targets": "coefficient as tuned", "targets_strong": "a strong term"}
    found = {phase: load_runs(out, phase) for phase in kinds}
    figure, axes = _axes(len(kinds))
    for axis, (phase, title) in zip(axes, kinds.items(), strict=True):
        values = sorted(float(name.rpartition("-")[2]) for name in found[phase])
        shades = plt.cm.viridis(np.linspace(0.1, 0.85, len(values)))
        for value, colour in zip(values, shades, strict=True):
            _curve(axis, found[phase][f"aepo-{value:g}"], "entropy/policy", f"target {value:g}", colour)
        axis.set(xlabel="iteration", ylabel="nats a token", title=f"AEPO: entropy of the policy, {title}")
        if values:
            axis.legend(frameon=False, fontsize=8)
    _save(figure, path)


def mass(content: dict, path: Path) -> None:
    """Figure 4: probability of what stage 1 said, before and after the forget step, and where the mass went."""
    figure, axes = _axes(2)
    rows = content["prompts"]
    before, after = (np.array([row[f"stage1_{k}"] for row in rows]) for k in ("before", "after"))
    axes[0].plot([0, 1], [0, 1], color="#bbbbbb", linewidth=0.8)
    axes[0].scatter(before, after, s=8, color=COLOURS["eepo"])
    axes[0].set(xlabel="before", ylabel="after", title="probability of a prompt's stage-1 answers")
    kinds = content["kinds"]
    for i, when in enumerate(("before", "after")):
        bottom = 0.0
        for kind, colour in zip(kinds, ("#1f77b4", "#7fb7e0", "#c44e52", "#e6a5a7"), strict=True):
            share = content["mass"][when][kind]
            axes[1].bar(i, share, bottom=bottom, color=colour, label=kind if i == 0 else None)
            axes[1].text(i, bottom + share / 2, f"{share:.2f}", ha="center", va="center", fontsize=8)
            bottom += share
    axes[1].set_xticks([0, 1], ["before", "after"])
    axes[1].set(title="share of fresh samples")
    axes[1].legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    _save(figure, path)


def final_scores(out: Path, path: Path) -> None:
    """Table 1 as points with intervals: greedy and pass@16, by set."""
    final = load_runs(out, "final")
    names = [n for n in COLOURS if n in final]
    figure, axes = _axes(2, 0.35 * len(names) + 1.6)
    for axis, metric in zip(axes, ("greedy", "pass@16"), strict=True):
        for offset, (place, marker) in enumerate((("in", "o"), ("larger", "s"), ("more", "^"))):
            for i, name in enumerate(names):
                values = [score(run, place, metric) for run in final[name].values()]
                mean, low, _ = interval(values) if len(values) > 1 else (values[0], values[0], values[0])
                axis.errorbar(mean, i + 0.18 * (offset - 1), xerr=mean - low, fmt=marker, markersize=4,
                              color=COLOURS[name], label=place if i == 0 else None)  # fmt: skip
        axis.set_yticks(range(len(names)), names, fontsize=8)
        axis.set(title=f"{metric}, percent")
    axes[1].legend(frameon=False, fontsize=8)
    _save(figure, path)
