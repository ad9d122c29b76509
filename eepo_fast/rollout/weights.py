"""The plan: where every element of the policy's weights lives in a vLLM model, recorded once from vLLM's own loader.

vLLM fuses q, k, v and gate, up, pads vocabularies and shards over ranks; `load_weights` knows how. It is run once on
stand-ins that hold no values, while every copy it makes is noted and not made. From then on an update is one
multi-tensor operation over the noted views. A plan that does not cover everything is an error, never a guess.

Shapes are those of the tensors the loader copies: any.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from eepo_kernels import tensor_key
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


class PlanError(Exception):
    """The loader does something that a plan of copies cannot say; the message names it."""


class Copy(NamedTuple):
    """One copy of the loader: a slice of a source tensor into a view of a parameter."""

    name: str
    """The source's name in the policy."""
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
    """Shape, stride and offset of the slice in the contiguous, unsharded source: in elements."""
    view: Tensor
    """The destination, a view of the parameter's own memory."""

    def source(self, weights: Mapping[str, Tensor]) -> Tensor:
        whole = weights[self.name]
        assert whole.is_contiguous()
        return whole.as_strided(self.shape, self.stride, whole.storage_offset() + self.offset)


class Plan:
    def __init__(self, copies: Sequence[Copy], parameters: Mapping[str, Tensor]):
        self.copies = list(copies)
        self.views = [copy.view for copy in copies]
        self.keys = [tensor_key(copy.name) for copy in copies]
        self.offsets = [copy.offset for copy in copies]
        self.row_strides = [copy.stride[-2] if len(copy.stride) > 1 else copy.shape.numel() for copy in copies]
        self._pointers = {name: p.data_ptr() for name, p in parameters.items()}

    def restricted_to(self, names: Iterable[str]) -> Plan:
        """The part of the plan whose sources are these."""
        chosen = set(names)
        return Plan([copy for copy in self.copies if copy.name in chosen], {})

    def sources(self, weights: Mapping[str, Tensor]) -> list[Tensor]:
        """The slices of `weights` (contiguous, by source name) in the order of `views`."""
        return [copy.source(weights) for copy in self.copies]

    def moved(self, model: nn.Module) -> bool:
        """Have the engine's tensors been allocated anew (as sleeping may do)? Then the views are of dead memory."""
        return self._pointers != {name: p.data_ptr() for name, p in model.named_parameters()}


class _Recorder(TorchDispatchMode):
    """Notes copies of stand-ins into parameters, and leaves both as they are."""

    def __init__(self, parameters: Mapping[int, tuple[str, Tensor]]):
        super().__init__()
        self.stand_ins: dict[int, str] = {}
        self.parameters = parameters
        self.copies: list[Copy] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is aten.copy_.default:
            return self._copy(*args[:2])
        if func in (aten.fill_.Scalar, aten.zero_.default) and _storage(args[0]) in self.parameters:
            return args[0]  # the loader clears padding
        return func(*args, **(kwargs or {}))

    def _copy(self, dst: Tensor, src: Tensor) -> Tensor:
        source, parameter = self.stand_ins.get(_storage(src)), self.parameters.get(_storage(dst))
        if parameter is None:
            raise PlanError(f"the loader copies into a tensor of shape {tuple(dst.shape)} that is no parameter")
        if source is None:
            raise PlanError(f"the loader copies something computed, not a slice of a weight, into {parameter[0]}")
        if dst.shape != src.shape:
            raise PlanError(f"the loader copies shape {tuple(src.shape)} into {tuple(dst.shape)} of {parameter[0]}")
        view = parameter[1].as_strided(dst.shape, dst.stride(), dst.storage_offset())
        self.copies.append(Copy(source, src.shape, src.stride(), src.storage_offset(), view))
        return dst


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@torch.no_grad()
def record_plan(model: nn.Module, shapes: Mapping[str, torch.Size], num_shards: int = 1) -> Plan:
    """The plan for a vLLM model, or one of `num_shards` tensor-parallel shards of it, and a policy whose weights have
    these names and shapes. PlanError if vLLM's loader skips a weight, transforms one, or leaves part of a parameter
    unwritten."""
    parameters = {name: p.data for name, p in model.named_parameters()}
    if len({_storage(p) for p in parameters.values()}) < len(parameters):
        raise PlanError("two parameters share one memory")
    any_parameter = next(iter(parameters.values()))
    recorder = _Recorder({_storage(p): (name, p) for name, p in parameters.items()})

    def stand_ins() -> Iterator[tuple[str, Tensor]]:
        """Real memory, because a slice is recognised by its address; one at a time, so that it is no second model."""
        for name, shape in shapes.items():
            stand_in = torch.empty(shape, dtype=any_parameter.dtype, device=any_parameter.device)
            recorder.stand_ins[_storage(stand_in)] = name
            yield name, stand_in

    with recorder:
        model.load_weights(stand_ins())
    _check_coverage(recorder.copies, shapes, parameters, num_shards)
    return Plan(recorder.copies, parameters)


def _check_coverage(
    copies: Iterable[Copy], shapes: Mapping[str, torch.Size], parameters: Mapping[str, Tensor], num_shards: int
) -> None:
    taken: dict[str, int] = defaultdict(int)
    written: dict[int, list[Tensor]] = defaultdict(list)
    for copy in copies:
        taken[copy.name] += copy.shape.numel()
        written[_storage(copy.view)].append(copy.view)
    for name, shape in shapes.items():
        # a shard takes its share, or all of what every shard has; the last shard of a padded vocabulary takes less
        whole = taken[name] == shape.numel()
        share = num_shards > 1 and 0 < taken[name] < shape.numel()
        if not whole and not share:
            raise PlanError(f"the loader takes {taken[name]} of {shape.numel()} elements of {name}")
    for name, parameter in parameters.items():
        views = written[_storage(parameter)]
        covered = sum(view.numel() for view in views)
        # a vocabulary is padded to whole tiles: rows behind the last word are never read
        padded = len(views) == 1 and views[0].shape[1:] == parameter.shape[1:] and views[0].storage_offset() == 0
        if covered != parameter.numel() and not (padded and ("embed" in name or "lm_head" in name)):
            raise PlanError(f"the loader writes {covered} of {parameter.numel()} elements of {name}")
        spans = sorted((view.storage_offset(), view.numel()) for view in views if view.is_contiguous())
        for (start, length), (following, _) in pairwise(spans):
            if start + length > following:
                raise PlanError(f"the loader writes part of {name} twice")


def checksums(tensors: Sequence[Tensor]) -> Tensor:
    """int64 [tensors]: the sum of each tensor's bits read as integers, reduced on its device."""
    if not tensors:
        return torch.zeros(0, dtype=torch.int64)
    integers = {2: torch.int16, 4: torch.int32}
    return torch.stack([t.view(integers[t.itemsize]).sum(dtype=torch.int64) for t in tensors])


def rounded_checksums(sources: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """What `checksums` gives for the sources rounded to nearest `dtype`: a tensor at a time, from the sources alone."""
    return torch.cat([checksums([source.to(dtype)]) for source in sources])
