"""The ops as torch's own machinery sees them: shapes and strides without data, and operation counts.

The schemas and the kernels are registered by ``_C`` (csrc/library.cpp); they are called as
``torch.ops.sepconv_ext.conv2d``, ``.conv2d_grad_input``, ``.conv2d_grad_weight``, ``.separable_conv2d`` and
``.spatial_separable_conv2d``. Two more serve autograd: ``conv2d_both_grads``, the second and third in one call, which
everything that knows it not takes apart into the two; and ``separable_conv2d_training``, the fourth as its gradient
needs it, which has no gradient itself.
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


def _is_dense(size: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether the dimensions follow each other without gaps or overlaps; those of size 1 have no say."""
    expected = 1
    for step, count in sorted((step, count) for step, count in zip(stride, size, strict=True) if count != 1):
        if step != expected:
            return False
        expected *= count
    return True


def _empty_like_strides(like: Tensor, size: Sequence[int], stride: Sequence[int]) -> Tensor:
    """What the gradients are written to: the strides asked for where they are dense, else the nearest dense ones."""
    asked = torch.empty_strided(size, stride, dtype=like.dtype, device=like.device)
    known = all(isinstance(n, int) for n in (*size, *stride))  # of symbols nothing can be asked that has no value yet
    dense = known and _is_dense(size, stride)
    return asked if dense else torch.empty_like(asked, memory_format=torch.preserve_format)


def _check_rank(name: str, tensor: Tensor) -> None:
    torch._check(tensor.dim() == 4, lambda: f"{name} must have 4 dimensions, but has {tensor.dim()}")


def _forward(input, weight, stride, padding, dilation) -> Tensor:
    """An output of the right size and strides, by torch's rule for its layout."""
    size = _output_size(input.shape, weight.shape, stride, padding, dilation)
    channels_last = torch.channels_last in (suggest_memory_format(input), suggest_memory_format(weight))
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(size, dtype=input.dtype, device=input.device, memory_format=layout)


@torch.library.register_fake("sepconv_ext::conv2d")
def _(input, weight, bias, stride, padding, dilation, groups, activation, padding_mode="zeros"):
    _check_rank("input", input)
    _check_rank("weight", weight)
    torch._check(
        input.shape[1] == weight.shape[1] * groups,
        lambda: f"input must have {weight.shape[1] * groups} channels (weight's {weight.shape[1]} times "
        f"groups = {groups}), but has {input.shape[1]}",
    )
    return _forward(input, weight, stride, padding, dilation)


@torch.library.register_fake("sepconv_ext::conv2d_grad_input")
def _(grad_output, weight, input_size, input_stride, stride, padding, dilation, groups, padding_mode="zeros"):
    return _empty_like_strides(grad_output, input_size, input_stride)


@torch.library.register_fake("sepconv_ext::conv2d_grad_weight")
def _(grad_output, input, weight_size, weight_stride, stride, padding, dilation, groups, padding_mode="zeros"):
    return _empty_like_strides(grad_output, weight_size, weight_stride)


def _separable(input, depthwise_weight, pointwise_weight, stride, padding, dilation) -> tuple[Tensor, Tensor]:
    """(output, intermediate)."""
    _check_rank("input", input)
    _check_rank("depthwise_weight", depthwise_weight)
    _check_rank("pointwise_weight", pointwise_weight)
    torch._check(
        pointwise_weight.shape[1] == depthwise_weight.shape[0],
        lambda: f"pointwise_weight must have {depthwise_weight.shape[0]} input channels, as many as depthwise_weight "
        f"has output channels, but has {pointwise_weight.shape[1]}",
    )
    intermediate = _forward(input, depthwise_weight, stride, padding, dilation)
    return _forward(intermediate, pointwise_weight, (1, 1), (0, 0), (1, 1)), intermediate


@torch.library.register_fake("sepconv_ext::separable_conv2d")
def _(input, depthwise, bias_d, pointwise, bias_p, stride, padding, dilation, act_d, act_p, save_intermediate=False):
    return _separable(input, depthwise, pointwise, stride, padding, dilation)[0]


@torch.library.register_fake("sepconv_ext::separable_conv2d_training")
def _(input, depthwise, bias_d, pointwise, bias_p, stride, padding, dilation, act_d, act_p, output, intermediate):
    results = _separable(input, depthwise, pointwise, stride, padding, dilation)
    wanted = (output, intermediate)
    return tuple(result if asked else input.new_empty(0) for result, asked in zip(results, wanted, strict=True))
@torch.library.register_fake("sepconv_ext::spatial_separable_conv2d")
def _(input, column, row, padding):
    torch._check(input.dim() == 4, lambda: f"input must have 4 dimensions, but has {input.dim()}")
    for name, filter in (("column", column), ("row", row)):
        torch._check(filter.dim() == 2, lambda: f"{name} must have 2 dimensions, but has {filter.dim()}")  # noqa: B023
        torch._check(
            filter.shape[0] == 1 or filter.shape[0] == input.shape[1],
            lambda: f"{name} must be one filter or {input.shape[1]}, but is {filter.shape[0]}",  # noqa: B023
        )
    size = _output_size(input.shape, (input.shape[1], 1, column.shape[1], row.shape[1]), (1, 1), padding, (1, 1))
    return torch.empty(size, dtype=input.dtype, device=input.device, memory_format=suggest_memory_format(input))


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


def _separable_flops(input, depthwise, pointwise, stride, padding, dilation, output=True) -> int:
    """N*P*Q * C * T * (R*S + K) multiply-accumulates, without K where the product is not made."""
    size = _output_size(input, depthwise, stride, padding, dilation)
    product = conv_flop_count(size, pointwise, (size[0], pointwise[0], *size[2:])) if output else 0
    return conv_flop_count(input, depthwise, size) + product


@register_flop_formula(torch.ops.sepconv_ext.separable_conv2d)
def _(input, depthwise, bias_d, pointwise, bias_p, stride, padding, dilation, *_, out_shape=None, **__) -> int:
    return _separable_flops(input, depthwise, pointwise, stride, padding, dilation)


@register_flop_formula(torch.ops.sepconv_ext.separable_conv2d_training)
def _(
    input, depthwise, bias_d, pointwise, bias_p, stride, padding, dilation, act_d, act_p, output, intermediate, **__
) -> int:
    return _separable_flops(input, depthwise, pointwise, stride, padding, dilation, output)
# The column pass makes P rows of W columns, the row pass P rows of Q.
@register_flop_formula(torch.ops.sepconv_ext.spatial_separable_conv2d)
def _(input, column, row, *_, out_shape=None, **__) -> int:
    N, C, P, Q = out_shape
    return 2 * N * C * P * (input[3] * column[1] + Q * row[1])
