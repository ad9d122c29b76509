"""Says what the trainer asks of a policy, and has the module that both kinds run: model and fused head in one forward.

Shapes: N completion tokens of a micro-batch, D hidden size, V vocabulary.
"""

import copy
import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from eepo_kernels import ForgetStats, TokenStats, fused_linear_loss, linear_logprobs
from eepo_kernels.ranges import named
from eepo_kernels.reference import LossFn
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel

from eepo_fast.config import EepoConfig
from eepo_fast.distributed import World
from eepo_fast.policy.attention import use_packed_attention
from eepo_fast.policy.footprint import AUTOCAST, Shape, pass_bytes, score_bytes
from eepo_fast.policy.micro_batches import Batching, MicroBatch, collate, plan_micro_batches
from eepo_fast.rollout.engine import RolloutEngine
from eepo_fast.rollout.families import after_head, decoder_of
from eepo_fast.types import Rollout, UserError


class Scores(NamedTuple):
    """Holds what a forward pass says of rollouts' tokens: for each rollout, in their order, one number a token."""

    logprobs: list[list[float]]
    """Log-probs in nats, at the sampling temperature."""
    entropy: list[list[float]]
    """The distribution's entropy at each token, in nats."""


class Gradient(Protocol):
    """Sums a gradient of the policy's weights beside the optimizer's own, over micro-batches and ranks, in fp32. Adding
    to it leaves weights, `.grad`, optimizer and loss scale bitwise as they were."""

    def add(self, loss: Tensor) -> None:
        """Adds ∇loss. All ranks call this as often as one another."""

    def take_over(self, mine: "Gradient | None") -> None:
        """Adds what each rank has summed on its own (`Policy.alone`), which is used up; None where it is nothing. All
        ranks call this, before anything is added."""

    def scale(self, factor: float) -> None:
        """Multiplies the sum so far by `factor`."""

    def norm(self) -> float:
        """Returns the norm of the sum, over all weights and ranks; the same on every rank."""


class Policy(Protocol):
    @property
    def world(self) -> World: ...
    @property
    def model(self) -> PreTrainedModel: ...

    @property
    def shapes(self) -> Mapping[str, torch.Size]:
        """Returns the shape of every weight, whole, once."""

    @property
    def weights_norm(self) -> float:
        """Returns the norm of all weights together, as they were loaded."""

    @property
    def scheduler(self) -> LambdaLR:
        """Returns the learning rate's schedule; a policy without an optimizer has none."""

    @property
    def stream_tokens(self) -> int | None:
        """Returns the tokens of a micro-batch that may run while the engine samples; None where it has to wait."""

    def alone(self) -> "Policy":
        """Returns the same weights for passes of this rank alone: nothing that it does waits for other ranks, and it
        has no optimizer of its own. AssertionError where no rank has all weights."""

    def pass_bytes(self, *, gradient: bool) -> float:
        """Returns what a micro-batch takes beside weights and summed gradients: with its gradient, or for its log-probs
        alone. It is 0 where the model's dimensions do not say."""

    def micro_batches(self, rollouts: Sequence[Rollout]) -> list[MicroBatch]:
        """Returns this rank's part of the rollouts. All ranks pass the same rollouts and get as many micro-batches."""

    def loss(self, batch: MicroBatch, loss_fn: LossFn) -> tuple[Tensor, TokenStats]:
        """Sums `loss_fn` over this rank's micro-batch; returns that with its graph, and the detached statistics [N]."""

    def score(self, rollouts: Sequence[Rollout]) -> Scores:
        """Returns log-probs and entropy of all rollouts' tokens, on every rank."""

    def gradient(self) -> Gradient: ...

    def backward(self, batch: MicroBatch, loss_fn: LossFn) -> tuple[Tensor, TokenStats]:
        """Adds the gradient of `loss`, summed over ranks, to what the next `step` applies; returns `loss`, detached."""

    def halve_micro_batches(self) -> bool:
        """Drops what `backward` has added, and makes later micro-batches half as large: memory has run out. Returns
        False where that is not possible: other ranks wait, or they cannot be smaller."""

    def step(self) -> tuple[float, bool]:
        """Clips and applies what was added; what is not finite is dropped. Returns (norm before clipping, applied)."""

    def weights(self) -> Iterable[Mapping[str, Tensor]]:
        """Returns every weight once, whole (a tied one under its first name), in buckets that live until the next."""

    def forget(
        self, engine: RolloutEngine, gradient: Gradient, config: EepoConfig, *, seed: int, step: int
    ) -> ForgetStats:
        """Sets the engine's weights ← round(engine's weights + η·gradient)."""

    def masters(self) -> Iterator[tuple[str, Tensor]]:
        """Yields the fp32 weights by name, whole, one after the other, on every rank: for checkpoints."""

    def moments(self) -> Iterator[tuple[str, Tensor]]:
        """Yields the optimizer's state in the same way, as `exp_avg.NAME` and so on; nothing before the first step."""

    def load_state(self, masters: Mapping[str, Tensor], moments: Mapping[str, Tensor], num_steps: int) -> None:
        """Takes over what `masters` and `moments` gave; num_steps: of the learning rate's schedule."""


