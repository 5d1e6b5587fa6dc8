"""Slow, obvious oracles for the three maps and the separable pair, shared by the tests and the benchmarks.

Everything is computed in float64 with one plain loop over the taps of the kernel. No convolution routine of torch is
called, so an oracle shares no code with what it judges. The three functions are written out one by one from

    y[n, k, p, q] = sum over c, r, s of  x[n, c, h, w] * weight[k, c', r, s]
        where h = p*stride_h + r*dilation_h - top,  w = q*stride_w + s*dilation_w - left

and not derived from each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda t: t,
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}


def pair(value: int | Sequence[int]) -> tuple[int, int]:
    """An int or a sequence of one or two ints as (vertical, horizontal)."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return (values[0], values[-1])


def four_paddings(
    padding: str | int | Sequence[int], kernel: tuple[int, int], dilation: tuple[int, int]
) -> tuple[int, int, int, int]:
    """Any spelling of padding as (top, bottom, left, right); 'same' puts an odd pixel at the bottom and right."""
    if padding == "valid":
        return (0, 0, 0, 0)
    if padding == "same":
        total_h, total_w = (d * (k - 1) for d, k in zip(dilation, kernel, strict=True))
        return (total_h // 2, total_h - total_h // 2, total_w // 2, total_w - total_w // 2)
    if isinstance(padding, str):
        raise ValueError(f"padding must be 'same', 'valid' or numbers, but is {padding!r}")
    if not isinstance(padding, int) and len(padding) == 4:
        top, bottom, left, right = padding
        return (top, bottom, left, right)
    vertical, horizontal = pair(padding)
    return (vertical, vertical, horizontal, horizontal)


def output_size(
    size: Sequence[int],
    weight_size: Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
) -> tuple[int, int, int, int]:
    """(N, K, P, Q) of an input of size (N, C, H, W) and a weight of size (K, C / groups, R, S)."""
    (stride_h, stride_w), (dilation_h, dilation_w) = pair(stride), pair(dilation)
    kernel_h, kernel_w = weight_size[2:]
    top, bottom, left, right = four_paddings(padding, (kernel_h, kernel_w), (dilation_h, dilation_w))
    rows = (size[2] + top + bottom - dilation_h * (kernel_h - 1) - 1) // stride_h + 1
    columns = (size[3] + left + right - dilation_w * (kernel_w - 1) - 1) // stride_w + 1
    return (size[0], weight_size[0], rows, columns)


class _Taps:
    """The geometry that the three oracles share: which part of the padded input meets tap (r, s)."""

    def __init__(self, input_size, weight_size, stride, padding, dilation, groups):
        self.N, self.C, self.H, self.W = input_size
        self.K, _, self.R, self.S = weight_size
        self.groups = groups
        self.stride, self.dilation = pair(stride), pair(dilation)
        self.top, self.bottom, self.left, self.right = four_paddings(padding, (self.R, self.S), self.dilation)
        _, _, self.P, self.Q = output_size(input_size, weight_size, stride, padding, dilation)

    def padded_zeros(self, device: torch.device) -> Tensor:
        rows, columns = self.H + self.top + self.bottom, self.W + self.left + self.right
        return torch.zeros(self.N, self.C, rows, columns, dtype=torch.float64, device=device)

    def image(self, padded: Tensor) -> Tensor:
        """The part of the padded input that is the input: a view."""
        return padded[:, :, self.top : self.top + self.H, self.left : self.left + self.W]

    def windows(self, padded: Tensor) -> Iterator[tuple[int, int, Tensor]]:
        """For each tap (r, s): the view [N, groups, C / groups, P, Q] of the pixels that it multiplies."""
        grouped = padded.unflatten(1, (self.groups, self.C // self.groups))
        for r in range(self.R):
            for s in range(self.S):
                h, w = r * self.dilation[0], s * self.dilation[1]
                rows = slice(h, h + (self.P - 1) * self.stride[0] + 1, self.stride[0])
                columns = slice(w, w + (self.Q - 1) * self.stride[1] + 1, self.stride[1])
                yield r, s, grouped[..., rows, columns]


def forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    activation: str = "identity",
) -> Tensor:
    """C(x, w) in float64.

    Args:
        input: [N, C, H, W], any dtype and strides.
        weight: [K, C / groups, R, S].
        bias: [K], or None.
        stride, dilation: an int or (vertical, horizontal).
        padding: an int, (vertical, horizontal), (top, bottom, left, right), 'same' or 'valid'.
        groups: divides C and K.
        activation: a key of ACTIVATIONS, applied to the sum.

    Returns:
        [N, K, P, Q], float64, contiguous.
    """
    taps = _Taps(input.shape, weight.shape, stride, padding, dilation, groups)
    padded = taps.padded_zeros(input.device)
    taps.image(padded).copy_(input)
    filters = weight.double().unflatten(0, (groups, taps.K // groups))
    output = torch.zeros(taps.N, groups, taps.K // groups, taps.P, taps.Q, dtype=torch.float64, device=input.device)
    for r, s, window in taps.windows(padded):
        output += torch.einsum("ngcpq,gkc->ngkpq", window, filters[..., r, s])
    output = output.flatten(1, 2)
    if bias is not None:
        output += bias.double()[:, None, None]
    return ACTIVATIONS[activation](output)


def separable(
    input: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    depthwise_bias: Tensor | None = None,
    pointwise_bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    depthwise_activation: str = "identity",
    pointwise_activation: str = "identity",
) -> Tensor:
    """The pair pw(act(dw(x))) in float64: [N, C, H, W], [C * T, 1, R, S] and [K, C * T, 1, 1] to [N, K, P, Q]."""
    geometry = (stride, padding, dilation, input.shape[1])
    between = forward(input, depthwise_weight, depthwise_bias, *geometry, depthwise_activation)
    output = torch.einsum("ncpq,kc->nkpq", between, pointwise_weight.double()[:, :, 0, 0])
    if pointwise_bias is not None:
        output += pointwise_bias.double()[:, None, None]
    return ACTIVATIONS[pointwise_activation](output)


def grad_input(
    grad_output: Tensor,
    weight: Tensor,
    input_size: Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """Cx(g, w) in float64: the gradient by the input of the sum of g * C(x, w). Shapes as in `forward`.

    Returns:
        [N, C, H, W] (`input_size`), float64, contiguous.
    """
    taps = _Taps(input_size, weight.shape, stride, padding, dilation, groups)
    padded = taps.padded_zeros(weight.device)
    gradient = grad_output.double().unflatten(1, (groups, taps.K // groups))
    filters = weight.double().unflatten(0, (groups, taps.K // groups))
    for r, s, window in taps.windows(padded):
        window += torch.einsum("ngkpq,gkc->ngcpq", gradient, filters[..., r, s])
    return taps.image(padded).clone(memory_format=torch.contiguous_format)


def grad_weight(
    grad_output: Tensor,
    input: Tensor,
    weight_size: Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """Cw(g, x) in float64: the gradient by the weight of the sum of g * C(x, w). Shapes as in `forward`.

    Returns:
        [K, C / groups, R, S] (`weight_size`), float64, contiguous.
    """
    taps = _Taps(input.shape, weight_size, stride, padding, dilation, groups)
    padded = taps.padded_zeros(input.device)
    taps.image(padded).copy_(input)
    gradient = grad_output.double().unflatten(1, (groups, taps.K // groups))
    result = torch.zeros(
        groups,
        taps.K // groups,
        taps.C // groups,
        taps.R,
        taps.S,
        dtype=torch.float64,
        device=input.device,
    )
    for r, s, window in taps.windows(padded):
        result[..., r, s] = torch.einsum("ngkpq,ngcpq->gkc", gradient, window)
    return result.flatten(0, 1)


def causal(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dilation: int = 1,
    activation: str = "identity",
) -> Tensor:
    """The causal depthwise convolution in float64, one sequence, output and tap at a time. Differentiable.

    Args:
        input: [N, C, L], any dtype and strides.
        weight: [C, S].
        bias: [C], or None.
        initial_states: [N, C, (S - 1) * dilation], or None.
        seq_idx: [N, L], whole numbers, or None: where it changes a sequence begins, and negative is padding.
        dilation: distance between taps.
        activation: a key of ACTIVATIONS.

    Returns:
        [N, C, L], float64.
    """
    N, C, L = input.shape
    reach = (weight.shape[1] - 1) * dilation
    x, w = input.double(), weight.double()
    before = x.new_zeros(N, C, reach) if initial_states is None else initial_states.double()
    rows = []
    for n in range(N):
        numbers = [0] * L if seq_idx is None else seq_idx[n].tolist()
        outputs, begin = [], 0
        for q in range(L):
            if q > 0 and numbers[q] != numbers[q - 1]:
                begin = q
            if numbers[q] < 0:
                outputs.append(x.new_zeros(C))
                continue
            total = x.new_zeros(C) if bias is None else bias.double()
            for s in range(weight.shape[1]):
                p = q - reach + s * dilation
                if p >= begin:
                    total = total + w[:, s] * x[n, :, p]
                elif p < 0 and begin == 0:
                    total = total + w[:, s] * before[n, :, reach + p]
            outputs.append(ACTIVATIONS[activation](total))
        rows.append(torch.stack(outputs, 1))
    return torch.stack(rows)
