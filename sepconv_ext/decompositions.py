"""Each op in terms of aten: what an exported program becomes for those who do not have this package.

`TABLE` is what `torch.export.default_decompositions()` holds of these ops. So ``ExportedProgram.run_decompositions()``
and ``torch.onnx.export(model, dynamo=True)`` find it. To keep an op, take it out of the table that you pass to
``run_decompositions``. Inductor keeps all of them, AOTInductor too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from . import _C, reference
from .ops import _suggests_channels_last
from .packed import PANEL_COLUMNS
from .program import Line, parse

__all__ = ["TABLE"]

aten = torch.ops.aten

TABLE: dict[torch._ops.OpOverload, Callable] = {}

# Of those that `freeze` finds, by name: the op, and what it is called with besides.
ACTIVATIONS: dict[str, tuple] = {
    "relu": (aten.relu.default,),
    "relu6": (aten.hardtanh.default, 0.0, 6.0),
    "leaky_relu": (aten.leaky_relu.default,),
    "gelu": (aten.gelu.default,),
    "silu": (aten.silu.default,),
    "hardswish": (aten.hardswish.default,),
    "sigmoid": (aten.sigmoid.default,),
    "tanh": (aten.tanh.default,),
}


def _of(name: str, overload: str = "default") -> Callable[[Callable], Callable]:
    def register(function: Callable) -> Callable:
        TABLE[getattr(getattr(torch.ops.sepconv_ext, name), overload)] = function
        return function

    return register


# --- conv2d and its gradients; sequences are those with one entry in stride ---


def _from_last(padding: Sequence[int], dims: int) -> list[int]:
    """Padding of one entry a dimension, or two, as F.pad takes it: both sides, the last dimension first."""
    pairs = [(p, p) for p in padding] if len(padding) == dims else list(zip(padding[::2], padding[1::2], strict=True))
    return [side for pair in reversed(pairs) for side in pair]


def _padded(image: Tensor, padding: Sequence[int], dims: int, mode: str = "zeros") -> tuple[Tensor, Sequence[int]]:
    """The image with the padding that aten's convolutions do not know, and what is left for them to do."""
    if mode == "zeros" and len(padding) == dims:
        return image, padding
    around = _from_last(padding, dims)
    nothing = [0] * dims
    if mode == "zeros":
        if all(around[2 * i] == around[2 * i + 1] for i in range(dims)):
            return image, [around[2 * i] for i in reversed(range(dims))]
        return F.pad(image, around), nothing
    if mode == "circular":  # F.pad writes in place for it
        for i in range(dims):
            dim, before, after = -1 - i, around[2 * i], around[2 * i + 1]
            ends = (image.narrow(dim, image.shape[dim] - before, before), image, image.narrow(dim, 0, after))
            image = torch.cat(ends, dim)
        return image, nothing
    return F.pad(image, around, mode), nothing


def _dense(t: Tensor, dims: int, channels_last: bool) -> Tensor:
    """Without gaps in memory, with the channels next to each other or in torch's order."""
    if not channels_last:
        return t.contiguous()
    return t.movedim(-dims - 1, -1).contiguous().movedim(-1, -dims - 1)


def _lying(output: Tensor, *operands: Tensor, dims: int) -> Tensor:
    """The output in the memory order that the op gives it. aten's does the same for images, but not for sequences."""
    if dims == 1 and any(_suggests_channels_last(operand, 1) for operand in operands):
        return _dense(output, 1, True)
    return output


@_of("conv2d")
def conv2d(input, weight, bias, stride, padding, dilation, groups, activation, padding_mode="zeros") -> Tensor:
    dims = len(stride)
    image, rest = _padded(input, padding, dims, padding_mode)
    convolve = torch.conv1d if dims == 1 else torch.conv2d
    output = convolve(image, weight, bias, stride, rest, dilation, groups)
    return reference.ACTIVATIONS[activation](_lying(output, input, weight, dims=dims))


@_of("conv2d_residual")
def conv2d_residual(input, weight, bias, residual, stride, padding, dilation, groups, activation) -> Tensor:
    output = conv2d(input, weight, bias, stride, padding, dilation, groups, "identity")
    return reference.ACTIVATIONS[activation](output + residual)


