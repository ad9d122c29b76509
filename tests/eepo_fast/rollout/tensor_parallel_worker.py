"""One of two ranks that hold a vLLM engine together; run by test_tensor_parallel.py under torchrun."""

import json
import sys
from dataclasses import replace

import eepo_kernels as kernels
import torch
import torch.distributed as dist
from test_vllm_engine import (
    MODELS,
    REQUESTS,
    SAMPLING,
    V,
    forget,
    gap,
    gradient_of,
    make_model,
    moved,
    requests_for,
    sync,
    weights_of,
)

from eepo_fast.distributed import start_world
from eepo_fast.rollout import updates
from eepo_fast.rollout.engine import Sampling
from eepo_fast.rollout.updates import InPlace, Reload
from eepo_fast.rollout.vllm import VllmEngine
from eepo_fast.rollout.weights import PlanError
from eepo_fast.types import EngineError


def refusal(engine):
    try:
        engine.generate(REQUESTS, SAMPLING)
    except EngineError as error:
        return str(error)


def same_bits(plan, weights, gradient):
    """Do shards in bf16 draw the random bits that the whole model draws?"""
    whole = {name: w.bfloat16() for name, w in weights.items()}
    shards = [copy.slice_of(whole[copy.name]).clone() for copy in plan.copies]
    options = dict(eta=1e-3, rounding="stochastic", seed=3, step=4)
    kernels.forget(
        shards, plan.sources(gradient), keys=plan.keys, offsets=plan.offsets, row_strides=plan.row_strides, **options
    )
    keys, zeros = [kernels.tensor_key(name) for name in whole], [0] * len(whole)
    kernels.forget(list(whole.values()), [gradient[n] for n in whole], keys=keys, offsets=zeros, **options)
    return all(torch.equal(shard, c.slice_of(whole[c.name])) for shard, c in zip(shards, plan.copies, strict=True))


def stopped(engine):
    """What is stopped where half of one prompt's answers have ended, and a third's all; the ranks decide alike."""
    sampling = Sampling(0.7, 60, tuple(range(7, V, 16)))
    first, second, third = requests_for([3, 4, 5, 9], [8, 2], [11, 12, 13], samples=4)
    requests = [first, replace(second, counts=False), replace(third, counts=False, must_end=True)]
    rollouts = engine.generate(requests, sampling, None, None, 0.5)
    assert sum(not r.preempted for r in rollouts[:4]) >= 2 and not any(r.preempted for r in rollouts[8:])
    return rollouts


def main(family):
    rank = dist.get_rank()
    assert family in MODELS
    model = make_model(family)
    engine = VllmEngine(model, dtype=torch.float32, max_sequences=16, max_model_len=256, tensor_parallel=2)
    in_place = engine._updater
    assert isinstance(in_place, InPlace)
    found = {"views": [list(view.shape) for view in in_place.plan.views]}

    sync(engine, weights_of(model), 0)
    first = engine.generate(REQUESTS, SAMPLING)
    held = [view.clone() for view in in_place.plan.views]
    gradient = gradient_of(model)
    stats = forget(engine, gradient)
    second = engine.generate(REQUESTS, SAMPLING)
    intended = 0.5 * sum(float((g.double() ** 2).sum()) for g in gradient.values()) ** 0.5
    found["forget"] = [stats.retention, stats.intended_norm / intended]
    found["gaps"] = [gap(model, first), gap(moved(model, gradient, 0.5), second), gap(model, second)]
    found["same_bits"] = same_bits(in_place.plan, weights_of(model), gradient)
    sync(engine, weights_of(model), 1)
    found["restored"] = all(torch.equal(a, b) for a, b in zip(in_place.plan.views, held, strict=True))
    third = engine.generate(REQUESTS, SAMPLING)
    found["same"] = [(r.token_ids, r.rollout_logprobs) for r in first] == [
        (r.token_ids, r.rollout_logprobs) for r in third
    ]
    found["tokens"] = [r.token_ids for r in first]
    found["cut"] = [[r.token_ids, r.preempted] for r in stopped(engine)]

    if rank == 1:  # one tensor left out on one rank: both refuse
        real = updates.sync
        updates.sync = lambda dst, src: real(dst[:-1], src[:-1])
        sync(engine, {name: w + 1 for name, w in weights_of(model).items()}, 2)
        updates.sync = real
    else:
        sync(engine, {name: w + 1 for name, w in weights_of(model).items()}, 2)
    found["refusal"] = refusal(engine)
    sync(engine, weights_of(model), 3)
    found["after"] = refusal(engine)

    def fallback(*args):
        raise PlanError("one rank says no")

    real_plan = updates.record_plan
    updates.record_plan = fallback
    engine._updater = engine._choose_updater()
    updates.record_plan = real_plan
    assert isinstance(engine._updater, Reload)
    sync(engine, weights_of(model), 4)
    forget(engine, gradient)
    found["by_reload"] = gap(moved(model, gradient, 0.5), engine.generate(REQUESTS, SAMPLING))

    everything = [None, None]
    dist.all_gather_object(everything, found)
    if rank == 0:
        print("FOUND " + json.dumps(everything), flush=True)
    engine.close()


if __name__ == "__main__":
    with start_world():
        main(sys.argv[1])
