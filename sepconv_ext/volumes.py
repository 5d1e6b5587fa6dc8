"""Depthwise convolutions of volumes, as sums over two-dimensional ones: one for each tap along the depth.

    y[n, :, t] = sum over d of C(x[n, :, t * stride + d * dilation - padding], w[:, :, d])

with C the depthwise map of an image. The gradients are sums of its two gradients in the same way. So the three maps of
a volume are closed under differentiation as those of an image are (docs/how/maps.md), and have derivatives of every
order. Planes of the depth are a batch of images, where they lie; a few at a time, so that a sum stays in the cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from . import _C
from .transposed import _by_autocast

__all__ = ["conv3d"]

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_HALF = (torch.bfloat16, torch.float16)
_CHUNK = 1 << 20  # bytes of a sum: benchmarks/notes/volumes.md

ours = torch.ops.sepconv_ext


class Geometry(NamedTuple):
    """Depth, height, width of each; both sides of each dimension in `sides`."""

    stride: tuple[int, ...]
    sides: tuple[int, ...]
    dilation: tuple[int, ...]

    def plane(self) -> tuple[Sequence[int], Sequence[int], Sequence[int]]:
        """What the two-dimensional ops take."""
        top, bottom, left, right = self.sides[2:]
        padding = (top, left) if (top, left) == (bottom, right) else (top, bottom, left, right)
        return self.stride[1:], padding, self.dilation[1:]

    def padding(self) -> list[int] | None:
        """As torch's function takes it; None where the two sides differ."""
        return None if self.sides[::2] != self.sides[1::2] else list(self.sides[::2])

    def is_of_the_depth(self, weight: Tensor) -> bool:
        """Whether each pixel of a plane is by itself: then rows and columns are one dimension."""
        return weight.shape[3:] == (1, 1) and self.stride[1:] == (1, 1) and not any(self.sides[2:])

    def offset(self, tap: int) -> int:
        """Of the plane that output plane 0 sees through a tap."""
        return tap * self.dilation[0] - self.sides[0]

    def output_size(self, size: Sequence[int], taps: Sequence[int]) -> list[int]:
        return [
            (n + self.sides[2 * i] + self.sides[2 * i + 1] - self.dilation[i] * (taps[i] - 1) - 1) // self.stride[i] + 1
            for i, n in enumerate(size)
        ]


def conv3d(input: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, groups: Any) -> Tensor:
    """Depthwise ones in plain tensors of a CPU. Everything else is torch's function, which computes or raises."""
    if torch.overrides.has_torch_function((input, weight, bias)) or torch.compiler.is_exporting():
        return torch.conv3d(input, weight, bias, stride, padding, dilation, groups)
    input, weight, bias = (_by_autocast(tensor) for tensor in (input, weight, bias))
    given = (input, weight, bias, stride, padding, dilation, groups)
    geometry = _geometry(weight, stride, padding, dilation) if _is_covered(input, weight, bias, groups) else None
    if geometry is None:
        return torch.conv3d(*given)
    batch = input if input.dim() == 5 else input.unsqueeze(0)
    size = geometry.output_size(batch.shape[2:], weight.shape[2:])
    if not all(n >= 1 for n in size):
        return torch.conv3d(*given)
    differentiated = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (input, weight, bias))
    if geometry.is_of_the_depth(weight) and (differentiated or _depth_is_ours(batch, weight)):
        output = _of_the_depth(batch, weight, bias, geometry)
        return output if input.dim() == 5 else output.squeeze(0)
    if torch.compiler.is_compiling():
        if not differentiated:
            return torch.conv3d(*given)
        output = _composed(batch, weight, bias, geometry)
    else:
        if not _is_large(batch, weight, size) or not (differentiated or _forward_is_ours(batch, weight, geometry)):
            return torch.conv3d(*given)
        output = _Forward.apply(batch, weight, bias, geometry)
    return output if input.dim() == 5 else output.squeeze(0)


def _is_covered(input: Any, weight: Any, bias: Any, groups: Any) -> bool:
    if not (isinstance(input, Tensor) and isinstance(weight, Tensor) and isinstance(groups, int)):
        return False
    if input.dtype not in _DTYPES or weight.dtype != input.dtype or weight.dim() != 5 or input.dim() not in (4, 5):
        return False
    if not input.device.type == weight.device.type == "cpu" or input.layout != torch.strided:
        return False
    C, K = input.shape[-4], weight.shape[0]
    if groups < 2 or groups != C or weight.shape[1] != 1 or K % groups != 0:
        return False
    if 0 in (*input.shape, *weight.shape):
        return False
    if not torch.compiler.is_compiling() and _is_transformed():
        return False
    if bias is None:
        return True
    return isinstance(bias, Tensor) and bias.dtype == input.dtype and bias.device == input.device and bias.shape == (K,)