def _transposed(grad, weight, pixels: Sequence[int], stride, padding, dilation, groups) -> Tensor:
    """The gradient by an input of so many pixels, zero padding alike at both sides."""
    dims = len(stride)
    # What the strided windows did not reach of the input.
    rest = [
        n - ((out - 1) * s - 2 * p + d * (taps - 1) + 1)
        for n, out, s, p, d, taps in zip(
            pixels, grad.shape[-dims:], stride, padding, dilation, weight.shape[2:], strict=True
        )
    ]
    convolve = F.conv_transpose1d if dims == 1 else F.conv_transpose2d
    return convolve(grad, weight, None, stride, padding, rest, groups, dilation)


def _unwrapped(grad: Tensor, dim: int, size: int, before: int, after: int) -> Tensor:
    """The gradient of circular padding along a dimension: what stands outside is added to the other end."""
    image = grad.narrow(dim, before, size)
    head, tail = grad.narrow(dim, before + size, after), grad.narrow(dim, 0, before)
    zeros = [image.narrow(dim, 0, size - n) * 0 for n in (after, before)]
    return image + torch.cat((head, zeros[0]), dim) + torch.cat((zeros[1], tail), dim)


@_of("conv2d_grad_input")
def conv2d_grad_input(
    grad_output, weight, input_size, input_stride, stride, padding, dilation, groups, padding_mode="zeros"
) -> Tensor:
    dims = len(stride)
    pixels, around = list(input_size[-dims:]), _from_last(padding, dims)
    sides = [(around[2 * i], around[2 * i + 1]) for i in reversed(range(dims))]
    like = grad_output.new_empty_strided(input_size, input_stride)  # read for its size and its strides alone
    channels_last = _suggests_channels_last(like, dims)
    if padding_mode == "zeros" and all(before == after for before, after in sides):
        same = [before for before, _ in sides]
        return _dense(_transposed(grad_output, weight, pixels, stride, same, dilation, groups), dims, channels_last)
    wide = [n + before + after for n, (before, after) in zip(pixels, sides, strict=True)]
    grad = _transposed(grad_output, weight, wide, stride, [0] * dims, dilation, groups)
    if padding_mode in ("reflect", "replicate"):
        name = ("reflection" if padding_mode == "reflect" else "replication") + f"_pad{dims}d_backward"
        grad = getattr(aten, name).default(grad, like, around)
        return _dense(grad, dims, channels_last)
    for i, (n, (before, after)) in enumerate(zip(pixels, sides, strict=True)):
        dim = i - dims
        if padding_mode == "circular":
            grad = _unwrapped(grad, dim, n, before, after)
        else:
            grad = grad.narrow(dim, before, n)
    return _dense(grad, dims, channels_last)


@_of("conv2d_grad_weight")
def conv2d_grad_weight(
    grad_output, input, weight_size, weight_stride, stride, padding, dilation, groups, padding_mode="zeros"
) -> Tensor:
    dims = len(stride)
    image, rest = _padded(input, padding, dims, padding_mode)
    if image.dim() == dims + 1:
        image, grad_output = image.unsqueeze(0), grad_output.unsqueeze(0)
    weight = grad_output.new_empty(weight_size)  # read for its size alone
    mask = [False, True, False]
    return aten.convolution_backward.default(
        grad_output, image, weight, None, stride, rest, dilation, False, [0] * dims, groups, mask
    )[1]


@_of("conv2d_both_grads")
def conv2d_both_grads(
    grad_output, input, weight, stride, padding, dilation, groups, padding_mode="zeros"
) -> tuple[Tensor, Tensor]:
    around = (stride, padding, dilation, groups, padding_mode)
    by_input = conv2d_grad_input(grad_output, weight, input.shape, input.stride(), *around)
    return by_input, conv2d_grad_weight(grad_output, input, weight.shape, weight.stride(), *around)


# --- several convolutions in one op ---


def _product(input: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "identity") -> Tensor:
    return conv2d(input, weight, bias, [1, 1], [0, 0], [1, 1], 1, activation)


@_of("separable_conv2d")
def separable_conv2d(
    input, depthwise, bias_d, pointwise, bias_p, stride, padding, dilation, act_d, act_p, save_intermediate=False
) -> Tensor:
    between = conv2d(input, depthwise, bias_d, stride, padding, dilation, input.shape[-3], act_d)
    return _product(between, pointwise, bias_p, act_p)


