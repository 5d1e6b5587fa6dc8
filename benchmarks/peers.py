"""Who is timed: sepconv_ext's three maps and every other way of getting the same tensors out of torch.

A contender's name is what it is and the layout it works in, "torch nchw" for instance. On a CPU each layout is a
contest of its own (oneDNN in the same layout); on a GPU all contenders of both layouts stand in one contest, and the
best of them is the peer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import sepconv_ext

from .layers import Layer
from .timing import Contender

LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
OURS = "sepconv"
PEERS = ("torch", "matmul", "compile", "shift-and-add")
DEFAULT_PEERS = {"cpu": ("torch",), "cuda": PEERS}


@dataclass(frozen=True)
class Operands:
    """One set of tensors of a layer, in one layout."""

    x: Tensor  # [N, C, H, W]
    w: Tensor  # [K, C / groups, R, S]
    b: Tensor | None  # [K]
    g: Tensor  # [N, K, P, Q], the gradient of the output

    @staticmethod
    def random(layer: Layer, batch: int, dtype: torch.dtype, layout: str, device: torch.device, seed: int) -> Operands:
        generator = torch.Generator(device).manual_seed(seed)

        def normal(size: tuple[int, ...], scale: float = 1.0) -> Tensor:
            values = torch.randn(size, generator=generator, device=device) * scale
            return values.to(dtype).contiguous(
                memory_format=LAYOUTS[layout] if len(size) == 4 else torch.contiguous_format
            )

        fan_in = layer.weight_size[1] * layer.kernel_h * layer.kernel_w
        return Operands(
            x=normal(layer.input_size(batch)),
            w=normal(layer.weight_size, fan_in**-0.5),
            b=normal((layer.out_channels,)) if layer.bias else None,
            g=normal(layer.output_size(batch)),
        )


def ours(layer: Layer, map: str, sets: list[Operands]) -> Contender:
    """sepconv_ext's op for that map."""
    ops = torch.ops.sepconv_ext
    stride, padding, dilation, groups = layer.stride, layer.padding, layer.dilation, layer.groups
    # Known beforehand, as they are to autograd.
    like_x, like_w = ((tuple(t.shape), t.stride()) for t in (sets[0].x, sets[0].w))

    def forward(i: int) -> Tensor:
        o = sets[i]
        return sepconv_ext.functional.conv2d(o.x, o.w, o.b, stride, padding, dilation, groups)

    def grad_input(i: int) -> Tensor:
        o = sets[i]
        return ops.conv2d_grad_input.default(o.g, o.w, *like_x, stride, padding, dilation, groups)

    def grad_weight(i: int) -> Tensor:
        o = sets[i]
        return ops.conv2d_grad_weight.default(o.g, o.x, *like_w, stride, padding, dilation, groups)

    return {"forward": forward, "grad_input": grad_input, "grad_weight": grad_weight}[map]


def torch_crashes(layer: Layer, map: str, device: torch.device) -> bool:
    """The call that torch must not be asked for: it writes past a workspace of its own (csrc/cpu/torch_faults.cpp)."""
    one = layer.kernel_h == layer.kernel_w == 1 and layer.stride != (1, 1)
    return device.type == "cpu" and map == "grad_weight" and one and layer.weight_size[1] < 16


def torch_conv(layer: Layer, map: str, sets: list[Operands]) -> Contender:
    """torch's own convolution: oneDNN on a CPU, cuDNN or torch's native kernels on a GPU, as torch chooses."""
    stride, padding, dilation, groups = layer.stride, layer.padding, layer.dilation, layer.groups

    def forward(i: int) -> Tensor:
        o = sets[i]
        return F.conv2d(o.x, o.w, o.b, stride, padding, dilation, groups)

    def backward(mask: list[bool]) -> Contender:
        wanted = mask.index(True)

        def run(i: int) -> Tensor:
            o = sets[i]
            return torch.ops.aten.convolution_backward.default(
                o.g, o.x, o.w, None, stride, padding, dilation, False, [0, 0], groups, mask
            )[wanted]

        return run

    if map == "forward":
        return forward
    return backward([True, False, False] if map == "grad_input" else [False, True, False])


