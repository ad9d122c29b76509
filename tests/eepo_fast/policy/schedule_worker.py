"""One of two gloo ranks that train by a schedule with DeepSpeed; run by test_schedule.py under torchrun."""

import copy

import torch
from test_schedule import expected_rates
from zero_worker import flat, make_model, make_rollouts, say_found

from eepo_fast.config import make_config
from eepo_fast.distributed import start_world
from eepo_fast.policy.plain import TorchPolicy
from eepo_fast.policy.schedule import plan_schedule, rate_of
from eepo_fast.policy.zero import ZeroPolicy

UPDATES, WARMUP, FLOOR = 5, 1, 1e-4


def updated(policy, rollouts, count):
    """Updates of a fixed loss; their learning rates."""
    rates, counted = [], sum(r.num_tokens for r in rollouts)
    for _ in range(count):
        for micro in policy.micro_batches(rollouts):
            policy.backward(micro, lambda stats, rows: -stats.logprobs / counted)
        rates.append(rate_of(policy.scheduler))
        assert policy.step()[1]
    return rates


def whole(policy):
    """All that a checkpoint has of a policy."""
    masters, moments = ({n: v.detach().clone() for n, v in part} for part in (policy.masters(), policy.moments()))
    return masters, moments, policy.scheduler.last_epoch


def weights(policy):
    return flat(value for _, value in policy.masters())


def main(world):
    report, rollouts = {}, make_rollouts(6, 1, 5)
    for stage, schedule in enumerate(("linear", "cosine", "linear", "cosine")):
        config = make_config({
            "model": {"path": "unused"}, "data": {"train": "arithmetic"},
            "optimizer": {
                "learning_rate": 1e-3, "warmup_steps": WARMUP, "schedule": schedule, "min_learning_rate": FLOOR,
            },
            "train": {"engine": "deepspeed", "zero_stage": stage, "micro_batch_tokens": 64},
        })  # fmt: skip
        common = {"compute_dtype": torch.float32, "temperature": 1.0, "pad_id": 0, "optimizer": config.optimizer}
        start = make_model("tied")

        def zero(model, config=config, common=common):
            return ZeroPolicy(model, world=world, train=config.train, engine_dtype=torch.float32, **common)

        def plain(model, common=common):
            return TorchPolicy(model, micro_batch_tokens=64, **common)

        policy, alone, unplanned = zero(copy.deepcopy(start)), plain(copy.deepcopy(start)), plain(start)
        before = weights(alone)
        for planned in (policy, alone):
            plan_schedule(planned.scheduler, config.optimizer, UPDATES)
        rates = updated(policy, rollouts, 2)
        saved = whole(policy)
        rates += updated(policy, rollouts, UPDATES - 2)
        updated(alone, rollouts, UPDATES), updated(unplanned, rollouts, UPDATES)
        resumed = zero(make_model("tied"))
        resumed.load_state(*saved)
        plan_schedule(resumed.scheduler, config.optimizer, UPDATES)
        length = (weights(alone) - before).norm()
        report[f"stage {stage} {schedule}"] = {
            "rates": rates,
            "formula": expected_rates(schedule, WARMUP, FLOOR, UPDATES),
            "resumed": updated(resumed, rollouts, UPDATES - 2),
            "same bits": torch.equal(weights(resumed), weights(policy)),
            "distance": float((weights(policy) - weights(alone)).norm() / length),
            "control": float((weights(policy) - weights(unplanned)).norm() / length),
        }
    say_found(world, report)


if __name__ == "__main__":
    with start_world() as world:
        main(world)
