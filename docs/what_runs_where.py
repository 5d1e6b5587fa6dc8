"""Writes docs/what-runs-where.md by asking the plan, over a grid of calls: `python -m docs.what_runs_where`.

A cell tells which kernel runs on planes of which size. Nothing is computed. The CPU's plan is asked through
`sepconv_ext.explain`. The GPU's is the plan*.cpp of csrc/cuda compiled by g++, as the tests have it; it needs no GPU.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import sepconv_ext
from sepconv_ext.functional import explain_separable

PAGE = Path(__file__).resolve().parent / "what-runs-where.md"
MAPS = {"forward": "forward", "grad_input": "gradient by the input", "grad_weight": "gradient by the weight"}
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PLANES = ((7, 7), (14, 14), (28, 28), (56, 56), (112, 112))
CPU_BATCH, THREADS = 8, 2
GPU_BATCH, H100 = 32, {"multiprocessors": 132, "sm": 90}


@dataclass(frozen=True)
class Layer:
    """A line of a table: one layer on planes of several sizes (H, W)."""

    name: str
    C: int = 96
    K: int = 96
    kernel: tuple[int, int] = (3, 3)
    stride: int = 1
    dilation: int = 1
    groups: int = 96
    planes: tuple[tuple[int, int], ...] = PLANES

    @property
    def padding(self) -> tuple[int, int]:
        return tuple(self.dilation * (k - 1) // 2 for k in self.kernel)


@dataclass(frozen=True)
class Call:
    layer: Layer
    plane: tuple[int, int]
    dtype: torch.dtype
    layout: str
    map: str = "forward"


# The kernel's name for each call.
Ask = Callable[[Sequence[Call]], list[str]]


LAYERS = (
    Layer("3x3"),
    Layer("3x3, stride 2", stride=2),
    Layer("3x3, dilation 2", dilation=2),
    Layer("3x3, 12 channels", C=12, K=12, groups=12),
    Layer("3x3, 24 channels", C=24, K=24, groups=24),
    Layer("3x3, stride 2, 480 channels", C=480, K=480, groups=480, stride=2),
    Layer("3x3, multiplier 2", K=192),
    Layer("5x5", kernel=(5, 5)),
    Layer("5x5, stride 2", kernel=(5, 5), stride=2),
    Layer("7x7", kernel=(7, 7)),
    Layer("13x13", kernel=(13, 13)),
    Layer("31x31", kernel=(31, 31)),
    Layer("sequences, 4 taps", C=256, K=256, groups=256, kernel=(1, 4), planes=((1, 128), (1, 2048))),
    Layer("3x3, 4 channels a group", C=128, K=128, groups=32),
    Layer("3x3, 16 channels a group", C=128, K=128, groups=8),
    Layer("3x3, 32 channels a group", C=128, K=128, groups=4),
    Layer("3x3, dense", groups=1),
    Layer("1x1, 96 to 24", K=24, groups=1, kernel=(1, 1), planes=((1, 1), *PLANES)),
)
PAIRS = (
    Layer("3x3, then 96 to 24", K=24),
    Layer("3x3, then 96 to 192", K=192),
    Layer("3x3 stride 2, then 96 to 192", K=192, stride=2),
    Layer("5x5, then 96 to 192", K=192, kernel=(5, 5)),
    Layer("7x7, then 96 to 192", K=192, kernel=(7, 7)),
)


def short(kernel: str) -> str:
    if kernel in ("aten", "composite"):
        return {"aten": "ATen", "composite": "two calls"}[kernel]
    return f"`{kernel.removeprefix('cpu_').removeprefix('cuda_')}`"


def cell(answers: list[tuple[tuple[int, int], str]]) -> str:
    """Runs of planes with the same answer: "`blocked` to 14, `planes` from 28"."""
    runs = [
        (name, [plane for plane, _ in group]) for name, group in itertools.groupby(answers, key=lambda each: each[1])
    ]
    if len(runs) == 1:
        return runs[0][0]
    texts = []
    for index, (name, planes) in enumerate(runs):
        first, last = planes[0][1], planes[-1][1]
        if index == len(runs) - 1:
            size = f"from {first}"
        elif index == 0:
            size = f"to {last}"
        else:
            size = f"{first}" if first == last else f"{first} to {last}"
        texts.append(f"{name} {size}")
    return ", ".join(texts)


def table(head: str, lines: list[tuple[str, ...]]) -> str:
    columns = head.count("|") + 1
    return "\n".join([f"| {head} |", "|" + " --- |" * columns, *(f"| {' | '.join(line)} |" for line in lines)])


def by_layout(device: str, ask: Ask) -> list[str]:
    """One table for each layout and each dtype; dtypes with the same table share it."""
    parts = []
    for layout in LAYOUTS:
        tables: dict[str, list[str]] = {}
        for dtype in DTYPES:
            calls = [
                Call(layer, plane, dtype, layout, map) for layer in LAYERS for map in MAPS for plane in layer.planes
            ]
            answers = iter(zip(calls, ask(calls), strict=True))
            lines = []
            for layer in LAYERS:
                size = len(layer.planes)
                cells = [[(c.plane, kernel) for c, kernel in itertools.islice(answers, size)] for _ in MAPS]
                lines.append((layer.name, *map(cell, cells)))
            text = table(" | ".join(["layer", *MAPS.values()]), lines)
            tables.setdefault(text, []).append(dtype_name(dtype))
        parts += [f"### {device}, {layout}, {' and '.join(names)}\n\n{text}" for text, names in tables.items()]
    return parts


def pairs(device: str, ask: Ask) -> str:
    """The depthwise and the 1x1 convolution in one; two calls have plans of their own."""
    lines = []
    for layout, layer in itertools.product(LAYOUTS, PAIRS):
        calls = [Call(layer, plane, dtype, layout) for dtype in DTYPES for plane in layer.planes]
        answers = iter(zip(calls, ask(calls), strict=True))
        size = len(layer.planes)
        cells = [[(c.plane, kernel) for c, kernel in itertools.islice(answers, size)] for _ in DTYPES]
        lines.append((layer.name, layout, *map(cell, cells)))
    head = " | ".join(["pair", "layout", *map(dtype_name, DTYPES)])
    return f"### {device}, depthwise and 1x1 in one\n\n{table(head, lines)}"


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@contextlib.contextmanager
def as_users_run() -> Iterator[None]:
    """Not strict, with the threads and the kernels of oneDNN's that the page names; afterwards as before."""
    threads, strict = torch.get_num_threads(), sepconv_ext._C.strict()
    half = sepconv_ext._C.set_half_kernels(True, False)
    sepconv_ext._C.set_strict(False)
    torch.set_num_threads(THREADS)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        sepconv_ext._C.set_strict(strict)
        sepconv_ext._C.set_half_kernels(*half)


