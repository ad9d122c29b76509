"""Tries what training asks of a tiny model of a family, and says of each part yes, how, or the line that refuses."""

import copy
from contextlib import closing

import torch
from eepo_kernels.reference import TokenStats

from eepo_fast.config import OptimizerConfig
from eepo_fast.distributed import World
from eepo_fast.policy.plain import TorchPolicy
from eepo_fast.policy.trial import check_engine, check_padded, check_policy, make_trial, why_not_packed
from eepo_fast.rollout.families import after_head
from eepo_fast.rollout.hf import HfEngine
from eepo_fast.types import EngineError, Problem, Prompt, UserError, WeightsVersion

COLUMNS = ("head", "packing", "checkpointing", "engine")
PROMPTS = [Prompt(Problem("a", "", ""), "", [5, 6, 7, 8, 9, 10])]


def make_policy(model, packed, checkpointing=False):
    return TorchPolicy(
        copy.deepcopy(model), compute_dtype=torch.float32, temperature=1.0, micro_batch_tokens=4096, pad_id=0,
        packed=packed, optimizer=OptimizerConfig(), gradient_checkpointing=checkpointing,
    )  # fmt: skip


def gradient_of(policy, trial):
    def loss_fn(stats: TokenStats, rows):
        return -stats.logprobs

    for batch in policy.micro_batches(trial.rollouts):
        policy.backward(batch, loss_fn)
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in policy.model.parameters()]


def check_family(model) -> dict[str, str]:
    """Returns a word for each of COLUMNS; `refused` alone where the model is."""
    kind = type(model).__name__
    try:
        trial = make_trial(model, PROMPTS, 1.0)
        why = why_not_packed(model, trial)
        if why is not None:
            check_padded(model, trial)
        policy = make_policy(model, why is None)
        check_policy(policy, trial, exact=True)
    except UserError as error:
        return {"refused": str(error)}
    step = after_head(model)
    found = {"head": "yes" + (", scaled" if step.logit_scale != 1 else "") + (", capped" if step.softcap else "")}
    found["packing"] = "yes" if why is None else f"padded: {why}"
    try:
        again = make_policy(model, why is None, checkpointing=True)
        check_policy(again, trial, exact=True)
        pairs = zip(gradient_of(policy, trial), gradient_of(again, trial), strict=True)
        assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in pairs), "checkpointed, another gradient"
        found["checkpointing"] = "yes"
    except UserError as error:
        found["checkpointing"] = str(error)
    engine = HfEngine(model, dtype=torch.float32, max_sequences=16, pad_id=0)
    try:
        engine.sync(policy.weights(), WeightsVersion(0, False))
        _, slower = check_engine(
            engine,
            lambda rollouts: policy.score(rollouts).logprobs,
            trial,
            World(),
            kind=kind,
            exact=True,
            most=64,
        )
        found["engine"] = f"slower: {slower.rpartition(': ')[2]}" if slower else "yes"
    except UserError as error:
        found["engine"] = str(error)
    return found


def check_vllm(model) -> str:
    """Returns how vLLM's weights are updated where its log-probs are the model's own behind two updates, or why not."""
    from eepo_fast.rollout.vllm import VllmEngine

    try:
        trial = make_trial(model, PROMPTS, 1.0)
        policy = make_policy(model, why_not_packed(model, trial) is None)
        engine = VllmEngine(model, dtype=torch.float32, max_sequences=8, max_model_len=256)
        with closing(engine):
            for version in range(2):
                engine.sync(policy.weights(), WeightsVersion(version, False))
            score = lambda rollouts: policy.score(rollouts).logprobs  # noqa: E731
            check_engine(engine, score, trial, World(), kind=type(model).__name__, exact=True, most=64)
            return {"InPlace": "in place", "Reload": "reloaded"}[type(engine._updater).__name__]
    except (UserError, EngineError) as error:
        reason = str(error)
    if "are not supported" in reason:
        return "vLLM has none"
    return "refused: other log-probs" if "does not run" in reason else f"not tried: {reason}"