def _is_transformed() -> bool:
    """Under torch.func or forward-mode AD, which go through torch's own convolution."""
    dual = torch.autograd.forward_ad._current_level >= 0
    return dual or torch._C._functorch.peek_interpreter_stack() is not None


def _geometry(weight: Tensor, stride: Any, padding: Any, dilation: Any) -> Geometry | None:
    """None for arguments that are none, about which torch has words of its own."""
    stride, dilation = _three(stride), _three(dilation)
    if stride is None or dilation is None or not all(n >= 1 for n in (*stride, *dilation)):
        return None
    if padding == "same":
        zeros = [d * (n - 1) for d, n in zip(dilation, weight.shape[2:], strict=True)]
        sides = tuple(side for n in zeros for side in (n // 2, n - n // 2))
        return Geometry(stride, sides, dilation) if set(stride) == {1} else None
    both = _three(0 if padding == "valid" else padding)
    if both is None or not all(n >= 0 for n in both):
        return None
    return Geometry(stride, tuple(n for n in both for _ in (0, 1)), dilation)


def _three(value: Any) -> tuple[int, ...] | None:
    values = (value,) * 3 if isinstance(value, int) else tuple(value) if isinstance(value, (tuple, list)) else ()
    values = values * 3 if len(values) == 1 else values
    whole = all(isinstance(n, int) and not isinstance(n, bool) for n in values)
    return values if len(values) == 3 and whole else None


# --- what was measured: benchmarks/notes/volumes.md ---

_SMALL = 250_000  # multiply-accumulates, below which the calls of this file take longer than torch's
_MANY_TAPS = 200  # in float32, from which torch's forward call is slower where oneDNN has no AVX-512
_LARGE = 1 << 21  # numbers of an input in NCDHW, from which it is, too: oneDNN copies them


def _is_large(input: Tensor, weight: Tensor, size: Sequence[int]) -> bool:
    taps = math.prod(weight.shape[2:])
    return _C.strict() or input.shape[0] * weight.shape[0] * math.prod(size) * taps >= _SMALL


def _forward_is_ours(input: Tensor, weight: Tensor, geometry: Geometry) -> bool:
    """Where torch's own forward call, by oneDNN, is not faster. It has no kernels for float64 and half types here."""
    if input.dtype != torch.float32 or _C.strict() or geometry.padding() is None:
        return True
    many = math.prod(weight.shape[2:]) >= _MANY_TAPS and not _has_avx512()
    return many or (input.numel() >= _LARGE and _memory_format(input, weight) == torch.contiguous_format)


def _depth_is_ours(input: Tensor, weight: Tensor) -> bool:
    """As above, of taps along the depth alone. torch calls oneDNN for those with two threads or more."""
    if torch.compiler.is_compiling() or input.dtype != torch.float32 or _C.strict():
        return True
    fast = _has_avx512() and torch.get_num_threads() > 1
    return not (fast and _memory_format(input, weight) == torch.channels_last_3d)


def _has_avx512() -> bool:
    return torch.backends.cpu.get_cpu_capability() == "AVX512"


# --- the three maps, and how they are each other's derivatives ---


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, weight, bias, geometry):
        ctx.save_for_backward(input, weight)
        ctx.geometry = geometry
        if _forward_is_ours(input, weight, geometry):
            return _forward(input, weight, bias, geometry)
        around = (geometry.stride, geometry.padding(), geometry.dilation)
        return torch.conv3d(input, weight, bias, *around, input.shape[1])

    @staticmethod
    def backward(ctx, grad):
        input, weight = ctx.saved_tensors
        by_input, by_weight, by_bias, _ = ctx.needs_input_grad
        return (
            _GradInput.apply(grad, weight, input, ctx.geometry) if by_input else None,
            _GradWeight.apply(grad, input, weight, ctx.geometry) if by_weight else None,
            grad.sum((0, 2, 3, 4)) if by_bias else None,
            None,
        )


class _GradInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx, grad, weight, like, geometry):
        ctx.save_for_backward(grad, weight)
        ctx.geometry = geometry
        return _grad_input(grad, weight, like, geometry)

    @staticmethod
    def backward(ctx, direction):
        grad, weight = ctx.saved_tensors
        by_grad, by_weight, *_ = ctx.needs_input_grad
        return (
            _Forward.apply(direction, weight, None, ctx.geometry) if by_grad else None,
            _GradWeight.apply(grad, direction, weight, ctx.geometry) if by_weight else None,
            None,
            None,
        )


