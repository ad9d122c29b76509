"""Counts what a config asks for: its iterations, and the batch plan that `--dry-run` prints without opening a hub."""

import math
from bisect import bisect_left
from collections.abc import Iterator
from pathlib import Path

from eepo_fast.algorithm.in_flight import num_ahead
from eepo_fast.algorithm.methods import check_methods
from eepo_fast.config import Config
from eepo_fast.data.problems import cursor_after, load_problems
from eepo_fast.data.tasks import BASES, TASKS
from eepo_fast.policy.loading import find_model
from eepo_fast.types import TrainerState, UserError


def num_iterations(config: Config, num_prompts: int, state: TrainerState | None = None) -> int:
    """Returns the iterations of the whole run: whole batches an epoch (of all epochs, with rollout.carry), times
    epochs, capped by train.iterations; and as many as train on what is in flight. state: what a run goes on from."""
    size = config.train.prompts_per_iteration
    if size > num_prompts:
        raise UserError(
            f"train.prompts_per_iteration: expected at most the {num_prompts} prompts of {config.data.train}, found "
            f"{size}; lower it"
        )
    if (begun := size + num_ahead(config)) > num_prompts:
        raise UserError(
            f"rollout.in_flight: expected at most {begun} prompts begun at once to be among the {num_prompts} of "
            f"{config.data.train}, found {config.rollout.in_flight:g} of {size} ahead; lower it, or "
            "train.prompts_per_iteration"
        )
    state = state or TrainerState()
    total = state.step + _iterations_left(config, num_prompts, state)
    return max(min(total, config.train.iterations or total), state.step + math.ceil(len(state.groups) / size))


def about_iterations(config: Config, num_prompts: int, total: int) -> Iterator[str]:
    """Yields what a user should know where the epochs end before train.iterations. total: iterations of the run."""
    asked, epochs = config.train.iterations, config.train.epochs
    if asked is None or total >= asked:
        return

    def allowed(epochs: int) -> int:
        train = config.train.model_copy(update={"epochs": epochs})
        return num_iterations(config.model_copy(update={"train": train}), num_prompts)

    choices = range(epochs + 1, asked + 1)  # an epoch has an iteration, at least
    needed = choices[bisect_left(choices, asked, key=allowed)]
    yield (
        f"train.iterations={asked}: {num_prompts} prompts of {config.data.train} allow {total} iterations in "
        f"train.epochs={epochs}, and the run ends after them; set train.epochs={needed} for all {asked}"
    )


def num_updates(config: Config, total: int) -> int:
    """Returns the policy's updates in `total` iterations."""
    return total * (config.train.prompts_per_iteration // config.train.prompts_per_update)


def about_schedule(config: Config, total: int, planned: int | None) -> Iterator[str]:
    """Yields what a user should know of a learning rate that falls. total: iterations of the run; planned: what they
    were before it was resumed."""
    optimizer, updates = config.optimizer, num_updates(config, total)
    if optimizer.schedule == "constant":
        return
    if planned not in (None, total):
        yield (
            f"optimizer.schedule={optimizer.schedule}: the run ends after iteration {total} and no longer after "
            f"{planned}; from here on the learning rate is that of a run of {total}"
        )
    if optimizer.warmup_steps >= updates:
        yield (
            f"optimizer.schedule={optimizer.schedule}: the run's {updates} updates are all among "
            f"optimizer.warmup_steps={optimizer.warmup_steps}, and the learning rate never falls; lower it"
        )


def _iterations_left(config: Config, num_prompts: int, state: TrainerState) -> int:
    size, held = config.train.prompts_per_iteration, len(state.groups)
    if config.grpo.dynamic_sampling:  # as many as all groups would take: what is begun for those left out is on top
        epochs = config.train.epochs
        return (epochs * num_prompts // size if config.rollout.carry else epochs * (num_prompts // size)) - state.step
    cursor = state.cursor or cursor_after(state.step, num_prompts, size)
    left = (config.train.epochs - cursor.epoch) * num_prompts - cursor.position + len(cursor.postponed)
    if config.rollout.carry:
        return max(0, held + left) // size
    first = math.ceil(held / size)  # what they train on is filled up, across an epoch's end, too
    epochs, rest = divmod(max(0, left - (first * size - held)), num_prompts)
    return first + epochs * (num_prompts // size) + rest // size


def check_world(config: Config, size: int, neighbours: int) -> None:
    """Raises a UserError where the config asks for other numbers of processes. neighbours: of them on one node."""
    tensor_parallel = config.rollout.tensor_parallel
    if config.train.engine == "torch" and size > 1:
        raise UserError(
            f"train.engine: expected deepspeed with {size} processes, found torch, which is for one device; set "
            "train.engine=deepspeed"
        )
    if neighbours % tensor_parallel:
        raise UserError(
            f"rollout.tensor_parallel: expected a divisor of the {neighbours} processes of a node, found "
            f"{tensor_parallel}"
        )
    num_engines = size // tensor_parallel
    if config.train.prompts_per_iteration % num_engines:
        raise UserError(
            f"train.prompts_per_iteration: expected a multiple of the {num_engines} engines of {size} processes, found "
            f"{config.train.prompts_per_iteration}"
        )


def count_rows(config: Config) -> int:
    """Returns the rows of the training set: counted where they are at hand, else as the config states them."""
    data = config.data
    if data.train in TASKS or Path(data.train).expanduser().exists():
        return len(load_problems(data, config.run.seed, for_function=bool(config.reward.function)))
    if data.num_rows is None:
        raise UserError(f"data.num_rows: --dry-run does not open the hub; state how many rows {data.train} has")
    return data.num_rows


def batch_plan(config: Config) -> dict[str, int | str]:
    """Returns what an iteration consists of. Sizes that depend on sampled lengths are given at full length. UserError
    where a function that the method names is not there."""
    check_methods(config)
    if config.model.path not in BASES:
        find_model(config.model.path)
    rows, train, rollout = count_rows(config), config.train, config.rollout
    group = rollout.group_size
    stages = [group // 2, group // 2] if config.eepo.enabled else [group]
    completions = train.prompts_per_iteration * group
    updates = num_updates(config, 1)
    longest = config.data.max_prompt_tokens + rollout.max_new_tokens - 1
    per_micro_batch = max(1, train.micro_batch_tokens // longest)
    per_update = train.prompts_per_update * group
    extra = config.aepo.num_extra(train.prompts_per_iteration, group)
    aepo = {"AEPO's samples an iteration": extra} if extra else {}
    ahead, size = num_ahead(config), train.prompts_per_iteration
    carry = {"prompts begun ahead, at most": ahead} if ahead else {}
    most = 1
    if config.grpo.dynamic_sampling:
        most, carry = 2, carry | {"prompts begun for groups left out, at most": size}
    return {
        "training problems": rows,
        "iterations an epoch": f"{rows / size:g}" if ahead else rows // size,
        "iterations": num_iterations(config, rows),
        "prompts an iteration": train.prompts_per_iteration,
        **carry,
        "group size": group,
        "stage sizes": " + ".join(map(str, stages)),
        "completions an iteration": completions,
        **aepo,
        "updates an iteration": updates,
        "completions an update": per_update,
        "completions a micro-batch, at full length": per_micro_batch,
        "micro-batches an update, at most": math.ceil(most * per_update / per_micro_batch),
        "sampled tokens an iteration, at most": (most * completions + extra) * rollout.max_new_tokens,
        "tokens an iteration with prompts, at most": (most * completions + extra) * (longest + 1),
    }