@_of("separable_conv2d_training")
def separable_conv2d_training(
    input, depthwise, bias_d, pointwise, bias_p, stride, padding, dilation, act_d, act_p, output, intermediate
) -> tuple[Tensor, Tensor]:
    kept_act, later_act = (act_d, "identity") if _C.derivative_from_output(act_d) else ("identity", act_d)
    kept = conv2d(input, depthwise, bias_d, stride, padding, dilation, input.shape[-3], kept_act)
    none = input.new_empty(0)
    result = _product(reference.ACTIVATIONS[later_act](kept), pointwise, bias_p, act_p) if output else none
    return result, kept if intermediate else none


@_of("spatial_separable_conv2d")
def spatial_separable_conv2d(input, column, row, padding) -> Tensor:
    C, (right, left, bottom, top) = input.shape[-3], reversed(_four(padding))
    vertical, horizontal = (t.reshape(-1, t.shape[-1]).expand(C, -1) for t in (column, row))
    one = [1, 1]
    between = conv2d(input, vertical[:, None, :, None], None, one, [top, bottom, 0, 0], one, C, "identity")
    return conv2d(between, horizontal[:, None, None, :], None, one, [0, 0, left, right], one, C, "identity")


def _four(padding: Sequence[int]) -> list[int]:
    """Top, bottom, left, right."""
    return list(padding) if len(padding) == 4 else [padding[0], padding[0], padding[1], padding[1]]


@_of("inverted_residual")
def inverted_residual(
    input, expand, bias_e, depthwise, bias_d, project, bias_p, squeeze, bias_s, excite, bias_x,
    stride, padding, dilation, act_e, act_d, act_s, gate, act_p, residual,
) -> Tensor:  # fmt: skip
    t = input if expand is None else _product(input, expand, bias_e, act_e)
    t = conv2d(t, depthwise, bias_d, stride, padding, dilation, t.shape[-3], act_d)
    if squeeze is not None:
        squeezed = _product(t.mean((-2, -1), keepdim=True), squeeze, bias_s, act_s)
        excited = _product(squeezed, excite, bias_x)
        t = t * (aten.hardsigmoid.default(excited) if gate == "hardsigmoid" else excited.sigmoid())
    t = _product(t, project, bias_p)
    return reference.ACTIVATIONS[act_p](t + input if residual else t)


# --- causal sequences ---


def _wide(t: Tensor) -> Tensor:
    """Half types are summed in float32."""
    return t.float() if t.dtype in (torch.bfloat16, torch.float16) else t


def _joined(input: Tensor, states: Tensor | None, reach: int) -> Tensor:
    """The input behind its states, or behind zeros."""
    return F.pad(input, (reach, 0)) if states is None else torch.cat((states, input), 2)


def _taps(seq_idx: Tensor, width: int, dilation: int) -> tuple[Tensor, list[Tensor]]:
    """[N, 1, L]: which outputs there are at all, and for each tap which of them see it: those of its own sequence."""
    length, reach = seq_idx.shape[1], (width - 1) * dilation
    changes = (seq_idx[:, 1:] != seq_idx[:, :-1]).to(torch.int64)
    number = F.pad(changes.cumsum(1), (1, 0))
    before = F.pad(number, (reach, 0))  # the states belong to the first sequence
    valid = seq_idx >= 0
    seen = [(before.narrow(1, s * dilation, length) == number) & valid for s in range(width)]
    return valid.unsqueeze(1), [t.unsqueeze(1) for t in seen]


def _only(where: Tensor, t: Tensor) -> Tensor:
    return torch.where(where, t, 0.0)


