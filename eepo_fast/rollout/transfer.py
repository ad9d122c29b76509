"""The same two updates for a vLLM in another process or on another machine, over vLLM's own weight-transfer interface.

The engine's side is a backend named `eepo` in vLLM's factory (`WeightTransferConfig(backend="eepo")`; an entry point
registers it wherever eepo-fast is installed). The trainer's side is a `WeightSender`. Between them weights travel in
packed buckets, broadcast from rank 0 over NCCL or gloo: nearest(master) in the engine's dtype for a sync, the gradient
in fp32 for a forget, which every worker applies to what it holds, with the random bits of its own slices.

The control calls go to the engine by any way that reaches it (HTTP, RPC, a pipe):

    init_weight_transfer_engine(sender.init_info(first_rank=1))     # while the sender connects
    start_weight_update(); update_weights(INFO); finish_weight_update(); reset_prefix_cache(reset_running_requests=True)

with INFO from `sender.sync_info` or `sender.forget_info`, while the trainer calls `sender.sync` or `sender.forget`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from eepo_kernels import ForgetStats, forget, sync
from torch import Tensor
from vllm.distributed.parallel_state import get_tp_group
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import WeightTransferEngine

from eepo_fast.rollout.weights import Plan, check_plan, record_plan

BACKEND = "eepo"
BUCKET_BYTES = 256 << 20
TIMEOUT = timedelta(minutes=10)


def register() -> None:
    """Make the backend known to vLLM; called by vLLM in each of its processes."""
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, __name__, "EepoTransferEngine")


def connect(host: str, port: int, rank: int, world_size: int, device: torch.device) -> dist.ProcessGroup:
    """A process group of its own, beside whatever groups this process has: NCCL for GPUs, gloo for CPUs."""
    store = dist.TCPStore(host, port, world_size, is_master=rank == 0, timeout=TIMEOUT)
    if device.type == "cuda":
        return dist.ProcessGroupNCCL(store, rank, world_size)
    return dist.ProcessGroupGloo(store, rank, world_size, TIMEOUT)


def broadcast(group: dist.ProcessGroup, tensor: Tensor) -> None:
    options = dist.BroadcastOptions()
    options.rootRank, options.rootTensor = 0, 0
    group.broadcast([tensor.view(torch.uint8)], options).wait()


def buckets(shapes: Mapping[str, torch.Size], itemsize: int, bucket_bytes: int) -> Iterator[list[str]]:
    """Names in order, as many at a time as fit into a bucket (a larger tensor has one of its own)."""
    names, size = [], 0
    for name, shape in shapes.items():
        if names and size + shape.numel() * itemsize > bucket_bytes:
            yield names
            names, size = [], 0
        names.append(name)
        size += shape.numel() * itemsize
    if names:
        yield names


def unpack(bucket: Tensor, names: list[str], shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    parts = bucket.split([shapes[name].numel() for name in names])
    return {name: part.view(shapes[name]) for name, part in zip(names, parts, strict=True)}


class WeightSender:
    """The trainer's end: rank 0 of the group. names and shapes are the policy's, each weight once."""

    def __init__(self, shapes: Mapping[str, torch.Size], *, host: str, port: int, num_workers: int, dtype: torch.dtype,
                 device: torch.device, bucket_bytes: int = BUCKET_BYTES):  # fmt: skip
        """dtype: the engine's. Returns at once; `connect` waits for the workers."""
        self.shapes, self.dtype, self.device, self.bucket_bytes = dict(shapes), dtype, device, bucket_bytes
        self.host, self.port, self.world_size = host, port, num_workers + 1
        self.group: dist.ProcessGroup | None = None

    def init_info(self, first_rank: int = 1) -> dict[str, Any]:
        """For `init_weight_transfer_engine`; worker i of the engine is rank first_rank + i."""
        shapes = {name: list(shape) for name, shape in self.shapes.items()}
        place = {"host": self.host, "port": self.port, "first_rank": first_rank, "world_size": self.world_size}
        dtype = str(self.dtype).removeprefix("torch.")
        return place | {"shapes": shapes, "dtype": dtype, "bucket_bytes": self.bucket_bytes}

    def connect(self) -> None:
        self.group = connect(self.host, self.port, 0, self.world_size, self.device)

    def sync_info(self) -> dict[str, Any]:
        return {"operation": "sync"}

    def forget_info(self, *, eta: float, rounding: str, seed: int, step: int) -> dict[str, Any]:
        return {"operation": "forget", "eta": eta, "rounding": rounding, "seed": seed, "step": step}

    @torch.no_grad()
    def sync(self, weights: Mapping[str, Tensor]) -> None:
        self._send(weights, self.dtype)

    @torch.no_grad()
    def forget(self, gradient: Mapping[str, Tensor]) -> ForgetStats:
        """What the step did, summed over the workers: with tensor parallelism each has a part."""
        self._send(gradient, torch.float32)
        sums = self._reduce(torch.zeros(4, dtype=torch.float64, device=self.device))
        return ForgetStats(sums, sum(shape.numel() for shape in self.shapes.values()))

    def _send(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        for names in buckets(self.shapes, dtype.itemsize, self.bucket_bytes):
            bucket = torch.empty(sum(self.shapes[n].numel() for n in names), dtype=dtype, device=self.device)
            parts = unpack(bucket, names, self.shapes)
            sync([parts[n] for n in names], [tensors[n] for n in names])
            broadcast(self.group, bucket)

    def _reduce(self, sums: Tensor) -> Tensor:
        self.group.allreduce([sums]).wait()
        return sums


@dataclass
class TransferInit:
    host: str
    port: int
    first_rank: int
    world_size: int
    shapes: dict[str, list[int]]
    dtype: str
    bucket_bytes: int


@dataclass
class TransferUpdate:
    operation: str
    eta: float = 0.0
    rounding: str = "stochastic"
    seed: int = 0
    step: int = 0


class EepoTransferEngine(WeightTransferEngine[TransferInit, TransferUpdate]):
    """A worker's end: receives buckets and applies them in place, over the plan of its own shard."""

    init_info_cls = TransferInit
    update_info_cls = TransferUpdate
    supports_draft_weight_update = False

    def init_transfer_engine(self, init_info: TransferInit) -> None:
        self.shapes = {name: torch.Size(shape) for name, shape in init_info.shapes.items()}
        self.bucket_bytes = init_info.bucket_bytes
        self.plan = self._record()
        found = {str(view.dtype).removeprefix("torch.") for view in self.plan.views}
        if found != {init_info.dtype}:
            raise ValueError(f"expected weights in {init_info.dtype}, as they are sent, found {', '.join(found)}")
        check_plan(self.plan, self.model, self.shapes, getattr(torch, init_info.dtype), sync, self._tp_group())
        self.state = "empty"
        """empty, synced, forgotten, or broken while an update is under way."""
        rank = init_info.first_rank + self.parallel_config.rank
        self.group = connect(init_info.host, init_info.port, rank, init_info.world_size, self.device)

    def _record(self) -> Plan:
        return record_plan(self.model, self.shapes, self._tp_group())

    def _tp_group(self) -> dist.ProcessGroup | None:
        return get_tp_group().cpu_group if self.parallel_config.tensor_parallel_size > 1 else None

    def start_weight_update(self) -> None:
        if self.plan.moved(self.model):
            self.plan = self._record()

    def finish_weight_update(self) -> None:
        """Everything was applied as it came."""

    @torch.no_grad()
    def receive_weights(self, update_info: TransferUpdate) -> None:
        if update_info.operation not in ("sync", "forget"):
            raise ValueError(f"operation: expected sync or forget, found {update_info.operation!r}")
        is_forget = update_info.operation == "forget"
        if is_forget and self.state != "synced":
            raise ValueError(f"forget: expected weights that were just synced, found them {self.state}")
        self.state = "broken"
        dtype = torch.float32 if is_forget else self.plan.views[0].dtype
        sums = torch.zeros(4, dtype=torch.float64, device=self.device)
        for names in buckets(self.shapes, dtype.itemsize, self.bucket_bytes):
            bucket = torch.empty(sum(self.shapes[n].numel() for n in names), dtype=dtype, device=self.device)
            broadcast(self.group, bucket)
            received = unpack(bucket, names, self.shapes)
            part = self.plan.restricted_to(names)
            if is_forget:
                sums += self._forget(part, received, update_info)
            else:
                sync(part.views, part.sources(received))
        if is_forget:
            self.group.allreduce([sums]).wait()
        self.state = "forgotten" if is_forget else "synced"

    def _forget(self, part: Plan, gradient: Mapping[str, Tensor], info: TransferUpdate) -> Tensor:
        """float64 [4]: the sums over the slices that this worker counts."""
        sums = torch.zeros(4, dtype=torch.float64, device=self.device)
        for piece in part.by_ownership():
            layout = dict(keys=piece.keys, offsets=piece.offsets, row_strides=piece.row_strides)
            options = dict(eta=info.eta, rounding=info.rounding, seed=info.seed, step=info.step)
            stats = forget(piece.views, piece.sources(gradient), **layout, **options)
            if piece.owned[0]:
                sums += stats.sums
        return sums

    def shutdown(self) -> None:
        self.group = None
