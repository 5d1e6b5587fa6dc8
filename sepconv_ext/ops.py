"""The ops as torch's own machinery sees them: shapes and strides without data, and operation counts.

The schemas and the kernels are registered by ``_C`` (csrc/ops/library.cpp); they are called as
``torch.ops.sepconv_ext.conv2d``, ``.conv2d_grad_input``, ``.conv2d_grad_weight``, ``.separable_conv2d``,
``.spatial_separable_conv2d``, ``.inverted_residual``, and ``.causal_conv1d`` with ``.causal_conv1d_grad_input``,
``.causal_conv1d_grad_weight`` and ``.causal_conv1d_update``. ``.conv2d_residual`` serves frozen networks, and two more
autograd. ``conv2d_both_grads`` is the second and third in one call; whatever does not know it takes it apart into the
two. ``separable_conv2d_training`` is the fourth as its gradient needs it, and has no gradient itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch.utils.flop_counter import conv_flop_count, register_flop_formula

from . import _C  # noqa: F401  (registers the schemas)


def _sides(padding: Sequence[int], dims: int) -> list[int]:
    """The padding of both sides together, for each spatial dimension, of one entry a dimension or of two."""
    if len(padding) == dims:
        return [2 * p for p in padding]
    return [padding[2 * i] + padding[2 * i + 1] for i in range(dims)]


def _output_size(
    input: Sequence[int], weight: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> tuple[int, ...]:
    """Of images or sequences (as many entries in stride as spatial dimensions), with or without a batch."""
    dims = len(stride)
    pixels = [
        (size + sides - step * (taps - 1) - 1) // stride + 1
        for size, sides, step, taps, stride in zip(
            input[-dims:], _sides(padding, dims), dilation, weight[2:], stride, strict=True
        )
    ]
    return (*input[: -dims - 1], weight[0], *pixels)


def _suggests_channels_last(t: Tensor, dims: int) -> bool:
    """Whether the channels of an image, or of a sequence as an image of one row, lie next to each other in memory."""
    image = t.unsqueeze(-2) if dims == 1 else t
    batch = image.unsqueeze(0) if image.dim() == 3 else image
    return suggest_memory_format(batch) == torch.channels_last


def _dense(like: Tensor, size: Sequence[int], dims: int, channels_last: bool) -> Tensor:
    """An image or a sequence without gaps, contiguous or with its channels next to each other in memory."""
    if not channels_last:
        return torch.empty(size, dtype=like.dtype, device=like.device)
    return torch.empty_strided(size, _dense_strides(size, dims, True), dtype=like.dtype, device=like.device)


def _dense_strides(size: Sequence[int], dims: int, channels_last: bool) -> list[int]:
    channel = len(size) - dims - 1
    pixels = range(channel + 1, len(size))
    inside = (channel, *reversed(pixels)) if channels_last else (*reversed(pixels), channel)
    strides, step = [0] * len(size), 1
    for i in (*inside, *range(channel)):  # from the innermost out
        strides[i], step = step, step * size[i]
    return strides


def _is_dense(size: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether the dimensions follow each other without gaps or overlaps; those of size 1 have no say."""
    expected = 1
    for step, count in sorted((step, count) for step, count in zip(stride, size, strict=True) if count != 1):
        if step != expected:
            return False
        expected *= count
    return True


def _empty_like_strides(like: Tensor, size: Sequence[int], stride: Sequence[int], dims: int) -> Tensor:
    """What the gradients are written to: the strides asked for where they are dense, else the nearest dense ones."""
    asked = torch.empty_strided(size, stride, dtype=like.dtype, device=like.device)
    if not all(isinstance(n, int) for n in (*size, *stride)):  # of symbols nothing can be asked that has no value yet
        return torch.empty_like(asked, memory_format=torch.preserve_format)
    return asked if _is_dense(size, stride) else _dense(like, size, dims, _suggests_channels_last(asked, dims))


