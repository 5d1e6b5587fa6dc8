"""The stateless face: F.conv2d's and F.conv1d's calls; depthwise, pointwise and separable ones with activations."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Literal, SupportsIndex, cast, get_args

import torch
from torch import Tensor

from . import _C
from .argument_types import naming_wrong_types
from .transposed import conv_transpose as _conv_transpose
from .volumes import conv3d as _conv3d

# torch.fx keeps these calls whole, as it does F.conv2d, so that a converted model still traces.
for _name in ("_conv2d", "conv1d", "conv2d", "padded_conv1d", "padded_conv2d"):
    torch.fx.wrap(_name)
for _name in ("depthwise_conv2d", "pointwise_conv2d", "separable_conv2d"):
    torch.fx.wrap(_name)
torch.fx.wrap("spatial_separable_conv2d")
torch.fx.wrap("inverted_residual")
torch.fx.wrap("causal_conv1d")
torch.fx.wrap("causal_conv1d_update")
torch.fx.wrap("conv3d")
torch.fx.wrap("conv_transpose1d")
torch.fx.wrap("conv_transpose2d")

IntOrPair = int | Sequence[int]
IntOrSingle = int | Sequence[int]
IntOrThree = int | Sequence[int]
PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]
PADDING_MODES = get_args(PaddingMode)


def _whole(name: str, n: object) -> int:
    """Of what torch takes for a whole number: int, a symbol, and numpy's and tensors' ones."""
    if isinstance(n, (int, torch.SymInt)) and not isinstance(n, bool):
        return cast(int, n)
    try:
        return operator.index(cast(SupportsIndex, None if isinstance(n, bool) else n))
    except TypeError:
        raise TypeError(f"{name} must be of integers, but has {n!r}") from None


def _entries(name: str, value: object, dims: int) -> Sequence[int]:
    """One value stands for every dimension, as torch reads it."""
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    if len(values) not in (1, dims):
        wanted = "one value" if dims == 1 else "one value or 2 (height, width)"
        raise RuntimeError(f"{name} must be {wanted}, but is {value}")
    numbers = [_whole(name, n) for n in values]
    return (numbers[0],) * dims if len(numbers) < dims else tuple(numbers)


def _pair(name: str, value: IntOrPair) -> Sequence[int]:
    return _entries(name, value, 2)


def _padding(
    padding: IntOrPair | str, weight_size: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> Sequence[int]:
    """Padding in numbers: (h, w), or (top, bottom, left, right) for ``'same'``: its odd pixel goes below and right."""
    if not isinstance(padding, str):
        return _pair("padding", padding)
    if padding == "valid":
        return (0, 0)
    if padding != "same":
        raise RuntimeError(f"padding must be 'same' or 'valid', but is {padding!r}")
    return _padding_same(weight_size, stride, dilation)


def _padding_same(weight_size: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> Sequence[int]:
    """Both sides of every dimension, such that the output has the input's size."""
    if not all(s == 1 for s in stride):
        raise RuntimeError(f"padding='same' needs a stride of 1, but stride is {tuple(stride)}")
    if len(weight_size) != 2 + len(stride):
        raise RuntimeError(f"weight must have {2 + len(stride)} dimensions, but has {len(weight_size)}")
    sizes = map(int, weight_size) if torch.jit.is_tracing() else weight_size  # there they are tensors
    zeros = [d * (taps - 1) for d, taps in zip(dilation, list(sizes)[2:], strict=True)]
    return [side for n in zeros for side in (n // 2, n - n // 2)]


def _conv2d(
    input, weight, bias, stride, padding, dilation, groups, activation="identity", padding_mode="zeros"
) -> Tensor:
    """_C.conv2d's call; in Python where torch.compile traces it, which cannot look into a C function."""
    if not torch.compiler.is_compiling():
        names = dict(activation=activation, padding_mode=padding_mode)
        return _C.conv2d(input, weight, bias, stride, padding, dilation, groups, **names)
    stride, dilation = _pair("stride", stride), _pair("dilation", dilation)
    padding = _padding(padding, weight.shape, stride, dilation)
    op = torch.ops.sepconv_ext.conv2d
    return op(input, weight, bias, stride, padding, dilation, groups, activation, padding_mode)


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntOrPair = 1,
    padding: IntOrPair | str = 0,
    dilation: IntOrPair = 1,
    groups: int = 1,
) -> Tensor:
    """`torch.nn.functional.conv2d` by this package's kernels: the same arguments, result, layout and errors.

    Args:
        input: ``[N, C, H, W]`` or ``[C, H, W]``; any strides.
        weight: ``[K, C / groups, R, S]``.
        bias: ``[K]`` or None.
        stride: one value or (height, width). Default 1.
        padding: zeros around the image, one value or (height, width), ``'same'`` or ``'valid'``. Default 0.
        dilation: distance between the kernel's taps, one value or (height, width). Default 1.
        groups: divides C and K; ``groups == C`` is depthwise. Default 1.

    Returns:
        ``[N, K, P, Q]`` with ``P = (H + 2 * padding - dilation * (R - 1) - 1) // stride + 1`` and Q alike; in
        channels_last where the input or the weight is.

    Raises:
        TypeError: arguments of a wrong type, as in `torch.nn.functional.conv2d`.
        RuntimeError: sizes, dtypes and devices that do not fit, as there.
    """
    if torch.compiler.is_compiling():
        return _conv2d(input, weight, bias, stride, padding, dilation, groups)
    return _C.conv2d(input, weight, bias, stride, padding, dilation, groups)


def _single(name: str, value: IntOrSingle) -> Sequence[int]:
    return _entries(name, value, 1)


def _padding_1d(
    padding: IntOrSingle | str, weight_size: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> Sequence[int]:
    """The padding in numbers: (both sides), or (left, right); ``'causal'`` puts all of it to the left."""
    if not isinstance(padding, str):
        return _single("padding", padding)
    if padding == "causal":
        return (dilation[0] * (weight_size[-1] - 1), 0)
    if padding == "same":
        return _padding_same(weight_size, stride, dilation)
    if padding == "valid":
        return (0,)
    raise RuntimeError(f"padding must be 'same', 'valid' or 'causal', but is {padding!r}")


def _conv1d(
    input, weight, bias, stride, padding, dilation, groups, padding_mode="zeros", activation="identity"
) -> Tensor:
    """_C.conv1d's call, as _conv2d is _C.conv2d's."""
    if not torch.compiler.is_compiling():
        names = dict(activation=activation, padding_mode=padding_mode)
        return _C.conv1d(input, weight, bias, stride, padding, dilation, groups, **names)
    stride, dilation = _single("stride", stride), _single("dilation", dilation)
    padding = _padding_1d(padding, weight.shape, stride, dilation)
    op = torch.ops.sepconv_ext.conv2d
    return op(input, weight, bias, stride, padding, dilation, groups, activation, padding_mode)


def conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntOrSingle = 1,
    padding: IntOrSingle | str = 0,
    dilation: IntOrSingle = 1,
    groups: int = 1,
) -> Tensor:
    """`torch.nn.functional.conv1d`, by this package's kernels: the same arguments, result and errors.

    The kernels read the sequence as an image of one row, where it lies. A sequence ``[N, C, L]`` may lie in memory as
    ``[N, L, C]``, as ``x.transpose(1, 2)`` of a contiguous ``[N, L, C]`` does. The channels_last kernels compute it as
    it lies, and the output lies in the same order. F.conv1d would copy it and return ``[N, K, L]``.

    Args:
        input: ``[N, C, L]`` or ``[C, L]``; any strides.
        weight: ``[K, C / groups, S]``.
        bias: ``[K]`` or None.
        stride: one value. Default 1.
        padding: zeros at both ends, one value; ``'same'``, ``'valid'``, or ``'causal'``: ``dilation * (S - 1)`` zeros
            at the left alone, so that output q sees inputs up to ``q * stride`` and nothing later. Default 0.
        dilation: distance between the filter's taps, one value. Default 1.
        groups: divides C and K; ``groups == C`` is depthwise. Default 1.

    Returns:
        ``[N, K, Q]`` with ``Q = (L + 2 * padding - dilation * (S - 1) - 1) // stride + 1``;
        ``Q = (L - 1) // stride + 1`` for ``'causal'``.

    Raises:
        TypeError: arguments of a wrong type, as in `torch.nn.functional.conv1d`.
        RuntimeError: sizes, dtypes and devices that do not fit, as there.
    """
    if torch.compiler.is_compiling():
        return _conv1d(input, weight, bias, stride, padding, dilation, groups)
    return _C.conv1d(input, weight, bias, stride, padding, dilation, groups)


def padded_conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntOrSingle = 1,
    padding: IntOrSingle | str = 0,
    dilation: IntOrSingle = 1,
    groups: int = 1,
    *,
    padding_mode: PaddingMode = "zeros",
) -> Tensor:
    """`conv1d` with something else than zeros at the ends, as `padded_conv2d` has it around an image."""
    return _conv1d(input, weight, bias, stride, padding, dilation, groups, padding_mode)


