"""Holds the policy on one device: fp32 master weights, computed with in a dtype of choice, AdamW."""

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from eepo_kernels import ForgetStats, TokenStats
from eepo_kernels.ranges import named
from eepo_kernels.reference import LossFn
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel

from eepo_fast.config import EepoConfig, OptimizerConfig
from eepo_fast.distributed import World
from eepo_fast.policy.micro_batches import Batching, MicroBatch
from eepo_fast.policy.module import Gradient, ModulePolicy, PolicyModule, give_gradients, norm_of, prepare_model
from eepo_fast.policy.schedule import make_schedule, set_schedule
from eepo_fast.rollout.engine import RolloutEngine


class PlainGradient:
    """Is a `Gradient` of whole tensors by name. A weight's gradient is added as the backward pass brings it, and its
    memory is free from there on: from the second micro-batch on there would else be two of the whole model."""

    def __init__(self, model: PreTrainedModel, scaler: torch.amp.GradScaler):
        """Takes gradients of losses that are multiplied by the scaler's factor, 1 unless it is enabled, and divides
        them by it: float16 has no room for them else."""
        self.parameters, self.scaler = dict(model.named_parameters()), scaler
        self.loss_scale = scaler.get_scale()
        self.tensors: dict[str, Tensor] = {}
        self.known_norm: float | None = None
        """The result of the last `norm`: the forget step is held against it, and reads the gradient once."""

    def add(self, loss: Tensor) -> None:
        self.known_norm = None
        found = dict(self.tensors)

        def take(name: str, grad: Tensor) -> None:
            if name in found:
                found[name].add_(grad, alpha=1 / self.loss_scale)
            else:
                found[name] = grad.float() if self.loss_scale == 1 else grad.float() / self.loss_scale

        give_gradients(loss * self.loss_scale, self.parameters, take)
        if not self.tensors:  # in the model's order, whatever order they came in
            for name, parameter in self.parameters.items():
                given = found.get(name)
                self.tensors[name] = torch.zeros_like(parameter, dtype=torch.float32) if given is None else given

    def take_over(self, mine: Gradient | None) -> None:
        assert not self.tensors and (mine is None or isinstance(mine, PlainGradient))
        self.tensors, self.known_norm = mine.tensors if mine else {}, None

    def scale(self, factor: float) -> None:
        self.known_norm = None
        for tensor in self.tensors.values():
            tensor *= factor

    def norm(self) -> float:
        self.known_norm = float(torch.nn.utils.get_total_norm(list(self.tensors.values()))) if self.tensors else 0.0
        if self.scaler.is_enabled() and not math.isfinite(self.known_norm):
            self.scaler.update(self.loss_scale / 2)  # the next one fits
        return self.known_norm