def _check_rank(name: str, tensor: Tensor, *ranks: int) -> None:
    expected = " or ".join(map(str, ranks))
    torch._check(tensor.dim() in ranks, lambda: f"{name} must have {expected} dimensions, but has {tensor.dim()}")


def _check_bias_dtypes(input: Tensor, **biases: Tensor | None) -> None:
    """As torch does without data, where it takes a weight of any dtype."""
    for name, t in biases.items():
        if t is not None:
            message = f"{name} has dtype {t.dtype}, but input has dtype {input.dtype}"
            torch._check(t.dtype == input.dtype, lambda: message)  # noqa: B023


def _forward(input, weight, stride, padding, dilation) -> Tensor:
    """An output of the right size and strides, by torch's rule for its layout."""
    size, dims = _output_size(input.shape, weight.shape, stride, padding, dilation), len(stride)
    channels_last = _suggests_channels_last(input, dims) or _suggests_channels_last(weight, dims)
    return _dense(input, size, dims, channels_last)


@torch.library.register_fake("sepconv_ext::conv2d")
def _(input, weight, bias, stride, padding, dilation, groups, activation, padding_mode="zeros"):
    dims = len(stride)
    _check_rank("input", input, dims + 2, dims + 1)
    _check_rank("weight", weight, dims + 2)
    _check_bias_dtypes(input, bias=bias)
    channels = input.shape[-dims - 1]
    torch._check(
        channels == weight.shape[1] * groups,
        lambda: (
            f"input must have {weight.shape[1] * groups} channels (weight's {weight.shape[1]} times "
            f"groups = {groups}), but has {channels}"
        ),
    )
    return _forward(input, weight, stride, padding, dilation)


@torch.library.register_fake("sepconv_ext::conv2d_residual")
def _(input, weight, bias, residual, stride, padding, dilation, groups, activation):
    output = torch.ops.sepconv_ext.conv2d(input, weight, bias, stride, padding, dilation, groups, activation)
    torch._check(
        residual.dim() == output.dim() and all(n == m for n, m in zip(residual.shape, output.shape, strict=True)),
        lambda: f"residual must have the result's size {list(output.shape)}, but has {list(residual.shape)}",
    )
    return output


@torch.library.register_fake("sepconv_ext::conv2d_grad_input")
def _(grad_output, weight, input_size, input_stride, stride, padding, dilation, groups, padding_mode="zeros"):
    return _empty_like_strides(grad_output, input_size, input_stride, len(stride))


@torch.library.register_fake("sepconv_ext::conv2d_grad_weight")
def _(grad_output, input, weight_size, weight_stride, stride, padding, dilation, groups, padding_mode="zeros"):
    return _empty_like_strides(grad_output, weight_size, weight_stride, len(stride))


def _separable(input, depthwise_weight, pointwise_weight, stride, padding, dilation) -> tuple[Tensor, Tensor]:
    """(output, intermediate)."""
    _check_rank("input", input, 4, 3)
    _check_rank("depthwise_weight", depthwise_weight, 4)
    _check_rank("pointwise_weight", pointwise_weight, 4)
    torch._check(
        pointwise_weight.shape[1] == depthwise_weight.shape[0],
        lambda: (
            f"pointwise_weight must have {depthwise_weight.shape[0]} input channels, as many as depthwise_weight "
            f"has output channels, but has {pointwise_weight.shape[1]}"
        ),
    )
    intermediate = _forward(input, depthwise_weight, stride, padding, dilation)
    return _forward(intermediate, pointwise_weight, (1, 1), (0, 0), (1, 1)), intermediate


@torch.library.register_fake("sepconv_ext::separable_conv2d")
def _(input, depthwise, bias_d, pointwise, bias_p, stride, padding, dilation, act_d, act_p, save_intermediate=False):
    _check_bias_dtypes(input, depthwise_bias=bias_d, pointwise_bias=bias_p)
    return _separable(input, depthwise, pointwise, stride, padding, dilation)[0]


