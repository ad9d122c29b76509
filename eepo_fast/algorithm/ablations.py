"""Ablations of the forget step, on one device: they need whole gradients and a second copy of the policy.

- `eepo.direction: random` takes a random direction as long as ∇L in its place: a control.
- `eepo.num_steps`: more than one step follows the gradient at θ'; the engine applies their sum at once.
"""

import copy
import math
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from eepo_fast.algorithm.forget import Ablation, GradientPass, Unlearning, count_prompts
from eepo_fast.config import EepoConfig
from eepo_fast.policy.module import Policy
from eepo_fast.policy.plain import PlainGradient, TorchPolicy
from eepo_fast.types import Rollout


def find_ablation(config: EepoConfig, seed: tuple[int, int]) -> Ablation | None:
    """Returns what the config asks for in the gradient's place, if anything. seed: the run's, and the iteration."""
    if config.num_steps == 1 and config.direction != "random":
        return None

    def ablation(found: Unlearning, policy: Policy, rollouts: Sequence[Rollout]) -> None:
        assert isinstance(policy, TorchPolicy) and isinstance(found.gradient, PlainGradient)  # others are refused
        if config.num_steps > 1:
            _add_steps(found, found.gradient, policy, rollouts, config)
        if found.apply and config.direction == "random":
            _randomise(found.gradient.tensors, "|".join(map(str, seed)))

    return ablation


def _randomise(tensors: dict[str, Tensor], seed: str) -> None:
    """Puts a random direction as long as the gradient in its place: normal, drawn for each weight by its name."""
    length = math.sqrt(sum(float(g.double().square().sum()) for g in tensors.values()))
    for name, tensor in tensors.items():
        draw_normal(tensor, f"{seed}|{name}")
    drawn = math.sqrt(sum(float(g.double().square().sum()) for g in tensors.values()))
    for tensor in tensors.values():
        tensor *= length / drawn


def draw_normal(tensor: Tensor, seed: str) -> None:
    """Fills the tensor with normal numbers of its device's generator."""
    tensor.normal_(generator=torch.Generator(tensor.device).manual_seed(zlib.crc32(seed.encode())))


def _add_steps(
    found: Unlearning, gradient: PlainGradient, policy: TorchPolicy, rollouts: Sequence[Rollout], config: EepoConfig
) -> None:
    """Takes steps 2 to num_steps at θ', on a temporary copy in the policy's precision, and adds them to the first."""
    forgetful = policy.with_model(copy.deepcopy(policy.model))
    columns = [(r, r.prox_logprobs, r.entropy, r.gate) for r in rollouts]
    latest, total = gradient.tensors, {name: g.clone() for name, g in gradient.tensors.items()}
    for _ in range(config.num_steps - 1):
        with torch.no_grad():
            for name, parameter in forgetful.model.named_parameters():
                parameter.add_(latest[name], alpha=config.learning_rate)
        step = GradientPass(forgetful, config, len(rollouts), count_prompts(rollouts)).finish(rollouts)
        if not math.isfinite(step.grad_norm):
            found.finite = found.apply = False
            break
        assert isinstance(step.gradient, PlainGradient)
        latest = step.gradient.tensors
        for name in total:
            total[name] += latest[name]
    for r, *at_theta in columns:  # the columns are the policy's, not the copy's
        r.prox_logprobs, r.entropy, r.gate = at_theta
    gradient.tensors = total
