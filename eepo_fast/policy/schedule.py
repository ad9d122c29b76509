"""Schedules the learning rate over a run: the warm-up, and how it falls from there to the last update.

Both are functions of the number of updates that were applied, so that a checkpoint needs that number alone. A linear or
cosine schedule is planned (`plan_schedule`) once it is known how many updates the whole run has; before that, and in
what has no end, such as a profile, the rate stays where the warm-up leads.
"""

import math
from functools import partial

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from eepo_fast.config import OptimizerConfig


def rate_factor(config: OptimizerConfig, num_updates: int | None, step: int) -> float:
    """Returns what the learning rate is multiplied by after `step` updates of `num_updates`. As with transformers' own
    schedules the floor is reached after the last update: none is spent on a rate of 0."""
    if step < config.warmup_steps or config.schedule == "constant" or num_updates is None:
        return min(1.0, (step + 1) / (config.warmup_steps + 1))
    done = min(1.0, (step - config.warmup_steps) / max(1, num_updates - config.warmup_steps))
    left = 1 - done if config.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    floor = config.min_learning_rate / config.learning_rate if config.learning_rate else 0.0
    return floor + (1 - floor) * left


def make_schedule(optimizer: Optimizer, config: OptimizerConfig) -> LambdaLR:
    """Returns the schedule of a run whose end is not known."""
    return LambdaLR(optimizer, partial(rate_factor, config, None))


def plan_schedule(scheduler: LambdaLR, config: OptimizerConfig, num_updates: int) -> None:
    """Makes the schedule that of a run of `num_updates`, and goes on in it after as many as were applied."""
    scheduler.lr_lambdas = [partial(rate_factor, config, num_updates)] * len(scheduler.lr_lambdas)
    set_schedule(scheduler, scheduler.last_epoch)


def set_schedule(scheduler: LambdaLR, num_steps: int) -> None:
    """Goes to where the schedule is after `num_steps` updates."""
    scheduler.last_epoch = num_steps
    groups = scheduler.optimizer.param_groups
    for group, base, factor in zip(groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
        group["lr"] = base * factor(num_steps)


def rate_of(scheduler: LambdaLR) -> float:
    """Returns the learning rate of the next update."""
    return float(scheduler.optimizer.param_groups[0]["lr"])
