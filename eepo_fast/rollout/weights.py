"""Records once, from vLLM's own loader, where every element of the policy's weights lives in a vLLM model: the plan.

vLLM fuses q, k, v and gate, up, pads vocabularies and shards over ranks; `load_weights` knows how. It is run once on
stand-ins that hold no values, while every copy it makes is noted and not made. From then on an update is one
multi-tensor operation over the noted views. A plan that does not cover everything is an error, never a guess.

Shapes are those of the tensors the loader copies: any.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from eepo_kernels import checksums, tensor_key
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


class PlanError(Exception):
    """The loader does something that a plan of copies cannot say; the message names it."""


class VllmModel(Protocol):
    """A plan asks this of a vLLM model, and of the module that it is."""

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> object: ...
    def modules(self) -> Iterator[nn.Module]: ...
    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...
    def parameters(self) -> Iterator[nn.Parameter]: ...


class Copy(NamedTuple):
    """Notes one copy of the loader: a slice of a source tensor goes into a view of a parameter."""

    name: str
    """The source's name in the policy."""
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
    """Shape, stride and offset of the slice in the contiguous, unsharded source: in elements."""
    view: Tensor
    """The destination, a view of the parameter's own memory."""

    def slice_of(self, whole: Tensor) -> Tensor:
        """Returns the slice of the source, which must be contiguous."""
        assert whole.is_contiguous()
        return whole.as_strided(self.shape, self.stride, whole.storage_offset() + self.offset)

    @property
    def slice(self) -> tuple:
        """Returns what it takes, comparable over ranks."""
        return self.name, tuple(self.shape), tuple(self.stride), self.offset


class Plan:
    """Holds the copies of this rank. owned: no rank before this one holds the same slice, so that a sum over the ranks
    that takes each rank's own counts every element once."""

    def __init__(self, copies: Sequence[Copy], parameters: Mapping[str, Tensor], owned: Sequence[bool]):
        self.copies = list(copies)
        self.owned = list(owned)
        self.views = [copy.view for copy in copies]
        self.keys = [tensor_key(copy.name) for copy in copies]
        self.offsets = [copy.offset for copy in copies]
        self.row_strides = [copy.stride[-2] if len(copy.stride) > 1 else copy.shape.numel() for copy in copies]
        self._pointers = {name: p.data_ptr() for name, p in parameters.items()}

    def restricted_to(self, names: Iterable[str]) -> "Plan":
        """Returns the part of the plan whose sources are these."""
        chosen = set(names)
        return self._only([copy.name in chosen for copy in self.copies])

    def by_ownership(self) -> list["Plan"]:
        """Returns the part that counts in sums over ranks, and the rest where there is any."""
        parts = [self._only([owned == flag for owned in self.owned]) for flag in (True, False)]
        return [part for part in parts if part.copies]

    def _only(self, chosen: Sequence[bool]) -> "Plan":
        pairs = [(c, o) for c, o, keep in zip(self.copies, self.owned, chosen, strict=True) if keep]
        return Plan([c for c, _ in pairs], {}, [o for _, o in pairs])

    def sources(self, weights: Mapping[str, Tensor]) -> list[Tensor]:
        """Returns the slices of `weights` (contiguous, by source name) in the order of `views`."""
        return [copy.slice_of(weights[copy.name]) for copy in self.copies]

    def is_stale(self, model: VllmModel) -> bool:
        """Returns whether the engine's tensors are elsewhere now, as sleeping may do: the views are of dead memory."""
        return self._pointers != {name: p.data_ptr() for name, p in model.named_parameters()}


class _Recorder(TorchDispatchMode):
    """Notes copies of stand-ins into parameters, and leaves both as they are."""

    def __init__(self, parameters: Mapping[int, tuple[str, Tensor]]):
        super().__init__()
        self.stand_ins: dict[int, str] = {}
        self.parameters = parameters
        self.copies: list[Copy] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
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
        self.copies.append(Copy(source, src.shape, src.stride(), int(src.storage_offset()), view))
        return dst


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@torch.no_grad()
def record_plan(model: VllmModel, shapes: Mapping[str, torch.Size], group: dist.ProcessGroup | None = None) -> Plan:
    """Returns the plan for a vLLM model and a policy whose weights have these names and shapes. group: the ranks that
    hold the model's tensor-parallel shards together, for objects of the CPU; all of them record at once and agree.

    Raises PlanError, on all ranks, if vLLM's loader skips a weight, transforms one, or leaves part of a parameter
    unwritten on any of them."""
    parameters = {name: p.data for name, p in model.named_parameters()}
    copies, complaint = list[Copy](), None
    try:
        copies = _record(model, shapes, parameters)
        _check_written(copies, parameters)
        if replaced := [name for name, p in model.named_parameters() if p.data_ptr() != parameters[name].data_ptr()]:
            raise PlanError(f"the loader puts another tensor in the place of {replaced[0]}")
    except PlanError as error:
        complaint = str(error)
    ranks = gather((complaint, [copy.slice for copy in copies]), group)
    for rank, (said, _) in enumerate(ranks):
        if said:
            raise PlanError(said if group is None else f"rank {rank}: {said}")
    slices = [set(taken) for _, taken in ranks]
    _check_taken(set().union(*slices), shapes, next(iter(parameters.values())).device)
    before = set().union(*slices[: 0 if group is None else dist.get_rank(group)])
    return Plan(copies, parameters, [copy.slice not in before for copy in copies])