class WholeLoss:
    """Wraps a loss in which a token's depends on others of its completion: it is computed over all of a micro-batch at
    once. The head's logits are computed a second time for its gradient then, where else one pass does both."""

    def __init__(self, loss_fn: LossFn):
        self.loss_fn = loss_fn

    def __call__(self, stats: TokenStats, rows: Tensor) -> Tensor:
        return self.loss_fn(stats, rows)


class PolicyModule(nn.Module):
    """Runs model and fused head in one forward, so that hooks which gather sharded weights see all of it."""

    def __init__(self, model: PreTrainedModel, *, temperature: float, autocast: torch.dtype | None):
        """Computes in the dtype `autocast`, where the weights stay fp32; None is the weights' own dtype."""
        super().__init__()
        self.model = model
        self.temperature = temperature
        self.autocast = autocast
        self.after_head = after_head(model)

    def forward(self, batch: MicroBatch, loss_fn: LossFn | None = None) -> TokenStats | tuple[Tensor, TokenStats]:
        """Returns (loss, statistics) with a `loss_fn`, else the statistics alone."""
        device = batch.input_ids.device.type
        # No cache: a weight is used once a pass, so keeping its 16-bit copy to the pass's end saves no work, and takes
        # half the weights' memory beside the head's. Without checkpointing its product keeps the copy anyway.
        precision = torch.autocast(device, self.autocast, cache_enabled=False) if self.autocast else nullcontext()
        with named("micro-batch forward"), precision:
            inputs = self._head_inputs(batch)
            if loss_fn is None:
                return linear_logprobs(**inputs)
            if isinstance(loss_fn, WholeLoss):
                return whole_linear_loss(inputs, loss_fn)
            return fused_linear_loss(**inputs, loss_fn=loss_fn)

    def _head_inputs(self, batch: MicroBatch) -> dict[str, Any]:
        """Returns the fused head's arguments. Autocast rounds an fp32 weight for the products and leaves it fp32: its
        gradient, summed in fp32, reaches the master without another rounding."""
        inputs: dict[str, Any] = {"input_ids": batch.input_ids}
        if batch.boundaries is not None:  # a padded row's positions are those that every model takes by itself
            inputs |= {"position_ids": batch.position_ids, "boundaries": batch.boundaries, "lengths": batch.lengths}
        hidden = decoder_of(self.model)(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)[batch.positions]
        head = self.model.get_output_embeddings()
        tensors = {"hidden": hidden, "weight": head.weight, "targets": batch.targets, "bias": head.bias}
        return tensors | {"temperature": self.temperature, **self.after_head._asdict()}


def whole_linear_loss(inputs: Mapping[str, Any], loss_fn: LossFn) -> tuple[Tensor, TokenStats]:
    """Returns what `fused_linear_loss` does, of a loss that needs all tokens at once. inputs: as that takes them."""
    stats = linear_logprobs(**inputs)
    detached = TokenStats(stats.logprobs.detach(), stats.entropy.detach(), stats.log1mp.detach())
    rows = torch.arange(len(stats.logprobs), device=stats.logprobs.device)
    return loss_fn(stats._replace(history=detached), rows).sum(), detached


@torch.no_grad()
def norm_of(model: PreTrainedModel) -> float:
    return float(torch.nn.utils.get_total_norm([p.detach() for p in model.parameters()]))


def prepare_model(
    model: PreTrainedModel, *, packed: bool, gradient_checkpointing: bool = False, liger: bool = False
) -> None:
    """Makes the model, which `check_head` has seen, compute as the config says; UserError where it cannot. Liger is
    used where there is a GPU."""
    if packed:
        use_packed_attention(model)
    if gradient_checkpointing:
        _checkpoint_gradients(model)
    if liger and torch.cuda.is_available():
        _use_liger(model)


def _use_liger(model: PreTrainedModel) -> None:
    try:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance
    except ImportError as error:
        raise UserError(
            f"train.liger: liger-kernel cannot be imported ({error}); pip install liger-kernel, or set "
            "train.liger=false"
        ) from None
    family = vars(sys.modules[type(model).__module__])
    before = dict(family)
    # the head and its loss are our own
    _apply_liger_kernel_to_instance(model=model, fused_linear_cross_entropy=False, cross_entropy=False)
    # Liger exchanges names in transformers' module, too, and so for every model of the family in this process: for the
    # engine's, and for those on the host, whose tensors a Triton kernel cannot read. This model's layers have their own
    # by now, so the names are put back; a function that layers look up by name (rotary positions) chooses by device.
    for name, found in before.items():
        if family[name] is not found:
            is_plain_function = not isinstance(found, type) and not hasattr(found, "on_gpu")
            family[name] = _by_device(family[name], found) if is_plain_function else found