def conv3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntOrThree = 1,
    padding: IntOrThree | str = 0,
    dilation: IntOrThree = 1,
    groups: int = 1,
) -> Tensor:
    """`torch.nn.functional.conv3d`; depthwise ones on a CPU by this package's kernels, every other by torch's function.

    A depthwise convolution of a volume is a sum over the taps along its depth, and each term is a convolution of its
    planes. Half types are summed in float32 and rounded once. Differentiable to any order.

    Args:
        input: ``[N, C, D, H, W]`` or ``[C, D, H, W]``, dense in this order or in channels_last_3d; else it is copied.
        weight: ``[K, C / groups, kD, R, S]``; depthwise where ``groups == C`` and C is at least 2.
        bias: ``[K]`` or None.
        stride: one value or (depth, height, width). Default 1.
        padding: zeros around the volume, one value or (depth, height, width), ``'same'`` or ``'valid'``. Default 0.
        dilation: distance between the kernel's taps, one value or (depth, height, width). Default 1.
        groups: divides C and K. Default 1.

    Returns:
        ``[N, K, T, P, Q]``; in channels_last_3d where the input or the weight is.

    Raises:
        TypeError: arguments of a wrong type, as in `torch.nn.functional.conv3d`.
        RuntimeError: sizes, dtypes and devices that do not fit, as there.
    """
    return _conv3d(input, weight, bias, stride, padding, dilation, groups)


