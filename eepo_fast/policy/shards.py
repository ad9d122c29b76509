"""Cuts weights over the ranks for one purpose: a gradient that no rank holds whole, for the forget step taken on it.

Every weight, flat, is cut into one slice a rank of equal size, the last ones short or empty: as ZeRO-3 cuts them.
Weights travel in buckets of several; a bucket on the wire is [R, C]: R ranks, C elements a rank, the slices of its
weights side by side.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from eepo_fast.distributed import World
from eepo_fast.policy.footprint import BUCKET_ELEMENTS
from eepo_fast.policy.module import Gradient, give_gradients
from eepo_fast.policy.plain import PlainGradient

# torch 2.13 has new names for two collectives
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True)
class Slice:
    """Says where a weight is in its bucket."""

    name: str
    shape: torch.Size
    start: int  # in the bucket's C
    size: int  # elements a rank, the last ones padded

    def held_by(self, rank: int) -> tuple[int, int]:
        """Returns (first, count): the flat elements of the weight that this rank has; no more than there are."""
        first = min(rank * self.size, self.shape.numel())
        return first, min(self.size, self.shape.numel() - first)


Bucket = list[Slice]


def make_buckets(shapes: Mapping[str, torch.Size], num_ranks: int, num_elements: int = BUCKET_ELEMENTS) -> list[Bucket]:
    """Returns weights in order, about `num_elements` a bucket; a larger one has a bucket of its own."""
    buckets: list[Bucket] = []
    size = num_elements
    for name, shape in shapes.items():
        if size + shape.numel() > num_elements:
            buckets.append([])
            size = 0
        bucket = buckets[-1]
        start = bucket[-1].start + bucket[-1].size if bucket else 0
        bucket.append(Slice(name, shape, start, -(-shape.numel() // num_ranks)))
        size += shape.numel()
    return buckets


def width(bucket: Bucket) -> int:
    """Returns C of a bucket."""
    return bucket[-1].start + bucket[-1].size


def own_views(bucket: Bucket, flat: Tensor, rank: int) -> list[Tensor]:
    """Returns what `flat` [C] of this rank holds of each weight, without padding; may be empty."""
    return [flat[s.start : s.start + s.held_by(rank)[1]] for s in bucket]


def all_gather(bucket: Bucket, flat: Tensor, world: World) -> dict[str, Tensor]:
    """Returns the bucket's weights, whole, from every rank's `flat` [C]."""
    if world.size == 1:
        gathered = flat[None]
    else:
        gathered = flat.new_empty(world.size, flat.numel())
        _all_gather(gathered.view(-1), flat)
    return {
        s.name: gathered[:, s.start : s.start + s.size].reshape(-1)[: s.shape.numel()].view(s.shape) for s in bucket
    }


class ShardedGradient:
    """Is a `Gradient` of which every rank keeps its slices, fp32. Each micro-batch's is summed over the ranks as the
    backward pass brings it, a bucket at a time, so that no rank ever holds all of it."""

    def __init__(self, parameters: Mapping[str, Tensor], buckets: Sequence[Bucket], world: World, device: torch.device):
        self.parameters, self.buckets, self.world, self.device = dict(parameters), buckets, world, device
        self.flats = [torch.zeros(width(bucket), device=device) for bucket in buckets]

    def add(self, loss: Tensor) -> None:
        reduction = _Reduction(self)
        give_gradients(loss, self.parameters, reduction.take)
        reduction.finish()

    def take_over(self, mine: Gradient | None) -> None:
        assert mine is None or isinstance(mine, PlainGradient)
        tensors, reduction = mine.tensors if mine else {}, _Reduction(self)
        for name in reversed(list(tensors)):
            reduction.take(name, tensors.pop(name))  # a bucket at a time its memory is free
        reduction.finish()

    def scale(self, factor: float) -> None:
        for flat in self.flats:
            flat *= factor

    def norm(self) -> float:
        squares = sum(float(flat.square().sum(dtype=torch.float64)) for flat in self.flats)
        return self.world.total([squares])[0] ** 0.5


class _Reduction:
    """Follows one backward pass: gradients go into their bucket, a full one into the sum, in one order on all ranks."""

    def __init__(self, gradient: ShardedGradient):
        self.gradient = gradient
        self.place = {s.name: (i, s) for i, bucket in enumerate(gradient.buckets) for s in bucket}
        self.missing = [{s.name for s in bucket} for bucket in gradient.buckets]
        self.wires: dict[int, Tensor] = {}
        self.next_bucket = len(gradient.buckets) - 1  # the backward pass brings the last weights first

    def take(self, name: str, grad: Tensor) -> None:
        index, piece = self.place[name]
        wire = self._wire(index)[:, piece.start : piece.start + piece.size]
        whole, rest = divmod(grad.numel(), piece.size) if piece.size else (0, 0)
        flat = grad.reshape(-1)
        wire[:whole].copy_(flat[: whole * piece.size].view(whole, -1))
        if rest:
            wire[whole, :rest].copy_(flat[whole * piece.size :])
        self.missing[index].discard(name)
        while self.next_bucket >= 0 and not self.missing[self.next_bucket]:
            self._reduce()

    def _wire(self, index: int) -> Tensor:
        if index not in self.wires:
            columns = self.gradient.flats[index].numel()
            self.wires[index] = torch.zeros(self.gradient.world.size, columns, device=self.gradient.device)
        return self.wires[index]

    def _reduce(self) -> None:
        wire, flat = self._wire(self.next_bucket), self.gradient.flats[self.next_bucket]
        if self.gradient.world.size == 1:
            flat += wire[0]
        else:
            mine = torch.empty_like(flat)
            _reduce_scatter(mine, wire.view(-1))
            flat += mine
        del self.wires[self.next_bucket]
        self.next_bucket -= 1

    def finish(self) -> None:
        """Adds zeros for weights that got no gradient, here or on any rank."""
        while self.next_bucket >= 0:
            self._reduce()