@_of("causal_conv1d")
def causal_conv1d(input, weight, bias, initial_states, seq_idx, dilation, activation) -> Tensor:
    (C, width), length = weight.shape, input.shape[2]
    z = _joined(input, initial_states, (width - 1) * dilation)
    if seq_idx is None:
        y = torch.conv1d(z, weight.unsqueeze(1), bias, 1, 0, dilation, C)
        return reference.ACTIVATIONS[activation](_lying(y, input, dims=1))
    valid, taps = _taps(seq_idx, width, dilation)
    z, w = _wide(z), _wide(weight)
    parts = [_only(taps[s], z.narrow(2, s * dilation, length)) * w[:, s, None] for s in range(width)]
    y = sum(parts[1:], parts[0])
    y = y if bias is None else y + _wide(bias)[:, None]
    y = _only(valid, reference.ACTIVATIONS[activation](y)).to(input.dtype)
    return _lying(y, input, dims=1)


@_of("causal_conv1d_grad_input")
def causal_conv1d_grad_input(grad_output, weight, seq_idx, input_stride, dilation, states) -> tuple[Tensor, Tensor]:
    (C, width), (_, _, length) = weight.shape, grad_output.shape
    reach = (width - 1) * dilation
    if seq_idx is None:
        grad = F.conv_transpose1d(grad_output, weight.unsqueeze(1), groups=C, dilation=dilation)
    else:
        _, taps = _taps(seq_idx, width, dilation)
        g, w = _wide(grad_output), _wide(weight)
        parts = [F.pad(_only(taps[s], g) * w[:, s, None], (s * dilation, reach - s * dilation)) for s in range(width)]
        grad = sum(parts[1:], parts[0]).to(grad_output.dtype)
    by_input = grad.narrow(2, reach, length)
    like = grad.new_empty_strided(grad_output.shape, input_stride)  # read for its strides alone
    by_input = _dense(by_input, 1, _suggests_channels_last(like, 1))
    return by_input, grad.narrow(2, 0, reach).contiguous() if states else grad.new_empty(0)


@_of("causal_conv1d_grad_weight")
def causal_conv1d_grad_weight(grad_output, input, initial_states, seq_idx, width, dilation) -> Tensor:
    C, length = input.shape[1:]
    z = _joined(input, initial_states, (width - 1) * dilation)
    if seq_idx is None:
        around = ([1], [0], [dilation], C)
        return conv2d_grad_weight(grad_output, z, (C, 1, width), (width, width, 1), *around).squeeze(1)
    _, taps = _taps(seq_idx, width, dilation)
    g, z = _wide(grad_output), _wide(z)
    sums = [_only(taps[s], g * z.narrow(2, s * dilation, length)).sum((0, 2)) for s in range(width)]
    return torch.stack(sums, 1).to(grad_output.dtype)


@_of("causal_conv1d_update")
def causal_conv1d_update(x, state, weight, bias, cache_seqlens, state_indices, dilation, activation) -> Tensor:
    (C, width), length, tokens = weight.shape, state.shape[2], x.shape[2]
    reach = (width - 1) * dilation
    rows = None if state_indices is None else state_indices.clamp_min(0).long()
    old = state if rows is None else state.index_select(0, rows)
    if cache_seqlens is None:
        z = torch.cat((old, x), 2)
        seen, next = z.narrow(2, length - reach, reach + tokens), z.narrow(2, tokens, length)
    else:

        def ring(begin: int, end: int) -> Tensor:
            places = cache_seqlens.long()[:, None] + torch.arange(begin, end, device=x.device)
            return torch.remainder(places, length)[:, None].expand(-1, C, -1)

        seen = torch.cat((old.gather(2, ring(-reach, 0)), x), 2)
        kept = min(tokens, length)  # of more tokens than places the last ones stay
        next = old.scatter(2, ring(tokens - kept, tokens), x.narrow(2, tokens - kept, kept))
    y = torch.conv1d(seen.to(weight.dtype), weight.unsqueeze(1), bias, 1, 0, dilation, C)
    y = reference.ACTIVATIONS[activation](y).to(x.dtype)
    if state_indices is None or rows is None:
        state.copy_(next)
        return y
    # A row that is skipped writes what another one writes; where all are, what stood there.
    skipped = state_indices < 0
    other = (~skipped).long().argmax()
    writer = torch.where(skipped, other, torch.arange(len(rows), device=rows.device))
    next = torch.where(skipped.all(), old, next)
    state.index_copy_(0, rows.index_select(0, writer), next.index_select(0, writer))
    return _only(~skipped[:, None, None], y)