def gather(value: Any, group: dist.ProcessGroup | None) -> list[Any]:
    """Returns the value of every rank of the group, in the order of ranks; [value] without one."""
    if group is None:
        return [value]
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def _record(model: VllmModel, shapes: Mapping[str, torch.Size], parameters: Mapping[str, Tensor]) -> list[Copy]:
    if len({_storage(p) for p in parameters.values()}) < len(parameters):
        raise PlanError("two parameters share one memory")
    any_parameter = next(iter(parameters.values()))
    recorder = _Recorder({_storage(p): (name, p) for name, p in parameters.items()})

    def stand_ins() -> Iterator[tuple[str, Tensor]]:
        """Yields real memory, as a slice is recognised by its address; one at a time, so that it is no second model."""
        for name, shape in shapes.items():
            stand_in = torch.empty(shape, dtype=any_parameter.dtype, device=any_parameter.device)
            recorder.stand_ins = {_storage(stand_in): name}
            yield name, stand_in

    try:
        with recorder:
            model.load_weights(stand_ins())
    except PlanError:
        raise
    except Exception as error:  # whatever a model's own loader raises on a name or shape it does not know
        raise PlanError(f"the loader stops with {type(error).__name__}: {error}") from error
    return recorder.copies


def _check_taken(slices: Iterable[tuple], shapes: Mapping[str, torch.Size], device: torch.device) -> None:
    """Checks that the ranks together take every element of every source."""
    taken: dict[str, list[Sequence]] = defaultdict(list)
    for name, *where in slices:
        taken[name].append(where)
    for name, shape in shapes.items():
        if (count := _count_covered(shape.numel(), taken[name], device)) != shape.numel():
            raise PlanError(f"the loader takes {count} of {shape.numel()} elements of {name}")


def _check_written(copies: Iterable[Copy], parameters: Mapping[str, Tensor]) -> None:
    """Checks that one copy writes each element of every parameter, and that random bits can be counted along copies."""
    written: dict[int, list[Tensor]] = defaultdict(list)
    for copy in copies:
        written[_storage(copy.view)].append(copy.view)
        if not _rows_are_even(copy.shape, copy.stride):
            raise PlanError(f"the loader transposes or reorders {copy.name}")
    for name, parameter in parameters.items():
        views = written[_storage(parameter)]
        written_once = sum(view.numel() for view in views)
        where = [(tuple(view.shape), view.stride(), view.storage_offset()) for view in views]
        covered = _count_covered(parameter.numel(), where, parameter.device)
        # a vocabulary is padded to whole tiles: rows behind the last word are never read
        padded = len(views) == 1 and views[0].shape[1:] == parameter.shape[1:] and views[0].storage_offset() == 0
        if covered != parameter.numel() and not (padded and ("embed" in name or "lm_head" in name)):
            raise PlanError(f"the loader writes {covered} of {parameter.numel()} elements of {name}")
        if written_once > covered:
            raise PlanError(f"the loader writes part of {name} twice")


def _rows_are_even(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Returns whether rows are contiguous and evenly far apart: they give the flat index in the source then."""
    dims = [(size, step) for size, step in zip(shape, stride, strict=True) if size > 1]
    if len(shape) and shape[-1] > 1:
        if dims[-1][1] != 1:
            return False
        dims = dims[:-1]
    return all(outer[1] == inner[0] * inner[1] for outer, inner in pairwise(dims))


def _count_covered(numel: int, slices: Sequence[Sequence], device: torch.device) -> int:
    """Returns how many of `numel` elements are in the slices (shape, stride, offset)."""
    if len(slices) == 1:
        return torch.Size(slices[0][0]).numel()
    marks = torch.zeros(numel, dtype=torch.bool, device=device)
    for shape, stride, offset in slices:
        marks.as_strided(shape, stride, offset).fill_(True)
    return int(marks.sum())


@torch.no_grad()
def check_plan(
    plan: Plan, model: VllmModel, shapes: Mapping[str, torch.Size], dtype: torch.dtype, sync: Callable,
    group: dist.ProcessGroup | None = None,
) -> None:  # fmt: skip
    """Checks that values written through the plan leave the same bits in all of the model as when vLLM loads them.
    It leaves the model with weights of no meaning; PlanError, on all ranks, where bits differ on one."""
    parameters = [p.data for p in model.parameters()]
    device = parameters[0].device

    def probe(seed: int) -> Iterator[tuple[str, Tensor]]:
        generator = torch.Generator(device).manual_seed(seed)
        for name, shape in shapes.items():
            yield name, torch.randn(shape, generator=generator, device=device, dtype=dtype)

    model.load_weights(probe(0))
    expected = checksums(parameters)
    for seed in (1, 0):
        for name, values in probe(seed):
            chosen = [copy for copy in plan.copies if copy.name == name]
            sync([copy.view for copy in chosen], [copy.slice_of(values) for copy in chosen])
    if not all(gather(torch.equal(expected, checksums(parameters)), group)):
        raise PlanError("what the plan writes is not what vLLM's own loader writes")
