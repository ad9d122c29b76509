"""Numbers of every token, for the rollout log (`log.token_details`): a few passes more."""

from __future__ import annotations

from collections.abc import Sequence

from eepo_fast.algorithm.forget import Unlearning
from eepo_fast.distributed import World
from eepo_fast.policy.module import Columns
from eepo_fast.rollout.engine import RolloutEngine
from eepo_fast.rollout.exchange import score_everywhere
from eepo_fast.types import Rollout


def engine_logprobs(
    engine: RolloutEngine, rollouts: Sequence[Rollout], temperature: float, *, world: World, ranks_per_engine: int
) -> dict[int, list[float]]:
    """What the engine itself makes of these tokens now, by id() of the rollout; nothing where it cannot say."""
    scored = score_everywhere(engine, rollouts, temperature, world=world, ranks_per_engine=ranks_per_engine)
    return {} if scored is None else dict(zip(map(id, rollouts), scored, strict=True))


def change(before: dict[int, list[float]], after: dict[int, list[float]]) -> dict[int, list[float]]:
    return {key: [b - a for a, b in zip(before[key], after[key], strict=True)] for key in before}


def unseen(rollouts: Sequence[Rollout], unlearning: Unlearning | None) -> list[Rollout]:
    """Those that the unlearning pass has not scored."""
    return [r for r in rollouts if unlearning is None or id(r) not in unlearning.logprobs]


def add_details(rollouts: Sequence[Rollout], unlearning: Unlearning | None, scored: Columns) -> None:
    """At θ; scored: log-probs and entropy of those that are `unseen`."""
    logprobs, entropy = scored
    for r in rollouts:
        if unlearning is None or id(r) not in unlearning.logprobs:
            r.details = {"policy_logprobs": logprobs[id(r)], "entropy": entropy[id(r)]}
            continue
        r.details = {
            "policy_logprobs": unlearning.logprobs[id(r)],
            "entropy": unlearning.entropy[id(r)],
            "gate": unlearning.gate[id(r)],
        }
        if unlearning.change:
            r.details["forget_change"] = unlearning.change[id(r)]
