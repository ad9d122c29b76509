"""The memory that a piece of code asks for on a CPU, counted allocation by allocation."""

from typing import NamedTuple

from torch.profiler import ProfilerActivity, profile


class Allocations(NamedTuple):
    peak_bytes: int
    """Most bytes alive at once, beyond what was there before."""
    largest_bytes: int


def count_allocations(run) -> Allocations:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as prof:
        run()
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    assert sizes, "the profiler saw no allocation"
    alive = peak = 0
    for size in sizes:
        alive += size
        peak = max(peak, alive)
    return Allocations(peak, max(sizes))
