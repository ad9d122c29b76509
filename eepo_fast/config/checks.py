"""Checks what no key's own type can: keys that have to fit each other, in one line each for a user."""

import re
from difflib import get_close_matches
from typing import TYPE_CHECKING

from eepo_fast.own import is_own

if TYPE_CHECKING:
    from eepo_fast.config.schema import Config

COLDEST_OF_VLLM = 0.01  # it samples at this temperature where less is asked for


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def check(config: "Config") -> None:
    """Raises a ValueError for keys that do not fit each other."""
    _require(
        re.fullmatch(r"[\w.+=@-]{1,150}", config.run.name) is not None and config.run.name not in (".", ".."),
        f"run.name: expected a folder name of letters, digits and . _ - + = @, found {config.run.name[:200]!r}",
    )
    _require("\0" not in config.run.root, "run.root: expected a path, found a NUL character in it")
    _require(
        config.rollout.top_p == 1.0,
        f"rollout.top_p: expected 1, found {config.rollout.top_p}: cutting the tail of the distribution biases the "
        "probability ratio; remove the key",
    )
    _require(config.rollout.group_size >= 2, "rollout.group_size: expected at least 2, found 1: a group needs peers")
    coldest = {
        "rollout.temperature": config.rollout.temperature,
        "aepo.temperature_low": config.aepo.temperature_low,
        "eepo.temperature": config.eepo.temperature or config.rollout.temperature,
    }
    for key, value in coldest.items():
        _require(
            config.rollout.engine == "hf" or value >= COLDEST_OF_VLLM,
            f"{key}: expected at least {COLDEST_OF_VLLM} with rollout.engine=vllm, found {value}: "
            f"vLLM samples at {COLDEST_OF_VLLM} where less is asked for",
        )
    _check_engines(config)
    _check_waiting(config)
    _require(
        config.rollout.group_size % 2 == 0 or not config.eepo.enabled,
        f"rollout.group_size: expected an even number, found {config.rollout.group_size}: EEPO samples it in two "
        "halves; add or drop one, or set eepo.enabled=false",
    )
    _check_eepo(config)
    _check_slots(config)
    _check_temperature(config)
    _check_psn(config)
    _check_aepo(config)
    _check_evaluation(config)
    lowest, rate = config.optimizer.min_learning_rate, config.optimizer.learning_rate
    _require(
        lowest <= rate,
        f"optimizer.min_learning_rate: expected at most optimizer.learning_rate ({rate:g}), which falls to it, found "
        f"{lowest:g}",
    )
    whole, part = config.train.prompts_per_iteration, config.train.prompts_per_update
    _require(
        whole % part == 0,
        f"train.prompts_per_update: expected a divisor of train.prompts_per_iteration ({whole}), found {part}",
    )


def _check_eepo(config: "Config") -> None:
    eepo = config.eepo
    _require(
        eepo.prob_floor < 1 - eepo.prob_ceiling_gap,
        "eepo.prob_floor: expected below 1 - eepo.prob_ceiling_gap, found "
        f"{eepo.prob_floor} and {eepo.prob_ceiling_gap}",
    )
    _require(
        eepo.step == "fixed" or eepo.target_kl < eepo.max_kl,
        f"eepo.target_kl: expected below eepo.max_kl ({eepo.max_kl}), above which a step is taken back, found "
        f"{eepo.target_kl}",
    )
    _require(
        eepo.step == "fixed" or eepo.learning_rate > 0,
        "eepo.learning_rate: expected above 0 with eepo.step=kl, found 0: it is what the first step begins with",
    )


ADVANTAGES = ("group", "dr_grpo", "rloo", "pass_at_k", "nsr", "unlikeliness")
LOSSES = ("ppo", "gspo", "cispo", "kl_cov")