@naming_wrong_types
def causal_conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    seq_idx: Tensor | None = None,
    dilation: int = 1,
) -> Tensor | tuple[Tensor, Tensor]:
    """The causal depthwise convolution of state-space models (Mamba, arXiv 2312.00752), with states and packing.

    ``output[n, c, q]`` is ``activation(bias[c] + sum over s of weight[c, s] * input[n, c, q - reach + s * dilation])``
    with ``reach = (S - 1) * dilation``. The channels may lie next to each other in memory: ``x.transpose(1, 2)`` of an
    ``[N, L, C]`` tensor, or of a slice of a wider projection's channels, is computed where it lies. Differentiable to
    any order by all tensors.

    Args:
        input: ``[N, C, L]``, or ``[C, L]``; any strides. Without N, states, `seq_idx` and results have none.
        weight: ``[C, S]``, or ``[C, 1, S]`` as torch.nn.Conv1d has it; any width.
        bias: ``[C]`` or None.
        activation: a name that `depthwise_conv2d` lists, or None.
        initial_states: ``[N, C, reach]``, what stands before the input; None is zeros.
        return_final_states: return what a next call takes for its initial states, too. Default False.
        seq_idx: ``[N, L]`` of whole numbers, for several sequences in one row: where the number changes, another one
            begins, and no output sees another sequence. Where it is negative there is padding: the output is 0.
            Initial states belong to the first sequence of a row, and final states are the last one's.
        dilation: distance between the filter's taps. Default 1.

    Returns:
        ``[N, C, L]``, with its channels next to each other where the input's are; with `return_final_states` also the
        final states ``[N, C, reach]``, contiguous.

    Raises:
        ValueError: an unknown activation.
        RuntimeError: sizes, dtypes and devices that do not fit.
    """
    if input.dim() == 2:
        states, numbers = (None if t is None else t.unsqueeze(0) for t in (initial_states, seq_idx))
        batch = input.unsqueeze(0)
        result = causal_conv1d(batch, weight, bias, activation, states, return_final_states, numbers, dilation)
        if isinstance(result, Tensor):
            return _without(result, 0)
        return _without(result[0], 0), _without(result[1], 0)
    filters = weight.squeeze(1) if weight.dim() == 3 else weight
    name = "identity" if activation is None else activation
    if initial_states is None and seq_idx is None and input.dim() == 3 and filters.dim() == 2:
        taps = weight if weight.dim() == 3 else weight.unsqueeze(1)
        output = _conv1d(input, taps, bias, 1, "causal", dilation, filters.shape[0], activation=name)
    else:
        op = torch.ops.sepconv_ext.causal_conv1d
        output = op(input, filters, bias, initial_states, seq_idx, dilation, name)
    if not return_final_states:
        return output
    return output, _final_states(input, initial_states, seq_idx, (filters.shape[1] - 1) * dilation)


