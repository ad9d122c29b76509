"""Makes numbers.json: what trl's and verl's own functions return for fixed inputs, in float64, for a test that holds
our formulas against them. Needs trl 1.16.0 and verl 0.9.1, installed without dependencies beside torch, transformers.

    python tests/eepo_fast/algorithm/peers/make_numbers.py

B sequences, T their padded width. Lists in the JSON are ragged: a list of token values a sequence. Floats are written
by repr, which reads back as the same float64.
"""

import json
import math
import random
import sys
from collections import defaultdict
from importlib.machinery import ModuleSpec
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock


def stub(*names):
    for name in names:
        module = MagicMock(name=name)
        module.__spec__, module.__path__, module.__version__ = ModuleSpec(name, None), [], "99.0"
        sys.modules[name] = module


stub("ray", "ray.util", "ray.util.scheduling_strategies", "ray.util.placement_group", "ray.util.collective")
stub("ray.experimental", "ray.experimental.state", "ray.experimental.state.api", "datasets")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from trl.trainer.grpo_trainer import GRPOTrainer  # noqa: E402
from verl.trainer.ppo import core_algos  # noqa: E402
from verl.workers.config import ActorConfig  # noqa: E402
from verl.workers.config.actor import PolicyLossConfig  # noqa: E402

torch.set_num_threads(1)

LENGTHS = [7, 1, 12, 5, 9, 3, 10, 4]
ADVANTAGES = [1.25, -0.7, 0.0, 0.5, -1.3, 0.9, -0.4, 2.0]
CONSTANT_LENGTH = 16  # longer than the longest: Dr. GRPO's constant
LOW, HIGH = 0.2, 0.28
REWARDS = {
    "mixed": [1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0],
    "one_right": [0.0, 0.0, 0.0, 1.0, 0.0, 0.0],
    "all_wrong": [0.0, 0.0, 0.0, 0.0],
    "all_right": [1.0, 1.0, 1.0, 1.0],
    "pair": [0.0, 1.0],
    "real": [0.1, 0.9, -0.5, 0.25, 0.9],
}


def draw(seed):
    rng = random.Random(seed)
    new = [[-0.01 - rng.expovariate(1.0) for _ in range(n)] for n in LENGTHS]
    old = [[min(x + rng.uniform(-0.5, 0.5), -0.001) for x in row] for row in new]
    return {"logprobs": new, "old_logprobs": old}


def padded(rows, fill):
    width = max(map(len, rows))
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows], dtype=torch.float64)


def ragged(tensor):
    for row, n in zip(tensor, LENGTHS, strict=True):
        assert not row[n:].any(), "padding has a gradient"
    return [row[:n].tolist() for row, n in zip(tensor, LENGTHS, strict=True)]


class Batch:
    """One set of inputs as padded tensors; the padding holds values that would show if it were not left out."""

    def __init__(self, inputs):
        self.new, self.old = padded(inputs["logprobs"], -3.0), padded(inputs["old_logprobs"], -1.0)
        self.mask = padded([[1.0] * n for n in LENGTHS], 0.0).long()
        self.advantages = torch.tensor(ADVANTAGES, dtype=torch.float64)

    def differentiated(self, loss_of):
        leaf = self.new.clone().requires_grad_()
        loss = loss_of(leaf)
        loss.backward()
        assert loss.dtype == torch.float64
        return {"value": loss.item(), "gradient": ragged(leaf.grad)}

    def verl(self, name, aggregation, *, scale=None, **settings):
        policy = {k: settings.pop(k) for k in ("kl_cov_ratio", "ppo_kl_coef") if k in settings}
        config = ActorConfig(
            strategy="fsdp",
            rollout_n=1,
            use_dynamic_bsz=True,
            policy_loss=PolicyLossConfig(loss_mode=name, **policy),
            global_batch_info={} if scale is None else {"loss_scale_factor": scale},
            **settings,
        )
        function = core_algos.get_policy_loss_fn(name)
        advantages = self.advantages[:, None].expand_as(self.new).clone()
        return self.differentiated(
            lambda leaf: function(self.old, leaf, advantages, self.mask, loss_agg_mode=aggregation, config=config)[0]
        )

    def trl(self, loss_type, *, level="token", low=LOW, high=HIGH):
        """Calls the trainer's method on an object that has only what it reads."""

        def loss_of(leaf):
            trainer = SimpleNamespace(
                _get_per_token_logps_and_entropies=lambda *_, **__: (leaf, torch.zeros_like(self.new), None),
                _metrics=defaultdict(lambda: defaultdict(list)),
                _entropy_bonus_enabled=False,
                accelerator=SimpleNamespace(num_processes=1, reduce=lambda x, **_: x, gather=lambda x: x),
                args=SimpleNamespace(delta=None, steps_per_generation=1, use_bias_correction_kl=False),
                aux_loss_enabled=False,
                beta=0.0,
                current_gradient_accumulation_steps=1,
                epsilon_high=high,
                epsilon_low=low,
                importance_sampling_level=level,
                loss_type=loss_type,
                max_completion_length=CONSTANT_LENGTH,
                model=SimpleNamespace(training=True),
                off_policy_mask_threshold=None,
                top_entropy_quantile=1.0,
                use_vllm=False,
                vllm_importance_sampling_correction=False,
            )
            ids = torch.zeros_like(self.mask)
            inputs = {
                "prompt_ids": ids[:, :1],
                "prompt_mask": self.mask[:, :1],
                "completion_ids": ids,
                "completion_mask": self.mask,
                "advantages": self.advantages,
                "old_per_token_logps": self.old,
                "num_items_in_batch": self.mask.sum(),
            }
            return GRPOTrainer._compute_loss(trainer, None, inputs)

        return self.differentiated(loss_of)


