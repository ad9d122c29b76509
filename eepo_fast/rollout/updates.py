"""The weights of a vLLM model are updated in one of two ways: in place through a recorded plan, or, where no plan
holds, in a copy of the policy's weights that vLLM then loads anew.

Weights and gradients are whole tensors in the policy's shapes, by the policy's names, of any floating dtype. Checksums
are int64 [T], one for each of the T tensors of `held`.
"""

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any, Protocol

import torch
import torch.distributed as dist
from eepo_kernels import ForgetStats, checksums, forget, sync, tensor_key
from torch import Tensor
from torch.cuda import Stream
from transformers import PreTrainedModel

from eepo_fast.rollout.engine import Named
from eepo_fast.rollout.families import as_saved, is_saved_one_by_one, persistent_buffers
from eepo_fast.rollout.start_vllm import on_own_stream
from eepo_fast.rollout.weights import VllmModel, check_plan, gather, record_plan
from eepo_fast.types import EngineError

Shapes = Mapping[str, torch.Size]


class Updater(Protocol):
    """The engine asks this of either way. An update returns the checksums that it must have left."""

    @property
    def num_weights(self) -> int:
        """Returns how many elements a forget step has to read and write on this rank."""

    def find_weights(self) -> None:
        """Finds the weights again if their memory has moved."""

    def sync(self, buckets: Iterable[Named]) -> Tensor:
        """Writes all weights, each once; a bucket is written before the next is asked for."""

    def forget(self, gradient: Named, *, eta: float, rounding: str, seed: int, step: int) -> tuple[ForgetStats, Tensor]:
        """Takes a step on all weights, as `eepo_kernels.forget` does."""

    def held(self) -> list[tuple[str, Tensor]]:
        """Returns what this rank's kernels read, each tensor with what a message calls it."""


class InPlace:
    """Writes every slice of a weight to where vLLM's kernels read it, as recorded in the plan."""

    def __init__(self, model: VllmModel, shapes: Shapes, dtype: torch.dtype, group: dist.ProcessGroup | None):
        """Raises PlanError, on all ranks of the group, if no plan holds; leaves vLLM's model without meaningful values.
        The group has the ranks that hold the model together; None is this rank alone."""
        self._model, self._shapes, self._group = model, shapes, group
        self.plan = record_plan(model, shapes, group)
        check_plan(self.plan, model, shapes, dtype, sync, group)
        self.num_weights = sum(view.numel() for view in self.plan.views)

    def find_weights(self) -> None:
        if any(gather(self.plan.is_stale(self._model), self._group)):
            before = [copy.slice for copy in self.plan.copies]
            self.plan = record_plan(self._model, self._shapes, self._group)  # a PlanError here ends the run
            assert [copy.slice for copy in self.plan.copies] == before, "the loader takes other slices than before"

    def sync(self, buckets: Iterable[Named]) -> Tensor:
        sums: dict[tuple, Tensor] = {}
        for bucket in buckets:
            part = self.plan.restricted_to(bucket)
            sources = part.sources(bucket)
            sync(part.views, sources)
            expected = checksums(sources, [view.dtype for view in part.views])
            sums.update(zip((copy.slice for copy in part.copies), expected, strict=True))
        missing = [copy.name for copy in self.plan.copies if copy.slice not in sums]
        assert not missing, f"a sync without {missing[0]}"
        return torch.stack([sums[copy.slice] for copy in self.plan.copies])

    def forget(self, gradient: Named, *, eta: float, rounding: str, seed: int, step: int) -> tuple[ForgetStats, Tensor]:
        """Launches once; with tensor parallelism once more for slices that another rank counts, and sums over ranks."""
        sums, num_weights = [], 0
        for part in self.plan.by_ownership() if self._group else [self.plan]:
            stats = forget(
                part.views, part.sources(gradient), eta=eta, keys=part.keys, offsets=part.offsets,
                row_strides=part.row_strides, rounding=rounding, seed=seed, step=step,
            )  # fmt: skip
            num_weights += stats.num_weights
            if part.owned[0]:
                sums.append(stats.sums)
        if self._group is not None:
            total = sum((part.cpu() for part in sums), torch.zeros(4, dtype=torch.float64))
            dist.all_reduce(total, group=self._group)
            stats = ForgetStats(total, num_weights)
        return stats, checksums(self.plan.views)

    def held(self) -> list[tuple[str, Tensor]]:
        return [(copy.name, copy.view) for copy in self.plan.copies]


