"""What a network is made of while it is rewritten: a few nodes that say what is computed, not how.

Each of these functions stands in a graph as the target of a node. They compute what they say by plain torch, so that a
graph can be run at any moment between two rewrites; `lower.py` puts ops in their places.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from ..reference import ACTIVATIONS

__all__ = ["activate", "affine", "channel_norm", "channel_shuffle", "channels", "convolution", "linear"]


def convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    padding_mode: str = "zeros",
    residual: Tensor | None = None,
    activation: str = "identity",
) -> Tensor:
    """activation(conv2d(input) + bias + residual). `padding`: (h, w), or (top, bottom, left, right)."""
    sides = [padding[-1], padding[-1], padding[0], padding[0]]
    if len(padding) == 4:
        sides = [*padding[2:], *padding[:2]]
    padded = F.pad(input, sides, mode="constant" if padding_mode == "zeros" else padding_mode)
    return _finish(F.conv2d(padded, weight, bias, stride, 0, dilation, groups), residual, activation)


def linear(
    input: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None, activation: str = "identity"
) -> Tensor:
    """activation(input @ weight.T + bias + residual), over the last dimension."""
    return _finish(F.linear(input, weight, bias), residual, activation)


def affine(input: Tensor, scale: Tensor, shift: Tensor, dim: int) -> Tensor:
    """input * scale + shift, where both have one value for each index of dimension `dim`: a batch norm in eval()."""
    size = [-1] + [1] * (input.dim() - 1 - dim)
    return input * scale.reshape(size) + shift.reshape(size)


def channel_norm(input: Tensor, eps: float, dim: int) -> Tensor:
    """Dimension `dim` at mean 0 and variance 1, for each pixel: a LayerNorm without its scale and shift."""
    moved = input.movedim(dim, -1)
    return F.layer_norm(moved, moved.shape[-1:], eps=eps).movedim(-1, dim)


def activate(input: Tensor, activation: str) -> Tensor:
    """The activation of that name, alone."""
    return ACTIVATIONS[activation](input)


def channels(input: Tensor, begin: int, end: int) -> Tensor:
    """Channels [begin, end) of an image."""
    return input[:, begin:end]


def channel_shuffle(input: Tensor, groups: int) -> Tensor:
    """F.channel_shuffle: channels [groups, C / groups] in the order [C / groups, groups]."""
    return F.channel_shuffle(input, groups)


def _finish(output: Tensor, residual: Tensor | None, activation: str) -> Tensor:
    return ACTIVATIONS[activation](output if residual is None else output + residual)