def _final_states(input: Tensor, initial_states: Tensor | None, seq_idx: Tensor | None, reach: int) -> Tensor:
    """The last `reach` positions of the input behind its states, in memory of their own."""
    length, from_input = input.shape[2], min(reach, input.shape[2])
    last = input.narrow(2, length - from_input, from_input)
    if seq_idx is not None:
        # A position is of the last sequence if no number changes behind it.
        numbers = seq_idx.narrow(1, length - from_input, from_input)
        changes = torch.nn.functional.pad(numbers[:, 1:] != numbers[:, :-1], (0, 1))
        later = changes.flip(1).cumsum(1).flip(1) > 0
        last = last.masked_fill((later | (numbers < 0)).unsqueeze(1), 0)
        if initial_states is not None and from_input < reach:
            others = ((seq_idx != seq_idx[:, :1]).any(1) | (seq_idx[:, 0] < 0))[:, None, None]
            initial_states = initial_states.masked_fill(others, 0)
    if from_input == reach:
        return last.clone(memory_format=torch.contiguous_format)
    if initial_states is None:
        return torch.nn.functional.pad(last, (reach - from_input, 0))
    return torch.cat((initial_states.narrow(2, from_input, reach - from_input), last), 2)


@naming_wrong_types
def causal_conv1d_update(
    input: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    state_indices: Tensor | None = None,
    dilation: int = 1,
) -> Tensor:
    """`causal_conv1d` of the next token or tokens, with a state that is moved on in place: one step of decoding.

    Not differentiable.

    Args:
        input: ``[N, C]``, one token, or ``[N, C, T]``; any strides.
        state: ``[N, C, length]`` with ``length >= reach``: the inputs before these, the latest last. It is changed.
        weight, bias, activation, dilation: as in `causal_conv1d`. Weight and bias may be float32 where the others are
            of a half type.
        cache_seqlens: ``[N]`` of whole numbers: how many tokens came before. The states are then rings: token i of a
            sequence stands at ``i % length``. None: they are shifted.
        state_indices: ``[N]`` of whole numbers: the row of `state`, which may have others, of each sequence; no two
            alike. Where it is negative the output is 0 and no state changes. None: row n.

    Returns:
        ``[N, C]`` or ``[N, C, T]``, contiguous.

    Raises:
        IndexError: a row that `state` does not have; on a GPU its outputs are NaN instead.
        ValueError: an unknown activation.
        RuntimeError: sizes, dtypes and devices that do not fit.
    """
    filters = weight.squeeze(1) if weight.dim() == 3 else weight
    tokens = input.unsqueeze(2) if input.dim() == 2 else input
    name = "identity" if activation is None else activation
    op = torch.ops.sepconv_ext.causal_conv1d_update
    output = op(tokens, state, filters, bias, cache_seqlens, state_indices, dilation, name)
    return _without(output, 2) if input.dim() == 2 else output


def _without(t: Tensor, dim: int) -> Tensor:
    """A fresh tensor without a dimension of size 1: the same memory, but no view of another tensor for autograd."""
    return torch.ops.aten._unsafe_view(t, [*t.shape[:dim], *t.shape[dim + 1 :]])


def padded_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntOrPair = 1,
    padding: IntOrPair | str = 0,
    dilation: IntOrPair = 1,
    groups: int = 1,
    *,
    padding_mode: PaddingMode = "zeros",
) -> Tensor:
    """`conv2d` with something else than zeros around the image, without a padded copy of it.

    ``F.conv2d(F.pad(input, ..., mode), weight, bias, stride, 0, dilation, groups)`` in one call. What does not see the
    padding is computed as with zeros; the rest reads the pixels that the mode puts outside. Two calls still make a
    padded copy: the gradient by the weight in half types, and what goes to torch's own convolution (`explain`).

    Args:
        input ... groups: as in `conv2d`.
        padding_mode: ``zeros`` (default), ``reflect`` (the image mirrored at its outermost pixels; padding less than
            its size), ``replicate`` (the outermost pixels continued) or ``circular`` (the opposite side; padding at
            most the size).

    Returns:
        ``[N, K, P, Q]``, as `conv2d`.

    Raises:
        ValueError: an unknown padding_mode.
        RuntimeError: as `conv2d`, and for padding that the mode forbids, as ``F.pad``.
    """
    return _conv2d(input, weight, bias, stride, padding, dilation, groups, "identity", padding_mode)