def loss_cases(set_name, batch):
    verl_module, trl_function = "verl.trainer.ppo.core_algos", "trl.trainer.grpo_trainer.GRPOTrainer._compute_loss"
    clip = {"clip_ratio_low": LOW, "clip_ratio_high": HIGH}

    def verl(case, name, aggregation, **settings):
        found = batch.verl(name, aggregation, **settings)
        function = f"{verl_module}.{core_algos.get_policy_loss_fn(name).__name__}"
        shown = {"loss_agg_mode": aggregation, **settings}
        if "scale" in shown:
            shown["loss_scale_factor"] = shown.pop("scale")
        return {"name": case, "inputs": set_name, "peer": "verl", "function": function, "settings": shown, **found}

    def trl(case, loss_type, **settings):
        found = batch.trl(loss_type, **settings)
        shown = {
            "loss_type": loss_type,
            "importance_sampling_level": settings.get("level", "token"),
            "epsilon": settings.get("low", LOW),
            "epsilon_high": settings.get("high", HIGH),
            "max_completion_length": CONSTANT_LENGTH,
            "beta": 0.0,
        }
        return {"name": case, "inputs": set_name, "peer": "trl", "function": trl_function, "settings": shown, **found}

    no_dual = {**clip, "clip_ratio_c": 1e9}
    yield verl("clip/token_mean", "vanilla", "token-mean", **no_dual)
    yield verl("clip/seq_mean_token_mean", "vanilla", "seq-mean-token-mean", **no_dual)
    yield verl("clip/constant_length", "vanilla", "seq-mean-token-sum-norm", scale=CONSTANT_LENGTH, **no_dual)
    yield trl("clip/token_mean", "dapo")
    yield trl("clip/seq_mean_token_mean", "grpo")
    yield trl("clip/constant_length", "dr_grpo")
    for low, high in ((LOW, HIGH), (3e-4, 4e-4), (0.05, 0.08)):
        case = f"gspo/{low:g}_{high:g}"
        settings = {"clip_ratio_low": low, "clip_ratio_high": high}
        yield verl(case, "gspo", "seq-mean-token-mean", **settings)
        yield trl(case, "grpo", level="sequence", low=low, high=high)
    yield verl("gspo/token_mean", "gspo", "token-mean", **clip)
    for ratio, coef in ((0.1, 1.0), (0.1, 0.1), (0.002, 1.0), (0.5, 1.0)):
        cov = {"kl_cov_ratio": ratio, "ppo_kl_coef": coef}
        case = verl(f"kl_cov/{ratio:g}_{coef:g}", "kl_cov", "token-mean", **cov)
        if set_name == "off_policy":
            case["selected"] = selected(
                case["gradient"], batch.verl("kl_cov", "token-mean", **cov | {"ppo_kl_coef": 0})
            )
        yield case
    yield verl("cispo/two_sided", "cispo", "token-mean", **clip)
    yield verl("cispo/upper_only", "cispo", "token-mean", clip_ratio_low=1.0, clip_ratio_high=HIGH)
    yield trl("cispo/upper_only", "cispo", high=1 + HIGH)
    yield trl("cispo/never_clipped", "cispo", high=5.0)


def selected(gradient, without):
    """Which tokens kl_cov penalised: those whose gradient is another without the penalty."""
    return [
        [int(a != b) for a, b in zip(one, other, strict=True)]
        for one, other in zip(gradient, without["gradient"], strict=True)
    ]


