"""Measures the paper's Figure 4 at this scale: what a forget step does to stage 1's answers, and where their mass goes.

On the policy that GRPO ends with (the study's first seed), sixteen batches of its training prompts as large as an
iteration's, 4 answers each, EEPO's chosen η, each batch its own step from the policy: the exact probability of the
distinct answers of stage 1 under θ and θ', and fresh samples from both, by kind.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from methods import FIRST_SEED, run_config

from eepo_fast import checkpoint
from eepo_fast.algorithm.forget import compute_unlearning
from eepo_fast.config import Config, ModelConfig
from eepo_fast.data.problems import load_problems
from eepo_fast.data.prompts import make_prompts, stop_token_ids
from eepo_fast.policy.loading import load_model
from eepo_fast.policy.plain import TorchPolicy
from eepo_fast.rewards import ArithmeticGrader
from eepo_fast.rollout.engine import Sampling, make_requests
from eepo_fast.rollout.hf import HfEngine
from eepo_fast.run.build import train
from eepo_fast.run.display import Display
from eepo_fast.types import Prompt, Rollout, WeightsVersion

KINDS = ("said in stage 1, right", "said in stage 1, wrong", "other, right", "other, wrong")
NUM_BATCHES, HALF, FRESH = 16, 4, 128


def measure(overrides: dict[str, list[str]]) -> dict:
    """Measures a study's forget steps. overrides: of grpo and of eepo."""
    with tempfile.TemporaryDirectory() as root:
        folder = train(run_config("grpo", overrides["grpo"], FIRST_SEED, root), display=Display.silent())
        model, tokenizer = load_model(ModelConfig(path=str(checkpoint.newest_valid(folder)[0] / "model")))
    config = run_config("eepo", overrides["eepo"], FIRST_SEED, "unused")
    prompts = make_prompts(load_problems(config.data, FIRST_SEED), config.data, tokenizer)[0]
    size = config.train.prompts_per_iteration
    batches = [prompts[k * size : (k + 1) * size] for k in range(NUM_BATCHES)]
    engine = HfEngine(model, dtype=torch.float32, max_sequences=1024, pad_id=tokenizer.pad_token_id)
    policy = TorchPolicy(model, compute_dtype=torch.float32, temperature=1.0, micro_batch_tokens=16384,
                         pad_id=tokenizer.pad_token_id, packed=True)  # fmt: skip
    rows = [
        row for step, batch in enumerate(batches) for row in one_step(policy, engine, tokenizer, config, batch, step)
    ]
    return {"overrides": overrides, "kinds": KINDS, "prompts_a_step": size, "prompts": rows}


def one_step(
    policy: TorchPolicy, engine: HfEngine, tokenizer, config: Config, prompts: Sequence[Prompt], step: int
) -> list[dict]:
    """Returns, before and after, a prompt's summed probability of stage-1 answers and shares of fresh samples."""
    stops = tuple(stop_token_ids(tokenizer, tokenizer.eos_token_id))
    sampling = Sampling(1.0, config.rollout.max_new_tokens, stops)

    def sample(stage: int, count: int) -> list[Rollout]:
        return engine.generate(make_requests(prompts, stage, range(count), 0, step), sampling)

    engine.sync(policy.weights(), WeightsVersion(step, False))
    stage1 = sample(1, HALF)
    said = {(r.prompt.id, tuple(r.token_ids)): r for r in stage1}
    before, fresh_before = probabilities(policy, said), shares(sample(4, FRESH), said, tokenizer, stops)
    unlearning = compute_unlearning(policy, stage1, config.eepo, [])
    policy.forget(engine, unlearning.gradient, config.eepo, seed=0, step=step)
    forgetful = policy.with_model(copy.deepcopy(policy.model))
    with torch.no_grad():
        for name, parameter in forgetful.model.named_parameters():
            parameter.copy_(engine.weights[name])
    after, fresh_after = probabilities(forgetful, said), shares(sample(5, FRESH), said, tokenizer, stops)
    return [
        {"id": i, "step": step, "stage1_before": before[i], "stage1_after": after[i],
         "mass_before": fresh_before[i], "mass_after": fresh_after[i]}
        for i in before
    ]  # fmt: skip


def probabilities(policy: TorchPolicy, said: dict) -> dict[str, float]:
    """Returns the summed probability of each prompt's distinct answers."""
    answers = list(said.values())
    result: dict[str, float] = {}
    for r, logprobs in zip(answers, policy.score(answers).logprobs, strict=True):
        result[r.prompt.id] = result.get(r.prompt.id, 0.0) + float(torch.tensor(logprobs).double().sum().exp())
    return result


def shares(rollouts: list[Rollout], said: dict, tokenizer, stops: tuple[int, ...]) -> dict[str, list[float]]:
    """Returns the shares by prompt, in the order of KINDS."""
    texts = [tokenizer.decode([t for t in r.token_ids if t not in stops]) for r in rollouts]
    grades = ArithmeticGrader().grade([r.prompt.problem for r in rollouts], texts)
    found: dict[str, list[float]] = {}
    for r, grade in zip(rollouts, grades, strict=True):
        known = (r.prompt.id, tuple(r.token_ids)) in said
        found.setdefault(r.prompt.id, [0.0] * len(KINDS))[2 * (not known) + (grade.reward != 1.0)] += 1 / FRESH
    return found


def is_done(path: Path, overrides: dict[str, list[str]]) -> bool:
    return path.exists() and json.loads(path.read_text()).get("overrides") == overrides


def write(path: Path, overrides: dict[str, list[str]]) -> None:
    path.write_text(json.dumps(measure(overrides), indent=1) + "\n")
