"""What a completion is worth beside its group's others, by `grpo.advantage`: over all G completions of a prompt, both
stages together. One number a completion, the same for each of its tokens.

Each function takes the group's rewards, None where one is missing, and its completions in the same order. A missing
reward is left out of every statistic and gets 0. `n` is the number of known rewards; `right` is a reward above 0.

Deviations from the papers are in the functions' own docstrings.
"""

import math
import statistics
from collections.abc import Callable, Sequence

from eepo_fast.config import Config, GrpoConfig
from eepo_fast.own import find_guarded, is_own
from eepo_fast.types import Rollout, RolloutBatch, UserError

EPSILON = 1e-6
Rewards = Sequence[float | None]
Advantage = Callable[[Rewards, Sequence[Rollout], GrpoConfig], list[float]]


def group_advantages(rewards: Rewards) -> list[float]:
    """Returns (r - mean) / (unbiased standard deviation + 1e-6) (GRPO, Eq. 2's Â). A group in which all rewards are
    equal, or fewer than two are known, gets 0."""
    known = [r for r in rewards if r is not None]
    if len(known) < 2 or len(set(known)) == 1:
        return [0.0] * len(rewards)
    mean, std = statistics.fmean(known), statistics.stdev(known)
    return [0.0 if r is None else (r - mean) / (std + EPSILON) for r in rewards]


def group(rewards: Rewards, rollouts: Sequence[Rollout], config: GrpoConfig) -> list[float]:
    """Returns GRPO's (Eq. 2)."""
    return group_advantages(rewards)


def dr_grpo(rewards: Rewards, rollouts: Sequence[Rollout], config: GrpoConfig) -> list[float]:
    """Returns r - mean (Dr. GRPO, arXiv 2503.20783): a group that is nearly all right, or all wrong, weighs no more
    than others. `grpo.aggregation: constant` is the other half of that method."""
    known = [r for r in rewards if r is not None]
    if len(set(known)) < 2:
        return [0.0] * len(rewards)
    mean = statistics.fmean(known)
    return [0.0 if r is None else r - mean for r in rewards]


def rloo(rewards: Rewards, rollouts: Sequence[Rollout], config: GrpoConfig) -> list[float]:
    """Returns r minus the mean of the others (REINFORCE leave-one-out, arXiv 2402.14740), which is Dr. GRPO's times
    n / (n - 1)."""
    n = sum(r is not None for r in rewards)
    return [a * n / (n - 1) if n > 1 else 0.0 for a in dr_grpo(rewards, rollouts, config)]


def pass_at_k(rewards: Rewards, rollouts: Sequence[Rollout], config: GrpoConfig) -> list[float]:
    """Returns the mean advantage over all groups of k = `grpo.pass_k` that a completion may be in.

    Such a group's reward is 1 where any of it is right (Pass@k training, arXiv 2508.10751, the analytic form):

        R = 1 - C(n_wrong, k) / C(n, k),  σ = sqrt(R (1 - R)),  right: (1 - R) / σ,
        wrong: (1 - R - C(n_wrong - 1, k - 1) / C(n - 1, k - 1)) / σ

    and 0 for all where σ is 0: nothing is right, or too much for k to fail. Deviation: no 1e-6 in the division."""
    k, n = config.pass_k, sum(r is not None for r in rewards)
    wrong = sum(r is not None and r <= 0 for r in rewards)
    if n < k or wrong < k or wrong == n:
        return [0.0] * len(rewards)
    mean = 1 - math.comb(wrong, k) / math.comb(n, k)
    std = math.sqrt(mean * (1 - mean))
    of_wrong = (1 - mean - math.comb(wrong - 1, k - 1) / math.comb(n - 1, k - 1)) / std
    return [0.0 if r is None else (1 - mean) / std if r > 0 else of_wrong for r in rewards]


