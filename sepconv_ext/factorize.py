"""Factorising by singular values: 2-D filters into 1-D passes, dense convolutions into separable ones, and back.

A 2-D filter is a matrix. Where its rank is 1 it is the product of a column and a row, and filtering with it is a
vertical pass followed by a horizontal one: R + S products a pixel instead of R * S. Where its rank is higher, the
sum of the first few such pairs is the best approximation with that many (Eckart and Young, 1936). Its error is what
the singular values left out weigh. The same theorem turns a dense convolution into a depthwise-separable one: there the
matrix is, for each input channel, the `[K, R * S]` slice of the weight.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .functional import PaddingMode
from .nn import SeparableConv2d

__all__ = ["Separated", "SeparatedConv", "is_separable", "merge", "separable_from_conv", "separate"]


class Separated(NamedTuple):
    """What `separate` returns."""

    column: Tensor  # [rank, ..., R]: column[i] and row[i] are the i-th pair, the heaviest first
    row: Tensor  # [rank, ..., S]
    error: Tensor  # [...]: relative error of the sum of these pairs, in the Frobenius norm
    errors: Tensor  # [min(R, S), ...]: the same for rank 1, 2, ...; the last is 0 but for rounding


class SeparatedConv(NamedTuple):
    """What `separable_from_conv` returns."""

    layer: SeparableConv2d  # takes the place of the dense convolution
    error: float  # relative error of the weight that the layer stands for, in the Frobenius norm
    errors: list[float]  # the same for multiplier 1, 2, ..., min(K, R * S)


def separate(kernel: Tensor, rank: int = 1) -> Separated:
    """Column and row filters whose products, summed, are the best approximation of a filter.

    `sum(column[i][:, None] * row[i] for i in range(rank))` is the nearest matrix of that rank to the filter in the
    Frobenius norm. To filter an image with it, add up `functional.spatial_separable_conv2d(image, column[i], row[i])`.

    Args:
        kernel: `[R, S]`, or any number of filters `[..., R, S]` (one a channel: `[C, R, S]`), floating point.
        rank: pairs to keep, 1 to min(R, S). Default: 1.

    Returns:
        A Separated: column `[rank, ..., R]` and row `[rank, ..., S]` in the dtype of the kernel, the relative error
        `[...]` of this rank and the errors `[min(R, S), ...]` of all of them, in float64. A pair shares its singular
        value evenly, and the largest entry of each column filter (the first, of equals) is positive.

    Raises:
        ValueError: the kernel has fewer than 2 dimensions, or the rank is out of range.
        TypeError: it is not real floating point.

    The decomposition is done in float64 on the kernel's device. Source: C. Eckart and G. Young, "The approximation of
    one matrix by another of lower rank", Psychometrika 1, 1936.
    """
    _check_kernel(kernel)
    most = min(kernel.shape[-2:])
    if not 1 <= rank <= most:
        raise ValueError(f"rank must be 1 to min(R, S) = {most}, but is {rank}")
    u, s, vh = torch.linalg.svd(kernel.double(), full_matrices=False)
    errors = _relative_errors(s).movedim(-1, 0)
    column, row = u.mT[..., :rank, :], vh[..., :rank, :]  # [..., rank, R], [..., rank, S]
    size = column.abs()
    largest = column.gather(-1, (size >= (1 - 1e-9) * size.amax(-1, True)).int().argmax(-1, True))  # the first of them
    scale = s[..., :rank, None].sqrt() * torch.where(largest < 0, -1.0, 1.0)
    column, row = ((scale * t).movedim(-2, 0).to(kernel.dtype).contiguous() for t in (column, row))
    return Separated(column, row, errors[rank - 1], errors)


def is_separable(kernel: Tensor, tolerance: float | None = None) -> bool:
    """True if a filter is the product of a column and a row: if its matrix has rank 1.

    Args:
        kernel: `[R, S]`, or filters `[..., R, S]`, which must then all be separable.
        tolerance: the largest relative error, in the Frobenius norm, of the best pair. Default: what the rounding of
            the kernel's dtype explains, max(R, S) * eps.

    Raises:
        ValueError: the kernel has fewer than 2 dimensions.
        TypeError: it is not real floating point.
    """
    _check_kernel(kernel)
    if tolerance is None:
        tolerance = max(kernel.shape[-2:]) * torch.finfo(kernel.dtype).eps
    return bool((separate(kernel).error <= tolerance).all())


def separable_from_conv(conv: nn.Conv2d, multiplier: int = 1) -> SeparatedConv:
    """The depthwise-separable layer that is nearest to a dense convolution.

    For each input channel c the slice `weight[:, c]` is a matrix `[K, R * S]`. Its first `multiplier` = T singular
    vectors on the right become the T depthwise filters of the channel. Those on the left become the columns of the
    pointwise weight that take them up. No separable layer of this multiplier is nearer in the Frobenius norm of the
    weight.

    The dense layer has K * C * R * S weights and as many products a pixel, the separable one C * R * S * T + C * T * K.

    Args:
        conv: a dense nn.Conv2d (groups = 1): any kernel size, stride, padding, padding_mode and dilation.
        multiplier: T, 1 to min(K, R * S), where the result is exact. Default: 1.

    Returns:
        A SeparatedConv: the new layer, the relative error of its weight, and that error for every multiplier. The layer
        is on the conv's device, in its dtype and training mode; the conv's bias is in the pointwise stage.

    Raises:
        TypeError: not an nn.Conv2d of real weights.
        ValueError: the convolution has groups, or the multiplier is out of range.

    Source: Guo et al., "Network Decoupling: From Regular to Depthwise Separable Convolutions", 2018 (arXiv 1808.05517).
    """
    if not isinstance(conv, nn.Conv2d):
        raise TypeError(f"conv must be an nn.Conv2d, but is a {type(conv).__name__}")
    if conv.groups != 1:
        raise ValueError(f"conv must be dense (groups = 1), but has groups = {conv.groups}")
    _check_real("conv.weight", conv.weight)
    K, C, R, S = conv.weight.shape
    most = min(K, R * S)
    if not 1 <= multiplier <= most:
        raise ValueError(f"multiplier must be 1 to min(K, R * S) = {most}, but is {multiplier}")
    weight = conv.weight.detach()
    u, s, vh = torch.linalg.svd(weight.double().transpose(0, 1).reshape(C, K, R * S), full_matrices=False)
    errors = _relative_errors(s.square().sum(0).sqrt()).tolist()  # of all channels together
    scale = s[:, :multiplier].sqrt()  # [C, T]
    depthwise_weight = (scale[:, :, None] * vh[:, :multiplier]).reshape(C * multiplier, 1, R, S)
    pointwise_weight = (u[:, :, :multiplier] * scale[:, None]).permute(1, 0, 2).reshape(K, C * multiplier, 1, 1)
    layer = SeparableConv2d(
        C,
        K,
        _two(conv.kernel_size),
        _two(conv.stride),
        conv.padding if isinstance(conv.padding, str) else _two(conv.padding),
        _two(conv.dilation),
        multiplier,
        bias=False,
        padding_mode=conv.padding_mode,
        device=weight.device,
        dtype=weight.dtype,
    ).train(conv.training)
    with torch.no_grad():
        layer.depthwise.weight.copy_(depthwise_weight)
        layer.pointwise.weight.copy_(pointwise_weight)
    if conv.bias is not None:
        layer.pointwise.bias = nn.Parameter(conv.bias.detach().clone())
    return SeparatedConv(layer, errors[multiplier - 1], errors)


def merge(separable: nn.Module) -> nn.Conv2d:
    """The single convolution that a depthwise convolution followed by a 1x1 one equals.

    `weight[k, c, r, s] = sum over t of pointwise[k, c * T + t] * depthwise[c * T + t, r, s]`. A bias of the depthwise
    stage reaches every pixel through the pointwise weight and joins its bias; strides multiply. The result equals the
    pair for every input, up to rounding.

    Args:
        separable: a SeparableConv2d of this package without norms and activations, or an nn.Sequential of the two
            convolutions, among which nn.Identity may stand. There the pointwise one may have a stride, and groups that
            divide the input channels.

    Returns:
        A torch.nn.Conv2d on the same device, in the same dtype and training mode, with the pointwise stage's groups.

    Raises:
        TypeError: not such a pair, or its weights are complex.
        ValueError: the pair equals no single convolution (an activation or a norm, padding of the second stage,
            groups that do not divide the channels); the message says which.
    """
    depthwise, pointwise = _stages(separable)
    _check_real("depthwise.weight", depthwise.weight)
    C, T, groups = depthwise.in_channels, depthwise.out_channels // depthwise.in_channels, pointwise.groups
    if C % groups:
        raise ValueError(f"the pointwise stage has {groups} groups, which must divide the {C} input channels")
    stride = _two(a * b for a, b in zip(depthwise.stride, pointwise.stride, strict=True))
    padding, padding_mode = _merged_padding(depthwise, pointwise)
    merged = nn.Conv2d(
        C,
        pointwise.out_channels,
        _two(depthwise.kernel_size),
        stride,
        padding,
        _two(depthwise.dilation),
        groups,
        bias=depthwise.bias is not None or pointwise.bias is not None,
        padding_mode=padding_mode,
        device=depthwise.weight.device,
        dtype=depthwise.weight.dtype,
    ).train(separable.training)
    first, second = depthwise.weight.detach().double(), pointwise.weight.detach().double()
    K, R, S = merged.out_channels, *merged.kernel_size
    weight = torch.einsum(
        "gkct,gctrs->gkcrs",
        second.reshape(groups, K // groups, C // groups, T),
        first.reshape(groups, C // groups, T, R, S),
    )
    with torch.no_grad():
        merged.weight.copy_(weight.reshape(merged.weight.shape))
        if merged.bias is not None:
            bias = torch.zeros(K, dtype=torch.float64, device=weight.device)
            if pointwise.bias is not None:
                bias += pointwise.bias
            if depthwise.bias is not None:
                taken_up = second.reshape(groups, K // groups, -1) @ depthwise.bias.double().reshape(groups, -1, 1)
                bias += taken_up.reshape(K)
            merged.bias.copy_(bias)
    return merged


def _check_kernel(kernel: Tensor) -> None:
    if kernel.dim() < 2:
        raise ValueError(f"kernel must have at least 2 dimensions [..., R, S], but has {kernel.dim()}")
    _check_real("kernel", kernel)


def _check_real(name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be real floating point, but is {tensor.dtype}")


def _relative_errors(singular_values: Tensor) -> Tensor:
    """What all but the first 1, 2, ... of some singular values [..., rank] weigh, relative to all of them.

    The squares are summed from the smallest on, so that an exact rank shows as an error of rounding and not of
    cancellation.
    """
    squares = singular_values.square()
    left_out = squares.flip(-1).cumsum(-1).flip(-1)
    total = left_out[..., :1]
    left_out = torch.cat([left_out[..., 1:], torch.zeros_like(total)], -1)
    return (left_out / total.where(total > 0, 1)).sqrt()


def _stages(separable: nn.Module) -> tuple[nn.Conv2d, nn.Conv2d]:
    """The two convolutions of a pair that has nothing between them and nothing behind, or the reason why it is none."""
    if not isinstance(separable, (SeparableConv2d, nn.Sequential)):
        raise TypeError(
            "separable must be a SeparableConv2d or an nn.Sequential of two convolutions, but is a "
            f"{type(separable).__name__}"
        )
    stages = [stage for stage in separable._modules.values() if not isinstance(stage, (nn.Identity, type(None)))]
    if sum(isinstance(stage, nn.Conv2d) for stage in stages) != 2 or not isinstance(stages[0], nn.Conv2d):
        raise TypeError(f"separable must hold two convolutions, but holds {[type(stage).__name__ for stage in stages]}")
    others = [stage for stage in stages if not isinstance(stage, nn.Conv2d)]
    if others:
        raise ValueError(
            f"no single convolution equals a pair with a {type(others[0]).__name__}: fold or remove it first"
        )
    for module in (*stages, separable):
        for name in ("activation", "depthwise_activation"):
            if (activation := getattr(module, name, "identity")) != "identity":
                raise ValueError(f"no single convolution equals a pair with an activation: {name} is {activation!r}")
    depthwise, pointwise = (stage for stage in stages if isinstance(stage, nn.Conv2d))
    if depthwise.groups != depthwise.in_channels:
        raise ValueError(
            f"the first convolution must be depthwise (groups = {depthwise.in_channels} channels), but has groups = "
            f"{depthwise.groups}"
        )
    if pointwise.kernel_size != (1, 1) or pointwise.in_channels != depthwise.out_channels:
        raise ValueError(
            f"the second convolution must be 1x1 on {depthwise.out_channels} channels, but is "
            f"{pointwise.kernel_size[0]}x{pointwise.kernel_size[1]} on {pointwise.in_channels}"
        )
    return depthwise, pointwise


def _two(values: Iterable[int]) -> tuple[int, int]:
    height, width = values
    return height, width


def _merged_padding(depthwise: nn.Conv2d, pointwise: nn.Conv2d) -> tuple[str | tuple[int, int], PaddingMode]:
    """The padding of the single convolution, and its mode."""
    if not isinstance(pointwise.padding, str) and any(pointwise.padding):
        # Zeros around the intermediate are what zeros around the input give, only if the first stage is 1x1 and adds
        # nothing of its own.
        unpadded = isinstance(depthwise.padding, str) or not any(depthwise.padding)
        adds = depthwise.bias is not None or pointwise.padding_mode != "zeros"
        if depthwise.kernel_size != (1, 1) or not unpadded or adds:
            raise ValueError(
                f"the second convolution pads the result of the first (padding = {pointwise.padding}): no single "
                "convolution equals that, unless the first one is 1x1, without padding and without bias"
            )
        return _two(p * s for p, s in zip(pointwise.padding, depthwise.stride, strict=True)), "zeros"
    if not isinstance(depthwise.padding, str):
        return _two(depthwise.padding), depthwise.padding_mode
    if depthwise.padding != "same" or pointwise.stride == (1, 1):
        return depthwise.padding, depthwise.padding_mode
    total = [d * (k - 1) for d, k in zip(depthwise.dilation, depthwise.kernel_size, strict=True)]
    if any(n % 2 for n in total):
        raise ValueError(
            f"padding='same' of a {depthwise.kernel_size} kernel pads unevenly, which an nn.Conv2d of stride "
            f"{pointwise.stride} cannot"
        )
    return _two(n // 2 for n in total), depthwise.padding_mode