def _check_slots(config: "Config") -> None:
    grpo, rollout, train = config.grpo, config.rollout, config.train
    for key, name, known in (("grpo.advantage", grpo.advantage, ADVANTAGES), ("grpo.loss", grpo.loss, LOSSES)):
        near = get_close_matches(name, known, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        _require(
            name in known or is_own(name),
            f"{key}: expected one of {', '.join(known)}, or file.py:function, found {name[:100]!r}{hint}",
        )
    _require(
        not rollout.sampler or is_own(rollout.sampler),
        f"rollout.sampler: expected file.py:function, found {rollout.sampler[:100]!r}",
    )
    by_others = config.eepo.enabled or config.psn.enabled
    _require(
        grpo.loss not in ("gspo", "kl_cov") or grpo.ratio != "sampler" or not by_others,
        f"grpo.ratio: expected decoupled or policy with grpo.loss={grpo.loss} where other weights sample, found "
        "sampler: what they are away from the policy would count as what it has changed; set grpo.ratio=decoupled",
    )
    for key, enabled in (("eepo.enabled", config.eepo.enabled), ("psn.enabled", config.psn.enabled)):
        _require(
            not (rollout.sampler and enabled),
            f"{key}: expected false with rollout.sampler, found true: it samples in their place; set {key}=false",
        )
    reward = config.reward
    _require(
        not reward.overlong_share or grpo.advantage not in ("nsr", "pass_at_k"),
        f"reward.overlong_share: expected 0 with grpo.advantage={grpo.advantage}, found {reward.overlong_share}: that "
        "asks whether an answer is right, and not how much it is worth",
    )
    _require(
        reward.overlong_share > 0 or reward.overlong_penalty == 1,
        f"reward.overlong_penalty: expected reward.overlong_share above 0 with it, found {reward.overlong_share}",
    )
    _require(
        grpo.advantage != "pass_at_k" or grpo.pass_k < rollout.group_size,
        f"grpo.pass_k: expected below rollout.group_size ({rollout.group_size}), found {grpo.pass_k}: every group with "
        "a right answer would be worth the same",
    )
    _require(
        grpo.loss != "kl_cov" or train.prompts_per_update < train.prompts_per_iteration,
        "grpo.loss: expected another than kl_cov with one update an iteration, found kl_cov: what it holds back are "
        "changes since the iteration's start; set train.prompts_per_update below train.prompts_per_iteration",
    )


def _check_psn(config: "Config") -> None:
    psn = config.psn
    if not psn.enabled:
        return
    _require(
        not config.eepo.enabled,
        "psn.enabled: expected false with eepo.enabled, found true: both set the weights that sample; set "
        "eepo.enabled=false",
    )
    _require(
        config.train.engine == "torch",
        "psn.enabled: expected false with train.engine=deepspeed, found true: noise needs whole weights; use "
        "train.engine=torch",
    )
    _require(
        psn.target_kl < psn.max_kl,
        f"psn.target_kl: expected below psn.max_kl ({psn.max_kl}), found {psn.target_kl}",
    )


def _check_temperature(config: "Config") -> None:
    """What the forget step's KL is measured on is sampled at stage 2's temperature, too."""
    _require(
        config.eepo.temperature is None or config.eepo.step == "fixed",
        f"eepo.temperature: expected none with eepo.step=kl, found {config.eepo.temperature}: the KL that the step "
        "follows would be of both together; set eepo.step=fixed",
    )


def _check_waiting(config: "Config") -> None:
    rollout, eepo = config.rollout, config.eepo
    _require(
        rollout.quorum == 1 or not eepo.enabled or eepo.reduction == "batch_mean",
        f"rollout.quorum: expected 1 with eepo.reduction=prompt_sum, found {rollout.quorum}: a prompt's own step would "
        "depend on how many of its completions have ended",
    )
    _require(
        rollout.quorum == 1 or not eepo.enabled or eepo.direction != "temperature",
        f"rollout.quorum: expected 1 with eepo.direction=temperature, found {rollout.quorum}: it is a control, whose "
        "completions are each of one temperature",
    )
    _require(
        rollout.quorum == 1 or rollout.carry > 0 or eepo.enabled,
        f"rollout.quorum: expected 1 with one stage (eepo.enabled=false), found {rollout.quorum}: nothing would go on "
        "with those that have not ended; set rollout.carry=1",
    )
    _require(
        rollout.carry == 0 or rollout.quorum < 1,
        f"rollout.carry: expected 0 with rollout.quorum=1, found {rollout.carry}: every completion is waited for; set "
        "rollout.quorum=0.9",
    )
    _require(
        rollout.carry == 0 or not config.aepo.enabled,
        f"rollout.carry: expected 0 with aepo.enabled, found {rollout.carry}: AEPO's samples are of one iteration",
    )
    _require(
        rollout.carry == 0 or config.grpo.ratio != "policy",
        "grpo.ratio: expected decoupled (or sampler) with rollout.carry, found policy: what other iterations have "
        "sampled would count as the policy's own",
    )


def _check_evaluation(config: "Config") -> None:
    evaluation = config.evaluation
    _require(
        bool(evaluation.data) or not evaluation.every,
        "evaluation.data: expected at least one NAME: FILE with evaluation.every, found none",
    )
    _require(
        evaluation.samples == 0 or max(evaluation.k) <= evaluation.samples,
        f"evaluation.k: expected at most evaluation.num_samples ({evaluation.samples}), found {max(evaluation.k)}",
    )
    _check_best(config)
    for name in evaluation.data:
        _require(
            re.fullmatch(r"[\w-]{1,100}", name) is not None and name != "average",
            f"evaluation.data: expected names of letters, digits, _ and -, and not `average`, found {name[:100]!r}",
        )


def _check_best(config: "Config") -> None:
    evaluation, best = config.evaluation, config.checkpoint.best
    metrics = ["greedy", *(f"pass@{k}" for k in evaluation.k if evaluation.samples)]
    known = [f"eval/{name}/{metric}" for name in evaluation.data for metric in metrics] if evaluation.every else []
    _require(
        not best or best in known,
        f"checkpoint.best: expected {' or '.join(known[:8]) or 'evaluation.data and evaluation.every with it'}, "
        f"found {best[:100]!r}",
    )
    _require(
        not best or config.checkpoint.every > 0,
        "checkpoint.every: expected more than 0 with checkpoint.best, found 0: there would be nothing to choose",
    )


def _check_aepo(config: "Config") -> None:
    aepo, temperature = config.aepo, config.rollout.temperature
    _require(
        temperature == 1 or not aepo.enabled,
        f"rollout.temperature: expected 1 with aepo.enabled, found {temperature}: AEPO sets its own temperatures "
        "beside it; set rollout.temperature=1",
    )
    _require(
        aepo.temperature_low < aepo.temperature_high,
        f"aepo.temperature_low: expected below aepo.temperature_high ({aepo.temperature_high}), found "
        f"{aepo.temperature_low}",
    )


def _check_engines(config: "Config") -> None:
    train, rollout, sharded = config.train, config.rollout, config.train.engine == "deepspeed"
    _require(
        rollout.tensor_parallel == 1 or sharded,
        f"rollout.tensor_parallel: expected 1, found {rollout.tensor_parallel}: more needs train.engine=deepspeed",
    )
    if not sharded:
        return
    _require(
        config.model.dtype != "float16",
        "model.dtype: expected bfloat16 or float32 with train.engine=deepspeed, found float16",
    )
    _require(
        config.model.dtype == "float32" or train.zero_stage == 0 or rollout.dtype == config.model.dtype,
        f"rollout.dtype: expected model.dtype ({config.model.dtype}) with train.engine=deepspeed, found "
        f"{rollout.dtype}: the engine is given the weights that the policy computes with",
    )
    _require(
        not train.offload_parameters or train.zero_stage == 3,
        f"train.offload_parameters: expected train.zero_stage 3, found {train.zero_stage}",
    )
    _require(
        not train.offload_optimizer or train.zero_stage > 0,
        "train.offload_optimizer: expected train.zero_stage 1, 2 or 3, found 0",
    )
    _require(
        config.eepo.num_steps == 1,
        f"eepo.num_steps: expected 1 with train.engine=deepspeed, found {config.eepo.num_steps}: later steps need "
        "gradients at forgetful weights, which no rank holds whole; use train.engine=torch",
    )
    _require(
        config.eepo.direction != "random",
        "eepo.direction: expected gradient or temperature with train.engine=deepspeed, found random: a control for one "
        "device; use train.engine=torch",
    )
