"""Groups in flight: which are begun in an iteration, which are trained on, and what becomes of the others.

With `rollout.carry` an iteration waits for no particular answer: what has not ended goes on in the next one, and a
group is trained on when all of it has ended. Every iteration trains on exactly `train.prompts_per_iteration` groups,
the oldest first; so that there are as many, `rollout.in_flight` as many more are begun ahead, and no more than those
are ever held. Without carry every group is begun and trained on in the same iteration, and nothing here is left over.

Deviation from the paper, which waits for all: a group's completions may be of several iterations' weights.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

from eepo_fast.config import Config
from eepo_fast.data.problems import cursor_after, next_prompts
from eepo_fast.types import Cursor, Group, Prompt, Rollout, TrainerState


def num_ahead(config: Config) -> int:
    """Returns how many groups are begun ahead of those that an iteration trains on."""
    rollout, size = config.rollout, config.train.prompts_per_iteration
    return math.ceil(rollout.in_flight * size - 1e-9) if rollout.carry else 0


def open_groups(
    config: Config, state: TrainerState, prompts: Sequence[Prompt], total: int | None
) -> tuple[list[Group], Cursor]:
    """Returns the groups that an iteration works on, oldest first: copies of those in flight, and new ones; and where
    in the prompts that ends. total: iterations of the whole run, whose last ones begin no group that would not be
    trained on."""
    size = config.train.prompts_per_iteration
    wanted = size + num_ahead(config)
    if total is not None:
        wanted = min(wanted, (total - state.step) * size)
    count = max(0, wanted - len(state.groups)) + state.missing
    if total is not None and config.rollout.carry:  # what the last ones do not train on would be lost
        count = min(count, max(0, (total - state.step) * size - len(state.groups)))
    count = min(count, len(prompts))
    cursor = state.cursor or cursor_after(state.step, len(prompts), size)
    whole_batches = not (config.rollout.carry or state.groups or config.grpo.dynamic_sampling)
    chosen, cursor = next_prompts(cursor, count, len(prompts), config.run.seed, whole_batches=whole_batches)
    return [*map(_copy, state.groups), *(Group(prompts[i], state.step) for i in chosen)], cursor


def _copy(group: Group) -> Group:
    """Returns it as an iteration goes on with it: what is known of a completion under weights that are gone is not.
    The original stays as it is, for an iteration that is interrupted is done again."""
    return replace(
        group,
        rollouts=[
            replace(r, advantage=0.0, prox_logprobs=None, old_logprobs=None, entropy=None, high_covariance=None)
            for r in group.rollouts
        ],
    )


def choose(config: Config, groups: Sequence[Group]) -> tuple[list[Group], list[Group]]:
    """Returns (those that an iteration is done with, those of them that it trains on), oldest first. Their advantages
    are known.

    With `grpo.dynamic_sampling` a group whose known rewards are all equal, before anything is taken for length, is left
    out, and counts as trained on for its epoch (DAPO, arXiv 2503.14476, Eq. 11). Deviation: it is not sampled for again
    at once, which would wait for the longest answer once more; as many groups as are missing are begun in the next
    iteration, beside its own (`num_missing`)."""
    size, whole = config.train.prompts_per_iteration, [group for group in groups if group.is_whole]
    if not config.grpo.dynamic_sampling:
        return whole[:size], whole[:size]
    useful = [group for group in whole if len({r.reward for r in group.rollouts if r.reward is not None}) > 1]
    trained = useful[:size] if config.rollout.carry else useful
    return [group for group in whole if group not in useful or group in trained], trained


def num_missing(config: Config, state: TrainerState, num_trained: int) -> int:
    """Returns how many groups are to be made up for after an iteration that has trained on so many: at most as many as
    an iteration has. With carry those that are held make up for earlier ones."""
    size = config.train.prompts_per_iteration
    owed = 0 if config.rollout.carry else state.missing
    return min(size, max(0, owed + size - num_trained)) if config.grpo.dynamic_sampling else 0


def put_back(groups: Sequence[Group], sampled: Iterable[Rollout]) -> None:
    """Puts completions, as far as they have come now, in their places in the groups."""
    places = {key_of(group): {r.sample_index: r for r in group.rollouts} for group in groups}
    for r in sampled:
        places[key_of(r)][r.sample_index] = r
    for group in groups:
        known = places[key_of(group)]
        group.rollouts = [known[place] for place in sorted(known)]


def key_of(of: Group | Rollout) -> tuple[int, str]:
    """Returns what a group is known by, of itself or of one of its completions."""
    return of.begun, of.prompt.id


def nearest(groups: Sequence[Group], size: int, sampled: Sequence[Rollout]) -> tuple[set[Rollout], float]:
    """Returns completions of groups that lack the fewest, enough for `size` groups to be whole; and the share of them
    that has to end for that at least, so that none in particular is waited for. None where there are as many already.
    sampled: what a stage has made of the completions that it went on with."""
    unended: dict[tuple[int, str], list[Rollout]] = {}
    for r in sampled:
        if r.preempted:
            unended.setdefault(key_of(r), []).append(r)
    if (missing := size - (len(groups) - len(unended))) <= 0:
        return set(), 0.0
    fewest = sorted(map(len, unended.values()))[missing - 1]
    found = {r for rs in unended.values() if len(rs) <= fewest for r in rs}
    return found, missing / len(found)
