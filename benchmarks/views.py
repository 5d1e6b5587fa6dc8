"""Tensors that are not dense: ours against torch on the same view, and against a dense copy followed by our own call.

One operand of a call is a view: an input sliced, cropped, stepped or expanded, or a gradient as autograd makes them
behind `sum`, `mean`, `flatten` and `cat`. The others are dense. No view may be slower than VIEW_BAR times either peer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

import sepconv_ext

from . import peers
from .layers import MAPS, Layer
from .peers import LAYOUTS, OURS, Operands, difference, tolerance
from .record import LOSING
from .timing import MAX_ROUNDS, Clock, Contender, Timing, threads

Size = tuple[int, int, int, int]


def _layer(kind: str, c: int, k: int, size: int, kernel: int, stride: int = 1, groups: int | None = None) -> Layer:
    half = kernel // 2
    groups = c if groups is None else groups
    return Layer(kind, c, k, size, size, kernel, kernel, stride, stride, half, half, 1, 1, groups, True)


# A layer of each family, small enough that a table of all views takes minutes.
LAYERS = (
    _layer("depthwise", 116, 116, 28, 3),
    _layer("depthwise", 96, 96, 28, 3, stride=2),
    _layer("depthwise", 240, 240, 14, 5),
    _layer("depthwise", 96, 96, 14, 7),
    _layer("depthwise", 960, 960, 7, 3),
    _layer("depthwise", 32, 64, 28, 3),
    Layer("depthwise", 640, 640, 1, 512, 1, 4, 1, 1, 0, 3, 1, 1, 640, True),  # a causal sequence
    _layer("grouped", 128, 128, 14, 3, groups=32),
    _layer("pointwise", 64, 128, 28, 1, groups=1),
    _layer("pointwise", 32, 32, 7, 1, groups=1),
)


@dataclass(frozen=True)
class View:
    """How a tensor of a given size comes to be a view. `stepped` fits images of several rows only."""

    name: str
    make: Callable[[Callable[[Size], Tensor], Size], Tensor]  # from dense tensors of any size
    operand: str  # x or g
    other_layout: bool = False
    several_rows: bool = False


def _grown(size: Size, by: Size, times: Size = (1, 1, 1, 1)) -> Size:
    n, c, h, w = (extent * factor + more for extent, factor, more in zip(size, times, by, strict=True))
    return n, c, h, w


def _half_the_channels(dense: Callable[[Size], Tensor], size: Size) -> Tensor:
    return dense(_grown(size, (0, 0, 0, 0), (1, 2, 1, 1)))[:, size[1] :]


def _crop(dense: Callable[[Size], Tensor], size: Size) -> Tensor:
    if size[2] == 1:
        return dense(_grown(size, (0, 0, 0, 2)))[..., 1:-1]
    return dense(_grown(size, (0, 0, 2, 2)))[..., 1:-1, 1:-1]


VIEWS = (
    View("half the channels", _half_the_channels, "x"),
    View("crop", _crop, "x"),
    View("every other image", lambda dense, s: dense(_grown(s, (0, 0, 0, 0), (2, 1, 1, 1)))[::2], "x"),
    View("every other row", lambda dense, s: dense(_grown(s, (0, 0, 0, 0), (1, 1, 2, 1)))[:, :, ::2], "x", False, True),
    View("every other column", lambda dense, s: dense(_grown(s, (0, 0, 0, 0), (1, 1, 1, 2)))[..., ::2], "x"),
    View("expanded batch", lambda dense, s: dense((1, *s[1:])).expand(s), "x"),
    View("behind sum", lambda dense, s: dense((1, 1, 1, 1)).expand(s), "g"),
    View("behind mean", lambda dense, s: dense((s[0], s[1], 1, 1)).expand(s), "g"),
    View("other layout", lambda dense, s: dense(s), "g", True),
    View("slice of a cat", _half_the_channels, "g"),
)

OTHER = {"nchw": "channels_last", "channels_last": "nchw"}


@dataclass
class Plan:
    """What to time, and how long."""

    clock: Clock
    device: torch.device
    layers: tuple[Layer, ...]
    dtypes: list[torch.dtype]
    thread_counts: list[int]
    maps: tuple[str, ...] = MAPS
    batch: int = 4
    budget: float = 0.03
    rounds: int = 5

    def cases(self) -> Iterator[tuple[Case, View, str, torch.dtype]]:
        for op in (*(LayerCase(layer) for layer in self.layers), Separable(), Spatial()):
            for dtype in self.dtypes:
                for layout in LAYOUTS:
                    for view in VIEWS:
                        if op.operands == "x" and view.operand == "g":
                            continue
                        if not view.several_rows or op.layer.height > 1:
                            yield op, view, layout, dtype

    def __len__(self) -> int:
        return len(self.thread_counts) * sum(1 for _ in self.cases())


class Case:
    """An op: its layer's sizes, and its calls by map."""

    operands = "xg"
    layer: Layer
    label: str

    def maps(self, view: View) -> tuple[str, ...]:
        return ("forward", "grad_weight") if view.operand == "x" else ("grad_input", "grad_weight")

    def ours(self, map: str, sets: list[Operands]) -> Contender:
        raise NotImplementedError

    def torchs(self, map: str, sets: list[Operands]) -> Contender:
        raise NotImplementedError

    def explain(self, map: str, operands: Operands) -> dict:
        return {"kernel": "", "reason": ""}


