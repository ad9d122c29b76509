"""Spreads the policy over many ranks with DeepSpeed's ZeRO, stages 0 to 3.

Stage 0 keeps fp32 weights on every rank and computes under autocast; stages 1 to 3 keep the weights in the compute
dtype and their fp32 masters cut over the ranks, as DeepSpeed does. The unlearning pass runs beside DeepSpeed: its
gradients go through hooks of our own and never into DeepSpeed's buffers, and none of its counters moves.
"""

import io
import logging
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import redirect_stdout
from typing import Any

import torch
from eepo_kernels import ForgetStats, TokenStats, forget, tensor_key
from eepo_kernels.ranges import named
from eepo_kernels.reference import LossFn
from torch import Tensor
from transformers import PreTrainedModel

from eepo_fast.config import EepoConfig, OptimizerConfig, TrainConfig
from eepo_fast.distributed import World, default_device, lone_group
from eepo_fast.policy.micro_batches import Batching, MicroBatch
from eepo_fast.policy.module import Gradient, ModulePolicy, PolicyModule, norm_of, prepare_model
from eepo_fast.policy.plain import MOMENTS, TorchPolicy, make_optimizer
from eepo_fast.policy.schedule import set_schedule
from eepo_fast.policy.shards import Bucket, ShardedGradient, Slice, all_gather, make_buckets, own_views, width
from eepo_fast.rollout.engine import RolloutEngine
from eepo_fast.types import UserError, WeightsVersion


def import_deepspeed() -> Any:
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # names it still uses
    try:
        import deepspeed
    except ImportError as error:
        raise UserError(
            f"train.engine: deepspeed cannot be imported ({error}); pip install 'deepspeed>=0.19.8', or use "
            "train.engine=torch on one device"
        ) from None
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # it reports every step of its own
    # on a CPU it would be compiled at first use, under a lock file that a killed process leaves for ever; gloo is used
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def deepspeed_config(train: TrainConfig, dtype: torch.dtype, grad_clip: float) -> dict[str, Any]:
    """Returns DeepSpeed's own configuration: what ours says, in its words."""
    zero: dict[str, Any] = {"stage": train.zero_stage, "overlap_comm": train.zero_stage == 2}
    if train.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if train.offload_parameters:
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_micro_batch_size_per_gpu": 1,  # has to be there; ours change in size and number, so
        "managed_gradient_accumulation": False,  # every step() ends an accumulation
        "gradient_clipping": 0.0 if train.zero_stage == 0 else grad_clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": train.zero_stage > 0 and dtype == torch.bfloat16, "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "steps_per_print": None,
    }


def _sharded(parameter: Tensor) -> Tensor:
    """Returns this rank's part of a weight at stage 3, flat, the last ranks' padded."""
    return parameter.ds_tensor  # type: ignore[missing-attribute]  # DeepSpeed adds it to torch's class