@torch.ops.sepconv_ext.causal_conv1d_update.default.py_impl(torch._C.DispatchKey.CompositeImplicitAutograd)
def _update_before_it_is_wrapped(*arguments) -> Tensor:
    """torch wraps an op that writes in place before it looks into a table, and first asks for such a function as this.

    So it looks itself into the table of the trace that is going on. Inductor's does not have the op, and wraps it.
    """
    table = getattr(get_proxy_mode(), "decomposition_table", {})
    function = table.get(torch.ops.sepconv_ext.causal_conv1d_update.default)
    return NotImplemented if function is None else function(*arguments)


# --- packed products, and programs of frozen networks ---


@_of("pack_pointwise")
def pack_pointwise(weight) -> Tensor:
    K, C = weight.shape[:2]
    padded = F.pad(weight.reshape(K, C), (0, 0, 0, -K % PANEL_COLUMNS))
    return padded.reshape(-1, PANEL_COLUMNS, C).transpose(1, 2).contiguous()


def _unpacked(panels: Tensor, K: int) -> Tensor:
    """[ceil(K / 16), C, 16] as [K, C]."""
    return panels.transpose(1, 2).reshape(-1, panels.shape[1])[:K]


@_of("packed_pointwise")
def packed_pointwise(input, packed, bias, residual, out_channels, stride, activation) -> Tensor:
    weight = _unpacked(packed, out_channels)[:, :, None, None]
    y = torch.conv2d(input, weight, bias, stride)
    return reference.ACTIVATIONS[activation](y if residual is None else y + residual)


@_of("packed_pointwise", "out")
def packed_pointwise_out(input, packed, bias, residual, out_channels, stride, activation, *, out) -> Tensor:
    return out.copy_(packed_pointwise(input, packed, bias, residual, out_channels, stride, activation))


@_of("program")
def program(inputs, constants, code) -> list[Tensor]:
    """Line by line; a matrix [N, C] is an image of one pixel, as there."""
    values: dict[int, Tensor] = {}
    given = iter(inputs)
    lines, results = parse(code)
    for line in lines:
        if line.kind == "input":
            t = next(given)
            values[line.target] = t if t.dim() == 4 else t[:, :, None, None]
        else:
            y = _STEPS[line.kind](line, [values[value] for value in line.reads], constants)
            values[line.target] = reference.ACTIVATIONS[line.fields.get("act", "identity")](y)
    return [
        values[value].flatten(1) if is_matrix else values[value].contiguous(memory_format=torch.channels_last)
        for value, is_matrix in results
    ]


def _constant(line: Line, constants: Tensor, name: str, *size: int) -> Tensor:
    """The numbers that a line names by their offset."""
    return constants.narrow(0, int(line.fields[name]), math.prod(size)).reshape(size)


def _optional(line: Line, constants: Tensor, name: str, *size: int) -> Tensor | None:
    return _constant(line, constants, name, *size) if name in line.fields else None


def _same_sides(line: Line) -> list[int]:
    """(h, w) of the padding of a pool, which has no other."""
    top, bottom, left, right = line.ints("padding", "0x0x0x0")
    if (top, left) != (bottom, right):
        raise NotImplementedError(f"padding of a pool must be alike at both sides to be exported, but is {line.fields}")
    return [top, left]


