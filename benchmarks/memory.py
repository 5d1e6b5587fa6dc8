"""How much memory a call takes: on a GPU as the caching allocator counts it, on a CPU by the profiler's events."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile


def memory_of(run: Callable[[int], object], device: torch.device) -> tuple[int, int]:
    """(the most memory that a call takes at a time, what its result holds on to), in bytes beyond those of before.

    Call ``run`` once before: a first call may allocate what stays."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = run(0)
        torch.cuda.synchronize()
        found = torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before
        del result
        return found
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        result = run(0)
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    del result
    return most, now
