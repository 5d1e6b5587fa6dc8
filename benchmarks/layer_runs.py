"""Times layers: for each layer, layout, thread count and map, all contenders in one interleaved contest."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from . import machine, peers
from .layers import MAPS, Layer, floor
from .peers import LAYOUTS, OURS, Operands
from .record import LOSING
from .timing import MAX_ROUNDS, Clock, Timing, threads


@dataclass
class Plan:
    """What to time, and how long."""

    layers: list[Layer]
    device: torch.device
    batch: int
    dtypes: list[torch.dtype]
    clock: Clock
    thread_counts: list[int]
    bandwidth: dict[int, dict[int, float]]  # by thread count: bytes of a copy -> bytes/s
    rate: dict[int, dict[str, float]]  # by thread count: dtype name -> operations/s
    maps: tuple[str, ...] = MAPS
    peers: tuple[str, ...] = ("torch",)
    budget: float = 0.25  # seconds a contest, at least `rounds` samples of everyone
    rounds: int = 5
    compile_seconds: float = 60.0  # for all torch.compile peers together; later layers go without, and say so
    compile_spent: float = field(default=0.0, init=False)

    @property
    def contests(self) -> list[list[str]]:
        """Layouts that stand in one contest."""
        names = list(LAYOUTS)
        return [names] if self.device.type == "cuda" else [[name] for name in names]

    def __len__(self) -> int:
        return len(self.layers) * len(self.dtypes) * len(self.contests) * len(self.thread_counts) * len(self.maps)


def run(plan: Plan, advance: Callable[[str], None]) -> Iterator[dict]:
    """Yields the record's rows (benchmarks/README.md), one per layer, dtype, layout, thread count and map."""
    for layer in plan.layers:
        for dtype in plan.dtypes:
            for layouts in plan.contests:
                per_call = layer.bytes_moved(plan.batch, dtype.itemsize, "forward")
                count = plan.clock.sets(per_call)
                sets = {layout: _operands(plan, layer, dtype, layout, count) for layout in layouts}
                for thread_count in plan.thread_counts:
                    with threads(thread_count), torch.no_grad():
                        for map in plan.maps:
                            advance(layer.label)
                            if peers.torch_crashes(layer, map, plan.device):
                                continue
                            yield from _contest(plan, layer, dtype, map, thread_count, sets)
                del sets
        if plan.device.type == "cuda":
            torch.cuda.empty_cache()


def _operands(plan: Plan, layer: Layer, dtype: torch.dtype, layout: str, count: int) -> list[Operands]:
    return [Operands.random(layer, plan.batch, dtype, layout, plan.device, seed) for seed in range(count)]


def _contest(plan: Plan, layer: Layer, dtype: torch.dtype, map: str, thread_count: int, sets: dict) -> Iterator[dict]:
    entrants, left_out = _contenders(plan, layer, map, sets)
    count = len(next(iter(sets.values())))
    # Correctness comes first, and with it the first, slow call of every shape.
    apart = {}
    for layout, operands in sets.items():
        expected = peers.torch_conv(layer, map, operands)(0)
        try:
            apart[layout] = peers.difference(entrants[f"{OURS} {layout}"](0), expected)
        except Exception:  # the measurement below meets it again and records it
            apart[layout] = float("inf")
        del expected
    timing = plan.clock.measure(entrants, count, plan.budget, plan.rounds)
    again = any(row_speedup(timing, layout) < LOSING for layout in sets)
    if again:  # longer, and on other memory: where operands lie is a chance of its own
        sets = {layout: _operands(plan, layer, dtype, layout, count) for layout in sets}
        entrants, left_out = _contenders(plan, layer, map, sets)
        timing = plan.clock.measure(entrants, count, 4 * plan.budget, 3 * plan.rounds, most=5 * MAX_ROUNDS)
    for layout, operands in sets.items():
        base = floor(
            layer,
            plan.batch,
            dtype.itemsize,
            map,
            machine.bandwidth_for(
                plan.bandwidth[thread_count], count * layer.bytes_moved(plan.batch, dtype.itemsize, map)
            ),
            plan.rate[thread_count][_name(dtype)],
        )
        mine, best = f"{OURS} {layout}", best_peer(timing)
        same = [name for name in timing.samples if name.endswith(f" {layout}") and not name.startswith(OURS)]
        seconds = {name: timing.seconds(name) for name in timing.samples}
        yield {
            "layer": layer.label,
            "kind": layer.kind,
            "models": list(layer.models),
            "count": layer.count,
            "input_size": list(layer.input_size(plan.batch)),
            "weight_size": list(layer.weight_size),
            "stride": list(layer.stride),
            "padding": list(layer.padding),
            "dilation": list(layer.dilation),
            "groups": layer.groups,
            "bias": layer.bias,
            "dtype": _name(dtype),
            "layout": layout,
            "map": map,
            "threads": thread_count,
            "seconds": seconds.get(mine),
            "best_peer": best,
            "best_peer_seconds": seconds.get(best),
            "speedup": _ratio(seconds.get(best), seconds.get(mine)),
            "speedup_same_layout": _ratio(min((seconds[name] for name in same), default=None), seconds.get(mine)),
            "bytes": base.bytes,
            "operations": base.operations,
            "floor_seconds": base.seconds,
            "bound": base.bound,
            "share_of_floor": _ratio(base.seconds, seconds.get(mine)),
            **peers.explain(layer, map, operands[0]),
            "difference": apart[layout],
            "agrees": apart[layout] <= peers.tolerance(dtype, operands[0].x.device),
            "measured_again": again,
            "rotated_sets": count,
            "samples_us": {name: [round(1e6 * s, 3) for s in samples] for name, samples in timing.samples.items()},
            "errors": {**timing.errors, **left_out},
        }


def _contenders(plan: Plan, layer: Layer, map: str, sets: dict) -> tuple[dict, dict[str, str]]:
    chosen, left_out = {}, {}
    if set(plan.peers) & set(peers.NEEDS_COMPILER):
        torch._dynamo.reset()  # else the recompile limit is met after a few layers
    for layout, operands in sets.items():
        chosen[f"{OURS} {layout}"] = peers.ours(layer, map, operands)
        for peer in plan.peers:
            name = f"{peer} {layout}"
            run = peers.MAKERS[peer](layer, map, operands)
            if run is None:
                continue
            if peer in peers.NEEDS_COMPILER:
                if plan.compile_spent > plan.compile_seconds:
                    left_out[name] = f"left out: the {plan.compile_seconds:g} s for compiling were spent"
                    continue
                start = time.perf_counter()
                try:
                    run(0)
                except Exception as error:
                    left_out[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
                    continue
                finally:
                    plan.compile_spent += time.perf_counter() - start
            chosen[name] = run
    return chosen, left_out


def best_peer(timing: Timing) -> str | None:
    """The fastest contender that is not ours."""
    names = [name for name in timing.samples if not name.startswith(OURS)]
    return min(names, key=timing.seconds, default=None)


def row_speedup(timing: Timing, layout: str) -> float:
    best, mine = best_peer(timing), f"{OURS} {layout}"
    return timing.seconds(best) / timing.seconds(mine) if best and mine in timing.samples else float("inf")


def _ratio(above: float | None, below: float | None) -> float | None:
    return above / below if above is not None and below else None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