def conv_transpose1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntOrSingle = 1,
    padding: IntOrSingle = 0,
    output_padding: IntOrSingle = 0,
    groups: int = 1,
    dilation: IntOrSingle = 1,
) -> Tensor:
    """`torch.nn.functional.conv_transpose1d` by this package's kernels: `conv_transpose2d` of sequences.

    Args:
        input: ``[N, K, Q]`` or ``[K, Q]``; any strides.
        weight: ``[K, C / groups, S]``.
        bias, stride, padding, output_padding, groups, dilation: as in `conv_transpose2d`, one value each.

    Returns:
        ``[N, C, L]`` with ``L = (Q - 1) * stride - 2 * padding + dilation * (S - 1) + output_padding + 1``.

    Raises:
        TypeError: arguments of a wrong type, as in `torch.nn.functional.conv_transpose1d`.
        RuntimeError: sizes, dtypes and devices that do not fit, as there.
    """
    values = dict(stride=stride, padding=padding, output_padding=output_padding, dilation=dilation)
    stride, padding, output_padding, dilation = (_single(name, value) for name, value in values.items())
    return _conv_transpose(input, weight, bias, stride, padding, output_padding, groups, dilation)


def conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntOrPair = 1,
    padding: IntOrPair = 0,
    output_padding: IntOrPair = 0,
    groups: int = 1,
    dilation: IntOrPair = 1,
) -> Tensor:
    """`torch.nn.functional.conv_transpose2d` by this package's kernels: the same arguments, result and errors.

    It is the gradient by the input of the convolution with the same weight, and is computed as that; so its own
    gradients are that convolution and its gradient by the weight.

    Args:
        input: ``[N, K, P, Q]`` or ``[K, P, Q]``; any strides.
        weight: ``[K, C / groups, R, S]``.
        bias: ``[C]`` or None; added in a pass of its own, so a half type is rounded before and after.
        stride: one value or (height, width). Default 1.
        padding: rows and columns that are left out at all sides, one value or (height, width). Default 0.
        output_padding: more of them at the bottom and the right; below the stride or the dilation. Default 0.
        groups: divides K and C; ``groups == K`` is depthwise. Default 1.
        dilation: distance between the kernel's taps, one value or (height, width). Default 1.

    Returns:
        ``[N, C, H, W]`` with ``H = (P - 1) * stride - 2 * padding + dilation * (R - 1) + output_padding + 1`` and W
        alike; in channels_last where the input or the weight is.

    Raises:
        TypeError: arguments of a wrong type, as in `torch.nn.functional.conv_transpose2d`.
        RuntimeError: sizes, dtypes and devices that do not fit, as there.
    """
    values = dict(stride=stride, padding=padding, output_padding=output_padding, dilation=dilation)
    stride, padding, output_padding, dilation = (_pair(name, value) for name, value in values.items())
    return _conv_transpose(input, weight, bias, stride, padding, output_padding, groups, dilation)


@naming_wrong_types
def depthwise_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntOrPair = 1,
    padding: IntOrPair | str = 0,
    dilation: IntOrPair = 1,
    activation: str = "identity",
    padding_mode: PaddingMode = "zeros",
) -> Tensor:
    """One filter (or ``multiplier`` of them) a channel, with bias and activation applied before the output is stored.

    Args:
        input: ``[N, C, H, W]`` or ``[C, H, W]``.
        weight: ``[C * multiplier, 1, R, S]``; output channel ``c * multiplier + m`` is filter m of input channel c.
        bias: ``[C * multiplier]`` or None.
        stride, padding, dilation: as in `conv2d`.
        activation: ``identity``, ``relu``, ``relu6``, ``leaky_relu`` (slope 0.01), ``gelu`` (exact), ``silu``,
            ``hardswish``, ``sigmoid`` or ``tanh``. Default ``identity``.
        padding_mode: as in `padded_conv2d`. Default ``zeros``.

    Returns:
        ``[N, C * multiplier, P, Q]``.

    Raises:
        ValueError: an unknown activation or padding_mode.
        RuntimeError: as `padded_conv2d`.
    """
    return _conv2d(input, weight, bias, stride, padding, dilation, input.shape[-3], activation, padding_mode)