def nsr(rewards: Rewards, rollouts: Sequence[Rollout], config: GrpoConfig) -> list[float]:
    """Returns `grpo.positive_weight` (λ) for a right answer and -1 for a wrong one, whatever the others are
    (W-REINFORCE, arXiv 2506.01347: λ = 0.1; negative-sample reinforcement alone: 0). A group in which all are wrong, or
    all are right, has a gradient, too."""
    return [0.0 if r is None else config.positive_weight if r > 0 else -1.0 for r in rewards]


def unlikeliness(rewards: Rewards, rollouts: Sequence[Rollout], config: GrpoConfig) -> list[float]:
    """Returns GRPO's of r · (1 - β · rank / n), β = `grpo.rank_penalty`, the rank from 0 for the least likely of the
    group to n - 1 for the likeliest (Rewarding the Unlikely, arXiv 2506.02355, as its authors' code counts): of right
    answers the unlikely ones get more; a wrong one keeps its reward. Equal rewards get 0, as that paper
    drops such groups: else groups in which all is right would be about likelihood alone.

    Likelihood is the mean log-prob of a completion's tokens under what sampled them. Deviation: in stage 2 of EEPO
    that is the forgetful θ'."""
    known = [i for i, r in enumerate(rewards) if r is not None]
    if len({rewards[i] for i in known}) < 2:
        return [0.0] * len(rewards)
    likelihood = {i: statistics.fmean(rollouts[i].rollout_logprobs or [0.0]) for i in known}
    rank = {i: place for place, i in enumerate(sorted(known, key=lambda i: likelihood[i]))}
    lower = [r * (1 - config.rank_penalty * rank[i] / len(known)) if r and r > 0 else r for i, r in enumerate(rewards)]
    return group_advantages(lower)


ADVANTAGES: dict[str, Advantage] = {f.__name__: f for f in (group, dr_grpo, rloo, pass_at_k, nsr, unlikeliness)}


def overlong_penalty(num_tokens: int, config: Config) -> float:
    """Returns what is taken from the reward of a completion of so many tokens: nothing before the last
    `reward.overlong_share` of `rollout.max_new_tokens`, and from there on in a straight line `reward.overlong_penalty`
    at the limit (DAPO, arXiv 2503.14476, Eq. 13, with a share of 0.2 and a penalty of 1)."""
    buffer = config.reward.overlong_share * config.rollout.max_new_tokens
    beyond = num_tokens - (config.rollout.max_new_tokens - buffer)
    return config.reward.overlong_penalty * min(1.0, beyond / buffer) if buffer and beyond > 0 else 0.0


def shaped(rollout: Rollout, config: Config) -> float | None:
    """Returns the reward that advantages are made of; `Rollout.reward` stays what the answer got."""
    return None if rollout.reward is None else rollout.reward - overlong_penalty(rollout.num_tokens, config)


def find_advantage(name: str) -> Advantage:
    """Returns the advantage of that name; of a function of the user's own one that raises a UserError where it gives no
    finite number for each completion."""
    if not is_own(name):
        return ADVANTAGES[name]
    function = find_guarded("grpo.advantage", name)

    def advantages(rewards: Rewards, rollouts: Sequence[Rollout], config: GrpoConfig) -> list[float]:
        found = function(rewards, rollouts, config)
        try:
            values = [0.0 if r is None else float(a) for a, r in zip(found, rewards, strict=True)]
        except (TypeError, ValueError):
            values = []
        if not values or not all(map(math.isfinite, values)):
            raise UserError(
                f"grpo.advantage: expected {len(rewards)} finite numbers of {name}, found {found!r}", shared=True
            )
        return values

    return advantages


def set_advantages(batch: RolloutBatch, config: Config) -> None:
    """Sets each completion's advantage by `grpo.advantage`."""
    of = find_advantage(config.grpo.advantage)
    for rollouts in batch.groups():
        advantages = of([shaped(r, config) for r in rollouts], rollouts, config.grpo)
        for rollout, advantage in zip(rollouts, advantages, strict=True):
            rollout.advantage = advantage
