"""Names ranges on the timelines of torch's profiler and of Nsight Systems; this is free when off.

EEPO_RANGES=1 in the environment turns them on for a profiler of one's own.
"""

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import ParamSpec, TypeVar

import torch

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

_enabled = os.environ.get("EEPO_RANGES", "0") not in ("", "0")
_OFF = nullcontext()


def enable(on: bool) -> None:
    global _enabled
    _enabled = on


def named(name: str) -> AbstractContextManager:
    """Returns a context that is a range around what happens inside."""
    return _range(name) if _enabled else _OFF


@contextmanager
def _range(name: str) -> Iterator[None]:
    with torch.profiler.record_function(name):
        if not torch.cuda.is_available():
            yield
            return
        with torch.cuda.nvtx.range(name):
            yield


def ranged(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Makes every call a range of the function's name."""
    name = f"eepo_kernels.{function.__name__}"

    @functools.wraps(function)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        if not _enabled:
            return function(*args, **kwargs)
        with _range(name):
            return function(*args, **kwargs)

    return call