@naming_wrong_types
def pointwise_conv2d(input: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "identity") -> Tensor:
    """A 1x1 convolution: a matrix product over the channels of every pixel, with bias and activation.

    Args:
        input: ``[N, C, H, W]`` or ``[C, H, W]``.
        weight: ``[K, C, 1, 1]``.
        bias: ``[K]`` or None.
        activation: as in `depthwise_conv2d`. Default ``identity``.

    Returns:
        ``[N, K, H, W]``.

    Raises:
        ValueError: an unknown activation.
        RuntimeError: as `conv2d`, and for a kernel that is not 1x1.
    """
    if tuple(weight.shape[2:]) != (1, 1):
        raise RuntimeError(f"weight must be [K, C, 1, 1], but has size {list(weight.shape)}")
    return _conv2d(input, weight, bias, 1, 0, 1, 1, activation)


@naming_wrong_types
def separable_conv2d(
    input: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    depthwise_bias: Tensor | None = None,
    pointwise_bias: Tensor | None = None,
    stride: IntOrPair = 1,
    padding: IntOrPair | str = 0,
    dilation: IntOrPair = 1,
    depthwise_activation: str = "identity",
    pointwise_activation: str = "identity",
    save_intermediate: bool = False,
) -> Tensor:
    """A depthwise convolution and the 1x1 convolution of its output, each with bias and activation, as one call.

    The depthwise-separable convolution of L. Sifre's thesis (2014), as MobileNet (arXiv 1704.04861) and Xception (arXiv
    1610.02357) use it. Equal to `pointwise_conv2d` of `depthwise_conv2d`, but a fused kernel, where there
    is one for the call, never writes what lies between them to memory.

    Args:
        input: ``[N, C, H, W]`` or ``[C, H, W]``; any strides.
        depthwise_weight: ``[C * multiplier, 1, R, S]``.
        pointwise_weight: ``[K, C * multiplier, 1, 1]``.
        depthwise_bias: ``[C * multiplier]`` or None. Default None.
        pointwise_bias: ``[K]`` or None. Default None.
        stride, padding, dilation: of the depthwise stage, as in `conv2d`.
        depthwise_activation, pointwise_activation: as in `depthwise_conv2d`. Default ``identity``.
        save_intermediate: where gradients are wanted, keep the ``[N, C * multiplier, P, Q]`` values between the stages
            for the backward pass, which else computes them again: memory for time, the same results. Default False.

    Returns:
        ``[N, K, P, Q]``, P and Q as in `conv2d`; in channels_last where the input or a weight is.

    Raises:
        ValueError: an unknown activation.
        RuntimeError: sizes, dtypes and devices that do not fit.
    """
    stride, dilation = _pair("stride", stride), _pair("dilation", dilation)
    padding = _padding(padding, depthwise_weight.shape, stride, dilation)
    return torch.ops.sepconv_ext.separable_conv2d(
        input,
        depthwise_weight,
        depthwise_bias,
        pointwise_weight,
        pointwise_bias,
        stride,
        padding,
        dilation,
        depthwise_activation,
        pointwise_activation,
        save_intermediate,
    )