class ZeroPolicy(ModulePolicy):
    """Is the `Policy` that many ranks share."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        world: World,
        train: TrainConfig,
        compute_dtype: torch.dtype,
        engine_dtype: torch.dtype,
        temperature: float,
        pad_id: int,
        optimizer: OptimizerConfig,
    ):
        """Takes a model that is on the host; DeepSpeed moves to the device what stays there."""
        deepspeed = import_deepspeed()
        lone_group()
        with world.agree():
            prepare_model(
                model, packed=train.packing, gradient_checkpointing=train.gradient_checkpointing, liger=train.liger
            )
        self.world, self.stage, self.engine_dtype = world, train.zero_stage, engine_dtype
        self.device = default_device()
        self.grad_clip = optimizer.grad_clip
        self.weights_norm = norm_of(model)
        self.shapes = {name: p.shape for name, p in model.named_parameters()}
        self.buckets = make_buckets(self.shapes, world.size)
        self.slices = {piece.name: piece for bucket in self.buckets for piece in bucket}
        self._parameters = dict(model.named_parameters())
        below_fp32 = compute_dtype != torch.float32
        # DeepSpeed takes its masters from the weights rounded to 16 bits; the exact ones are set at the end. It gives
        # each weight other memory, so that what they had is kept here without a copy.
        masters = {n: p.detach() for n, p in self._parameters.items()} if below_fp32 and self.stage else {}
        module = PolicyModule(
            model, temperature=temperature, autocast=compute_dtype if below_fp32 and self.stage == 0 else None
        )
        self.fused = self.device.type == "cuda" and not train.offload_optimizer
        self.base_optimizer, self.scheduler = make_optimizer(model, optimizer, fused=self.fused)
        with redirect_stdout(io.StringIO()):  # it prints what it builds
            self.deepspeed, *_ = deepspeed.initialize(
                model=module,
                optimizer=self.base_optimizer,
                config=deepspeed_config(train, compute_dtype, optimizer.grad_clip),
                dist_init_required=False,
            )
        self.module: PolicyModule = self.deepspeed.module
        self.batching = Batching(train.micro_batch_tokens, pad_id, train.packing, self.device)
        if self.stage == 0:
            self.deepspeed.enable_backward_allreduce = False  # done in `step`, where its result is looked at
        if self.stage == 3:  # the head's weight is read by the module itself, not by its owner's forward
            deepspeed.zero.register_external_parameter(self.module, self.model.get_output_embeddings().weight)
        if masters:
            self.load_masters(masters)

    @property
    def stream_tokens(self) -> int | None:
        return self.batching.max_tokens if self.stage < 3 else None  # where they gather weights, ranks meet in a pass

    def alone(self) -> TorchPolicy:
        assert self.stage < 3, "no rank has all weights"
        return TorchPolicy.around(self.module, self.batching)

    # -- the policy update

    def backward(self, batch: MicroBatch, loss_fn: LossFn) -> tuple[Tensor, TokenStats]:
        self.world.on_micro_batch()
        loss, stats = self.deepspeed(batch, loss_fn)
        with named("micro-batch backward"):
            self.deepspeed.backward(loss * self.world.size)  # DeepSpeed takes the mean over ranks
        return loss.detach(), stats

    def halve_micro_batches(self) -> bool:
        return False  # its ranks meet in every backward pass: one that stepped back would leave the others waiting

    def step(self) -> tuple[float, bool]:
        if self.stage == 0:
            return self._step_unsharded()
        with named("optimizer step"):
            self.deepspeed.step()
        applied = self.deepspeed.was_step_applied()
        norm = float(self.deepspeed.get_global_grad_norm())
        if applied:
            self.scheduler.step()
        return norm if applied else float("inf"), applied

    def _step_unsharded(self) -> tuple[float, bool]:
        """Steps at stage 0, and looks for non-finite gradients itself, as DeepSpeed does from stage 1 on."""
        if self.world.size > 1:
            self.deepspeed.buffered_allreduce_fallback()
        norm = float(torch.nn.utils.clip_grad_norm_(self.module.parameters(), self.grad_clip))
        if finite := math.isfinite(norm):
            self.deepspeed.step()
            self.scheduler.step()
        else:
            self.deepspeed.zero_grad()
        return norm, finite

    # -- weights

    def gradient(self) -> ShardedGradient:
        return ShardedGradient(self._parameters, self.buckets, self.world, self.device)

    def _own_slice(self, piece: Slice) -> Tensor:
        """Returns this rank's elements of nearest(master)."""
        parameter = self._parameters[piece.name]
        first, count = piece.held_by(self.world.rank)
        if self.stage < 3:
            return parameter.detach().reshape(-1)[first : first + count]
        return _sharded(parameter).detach().reshape(-1)[:count].to(self.device)

    def _own_flat(self, bucket: Bucket) -> Tensor:
        """Returns [C] in the engine's dtype: this rank's slices of a bucket."""
        flat = torch.zeros(width(bucket), dtype=self.engine_dtype, device=self.device)
        for view, piece in zip(own_views(bucket, flat, self.world.rank), bucket, strict=True):
            view.copy_(self._own_slice(piece))
        return flat

    def weights(self) -> Iterator[Mapping[str, Tensor]]:
        if self.stage < 3:
            yield {name: p.detach() for name, p in self._parameters.items()}
            return
        for bucket in self.buckets:
            yield all_gather(bucket, self._own_flat(bucket), self.world)

    def forget(
        self, engine: RolloutEngine, gradient: Gradient, config: EepoConfig, *, seed: int, step: int
    ) -> ForgetStats:
        """The engine holds nearest(master); each rank computes its slices of what that becomes, and the engine is given
        the result: the bytes of a sync, the bits that one rank would compute."""
        assert isinstance(gradient, ShardedGradient), "a gradient that another kind of policy made"
        sums = torch.zeros(4, dtype=torch.float64, device=self.device)
        buckets = self.forgetful_buckets(gradient, config, sums, seed=seed, step=step)
        engine.sync(buckets, WeightsVersion(engine.weights_version.policy_version, True))
        total = torch.tensor(self.world.total(sums.tolist()), dtype=torch.float64)
        return ForgetStats(total, sum(shape.numel() for shape in self.shapes.values()))

    def forgetful_buckets(
        self, gradient: ShardedGradient, config: EepoConfig, sums: Tensor, *, seed: int, step: int
    ) -> Iterator[dict[str, Tensor]]:
        """Yields round(nearest(master) + η·gradient) in the engine's dtype, bucket by bucket, whole. Each rank computes
        its slices, with the random bits of their place in the whole weight, and all are gathered. sums: float64 [4], to
        which this rank's part of `ForgetStats` is added."""
        rank = self.world.rank
        for bucket, grads in zip(gradient.buckets, gradient.flats, strict=True):
            flat = self._own_flat(bucket)
            stats = forget(
                own_views(bucket, flat, rank),
                own_views(bucket, grads, rank),
                eta=config.learning_rate,
                keys=[tensor_key(piece.name) for piece in bucket],
                offsets=[piece.held_by(rank)[0] for piece in bucket],
                rounding=config.rounding,
                seed=seed,
                step=step,
            )
            sums += stats.sums
            yield all_gather(bucket, flat, self.world)

    # -- masters and optimizer state, whole, on every rank

    @torch.no_grad()
    def load_masters(self, masters: Mapping[str, Tensor]) -> None:
        """Sets the fp32 weights, and those that are computed with, which are rounded from them."""
        for name, parameter in self._parameters.items():
            if self.stage:
                self._set(parameter, name, masters[name])
            if self.stage < 3:
                parameter.copy_(masters[name])
            else:
                held = _sharded(parameter)
                held.copy_(self._padded_slice(name, masters[name]).view(held.shape))
        if self.stage == 3 and (whole := self.deepspeed.optimizer.persistent_parameters):
            whole[0].partition(whole)  # small weights, kept gathered: gather them anew
            whole[0].all_gather(whole)

    def _padded_slice(self, name: str, whole: Tensor) -> Tensor:
        """Returns [slice size]: this rank's elements, then zeros."""
        piece = self.slices[name]
        first, count = piece.held_by(self.world.rank)
        padded = torch.zeros(piece.size, device=self.device)
        padded[:count].copy_(whole.reshape(-1)[first : first + count])
        return padded

    def _set(self, parameter: Tensor, name: str, value: Tensor, key: str | None = None) -> None:
        """Sets a master, or the part `key` of its optimizer state, from all of it. At stage 3 DeepSpeed's calls for
        whole tensors refuse a weight that the ranks do not divide, so it is given slices there."""
        from deepspeed import utils as ds

        keys = () if key is None else (key,)
        if self.stage == 3:
            local = self._padded_slice(name, value)
            set_local = ds.safe_set_local_optimizer_state if keys else ds.safe_set_local_fp32_param
            set_local(parameter, local, *keys)
        else:
            set_full = ds.safe_set_full_optimizer_state if keys else ds.safe_set_full_fp32_param
            set_full(parameter, value.to(self.device, torch.float32), *keys)

    def masters(self) -> Iterator[tuple[str, Tensor]]:
        from deepspeed.utils import safe_get_full_fp32_param

        for name, parameter in self._parameters.items():
            yield name, safe_get_full_fp32_param(parameter) if self.stage else parameter.detach()

    def moments(self) -> Iterator[tuple[str, Tensor]]:
        """DeepSpeed counts steps once for all weights; the count is given with each, as torch keeps it."""
        from deepspeed.utils import safe_get_full_optimizer_state

        if not (states := self.base_optimizer.state):
            return
        count = next(iter(states.values()))["step"]
        for name, parameter in self._parameters.items():
            yield f"step.{name}", torch.as_tensor(float(count))
            for key in MOMENTS[1:]:
                whole = safe_get_full_optimizer_state(parameter, key) if self.stage else states[parameter][key]
                yield f"{key}.{name}", whole.detach()

    def load_state(self, masters: Mapping[str, Tensor], moments: Mapping[str, Tensor], num_steps: int) -> None:
        self.load_masters(masters)
        if moments:
            self._make_moments(count=float(next(v for k, v in moments.items() if k.startswith("step."))))
            for name, parameter in self._parameters.items():
                for key in MOMENTS[1:]:
                    whole = moments[f"{key}.{name}"]
                    if self.stage:
                        self._set(parameter, name, whole, key)
                    else:
                        self.base_optimizer.state[parameter][key].copy_(whole)
        set_schedule(self.scheduler, num_steps)

    def _make_moments(self, count: float) -> None:
        """Makes the optimizer's state as its first step does, so that there is something to load into."""
        zero = self.deepspeed.optimizer
        if self.stage == 0:
            held = list(self._parameters.values())
        else:
            held = zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups
        for tensor in held:
            state = {key: torch.zeros_like(tensor) for key in MOMENTS[1:]}
            step = torch.tensor(count, device=tensor.device if self.fused else "cpu")
            self.base_optimizer.state[tensor] = {"step": step, **state}
        if self.stage in (1, 2):
            zero._lazy_init_hp_params_optimizer_state()
