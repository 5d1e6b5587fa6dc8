"""Host time of a call: our convolution against F.conv2d on a shape so small that the call itself is the cost."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from sepconv_ext import functional

from .timing import threads

CASES = {
    "depthwise 3x3": ((1, 8, 4, 4), (8, 1, 3, 3), 1, 8),
    "pointwise": ((1, 8, 2, 2), (8, 8, 1, 1), 0, 1),
    "grouped 3x3": ((1, 8, 4, 4), (8, 4, 3, 3), 1, 2),
}
CALLS = 200


def run(device: torch.device, advance: Callable[[str], None], seconds: float = 2.0) -> Iterator[dict]:
    """Yields the record's overhead rows; ``seconds`` for each of the len(CASES) * 2."""
    for name, (input_size, weight_size, padding, groups) in CASES.items():
        for training in (False, True):
            advance(name)
            x = torch.randn(input_size, device=device, requires_grad=True)
            w = torch.randn(weight_size, device=device, requires_grad=True)
            b = torch.randn(weight_size[0], device=device, requires_grad=True)
            calls = {
                who: _call(conv, (x, w, b, 1, padding, 1, groups), training)
                for who, conv in (("ours", functional.conv2d), ("torch", F.conv2d))
            }
            with torch.set_grad_enabled(training), threads(1):
                samples = _interleaved(calls, device, seconds)
            ours, theirs = (1e6 * statistics.median(samples[who]) for who in ("ours", "torch"))
            yield {
                "what": f"{name}, {'forward and backward' if training else 'forward under no_grad'}",
                "ours_us": ours,
                "torch_us": theirs,
                "ratio": ours / theirs,
                "samples_us": {who: [round(1e6 * s, 4) for s in part] for who, part in samples.items()},
            }


def _call(conv: Callable, arguments: tuple, training: bool) -> Callable[[], object]:
    if not training:
        return lambda: conv(*arguments)
    leaves = arguments[:3]
    ones = torch.ones_like(conv(*arguments))
    return lambda: torch.autograd.grad(conv(*arguments), leaves, ones)


def _interleaved(
    calls: dict[str, Callable[[], object]], device: torch.device, seconds: float
) -> dict[str, list[float]]:
    samples: dict[str, list[float]] = {who: [] for who in calls}
    # A CPU call stays in the thread that makes it, so its CPU time says all; a GPU's backward has a thread of its own.
    now = time.perf_counter if device.type == "cuda" else time.thread_time
    for call in calls.values():
        for _ in range(CALLS):
            call()
    end, order = time.perf_counter() + seconds, list(calls)
    while time.perf_counter() < end or len(samples[order[0]]) < 11:
        for who in order:
            call = calls[who]
            if device.type == "cuda":  # an empty queue: what is timed is the host's work, not waiting for room in it
                torch.cuda.synchronize()
            start = now()
            for _ in range(CALLS):
                call()
            samples[who].append((now() - start) / CALLS)
        order.reverse()
    return samples