@naming_wrong_types
def inverted_residual(
    input: Tensor,
    expand_weight: Tensor | None,
    expand_bias: Tensor | None,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    project_weight: Tensor,
    project_bias: Tensor | None,
    stride: IntOrPair = 1,
    padding: IntOrPair | str = 0,
    dilation: IntOrPair = 1,
    expand_activation: str = "relu6",
    depthwise_activation: str = "relu6",
    project_activation: str = "identity",
    residual: bool = False,
    squeeze_weight: Tensor | None = None,
    squeeze_bias: Tensor | None = None,
    excite_weight: Tensor | None = None,
    excite_bias: Tensor | None = None,
    squeeze_activation: str = "relu",
    gate: str = "sigmoid",
) -> Tensor:
    """A block of MobileNetV2 (arXiv 1801.04381), MobileNetV3 or EfficientNet as one call: expand, convolve, project.

    ``e = activation(expand(input))``, a 1x1; ``d = activation(depthwise(e))``; then ``project(d)``, a 1x1, plus
    `input` where `residual` says so. With squeeze-and-excitation (arXiv 1709.01507) d's channels are first multiplied
    by ``gate(excite(activation(squeeze(mean of d))))``.

    In inference on the CPU, float32 and channels_last, the values between the convolutions stay in the cache. On CUDA
    they stay in shared memory where the plan takes one kernel: half types in channels_last, a depthwise 3x3 or 5x5 of
    stride 1 or 2, channels in whole eights, K of at most 160, no squeeze-and-excitation. What overflows the half type
    after the expansion is there its largest number. In all other cases it is calls of `conv2d`, and autograd keeps what
    lies between them. `explain_inverted_residual` says which.

    Args:
        input: ``[N, C, H, W]`` or ``[C, H, W]``; any strides.
        expand_weight: ``[E, C, 1, 1]``, or None: then E is C, and the block is a depthwise separable one.
        expand_bias: ``[E]`` or None.
        depthwise_weight: ``[E, 1, R, S]``.
        depthwise_bias: ``[E]`` or None.
        project_weight: ``[K, E, 1, 1]``.
        project_bias: ``[K]`` or None.
        stride, padding, dilation: of the depthwise convolution, as in `conv2d`. Default 1, 0 and 1.
        expand_activation, depthwise_activation: as in `depthwise_conv2d`. Default ``relu6``.
        project_activation: the same, after the sum. Default ``identity``.
        residual: whether `input` is added to the projection; K is then C, and the output as large as the input. Default
            False.
        squeeze_weight, excite_weight: ``[M, E, 1, 1]`` and ``[E, M, 1, 1]``, both or neither. Default None.
        squeeze_bias, excite_bias: ``[M]`` and ``[E]``, or None. Default None.
        squeeze_activation: after the squeeze. Default ``relu``.
        gate: ``sigmoid`` or ``hardsigmoid``. Default ``sigmoid``.

    Returns:
        ``[N, K, P, Q]``, P and Q as in `conv2d`; in channels_last where the input or a weight is.

    Raises:
        ValueError: an unknown activation or gate.
        RuntimeError: sizes, dtypes and devices that do not fit.
    """
    stride, dilation = _pair("stride", stride), _pair("dilation", dilation)
    padding = _padding(padding, depthwise_weight.shape, stride, dilation)
    return torch.ops.sepconv_ext.inverted_residual(
        input,
        expand_weight,
        expand_bias,
        depthwise_weight,
        depthwise_bias,
        project_weight,
        project_bias,
        squeeze_weight,
        squeeze_bias,
        excite_weight,
        excite_bias,
        stride,
        padding,
        dilation,
        expand_activation,
        depthwise_activation,
        squeeze_activation,
        gate,
        project_activation,
        residual,
    )


@naming_wrong_types
def spatial_separable_conv2d(input: Tensor, column: Tensor, row: Tensor, padding: IntOrPair | str = 0) -> Tensor:
    """Filters every channel down its columns, then along its rows: a depthwise convolution whose filter is a product.

    ``y[n, c, p, q] = sum over r, s of column[c, r] * row[c, s] * x[n, c, p + r - top, q + s - left]``: R + S products
    a pixel instead of R * S, in one pass through memory. What lies between the two filters stays in the cache, in the
    type that sums are kept in. Gaussian, box and Sobel filters are such products. `sepconv_ext.factorize.separate`
    finds the pair, or the best sum of pairs, of any filter.

    Args:
        input: ``[N, C, H, W]`` or ``[C, H, W]``; any strides.
        column: ``[C, R]``, a vertical filter for each channel; or ``[R]`` or ``[1, R]``, one for all.
        row: ``[C, S]``, ``[S]`` or ``[1, S]``: the horizontal filters.
        padding: zeros around the image, one value or (height, width), ``'same'`` or ``'valid'``. Default 0.

    Returns:
        ``[N, C, P, Q]`` with ``P = H + 2 * padding - R + 1`` and ``Q = W + 2 * padding - S + 1``; in channels_last
        where the input is.

    Raises:
        RuntimeError: sizes, dtypes or devices that do not fit.
    """
    padding = _padding(padding, (1, 1, column.shape[-1], row.shape[-1]), (1, 1), (1, 1))
    return torch.ops.sepconv_ext.spatial_separable_conv2d(input, column, row, padding)