class Reload:
    """Updates a copy of the policy's weights, and has vLLM load all of it with its layerwise reload."""

    def __init__(
        self, llm: Any, model: VllmModel, policy: PreTrainedModel, shapes: Shapes, dtype: torch.dtype,
        stream: Stream | None,
    ):  # fmt: skip
        """Takes the `vllm.LLM` that holds the model and runs on the stream, and the policy's model, for its buffers,
        which never change, and for what its family's checkpoints call its weights: vLLM knows no other names."""
        self._llm, self._model, self._policy, self.stream = llm, model, policy, stream
        device = next(model.parameters()).device
        self.weights = {name: torch.empty(shape, dtype=dtype, device=device) for name, shape in shapes.items()}
        self.buffers = {name: buffer.to(device, copy=True) for name, buffer in persistent_buffers(policy).items()}
        self.num_weights = sum(weight.numel() for weight in self.weights.values())

    @cached_property
    def _one_by_one(self) -> bool:
        """Whether each weight can be converted alone, so that what is converted is no second model."""
        return is_saved_one_by_one(self._policy, {n: t.shape for n, t in (self.weights | self.buffers).items()})

    def find_weights(self) -> None:
        """Does nothing: vLLM knows where it loads to."""

    def sync(self, buckets: Iterable[Named]) -> Tensor:
        written: set[str] = set()
        for bucket in buckets:
            sync([self.weights[name] for name in bucket], list(bucket.values()))
            written.update(bucket)
        assert written == self.weights.keys()
        return self.reload()

    def forget(self, gradient: Named, *, eta: float, rounding: str, seed: int, step: int) -> tuple[ForgetStats, Tensor]:
        stats = forget(
            list(self.weights.values()), [gradient[name] for name in self.weights], eta=eta,
            keys=[tensor_key(name) for name in self.weights], offsets=[0] * len(self.weights),
            rounding=rounding, seed=seed, step=step,
        )  # fmt: skip
        return stats, self.reload()

    @on_own_stream
    def reload(self) -> Tensor:
        """Has vLLM load the copy, and returns the checksums of what is there then; EngineError if it took too few, or
        cannot."""
        taken = []

        def weights() -> Iterator[tuple[str, Tensor]]:
            everything = self.weights | self.buffers
            for part in [{n: t} for n, t in everything.items()] if self._one_by_one else [everything]:
                yield from as_saved(self._policy, part).items()
                taken.extend(part)

        try:
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights()})
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a model's own loader raises on a name or shape it does not know
            kind, name = type(error).__name__, next(iter([*self.weights][len(taken) :]), "its buffers")
            raise EngineError(f"vLLM's loader stops at {name} with {kind}: {error}; use rollout.engine=hf") from error
        if len(taken) != (num_all := len(self.weights) + len(self.buffers)):
            raise EngineError(f"vLLM's reload took {len(taken)} of {num_all} weights")
        if not torch.cuda.is_available():
            self._pack_experts()
        return checksums([tensor for _, tensor in self.held()])

    def _pack_experts(self) -> None:
        """Puts experts into the layout that a CPU's kernels read: vLLM's reload (0.32) leaves them as it has loaded
        them, when it is not the first."""
        for module in self._model.modules():
            if kernel := getattr(getattr(module, "quant_method", None), "moe_kernel", None):
                kernel.fused_experts.process_weights_after_loading(module)

    def held(self) -> list[tuple[str, Tensor]]:
        return [("its parameters", p.data) for p in self._model.parameters()]
