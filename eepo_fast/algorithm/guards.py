"""What is looked at before it is believed: whose weights sampled, how far a forget step went, whether memory sufficed.

Each returns a decision or a count; the trainer acts on it and the metrics keep it.
"""

import gc
import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from eepo_fast.algorithm.losses import low_variance_kl
from eepo_fast.algorithm.ratio import has_finite_logprobs
from eepo_fast.policy.module import Policy
from eepo_fast.rollout.engine import SampleRequest
from eepo_fast.types import EngineError, Rollout, UserError, WeightsVersion

MAX_BAD_UPDATES = 3  # non-finite policy gradients in a row before the run is stopped
KL_SAMPLES = 16  # completions of stage 2 that are scored at θ to see how far the step went, and more of short ones:
KL_TOKENS = 1024  # as many as have so many tokens, where stage 2 has them

Result = TypeVar("Result")


def check_version(rollouts: Sequence[Rollout], expected: WeightsVersion, requests: Sequence[SampleRequest]) -> None:
    """Raises EngineError where a rollout's tokens are of other weights, or for another stage, than the trainer
    believes: its ratio would divide by the wrong model. expected: the weights that sampled what was asked for, behind
    what a completion had said before."""
    asked = [request for request in requests for _ in request.seeds]
    for r, request in zip(rollouts, asked, strict=True):
        *before, last = r.segments
        said = [(s.tokens, s.weights_version) for s in before]  # a log-prob that is no number is not equal to itself
        asked_for = [(s.tokens, s.weights_version) for s in request.before]
        if last.weights_version != expected or r.stage != request.stage or said != asked_for:
            raise EngineError(
                f"expected completions of stage {request.stage} from weights {tuple(expected)}"
                f"{', behind what they had said' * bool(request.before)}, found one of {r.prompt.id} of stage "
                f"{r.stage} from weights {[tuple(s.weights_version) for s in r.segments]}"
            )


def check_updates(num_bad: int, step: int, norm: float) -> None:
    """Raises UserError where `num_bad` updates in a row had a gradient that is not finite."""
    if num_bad >= MAX_BAD_UPDATES:
        raise UserError(
            f"training stopped at iteration {step + 1}: the policy's gradient norm was {norm} in {num_bad} updates in "
            "a row; lower optimizer.learning_rate, or resume a checkpoint",
            shared=True,
        )


def forget_kl(policy: Policy, stage2: Sequence[Rollout]) -> tuple[float, float]:
    """Returns two estimates of KL(θ'‖θ) in nats a token, from completions of θ' spread over the prompts: the mean of
    -d, d = log π_θ - log π_θ', and that of exp(d) - d - 1, which varies less. NaN where most of stage 2 has no finite
    log-probs, or nothing was sampled. All ranks call this."""
    sampled = [r for r in stage2 if r.num_tokens]
    usable = [r for r in sampled if has_finite_logprobs(r)]
    if len(usable) < len(sampled) / 2:
        usable = []  # not one completion gone wrong, but the model
    if not usable:
        return math.nan, math.nan
    num_tokens = sum(r.num_tokens for r in usable)
    count = min(max(KL_SAMPLES, math.ceil(KL_TOKENS * len(usable) / num_tokens)), len(usable))
    chosen = [usable[i * len(usable) // count] for i in range(count)]
    scored = policy.score(chosen).logprobs
    forgetful = torch.tensor([logprob for r in chosen for logprob in r.rollout_logprobs], dtype=torch.float64)
    theta = torch.tensor([logprob for logprobs in scored for logprob in logprobs], dtype=torch.float64)
    return (forgetful - theta).mean().item(), low_variance_kl(forgetful, theta).mean().item()


def within_memory(policy: Policy, compute: Callable[[], Result]) -> tuple[Result, int]:
    """Returns compute(), and how often the policy's micro-batches were halved for it: over the same samples, until
    their tokens fit. Only where no other rank waits inside `compute`; UserError where halving cannot help."""
    halvings = 0
    while True:
        try:
            return compute(), halvings
        except torch.OutOfMemoryError as error:
            reason = str(error).splitlines()[0]
        # outside the handler, whose traceback holds the activations
        if not policy.halve_micro_batches():
            raise UserError(
                f"out of memory: {reason}; lower train.micro_batch_tokens, with vLLM rollout.gpu_memory_utilization, "
                "or set train.gradient_checkpointing=true, and --resume"
            )
        halvings += 1
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
