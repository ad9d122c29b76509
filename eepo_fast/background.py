"""What runs beside sampling: a thread and a queue for it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext

import torch

from eepo_fast.policy.micro_batches import input_length
from eepo_fast.types import Rollout


@functools.cache
def side_stream(name: str) -> torch.cuda.Stream:
    """One for all iterations: what PyTorch's allocator keeps it keeps for a stream."""
    return torch.cuda.Stream()


SPARE_BYTES = 1 << 30  # left to the engine: its sampling step asks for memory of its own


class Background:
    """A thread, with a CUDA stream of its own on a GPU; or no thread, and work is done when it is given."""

    def __init__(self, name: str, *, threaded: bool, on_gpu: bool = True):
        """on_gpu: whether it is the GPU's work, where there is one."""
        on_gpu = on_gpu and threaded and torch.cuda.is_available()
        self.stream = side_stream(name) if on_gpu else None
        device = torch.cuda.current_device() if on_gpu else None
        enter = (lambda: torch.cuda.set_device(device)) if on_gpu else None  # a new thread's is the first
        self.pool = ThreadPoolExecutor(1, name, initializer=enter) if threaded else None
        self.pending: list[Future] = []

    def run(self, work: Callable, *arguments) -> None:
        if self.pool is None:
            work(*arguments)
        else:
            self.pending.append(self.pool.submit(self._run, work, *arguments))

    def _run(self, work: Callable, *arguments) -> None:
        with torch.cuda.stream(self.stream) if self.stream else nullcontext():
            work(*arguments)
        self.synchronize()

    def synchronize(self) -> None:
        """Until its stream has done what it was given."""
        if self.stream is not None:
            self.stream.synchronize()

    def has_room(self, num_bytes: float) -> bool:
        """Can its stream have so much, and the engine beside it what a step takes? What PyTorch keeps for the stream
        counts as free; what it keeps for others does not."""
        if self.stream is None:
            return True
        kept = 0
        for segment in torch.cuda.memory_snapshot():
            if segment["stream"] == self.stream.cuda_stream:
                kept += segment["total_size"] - segment["allocated_size"]
        return num_bytes + SPARE_BYTES <= torch.cuda.mem_get_info()[0] + kept

    def wait(self) -> None:
        """For all that was given; raises what it raised."""
        for future in self.pending:
            future.result()
        self.pending.clear()

    def close(self) -> None:
        """What has not begun is not begun; nothing goes on behind."""
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)


class TokenQueue:
    """Completions in batches of at most so many tokens, in the order in which they come."""

    def __init__(self, most: int, give: Callable[[list[Rollout]], None]):
        self.most, self.give = most, give
        self.waiting: list[Rollout] = []
        self.num_tokens = 0

    def put(self, rollout: Rollout) -> None:
        length = input_length(rollout)
        if self.waiting and self.num_tokens + length > self.most:
            batch, self.waiting, self.num_tokens = self.waiting, [], 0
            self.give(batch)
        self.waiting.append(rollout)
        self.num_tokens += length

    def drop(self, rollouts: Sequence[Rollout]) -> None:
        """Of them, what has not been given yet."""
        dropped = set(map(id, rollouts))
        self.waiting = [r for r in self.waiting if id(r) not in dropped]
        self.num_tokens = sum(map(input_length, self.waiting))