def advantage_cases():
    scores, index = [], []
    for group, rewards in REWARDS.items():
        scores += rewards
        index += [group] * len(rewards)
    mask = torch.ones(len(scores), 3, dtype=torch.int64)
    at_end = torch.zeros(len(scores), 3, dtype=torch.float64)
    at_end[:, -1] = torch.tensor(scores, dtype=torch.float64)

    def case(name, function, **settings):
        found = function(at_end.clone(), mask, np.array(index), **settings)[0][:, 0].tolist()
        values, start = {}, 0
        for group, rewards in REWARDS.items():
            values[group] = found[start : start + len(rewards)]
            start += len(rewards)
        path = f"verl.trainer.ppo.core_algos.{function.__name__}"
        return {
            "name": name,
            "inputs": "rewards",
            "peer": "verl",
            "function": path,
            "settings": settings,
            "value": values,
        }

    grpo = core_algos.compute_grpo_outcome_advantage
    yield case("advantage/grpo", grpo, epsilon=1e-6, norm_adv_by_std_in_grpo=True)
    yield case("advantage/dr_grpo", grpo, norm_adv_by_std_in_grpo=False)
    yield case("advantage/rloo", core_algos.compute_rloo_outcome_advantage)


def check(inputs):
    """The draw takes every branch of the clip, and none sits on an edge."""
    branches = set()
    for new, old, advantage in zip(inputs["logprobs"], inputs["old_logprobs"], ADVANTAGES, strict=True):
        for a, b in zip(new, old, strict=True):
            ratio = math.exp(a - b)
            assert abs(a - b) <= 0.5 and min(abs(ratio - 1 + LOW), abs(ratio - 1 - HIGH)) > 1e-3
            branches.add((ratio < 1 - LOW, ratio > 1 + HIGH, (advantage > 0) - (advantage < 0)))
    assert len(branches) == 9, branches


def main():
    off_policy = draw(seed=9)
    check(off_policy)
    sets = {
        "off_policy": off_policy,
        "first_update": {"logprobs": off_policy["logprobs"], "old_logprobs": off_policy["logprobs"]},
    }
    cases = [*advantage_cases()]
    for name, inputs in sets.items():
        cases += loss_cases(name, Batch(inputs))
    found = {
        "versions": {name: version(name) for name in ("torch", "trl", "verl")},
        "inputs": {"rewards": REWARDS, "advantages": ADVANTAGES, **sets},
        "notes": NOTES,
        "cases": cases,
    }
    path = Path(__file__).with_name("numbers.json")
    path.write_text(json.dumps(found, separators=(",", ":"), allow_nan=False).replace('{"name"', '\n{"name"') + "\n")
    print(f"{len(cases)} cases, {path.stat().st_size} bytes")


NOTES = [
    "Gradients are with respect to logprobs (the current policy's), old_logprobs and advantages held "
    "fixed. No case has "
    "an entropy term, a KL to a reference or an importance weight of the sampler. Values are losses, to be descended.",
    "advantage: verl's standard deviation is the unbiased one, plus 1e-6 (TRL: unbiased, plus 1e-4; the GRPO paper: no "
    "epsilon). A group of one response is not centred by verl's grpo and rloo. A group of equal rewards gives exact 0 "
    "here because its mean is exact. TRL's advantages are computed inside its generation step: no case.",
    "clip, verl: the log ratio is clamped to +-20 (far from here); the dual clip is put out of reach by clip_ratio_c = "
    "1e9. On an edge of the clip torch.maximum would halve the gradient; no token of these sets is on one.",
    "aggregation, verl: seq-mean-token-mean divides by length + 1e-8, which the integer mask makes "
    "float32, where it is "
    "the length exactly. seq-mean-token-sum-norm is the sum over tokens / (sequences with a token * "
    "loss_scale_factor); "
    "without loss_scale_factor it divides by the padded width, which is no constant. TRL dr_grpo: sum / (B * "
    "max_completion_length). TRL dapo and cispo divide by num_items_in_batch, here all tokens of the set.",
    "gspo, verl: GSPO-token, the value of every token being the sequence ratio with a gradient through "
    "its own log-prob "
    "only. With one advantage a sequence and seq-mean-token-mean its value and gradient are those of GSPO (1/B sum of "
    "min(s A, clip(s) A)), which is what TRL computes; token-mean weighs sequences by length and is not the paper's. "
    "verl's exponent has an upper bound of 10.",
    "kl_cov: verl has no clip and no min: -A r for all tokens, plus ppo_kl_coef * |log ratio| for the "
    "selected ones (the "
    "paper: KL(old || new)). Selected: the top max(1, int(kl_cov_ratio * tokens)) of (A - mean A)(logp - mean logp), "
    "means over all tokens of the call (a micro-batch in training), logp the current one, detached; "
    "selected holds them "
    "(off_policy). At old == new the penalty's derivative is sign(0) = 0: no effect in a first update. ppo_kl_coef's "
    "default is 1 in the function's text, 0.1 in its config; the paper's is 1.",
    "cispo: -sg(clip(r)) A logp: the value is not a surrogate's, only the gradient counts. verl clips to [1 - low, 1 + "
    "high] with the same keys as PPO's (clip_ratio_low = 1 turns the lower bound off); TRL has the upper "
    "bound only and "
    "epsilon_high is the bound itself, not what is added to 1.",
]

if __name__ == "__main__":
    main()