@torch.library.register_fake("sepconv_ext::separable_conv2d_training")
def _(input, depthwise, bias_d, pointwise, bias_p, stride, padding, dilation, act_d, act_p, output, intermediate):
    results = _separable(input, depthwise, pointwise, stride, padding, dilation)
    wanted = (output, intermediate)
    return tuple(result if asked else input.new_empty(0) for result, asked in zip(results, wanted, strict=True))


@torch.library.register_fake("sepconv_ext::spatial_separable_conv2d")
def _(input, column, row, padding):
    _check_rank("input", input, 4, 3)
    channels = input.shape[-3]
    for name, filter in (("column", column), ("row", row)):
        _check_rank(name, filter, 2, 1)
        torch._check(
            filter.dim() == 1 or filter.shape[0] == 1 or filter.shape[0] == channels,
            lambda: f"{name} must be one filter or {channels}, but is {filter.shape[0]}",  # noqa: B023
        )
    size = _output_size(input.shape, (channels, 1, column.shape[-1], row.shape[-1]), (1, 1), padding, (1, 1))
    return _dense(input, size, 2, _suggests_channels_last(input, 2))


@torch.library.register_fake("sepconv_ext::inverted_residual")
def _(input, expand, bias_e, depthwise, bias_d, project, bias_p, squeeze, bias_s, excite, bias_x, *arguments):
    stride, padding, dilation = arguments[:3]
    _check_rank("input", input, 4, 3)
    _check_bias_dtypes(input, expand_bias=bias_e, depthwise_bias=bias_d, project_bias=bias_p)
    _check_bias_dtypes(input, squeeze_bias=bias_s, excite_bias=bias_x)
    between = input if expand is None else _forward(input, expand, (1, 1), (0, 0), (1, 1))
    channels = between.shape[-3]
    torch._check(
        depthwise.shape[0] == channels,
        lambda: f"depthwise_weight must have size [{channels}, 1, R, S], but has {list(depthwise.shape)}",
    )
    return _forward(_forward(between, depthwise, stride, padding, dilation), project, (1, 1), (0, 0), (1, 1))


def _check_states(states: Tensor | None, input: Tensor, reach: int) -> None:
    if states is None:
        return
    expected = (input.shape[0], input.shape[1], reach)
    torch._check(
        states.dim() == 3 and all(n == m for n, m in zip(states.shape, expected, strict=True)),
        lambda: f"initial_states must have size {list(expected)}, but has {list(states.shape)}",
    )


@torch.library.register_fake("sepconv_ext::causal_conv1d")
def _(input, weight, bias, initial_states, seq_idx, dilation, activation):
    _check_rank("input", input, 3)
    _check_rank("weight", weight, 2)
    _check_bias_dtypes(input, bias=bias)
    torch._check(
        weight.shape[0] == input.shape[1],
        lambda: f"weight must be [C, S] of input's {input.shape[1]} channels, but has size {list(weight.shape)}",
    )
    _check_states(initial_states, input, (weight.shape[1] - 1) * dilation)
    return _dense(input, input.shape, 1, _suggests_channels_last(input, 1))


@torch.library.register_fake("sepconv_ext::causal_conv1d_grad_input")
def _(grad_output, weight, seq_idx, input_stride, dilation, states):
    N, C, _ = grad_output.shape
    reach = (weight.shape[1] - 1) * dilation
    by_input = _empty_like_strides(grad_output, grad_output.shape, input_stride, 1)
    return by_input, grad_output.new_empty((N, C, reach) if states else (0,))


@torch.library.register_fake("sepconv_ext::causal_conv1d_grad_weight")
def _(grad_output, input, initial_states, seq_idx, width, dilation):
    return input.new_empty((input.shape[1], width))


@torch.library.register_fake("sepconv_ext::causal_conv1d_update")
def _(x, state, weight, bias, cache_seqlens, state_indices, dilation, activation):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _batch(size: Sequence[int], weight: Sequence[int]) -> list[int]:
    """The size with its batch, which is one where the call has none."""
    return list(size) if len(size) == len(weight) else [1, *size]