def _convolution(line: Line, read: list[Tensor], constants: Tensor) -> Tensor:
    """What reads panels [ceil(K / 16), R * S * C, 16]."""
    C, (K,), (R, S) = read[0].shape[1], line.ints("K"), line.ints("kernel", "1x1")
    panels = _constant(line, constants, "weight", -(-K // PANEL_COLUMNS), R * S * C, PANEL_COLUMNS)
    weight = _unpacked(panels, K).reshape(K, R, S, C).permute(0, 3, 1, 2)
    y = _convolved(line, read[0], weight, _optional(line, constants, "bias", K), 1)
    return y if len(read) == 1 else y + read[1]


def _grouped(line: Line, read: list[Tensor], constants: Tensor) -> Tensor:
    """What reads taps [ceil(C / 16), R, S, C / groups, 16]; depthwise without a number of groups."""
    C, (R, S) = read[0].shape[1], line.ints("kernel", "1x1")
    groups = line.ints("groups")[0] if "groups" in line.fields else C
    blocks = (-(-C // PANEL_COLUMNS), R, S, C // groups, PANEL_COLUMNS)
    weight = _constant(line, constants, "weight", *blocks).permute(0, 4, 3, 1, 2).reshape(-1, C // groups, R, S)[:C]
    return _convolved(line, read[0], weight, _optional(line, constants, "bias", C), groups)


def _convolved(line: Line, image: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
    stride, dilation = line.ints("stride", "1x1"), line.ints("dilation", "1x1")
    return conv2d(image, weight, bias, stride, line.ints("padding", "0x0x0x0"), dilation, groups, "identity")


def _affine(line: Line, read: list[Tensor], constants: Tensor) -> Tensor:
    C = read[0].shape[1]
    scale, shift = (_optional(line, constants, name, C, 1, 1) for name in ("weight", "bias"))
    y = read[0] if scale is None else read[0] * scale
    return y if shift is None else y + shift


def _layer_norm(line: Line, read: list[Tensor], constants: Tensor) -> Tensor:
    """Over the channels of each pixel."""
    C = read[0].shape[1]
    scale, shift = (_optional(line, constants, name, C) for name in ("weight", "bias"))
    pixels = F.layer_norm(read[0].permute(0, 2, 3, 1), (C,), scale, shift, float(line.fields["eps"]))
    return pixels.permute(0, 3, 1, 2)


def _clamp(line: Line, read: list[Tensor], constants: Tensor) -> Tensor:
    factor, shift, low, high = (float(line.fields[name]) for name in ("factor", "shift", "low", "high"))
    return torch.clamp(read[0] * factor + shift, low, high)


def _max_pool(line: Line, read: list[Tensor], constants: Tensor) -> Tensor:
    kernel, stride, dilation = (line.ints(name, "1x1") for name in ("kernel", "stride", "dilation"))
    return F.max_pool2d(read[0], kernel, stride, _same_sides(line), dilation, "ceil" in line.fields)


def _mean_pool(line: Line, read: list[Tensor], constants: Tensor) -> Tensor:
    kernel, stride = (line.ints(name, "1x1") for name in ("kernel", "stride"))
    padded = line.kind == "padded_mean_pool"
    return F.avg_pool2d(read[0], kernel, stride, _same_sides(line), "ceil" in line.fields, padded)


def _slice(line: Line, read: list[Tensor], constants: Tensor) -> Tensor:
    return read[0].narrow(1, line.ints("begin")[0], line.ints("K")[0])


_STEPS: dict[str, Callable[[Line, list[Tensor], Tensor], Tensor]] = {
    "product": _convolution,
    "conv": _convolution,
    "depthwise": _grouped,
    "grouped": _grouped,
    "slice": _slice,
    "concat": lambda line, read, constants: torch.cat(read, 1),
    "interleave": lambda line, read, constants: torch.stack(read, 2).flatten(1, 2),
    "mean": lambda line, read, constants: read[0].mean((2, 3), keepdim=True),
    "add": lambda line, read, constants: read[0] + read[1],
    "mul": lambda line, read, constants: read[0] * read[1],
    "gate": lambda line, read, constants: read[0] * read[1],
    "affine": _affine,
    "layer_norm": _layer_norm,
    "activate": lambda line, read, constants: read[0],
    "clamp": _clamp,
    "max_pool": _max_pool,
    "mean_pool": _mean_pool,
    "padded_mean_pool": _mean_pool,
    "dense": lambda line, read, constants: read[0],
}


# --- where torch looks ---


def _register() -> None:
    """Adds the table to the one that torch.export hands out.

    torch takes decompositions of ops that are no composites only by name, in a table that the caller passes. Its global
    registry would do for ONNX, but fake tensors prefer it to the ops' own rules, whose strides are the kernels'.
    Inductor makes its table of the same function, once, by another name: there the ops stay.
    """
    without = torch.export.default_decompositions

    def default_decompositions() -> torch.export.decomp_utils.CustomDecompTable:
        table = without()
        table.update(TABLE)
        return table

    default_decompositions.__doc__ = without.__doc__
    torch._decomp.core_aten_decompositions = without
    torch.export.exported_program.default_decompositions = default_decompositions
    torch.export.default_decompositions = default_decompositions


_register()
