"""Says once, for the page and for its pictures, what a report draws: panels of curves, over the iterations."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, product

import numpy as np

from eepo_fast.report.runs import Group, Values

SOLID, DASHED, DOTTED = "solid", "dash", "dot"
COLOURS = (
    "#1f6fb4", "#c8443f", "#2a8c5a", "#8a5cb8", "#c77a1f", "#3a9ca6", "#a8487f", "#6b6b6b",
    "#7fb2e0", "#e79a97", "#86c9a6", "#c3a8de", "#e6bb85", "#94cfd6", "#d79abf", "#adadad",
)  # fmt: skip
STAGES = (("stage1", "stage 1", SOLID), ("stage2", "stage 2", DASHED))


@dataclass(frozen=True)
class Line:
    key: str
    """The metric's key in metrics.jsonl."""
    label: str
    style: str = SOLID


@dataclass(frozen=True)
class Trace:
    """A curve is drawn from this, in the pictures and on the page. Its band is bound by (low, high), over seeds or
    problems. Where it is `sparse` its points are marked, and not smoothed. `label` goes into the legend of its panel
    and is None where the key of all panels says it."""

    name: str
    x: list[int]
    y: Values
    band: tuple[Values, Values] | None
    colour: str
    style: str
    sparse: bool
    label: str | None = None


@dataclass(frozen=True)
class Panel:
    title: str
    unit: str
    lines: tuple[Line, ...]
    text: str
    """An explanation for somebody who has not read the manual."""
    level: str = ""
    """The key of a setting, drawn as a horizontal line."""

    def traces(self, groups: Sequence[Group]) -> list[Trace]:
        """Returns its curves, group by group; a line that a group knows nothing of has none."""
        found, alone = [], len(groups) == 1
        for (g, group), (i, line) in product(enumerate(groups), enumerate(self.lines)):
            x, y, low, high = group.band(line.key)
            if any(v is not None for v in y):
                name = line.label if alone else f"{group.name}: {line.label}"
                label = line.label if alone or (g == 0 and len(self.lines) > 1) else None
                band = (low, high) if len(group.runs) > 1 else None
                found.append(Trace(name, x, y, band, colour(groups, g, i), line.style, None in y, label))
        return found

    def levels(self, groups: Sequence[Group]) -> list[float]:
        """Returns the values of its horizontal lines: the setting in those runs that use it."""
        runs, section = [run for group in groups for run in group.runs], self.level.partition(".")[0]
        used = {run.settings.get(self.level) for run in runs if run.settings.get(f"{section}.enabled")}
        return sorted(value for value in used if value is not None)


def _stages(prefix: str) -> tuple[Line, ...]:
    return tuple(Line(f"{prefix}{stage}", label, style) for stage, label, style in STAGES)