class TorchPolicy(ModulePolicy):
    """Is the `Policy` that one device holds whole."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        compute_dtype: torch.dtype,
        temperature: float,
        micro_batch_tokens: int,
        pad_id: int,
        packed: bool = False,
        world: World | None = None,
        optimizer: OptimizerConfig | None = None,
        gradient_checkpointing: bool = False,
        liger: bool = False,
    ):
        """Shares the rollouts to `score` with the ranks of `world`; a policy with an optimizer is alone."""
        prepare_model(model, packed=packed, gradient_checkpointing=gradient_checkpointing, liger=liger)
        self.world = world or World()
        assert optimizer is None or self.world.size == 1
        self.weights_norm = norm_of(model)
        weight = next(model.parameters())
        autocast = None if compute_dtype == weight.dtype else compute_dtype
        self.module = PolicyModule(model, temperature=temperature, autocast=autocast)
        self.batching = Batching(micro_batch_tokens, pad_id, packed, weight.device)
        # a token's share of a mean over many is below what float16 can hold: the loss is scaled up, the gradient down
        self.scaler = torch.amp.GradScaler(weight.device.type, 2.0**10, enabled=compute_dtype == torch.float16)
        self.scaler.scale(torch.zeros((), device=weight.device))  # it is made at its first use
        if optimizer is not None:
            self.grad_clip = optimizer.grad_clip
            self.optimizer, self.scheduler = make_optimizer(model, optimizer, fused=weight.is_cuda)

    @property
    def shapes(self) -> dict[str, torch.Size]:
        return {name: p.shape for name, p in self.model.named_parameters()}

    @property
    def stream_tokens(self) -> int | None:
        return self.batching.max_tokens

    @classmethod
    def around(cls, module: PolicyModule, batching: Batching) -> "TorchPolicy":
        """Returns a policy of this rank alone around a module that is there, without an optimizer."""
        policy = cls.__new__(cls)
        policy.module, policy.batching, policy.world = module, batching, World()
        policy.scaler = torch.amp.GradScaler(batching.device.type, enabled=False)
        return policy

    def alone(self) -> "TorchPolicy":
        return self if self.world.size == 1 else self.around(self.module, self.batching)

    def with_model(self, model: PreTrainedModel) -> "TorchPolicy":
        """Returns the same computation on another model of the same kind, for which there is no optimizer."""
        other = copy.copy(self)
        other.module = PolicyModule(model, temperature=self.module.temperature, autocast=self.module.autocast)
        return other

    def named_weights(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self.model.named_parameters()}

    def gradient(self) -> PlainGradient:
        return PlainGradient(self.model, self.scaler)

    def backward(self, batch: MicroBatch, loss_fn: LossFn) -> tuple[Tensor, TokenStats]:
        loss, stats = self.loss(batch, loss_fn)
        with named("micro-batch backward"):
            self.scaler.scale(loss).backward()
        return loss.detach(), stats

    def halve_micro_batches(self) -> bool:
        if self.world.size > 1 or self.batching.max_tokens == 1:  # one sequence each, however long
            return False
        for parameter in self.model.parameters():
            parameter.grad = None
        self.batching = replace(self.batching, max_tokens=self.batching.max_tokens // 2)
        return True

    def step(self) -> tuple[float, bool]:
        self.scaler.unscale_(self.optimizer)
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.grad_clip))
        if finite := math.isfinite(norm):
            with named("optimizer step"):
                self.optimizer.step()
            self.scheduler.step()
        if self.scaler.is_enabled():
            self.scaler.update()  # smaller after a gradient that was too large, larger after many that were not
        self.optimizer.zero_grad(set_to_none=True)
        return norm, finite

    def weights(self) -> list[Mapping[str, Tensor]]:
        return [self.named_weights()]

    def forget(
        self, engine: RolloutEngine, gradient: Gradient, config: EepoConfig, *, seed: int, step: int
    ) -> ForgetStats:
        assert isinstance(gradient, PlainGradient), "a gradient that another kind of policy made"
        eta, rounding, norm = config.learning_rate, config.rounding, gradient.known_norm
        return engine.forget(gradient.tensors, eta=eta, rounding=rounding, seed=seed, step=step, norm=norm)

    def masters(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.named_weights().items()

    def moments(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                yield f"{key}.{name}", value.detach()
            if found := self.scaler.state_dict():
                yield f"{LOSS_SCALE}.{name}", torch.tensor([found["scale"], found["_growth_tracker"]])

    @torch.no_grad()
    def load_state(self, masters: Mapping[str, Tensor], moments: Mapping[str, Tensor], num_steps: int) -> None:
        for name, parameter in self.model.named_parameters():
            parameter.copy_(masters[name])
            if found := {key: moments[f"{key}.{name}"] for key in MOMENTS if f"{key}.{name}" in moments}:
                on_host = {"step"} if parameter.device.type == "cpu" or not self.optimizer.defaults["fused"] else set()
                self.optimizer.state[parameter] = {
                    key: value if key in on_host else value.to(parameter.device) for key, value in found.items()
                }
            if f"{LOSS_SCALE}.{name}" in moments and self.scaler.is_enabled():
                scale, tracker = moments[f"{LOSS_SCALE}.{name}"].tolist()
                self.scaler.load_state_dict(
                    self.scaler.state_dict() | {"scale": scale, "_growth_tracker": int(tracker)}
                )
        set_schedule(self.scheduler, num_steps)


LOSS_SCALE = "loss_scale"  # one for all weights, kept with each as the optimizer's state is
MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def make_optimizer(
    model: PreTrainedModel, config: OptimizerConfig, *, fused: bool
) -> tuple[torch.optim.AdamW, LambdaLR]:
    """Returns AdamW and its schedule. fused: the state is on a GPU, where PyTorch's other way to step all weights at
    once would hold as much again as they have. On a CPU it is one weight after the other."""
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=config.learning_rate,
        betas=(config.betas[0], config.betas[1]),
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=fused or None,
    )
    return optimizer, make_schedule(optimizer, config)
