"""Drop-in modules: the arguments, attributes and state_dict of torch.nn's convolutions over this package's kernels."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.modules.utils import _pair

from . import functional
from .blocks import Parts, read_block
from .fold import Block, Chain, Stage, is_depthwise, is_pointwise
from .functional import PADDING_MODES, PaddingMode
from .reference import ACTIVATIONS

__all__ = [
    "CausalConv1d",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "DepthwiseConv2d",
    "InvertedResidual",
    "PointwiseConv2d",
    "SeparableConv2d",
    "SpatialSeparableConv2d",
]


class _Unscriptable:
    """A layer that torch.jit.script, which reads Python, cannot read."""

    def __prepare_scriptable__(self) -> None:
        raise RuntimeError(
            f"torch.jit.script cannot read sepconv_ext's {type(self).__name__}: if convert_ put it there, call "
            "sepconv_ext.revert_(model) first, else build the model of torch.nn's layers; "
            "torch.jit.trace and torch.export take it as it is"
        )


class Conv2d(_Unscriptable, nn.Conv2d):
    """A torch.nn.Conv2d whose convolution is `sepconv_ext.functional.conv2d`.

    Arguments, defaults, attributes, initialisation, state_dict and printed form are torch.nn.Conv2d's, and so is every
    `padding_mode`, for which no padded copy is made (`sepconv_ext.functional.padded_conv2d`).

    Input [N, C, H, W] or [C, H, W]; output [N, K, P, Q] or [K, P, Q] in the layout that torch.nn.Conv2d gives. Under
    padding_mode="circular", too, channels_last stays channels_last, which torch's padded copy loses. While
    torch.nn.functional.conv2d is another function than torch's (a profiler counts its calls), that one is called.
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if F.conv2d is not torch.conv2d:
            return super()._conv_forward(input, weight, bias)
        arguments = (input, weight, bias, self.stride, self.padding, self.dilation, self.groups)
        if self.padding_mode == "zeros":
            return functional.conv2d(*arguments)
        if not _pads_as_built(self):
            return super()._conv_forward(input, weight, bias)
        return functional.padded_conv2d(*arguments, padding_mode=self.padding_mode)


class Conv1d(_Unscriptable, nn.Conv1d):
    """A torch.nn.Conv1d whose convolution is `sepconv_ext.functional.conv1d`, with causal padding besides.

    Args:
        in_channels, out_channels, kernel_size, stride, dilation, groups, bias, device, dtype: torch.nn.Conv1d's.
        padding: torch.nn.Conv1d's, or "causal": dilation * (kernel_size - 1) values at the left alone, so that no
            output sees a later input.
        padding_mode: torch.nn.Conv1d's; with "causal" padding, what stands at the left.

    Raises:
        ValueError: an unknown padding or padding_mode.

    Input [N, C, L] or [C, L]; output [N, K, Q] or [K, Q], in the memory order [N, Q, K] where the input lies as
    [N, L, C]. The state_dict is torch.nn.Conv1d's. While torch.nn.functional.conv1d is another function than torch's,
    that one is called, except with "causal" padding.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int],
        stride: int | tuple[int] = 1,
        padding: str | int | tuple[int] = 0,
        dilation: int | tuple[int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            0 if padding == "causal" else padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device,
            dtype,
        )
        if padding == "causal":
            self.padding = "causal"
            self._reversed_padding_repeated_twice = [self.dilation[0] * (self.kernel_size[0] - 1), 0]

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if F.conv1d is not torch.conv1d and self.padding != "causal":
            return super()._conv_forward(input, weight, bias)
        arguments = (input, weight, bias, self.stride, self.padding, self.dilation, self.groups)
        if self.padding_mode == "zeros":
            return functional.conv1d(*arguments)
        if not _pads_as_built(self):
            return super()._conv_forward(input, weight, bias)
        return functional.padded_conv1d(*arguments, padding_mode=self.padding_mode)


def _pads_as_built(layer: nn.Conv1d | nn.Conv2d) -> bool:
    """Whether padding, stride, dilation and padding_mode still say what torch does, which pads by what they were at
    construction, and by every mode of F.pad."""
    padding = layer.padding
    if layer.padding_mode not in PADDING_MODES:
        return False
    if padding == "causal":
        return True
    if isinstance(padding, str):
        if padding == "same" and any(s != 1 for s in layer.stride):
            return False
        zeros = [
            d * (k - 1) if padding == "same" else 0 for d, k in zip(layer.dilation, layer.kernel_size, strict=True)
        ]
        sides = [(n // 2, n - n // 2) for n in zeros]
    else:
        sides = [(n, n) for n in padding]
    return list(layer._reversed_padding_repeated_twice) == [n for pair in reversed(sides) for n in pair]


class Conv3d(_Unscriptable, nn.Conv3d):
    """A torch.nn.Conv3d whose convolution is `sepconv_ext.functional.conv3d`: depthwise ones on a CPU run here.

    Arguments, defaults, attributes, initialisation, state_dict and printed form are torch.nn.Conv3d's. Input
    [N, C, D, H, W] or [C, D, H, W]; output [N, K, T, P, Q] or [K, T, P, Q] in the layout that torch.nn.Conv3d gives.
    Another `padding_mode` than "zeros" makes torch's padded copy. While torch.nn.functional.conv3d is another function
    than torch's, that one is called.
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if F.conv3d is not torch.conv3d:
            return super()._conv_forward(input, weight, bias)
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
        padding = self.padding if self.padding_mode == "zeros" else 0
        return functional.conv3d(input, weight, bias, self.stride, padding, self.dilation, self.groups)


