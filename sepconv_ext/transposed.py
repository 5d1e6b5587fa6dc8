"""Transposed convolutions: the gradient by the input of the convolution that goes the other way.

A transposed convolution with weight [K, C / groups, R, S] takes an output of the convolution with that weight to its
input (Zeiler et al., Deconvolutional Networks, 2010; Dumoulin and Visin, arXiv 1603.07285, chapter 4). So the op
``conv2d_grad_input`` is its forward call, and derivatives of every order are those of that op.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _C
from .ops import _dense_strides, _suggests_channels_last

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def conv_transpose(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    groups: int,
    dilation: Sequence[int],
) -> Tensor:
    """Of images or sequences (as many entries in stride as spatial dimensions).

    What the op does not cover, and every argument that is wrong, goes to torch's function, which computes or raises.
    """
    dims = len(stride)
    input, weight, bias = (_by_autocast(tensor) for tensor in (input, weight, bias))
    pixels = None
    if _is_covered(input, weight, bias, groups, dims):
        pixels = _pixels(input.shape[-dims:], weight.shape[2:], stride, padding, output_padding, dilation)
    if pixels is None:
        torchs = torch.conv_transpose1d if dims == 1 else torch.conv_transpose2d
        return torchs(input, weight, bias, stride, padding, output_padding, groups, dilation)
    if bias is not None and not torch.compiler.is_compiling():
        _C.check_storage("bias", bias)
    size = (*input.shape[: -dims - 1], weight.shape[1] * groups, *pixels)
    channels_last = _suggests_channels_last(input, dims) or _suggests_channels_last(weight, dims)
    strides = _dense_strides(size, dims, channels_last)
    op = torch.ops.sepconv_ext.conv2d_grad_input
    output = op(input, weight, size, strides, stride, padding, dilation, groups)
    # A DTensor's parameter has no view in inference mode.
    return output if bias is None else output + bias.reshape(-1, *[1] * dims)


def _by_autocast(tensor: Any) -> Any:
    """As autocast gives an operand to torch's transposed convolutions."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    device = tensor.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensor
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.overrides.has_torch_function((tensor,)):
        return tensor.to(torch.get_autocast_dtype(device))
    return _C.cast_by_autocast(tensor)


def _is_covered(input: Any, weight: Any, bias: Any, groups: Any, dims: int) -> bool:
    """Whether the tensors fit each other, and have a dtype of the kernels."""
    if not (isinstance(input, Tensor) and isinstance(weight, Tensor) and _is_integer(groups)):
        return False
    if torch.jit.is_tracing():  # sizes are tensors, and the op's would become constants of the trace
        return False
    if any(isinstance(t, Tensor) and t.layout != torch.strided for t in (input, weight, bias)):
        return False
    if input.dtype not in _DTYPES or weight.dtype != input.dtype or weight.device != input.device:
        return False
    if weight.dim() != dims + 2 or input.dim() not in (dims + 1, dims + 2):
        return False
    K = weight.shape[0]
    if groups < 1 or K < 1 or K % groups != 0 or input.shape[-dims - 1] != K:
        return False
    if bias is None:
        return True
    alike = isinstance(bias, Tensor) and bias.dtype == input.dtype and bias.device == input.device
    return alike and bias.dim() == 1 and bias.shape[0] == weight.shape[1] * groups


def _is_integer(value: Any) -> bool:
    return isinstance(value, (int, torch.SymInt))


def _pixels(
    size: Sequence[int],
    taps: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    dilation: Sequence[int],
) -> list[int] | None:
    """The output's size in each spatial dimension; None where no convolution goes the other way.

    A convolution rounds off what output_padding adds as long as that is below the stride. torch takes more where the
    dilation is larger still.
    """
    numbers = (*stride, *padding, *output_padding, *dilation)
    if not all(map(_is_integer, numbers)) or any(type(n) is int and abs(n) >= 2**62 for n in numbers):
        return None
    pixels = []
    for n, k, s, p, more, d in zip(size, taps, stride, padding, output_padding, dilation, strict=True):
        if n < 1 or k < 1 or s < 1 or d < 1 or p < 0 or more < 0 or more >= s:
            return None
        pixels.append((n - 1) * s - 2 * p + d * (k - 1) + more + 1)
    return pixels if all(n >= 1 for n in pixels) else None
