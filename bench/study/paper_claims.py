"""The paper's claims, each held against the study's runs: what it says, what was found here, and whether it showed."""

from __future__ import annotations

from collections.abc import Callable

from numbers_of import Run, ending, paired, score, text

Final = dict[str, dict[int, Run]]
BASELINES = ("high_temperature", "entropy_bonus", "clip_higher", "more_rollouts")


def average_greedy(run: Run) -> float:
    return sum(score(run, place, "greedy") for place in ("in", "larger", "more")) / 3


def average_pass(run: Run) -> float:
    return sum(score(run, place, "pass@16") for place in ("in", "larger", "more")) / 3


def entropy(run: Run) -> float:
    return 1000 * ending(run, "entropy/policy")


def verdict(low: float, high: float) -> str:
    """Of a difference that the claim says is above zero."""
    if low > 0:
        return "yes"
    return "no, the opposite" if high < 0 else "not shown: the interval holds zero"


def more(final: Final, better: str, worse: str, value: Callable[[Run], float]) -> tuple[str, str] | None:
    """(found, verdict) of `better` having more of a value than `worse`, paired by seed."""
    if not final.get(better, {}).keys() & final.get(worse, {}).keys():
        return None
    found = paired(final[better], final[worse], value)
    return f"{text(found)}, {found[3]} pairs", verdict(found[1], found[2])


def paper_claims(final: Final) -> list[str]:
    """A table; a claim whose runs are missing is left out. What EEPO costs is bench/bench_iteration.py's to say: these
    runs were not timed side by side."""
    rows: list[tuple[str, tuple[str, str] | None]] = [
        ("EEPO solves more than GRPO (greedy, average, points)", more(final, "eepo", "grpo", average_greedy)),
        ("and more at pass@16 (average of the sets, points)", more(final, "eepo", "grpo", average_pass)),
        ("EEPO keeps more entropy than GRPO (at the end, mnat)", more(final, "eepo", "grpo", entropy)),
    ]  # fmt: skip
    for name in BASELINES:
        rows.append((f"EEPO solves more than {name} (greedy, average)", more(final, "eepo", name, average_greedy)))
    rows += [
        ("The complementary loss is better than NLL (greedy)", more(final, "eepo", "eepo_nll", average_greedy)),
        ("The gate helps (against always forgetting)", more(final, "eepo", "eepo_always", average_greedy)),
        ("One step is enough (against three)", more(final, "eepo", "eepo_multistep", average_greedy)),
        ("The direction matters (entropy against a random step, mnat)", more(final, "eepo", "eepo_random", entropy)),
        ("An entropy bonus keeps entropy up (against GRPO, mnat)", more(final, "entropy_bonus", "grpo", entropy)),
    ]  # fmt: skip
    lines = ["| the paper says | found here | showed |", "| --- | --- | --- |"]
    return lines + [f"| {claim} | {found[0]} | {found[1]} |" for claim, found in rows if found]