class ConvTranspose1d(_Unscriptable, nn.ConvTranspose1d):
    """A torch.nn.ConvTranspose1d whose convolution is `sepconv_ext.functional.conv_transpose1d`.

    As `ConvTranspose2d`, of sequences: input [N, K, Q] or [K, Q], output [N, C, L] or [C, L].
    """

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        if F.conv_transpose1d is not torch.conv_transpose1d or self.padding_mode != "zeros":
            return super().forward(input, output_size)
        return _transposed(self, functional.conv_transpose1d, input, output_size, 1)


class ConvTranspose2d(_Unscriptable, nn.ConvTranspose2d):
    """A torch.nn.ConvTranspose2d whose convolution is `sepconv_ext.functional.conv_transpose2d`.

    Arguments, defaults, attributes, initialisation, state_dict and printed form are torch.nn.ConvTranspose2d's, and so
    is `layer(input, output_size)`. Input [N, K, P, Q] or [K, P, Q]; output [N, C, H, W] or [C, H, W]. While
    torch.nn.functional.conv_transpose2d is another function than torch's, that one is called.
    """

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        if F.conv_transpose2d is not torch.conv_transpose2d or self.padding_mode != "zeros":
            return super().forward(input, output_size)
        return _transposed(self, functional.conv_transpose2d, input, output_size, 2)


def _transposed(layer: Any, function: Any, input: Tensor, output_size: list[int] | None, dims: int) -> Tensor:
    geometry = (layer.stride, layer.padding, layer.kernel_size, dims, layer.dilation)
    output_padding = _output_padding(input, output_size, layer.output_padding, geometry)
    arguments = (layer.stride, layer.padding, output_padding, layer.groups, layer.dilation)
    return function(input, layer.weight, layer.bias, *arguments)


@torch.fx.wrap  # whether there is an output_size is not known where it is traced
def _output_padding(input: Tensor, output_size: Any, output_padding: tuple, geometry: tuple) -> Any:
    """The layer's own, or what gives this size, as torch's layers find it."""
    if output_size is None:
        return output_padding
    return _ConvTransposeNd._output_padding(cast(Any, None), input, output_size, *geometry)


def _check_activation(name: str, value: str) -> None:
    if value not in ACTIVATIONS:
        raise ValueError(f"{name} must be one of {', '.join(ACTIVATIONS)}, but is {value!r}")


def _check_multiplier(value: int) -> None:
    if value < 1:
        raise ValueError(f"multiplier must be a positive integer, but is {value}")


