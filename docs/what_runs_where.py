"""Writes docs/what-runs-where.md by asking the plan, over a grid of calls: `python -m docs.what_runs_where`.

A cell tells which kernel runs on planes of which size. Nothing is computed: the tensors are never touched. A build
without CUDA kernels writes the CPU part anew and leaves the CUDA part as it stands.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Callable, Iterator
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
THREADS = 2
# An H100: the number of multiprocessors, and 90 for compute capability 9.0.
GPU = (132, 90)


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

    def call(self, N: int, plane: tuple[int, int], dtype: torch.dtype, layout: torch.memory_format) -> dict:
        """The arguments of `explain`. Memory that nobody writes to costs nothing."""
        input = torch.empty(N, self.C, *plane, dtype=dtype, memory_format=layout)
        weight = torch.empty(self.K, self.C // self.groups, *self.kernel, dtype=dtype)
        padding = [self.dilation * (k - 1) // 2 for k in self.kernel]
        pair = [1 if k == 1 and max(self.kernel) > 1 else self.stride for k in self.kernel]
        dilation = [self.dilation, self.dilation]
        return dict(
            input=input, weight=weight, bias=None, stride=pair, padding=padding, dilation=dilation, groups=self.groups
        )


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

Answer = Callable[..., str]


def short(kernel: str) -> str:
    name = kernel.removeprefix("cpu_")
    return "ATen" if name == "aten" else f"`{name}`"


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


def by_layout(title: str, layers: tuple[Layer, ...], N: int, dtypes: tuple[torch.dtype, ...], ask: Answer) -> list[str]:
    """One table for each layout and each dtype; dtypes with the same table share it."""
    parts = []
    for layout_name, layout in LAYOUTS.items():
        tables: dict[str, list[str]] = {}
        for dtype in dtypes:
            lines = []
            for layer in layers:
                cells = []
                for map in MAPS:
                    answers = [(plane, ask(map, layer.call(N, plane, dtype, layout))) for plane in layer.planes]
                    cells.append(cell(answers))
                lines.append((layer.name, *cells))
            text = table(" | ".join(["layer", *MAPS.values()]), lines)
            tables.setdefault(text, []).append(str(dtype).removeprefix("torch."))
        parts += [f"### {title}, {layout_name}, {' and '.join(names)}\n\n{text}" for text, names in tables.items()]
    return parts


def cpu_pairs() -> str:
    """The fourth op, by layout and dtype; "two calls" have plans of their own."""
    lines = []
    for layout_name, layout in LAYOUTS.items():
        for layer in PAIRS:
            cells = []
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                answers = []
                for plane in layer.planes:
                    call = Layer("", kernel=layer.kernel, stride=layer.stride).call(8, plane, dtype, layout)
                    pointwise = torch.empty(layer.K, layer.C, 1, 1, dtype=dtype)
                    answer = explain_separable(
                        call["input"], call["weight"], pointwise, stride=call["stride"], padding=call["padding"]
                    )
                    answers.append((plane, "two calls" if answer.kernel == "composite" else short(answer.kernel)))
                cells.append(cell(answers))
            lines.append((layer.name, layout_name, *cells))
    head = "pair | layout | float32 | bfloat16 | float16, float64"
    return f"### CPU, depthwise and 1x1 in one\n\n{table(head, lines)}"


@contextlib.contextmanager
def as_users_run() -> Iterator[None]:
    """Not strict, and with the number of threads that the page names; afterwards as before."""
    threads, strict = torch.get_num_threads(), sepconv_ext._C.strict()
    sepconv_ext._C.set_strict(False)
    torch.set_num_threads(THREADS)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        sepconv_ext._C.set_strict(strict)


def cpu_part() -> str:
    def ask(map: str, call: dict) -> str:
        return short(sepconv_ext.explain(**call, map=map).kernel)

    with as_users_run():
        return "\n\n".join([*by_layout("CPU", LAYERS, 8, DTYPES, ask), cpu_pairs()])


def cuda_part() -> str:
    def ask(map: str, call: dict) -> str:
        return short(sepconv_ext._C.explain(map, **call, cuda_device=GPU).kernel)

    with as_users_run():
        return "\n\n".join(by_layout("GPU", LAYERS, 32, DTYPES, ask))


def parts_of(text: str) -> dict[str, str]:
    """The generated parts of the page, which stand between comments that name them."""
    return dict(re.findall(r"<!-- (\w+): generated -->\n(.*?)\n<!-- end -->", text, re.S))


def replaced(text: str, name: str, part: str) -> str:
    pattern = rf"(<!-- {name}: generated -->\n).*?(\n<!-- end -->)"
    return re.sub(pattern, lambda match: match[1] + part + match[2], text, flags=re.S)


def main() -> None:
    text = replaced(PAGE.read_text(), "cpu", cpu_part())
    if sepconv_ext.has_cuda():
        text = replaced(text, "cuda", cuda_part())
    else:
        print("This build has no CUDA kernels: the GPU tables stay as they are.")
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
