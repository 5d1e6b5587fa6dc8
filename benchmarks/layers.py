"""The layers to time: layers.csv read, their geometry, the work that they cannot avoid, and the floor that follows."""

from __future__ import annotations

import csv
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

CSV = Path(__file__).with_name("layers.csv")
HALVES = ("bars", "learnt", "held-out")  # the first 17 networks; what the plan may be fitted to besides; the rest
KINDS = ("depthwise", "pointwise", "grouped")
MAPS = ("forward", "grad_input", "grad_weight")
SHORT = {"depthwise": "dw", "pointwise": "pw", "grouped": "gr"}

# The networks of the model benchmark, by their names in layers.csv.
REPRESENTED = (
    "mobilenet_v2",
    "mobilenet_v3_large",
    "efficientnet_b0",
    "convnext_tiny",
    "resnext50_32x4d",
    "legacy_xception@299",
)


@dataclass(frozen=True)
class Layer:
    """One distinct convolution shape, and the networks that have it."""

    kind: str
    in_channels: int
    out_channels: int
    height: int
    width: int
    kernel_h: int
    kernel_w: int
    stride_h: int
    stride_w: int
    pad_h: int
    pad_w: int
    dilation_h: int
    dilation_w: int
    groups: int
    bias: bool
    models: tuple[str, ...] = ()
    count: int = 1  # how often the shape occurs, over all of `models`

    @property
    def stride(self) -> tuple[int, int]:
        return self.stride_h, self.stride_w

    @property
    def padding(self) -> tuple[int, int]:
        return self.pad_h, self.pad_w

    @property
    def dilation(self) -> tuple[int, int]:
        return self.dilation_h, self.dilation_w

    @property
    def out_height(self) -> int:
        reach = self.dilation_h * (self.kernel_h - 1) + 1
        return (self.height + 2 * self.pad_h - reach) // self.stride_h + 1

    @property
    def out_width(self) -> int:
        reach = self.dilation_w * (self.kernel_w - 1) + 1
        return (self.width + 2 * self.pad_w - reach) // self.stride_w + 1

    @property
    def weight_size(self) -> tuple[int, int, int, int]:
        return self.out_channels, self.in_channels // self.groups, self.kernel_h, self.kernel_w

    def input_size(self, batch: int) -> tuple[int, int, int, int]:
        return batch, self.in_channels, self.height, self.width

    def output_size(self, batch: int) -> tuple[int, int, int, int]:
        return batch, self.out_channels, self.out_height, self.out_width

    @property
    def label(self) -> str:
        """Short name, unique among the rows of layers.csv: ``dw3x3 s2 96 @112x112``."""
        channels = str(self.in_channels)
        if self.out_channels != self.in_channels:
            channels += f">{self.out_channels}"
        if self.kind == "grouped":
            channels += f"/g{self.groups}"
        stride = f" s{self.stride_h}" if self.stride != (1, 1) else ""
        stride += f"x{self.stride_w}" if self.stride_w != self.stride_h else ""
        dilation = f" d{self.dilation_h}" if self.dilation != (1, 1) else ""
        usual = tuple(d * (k // 2) for d, k in zip(self.dilation, (self.kernel_h, self.kernel_w), strict=True))
        padding = f" p{self.pad_h}x{self.pad_w}" if self.padding != usual else ""
        bias = " +b" if self.bias else ""
        kernel = f"{SHORT[self.kind]}{self.kernel_h}x{self.kernel_w}"
        return f"{kernel}{stride}{dilation}{padding} {channels} @{self.height}x{self.width}{bias}"

    def macs(self, batch: int) -> int:
        """Multiply-accumulates of each of the three maps. Taps that fall on the padding are not counted: nobody has to
        multiply by them, and on a 7x7 plane under a 13x13 kernel they are two thirds of all."""
        rows = _taps(self.height, self.out_height, self.kernel_h, self.stride_h, self.pad_h, self.dilation_h)
        columns = _taps(self.width, self.out_width, self.kernel_w, self.stride_w, self.pad_w, self.dilation_w)
        return batch * self.out_channels * (self.in_channels // self.groups) * rows * columns

    def bytes_moved(self, batch: int, itemsize: int, map: str) -> int:
        """Bytes of each operand read once and the result written once (the bias counts in the forward map only).

        A strided 1x1 kernel reads only the pixels it uses, but its input gradient is written whole."""
        input_elements = batch * self.in_channels * self.height * self.width
        if map != "grad_input":
            input_elements = batch * self.in_channels * self._rows_used() * self._columns_used()
        output_elements = batch * self.out_channels * self.out_height * self.out_width
        weight_elements = self.out_channels * (self.in_channels // self.groups) * self.kernel_h * self.kernel_w
        bias_elements = self.out_channels if self.bias and map == "forward" else 0
        return itemsize * (input_elements + output_elements + weight_elements + bias_elements)

    def _rows_used(self) -> int:
        args = (self.height, self.out_height, self.kernel_h, self.stride_h, self.pad_h, self.dilation_h)
        return len({row for row, _ in _touched(*args)})

    def _columns_used(self) -> int:
        args = (self.width, self.out_width, self.kernel_w, self.stride_w, self.pad_w, self.dilation_w)
        return len({column for column, _ in _touched(*args)})


def _touched(size: int, out: int, kernel: int, stride: int, pad: int, dilation: int) -> list[tuple[int, int]]:
    """Every (input position, output position) pair along one axis that a tap joins inside the image."""
    pairs = ((p * stride + r * dilation - pad, p) for p in range(out) for r in range(kernel))
    return [(position, p) for position, p in pairs if 0 <= position < size]


def _taps(size: int, out: int, kernel: int, stride: int, pad: int, dilation: int) -> int:
    return len(_touched(size, out, kernel, stride, pad, dilation))


@dataclass(frozen=True)
class Floor:
    """The least time that one map of one layer can take on a machine whose data comes from memory."""

    bytes: int
    operations: int
    seconds: float
    bound: str  # "memory" or "arithmetic"


def floor(layer: Layer, batch: int, itemsize: int, map: str, bandwidth: float, rate: float) -> Floor:
    """``max(bytes / bandwidth, operations / rate)``, with bandwidth in bytes/s and rate in operations/s."""
    moved, operations = layer.bytes_moved(batch, itemsize, map), 2 * layer.macs(batch)
    memory, arithmetic = moved / bandwidth, operations / rate
    bound = "memory" if memory >= arithmetic else "arithmetic"
    return Floor(moved, operations, max(memory, arithmetic), bound)


def load(path: Path = CSV, half: str = "bars") -> list[Layer]:
    """Every distinct layer of one part of layers.csv in file order; networks that share a shape share one Layer."""
    shapes: dict[tuple, tuple[list[str], int]] = {}
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            names, kind, count = row.pop("model").split(), row.pop("kind"), int(row.pop("count"))
            if row.pop("half") != half:
                continue
            shape = (kind, *(int(value) for value in row.values()))
            models, total = shapes.get(shape, ([], 0))
            shapes[shape] = ([*models, *names], total + count)
    return [
        Layer(*shape[:-1], bias=bool(shape[-1]), models=tuple(models), count=count)
        for shape, (models, count) in shapes.items()
    ]


def drawn(layers: list[Layer], count: int, seed: int = 0) -> list[Layer]:
    """Some of them, always the same, in their order."""
    chosen = set(random.Random(seed).sample(range(len(layers)), min(count, len(layers))))
    return [layer for i, layer in enumerate(layers) if i in chosen]


def select(layers: Iterable[Layer], kinds: Iterable[str] = KINDS, everything: bool = False) -> list[Layer]:
    """The layers of those kinds: all, or the representative ones.

    Representative: of the six networks of the model benchmark, the layer of most and of least work in each family of
    equal kind, kernel and stride (1x1 images, as in squeeze-and-excitation, are a family of their own)."""
    layers = [layer for layer in layers if layer.kind in tuple(kinds)]
    if everything:
        return layers
    families: dict[tuple, list[Layer]] = {}
    for layer in layers:
        if set(layer.models) & set(REPRESENTED):
            one_pixel = layer.height * layer.width == 1
            key = (layer.kind, layer.kernel_h, layer.kernel_w, layer.stride, one_pixel)
            families.setdefault(key, []).append(layer)
    chosen = set()
    for family in families.values():
        ranked = sorted(family, key=lambda layer: layer.macs(1))
        chosen |= {ranked[0], ranked[-1]}
    return [layer for layer in layers if layer in chosen]
