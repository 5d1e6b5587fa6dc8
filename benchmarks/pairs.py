"""Depthwise-separable pairs: one call of separable_conv2d against two of conv2d and against torch, and what each needs.

The pairs are the depthwise layers of layers.csv that a 1x1 convolution follows there, with relu after both. Forward is
timed; a training step (forward and backward) is timed and its memory measured: with the intermediate computed again
(the default), kept (save_intermediate=True), and by torch's layers.
"""

from __future__ import annotations

import csv
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sepconv_ext import functional

from .layers import CSV
from .memory import memory_of
from .peers import LAYOUTS, difference, tolerance
from .timing import Clock, threads

MODELS = ("mobilenetv1_100", "mobilenet_v2", "legacy_xception@299")


@dataclass(frozen=True)
class Pair:
    """A depthwise layer and the pointwise one that follows it. Sizes as in layers.csv."""

    channels: int
    outputs: int
    size: int  # height and width of the input
    kernel: int
    stride: int
    padding: int

    @property
    def label(self) -> str:
        stride = f" s{self.stride}" if self.stride > 1 else ""
        return f"sep{self.kernel}x{self.kernel}{stride} {self.channels}>{self.outputs} @{self.size}x{self.size}"


def load(models: tuple[str, ...] = MODELS) -> list[Pair]:
    """Every distinct pair of these networks, in file order."""
    with open(CSV, newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["model"] in models]
    pairs = []
    for first, second in itertools.pairwise(rows):
        if (first["kind"], second["kind"]) == ("depthwise", "pointwise") and first["model"] == second["model"]:
            names = ("in_channels", "height", "kernel_h", "stride_h", "pad_h")
            channels, size, kernel, stride, padding = (int(first[name]) for name in names)
            if int(second["in_channels"]) == channels:
                pairs.append(Pair(channels, int(second["out_channels"]), size, kernel, stride, padding))
    return list(dict.fromkeys(pairs))


def representative(pairs: list[Pair]) -> list[Pair]:
    """Of each kernel and stride the pair of least memory between the stages, and one in the middle."""
    families: dict[tuple, list[Pair]] = {}
    for pair in pairs:
        families.setdefault((pair.kernel, pair.stride), []).append(pair)
    chosen = set()
    for family in families.values():
        ranked = sorted(family, key=lambda pair: pair.channels * (pair.size // pair.stride) ** 2)
        chosen |= {ranked[0], ranked[len(ranked) // 2]}
    return [pair for pair in pairs if pair in chosen]


@dataclass
class Plan:
    """What to time, and how long."""

    pairs: list[Pair]
    device: torch.device
    batch: int
    dtypes: list[torch.dtype]
    clock: Clock
    thread_counts: list[int]
    budget: float = 0.25
    rounds: int = 5

    def __len__(self) -> int:
        return len(self.pairs) * len(self.dtypes) * len(LAYOUTS) * len(self.thread_counts)


def run(plan: Plan, advance: Callable[[str], None]) -> Iterator[dict]:
    """Yields the record's rows (benchmarks/README.md), two (forward, training) per pair, dtype, layout and threads."""
    for pair in plan.pairs:
        for dtype in plan.dtypes:
            for layout in LAYOUTS:
                tensors = _tensors(pair, plan.batch, dtype, layout, plan.device)
                for count in plan.thread_counts:
                    advance(pair.label)
                    with threads(count):
                        yield from _rows(plan, pair, tensors, layout, count)
                del tensors
        if plan.device.type == "cuda":
            torch.cuda.empty_cache()


def _tensors(pair: Pair, batch: int, dtype: torch.dtype, layout: str, device: torch.device) -> dict[str, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    sizes = {
        "x": (batch, pair.channels, pair.size, pair.size),
        "w": (pair.channels, 1, pair.kernel, pair.kernel),
        "v": (pair.outputs, pair.channels, 1, 1),
    }
    fan_in = {"x": 1, "w": pair.kernel**2, "v": pair.channels}
    found = {}
    for name, size in sizes.items():
        values = torch.randn(size, generator=generator, device=device) * fan_in[name] ** -0.5
        found[name] = values.to(dtype).contiguous(memory_format=LAYOUTS[layout])
    return found


def _calls(pair: Pair) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    geometry = {"stride": pair.stride, "padding": pair.padding}
    relu = {"depthwise_activation": "relu", "pointwise_activation": "relu"}

    def two(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        between = functional.depthwise_conv2d(x, w, activation="relu", **geometry)
        return functional.pointwise_conv2d(between, v, activation="relu")

    def theirs(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        return F.relu(F.conv2d(F.relu(F.conv2d(x, w, groups=pair.channels, **geometry)), v))

    def one(x: Tensor, w: Tensor, v: Tensor, keep: bool = False) -> Tensor:
        return functional.separable_conv2d(x, w, v, **geometry, **relu, save_intermediate=keep)

    return {
        "sepconv": one,
        "sepconv kept": lambda x, w, v: one(x, w, v, keep=True),
        "sepconv, two calls": two,
        "torch": theirs,
    }


def _rows(plan: Plan, pair: Pair, tensors: dict[str, Tensor], layout: str, count: int) -> Iterator[dict]:
    x, w, v = tensors.values()
    calls = _calls(pair)
    with torch.no_grad():
        output = calls["torch"](x, w, v)
        apart = difference(calls["sepconv"](x, w, v), output)
    grad = torch.ones_like(output)
    leaves = tuple(tensor.detach().requires_grad_() for tensor in (x, w, v))

    def step(call: Callable[..., Tensor]) -> Callable[[int], object]:
        return lambda index: torch.autograd.grad(call(*leaves), leaves, grad)

    def forward(call: Callable[..., Tensor]) -> Callable[[int], object]:
        return lambda index: call(x, w, v)

    names = {
        "forward": ("sepconv", "sepconv, two calls", "torch"),
        "training": ("sepconv", "sepconv kept", "sepconv, two calls", "torch"),
    }
    for mode, contenders in names.items():
        make = forward if mode == "forward" else step
        runs = {name: make(calls[name]) for name in contenders}
        with torch.set_grad_enabled(mode == "training"):
            for run in runs.values():
                run(0)
            memory = {name: memory_of(run, plan.device)[0] for name, run in runs.items()}
            held = {name: memory_of(lambda index, call=calls[name]: call(*leaves), plan.device)[1] for name in runs}
            timing = plan.clock.measure(runs, 1, plan.budget, plan.rounds, graph=mode == "forward")
        seconds = {name: timing.seconds(name) for name in timing.samples}
        ours, peer = seconds.get("sepconv"), seconds.get("torch")
        yield {
            "layer": pair.label,
            "mode": mode,
            "input_size": list(x.shape),
            "outputs": pair.outputs,
            "dtype": str(x.dtype).removeprefix("torch."),
            "layout": layout,
            "threads": count,
            "seconds": ours,
            "best_peer": "torch",
            "best_peer_seconds": peer,
            "speedup": peer / ours if ours and peer else None,
            "seconds_of": seconds,
            "peak_bytes": memory,
            "held_bytes": held,
            "difference": apart,
            "agrees": apart <= tolerance(x.dtype, x.device),
            "samples_us": {name: [round(1e6 * s, 3) for s in samples] for name, samples in timing.samples.items()},
            "errors": timing.errors,
        }
