"""Group-relative advantages (Eq. 2's Â): over all G completions of a prompt, both stages together."""

import statistics

from eepo_fast.types import RolloutBatch

EPSILON = 1e-6


def group_advantages(rewards: list[float | None]) -> list[float]:
    """Returns (r - mean) / (unbiased standard deviation + 1e-6). A missing reward (None) is left out of both and gets
    0, as does a group in which all rewards are equal or fewer than two are known."""
    known = [r for r in rewards if r is not None]
    if len(known) < 2 or len(set(known)) == 1:
        return [0.0] * len(rewards)
    mean, std = statistics.fmean(known), statistics.stdev(known)
    return [0.0 if r is None else (r - mean) / (std + EPSILON) for r in rewards]


def set_advantages(batch: RolloutBatch) -> None:
    for group in batch.groups():
        for rollout, advantage in zip(group, group_advantages([r.reward for r in group]), strict=True):
            rollout.advantage = advantage
