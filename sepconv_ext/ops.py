"""The ops as torch's own machinery sees them: shapes and strides without data, and operation counts.

The schemas and the kernels are registered by ``_C`` (csrc/library.cpp); they are called as
``torch.ops.sepconv_ext.conv2d``, ``.conv2d_grad_input`` and ``.conv2d_grad_weight``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch.utils.flop_counter import conv_flop_count, register_flop_formula

from . import _C  # noqa: F401  (registers the schemas)


def _sides(padding: Sequence[int]) -> tuple[int, int]:
    """The padding of both sides together, (height, width), of (h, w) or (top, bottom, left, right)."""
    if len(padding) == 4:
        return padding[0] + padding[1], padding[2] + padding[3]
    return 2 * padding[0], 2 * padding[1]


def _output_size(
    input: Sequence[int], weight: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> tuple[int, int, int, int]:
    rows, columns = (
        (input[2 + i] + _sides(padding)[i] - dilation[i] * (weight[2 + i] - 1) - 1) // stride[i] + 1 for i in (0, 1)
    )
    return input[0], weight[0], rows, columns


def _empty_like_strides(like: Tensor, size: Sequence[int], stride: Sequence[int]) -> Tensor:
    """What the gradients are written to: the strides asked for where they are dense, else the nearest dense ones."""
    asked = torch.empty_strided(size, stride, dtype=like.dtype, device=like.device)
    return torch.empty_like(asked, memory_format=torch.preserve_format)


@torch.library.register_fake("sepconv_ext::conv2d")
def _(input, weight, bias, stride, padding, dilation, groups, activation):
    torch._check(input.dim() == 4, lambda: f"input must have 4 dimensions, but has {input.dim()}")
    torch._check(weight.dim() == 4, lambda: f"weight must have 4 dimensions, but has {weight.dim()}")
    torch._check(
        input.shape[1] == weight.shape[1] * groups,
        lambda: f"input must have {weight.shape[1] * groups} channels (weight's {weight.shape[1]} times "
        f"groups = {groups}), but has {input.shape[1]}",
    )
    size = _output_size(input.shape, weight.shape, stride, padding, dilation)
    channels_last = torch.channels_last in (suggest_memory_format(input), suggest_memory_format(weight))
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(size, dtype=input.dtype, device=input.device, memory_format=layout)


@torch.library.register_fake("sepconv_ext::conv2d_grad_input")
def _(grad_output, weight, input_size, input_stride, stride, padding, dilation, groups):
    return _empty_like_strides(grad_output, input_size, input_stride)


@torch.library.register_fake("sepconv_ext::conv2d_grad_weight")
def _(grad_output, input, weight_size, weight_stride, stride, padding, dilation, groups):
    return _empty_like_strides(grad_output, weight_size, weight_stride)


# Two operations a multiply-accumulate, the same number for all three maps: N*P*Q * K * (C / groups) * R*S.
@register_flop_formula(torch.ops.sepconv_ext.conv2d)
def _(input, weight, bias, *_, out_shape=None, **__) -> int:
    return conv_flop_count(input, weight, out_shape)


@register_flop_formula(torch.ops.sepconv_ext.conv2d_grad_input)
def _(grad_output, weight, *_, out_shape=None, **__) -> int:
    return conv_flop_count(out_shape, weight, grad_output)


@register_flop_formula(torch.ops.sepconv_ext.conv2d_grad_weight)
def _(grad_output, input, *_, out_shape=None, **__) -> int:
    return conv_flop_count(input, out_shape, grad_output)
