"""Tells a process of a run who it is and what the others have. One process alone communicates with nobody.

Values on the CPU go over gloo, whatever the devices: they are few, and a rank that still samples must not run into the
time limit of a device's collective.
"""

import heapq
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist

from eepo_fast.types import UserError

log = logging.getLogger(__name__)

TIMEOUT = timedelta(hours=4)  # over gloo: longer than a rollout whose longest answer is on another rank
DEVICE_TIMEOUT = timedelta(minutes=30)  # of devices' collectives, which ranks enter together; a lost node ends them


class SupportsClose(Protocol):
    def close(self) -> None: ...


@dataclass(frozen=True)
class World:
    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    """The group of all ranks, for values on the CPU."""
    on_micro_batch: Callable[[], None] = lambda: None
    """Is called at each micro-batch, of which every rank has as many."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """Returns every rank's value, in the ranks' order, on every rank. It pickles them: trusted processes only."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def total(self, values: Sequence[float]) -> list[float]:
        """Returns the sums over the ranks, in float64."""
        if self.size == 1:
            return list(values)
        sums = torch.tensor(list(values), dtype=torch.float64)
        dist.all_reduce(sums, group=self.group)
        return sums.tolist()

    def check(self, error: UserError | None) -> None:
        """Raises on all ranks what any of them found, the first rank's first."""
        for message in self.gather(str(error) if error else None):
            if message:
                raise UserError(message, shared=True)

    @contextmanager
    def agree(self) -> Iterator[None]:
        """Raises on all ranks a UserError that is raised inside on some, so that none waits for another. Nothing inside
        may wait for the other ranks."""
        error = None
        try:
            yield
        except UserError as found:
            if found.shared:
                raise
            error = found
        self.check(error)

    def __enter__(self) -> "World":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        """Closes the process groups, whatever ends the block."""
        try:
            close_groups(failed=kind is not None)
        except Exception as found:
            if kind is None:
                raise
            log.warning("process groups: not closed in order: %s", found)  # the block's own error is raised

    @contextmanager
    def closing(self, engine: SupportsClose) -> Iterator[None]:
        """Closes the engine after the block, however that ends. Where it fails and GPUs are many, the engine is left to
        the end of this process: one that is spread over them ends its groups in order, and would wait for ranks that
        will not come; the world aborts all groups."""
        try:
            yield
        except BaseException:
            if self.size == 1 or not torch.cuda.is_available():
                try:
                    engine.close()
                except Exception as found:
                    log.warning("the engine: not closed in order: %s", found)  # the block's own error is raised
            raise
        engine.close()

    def wait(self) -> None:
        if self.size > 1:
            dist.barrier(group=self.group)

    @property
    def store(self) -> dist.Store | None:
        """Returns what all ranks can read and write; None for one alone."""
        return dist.distributed_c10d._get_default_store() if self.size > 1 else None


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def launched_ranks() -> int:
    """Returns how many processes torchrun, or a launcher that sets the same variables, has started; 1 without."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def start_world() -> World:
    """Joins the other processes of torchrun, if there are any, and takes this rank's device. As a context manager the
    world closes its process groups, whichever way it is left."""
    # else deepspeed, where it is installed, says what it found
    os.environ.setdefault("DS_ACCELERATOR", default_device().type)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if launched_ranks() == 1:
        return World()
    listen_on_loopback()
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=DEVICE_TIMEOUT)
    try:
        group = dist.new_group(backend="gloo", timeout=TIMEOUT)
    except BaseException:  # another rank has left already
        close_groups(failed=True)
        raise
    return World(dist.get_rank(), dist.get_world_size(), group)


def close_groups(*, failed: bool = False) -> None:
    """Ends every process group of this process. failed: other ranks may be inside a collective that this one will not
    join; a device's is aborted then, for its orderly end would wait for them."""
    if not dist.is_initialized():  # an engine that shuts down may have ended them
        return
    if failed and torch.cuda.is_available():
        dist.distributed_c10d._abort_process_group()
    else:
        dist.destroy_process_group()


def listen_on_loopback() -> None:
    """Keeps sockets on the loopback where all ranks are on this machine: nobody else has to reach them."""
    if os.environ.get("LOCAL_WORLD_SIZE", "1") == str(launched_ranks()):
        os.environ.setdefault("VLLM_HOST_IP", "127.0.0.1")
        if sys.platform == "linux":
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


def lone_group() -> None:
    """Makes a process group of this process alone, for libraries that want one."""
    os.environ.setdefault("LOCAL_RANK", "0")
    if not dist.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def deal(costs: Sequence[float], num_hands: int) -> list[list[int]]:
    """Deals the costs' indices to `num_hands` hands of nearly equal sums: the largest first, each to the smallest hand.
    Equal input gives equal output, on every rank."""
    hands: list[list[int]] = [[] for _ in range(num_hands)]
    smallest = [(0.0, 0, i) for i in range(num_hands)]
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        total, count, hand = heapq.heappop(smallest)
        hands[hand].append(index)
        heapq.heappush(smallest, (total + costs[index], count + 1, hand))
    return hands