def matmul(layer: Layer, map: str, sets: list[Operands]) -> Contender | None:
    """A pointwise layer as one matrix product over pixels; None where a plain product does not do."""
    if (
        layer.kind != "pointwise"
        or layer.stride != (1, 1)
        or not sets[0].x.is_contiguous(memory_format=torch.channels_last)
    ):
        return None

    def pixels(t: Tensor) -> Tensor:
        return t.permute(0, 2, 3, 1).flatten(0, 2)

    def image(t: Tensor, like: Tensor) -> Tensor:
        return t.view(like.shape[0], like.shape[2], like.shape[3], -1).permute(0, 3, 1, 2)

    def forward(i: int) -> Tensor:
        o = sets[i]
        return image(F.linear(pixels(o.x), o.w.flatten(1), o.b), o.g)

    def grad_input(i: int) -> Tensor:
        o = sets[i]
        return image(pixels(o.g) @ o.w.flatten(1), o.x)

    def grad_weight(i: int) -> Tensor:
        o = sets[i]
        return (pixels(o.g).t() @ pixels(o.x)).view(o.w.shape)

    return {"forward": forward, "grad_input": grad_input, "grad_weight": grad_weight}[map]


def compiled_conv(layer: Layer, map: str, sets: list[Operands]) -> Contender | None:
    """The forward map through torch.compile's search among its own templates and the library."""
    if map != "forward":
        return None

    def conv(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return F.conv2d(x, w, b, layer.stride, layer.padding, layer.dilation, layer.groups)

    return _compiled(conv, sets, "max-autotune-no-cudagraphs")


def shift_and_add(layer: Layer, map: str, sets: list[Operands]) -> Contender | None:
    """A depthwise forward as a sum of shifted, scaled images, which torch.compile fuses into one kernel."""
    if map != "forward" or layer.kind != "depthwise" or layer.kernel_h * layer.kernel_w > 49:
        return None
    if layer.in_channels != layer.out_channels:
        return None
    (sh, sw), (ph, pw), (dh, dw) = layer.stride, layer.padding, layer.dilation
    rows, columns = (layer.out_height - 1) * sh + 1, (layer.out_width - 1) * sw + 1

    def conv(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        padded = F.pad(x, (pw, pw, ph, ph))
        total = None
        for r in range(layer.kernel_h):
            for s in range(layer.kernel_w):
                window = padded[:, :, r * dh : r * dh + rows : sh, s * dw : s * dw + columns : sw]
                term = window.float() * w[:, 0, r, s].float().view(1, -1, 1, 1)
                total = term if total is None else total + term
        if b is not None:
            total = total + b.float().view(1, -1, 1, 1)
        return total.to(x.dtype)

    return _compiled(conv, sets, "default")


def _compiled(function: Callable, sets: list[Operands], mode: str) -> Contender:
    compiled = torch.compile(function, mode=mode, dynamic=False, fullgraph=True)

    def run(i: int) -> Tensor:
        o = sets[i]
        return compiled(o.x, o.w, o.b)

    return run


MAKERS = {"torch": torch_conv, "matmul": matmul, "compile": compiled_conv, "shift-and-add": shift_and_add}
NEEDS_COMPILER = ("compile", "shift-and-add")


def explain(layer: Layer, map: str, operands: Operands) -> dict:
    """Which kernel our call takes, and why, in the plan's own words."""
    said = sepconv_ext.explain(
        operands.x,
        operands.w,
        operands.b,
        stride=layer.stride,
        padding=layer.padding,
        dilation=layer.dilation,
        groups=layer.groups,
        map=map,
        grad_output=None if map == "forward" else operands.g,
    )
    return {"kernel": said.kernel, "reason": said.reason, "aten": bool(said.aten)}


# Two correct results differ by rounding only: the largest difference, as a share of the largest value.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def rounds_to_tf32(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether torch may round float32 operands to TF32 there, whose mantissa is as short as float16's."""
    allowed = torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32
    return dtype == torch.float32 and device.type == "cuda" and allowed


def tolerance(dtype: torch.dtype, device: torch.device, of: dict[torch.dtype, float] = TOLERANCE) -> float:
    """What rounding may cost, of the table `of`."""
    return of[torch.float16 if rounds_to_tf32(dtype, device) else dtype]


def difference(result: Tensor, expected: Tensor) -> float:
    """Largest absolute difference over largest absolute expected value; nan or a wrong shape is infinity."""
    if result.shape != expected.shape:
        return float("inf")
    scale = expected.abs().max().item()
    apart = (result - expected).abs().max().item()
    value = apart / scale if scale > 0 else apart
    return value if value == value else float("inf")