PANELS = (
    Panel("Reward", "mean reward", _stages("reward/"), "Of sampled completions. Stage 2 a little below stage 1 is the "
          "price of forgetting; far below means that the forget step is too strong."),
    Panel("Entropy", "nats a token", (*_stages("entropy/"), Line("entropy/policy", "policy", DOTTED)),
          "−mean log-prob of what was sampled, under the weights that sampled it; policy: exact, at the update. "
          "Stage 2 above stage 1 is what the forget step is for.", level="eepo.alpha"),
    Panel("Length", "tokens", _stages("length/"), "Mean length of a completion."),
    Panel("Cut off", "share of completions", (Line("length/truncated_fraction", "cut off"),),
          "Completions that reached rollout.max_new_tokens before they ended."),
    Panel("Different answers", "share of a group", (
        Line("group/unique_fraction", "different"), Line("group/all_equal_fraction", "all rewards equal", DASHED)),
        "Different completions in a group, and groups whose rewards are all the same: those teach nothing."),
    Panel("Gate", "share of stage-1 tokens", (Line("unlearn/active_fraction", "gate open"),),
          "Where the policy is certain (entropy below α), its tokens are forgotten."),
    Panel("Stragglers", "share of stage 1", (Line("unlearn/stragglers", "preempted"),),
          "With rollout.quorum below 1: completions that were not waited for, and went on after the forget step."),
    Panel("Carried", "share of completions", (Line("rollout/carried_fraction", "carried"),),
          "With rollout.carry: completions that had not ended, and go on in the next iteration."),
    Panel("Held", "groups", (Line("rollout/held_groups", "groups"),),
          "With rollout.carry: groups that are in flight or whole, and trained on in a later iteration."),
    Panel("Staleness", "policy updates", (
        Line("rollout/staleness_mean", "mean"), Line("rollout/staleness_max", "most", DASHED)),
        "With rollout.carry: how many updates the policy has had since the weights that sampled a token were its own."),
    Panel("Forget steps taken", "1: taken", (Line("unlearn/applied", "taken"),),
          "0 where the gate was closed, or the step too long (eepo.max_step) or taken back (eepo.max_kl): such an "
          "iteration is GRPO's, at a higher price. Lower eepo.learning_rate, or set eepo.step=kl."),
    Panel("Length of the forget step", "η", (Line("unlearn/learning_rate", "η"),),
          "As it is set, or with eepo.step=kl as it is found for eepo.target_kl."),
    Panel("How far the forget step went", "nats a token", (Line("unlearn/kl", "KL(θ'‖θ)"),),
          "Estimated from stage 2. Near 0: forgetting does nothing; above eepo.max_kl it is taken back."),
    Panel("What arrived of the forget step", "share of what was meant", (
        Line("unlearn/retention", "retention"), Line("unlearn/noise_ratio", "rounding noise", DASHED)),
        "Retention is 1, within sampling error, where all of the step reached the engine's weights."),
    Panel("Clipped tokens", "share of tokens", _stages("policy/clip_fraction_"),
          "Tokens whose ratio left the clip range in the direction that ends their gradient."),
    Panel("Gradient cut off in stage 2", "share of its weight", tuple(
        Line(f"policy/clip_weight_stage2_{sign}", f"{sign} advantage", style)
        for sign, style in (("positive", SOLID), ("negative", DASHED))),
        "What the clip takes from stage 2's gradient. Apart for the two signs, it changes what stage 2 teaches."),
    Panel("Effective sample size", "share of the tokens", (Line("policy/ess", "ESS"),),
          "Of the weights π_θ/π_sampled: 1 where θ' samples as θ does. Low: few tokens carry the gradient."),
    Panel("Probability ratio", "mean of π_θ / π_sampled", _stages("policy/ratio_mean_"),
          "Near 1. Far from it in stage 2: the forget step was too strong for its samples to teach θ."),
    Panel("KL to the reference", "nats a token", (Line("policy/kl", "KL(θ‖reference)"),),
          "How far training has moved the policy."),
    Panel("Gradient norm of the policy", "before clipping", (Line("policy/grad_norm", "‖∇‖"),), "Mean over updates."),
    Panel("Learning rate", "of the iteration's last update", (Line("policy/learning_rate", "learning rate"),),
          "As optimizer.schedule has it."),
    Panel("Engine against policy", "nats", (Line("rollout/logprob_gap", "mean |log-prob gap|"),),
          "On stage 1, where both hold the same weights: 16-bit rounding, a few hundredths. More is a fault."),
    Panel("AEPO temperature", "", (Line("aepo/temperature", "temperature"),), "Hot below the target, cold above."),
    Panel("AEPO's right answers", "samples", (Line("aepo/num_positive", "positive"),), "Of its extra samples."),
    Panel("Speed", "tokens a second", (Line("tokens/per_second", "generated"),), "Over the whole iteration."),
    Panel("Iteration", "seconds", (Line("time/iteration_s", "wall time"),), "From one iteration to the next."),
)  # fmt: skip

_SHORTER = "lower eepo.learning_rate, raise {}, or set eepo.step=kl (with it: lower eepo.target_kl)"
UNTAKEN = (  # metric, what happened to the forget step, what to do; the first that is set tells
    ("unlearn/resampled", "taken back: KL above eepo.max_kl", _SHORTER.format("eepo.max_kl")),
    ("unlearn/too_long", "not taken: longer than eepo.max_step", _SHORTER.format("eepo.max_step")),
    ("unlearn/non_finite", "not taken: gradient no number", "a 16-bit policy overflows: set model.dtype=float32"),
    ("unlearn/skipped", "not taken: gate closed", "it opens as entropy falls; raise eepo.alpha to forget earlier"),
)
TROUBLE = {
    "reward/missing": "rewards missing: a grader that timed out or failed",
    **{key: f"forget steps {why}; {remedy}" for key, why, remedy in UNTAKEN[:-1]},
    "unlearn/skipped": "forget steps not taken: gate closed, too long, or no number",
    "policy/updates_skipped": "policy updates dropped: gradient not finite",
    "policy/non_finite_losses": "losses that were no number",
    "policy/non_finite_ratios": "tokens left out, whose ratio was too large to compute with",
    "policy/out_of_memory": "micro-batches halved for memory",
    "rollout/non_finite_logprobs": "completions whose log-probs were no number",
}


def panels_of(groups: Sequence[Group]) -> list[Panel]:
    """Returns the panels that have something to show, and one for each set of evaluation."""
    rows = [row for group in groups for run in group.runs for row in run.rows]
    known = {key for row in rows for key, value in row.items() if value is not None}
    found = []
    for panel in (*PANELS, *_evaluations(known)):
        if lines := tuple(line for line in panel.lines if line.key in known):
            found.append(Panel(panel.title, panel.unit, lines, panel.text, panel.level))
    return found