class _GradWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, grad, input, like, geometry):
        ctx.save_for_backward(grad, input)
        ctx.geometry = geometry
        return _grad_weight(grad, input, like, geometry)

    @staticmethod
    def backward(ctx, direction):
        grad, input = ctx.saved_tensors
        by_grad, by_input, *_ = ctx.needs_input_grad
        return (
            _Forward.apply(input, direction, None, ctx.geometry) if by_grad else None,
            _GradInput.apply(grad, direction, input, ctx.geometry) if by_input else None,
            None,
            None,
        )


def _forward(input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    N, C = input.shape[:2]
    size = geometry.output_size(input.shape[2:], weight.shape[2:])
    memory_format = _memory_format(input, weight)
    input = input.contiguous(memory_format=memory_format)
    output = _empty(input, (N, weight.shape[0], *size), memory_format)
    filters = _filters(weight)
    bias = None if bias is None else _wide(bias)
    place = geometry.plane()
    for n, begin, end in _chunks(output):
        total = None
        for tap in _inner_first(len(filters)):
            offset = geometry.offset(tap)
            first, last = _seen(begin, end, offset, geometry.stride[0], input.shape[2])
            if first >= last:
                continue
            planes = _wide(_planes(input, n, first * geometry.stride[0] + offset, geometry.stride[0], last - first))
            with_bias = bias if total is None and (first, last) == (begin, end) else None
            part = ours.conv2d.default(planes, filters[tap], with_bias, *place, C, "identity", "zeros")
            if total is None and (first, last) == (begin, end):
                total = part
                continue
            if total is None:  # no tap of the middle sees planes for all of these
                total = _started(part, end - begin, bias)
            total[first - begin : last - begin] += part
        target = output[n, :, begin:end].transpose(0, 1)
        if total is not None:
            target.copy_(total)
        else:
            target.zero_() if bias is None else target.copy_(bias.view(-1, 1, 1).expand_as(target))
    return output


def _grad_input(grad: Tensor, weight: Tensor, input: Tensor, geometry: Geometry) -> Tensor:
    """`input` is read for its size and memory format alone."""
    C, memory_format = input.shape[1], _memory_format(input, weight)
    grad = grad.contiguous(memory_format=memory_format)
    output = _empty(grad, input.shape, memory_format)
    filters = _filters(weight)
    place, step = geometry.plane(), geometry.stride[0]
    for n, begin, end in _chunks(output):
        target = output[n, :, begin:end].transpose(0, 1)
        total = None
        for tap in _inner_first(len(filters)):
            offset = geometry.offset(tap)  # output plane t saw plane t * step + offset
            first, last = max(0, -((offset - begin) // step)), min(grad.shape[2], (end - 1 - offset) // step + 1)
            if first >= last:
                continue
            planes = _wide(_planes(grad, n, first, 1, last - first))
            size = (last - first, C, *input.shape[3:])
            strides = _strides(size, memory_format)
            part = ours.conv2d_grad_input.default(planes, filters[tap], size, strides, *place, C, "zeros")
            if total is None and last - first == end - begin:
                total = part
                continue
            if total is None:
                total = _started(part, end - begin, None)
            total[first * step + offset - begin : (last - 1) * step + offset - begin + 1 : step] += part
        target.zero_() if total is None else target.copy_(total)
    return output


def _grad_weight(grad: Tensor, input: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """`weight` is read for its size and strides alone."""
    C, memory_format = input.shape[1], _memory_format(input, weight)
    grad, input = (t.contiguous(memory_format=memory_format) for t in (grad, input))
    place, step = geometry.plane(), geometry.stride[0]
    size = (weight.shape[0], 1, *weight.shape[3:])
    strides = _strides(size, torch.contiguous_format)
    sums: list[Tensor | None] = [None] * weight.shape[2]
    for n, begin, end in _chunks(grad):
        for tap in range(weight.shape[2]):
            offset = geometry.offset(tap)
            first, last = _seen(begin, end, offset, step, input.shape[2])
            if first >= last:
                continue
            gradients = _wide(_planes(grad, n, first, 1, last - first))
            planes = _wide(_planes(input, n, first * step + offset, step, last - first))
            part = ours.conv2d_grad_weight.default(gradients, planes, size, strides, *place, C, "zeros")
            total = sums[tap]
            sums[tap] = part if total is None else total.add_(part)
    output = torch.empty_like(weight)
    for tap, total in enumerate(sums):
        output[:, :, tap].zero_() if total is None else output[:, :, tap].copy_(total)
    return output


# --- planes ---


def _memory_format(input: Tensor, weight: Tensor) -> torch.memory_format:
    last = torch.channels_last_3d
    return last if last in map(suggest_memory_format, (input, weight)) else torch.contiguous_format


def _empty(like: Tensor, size: Sequence[int], memory_format: torch.memory_format) -> Tensor:
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=memory_format)


def _strides(size: Sequence[int], memory_format: torch.memory_format) -> tuple[int, ...]:
    _, C, H, W = size
    return (H * W * C, 1, W * C, C) if memory_format == torch.channels_last_3d else (C * H * W, H * W, W, 1)


def _planes(volume: Tensor, n: int, begin: int, step: int, count: int) -> Tensor:
    """[count, C, H, W]: planes of one volume, where they lie."""
    return volume[n, :, begin : begin + (count - 1) * step + 1 : step].transpose(0, 1)


def _wide(t: Tensor) -> Tensor:
    """Half types are summed in float32."""
    return t.float() if t.dtype in _HALF else t


def _filters(weight: Tensor) -> list[Tensor]:
    """[K, 1, R, S] for each tap along the depth, dense."""
    return [_wide(weight[:, :, tap]).contiguous() for tap in range(weight.shape[2])]


def _started(part: Tensor, count: int, bias: Tensor | None) -> Tensor:
    """What the parts are added to: planes in the memory order of one of them, of zeros or of the bias."""
    total = part.new_zeros(()).expand(count, *part.shape[1:])
    last = suggest_memory_format(part) == torch.channels_last
    total = total.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    return total if bias is None else total.add_(bias.view(-1, 1, 1))


def _chunks(volume: Tensor) -> Iterator[tuple[int, int, int]]:
    """(n, first plane, behind the last plane): the work, in pieces that a cache holds."""
    N, C, D, H, W = volume.shape
    width = 8 if volume.dtype == torch.float64 else 4
    pieces = min(D, max(1, round(D * C * H * W * width / _CHUNK)))
    for n in range(N):
        for i in range(pieces):
            yield n, D * i // pieces, D * (i + 1) // pieces


def _inner_first(taps: int) -> list[int]:
    """The middle tap sees most planes: its part is what the others are added to."""
    return sorted(range(taps), key=lambda tap: abs(2 * tap - taps + 1))


def _seen(begin: int, end: int, offset: int, step: int, depth: int) -> tuple[int, int]:
    """Those of the output planes from `begin` to `end` that see a plane of the volume, t * step + offset."""
    return max(begin, -(offset // step)), min(end, (depth - 1 - offset) // step + 1)


# --- one call ---


def _of_the_depth(input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """Taps along the depth alone: one convolution of images whose rows are whole planes."""
    memory_format = _memory_format(input, weight)
    images = input.contiguous(memory_format=memory_format).flatten(3)
    front, back = geometry.sides[:2]
    padding = (front, 0) if front == back else (front, back, 0, 0)
    place = ((geometry.stride[0], 1), padding, (geometry.dilation[0], 1), input.shape[1])
    output = ours.conv2d(images, weight.flatten(3), bias, *place, "identity")
    return output.unflatten(3, input.shape[3:]).contiguous(memory_format=memory_format)


# --- in one graph ---


def _composed(input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """For torch.compile, which takes derivatives itself: a call for each tap, on all planes of all volumes."""
    N, C, D, H, W = input.shape
    K, T = weight.shape[0], geometry.output_size(input.shape[2:], weight.shape[2:])[0]
    stride, front = geometry.stride[0], geometry.sides[0]
    behind = max(0, (T - 1) * stride + geometry.dilation[0] * (weight.shape[2] - 1) + 1 - front - D)
    padded = torch.nn.functional.pad(input, (0, 0, 0, 0, front, behind))
    parts = []
    for tap in range(weight.shape[2]):
        begin = tap * geometry.dilation[0]
        planes = padded[:, :, begin : begin + (T - 1) * stride + 1 : stride].transpose(1, 2).reshape(N * T, C, H, W)
        part = ours.conv2d(planes, weight[:, :, tap], bias if tap == 0 else None, *geometry.plane(), C, "identity")
        parts.append(part)
    total = sum(parts[1:], parts[0])
    output = total.reshape(N, T, K, *total.shape[2:]).transpose(1, 2)
    return output.contiguous(memory_format=_memory_format(input, weight))