def _by_device(on_gpu: Callable, on_host: Callable) -> Callable:
    @functools.wraps(on_host)
    def chosen(first: Tensor, *arguments: Any, **options: Any) -> Any:
        return (on_gpu if first.is_cuda else on_host)(first, *arguments, **options)

    vars(chosen)["on_gpu"] = on_gpu
    return chosen


NOISE = ("drop", "jitter", "noise")  # in names of numbers that make a module random while it trains


def _checkpoint_gradients(model: PreTrainedModel) -> None:
    """Has activations computed again in the backward pass. transformers does so in modules that are in training mode:
    those alone are put there, what they are made of stays in evaluation mode, and their own dropout is turned off."""
    try:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    except ValueError as error:
        raise UserError(f"train.gradient_checkpointing: {error}; set train.gradient_checkpointing=false") from None
    quiet = copy.deepcopy(model.config)  # some layers read their dropout there; the model's own is saved with it
    _silence(quiet)
    for module in model.modules():
        module.training = bool(getattr(module, "gradient_checkpointing", False))
        if module.training and module is not model and getattr(module, "config", None) is model.config:
            module.config = quiet  # type: ignore[bad-assignment]  # torch's hints know no configs on a module
        if module.training:
            _silence(module)


def _silence(holder: Any) -> None:
    for name, value in vars(holder).items():
        if isinstance(value, float) and any(part in name for part in NOISE):
            setattr(holder, name, 0.0)


def gather_columns(
    world: World, rollouts: Sequence[Rollout], mine: Mapping[Rollout, Sequence[Tensor]]
) -> dict[Rollout, list[list[float]]]:
    """Returns several numbers a token of all rollouts that any rank knows something of, on every rank. mine: of those
    that this rank had in its micro-batches, a tensor [T] for each number."""
    if world.size == 1:
        return {rollout: [values.tolist() for values in columns] for rollout, columns in mine.items()}
    place = {rollout: i for i, rollout in enumerate(rollouts)}
    # stacked: what is cut from a tensor is pickled with all of that tensor
    parts = world.gather({place[rollout]: torch.stack(tuple(columns)) for rollout, columns in mine.items()})
    return {rollouts[i]: columns.tolist() for part in parts for i, columns in part.items()}


class ModulePolicy:
    """Has what both kinds of policy do with their module in the same way."""

    module: PolicyModule
    world: World
    batching: Batching

    @property
    def model(self) -> PreTrainedModel:
        return self.module.model

    def micro_batches(self, rollouts: Sequence[Rollout]) -> list[MicroBatch]:
        cut = self.batching
        plan = plan_micro_batches(rollouts, cut.max_tokens, self.world.size, cut.packed)
        return [collate(members, cut.pad_id, cut.device, cut.packed) for members in plan[self.world.rank]]

    def loss(self, batch: MicroBatch, loss_fn: LossFn) -> tuple[Tensor, TokenStats]:
        self.world.on_micro_batch()
        return self.module(batch, loss_fn)  # not DeepSpeed's forward: its backward hooks would act on the gradient

    def pass_bytes(self, *, gradient: bool) -> float:
        weight = next(self.model.parameters())
        if (shape := Shape.of(self.model.config.to_dict())) is None:
            return 0.0
        itemsize = AUTOCAST if self.module.autocast else weight.itemsize
        tokens, device = self.batching.max_tokens, "cuda" if weight.is_cuda else "cpu"
        if gradient:
            return pass_bytes(shape, tokens, itemsize, device, checkpointing=self.model.is_gradient_checkpointing)
        return score_bytes(shape, tokens, itemsize, device)

    def score(self, rollouts: Sequence[Rollout]) -> Scores:
        mine: dict[Rollout, tuple[Tensor, Tensor]] = {}
        for batch in self.micro_batches(rollouts):
            self.world.on_micro_batch()
            with torch.no_grad():
                stats = self.module(batch)
            logprobs, entropy = batch.split(stats.logprobs.cpu()), batch.split(stats.entropy.cpu())
            mine.update(zip(batch.rollouts, zip(logprobs, entropy, strict=True), strict=True))
        found = gather_columns(self.world, rollouts, mine)
        nothing: list[list[float]] = [[], []]
        pairs = [found.get(rollout, nothing) for rollout in rollouts]
        return Scores([logprobs for logprobs, _ in pairs], [entropy for _, entropy in pairs])


def give_gradients(loss: Tensor, parameters: Mapping[str, Tensor], take: Callable[[str, Tensor], None]) -> None:
    """Gives `take` each weight's gradient by name, as the backward pass brings it; it is not kept here."""

    def receive(name: str, grad: Tensor) -> Tensor:
        take(name, grad)
        return grad.new_zeros(()).expand_as(grad)  # nobody reads what autograd goes on with

    hooks = [p.register_hook(partial(receive, name)) for name, p in parameters.items()]
    try:
        # autograd.grad, not backward(): the policy's .grad must stay as it is, and the optimizer's never see these
        torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    finally:
        for hook in hooks:
            hook.remove()
