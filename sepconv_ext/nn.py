"""Drop-in modules: torch.nn.Conv2d's arguments, attributes and state_dict over the kernels of this package."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from . import functional

__all__ = ["Conv2d", "DepthwiseConv2d", "PointwiseConv2d"]


class Conv2d(nn.Conv2d):
    """A torch.nn.Conv2d whose convolution is `sepconv_ext.functional.conv2d`.

    Arguments, defaults, attributes, initialisation, state_dict and printed form are torch.nn.Conv2d's, and so is every
    `padding_mode`. Input [N, C, H, W] or [C, H, W]; output [N, K, P, Q] or [K, P, Q] in the layout that torch.nn.Conv2d
    gives.
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.padding_mode == "zeros":
            return self._convolve(input, weight, bias, self.padding)
        padded = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
        return self._convolve(padded, weight, bias, 0)

    def _convolve(self, input: Tensor, weight: Tensor, bias: Tensor | None, padding: Any) -> Tensor:
        return functional.conv2d(input, weight, bias, self.stride, padding, self.dilation, self.groups)


class _FusedConv2d(Conv2d):
    """A Conv2d that applies an activation to its output before the output reaches memory."""

    activation: str

    def extra_repr(self) -> str:
        text = super().extra_repr()
        return text if self.activation == "identity" else f"{text}, activation={self.activation}"


class DepthwiseConv2d(_FusedConv2d):
    """A depthwise convolution with a fused activation: `multiplier` filters for each channel.

    Args:
        channels: C of the input; the output has C * multiplier channels.
        kernel_size, stride, padding, dilation, bias, padding_mode, device, dtype: as for torch.nn.Conv2d.
        multiplier: filters a channel. Default: 1.
        activation: "identity" (default), "relu", "relu6", "leaky_relu", "gelu", "silu", "hardswish", "sigmoid" or
            "tanh".

    The weight is [C * multiplier, 1, R, S]: the state_dict of torch.nn.Conv2d(C, C * multiplier, ..., groups=C) loads.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        multiplier: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        activation: str = "identity",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(
            channels,
            channels * multiplier,
            kernel_size,
            stride,
            padding,
            dilation,
            groups=channels,
            bias=bias,
            padding_mode=padding_mode,
            device=device,
            dtype=dtype,
        )
        self.activation = activation

    def _convolve(self, input: Tensor, weight: Tensor, bias: Tensor | None, padding: Any) -> Tensor:
        return functional.depthwise_conv2d(
            input, weight, bias, self.stride, padding, self.dilation, activation=self.activation
        )


class PointwiseConv2d(_FusedConv2d):
    """A 1x1 convolution with a fused activation: a matrix product over the channels of each pixel.

    Args:
        in_channels, out_channels: C and K.
        bias, device, dtype: as for torch.nn.Conv2d.
        activation: as for DepthwiseConv2d. Default: "identity".

    The weight is [K, C, 1, 1]: the state_dict of torch.nn.Conv2d(C, K, 1) loads.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        bias: bool = True,
        activation: str = "identity",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(in_channels, out_channels, 1, bias=bias, device=device, dtype=dtype)
        self.activation = activation

    def _convolve(self, input: Tensor, weight: Tensor, bias: Tensor | None, padding: Any) -> Tensor:
        return functional.pointwise_conv2d(input, weight, bias, activation=self.activation)
