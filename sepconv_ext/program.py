"""The op `program` as torch's own machinery sees it, and how long its memory is kept.

``torch.ops.sepconv_ext.program(inputs, constants, code)`` runs a frozen network, or a part of one, in one call: CPU,
float32, inference. `code` is text, one line a step (csrc/cpu/network/program.h says how it is written), `constants` one
row of numbers with the packed weights. `sepconv_ext.freeze` writes both.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import _C

Size = tuple[int, ...]


@dataclass(frozen=True)
class Line:
    """One line of a program: `%target = kind %reads... name=value...`."""

    target: int
    kind: str
    reads: tuple[int, ...]
    fields: dict[str, str]

    def ints(self, name: str, default: str = "0") -> list[int]:
        return [int(number) for number in self.fields.get(name, default).split("x")]


@lru_cache(maxsize=256)
def parse(code: str) -> tuple[tuple[Line, ...], tuple[tuple[int, bool], ...]]:
    """The lines, and what is returned: (value, whether it is a matrix)."""
    lines: list[Line] = []
    results: tuple[tuple[int, bool], ...] = ()
    for text in filter(None, code.splitlines()):
        first, *words = text.split()
        if first == "return":
            pairs = zip(words[::2], words[1::2], strict=False)
            results = tuple((int(value[1:]), kind == "matrix") for value, kind in pairs)
            continue
        kind, *operands = words[1:]
        fields = dict(word.split("=") for word in operands if "=" in word)
        reads = [word for word in operands if word[0] == "%"]
        reads += [fields["residual"]] if "residual" in fields else []
        lines.append(Line(int(first[1:]), kind, tuple(int(value[1:]) for value in reads), fields))
    return tuple(lines), results


def _size(line: Line, inputs: Sequence[Size]) -> Size:
    """[N, C, H, W] of what a line writes."""
    N, C, *pixels = inputs[0]
    if line.kind == "mean":
        return (N, C, 1, 1)
    if line.kind in ("concat", "interleave"):
        return (N, sum(size[1] for size in inputs), *pixels)
    if line.kind == "slice":
        return (N, *line.ints("K"), *pixels)
    if line.kind not in _WINDOWS:
        return inputs[0]
    padding, around = line.ints("padding", "0x0x0x0"), [line.ints(*pair) for pair in _AROUND]
    out = []
    for i, (size, taps, stride, dilation) in enumerate(zip(pixels, *around, strict=True)):
        length = size + padding[2 * i] + padding[2 * i + 1] - dilation * (taps - 1) - 1
        count = length // stride + 1
        if "ceil" in line.fields and length % stride and count * stride < size + padding[2 * i]:
            count += 1
        out.append(count)
    return (N, line.ints("K")[0] if "K" in line.fields else C, *out)


_WINDOWS = ("product", "conv", "depthwise", "grouped", "max_pool", "mean_pool", "padded_mean_pool")
_AROUND = (("kernel", "1x1"), ("stride", "1x1"), ("dilation", "1x1"))


def _sizes(code: str, inputs: Sequence[Size]) -> Iterator[tuple[Line, Size, Size]]:
    """Each line with the sizes of its first operand and of what it writes."""
    sizes, given = {}, iter(inputs)
    for line in parse(code)[0]:
        if line.kind == "input":
            size = next(given)
            sizes[line.target] = (*size, 1, 1)[:4]
            continue
        read = [sizes[value] for value in line.reads]
        sizes[line.target] = _size(line, read)
        yield line, read[0], sizes[line.target]


@torch.library.register_fake("sepconv_ext::program")
def _(inputs: list[Tensor], constants: Tensor, code: str) -> list[Tensor]:
    sizes = {line.target: size for line, _, size in _sizes(code, [input.shape for input in inputs])}
    dtype, device = constants.dtype, constants.device
    return [
        torch.empty(sizes[value][:2], dtype=dtype, device=device)
        if is_matrix
        else torch.empty(sizes[value], memory_format=torch.channels_last, dtype=dtype, device=device)
        for value, is_matrix in parse(code)[1]
    ]


@register_flop_formula(torch.ops.sepconv_ext.program)
def _(inputs: list[Size], constants: Size, code: str, *_, **__) -> int:
    flops = 0
    for line, (_N, C, *_rest), size in _sizes(code, inputs):
        if line.kind in ("product", "conv", "depthwise", "grouped"):
            each = 1 if line.kind == "depthwise" else C // line.ints("groups", "1")[0]
            flops += 2 * math.prod(size) * each * math.prod(line.ints("kernel", "1x1"))
    return flops


class Lease:
    """For as long as one of these lives, the memory that a program's values lie in is kept from call to call.

    Copies, pickled ones too, are leases of their own.
    """

    def __init__(self, code: str) -> None:
        self.code = code
        _C.retain_program(code)
        weakref.finalize(self, _C.release_program, code)

    def __reduce__(self) -> tuple[type[Lease], tuple[str]]:
        return Lease, (self.code,)
