"""How a time is taken: contenders run interleaved, over rotating buffers, and the median counts.

A contender is a function of one index: it runs once on the operand set of that number. Every call takes the next set,
so that its operands left the L2 cache long ago. On a CPU the places of the results are dealt anew in every round, and a
sample is the time of enough calls to fill 0.2 ms: the thread's own CPU time where one thread works, which other
processes cannot lengthen, and wall-clock time where several do. On a GPU it is the time between two events around the
replay of a CUDA graph that holds one call per set, so no host time is in it.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

Contender = Callable[[int], object]

MAX_ROUNDS = 40  # of a contest that says nothing else
MAX_SETS = 64


@dataclass
class Timing:
    """Seconds per call of every contender: the samples in the order taken, and what went wrong with the others."""

    samples: dict[str, list[float]] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)

    def seconds(self, name: str) -> float:
        return statistics.median(self.samples[name])

    def joined(self, more: Timing) -> Timing:
        """The samples of both, of those that ran in both."""
        both = {name: [*taken, *more.samples[name]] for name, taken in self.samples.items() if name in more.samples}
        return Timing(both, self.errors | more.errors)


class CpuClock:
    """Times on the processor, with torch's thread count as it is."""

    sample_seconds = 2e-4

    def __init__(self) -> None:
        self.l2_bytes = _cpu_l2_bytes()

    def sets(self, bytes_per_call: int) -> int:
        return min(MAX_SETS, math.ceil(2 * self.l2_bytes / max(1, bytes_per_call)))

    def measure(
        self,
        contenders: Mapping[str, Contender],
        sets: int = 1,
        budget: float = 0.25,
        rounds: int = 5,
        graph: bool = True,
        most: int = MAX_ROUNDS,
    ) -> Timing:
        """``rounds`` to ``most`` samples of each contender, as ``budget`` seconds allow. ``graph`` is for GPUs."""
        now = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
        timing = Timing()
        turn = _Turn(sets)
        calls: dict[str, int] = {}
        cost = 0.0
        for name, run in contenders.items():
            try:
                once = self._once(run, turn, now)
                if once < 0.05:  # a first call may be slow for reasons of its own; a long one says enough
                    once = self._once(run, turn, now)
            except Exception as error:  # a peer that cannot run is a line in the record, not the end of the run
                timing.errors[name] = _one_line(error)
                continue
            calls[name] = max(1, math.ceil(self.sample_seconds / once))
            cost += calls[name] * once
            timing.samples[name] = []
        order = list(timing.samples)
        for _ in range(_rounds(budget, cost, rounds, most)):
            obstacles = _obstacles(turn)
            for name in order:
                run = contenders[name]
                start = now()
                for _ in range(calls[name]):
                    run(turn.next())
                timing.samples[name].append((now() - start) / calls[name])
            order.reverse()  # nobody always runs after the same neighbour
            del obstacles
        return timing

    @staticmethod
    def _once(run: Contender, turn: _Turn, now: Callable[[], float]) -> float:
        start = now()
        run(turn.next())
        return max(now() - start, 1e-9)


class CudaClock:
    """Times on the current GPU."""

    def __init__(self) -> None:
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        self.l2_bytes = getattr(properties, "L2_cache_size", 0) or 50 << 20

    def sets(self, bytes_per_call: int) -> int:
        return max(2, min(MAX_SETS, math.ceil(4 * self.l2_bytes / max(1, bytes_per_call))))

    def measure(
        self,
        contenders: Mapping[str, Contender],
        sets: int = 1,
        budget: float = 0.25,
        rounds: int = 5,
        graph: bool = True,
        most: int = MAX_ROUNDS,
    ) -> Timing:
        """As on the CPU. ``graph=False`` times eager calls, host time included where it is the longer."""
        timing = Timing()
        replays: dict[str, Callable[[], object]] = {}
        cost = 0.0
        for name, run in contenders.items():
            try:
                replays[name] = self._captured(run, sets) if graph else self._eager(run, sets)
                self._sample(replays[name])
                cost += self._sample(replays[name])
                timing.samples[name] = []
            except Exception as error:
                timing.errors[name] = _one_line(error)
                torch.cuda.synchronize()
        order = list(timing.samples)
        for _ in range(_rounds(budget, cost, rounds, most)):
            for name in order:
                timing.samples[name].append(self._sample(replays[name]) / sets)
            order.reverse()
        return timing

    @staticmethod
    def _sample(replay: Callable[[], object]) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3

    @staticmethod
    def _captured(run: Contender, sets: int) -> Callable[[], object]:
        # Warm-up on a side stream first: cudnn.benchmark searches, and libraries allocate, on the first calls.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for index in range(3):
                run(index % sets)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = [run(index) for index in range(sets)]

        def replay(
            kept: object = results,
        ) -> None:  # the results are kept: each call writes to memory of its own
            graph.replay()

        return replay

    @staticmethod
    def _eager(run: Contender, sets: int) -> Callable[[], object]:
        def replay() -> None:
            for index in range(sets):
                run(index)

        replay()
        return replay


Clock = CpuClock | CudaClock


def clock_for(device: torch.device) -> Clock:
    return CudaClock() if device.type == "cuda" else CpuClock()


@contextmanager
def threads(count: int):
    """torch's intra-op thread count inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _obstacles(turn: _Turn) -> list[torch.Tensor]:
    """Blocks of random size, to hold for one round.

    Where malloc puts a result decides whether the call has to fault its pages in (measured: none or 6,272 faults a
    call, a third of its time). Left alone, that place stays the same for a whole contest, and one contender pays with
    every call; other blocks in the way in every round deal the places anew.
    """
    return [torch.empty(turn.random.randrange(1 << 16, 1 << 24), dtype=torch.uint8) for _ in range(2)]


class _Turn:
    def __init__(self, sets: int) -> None:
        self.sets, self.index = sets, -1
        self.random = random.Random(sets)

    def next(self) -> int:
        self.index = (self.index + 1) % self.sets
        return self.index


def _rounds(budget: float, cost: float, least: int, most: int) -> int:
    """How many rounds fit in the budget: an odd number from ``least`` to ``most``, so that a median is a sample."""
    fitting = budget / cost if cost > 0 else least
    return int(max(least, min(most, fitting))) | 1


def _one_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:200]


def _cpu_l2_bytes() -> int:
    """The L2 caches of all cores together, as Linux tells; 4 MiB where it does not."""
    caches = {}
    for index in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cache/index2"):
        try:
            caches[(index / "shared_cpu_list").read_text()] = int((index / "size").read_text().strip().rstrip("K"))
        except (OSError, ValueError):
            continue
    return sum(caches.values()) << 10 or 4 << 20
