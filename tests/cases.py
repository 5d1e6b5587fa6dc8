"""The shapes that the kernels are tested on: one list for every device, dtype, layout and for the CUDA emulator.

Shapes are shrunk to what still meets the edge they are there for. `SMALL` is a subset for slow runners.
"""

from __future__ import annotations

from dataclasses import dataclass

from sepconv_ext import reference


@dataclass(frozen=True)
class Case:
    name: str
    N: int
    C: int
    H: int
    W: int
    K: int
    R: int
    S: int
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] | str = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    bias: bool = False

    @property
    def input_size(self) -> tuple[int, int, int, int]:
        return (self.N, self.C, self.H, self.W)

    @property
    def weight_size(self) -> tuple[int, int, int, int]:
        return (self.K, self.C // self.groups, self.R, self.S)

    @property
    def output_size(self) -> tuple[int, int, int, int]:
        return reference.output_size(self.input_size, self.weight_size, self.stride, self.padding, self.dilation)

    @property
    def four_paddings(self) -> tuple[int, int, int, int]:
        """(top, bottom, left, right), as the ops take it."""
        return reference.four_paddings(self.padding, (self.R, self.S), self.dilation)

    @property
    def family(self) -> str:
        """depthwise, grouped, pointwise, or dense (which is nobody's special case: any groups, groups = 1)."""
        if self.groups == self.C:
            return "depthwise"
        if self.groups > 1:
            return "grouped"
        return "pointwise" if (self.R, self.S) == (1, 1) and self.padding == (0, 0) else "dense"

    @property
    def geometry(self) -> tuple:
        """stride, padding, dilation, groups: the tail of F.conv2d's arguments."""
        return (self.stride, self.padding, self.dilation, self.groups)

    @property
    def op_geometry(self) -> tuple:
        """The same, as the ops take it."""
        return (self.stride, self.four_paddings, self.dilation, self.groups)

    def __str__(self) -> str:
        return self.name


def _depthwise(name, N, C, H, W, kernel, multiplier=1, **rest) -> Case:
    R, S = reference.pair(kernel)
    return Case(f"depthwise_{name}", N, C, H, W, C * multiplier, R, S, groups=C, **rest)


def _pointwise(name, N, C, H, W, K, **rest) -> Case:
    return Case(f"pointwise_{name}", N, C, H, W, K, 1, 1, **rest)


def _grouped(name, N, C, H, W, K, kernel, groups, **rest) -> Case:
    R, S = reference.pair(kernel)
    return Case(f"grouped_{name}", N, C, H, W, K, R, S, groups=groups, **rest)


CASES: tuple[Case, ...] = (
    # depthwise: the kernel sizes, odd and even channel counts, planes with and without a vector remainder
    _depthwise("k3", 2, 24, 14, 14, 3, padding=(1, 1), bias=True),
    _depthwise("k3_aligned", 1, 64, 16, 32, 3, padding=(1, 1)),
    _depthwise("k3_c58", 2, 58, 7, 7, 3, padding=(1, 1)),
    _depthwise("k3_c3_wide", 2, 3, 5, 67, 3, padding=(1, 1), bias=True),
    _depthwise("k3_tall", 1, 8, 37, 4, 3, padding=(1, 1)),
    _depthwise("k3_no_padding", 2, 16, 9, 11, 3),
    _depthwise("k3_stride2", 2, 24, 15, 14, 3, stride=(2, 2), padding=(1, 1), bias=True),
    _depthwise("k3_stride2_even", 1, 32, 16, 16, 3, stride=(2, 2), padding=(1, 1)),
    _depthwise("k3_stride3", 1, 7, 19, 20, 3, stride=(3, 3), padding=(1, 1)),
    _depthwise("k3_stride1x2", 2, 5, 9, 12, 3, stride=(1, 2), padding=(1, 1)),
    _depthwise("k3_dilation2", 2, 24, 14, 13, 3, padding=(2, 2), dilation=(2, 2)),
    _depthwise("k3_dilation_stride", 1, 9, 19, 17, 3, stride=(2, 2), padding=(2, 4), dilation=(2, 3), bias=True),
    _depthwise("k3_one_channel", 2, 1, 7, 19, 3, padding=(1, 1)),
    _depthwise("k3_one_row", 2, 8, 1, 19, 3, padding=(1, 1)),
    _depthwise("k3_one_pixel", 2, 16, 1, 1, 3, padding=(1, 1)),
    _depthwise("k3_empty_batch", 0, 8, 6, 6, 3, padding=(1, 1), bias=True),
    _depthwise("k3_wide_padding", 1, 4, 5, 6, 3, padding=(4, 3)),
    _depthwise("k3_stride_beyond_kernel", 1, 6, 13, 13, 2, stride=(4, 4)),
    _depthwise("multiplier2", 2, 12, 10, 9, 3, multiplier=2, padding=(1, 1), bias=True),
    _depthwise("multiplier3_stride2", 1, 5, 11, 10, 3, multiplier=3, stride=(2, 2), padding=(1, 1)),
    _depthwise("one_channel_multiplier32", 2, 1, 12, 12, 3, multiplier=32, padding=(1, 1), bias=True),
    _depthwise("k1", 2, 10, 7, 8, 1, bias=True),
    _depthwise("k1_stride2", 1, 6, 9, 8, 1, stride=(2, 2)),
    _depthwise("k2_same", 2, 8, 7, 9, 2, padding="same"),
    _depthwise("k4x3_same", 1, 6, 8, 9, (4, 3), padding="same", dilation=(1, 2), bias=True),
    _depthwise("k5", 2, 24, 14, 14, 5, padding=(2, 2), bias=True),
    _depthwise("k5_stride2", 1, 58, 15, 15, 5, stride=(2, 2), padding=(2, 2)),
    _depthwise("k7", 1, 24, 14, 14, 7, padding=(3, 3), bias=True),
    _depthwise("k7_plane7", 3, 40, 7, 7, 7, padding=(3, 3)),
    _depthwise("k7_stride2", 1, 16, 19, 18, 7, stride=(2, 2), padding=(3, 3)),
    _depthwise("k9", 1, 8, 19, 17, 9, padding=(4, 4)),
    _depthwise("k9_empty_batch", 0, 8, 12, 12, 9, padding=(4, 4)),
    _depthwise("k3x5", 2, 12, 9, 13, (3, 5), padding=(1, 2), bias=True),
    _depthwise("k1x31", 1, 4, 3, 40, (1, 31), padding=(0, 15)),
    _depthwise("k31", 1, 3, 33, 35, 31, padding=(15, 15)),
    # grouped: two wide groups (AlexNet), many narrow ones (ResNeXt), uneven and single-output groups
    _grouped("alexnet", 1, 32, 13, 13, 48, 5, 2, padding=(2, 2), bias=True),
    _grouped("resnext", 2, 64, 7, 7, 64, 3, 32, padding=(1, 1)),
    _grouped("resnext_stride2", 1, 64, 8, 9, 64, 3, 16, stride=(2, 2), padding=(1, 1)),
    _grouped("channels3_outputs5", 2, 9, 8, 7, 15, 3, 3, padding=(1, 1), dilation=(1, 2), bias=True),
    _grouped("one_output", 1, 12, 6, 10, 4, 3, 4, padding=(1, 1)),
    _grouped("k1", 2, 20, 5, 7, 30, 1, 5, bias=True),
    _grouped("k2_same", 1, 8, 6, 5, 12, 2, 2, padding="same"),
    _grouped("empty_batch", 0, 8, 6, 6, 8, 3, 2, padding=(1, 1)),
    _grouped("one_row", 2, 6, 1, 9, 6, (1, 3), 3, padding=(0, 1)),
    # pointwise: matrix products with and without remainders
    _pointwise("aligned", 2, 32, 8, 8, 64, bias=True),
    _pointwise("awkward", 2, 58, 7, 7, 24, bias=True),
    _pointwise("c3", 1, 3, 19, 5, 13),
    _pointwise("one_output", 2, 24, 5, 6, 1),
    _pointwise("one_pixel", 3, 40, 1, 1, 10, bias=True),
    _pointwise("stride2", 2, 16, 9, 8, 24, stride=(2, 2)),
    _pointwise("empty_batch", 0, 16, 4, 4, 8, bias=True),
    # dense: groups = 1 is also a number of groups
    Case("dense_k3", 2, 6, 9, 8, 10, 3, 3, padding=(1, 1), bias=True),
    Case("dense_k3_stride2", 1, 5, 9, 12, 4, 3, 3, stride=(2, 2), padding=(1, 0), dilation=(2, 1)),
    Case("dense_k1_padding", 1, 8, 5, 5, 6, 1, 1, padding=(1, 1)),
)

# Large enough for a plan to take, on a GPU of 132 multiprocessors, the tiles of large problems: pairs of channels,
# several planes a block, seven rows of results a thread. tests/test_cuda_plan.py holds the plan to it.
GPU_LAYERS: tuple[Case, ...] = (
    *(
        _depthwise(f"fill_k{k}" + "_stride2" * (s == 2), 16, 144, 29, 30, k, stride=(s, s), padding=(k // 2, k // 2))
        for k in (3, 5, 7)
        for s in (1, 2)
    ),
    *(_depthwise(f"fill_boxes_k{k}", 72, 192, 28, 28, k, padding=(k // 2, k // 2), bias=True) for k in (5, 7)),
    _depthwise("fill_k3_plane28", 32, 144, 28, 28, 3, padding=(1, 1)),
    _depthwise("fill_k13", 64, 96, 14, 14, 13, padding=(6, 6), bias=True),
    _depthwise("fill_k13_plane28", 32, 96, 28, 28, 13, padding=(6, 6)),
    _depthwise("fill_k31", 32, 96, 28, 28, 31, padding=(15, 15)),
)

_SMALL = (
    "depthwise_k3",
    "depthwise_k3_c58",
    "depthwise_k3_c3_wide",
    "depthwise_k3_stride2",
    "depthwise_k3_stride1x2",
    "depthwise_k3_dilation_stride",
    "depthwise_k3_one_row",
    "depthwise_k3_empty_batch",
    "depthwise_multiplier2",
    "depthwise_k4x3_same",
    "depthwise_k5",
    "depthwise_k7_plane7",
    "grouped_alexnet",
    "grouped_resnext",
    "grouped_channels3_outputs5",
    "grouped_k2_same",
    "pointwise_aligned",
    "pointwise_awkward",
    "pointwise_stride2",
)
BY_NAME: dict[str, Case] = {case.name: case for case in CASES}
SMALL: tuple[Case, ...] = tuple(BY_NAME[name] for name in _SMALL)
assert len(BY_NAME) == len(CASES), "two cases have one name"

# One of each family with every argument in play, for tests of machinery rather than of shapes.
FAMILIES: tuple[Case, ...] = (
    _depthwise("plain", 2, 6, 7, 6, 3, padding=(1, 1), bias=True),
    _depthwise("strided", 2, 4, 7, 8, 3, multiplier=2, stride=(2, 1), padding=(2, 1), dilation=(2, 1), bias=True),
    _grouped("two", 2, 6, 6, 5, 4, 3, 2, stride=(1, 2), padding=(1, 1), bias=True),
    _pointwise("plain", 2, 5, 4, 3, 6, bias=True),
)


@dataclass(frozen=True)
class SeparableCase:
    """A depthwise convolution of `multiplier` outputs a channel, and the 1x1 convolution to K channels behind it."""

    name: str
    N: int
    C: int
    H: int
    W: int
    K: int
    kernel: tuple[int, int] = (3, 3)
    multiplier: int = 1
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] | str = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    bias: bool = True
    depthwise_activation: str = "relu6"
    pointwise_activation: str = "identity"

    @property
    def input_size(self) -> tuple[int, int, int, int]:
        return (self.N, self.C, self.H, self.W)

    @property
    def depthwise_size(self) -> tuple[int, int, int, int]:
        return (self.C * self.multiplier, 1, *self.kernel)

    @property
    def pointwise_size(self) -> tuple[int, int, int, int]:
        return (self.K, self.C * self.multiplier, 1, 1)

    @property
    def output_size(self) -> tuple[int, int, int, int]:
        size = reference.output_size(self.input_size, self.depthwise_size, self.stride, self.padding, self.dilation)
        return (self.N, self.K, *size[2:])

    @property
    def geometry(self) -> tuple:
        """stride, padding, dilation, as functional.separable_conv2d takes them."""
        return (self.stride, self.padding, self.dilation)

    @property
    def op_geometry(self) -> tuple:
        """The same, as the op takes it."""
        return (self.stride, reference.four_paddings(self.padding, self.kernel, self.dilation), self.dilation)

    @property
    def activations(self) -> tuple[str, str]:
        return (self.depthwise_activation, self.pointwise_activation)

    def __str__(self) -> str:
        return self.name


SEPARABLE: tuple[SeparableCase, ...] = (
    SeparableCase("plain", 2, 24, 14, 14, 40),
    SeparableCase("aligned", 1, 64, 16, 32, 64, depthwise_activation="relu", pointwise_activation="relu"),
    SeparableCase("awkward", 2, 58, 7, 7, 37),
    SeparableCase("wide_output", 1, 24, 19, 7, 131, pointwise_activation="leaky_relu"),
    SeparableCase("c3", 2, 3, 19, 20, 16, stride=(2, 2), depthwise_activation="identity"),
    SeparableCase("one_channel", 2, 1, 7, 19, 5, multiplier=3),
    SeparableCase("one_channel_each", 2, 1, 7, 9, 1, depthwise_activation="sigmoid"),
    SeparableCase("one_output", 2, 20, 7, 8, 1, bias=False),
    SeparableCase("one_row", 2, 24, 1, 19, 24, pointwise_activation="tanh"),
    SeparableCase("one_pixel", 3, 24, 1, 1, 10),
    SeparableCase("many_small_images", 13, 17, 3, 4, 9),
    SeparableCase("wide_row", 1, 20, 2, 2600, 3, bias=False),  # wider than a tile
    SeparableCase("k5_stride2", 1, 40, 15, 17, 24, kernel=(5, 5), stride=(2, 2), padding=(2, 2)),
    SeparableCase("k7_dilated", 1, 33, 19, 19, 20, kernel=(7, 7), padding=(6, 3), dilation=(2, 1)),
    SeparableCase("k3x9_same", 2, 35, 8, 13, 18, kernel=(3, 9), padding="same", depthwise_activation="silu"),
    SeparableCase("k4x2_same", 2, 6, 8, 9, 18, kernel=(4, 2), padding="same", depthwise_activation="gelu"),
    SeparableCase("stride1x3", 1, 40, 11, 23, 24, stride=(1, 3), depthwise_activation="hardswish"),
    SeparableCase("stride3_dilation2", 1, 9, 20, 19, 12, stride=(3, 3), padding=(2, 2), dilation=(2, 2)),
    SeparableCase("multiplier2", 2, 24, 9, 10, 30, multiplier=2, pointwise_activation="gelu"),
    SeparableCase("no_padding", 2, 16, 9, 35, 24, padding=(0, 0), depthwise_activation="tanh"),
    SeparableCase("wide_padding", 1, 16, 5, 6, 8, padding=(4, 3), pointwise_activation="hardswish"),
    SeparableCase("empty_batch", 0, 8, 6, 6, 12),
)
assert len({case.name for case in SEPARABLE}) == len(SEPARABLE), "two cases have one name"
SEPARABLE_BY_NAME: dict[str, SeparableCase] = {case.name: case for case in SEPARABLE}