def _evaluations(known: set[str]) -> list[Panel]:
    panels = []
    for name in sorted({key.split("/")[1] for key in known if key.startswith("eval/")}):
        metrics = [k for k in known if k.startswith((f"eval/{name}/pass@", f"eval/{name}/greedy"))]
        styled = zip(sorted(metrics, key=_natural), cycle((SOLID, DASHED, DOTTED)), strict=False)
        lines = tuple(Line(key, key.split("/")[2], style) for key, style in styled)
        panels.append(Panel(f"Evaluation on {name}", "share solved", lines, "Of the policy, while it trains."))
    return panels


def _natural(key: str) -> tuple[int, int]:
    metric, _, k = key.rpartition("/")[2].partition("@")
    return (int(metric != "greedy"), int(k or 0))


def late_mean(group: Group, key: str) -> float | None:
    """Returns a metric's mean over the last fifth of the iterations, over all seeds."""
    values = [v for run in group.runs for v in run.values(key)[-max(1, len(run.rows) // 5) :] if v is not None]
    return sum(values) / len(values) if values else None


def phases(group: Group) -> dict[str, float]:
    """Returns the mean seconds an iteration of each phase, the longest first; `other` is what no phase measured."""
    keys = list(dict.fromkeys(key for run in group.runs for row in run.rows for key in row if key.startswith("time/")))
    rows = [row for run in group.runs for row in (run.rows[1:] or run.rows)]  # the first iteration warms up
    # an evaluation comes between iterations; all other phases are part of one
    counted = [k for k in keys if k not in ("time/iteration_s", "time/evaluation_s", "time/waiting_s")]
    means = {k[5:-2]: sum(row.get(k) or 0.0 for row in rows) / len(rows) for k in counted}
    other = sum(row.get("time/iteration_s") or 0.0 for row in rows) / len(rows) - sum(means.values())
    return dict(sorted(means.items(), key=lambda item: -item[1])) | {"other": max(0.0, other)}


def phases_of(groups: Sequence[Group]) -> dict[str, list[float]]:
    """Each phase has its seconds in each group."""
    found = [phases(group) for group in groups]
    names = dict.fromkeys(name for part in found for name in part)
    return {name: [part.get(name, 0.0) for part in found] for name in names}


def pass_at_k(groups: Sequence[Group]) -> dict[str, list[Trace]]:
    """Each set of the last evaluations has a trace of each group: percent over k. Its band goes from the lowest to the
    highest seed; of one run it is the interval over problems. A group without an evaluation has no points."""
    found: dict[str, list[dict[int, list[dict]]]] = {}
    for g, group in enumerate(groups):
        for run in group.runs:
            sets = run.evaluations[max(run.evaluations)]["sets"] if run.evaluations else {}
            for name, part in sets.items():
                for metric, cell in part["metrics"].items():
                    if metric.startswith("pass@"):
                        cells = found.setdefault(name, [{} for _ in groups])[g]
                        cells.setdefault(int(metric[5:]), []).append(cell)
    traces: dict[str, list[Trace]] = {name: [] for name in found}
    for name, of_groups in found.items():
        for g, cells in enumerate(of_groups):
            seeds = [cells[k] for k in sorted(cells)]
            mean = [100 * (sum(c["value"] for c in s) / len(s)) for s in seeds]
            low = [100 * min(c["value" if len(s) > 1 else "low"] for c in s) for s in seeds]
            high = [100 * max(c["value" if len(s) > 1 else "high"] for c in s) for s in seeds]
            look = (colour(groups, g, 0), SOLID, True)
            traces[name].append(Trace(groups[g].label, sorted(cells), mean, (low, high), *look))
    return traces


def smooth(values: Sequence[float | None], window: int) -> np.ndarray:
    """Centred running mean over what is there; None is a gap."""
    series, half = np.array(values, dtype=float), window // 2
    known, here = ~np.isnan(series), slice(half, half + len(series))
    sums, counts = (np.convolve(part, np.ones(2 * half + 1))[here] for part in (np.nan_to_num(series), known))
    return np.where(known, sums / np.maximum(counts, 1), np.nan)


def window_for(num_iterations: int) -> int:
    """Odd: as many iterations before as after."""
    return 2 * (num_iterations // 40) + 1


def colour(groups: Sequence[Group], group: int, line: int) -> str:
    """Returns a line's colour where there is one group, else its group's: then the dashes tell the lines apart."""
    return COLOURS[(line if len(groups) == 1 else group) % len(COLOURS)]
