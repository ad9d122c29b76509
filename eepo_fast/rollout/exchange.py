"""Shares sampling out over the ranks' engines: each prompt is sampled on one of them; every rank gets all rollouts."""

import math
from collections.abc import Callable, Sequence

import numpy as np

from eepo_fast.distributed import World, deal
from eepo_fast.rollout.engine import CanGenerate, OnProgress, RolloutEngine, SampleRequest, Sampling
from eepo_fast.types import Interrupted, Rollout, Segment, WeightsVersion


def generate_everywhere(
    engine: CanGenerate,
    requests: Sequence[SampleRequest],
    sampling: Sampling,
    *,
    expected_tokens: Sequence[float],
    world: World,
    ranks_per_engine: int,
    decode: Callable[[Rollout], str],
    progress: OnProgress | None = None,
    finished: Callable[[Rollout], None] | None = None,
    quorum: float = 1.0,
) -> list[Rollout]:
    """Returns all samples, in the order of the requests, on every rank; what was sampled here by this rank's own engine
    is what it has handed to `finished`. expected_tokens: of each request's prompt and answers, by which requests are
    dealt out; ranks of one engine take the same. decode: gives each completion where it was sampled. progress: may
    raise Interrupted, on some ranks or all; then all do, at the end of the call. quorum: each engine waits for its own;
    where some do not count, they wait together for as many."""
    hands = deal(expected_tokens, world.size // ranks_per_engine)
    engine_number = world.rank // ranks_per_engine
    share = sorted(hands[engine_number])
    if not all(r.counts for r in requests):
        counted = [sum(len(requests[i].seeds) for i in hand if requests[i].counts) for hand in hands]
        quorum = shared_out(quorum, counted)[engine_number] / max(1, counted[engine_number])
    try:
        rollouts = engine.generate([requests[i] for i in share], sampling, progress, finished, quorum)
    except Interrupted:
        if world.size > 1:
            world.gather(None)  # the others wait for what was sampled here
        raise
    for rollout in rollouts:
        if not rollout.preempted:
            rollout.completion = rollout.completion or decode(rollout)  # it may have been graded already
    if world.size == 1:
        return rollouts
    places = [(i, k) for i in share for k in range(len(requests[i].seeds))]
    leads = world.rank % ranks_per_engine == 0
    mine = [(place, _pack(r)) for place, r in zip(places, rollouts, strict=True)] if leads else []
    parts = world.gather(mine)
    if any(part is None for part in parts):
        raise Interrupted
    everything = {place: packed for part in parts for place, packed in part}
    own = dict(zip(places, rollouts, strict=True)) if ranks_per_engine == 1 else {}
    found = []
    for i, request in enumerate(requests):
        for k in range(len(request.seeds)):
            rollout = _unpack(everything[i, k], request, k)
            if mine_too := own.get((i, k)):
                mine_too.segments = rollout.segments  # its log-probs as all ranks have them
                rollout = mine_too
            found.append(rollout)
    return found


def shared_out(quorum: float, counted: Sequence[int]) -> list[int]:
    """Returns how many of those that count each engine waits for, so that together they are the quorum, and no more:
    else one that is missing would be waited for on every engine. counted: by engine."""
    exact = [quorum * count for count in counted]
    found = [int(part + 1e-9) for part in exact]
    left = math.ceil(sum(exact) - 1e-9) - sum(found)
    for i in sorted(range(len(exact)), key=lambda i: found[i] - exact[i])[:left]:
        found[i] += 1
    return found


def mean_lengths(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Returns the mean number of tokens of each prompt's completions."""
    lengths: dict[str, list[int]] = {}
    for r in rollouts:
        lengths.setdefault(r.prompt.id, []).append(r.num_tokens)
    return {prompt: sum(values) / len(values) for prompt, values in lengths.items()}


def score_everywhere(
    engine: RolloutEngine, rollouts: Sequence[Rollout], temperature: float, *, world: World, ranks_per_engine: int
) -> list[list[float]] | None:
    """Returns `engine.score` of all rollouts on every rank; they are shared out over the ranks' engines."""
    costs = [len(r.prompt.token_ids) + r.num_tokens for r in rollouts]
    share = deal(costs, world.size // ranks_per_engine)[world.rank // ranks_per_engine]
    scored = engine.score([rollouts[i] for i in share], temperature)
    if scored is None:  # on every rank alike
        return None
    found = dict(zip(share, scored, strict=True))
    everything = {place: values for part in world.gather(found) for place, values in part.items()}
    return [everything[i] for i in range(len(rollouts))]


def _pack(r: Rollout) -> tuple:
    """Returns what other ranks cannot know; log-probs are fp32 numbers."""
    sampled = r.segments[-1]
    logprobs = np.asarray(sampled.rollout_logprobs, np.float32)
    state = (tuple(sampled.weights_version), r.finished, r.preempted)
    return np.asarray(sampled.tokens, np.int32), logprobs, state, r.completion


def _unpack(packed: tuple, request: SampleRequest, k: int) -> Rollout:
    token_ids, logprobs, (version, finished, preempted), completion = packed
    segment = Segment(token_ids.tolist(), logprobs.tolist(), WeightsVersion(*version))
    rollout = request.rollout(k, segment, finished=finished, preempted=preempted)
    rollout.completion = completion
    return rollout