@naming_wrong_types
def explain(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntOrPair = 1,
    padding: IntOrPair | str = 0,
    dilation: IntOrPair = 1,
    groups: int = 1,
    activation: str = "identity",
    map: str = "forward",
    padding_mode: PaddingMode = "zeros",
    grad_output: Tensor | None = None,
    residual: bool = False,
) -> _C.Explanation:
    """Which kernel a call takes and why; nothing is run.

    Args:
        input ... groups: the call, as in `conv2d`.
        activation: as in `depthwise_conv2d`. It counts on CUDA, where a pass for it would follow torch's 1x1 product;
            other choices do not depend on it. Default ``identity``.
        map: ``forward``, ``grad_input`` or ``grad_weight``. Default ``forward``.
        padding_mode: as in `padded_conv2d`. Default ``zeros``.
        grad_output: the gradient ``[N, K, P, Q]`` of the two gradient maps, for how it lies in memory. Default: as the
            forward call's output would.
        residual: whether an image is added before the activation, as by the op ``conv2d_residual``, which counts as
            the activation does. Default False.

    Returns:
        An object with ``kernel``, ``reason`` (and what is copied first), ``aten`` (True where torch's own convolution
        makes the call), ``tile``, ``workspace_bytes`` and ``adds_residual`` (whether the kernel adds one, where a pass
        would follow others); its text is one line.
    """
    stride, dilation = _pair("stride", stride), _pair("dilation", dilation)
    padding = _padding(padding, weight.shape, stride, dilation)
    return _C.explain(
        *(map, input, weight, bias, stride, padding, dilation, groups),
        padding_mode=padding_mode,
        grad_output=grad_output,
        activation=activation,
        residual=residual,
    )


@naming_wrong_types
def explain_separable(
    input: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    depthwise_bias: Tensor | None = None,
    pointwise_bias: Tensor | None = None,
    stride: IntOrPair = 1,
    padding: IntOrPair | str = 0,
    dilation: IntOrPair = 1,
) -> _C.Explanation:
    """How `separable_conv2d` makes a call, and why: by a fused kernel, or as two calls; nothing is run.

    Args:
        input ... dilation: the call, as in `separable_conv2d`.

    Returns:
        As `explain`; ``kernel`` is ``composite`` where two calls of `conv2d` are made, each with its plan.
    """
    stride, dilation = _pair("stride", stride), _pair("dilation", dilation)
    padding = _padding(padding, depthwise_weight.shape, stride, dilation)
    return _C.explain_separable(
        input, depthwise_weight, depthwise_bias, pointwise_weight, pointwise_bias, stride, padding, dilation
    )


@naming_wrong_types
def explain_inverted_residual(
    input: Tensor,
    expand_weight: Tensor | None,
    expand_bias: Tensor | None,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    project_weight: Tensor,
    project_bias: Tensor | None,
    stride: IntOrPair = 1,
    padding: IntOrPair | str = 0,
    dilation: IntOrPair = 1,
    residual: bool = False,
    squeeze_weight: Tensor | None = None,
    squeeze_bias: Tensor | None = None,
    excite_weight: Tensor | None = None,
    excite_bias: Tensor | None = None,
) -> _C.Explanation:
    """How `inverted_residual` makes a call without gradients, and why: by one kernel, or as calls; nothing is run.

    Args:
        input ... excite_bias: the call, as in `inverted_residual`; activations and gate have no influence.

    Returns:
        As `explain`; ``kernel`` is ``composite`` where calls of `conv2d` are made, each with its plan.

    Raises:
        RuntimeError: as `inverted_residual`.
    """
    stride, dilation = _pair("stride", stride), _pair("dilation", dilation)
    padding = _padding(padding, depthwise_weight.shape, stride, dilation)
    return _C.explain_inverted_residual(
        input,
        expand_weight,
        expand_bias,
        depthwise_weight,
        depthwise_bias,
        project_weight,
        project_bias,
        squeeze_weight,
        squeeze_bias,
        excite_weight,
        excite_bias,
        stride,
        padding,
        dilation,
        residual,
    )
