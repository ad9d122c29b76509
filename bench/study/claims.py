"""Holds the claims that were to be tested, and the paper's, against the study's runs."""

from __future__ import annotations

from collections.abc import Callable

from numbers_of import LAST, MEASURES, Run, Triple, average, ending, mean_of, plain, scaled, score, text

from eepo_fast.compare.numbers import interval, paired

Final = dict[str, dict[int, Run]]
MATTERS = 1.0  # points: a loss smaller than this is called none
RATIO = 0.9  # of stage 2's reward over stage 1's: the least that counts as no loss of quality


def training_entropy(run: Run) -> float | None:
    """Returns the entropy at the temperature that training samples at; for EEPO with stage 2's tokens among them."""
    return scaled(ending(run, "entropy/policy"), 1000)


def training_unique(run: Run) -> float | None:
    """Returns the different answers of a training group; for EEPO half of them are sampled after the forget step."""
    return scaled(ending(run, "group/unique_fraction"), 100)


def over(runs: dict[int, Run], key: str, points: int = 0) -> Triple:
    """Returns stage 2's mean over stage 1's."""
    return interval([mean_of(r, f"{key}/stage2", points) / mean_of(r, f"{key}/stage1", points) for r in runs.values()])


def claims(eepo: dict[int, Run], grpo: dict[int, Run]) -> list[str]:
    """Returns the claims that need no large model, each with its figure and whether its whole interval says so."""
    gaps = [1000 * (mean_of(r, "entropy/stage2") - mean_of(r, "entropy/stage1")) for r in eepo.values()]
    gap, quality, end = interval(gaps), over(eepo, "reward"), over(eepo, "reward", LAST)
    length = over(eepo, "length")
    rows = [
        ("stage 2's entropy above stage 1's, mnat, over training", text(gap), gap[1] > 0),
        ("stage 2's reward at least 0.9 of stage 1's, over training", plain(quality, 3), quality[1] >= RATIO),
        ("and over the last 25 iterations", plain(end, 3), end[1] >= RATIO),
        ("stage 2's length within 10% of stage 1's", plain(length, 3), length[1] > 0.9 and length[2] < 1.1),
    ]
    above = {
        "the last policy's entropy above GRPO's, mnat": MEASURES["entropy, mnat"],
        "EEPO's entropy above GRPO's in training's last 25 iterations (both stages), mnat": training_entropy,
        "more different completions of 32 from the last policy than from GRPO's, points": MEASURES["unique of 32"],
        "more different answers in a group than GRPO's, last 25 iterations (both stages), points": training_unique,
    }
    bounded = {
        f"pass@16 not below GRPO's by {MATTERS:g} point (average of the sets)": MEASURES["pass@16"],
        f"pass@1 not below GRPO's by {MATTERS:g} point (average)": MEASURES["pass@1"],
        f"greedy not below GRPO's by {MATTERS:g} point (average)": MEASURES["greedy"],
        "and so on the trained-on kind alone": lambda run: score(run, "in", "greedy"),
        f"reward of stage 1, which is the policy's own, not below GRPO's by {MATTERS:g} point, last 25 iterations":
            MEASURES["reward, stage 1"],
    }  # fmt: skip
    for least, group in ((0.0, above), (-MATTERS, bounded)):
        for name, value in group.items():
            found = paired(eepo, grpo, value)
            if found:
                rows.append((name, text(found), found[1] > least))
    lines = [f"| claim | EEPO, {len(eepo)} seeds | holds |", "| --- | --- | --- |"]
    return lines + [f"| {name} | {value} | {'yes' if held else 'no'} |" for name, value, held in rows]


def verdict(low: float, high: float) -> str:
    """Judges a difference that the claim says is above zero."""
    if low > 0:
        return "yes"
    return "no, the opposite" if high < 0 else "not shown: the interval holds zero"


Row = tuple[str, str, str, str, Callable[[Run], float | None]]


def larger_greedy(run: Run) -> float:
    return score(run, "larger", "greedy")


PAPER: list[Row] = [
    ("Table 1", "EEPO solves more than GRPO (greedy)", "eepo", "grpo", average("greedy")),
    ("Table 1", "and more than a higher temperature", "eepo", "high_temperature", average("greedy")),
    ("Table 1", "and more than a larger entropy term", "eepo", "entropy_bonus", average("greedy")),
    ("Table 1", "and more than clip-higher", "eepo", "clip_higher", average("greedy")),
    ("Table 1", "and more than more rollouts", "eepo", "more_rollouts", average("greedy")),
    ("Figure 2", "GRPO gets better at what it trains on (greedy, `in`)", "grpo", "base",
     lambda r: score(r, "in", "greedy")),
    ("Figure 2", "and worse elsewhere (greedy, `larger`: base minus GRPO)", "base", "grpo", larger_greedy),
    ("Figure 2", "EEPO does not (greedy, `larger`: EEPO minus GRPO)", "eepo", "grpo", larger_greedy),
    ("Figure 6a", "EEPO keeps more entropy than GRPO (mnat)", "eepo", "grpo", MEASURES["entropy, mnat"]),
    ("Figure 7b", "EEPO's pass@16 is above GRPO's", "eepo", "grpo", average("pass@16")),
    ("Figure 7b", "by more than at pass@1 (pass@16 minus pass@1)", "eepo", "grpo",
     lambda r: average("pass@16")(r) - average("pass@1")(r)),
    ("Section 2.2", "a larger entropy term does not stop the collapse (mnat: base minus it)", "base", "entropy_bonus",
     MEASURES["entropy, mnat"]),
    ("Ablations", "The complementary loss is better than NLL (greedy)", "eepo", "eepo_nll", average("greedy")),
    ("Ablations", "The gate helps, against always forgetting (greedy)", "eepo", "eepo_always", average("greedy")),
    ("Ablations", "One step is better than three (greedy)", "eepo", "eepo_multistep", average("greedy")),
]  # fmt: skip
OURS: list[Row] = [
    ("Control", "The direction matters: EEPO against a random step as long (mnat)", "eepo", "eepo_random",
     MEASURES["entropy, mnat"]),
    ("Control", "and different completions of 32", "eepo", "eepo_random", MEASURES["unique of 32"]),
    ("Ablations", "A gate for each token is better than one for the iteration (greedy)", "eepo", "eepo_iteration_gate",
     average("greedy")),
    ("AEPO", "AEPO solves more than GRPO (greedy)", "aepo", "grpo", average("greedy")),
    ("AEPO", "and keeps more entropy (mnat)", "aepo", "grpo", MEASURES["entropy, mnat"]),
    ("AEPO", "EEPO and AEPO together solve more than EEPO (greedy)", "eepo_aepo", "eepo", average("greedy")),
]  # fmt: skip


def verdicts(final: Final, rows: list[Row], head: str) -> list[str]:
    """Returns a table; a claim whose runs are missing is left out. `final` has the base under every seed. What EEPO
    costs is bench/bench_iteration.py's to say: these runs were not timed side by side."""
    lines = [f"| where | {head} | found here | pairs | showed |", "| --- | --- | --- | ---: | --- |"]
    for where, claim, better, worse, value in rows:
        found = paired(final.get(better, {}), final.get(worse, {}), value)
        if found and found[3] > 1:
            lines.append(f"| {where} | {claim} | {text(found)} | {found[3]} | {verdict(found[1], found[2])} |")
    return lines