# Two operations a multiply-accumulate, the same number for all three maps: N*P*Q * K * (C / groups) * R*S.
@register_flop_formula([torch.ops.sepconv_ext.conv2d, torch.ops.sepconv_ext.conv2d_residual])
def _(input, weight, bias, *_, out_shape=None, **__) -> int:
    return conv_flop_count(_batch(input, weight), weight, _batch(out_shape, weight))


@register_flop_formula(torch.ops.sepconv_ext.conv2d_grad_input)
def _(grad_output, weight, *_, out_shape=None, **__) -> int:
    return conv_flop_count(_batch(out_shape, weight), weight, _batch(grad_output, weight))


@register_flop_formula(torch.ops.sepconv_ext.conv2d_grad_weight)
def _(grad_output, input, *_, out_shape=None, **__) -> int:
    return conv_flop_count(_batch(input, out_shape), out_shape, _batch(grad_output, out_shape))


def _separable_flops(input, depthwise, pointwise, stride, padding, dilation, output=True) -> int:
    """N*P*Q * C * T * (R*S + K) multiply-accumulates, without K where the product is not made."""
    input = _batch(input, depthwise)
    size = list(_output_size(input, depthwise, stride, padding, dilation))
    product = conv_flop_count(size, pointwise, [size[0], pointwise[0], *size[2:]]) if output else 0
    return conv_flop_count(input, depthwise, size) + product


@register_flop_formula(torch.ops.sepconv_ext.separable_conv2d)
def _(input, depthwise, bias_d, pointwise, bias_p, stride, padding, dilation, *_, out_shape=None, **__) -> int:
    return _separable_flops(input, depthwise, pointwise, stride, padding, dilation)


@register_flop_formula(torch.ops.sepconv_ext.separable_conv2d_training)
def _(
    input, depthwise, bias_d, pointwise, bias_p, stride, padding, dilation, act_d, act_p, output, intermediate, **__
) -> int:
    return _separable_flops(input, depthwise, pointwise, stride, padding, dilation, output)


# Two operations a tap, the same number for the three.
@register_flop_formula(torch.ops.sepconv_ext.causal_conv1d)
def _(input, weight, *_, out_shape=None, **__) -> int:
    return 2 * math.prod(input) * weight[1]


@register_flop_formula(torch.ops.sepconv_ext.causal_conv1d_grad_input)
def _(grad_output, weight, *_, out_shape=None, **__) -> int:
    return 2 * math.prod(grad_output) * weight[1]


@register_flop_formula(torch.ops.sepconv_ext.causal_conv1d_grad_weight)
def _(grad_output, input, initial_states, seq_idx, width, *_, out_shape=None, **__) -> int:
    return 2 * math.prod(input) * width


@register_flop_formula(torch.ops.sepconv_ext.causal_conv1d_update)
def _(x, state, weight, *_, out_shape=None, **__) -> int:
    return 2 * math.prod(x) * weight[1]


# The column pass makes P rows of W columns, the row pass P rows of Q.
@register_flop_formula(torch.ops.sepconv_ext.spatial_separable_conv2d)
def _(input, column, row, *_, out_shape=None, **__) -> int:
    *batch, C, P, Q = out_shape
    return 2 * math.prod(batch) * C * P * (input[-1] * column[-1] + Q * row[-1])


@register_flop_formula(torch.ops.sepconv_ext.inverted_residual)
def _(
    input,
    expand,
    bias_e,
    depthwise,
    bias_d,
    project,
    bias_p,
    squeeze,
    bias_s,
    excite,
    bias_x,
    stride,
    padding,
    dilation,
    *_,
    **__,
) -> int:
    input = _batch(input, depthwise)
    between = [input[0], depthwise[0], *input[2:]]
    flops = 0 if expand is None else conv_flop_count(input, expand, between)
    size = list(_output_size(between, depthwise, stride, padding, dilation))
    flops += conv_flop_count(between, depthwise, size) + conv_flop_count(
        size, project, [size[0], project[0], *size[2:]]
    )
    if squeeze is not None:
        flops += 2 * conv_flop_count([size[0], size[1], 1, 1], squeeze, [size[0], squeeze[0], 1, 1])
    return flops