class CausalConv1d(_Unscriptable, nn.Module):
    """A causal depthwise convolution of sequences, which can take them chunk by chunk.

    Args:
        channels: C of the input and of the output.
        kernel_size: S, the width of the filters.
        dilation: distance between their taps. Default: 1.
        bias: whether there is one. Default: True.
        activation: a name that `functional.depthwise_conv2d` lists. Default: "identity".
        device, dtype: of the parameters.

    Raises:
        ValueError: an unknown activation.

    Input [N, C, L], output [N, C, L]; both may lie in memory as [N, L, C]. The weight is [C, 1, S]: the state_dict of
    torch.nn.Conv1d(C, C, S, groups=C) loads. `layer(x)` begins with zeros, or with `state`. Streaming:
    `y, state = layer.step(chunk, state)`, where the first state is None and the last one continues the next chunk: the
    chunks' outputs are the whole's. `layer.initial_state(N)` is a state of zeros, for `layer.update`, which moves it on
    in place, without gradients.
    """

    bias: Tensor | None

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        dilation: int = 1,
        bias: bool = True,
        activation: str = "identity",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        _check_activation("activation", activation)
        # An nn.Conv1d knows how to read and refuse these arguments, and to initialise the parameters.
        plan = nn.Conv1d(
            channels, channels, kernel_size, dilation=dilation, groups=channels, bias=bias, device=device, dtype=dtype
        )
        self.channels, self.kernel_size, self.dilation = channels, plan.kernel_size[0], plan.dilation[0]
        self.activation = activation
        self.weight = plan.weight
        self.register_parameter("bias", cast(Any, plan.bias))

    @property
    def reach(self) -> int:
        """How many earlier inputs an output sees: the positions of a state."""
        return (self.kernel_size - 1) * self.dilation

    def initial_state(self, batch: int) -> Tensor:
        """Zeros [batch, C, reach], as the weight's."""
        return self.weight.new_zeros(batch, self.channels, self.reach, requires_grad=False)

    def forward(self, input: Tensor, state: Tensor | None = None, seq_idx: Tensor | None = None) -> Tensor:
        """The output; `state` [N, C, reach] and `seq_idx` [N, L] are `functional.causal_conv1d`'s."""
        arguments = (input, self.weight, self.bias, self.activation, state, False, seq_idx, self.dilation)
        return cast(Tensor, functional.causal_conv1d(*arguments))

    def step(self, input: Tensor, state: Tensor | None = None, seq_idx: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The output of a chunk of any length, and the state for the next one."""
        arguments = (input, self.weight, self.bias, self.activation, state, True, seq_idx, self.dilation)
        return cast(tuple[Tensor, Tensor], functional.causal_conv1d(*arguments))

    @torch.no_grad()
    def update(self, input: Tensor, state: Tensor) -> Tensor:
        """The output of the next token [N, C], or of some [N, C, T]; `state` is moved on in place."""
        return functional.causal_conv1d_update(
            input, state, self.weight, self.bias, self.activation, dilation=self.dilation
        )

    def extra_repr(self) -> str:
        text = f"{self.channels}, kernel_size={self.kernel_size}"
        if self.dilation != 1:
            text += f", dilation={self.dilation}"
        if self.bias is None:
            text += ", bias=False"
        return text if self.activation == "identity" else f"{text}, activation={self.activation}"


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
        activation: a name that `functional.depthwise_conv2d` lists. Default: "identity".

    Raises:
        ValueError: an unknown activation, or a multiplier that is not positive.

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
        padding_mode: PaddingMode = "zeros",
        activation: str = "identity",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        _check_activation("activation", activation)
        _check_multiplier(multiplier)
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

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return functional.depthwise_conv2d(
            input, weight, bias, self.stride, self.padding, self.dilation, self.activation, self.padding_mode
        )


class PointwiseConv2d(_FusedConv2d):
    """A 1x1 convolution with a fused activation: a matrix product over the channels of each pixel.

    Args:
        in_channels, out_channels: C and K.
        bias, device, dtype: as for torch.nn.Conv2d.
        activation: as for DepthwiseConv2d. Default: "identity".

    Raises:
        ValueError: an unknown activation.

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
        _check_activation("activation", activation)
        super().__init__(in_channels, out_channels, 1, bias=bias, device=device, dtype=dtype)
        self.activation = activation

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return functional.pointwise_conv2d(input, weight, bias, activation=self.activation)


class SeparableConv2d(_Unscriptable, nn.Module):
    """A depthwise-separable convolution: depthwise -> [norm] -> activation -> pointwise -> [norm] -> activation.

    Without norms, and with norms in eval(), all of it is one `functional.separable_conv2d`, the norms folded into the
    weights. With norms in train(), and while one of its parts has a hook, it runs stage by stage. The parts are the
    modules `depthwise` (an nn.Conv2d with groups = in_channels), `depthwise_norm`, `pointwise` (an nn.Conv2d, 1x1) and
    `pointwise_norm`. A norm is an nn.BatchNorm2d or None.

    Two orders are in use. MobileNet's (Howard et al., 2017) is convolution, norm, activation after both stages:
    `norm="batch", activation="relu6", depthwise_activation="relu6"`. Xception's (Chollet, 2017) has nothing between
    the stages: `norm="batch", depthwise_norm=False`, and MobileNetV2's half of a block is `norm="batch",
    depthwise_activation="relu6"`.

    Args:
        in_channels, out_channels: C and K, any numbers.
        kernel_size, stride, dilation: of the depthwise stage, as for torch.nn.Conv2d. Stride and dilation: 1.
        padding: of the depthwise stage: as for torch.nn.Conv2d, or "same" (default), which here goes with any stride.
            It is dilation * (kernel_size - 1) // 2 zeros on every side, and the output has ceil(H / stride) rows. At
            stride 2 that is where torchvision's and timm's models put their zeros; TensorFlow's "same" puts the odd one
            below and right for even H, and differs there by one pixel. A kernel of an even extent has no such middle:
            it needs stride 1, and its odd zero goes below and right, as in torch.
        multiplier: T, depthwise filters a channel. Default: 1.
        bias: whether each convolution that no norm follows has a bias (the norm's own shift is one). Default: True.
        norm: None, or "batch" for an nn.BatchNorm2d behind each stage. Default: None.
        activation, depthwise_activation: behind the pointwise and the depthwise stage, names as for DepthwiseConv2d.
            Default: "identity".
        depthwise_norm: False leaves the depthwise stage without the norm. Default: True.
        padding_mode: "zeros" (default), "reflect", "replicate" or "circular".
        save_intermediate: keep what is between the stages for the backward pass instead of computing it again: faster,
            and more memory. Default: False.
        device, dtype: of the parameters.

    Raises:
        ValueError: an unknown activation or norm; a multiplier that is not positive; padding="same" for a kernel of an
            even extent at a stride.

    Channels: out_channels may be any number. An nn.Conv2d(C, K, groups=g) needs g to divide both C and K, so it has
    gcd(C, K) groups at most. From 32 to 48 channels that is 16, and depthwise (g = C) needs K to be a multiple of C.
    Here only the depthwise stage is grouped, its K is C * T, and the pointwise stage mixes all channels.

    Input [N, C, H, W] or [C, H, W]; output [N, K, P, Q] or [K, P, Q].
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = "same",
        dilation: int | tuple[int, int] = 1,
        multiplier: int = 1,
        bias: bool = True,
        norm: str | None = None,
        activation: str = "identity",
        depthwise_activation: str = "identity",
        depthwise_norm: bool = True,
        padding_mode: PaddingMode = "zeros",
        save_intermediate: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if norm not in (None, "batch"):
            raise ValueError(f"norm must be None or 'batch', but is {norm!r}")
        _check_activation("activation", activation)
        _check_activation("depthwise_activation", depthwise_activation)
        _check_multiplier(multiplier)
        place = dict(device=device, dtype=dtype)
        normed = (norm is not None and depthwise_norm, norm is not None)
        self.depthwise = Conv2d(
            in_channels,
            in_channels * multiplier,
            kernel_size,
            stride,
            _same(kernel_size, stride, dilation) if padding == "same" else padding,
            dilation,
            groups=in_channels,
            bias=bias and not normed[0],
            padding_mode=padding_mode,
            **place,
        )
        self.depthwise_norm = nn.BatchNorm2d(in_channels * multiplier, **place) if normed[0] else None
        self.pointwise = Conv2d(in_channels * multiplier, out_channels, 1, bias=bias and not normed[1], **place)
        self.pointwise_norm = nn.BatchNorm2d(out_channels, **place) if normed[1] else None
        self.depthwise_activation = depthwise_activation
        self.activation = activation
        self.save_intermediate = save_intermediate
        self._built_of = self._parts()
        self._chain = self._built()

    def forward(self, input: Tensor) -> Tensor:
        if self._built_of != self._parts():  # an exchanged module, another activation
            self._built_of, self._chain = self._parts(), self._built()
        chain = self._chain
        if chain is not None and chain.is_fused:
            return chain(input)
        if chain is not None:
            chain.forget()
        for conv, norm, activation in self._stages():
            input = conv(input)
            if norm is not None:
                input = norm(input)
            input = ACTIVATIONS[activation](input)
        return input

    def _stages(self) -> tuple[tuple[Conv2d, nn.Module | None, str], ...]:
        return (
            (self.depthwise, self.depthwise_norm, self.depthwise_activation),
            (self.pointwise, self.pointwise_norm, self.activation),
        )

    def _parts(self) -> tuple:
        return (*self._stages(), self.save_intermediate)

    def _built(self) -> Chain | None:
        """The parts as one op; None where one was exchanged for something else, parametrized for example."""
        if not _are_plain(*(part for conv, norm, _ in self._stages() for part in (conv, norm))):
            return None
        if not (is_depthwise(self.depthwise) and is_pointwise(self.pointwise)):
            return None
        depthwise, pointwise = (Stage(*parts) for parts in self._stages())
        return Chain(depthwise, pointwise, self.save_intermediate)

    def extra_repr(self) -> str:
        named = dict(depthwise_activation=self.depthwise_activation, activation=self.activation)
        text = [f"{name}={value}" for name, value in named.items() if value != "identity"]
        return ", ".join(text + ["save_intermediate=True"] * self.save_intermediate)


def _are_plain(*parts: nn.Module | None) -> bool:
    return all(type(part) in (type(None), Conv2d, nn.BatchNorm2d, nn.SyncBatchNorm) for part in parts)


class InvertedResidual(_Unscriptable, nn.Module):
    """A block of MobileNetV2 (arXiv 1801.04381), MobileNetV3, MnasNet or EfficientNet: expand, convolve, project.

    expand -> [norm] -> activation -> depthwise -> [norm] -> activation -> [squeeze-and-excitation] -> project -> [norm]
    [+ input]. Without norms, and with norms in eval(), all of it is one `functional.inverted_residual`, the norms
    folded into the weights. With norms in train(), and while one of its parts has a hook, it runs stage by stage. The
    parts are the modules `expand` (1x1), `depthwise`, `squeeze` and `excite` (1x1, with biases) and `project` (1x1),
    each an nn.Conv2d, and `expand_norm`, `depthwise_norm` and `project_norm`, each an nn.BatchNorm2d; None where there
    is no such part.

    Args:
        in_channels, out_channels: C and K.
        hidden_channels: E, of the depthwise stage. Where it is C nothing is expanded, as in the first block of
            MobileNetV2.
        kernel_size, stride, dilation: of the depthwise stage, as for torch.nn.Conv2d. Default: 3, 1 and 1.
        padding: of the depthwise stage: as for torch.nn.Conv2d, or "same" (default), as for SeparableConv2d.
        squeeze_channels: M, of squeeze-and-excitation (arXiv 1709.01507); 0 leaves it out. Default: 0.
        norm: None, or "batch" for an nn.BatchNorm2d behind each stage. Default: "batch".
        activation: behind the first two stages, a name as for DepthwiseConv2d. Default: "relu6".
        project_activation: behind the last stage, after the sum. Default: "identity".
        squeeze_activation, gate: inside of squeeze-and-excitation; the gate is "sigmoid" or "hardsigmoid". Default:
            "relu" and "sigmoid".
        residual: whether the input is added. Default: where the stride is 1 and K is C.
        drop_path: the share of images whose block, but for the added input, is dropped in train(): stochastic depth
            (arXiv 1603.09382), "row" in torchvision. Default: 0.
        device, dtype: of the parameters.

    Raises:
        ValueError: an unknown activation, gate or norm; a residual at a stride or with K other than C; a drop_path
            outside of [0, 1) or without a residual; padding="same" for a kernel of an even extent at a stride.

    Weights are initialised as in the networks of the papers: normal, of variance 2 / (R * S * K / groups), where K is
    the stage's own; biases are zero. Input [N, C, H, W] or [C, H, W]; output [N, K, P, Q] or [K, P, Q].
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        hidden_channels: int,
        kernel_size: int | tuple[int, int] = 3,
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = "same",
        dilation: int | tuple[int, int] = 1,
        squeeze_channels: int = 0,
        norm: str | None = "batch",
        activation: str = "relu6",
        project_activation: str = "identity",
        squeeze_activation: str = "relu",
        gate: str = "sigmoid",
        residual: bool | None = None,
        drop_path: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        names = dict(
            activation=activation, project_activation=project_activation, squeeze_activation=squeeze_activation
        )
        for name, value in names.items():
            _check_activation(name, value)
        if norm not in (None, "batch"):
            raise ValueError(f"norm must be None or 'batch', but is {norm!r}")
        if gate not in ("sigmoid", "hardsigmoid"):
            raise ValueError(f"gate must be 'sigmoid' or 'hardsigmoid', but is {gate!r}")
        may_add = _pair(stride) == (1, 1) and in_channels == out_channels
        if residual and not may_add:
            raise ValueError(
                "a residual needs stride 1 and out_channels like in_channels, but stride is "
                f"{stride}, in_channels is {in_channels} and out_channels is {out_channels}"
            )
        self.residual = may_add if residual is None else residual
        if not 0 <= drop_path < 1:
            raise ValueError(f"drop_path must be in [0, 1), but is {drop_path}")
        if drop_path and not self.residual:
            raise ValueError(f"drop_path needs a residual, which this block has not, but is {drop_path}")
        place, E = dict(device=device, dtype=dtype), hidden_channels
        bias = norm is None

        def norm_of(channels: int) -> nn.BatchNorm2d | None:
            return nn.BatchNorm2d(channels, **place) if norm else None

        expands = in_channels != E
        self.expand = Conv2d(in_channels, E, 1, bias=bias, **place) if expands else None
        self.expand_norm = norm_of(E) if expands else None
        sides = _same(kernel_size, stride, dilation) if padding == "same" else padding
        self.depthwise = Conv2d(E, E, kernel_size, stride, sides, dilation, groups=E, bias=bias, **place)
        self.depthwise_norm = norm_of(E)
        self.squeeze = Conv2d(E, squeeze_channels, 1, **place) if squeeze_channels else None
        self.excite = Conv2d(squeeze_channels, E, 1, **place) if squeeze_channels else None
        self.project = Conv2d(E, out_channels, 1, bias=bias, **place)
        self.project_norm = norm_of(out_channels)
        self.activation, self.project_activation = activation, project_activation
        self.squeeze_activation, self.gate, self.drop_path = squeeze_activation, gate, drop_path
        self._built_of = self._parts()
        self._block = self._built()
        self.reset_parameters()

    @classmethod
    def from_block(cls, block: nn.Module) -> InvertedResidual:
        """The same block of torchvision's or timm's layers, with the block's own Parameters and statistics.

        `block`: an InvertedResidual or MBConv of torchvision.models, or an InvertedResidual or DepthwiseSeparableConv
        of timm. It is not changed, but shares its tensors with the result, which takes its place in a model:
        `model.features[2] = InvertedResidual.from_block(model.features[2])`. The names in the state_dict are then this
        class's.

        Raises:
            ValueError: a block of another kind, or with a part that this class has not.
        """
        parts = read_block(block)
        depthwise, last = parts.depthwise.conv, parts.project.conv
        first = parts.expand.conv if parts.expand else depthwise
        made = cls(
            first.in_channels,
            last.out_channels,
            depthwise.in_channels,
            cast(tuple[int, int], depthwise.kernel_size),
            cast(tuple[int, int], depthwise.stride),
            cast(tuple[int, int], depthwise.padding),
            cast(tuple[int, int], depthwise.dilation),
            parts.squeeze.out_channels if parts.squeeze else 0,
            norm="batch" if parts.project.norm is not None else None,
            activation=parts.depthwise.activation,
            project_activation=parts.project.activation,
            squeeze_activation=parts.squeeze_activation,
            gate=parts.gate,
            residual=parts.residual,
            drop_path=parts.drop_path,
            device="meta",
            dtype=last.weight.dtype,
        )
        made.train(block.training)._take(parts)
        return made

    def _take(self, parts: Parts) -> None:
        """The tensors and flags of these layers in the place of its own."""
        theirs: dict[str, Any] = {"squeeze": parts.squeeze, "excite": parts.excite}
        for name, stage in dict(expand=parts.expand, depthwise=parts.depthwise, project=parts.project).items():
            if stage is not None:
                theirs |= {name: stage.conv, f"{name}_norm": stage.norm}
        for name, module in theirs.items():
            if module is None:
                continue
            mine = getattr(self, name)
            mine.training = module.training
            mine._parameters.update({key: module._parameters[key] for key in mine._parameters})
            mine._buffers.update({key: module._buffers[key] for key in mine._buffers})
            if isinstance(mine, nn.BatchNorm2d):
                mine.eps, mine.momentum = module.eps, module.momentum

    def reset_parameters(self) -> None:
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                outputs = layer.out_channels // layer.groups * layer.kernel_size[0] * layer.kernel_size[1]
                nn.init.normal_(layer.weight, 0, math.sqrt(2 / outputs))
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
            elif isinstance(layer, nn.BatchNorm2d):
                layer.reset_parameters()

    def forward(self, input: Tensor) -> Tensor:
        if self._built_of != self._parts():  # an exchanged module, another activation
            self._built_of, self._block = self._parts(), self._built()
        block = self._block
        drops = self.drop_path > 0 and self.training
        # One op casts all that it gets: an input that autocast leaves wide is added outside of it.
        adds_wide = self.residual and torch.is_autocast_enabled(input.device.type)
        if block is not None and block.is_fused and not drops and not adds_wide:
            return block(input)
        if block is not None:
            block.forget()
        made = input
        for name, conv, norm, activation in self._stages():
            if name == "project" and self.squeeze is not None:
                squeezed = ACTIVATIONS[self.squeeze_activation](self.squeeze(made.mean((-2, -1), keepdim=True)))
                made = made * getattr(F, self.gate)(cast(Conv2d, self.excite)(squeezed))
            made = conv(made) if norm is None else norm(conv(made))
            if name != "project":
                made = ACTIVATIONS[activation](made)
        if drops:
            made = made * F.dropout(made.new_ones((*made.shape[:-3], 1, 1, 1)), self.drop_path)
        return ACTIVATIONS[self.project_activation](input + made if self.residual else made)

    def _stages(self) -> tuple[tuple[str, Conv2d, nn.Module | None, str], ...]:
        """(name, convolution, norm, activation)."""
        expand = () if self.expand is None else (("expand", self.expand, self.expand_norm, self.activation),)
        return (
            *expand,
            ("depthwise", self.depthwise, self.depthwise_norm, self.activation),
            ("project", self.project, self.project_norm, self.project_activation),
        )

    def _parts(self) -> tuple:
        return (*self._stages(), self.squeeze, self.excite, self.squeeze_activation, self.gate, self.residual)

    def _built(self) -> Block | None:
        """The parts as one op; None where one was exchanged for something else, parametrized for example."""
        stages = self._stages()
        if not _are_plain(self.squeeze, self.excite, *(part for _, conv, norm, _ in stages for part in (conv, norm))):
            return None
        products = [conv for name, conv, _, _ in stages if name != "depthwise"]
        products += [conv for conv in (self.squeeze, self.excite) if conv is not None]
        if not is_depthwise(self.depthwise) or not all(map(is_pointwise, products)):
            return None
        if (self.squeeze is None) != (self.excite is None) or self.depthwise.padding_mode != "zeros":
            return None
        named = {name: Stage(conv, norm, activation) for name, conv, norm, activation in stages}
        squeeze = None if self.squeeze is None else Stage(self.squeeze, None, self.squeeze_activation)
        excite = None if self.excite is None else Stage(self.excite)
        ends = named["depthwise"], named["project"]
        return Block(named.get("expand"), *ends, squeeze, excite, self.gate, self.residual)

    def extra_repr(self) -> str:
        text = [f"activation={self.activation}"]
        if self.project_activation != "identity":
            text.append(f"project_activation={self.project_activation}")
        if self.squeeze is not None:
            text.append(f"squeeze_activation={self.squeeze_activation}, gate={self.gate}")
        text.append(f"residual={self.residual}")
        return ", ".join(text + ([f"drop_path={self.drop_path}"] if self.drop_path else []))


def _same(kernel_size: Any, stride: Any, dilation: Any) -> str | tuple[int, int]:
    """Padding for an output of ceil(size / stride)."""
    zeros = [d * (k - 1) for k, d in zip(_pair(kernel_size), _pair(dilation), strict=True)]
    if not any(n % 2 for n in zeros):
        return (zeros[0] // 2, zeros[1] // 2)
    if _pair(stride) != (1, 1):
        raise ValueError(
            "padding='same' at a stride needs a kernel of odd extent, "
            f"but kernel_size is {kernel_size}, dilation is {dilation} and stride is {stride}"
        )
    return "same"


class SpatialSeparableConv2d(_Unscriptable, nn.Module):
    """A filter down the columns of each channel and then one along its rows, in one pass through memory.

    Equal to a depthwise convolution whose filter is the product `column[c, :, None] * row[c]`, at R + S products a
    pixel instead of R * S.

    Args:
        channels: C of the input and of the output.
        kernel_size: R and S; one value or (height, width).
        padding: zeros around the image: one value, (height, width), "same" or "valid". Default: "same".
        padding_mode: "zeros" (default), "reflect", "replicate" or "circular".
        shared: one pair of filters serves every channel. Default: False.
        device, dtype: of the parameters.

    Parameters: `column` [C, R] and `row` [C, S], or [1, R] and [1, S] where they are shared. Initialised so that their
    product has the variance that torch.nn.Conv2d gives a depthwise weight, 1 / (3 * R * S). Input [N, C, H, W] or
    [C, H, W], output [N, C, P, Q] or [C, P, Q]. There is no stride, dilation or bias.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int | tuple[int, int],
        padding: str | int | tuple[int, int] = "same",
        padding_mode: PaddingMode = "zeros",
        shared: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        # An nn.Conv2d without memory knows how to read and refuse these arguments.
        plan = nn.Conv2d(channels, channels, kernel_size, 1, padding, padding_mode=padding_mode, device="meta")
        self.channels, self.kernel_size, self.shared = channels, plan.kernel_size, shared
        self.padding, self.padding_mode = plan.padding, padding_mode
        self._pad = plan._reversed_padding_repeated_twice
        filters = 1 if shared else channels
        R, S = self.kernel_size
        self.column = nn.Parameter(torch.empty(filters, R, device=device, dtype=dtype))
        self.row = nn.Parameter(torch.empty(filters, S, device=device, dtype=dtype))
        self.reset_parameters()

    @classmethod
    def from_filters(cls, column: Tensor, row: Tensor, channels: int, **arguments: Any) -> SpatialSeparableConv2d:
        """A layer with these filters: column [R], row [S], shared by all channels, or [C, R] and [C, S].

        `arguments`: padding, padding_mode. The filters are copied, and learn: `layer.requires_grad_(False)` fixes them.
        """
        shared = column.dim() == 1 and row.dim() == 1
        size = (column.shape[-1], row.shape[-1])
        layer = cls(channels, size, shared=shared, device=column.device, dtype=column.dtype, **arguments)
        with torch.no_grad():
            layer.column.copy_(column)
            layer.row.copy_(row)
        return layer

    def reset_parameters(self) -> None:
        for filter in (self.column, self.row):
            bound = math.sqrt(math.sqrt(3) / filter.shape[1])
            nn.init.uniform_(filter, -bound, bound)

    def forward(self, input: Tensor) -> Tensor:
        if self.padding_mode == "zeros":
            return functional.spatial_separable_conv2d(input, self.column, self.row, self.padding)
        padded = F.pad(input, self._pad, mode=self.padding_mode)
        return functional.spatial_separable_conv2d(padded, self.column, self.row)

    def extra_repr(self) -> str:
        text = f"{self.channels}, kernel_size={self.kernel_size}, padding={self.padding!r}"
        if self.padding_mode != "zeros":
            text += f", padding_mode={self.padding_mode!r}"
        return f"{text}, shared=True" if self.shared else text
