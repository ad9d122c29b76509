"""Faults that were there, to be put back: each is a context in which the program has it again."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from eepo_kernels import row_stats

from eepo_fast.policy import attention, micro_batches, plain
from eepo_fast.run import build


@contextmanager
def replaced(owner, name: str, value) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def whole_gradients():
    """∇L of a micro-batch is made whole beside the sum."""

    def add(self, loss) -> None:
        found = torch.autograd.grad(loss, list(self.parameters.values()), allow_unused=True)
        if self.tensors:
            torch._foreach_add_(list(self.tensors.values()), found)
        else:
            self.tensors = dict(zip(self.parameters, found, strict=True))

    return replaced(plain.PlainGradient, "add", add)


def foreach_adamw():
    make = plain.make_optimizer
    return replaced(plain, "make_optimizer", lambda *arguments, fused: make(*arguments, fused=False))


def autocast_cache():
    autocast = torch.autocast
    return replaced(torch, "autocast", lambda *arguments, cache_enabled=True, **more: autocast(*arguments, **more))


def two_dtypes():
    """Queries and keys in fp32 meet values in 16 bits."""
    return replaced(attention, "_one_dtype", lambda *tensors: tensors)


def unaligned():
    return replaced(row_stats, "_aligned", lambda t: t.contiguous())


def unpinned():
    return replaced(micro_batches, "move", lambda t, device: t.to(device))


def whole_copy():
    """The reference is copied whole on the host before it is moved."""

    def copied(model, device, dtype):
        return copy.deepcopy(model).requires_grad_(False).to(device)

    return replaced(build, "frozen_copy", copied)


def flops_by_pytorch_alone():
    import bench_iteration

    counter = bench_iteration.FlopCounterMode
    return replaced(bench_iteration, "FlopCounterMode", lambda display, **_: counter(display=display))


def baseline_on_the_host():
    randn = torch.randn
    return replaced(torch, "randn", lambda *size, device=None, **more: randn(*size, **more))


FAULTS = {
    f.__name__: f
    for f in (
        whole_gradients, foreach_adamw, autocast_cache, two_dtypes, unaligned, unpinned, whole_copy,
        flops_by_pytorch_alone, baseline_on_the_host,
    )
}  # fmt: skip