class LayerCase(Case):
    def __init__(self, layer: Layer) -> None:
        self.layer, self.label = layer, layer.label

    def ours(self, map: str, sets: list[Operands]) -> Contender:
        return peers.ours(self.layer, map, sets)

    def torchs(self, map: str, sets: list[Operands]) -> Contender:
        return peers.torch_conv(self.layer, map, sets)

    def explain(self, map: str, operands: Operands) -> dict:
        said = peers.explain(self.layer, map, operands)
        return {"kernel": said["kernel"], "reason": said["reason"]}


class Separable(Case):
    """Depthwise, relu, 1x1 in one call; the layer is its depthwise one."""

    operands = "x"
    layer = _layer("depthwise", 64, 64, 28, 3)
    label = "separable 64>96 @28x28"

    def maps(self, view: View) -> tuple[str, ...]:
        return ("forward",)

    def _pointwise(self, o: Operands) -> Tensor:
        return torch.linspace(-1, 1, 96 * 64).to(o.x.dtype).view(96, 64, 1, 1)

    def ours(self, map: str, sets: list[Operands]) -> Contender:
        pointwise = self._pointwise(sets[0])

        def run(i: int) -> Tensor:
            o = sets[i]
            return sepconv_ext.functional.separable_conv2d(
                o.x, o.w, pointwise, o.b, padding=1, depthwise_activation="relu"
            )

        return run

    def torchs(self, map: str, sets: list[Operands]) -> Contender:
        pointwise = self._pointwise(sets[0])

        def run(i: int) -> Tensor:
            o = sets[i]
            return F.conv2d(F.conv2d(o.x, o.w, o.b, 1, 1, 1, 64).relu_(), pointwise)

        return run


class Spatial(Case):
    """A column and a row filter of five taps over every channel."""

    operands = "x"
    layer = _layer("depthwise", 64, 64, 28, 5)
    label = "spatial 5+5 64 @28x28"

    def maps(self, view: View) -> tuple[str, ...]:
        return ("forward",)

    def ours(self, map: str, sets: list[Operands]) -> Contender:
        def run(i: int) -> Tensor:
            o = sets[i]
            return sepconv_ext.functional.spatial_separable_conv2d(o.x, o.w[:, 0, :, 0], o.w[:, 0, 0], padding=2)

        return run

    def torchs(self, map: str, sets: list[Operands]) -> Contender:
        def run(i: int) -> Tensor:
            o = sets[i]
            between = F.conv2d(o.x, o.w[..., :1], None, 1, (2, 0), 1, 64)
            return F.conv2d(between, o.w[..., :1, :], None, 1, (0, 2), 1, 64)

        return run