def cpu_tensors(call: Call) -> dict:
    """The arguments that both ways to ask share. Memory that nobody writes to costs nothing."""
    layer = call.layer
    input = torch.empty(CPU_BATCH, layer.C, *call.plane, dtype=call.dtype, memory_format=LAYOUTS[call.layout])
    geometry = dict(stride=layer.stride, padding=layer.padding, dilation=layer.dilation)
    return dict(input=input, **geometry)


def ask_cpu(calls: Sequence[Call]) -> list[str]:
    answers = []
    for call in calls:
        layer = call.layer
        weight = torch.empty(layer.K, layer.C // layer.groups, *layer.kernel, dtype=call.dtype)
        plan = sepconv_ext.explain(weight=weight, groups=layer.groups, map=call.map, **cpu_tensors(call))
        answers.append(short(plan.kernel))
    return answers


def ask_cpu_pairs(calls: Sequence[Call]) -> list[str]:
    answers = []
    for call in calls:
        depthwise = torch.empty(call.layer.C, 1, *call.layer.kernel, dtype=call.dtype)
        pointwise = torch.empty(call.layer.K, call.layer.C, 1, 1, dtype=call.dtype)
        plan = explain_separable(depthwise_weight=depthwise, pointwise_weight=pointwise, **cpu_tensors(call))
        answers.append(short(plan.kernel))
    return answers


def gpu_case(call: Call) -> dict:
    """The call as tests/emulator takes it; of a pair, its depthwise part."""
    layer = call.layer
    (H, W), (R, S), (top, left) = call.plane, layer.kernel, layer.padding
    shape = dict(N=GPU_BATCH, C=layer.C, H=H, W=W, K=layer.K, R=R, S=S, groups=layer.groups)
    geometry = dict(stride=f"{layer.stride},{layer.stride}", dilation=f"{layer.dilation},{layer.dilation}")
    layout = "contiguous" if call.layout == "NCHW" else call.layout
    settings = dict(strict=0, map=call.map, dtype=dtype_name(call.dtype), layout=layout)
    return settings | shape | geometry | dict(padding=f"{top},{top},{left},{left}") | H100


def gpu_pair(call: Call) -> dict:
    return gpu_case(call) | dict(op="separable", K=call.layer.C, outputs=call.layer.K)


def emulator():
    """tests/emulator/emulate.py, which compiles the plan."""
    folder = str(PAGE.parent.parent / "tests" / "emulator")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    import emulate

    return emulate


def ask_gpu(calls: Sequence[Call], case: Callable[[Call], dict] = gpu_case) -> list[str]:
    lines = [[f"{key}={value}" for key, value in case(call).items()] for call in calls]
    return [short(kernel) for kernel in emulator().planned_kernels(lines)]


def ask_gpu_pairs(calls: Sequence[Call]) -> list[str]:
    return ask_gpu(calls, gpu_pair)


def cpu_part() -> str:
    with as_users_run():
        return "\n\n".join([*by_layout("CPU", ask_cpu), pairs("CPU", ask_cpu_pairs)])


def gpu_part() -> str:
    return "\n\n".join([*by_layout("GPU", ask_gpu), pairs("GPU", ask_gpu_pairs)])


def parts_of(text: str) -> dict[str, str]:
    """The generated parts of the page, which stand between comments that name them."""
    return dict(re.findall(r"<!-- (\w+): generated -->\n(.*?)\n<!-- end -->", text, re.S))


def replaced(text: str, name: str, part: str) -> str:
    pattern = rf"(<!-- {name}: generated -->\n).*?(\n<!-- end -->)"
    return re.sub(pattern, lambda match: match[1] + part + match[2], text, flags=re.S)


def main() -> None:
    text = replaced(PAGE.read_text(), "cpu", cpu_part())
    if reason := emulator().why_not():
        print(f"The GPU tables stay as they are: {reason}")
    else:
        text = replaced(text, "gpu", gpu_part())
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
