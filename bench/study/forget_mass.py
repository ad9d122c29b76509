"""The paper's Figure 4 at this scale: what a forget step does to the answers of stage 1, and where their mass goes.

On the policy that GRPO ends with (seed 0 of the study), 64 of its training prompts, 4 answers each, EEPO's chosen η:
the exact probability of the distinct answers of stage 1 under θ and θ', and fresh samples from both, by kind.
"""

from __future__ import annotations

import copy
import json
import tempfile
from pathlib import Path

import torch
from methods import run_config

from eepo_fast import checkpoint
from eepo_fast.config import ModelConfig
from eepo_fast.data import load_problems, make_prompts, stop_token_ids
from eepo_fast.display import Display
from eepo_fast.models import load_model
from eepo_fast.policy.plain import TorchPolicy
from eepo_fast.rewards import ArithmeticGrader
from eepo_fast.rollout.engine import Sampling, make_requests
from eepo_fast.rollout.hf import HfEngine
from eepo_fast.run import train
from eepo_fast.types import Rollout, WeightsVersion
from eepo_fast.unlearn import compute_unlearning

KINDS = ("said in stage 1, right", "said in stage 1, wrong", "other, right", "other, wrong")
NUM_PROMPTS, HALF, FRESH = 64, 4, 128


def measure(eepo_overrides: list[str]) -> dict:
    with tempfile.TemporaryDirectory() as root:
        folder = train(run_config("grpo", [], 0, root), display=Display.silent())
        model, tokenizer = load_model(ModelConfig(path=str(checkpoint.newest_valid(folder)[0] / "model")))
    config = run_config("eepo", eepo_overrides, 0, "unused")
    prompts = make_prompts(load_problems(config.data, 0), config.data, tokenizer)[0][:NUM_PROMPTS]
    engine = HfEngine(model, dtype=torch.float32, max_sequences=1024, pad_id=tokenizer.pad_token_id)
    policy = TorchPolicy(model, compute_dtype=torch.float32, temperature=1.0, micro_batch_tokens=16384,
                         pad_id=tokenizer.pad_token_id, packed=True)  # fmt: skip
    stops = tuple(stop_token_ids(tokenizer, tokenizer.eos_token_id))
    sampling = Sampling(1.0, config.rollout.max_new_tokens, stops)

    def sample(stage: int, count: int) -> list[Rollout]:
        return engine.generate(make_requests(prompts, stage, range(count), 0, 0), sampling)

    engine.sync(policy.weights(), WeightsVersion(0, False))
    stage1 = sample(1, HALF)
    said = {(r.prompt.id, tuple(r.token_ids)): r for r in stage1}
    before, fresh_before = probabilities(policy, said), sample(4, FRESH)
    unlearning = compute_unlearning(policy, stage1, config.eepo, [])
    policy.forget(engine, unlearning.gradient, config.eepo, seed=0, step=0)
    forgetful = policy.with_model(copy.deepcopy(model))
    with torch.no_grad():
        for name, parameter in forgetful.model.named_parameters():
            parameter.copy_(engine.weights[name])
    after, fresh_after = probabilities(forgetful, said), sample(5, FRESH)
    return {
        "eta": config.eepo.learning_rate,
        "gate_open": unlearning.active_fraction,
        "kinds": KINDS,
        "prompts": [{"id": i, "stage1_before": before[i], "stage1_after": after[i]} for i in before],
        "mass": {
            "before": shares(fresh_before, said, tokenizer, stops),
            "after": shares(fresh_after, said, tokenizer, stops),
        },
    }


def probabilities(policy: TorchPolicy, said: dict) -> dict[str, float]:
    """Of each prompt's distinct answers, summed."""
    logprobs = policy.score(list(said.values()))[0]
    result: dict[str, float] = {}
    for r in said.values():
        result[r.prompt.id] = result.get(r.prompt.id, 0.0) + float(torch.tensor(logprobs[id(r)]).double().sum().exp())
    return result


def shares(rollouts: list[Rollout], said: dict, tokenizer, stops: tuple[int, ...]) -> dict[str, float]:
    texts = [tokenizer.decode([t for t in r.token_ids if t not in stops]) for r in rollouts]
    grades = ArithmeticGrader().grade([r.prompt.problem for r in rollouts], texts)
    counts = dict.fromkeys(KINDS, 0)
    for r, grade in zip(rollouts, grades, strict=True):
        known = (r.prompt.id, tuple(r.token_ids)) in said
        counts[KINDS[2 * (not known) + (grade.reward != 1.0)]] += 1
    return {kind: count / len(rollouts) for kind, count in counts.items()}


def write(path: Path, eepo_overrides: list[str]) -> None:
    path.write_text(json.dumps(measure(eepo_overrides), indent=1) + "\n")