def run(plan: Plan, advance: Callable[[str], None]) -> Iterator[dict]:
    """Yields one row per op, map, view, layout, dtype and thread count."""
    for case, view, layout, dtype in plan.cases():
        sets = _operands(plan, case, view, layout, dtype)
        for thread_count in plan.thread_counts:
            advance(f"{case.label}, {view.name}")
            with threads(thread_count), torch.no_grad():
                for map in case.maps(view):
                    if map in plan.maps:
                        yield _contest(plan, case, view, layout, map, thread_count, sets)


def _operands(plan: Plan, case: Case, view: View, layout: str, dtype: torch.dtype) -> list[Operands]:
    layer = case.layer
    count = plan.clock.sets(layer.bytes_moved(plan.batch, dtype.itemsize, "forward"))
    sets = []
    for seed in range(count):
        operands = Operands.random(layer, plan.batch, dtype, layout, plan.device, seed)
        generator = torch.Generator(plan.device).manual_seed(1000 + seed)
        memory_format = LAYOUTS[OTHER[layout] if view.other_layout else layout]

        def dense(size: Size, generator=generator, memory_format=memory_format) -> Tensor:
            values = torch.randn(size, generator=generator, device=plan.device).to(dtype)
            return torch.empty(size, dtype=dtype, device=plan.device, memory_format=memory_format).copy_(values)

        viewed = view.make(dense, getattr(operands, view.operand).shape)
        sets.append(replace(operands, **{view.operand: viewed}))
    return sets


def _contenders(case: Case, view: View, layout: str, map: str, sets: list[Operands]) -> dict[str, Contender]:
    memory_format = LAYOUTS[layout]
    copies = list(sets)
    call = case.ours(map, copies)

    def copy_then_call(i: int) -> Tensor:
        image = getattr(sets[i], view.operand)
        copy = torch.empty_like(image, memory_format=memory_format).copy_(image)
        copies[i] = replace(sets[i], **{view.operand: copy})
        return call(i)

    return {OURS: case.ours(map, sets), "copied": copy_then_call, "torch": case.torchs(map, sets)}


def _contest(plan: Plan, case: Case, view: View, layout: str, map: str, thread_count: int, sets: list) -> dict:
    entrants = _contenders(case, view, layout, map, sets)
    dtype = sets[0].x.dtype
    apart = difference(entrants[OURS](0).float(), _exact(case, map, sets[0]))
    timing = plan.clock.measure(entrants, len(sets), plan.budget, plan.rounds)
    again = min(up for up in (*_speedups(timing), 1e9) if up is not None) < LOSING
    if again:  # longer, before it is called a loss; the median is of all rounds, whatever the first ones said
        longer = plan.clock.measure(entrants, len(sets), 20 * plan.budget, 9 * plan.rounds, most=10 * MAX_ROUNDS)
        timing = timing.joined(longer)
    over_copy, over_torch = _speedups(timing)
    return {
        "layer": case.label,
        "map": map,
        "view": f"{'input' if view.operand == 'x' else 'grad_output'} {view.name}",
        "layout": layout,
        "dtype": str(dtype).removeprefix("torch."),
        "threads": thread_count,
        "seconds": _seconds(timing, OURS),
        "copied_seconds": _seconds(timing, "copied"),
        "torch_seconds": _seconds(timing, "torch"),
        "over_copy": over_copy,
        "over_torch": over_torch,
        **case.explain(map, sets[0]),
        "difference": apart,
        "agrees": apart <= tolerance(dtype, sets[0].x.device),
        "measured_again": again,
        "errors": timing.errors,
    }


def _exact(case: Case, map: str, operands: Operands) -> Tensor:
    """torch's result in float32 on dense tensors: on views, and in bfloat16, its own kernels are not always right."""
    o = operands
    dense = Operands(*(None if t is None else t.float().contiguous() for t in (o.x, o.w, o.b, o.g)))
    return case.torchs(map, [dense])(0)


def _seconds(timing: Timing, name: str) -> float | None:
    return timing.seconds(name) if name in timing.samples else None


def _speedups(timing: Timing) -> tuple[float | None, float | None]:
    """Over the copy and over torch; None where one of the two cannot run."""
    mine, copied, torchs = (_seconds(timing, name) for name in (OURS, "copied", "torch"))
    return tuple(None if peer is None or mine is None else peer / mine for peer in (copied, torchs))
