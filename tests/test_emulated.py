"""Every CUDA kernel, run on the CPU: the .cu files compiled by g++ against tests/emulator, on the shared cases.

One test is one kernel on one case: several seeds (SEEDS, default 2: data, block order and thread order) under
AddressSanitizer and UndefinedBehaviorSanitizer, then one under the race detector, each compared with a float64
reference. A failure prints the command that repeats it. tests/emulator/README.md explains how it works and what it
cannot see.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from cases import BY_NAME, CASES, SMALL, Case
from sepconv_ext import reference

sys.path.insert(0, str(Path(__file__).parent / "emulator"))
import emulate

pytestmark = [
    pytest.mark.emulated,
    pytest.mark.skipif(emulate.why_not() is not None, reason=str(emulate.why_not())),
]

SEEDS = int(os.environ.get("SEEDS", "2"))
RACE_SEEDS = max(1, SEEDS // 8)
MAPS = ("forward", "grad_input", "grad_weight")
DTYPES = ("float32", "float16", "float64", "bfloat16")
LAYOUTS = ("contiguous", "channels_last")
ACTIVATIONS = tuple(reference.ACTIVATIONS)


@dataclass(frozen=True)
class Run:
    """A case as the runner takes it. `extra` overrules what the plan would choose."""

    case: Case
    map: str
    dtype: str
    layout: str
    activation: str = "identity"
    extra: dict[str, object] = field(default_factory=dict)

    def arguments(self) -> list[str]:
        c = self.case
        top, bottom, left, right = c.four_paddings
        values: dict[str, object] = {
            "map": self.map, "dtype": self.dtype, "layout": self.layout,
            "N": c.N, "C": c.C, "H": c.H, "W": c.W, "K": c.K, "R": c.R, "S": c.S, "groups": c.groups,
            "stride": f"{c.stride[0]},{c.stride[1]}", "padding": f"{top},{bottom},{left},{right}",
            "dilation": f"{c.dilation[0]},{c.dilation[1]}", "bias": int(c.bias), "activation": self.activation,
        }  # fmt: skip
        return [f"{key}={value}" for key, value in (values | self.extra).items()]

    @property
    def half(self) -> bool:
        return self.dtype in ("float16", "bfloat16")


# Edges of tiles and walks that planted faults have shown to be needed.
EDGES = (
    # More pixels than a block of grad_weight has threads, in images with fewer: its walk steps over whole images.
    Case("grouped_six_small_images", 6, 8, 7, 7, 8, 3, 3, padding=(1, 1), groups=2),
    Case("grouped_forty_pixels", 40, 8, 1, 1, 8, 1, 1, groups=2),
    # One channel more than whole steps of the sum, and than whole vectors of the result.
    Case("pointwise_one_more", 1, 33, 3, 11, 33, 1, 1, bias=True),
    # Tiles of the result that are full to the last corner.
    Case("pointwise_full_tile", 1, 64, 4, 4, 128, 1, 1),
    # One channel more than whole chunks of a fused kernel.
    Case("depthwise_one_more", 1, 33, 6, 5, 33, 3, 3, padding=(1, 1), groups=33),
)

# 1x1 in channels_last on tensor cores: an odd number of pieces, slices of 64 channels with a rest, several tiles of
# pixels and a rest, several parts of the outputs and a rest, images of one pixel, a strided input.
PRODUCTS = (
    Case("product_c24_k144", 3, 24, 7, 9, 144, 1, 1, bias=True),
    Case("product_c136_k40", 1, 136, 13, 21, 40, 1, 1, bias=True),
    Case("product_c64_k128", 2, 64, 16, 16, 128, 1, 1),
    Case("product_c72_k136", 1, 72, 9, 15, 136, 1, 1),
    Case("product_65_pixels", 1, 8, 5, 13, 16, 1, 1),  # grad_weight: a part of one pixel
    Case("product_c8_k8_one_pixel", 5, 8, 1, 1, 8, 1, 1, bias=True),
    Case("product_stride2", 2, 16, 21, 19, 72, 1, 1, stride=(2, 2), bias=True),
)

# Groups in channels_last on tensor cores, of 4, 8 and 16 channels: slabs of channels with a rest and without, tiles of
# columns and a rest, rows and columns of one, odd and even padding at stride 2, padding beyond the kernel.
GROUPS = (
    Case("groups_of_8", 2, 64, 8, 9, 64, 3, 3, padding=(1, 1), groups=8, bias=True),
    Case("groups_of_4_c72", 3, 72, 5, 19, 72, 3, 3, padding=(1, 1), groups=18),
    Case("groups_of_16_c80", 1, 80, 7, 70, 80, 3, 3, padding=(1, 1), groups=5, bias=True),
    Case("groups_of_16_far_padding", 2, 48, 6, 5, 48, 3, 3, padding=(4, 3), groups=3, bias=True),
    Case("groups_of_8_no_padding", 3, 16, 9, 38, 16, 3, 3, groups=2),
    Case("groups_of_8_one_pixel", 5, 40, 1, 1, 40, 3, 3, padding=(1, 1), groups=5, bias=True),
    Case("groups_of_4_stride2", 2, 64, 15, 41, 64, 3, 3, stride=(2, 2), padding=(1, 1), groups=16, bias=True),
    Case("groups_of_4_stride2_small", 3, 8, 5, 5, 8, 3, 3, stride=(2, 2), padding=(1, 1), groups=2),  # few spoil all
    Case("groups_of_4_stride2_one_column", 4, 8, 7, 1, 8, 3, 3, stride=(2, 2), padding=(1, 1), groups=2),
    Case("groups_of_8_stride2_even", 3, 24, 14, 20, 24, 3, 3, stride=(2, 2), padding=(2, 0), groups=3, bias=True),
    Case("groups_of_16_stride2_c144", 1, 144, 9, 74, 144, 3, 3, stride=(2, 2), padding=(1, 1), groups=9),
)

# Walks of the channels_last kernels: phases of a dilation (some without a row), outputs that meet no row of the image,
# odd and even padding at stride 2, one block of channels more than whole ones, one channel a thread.
WALKS = (
    Case("walk_k5_dilation2x3", 1, 6, 9, 10, 6, 5, 5, padding=(4, 6), dilation=(2, 3), groups=6, bias=True),
    Case("walk_k3_dilation_beyond", 1, 4, 5, 6, 4, 3, 3, padding=(8, 9), dilation=(8, 9), groups=4),
    Case("walk_k3_far_padding", 1, 2, 3, 4, 2, 3, 3, padding=(6, 8), groups=2, bias=True),
    Case("walk_k3_stride2_far", 1, 2, 6, 7, 2, 3, 3, stride=(2, 2), padding=(6, 7), groups=2, bias=True),
    Case("walk_k5_stride2", 1, 3, 10, 9, 3, 5, 5, stride=(2, 2), padding=(1, 4), groups=3, bias=True),
    Case("walk_k7_stride2_no_padding", 1, 2, 12, 11, 2, 7, 7, stride=(2, 2), groups=2),
    Case("walk_k7_c70", 1, 70, 5, 8, 70, 7, 7, padding=(3, 3), groups=70, bias=True),
)

# The same by the copy engine: lanes without channels and tiles without columns, more rows than stages and fewer, strips
# with a rest, images of one row and of one column, rows and columns that meet nothing of the image.
BOXES = (
    Case("boxes_k5", 2, 24, 11, 20, 24, 5, 5, padding=(2, 2), groups=24, bias=True),
    Case("boxes_k5_no_padding", 3, 8, 6, 19, 8, 5, 5, padding=(0, 1), groups=8),
    Case("boxes_k5_one_row", 5, 16, 1, 9, 16, 5, 5, padding=(2, 2), groups=16, bias=True),
    Case("boxes_k7_c72", 1, 72, 9, 8, 72, 7, 7, padding=(3, 3), groups=72, bias=True),
    Case("boxes_k7_far_padding", 1, 8, 3, 4, 8, 7, 7, padding=(8, 9), groups=8, bias=True),
    Case("boxes_k7_one_column", 2, 8, 9, 1, 8, 7, 7, padding=(3, 3), groups=8),
)

BOXES_PLAN = Case("boxes_plan", 5, 64, 5, 14, 64, 7, 7, padding=(3, 3), groups=64)

# Walks of the one-pass grad_weight kernels: tiles of a row and chunks of channels with a rest, several stages of a
# plane, images one after the other and side by side in a warp, planes copied whole, rows that meet nothing.
SUMS = (
    Case("sums_two_tiles", 1, 40, 6, 60, 40, 3, 3, padding=(1, 1), groups=40),
    Case("sums_stages_stride2", 1, 8, 15, 121, 8, 5, 5, stride=(2, 2), padding=(2, 2), groups=8),
    Case("sums_fold_two", 5, 16, 7, 7, 16, 3, 3, padding=(1, 1), groups=16),
    Case("sums_fold_four", 7, 8, 5, 9, 8, 5, 5, padding=(2, 2), groups=8),
    Case("sums_whole_planes", 3, 104, 7, 7, 104, 3, 3, padding=(1, 1), groups=104),
    Case("sums_k7_images", 3, 24, 9, 8, 24, 7, 7, padding=(3, 3), groups=24),
    Case("sums_far_padding", 2, 8, 4, 6, 8, 3, 3, padding=(5, 4), groups=8),
    Case("sums_stride2_far_padding", 2, 8, 5, 6, 8, 5, 5, stride=(2, 2), padding=(5, 6), groups=8),
    Case("sums_multiplier3", 2, 3, 9, 16, 9, 5, 5, padding=(2, 2), groups=3),
)

# Kernels of 7x7 and more on tensor cores: images side by side, strips, several tiles of columns and of taps, and every
# number of steps along a window.
LARGE = (
    Case("large_k7_small_planes", 5, 2, 7, 7, 2, 7, 7, padding=(3, 3), groups=2, bias=True),
    Case("large_k7_tall", 2, 1, 70, 9, 1, 7, 7, padding=(3, 3)),
    Case("large_k9x13_multiplier", 1, 2, 19, 30, 4, 9, 13, padding=(4, 6), groups=2, bias=True),
    Case("large_k13_no_padding", 1, 1, 29, 69, 1, 13, 13),
    Case("large_k31", 1, 1, 20, 61, 1, 31, 31, padding=(15, 15), bias=True),
    Case("large_k35x50", 1, 1, 18, 40, 1, 35, 50, padding=(17, 25)),
)

# Channels_last on tensor cores: narrow images side by side, tiles of a row, one to four groups of channels a block, a
# slice of them with fewer, filters of every shape, rows between two images and rows without any.
DIAGONALS = (
    Case("diagonals_k7", 2, 24, 9, 10, 24, 7, 7, padding=(3, 3), groups=24, bias=True),
    Case("diagonals_k5_tiles", 1, 40, 6, 67, 40, 5, 5, padding=(2, 2), groups=40, bias=True),
    Case("diagonals_k7_small_planes", 5, 8, 7, 7, 8, 7, 7, padding=(3, 3), groups=8),
    Case("diagonals_k5_three_wide", 9, 32, 8, 3, 32, 5, 5, padding=(2, 2), groups=32, bias=True),
    Case("diagonals_k4x6", 2, 16, 11, 14, 16, 4, 6, padding=(1, 3), groups=16),
    Case("diagonals_k1x7", 2, 8, 3, 19, 8, 1, 7, padding=(0, 3), groups=8, bias=True),
    Case("diagonals_k7_no_padding", 3, 16, 12, 13, 16, 7, 7, groups=16),
    Case("diagonals_k5_far_padding", 2, 8, 3, 4, 8, 5, 5, padding=(7, 6), groups=8, bias=True),
    Case("diagonals_k6x2_one_pixel", 3, 8, 1, 1, 8, 6, 2, padding=(3, 1), groups=8),
    Case("diagonals_k5_c36", 2, 36, 5, 6, 36, 5, 5, padding=(2, 2), groups=36),  # grad_weight only
)

# Planes of odd and of aligned widths: runs of columns that end in a row's middle, several planes to a block, bands of
# one, and borders at every side.
PLANES = (
    Case("planes_k3_7", 2, 11, 7, 7, 11, 3, 3, padding=(1, 1), groups=11, bias=True),
    Case("planes_k3_19", 2, 5, 19, 19, 5, 3, 3, padding=(1, 1), groups=5, bias=True),
    Case("planes_k3_75", 1, 2, 23, 75, 2, 3, 3, padding=(1, 1), groups=2),
    Case("planes_k3_112", 1, 1, 9, 112, 1, 3, 3, padding=(1, 1), groups=1, bias=True),
    Case("planes_k3_wide_padding", 1, 3, 4, 9, 3, 3, 3, padding=(4, 3), groups=3),
    Case("planes_k5_14", 3, 6, 14, 14, 6, 5, 5, padding=(2, 2), groups=6, bias=True),
    Case("planes_k5_no_padding", 1, 3, 12, 37, 3, 5, 5, padding=(0, 1), groups=3),
    Case("planes_k7_28", 1, 2, 15, 28, 2, 7, 7, padding=(3, 3), groups=2, bias=True),
    Case("planes_k3_stride2_37", 2, 3, 37, 19, 3, 3, 3, stride=(2, 2), padding=(1, 1), groups=3, bias=True),
    Case("planes_k3_stride2_even", 1, 3, 12, 56, 3, 3, 3, stride=(2, 2), padding=(0, 0), groups=3),
    Case("planes_k5_stride2_14", 2, 5, 14, 14, 5, 5, 5, stride=(2, 2), padding=(2, 2), groups=5),
    Case("planes_k7_stride2_19", 1, 2, 19, 18, 2, 7, 7, stride=(2, 2), padding=(3, 3), groups=2),
    Case("planes_multiplier3", 2, 4, 7, 7, 12, 3, 3, padding=(1, 1), groups=4, bias=True),
    Case("planes_multiplier2_stride2", 1, 5, 14, 9, 10, 3, 3, stride=(2, 2), padding=(1, 1), groups=5),
)

# Small kernels on tensor cores: one image and several to a place, strips, rows that are no whole groups, copies of 8
# and of 4 bytes, more pieces a row than a warp has lanes, images that end within a window and beyond it, stores of 16,
# 8 and 4 bytes.
CORES = (
    Case("cores_k3_28", 5, 3, 19, 28, 3, 3, 3, padding=(1, 1), groups=3, bias=True),
    Case("cores_k5_14", 6, 2, 14, 14, 2, 5, 5, padding=(2, 2), groups=2, bias=True),
    Case("cores_k7_tall", 2, 1, 70, 20, 1, 7, 7, padding=(3, 3)),
    Case("cores_k5_wide", 1, 1, 41, 140, 1, 5, 5, padding=(2, 2), bias=True),
    Case("cores_k7_no_padding", 2, 2, 24, 22, 2, 7, 7, groups=2),
    Case("cores_k3_far_padding", 2, 2, 13, 16, 2, 3, 3, padding=(5, 2), groups=2, bias=True),
    Case("cores_k5_one_plane", 1, 3, 28, 28, 3, 5, 5, padding=(2, 2), groups=3),
    Case("cores_k5_multiplier2", 3, 2, 12, 20, 4, 5, 5, padding=(2, 2), groups=2),
)

# Large kernels in plain arithmetic: rows and columns of one, tiles of threads with and without a rest, planes side by
# side, 16-byte copies (both widths multiples of 4) and single words, outputs that meet no row of the image.
PLAIN = (
    Case("plain_k9", 2, 3, 13, 20, 3, 9, 9, padding=(4, 4), groups=3, bias=True),
    Case("plain_k5x11", 2, 5, 10, 15, 5, 5, 11, padding=(2, 5), groups=5),
    Case("plain_k1x31", 3, 3, 1, 50, 3, 1, 31, padding=(0, 30), groups=3, bias=True),
    Case("plain_k31x1", 1, 2, 20, 5, 2, 31, 1, padding=(15, 0), groups=2),
    Case("plain_k13_small_planes", 5, 3, 7, 7, 3, 13, 13, padding=(6, 6), groups=3),
    Case("plain_k4x5_multiplier2", 2, 3, 7, 9, 6, 4, 5, padding=(1, 3), groups=3, bias=True),
    Case("plain_k5x63", 1, 1, 6, 20, 1, 5, 63, padding=(2, 31)),
    Case("plain_k4_far_padding", 1, 2, 3, 4, 2, 4, 4, padding=(9, 10), groups=2),
    Case("plain_k3x7_wide", 1, 1, 5, 150, 1, 3, 7, padding=(0, 3)),
    Case("plain_k16_no_padding", 1, 1, 21, 16, 1, 16, 16, bias=True),
)
# Cuts that the plan leaves aside for these sizes.
PLAIN_CUTS = (
    ("plain_k9", "forward", {"keep": 7, "rows": 7, "planes": 2}),
    ("plain_k9", "forward", {"keep": 4, "rows": 8, "planes": 6}),
    ("plain_k9", "grad_input", {"keep": 1, "rows": 5, "planes": 3}),
    ("plain_k9", "grad_weight", {"keep": 7, "rows": 3, "planes": 2, "parts": 3}),
    ("plain_k9", "grad_weight", {"keep": 4, "rows": 5, "planes": 4, "parts": 2, "splits": 2}),
    ("plain_k1x31", "forward", {"keep": 1, "rows": 1, "planes": 2}),
    ("plain_k5x11", "grad_input", {"keep": 7, "rows": 14, "planes": 3}),
    ("plain_k5x11", "grad_weight", {"keep": 7, "rows": 2, "planes": 3, "parts": 4}),
)

# Depthwise stages, and how many channels the 1x1 convolution after them gives: one tile and several, full and not.
SEPARABLE = (
    ("depthwise_k3", 70),
    ("depthwise_k3_c58", 24),
    ("depthwise_k3_aligned", 64),
    ("depthwise_multiplier2", 130),
    ("depthwise_k5_stride2", 9),
    ("depthwise_k3_dilation_stride", 264),
    ("depthwise_k3_one_pixel", 8),
)

# Inverted residual blocks: the depthwise stage; channels of the input (0: nothing is expanded) and of the output, and
# whether the input is added. Chunks of 64 channels with a rest of 8 to 56; odd numbers of eight channels; tiles of rows
# and columns with a rest, images of one tile, of one pixel and of one column; padding beyond the kernel and none.
BLOCKS = (
    (Case("block_k3", 2, 72, 9, 17, 72, 3, 3, padding=(1, 1), groups=72, bias=True), 24, 24, 1),
    (Case("block_k3_c64", 1, 64, 16, 15, 64, 3, 3, padding=(1, 1), groups=64), 16, 32, 0),
    (Case("block_k3_two_chunks", 2, 128, 7, 7, 128, 3, 3, padding=(1, 1), groups=128, bias=True), 40, 136, 0),
    (Case("block_k3_wide", 1, 80, 14, 14, 80, 3, 3, padding=(1, 1), groups=80, bias=True), 96, 96, 1),
    (Case("block_k3_separable", 2, 24, 11, 18, 24, 3, 3, padding=(1, 1), groups=24, bias=True), 0, 16, 0),
    (Case("block_k3_stride2", 1, 88, 13, 22, 88, 3, 3, stride=(2, 2), padding=(1, 1), groups=88, bias=True), 8, 40, 0),
    (Case("block_k3_stride2_even", 2, 96, 8, 12, 96, 3, 3, stride=(2, 2), padding=(0, 2), groups=96), 32, 160, 0),
    (Case("block_k3_no_padding", 1, 16, 9, 8, 16, 3, 3, groups=16, bias=True), 72, 8, 0),
    (Case("block_k3_far_padding", 1, 24, 4, 3, 24, 3, 3, padding=(4, 5), groups=24, bias=True), 8, 24, 0),
    (Case("block_k3_one_pixel", 5, 40, 1, 1, 40, 3, 3, padding=(1, 1), groups=40, bias=True), 16, 16, 1),
    (Case("block_k5", 1, 56, 10, 19, 56, 5, 5, padding=(2, 2), groups=56, bias=True), 56, 56, 1),
    (
        Case("block_k5_stride2", 2, 104, 9, 14, 104, 5, 5, stride=(2, 2), padding=(2, 1), groups=104, bias=True),
        16,
        80,
        0,
    ),
    (Case("block_k5_one_column", 1, 32, 13, 1, 32, 5, 5, padding=(2, 2), groups=32), 8, 8, 1),
    (Case("block_k5_separable_stride2", 1, 72, 12, 13, 72, 5, 5, stride=(2, 2), padding=(2, 2), groups=72), 0, 24, 0),
)

# Column and row filters: tiles of rows, columns and channels with and without a rest, halos on every side.
SPATIAL = (
    Case("spatial_k3x5", 2, 3, 9, 20, 3, 3, 5, padding=(1, 2), groups=3),
    Case("spatial_k7x4_c37", 1, 37, 11, 20, 37, 7, 4, padding="same", groups=37),
    Case("spatial_k1x3_two_tiles", 1, 2, 8, 530, 2, 1, 3, groups=2),
    Case("spatial_k9x1_one_channel", 2, 1, 17, 7, 1, 9, 1, padding=(9, 3), groups=1),
    Case("spatial_k5x45_c32", 1, 32, 4, 12, 32, 5, 45, padding=(2, 22), groups=32),
)

# Causal sequences: whole vectors of channels and of positions, with a rest, and none; strips, phases of a dilation,
# more taps than have registers, states that reach beyond the sequence.
CAUSAL = (
    Case("causal_k4", 2, 24, 1, 40, 24, 1, 4, groups=24, bias=True),
    Case("causal_k4_c35", 2, 35, 1, 41, 35, 1, 4, groups=35),
    Case("causal_k3", 1, 16, 1, 24, 16, 1, 3, groups=16, bias=True),
    Case("causal_k2_c10", 3, 10, 1, 16, 10, 1, 2, groups=10),
    Case("causal_k4_one_position", 3, 8, 1, 1, 8, 1, 4, groups=8, bias=True),
    Case("causal_k4_c3", 2, 3, 1, 64, 3, 1, 4, groups=3, bias=True),
    Case("causal_k3_dilation2", 1, 16, 1, 33, 16, 1, 3, dilation=(1, 2), groups=16, bias=True),
    Case("causal_k4_dilation9", 1, 8, 1, 5, 8, 1, 4, dilation=(1, 9), groups=8),
    Case("causal_k1", 2, 8, 1, 8, 8, 1, 1, groups=8, bias=True),
    Case("causal_k7", 2, 9, 1, 21, 9, 1, 7, groups=9, bias=True),
)

# Tokens of causal sequences: one and several, more than a state holds, channels of two blocks, taps that are apart.
UPDATES = (
    Case("token", 4, 37, 1, 1, 37, 1, 4, groups=37, bias=True),
    Case("token_c130", 2, 130, 1, 1, 130, 1, 4, groups=130),
    Case("tokens_3", 4, 9, 1, 3, 9, 1, 3, groups=9, bias=True),
    Case("tokens_13", 4, 5, 1, 13, 5, 1, 4, groups=5),
    Case("tokens_3_dilation2", 4, 6, 1, 3, 6, 1, 3, dilation=(1, 2), groups=6, bias=True),
    Case("tokens_2_k1", 2, 3, 1, 2, 3, 1, 1, groups=3),
    Case("tokens_2_k9", 3, 4, 1, 2, 4, 1, 9, groups=4),
)

# Frames of a few numbers each, for every branch of borders.cu.
FRAMES = (
    Case("frame_depthwise", 2, 5, 7, 9, 5, 4, 2, stride=(2, 1), padding=(3, 1), groups=5, bias=True),
    Case("frame_grouped", 1, 4, 6, 5, 6, 3, 3, stride=(1, 3), padding=(2, 4), dilation=(2, 1), groups=2),
    Case("frame_twelve_images", 12, 1, 12, 12, 1, 3, 3, padding=(1, 1)),  # products for every warp of a block
)
# What only replicate allows: padding beyond the image.
REPLICATED = (
    Case("frame_one_pixel", 2, 6, 1, 1, 6, 3, 3, padding=(1, 1), groups=6, bias=True),
    Case("frame_far", 1, 3, 2, 3, 3, 3, 3, padding=(5, 4), groups=3),
)


# What planted faults in the PTX have shown to be needed: rows ahead of a walk of single channels, at stride 2; a stream
# of bfloat16 over several tiles; two slabs of channels at stride 2; a block of Toeplitz products with two images; more
# parts than the threads that add them take at once; the division of pixels by rows in sums over a cropped image; more
# than three taps a row and a bias beside whole vectors in the fused pair; Toeplitz rows beyond 64, and taps beyond 17.
PTX_RUNS = (
    *(
        Run(
            Case("walk_k3_stride2_three_rows", 1, 5, 23, 19, 5, 3, 3, stride=(2, 2), padding=(1, 1), groups=5),
            map, "float32", "channels_last", extra={"rows": 3, "vec": 1},
        )
        for map in ("forward", "grad_input")
    ),
    Run(
        Case("diagonals_k7_stream", 1, 8, 17, 37, 8, 7, 7, padding=(3, 3), groups=8),
        "forward", "bfloat16", "channels_last", extra={"multiprocessors": 1},
    ),
    Run(
        Case("groups_of_4_stride2_slabs", 1, 72, 9, 20, 72, 3, 3, stride=(2, 2), padding=(1, 1), groups=18, bias=True),
        "forward", "float16", "channels_last", extra={"multiprocessors": 1},
    ),
    Run(
        Case("large_k31_images", 2, 1, 9, 61, 1, 31, 31, padding=(15, 15)),
        "forward", "float16", "contiguous", extra={"splits": 1},
    ),
    *(
        Run(
            Case("sums_of_83_parts", 3, 1, 40, 9, 1, 1, 1),
            "grad_weight", dtype, "contiguous", extra={"kernel": "grouped", "splits": 83},
        )
        for dtype in ("float32", "float16")
    ),
    Run(Case("rows_of_nine", 2, 33, 9, 9, 8, 1, 1), "grad_weight", "float32", "cropped"),
    Run(
        Case("rows_of_eleven", 2, 33, 7, 11, 33, 1, 1),
        "grad_weight", "bfloat16", "cropped_last", extra={"kernel": "pointwise_mma"},
    ),
    Run(
        Case("pair_of_five_taps", 1, 32, 7, 9, 32, 5, 5, padding=(2, 2), groups=32),
        "forward", "float32", "channels_last", extra={"op": "separable", "outputs": 40},
    ),
    Run(
        Case("pair_of_two_biases", 1, 33, 6, 5, 33, 3, 3, padding=(1, 1), groups=33, bias=True),
        "forward", "float32", "contiguous", extra={"op": "separable", "outputs": 70, "pointwise_bias": 1},
    ),
    Run(
        Case("narrow_k7", 1, 1, 72, 8, 1, 7, 7, padding=(3, 3)),
        "forward", "float16", "contiguous",
        extra={"kernel": "depthwise_toeplitz", "vec": 1, "rows": 72, "images": 1},
    ),
    Run(
        Case("large_k23", 1, 1, 9, 61, 1, 23, 23, padding=(11, 11)),
        "forward", "bfloat16", "contiguous", extra={"kernel": "depthwise_toeplitz", "vec": 4},
    ),
)  # fmt: skip


def _runs() -> Iterator[Run]:
    cases = [case for case in CASES if case.N > 0]  # nothing is launched for an empty batch
    small = [case for case in SMALL if case.N > 0]
    count = 0

    def made(case: Case, map: str, layout: str, dtype: str | None = None, **extra: object) -> Run:
        nonlocal count
        count += 1  # dtypes and activations take turns
        activation = ACTIVATIONS[count % len(ACTIVATIONS)] if map == "forward" else "identity"
        return Run(case, map, dtype or DTYPES[count % 4], layout, activation, extra)

    # What the plan chooses.
    for case in cases:
        for map in MAPS:
            for layout in LAYOUTS:
                yield made(case, map, layout)
            count += 1
    for case in small:
        for map in MAPS:
            yield made(case, map, "strided")
            yield made(case, map, LAYOUTS[count % 2], offset=1)  # no tensor is aligned to a vector
    # Tensors that are not dense, and two layouts in one call: as they lie, or as the copies that a plan asks of torch.
    for name in ("depthwise_k3", "depthwise_k3_stride2", "depthwise_k5", "depthwise_k7_plane7"):
        for map in MAPS:
            for layout in ("cropped", "cropped_last", "sliced_last"):
                yield made(BY_NAME[name], map, layout)
            yield made(BY_NAME[name], map, LAYOUTS[count % 2], y_layout=LAYOUTS[1 - count % 2])
    for name in ("grouped_resnext", "pointwise_awkward"):
        for map in MAPS:
            yield made(BY_NAME[name], map, "contiguous", y_layout="cropped_last")
    # Every dtype of every family, in both layouts.
    for name in ("depthwise_k3", "depthwise_k5_stride2", "grouped_resnext", "pointwise_aligned", "dense_k3"):
        for map in MAPS:
            for dtype in DTYPES:
                for layout in LAYOUTS:
                    yield made(BY_NAME[name], map, layout, dtype)
    for case in EDGES:
        for map in MAPS:
            for layout in LAYOUTS:
                for dtype in ("float32", "float16"):
                    yield made(case, map, layout, dtype)
    for case in WALKS:
        for map in ("forward", "grad_input"):
            pair = {"vec": 2} if case.C % 2 == 0 else {}  # which the plan takes for larger problems
            for dtype in ("float32", "float16"):
                yield made(case, map, "channels_last", dtype, **pair)
            yield made(case, map, "channels_last", "bfloat16", **pair)
            yield made(case, map, "channels_last", DTYPES[1 + count % 2 * 2], rows=2, w_layout="channels_last")
    for case in BOXES:
        for map in ("forward", "grad_input"):
            for layout, pairs, rows, w_layout in (
                ("channels_last", 32, 4, "contiguous"),
                ("channels_last", 16, 20, "contiguous"),
                ("sliced_last", 16, 3, "channels_last"),
                ("sliced_last", 32, 2, "contiguous"),
            ):
                cut = {"pairs": pairs, "rows": rows, "w_layout": w_layout}
                yield made(case, map, layout, "float32", kernel="depthwise_nhwc_tma", **cut)
    for map in ("forward", "grad_input"):  # as the plan has it, for a GPU that this fills
        yield made(BOXES_PLAN, map, "channels_last", "float32", multiprocessors=1)
    for case in SUMS:
        for layout in LAYOUTS:
            for dtype in ("float32", "float16"):
                plain = {"sm": 70} if dtype == "float16" else {}  # else a matter for tensor cores
                yield made(case, "grad_weight", layout, dtype, **plain)
            yield made(case, "grad_weight", layout, "bfloat16" if case.R < 7 else "float32", padding="0,6,1,0", sm=70)
    for layout in LAYOUTS:
        for splits in (2, 5, 40):
            yield made(SUMS[0], "grad_weight", layout, "float16", splits=splits, w_layout="channels_last", sm=70)
    for case in LARGE:
        for map in MAPS if case.K == case.C else ("forward", "grad_weight"):
            for dtype in ("float16", "bfloat16"):
                yield made(case, map, "contiguous", dtype)
        yield made(case, "forward", "contiguous", "float16", offset=1, infinite=1)
        yield made(case, "grad_weight", "contiguous", "float16", splits=2)
    for case in LARGE[:2]:
        for map in ("forward", "grad_input"):
            yield made(case, map, "contiguous", "bfloat16", infinite=1)
    for case in DIAGONALS:
        for map in ("forward", "grad_input"):
            yield made(case, map, "channels_last", "float16", multiprocessors=1)  # streams of many places
            yield made(case, map, "channels_last", "bfloat16")
            yield made(case, map, "sliced_last", "float16", rows=2, splits=2, w_layout="channels_last")
        yield made(case, "forward", "channels_last", "float16", infinite=1, multiprocessors=1)
        yield made(case, "grad_weight", "channels_last", "bfloat16")
        yield made(case, "grad_weight", "channels_last", "float16", rows=1, splits=3)
        yield made(case, "grad_weight", "sliced_last", "float16", splits=1, w_layout="channels_last")
        yield made(case, "grad_weight", "channels_last", "float16", rows=1, splits=2, padding="0,6,1,3")
    for case in CORES:
        for map in MAPS if case.K == case.C else ("forward", "grad_weight"):
            for dtype in ("float16", "bfloat16"):
                yield made(case, map, "contiguous", dtype, multiprocessors=1)
                if map != "grad_weight":
                    yield made(case, map, "contiguous", dtype, infinite=1)
            yield made(case, map, "alternate", "float16", offset=2, w_layout="strided")
    for map in ("forward", "grad_input"):  # several strips, places and parts
        for rows, images, splits, vec in ((8, 1, 2, 4), (16, 1, 3, 2), (70, 2, 1, 8)):
            cut = {"kernel": "depthwise_nchw_mma", "rows": rows, "images": images, "splits": splits, "vec": vec}
            yield made(CORES[2], map, "contiguous", "float16", **cut, infinite=1)
        yield made(CORES[3], map, "contiguous", "float16", rows=8, splits=2)
        for columns in (8, 10):  # so few pixels that what three of them spoil is everywhere
            narrow = Case(f"cores_k3_{columns}_columns", 1, 1, 4, columns, 1, 3, 3, padding=(1, 1))
            cut = {"kernel": "depthwise_nchw_mma", "rows": 4, "vec": 8 if columns == 8 else 4}
            yield made(narrow, map, "contiguous", "float16", **cut, infinite=1)
    for index, rows, images, splits in ((0, 19, 2, 3), (1, 14, 5, 1), (2, 16, 1, 4), (3, 8, 1, 6)):
        cut = {"kernel": "depthwise_nchw_mma", "rows": rows, "images": images, "splits": splits, "vec": 8}
        yield made(CORES[index], "grad_weight", "contiguous", "float16", **cut)
    for case in PRODUCTS:
        for map in ("forward", "grad_input") if case.stride == (1, 1) else ("forward",):
            yield made(case, map, "channels_last", "float16")
            yield made(case, map, "channels_last", "bfloat16", outputs=64, blocks=2, w_layout="channels_last")
            yield made(case, map, "sliced_last", "float16", outputs=96, blocks=1)
            yield made(case, map, "channels_last", "float16", outputs=128, blocks=2)
            yield made(case, map, "channels_last", "float16", kernel="pointwise_mma")
        yield made(case, "grad_weight", "channels_last", "float16")
        yield made(case, "grad_weight", "channels_last", "bfloat16", splits=2)
        yield made(case, "grad_weight", "sliced_last", "float16", splits=5, w_layout="strided")
        yield made(case, "grad_weight", "channels_last", "float16", kernel="pointwise_mma", splits=2)
    for activation in ("gelu", "silu", "sigmoid", "tanh"):  # over 64 sums of a thread
        yield Run(PRODUCTS[0], "forward", "bfloat16", "channels_last", activation, {"outputs": 128, "blocks": 2})
    for i, case in enumerate(PRODUCTS):  # with what is added before the activation
        for layout, dtype, outputs in (("channels_last", "float16", 128), ("sliced_last", "bfloat16", 96)):
            cut = {"residual": 1, "outputs": outputs, "blocks": 2}
            yield Run(case, "forward", dtype, layout, ("identity", "relu", "silu")[i % 3], cut)
    for case in GROUPS:
        for map in ("forward", "grad_input"):
            yield made(case, map, "channels_last", "float16", infinite=1)
            yield made(case, map, "channels_last", "bfloat16", multiprocessors=1)  # a ring that goes over several items
            cut = {"tiles": 1, "strips": 2 if case.H > 1 else 1, "blocks": 2}  # no strip without rows
            yield made(case, map, "sliced_last", "float16", w_layout="channels_last", **cut)
        yield made(case, "grad_weight", "channels_last", "float16")
        yield made(case, "grad_weight", "channels_last", "bfloat16", splits=1, w_layout="channels_last")
        yield made(case, "grad_weight", "sliced_last", "float16", splits=3)
    for case in PLANES:
        for map in ("forward", "grad_input") if case.K == case.C else ("forward",):
            # The GPU that is planned for: so small that tiles are large, without tensor cores, or an H100.
            for layout, dtype, extra in (
                ("contiguous", "float16", {"multiprocessors": 1, "sm": 75}),
                ("contiguous", "float32", {"multiprocessors": 1}),
                ("contiguous", "float32", {}),
                ("contiguous", "bfloat16", {"multiprocessors": 1, "sm": 75, "offset": 3}),
                ("alternate", "float16", {"rows": 5, "planes": 1, "strips": 2, "sm": 75}),
                ("sliced", "float32", {"multiprocessors": 1, "offset": 1}),
            ):
                yield made(case, map, layout, dtype, **extra)
    # Channels too few for a group of them to be full, and rows too wide for shared memory.
    yield made(BY_NAME["depthwise_k3_c58"], "forward", "contiguous", "float32", multiprocessors=8)
    yield made(Case("planes_wide", 1, 1, 2, 9000, 1, 3, 3, padding=(1, 1)), "forward", "contiguous", "float32")
    for case in PLAIN:
        for map in MAPS if case.K == case.C else ("forward", "grad_weight"):
            for layout in LAYOUTS:
                yield made(case, map, layout, "float32")
        yield made(case, MAPS[count % 3] if case.K == case.C else "forward", "channels_last", DTYPES[1 + count % 3])
    for case in PLAIN[:2]:
        for map in MAPS:
            yield made(case, map, "strided", w_layout="channels_last")
            yield made(case, map, "contiguous", "float32", offset=1)
            yield made(case, map, "contiguous", "float64")
            yield made(case, map, "channels_last", "float16")
    for layout in LAYOUTS:  # more than eight taps a row, which is what the general kernel takes at once
        for stride in ("2,1", "1,2"):
            yield made(PLAIN[0], "grad_weight", layout, "float32", stride=stride)
    for name, map, extra in PLAIN_CUTS:
        case = next(case for case in PLAIN if case.name == name)
        for layout in LAYOUTS:
            yield made(case, map, layout, "float32", **extra)
    for name, outputs in SEPARABLE:
        for layout in (*LAYOUTS, "strided"):
            for dtype in ("float32", "float16") if layout in LAYOUTS else (DTYPES[count % 4],):
                second = {"pointwise_bias": outputs % 2, "pointwise_activation": ACTIVATIONS[count % 7]}
                yield made(BY_NAME[name], "forward", layout, dtype, op="separable", outputs=outputs, **second)
        yield made(BY_NAME[name], "forward", "channels_last", op="separable", outputs=outputs, offset=1)
    for dtype in DTYPES:
        for layout in LAYOUTS:
            yield made(EDGES[-1], "forward", layout, dtype, op="separable", outputs=70)
    for dtype, vec in (("float32", 4), ("float16", 8)):  # a long activation over many values of a thread
        extra = {"kernel": "depthwise_direct", "vec": vec, "activation": "gelu"}
        yield made(BY_NAME["depthwise_k3"], "forward", "channels_last", dtype, **extra)
    for name in ("depthwise_k5", "grouped_channels3_outputs5"):
        yield made(BY_NAME[name], "grad_weight", LAYOUTS[count % 2], "float32", splits=37)
    # Kernels that the plan leaves aside for these shapes, and tiles that it takes for larger ones.
    for case in small:
        if case.family == "depthwise":
            for map in ("forward", "grad_input"):
                yield made(case, map, LAYOUTS[count % 2], kernel="depthwise_direct")
                yield made(case, map, LAYOUTS[count % 2], kernel="depthwise_direct", wide=1)
                yield made(case, map, LAYOUTS[count % 2], kernel="grouped")
            yield made(case, "grad_weight", LAYOUTS[count % 2], kernel="grouped", splits=2)
        if case.family == "pointwise":
            for map in MAPS:
                yield made(case, map, LAYOUTS[count % 2], DTYPES[1 + count % 2 * 2], sm=70)
                yield made(case, map, LAYOUTS[count % 2], kernel="grouped")
        yield made(case, "grad_weight", LAYOUTS[count % 2], splits=3)
    for name in ("depthwise_k3_tall", "depthwise_k3_stride2", "depthwise_k5", "depthwise_k7", "depthwise_k7_stride2"):
        for map in ("forward", "grad_input"):
            cut = {"rows": 3, "planes": 1, "strips": 2, "images": 1, "splits": 2}
            yield made(BY_NAME[name], map, "contiguous", DTYPES[count % 2], **cut)
            for dtype in ("float32", "float16"):
                yield made(BY_NAME[name], map, "channels_last", dtype, rows=3, vec=2)
    for case in SPATIAL:
        for layout in (*LAYOUTS, "strided"):
            for dtype in ("float32", "float16", DTYPES[2 + count % 2]):
                made(case, "forward", layout)  # takes a turn
                extra = {"kernel": "spatial_separable", "op": "spatial_separable", "shared": count % 4}
                yield Run(case, "forward", dtype, layout, extra=extra | ({"offset": 1} if count % 3 == 0 else {}))
    for case, inputs, outputs, residual in BLOCKS:
        block = {"op": "inverted_residual", "inputs": inputs, "outputs": outputs, "residual": residual}
        for layout, extra in (
            ("channels_last", {"multiprocessors": 1}),
            ("sliced_last", {"y_layout": "channels_last"}),
            ("channels_last", {"rows": 3, "columns": 5}),
        ):
            for dtype in ("float16", "bfloat16"):
                own = {
                    "expand_activation": ACTIVATIONS[(count + 4) % 9],
                    "pointwise_activation": ACTIVATIONS[count % 7],
                }
                yield made(case, "forward", layout, dtype, **block, **own, **extra)
        for expand in ("relu", "leaky_relu"):  # what is infinite spoils no channel that the activation bounds
            bounded = {"infinite": 1, "activation": "relu6", "expand_activation": expand}
            yield made(case, "forward", "channels_last", "float16", **block, **bounded)
        if inputs == 0:  # each channel of the last pixel, which nobody's product has bounded
            for dtype in ("float16", "bfloat16"):
                yield made(case, "forward", "channels_last", dtype, **block, infinite=2, activation="relu6")
        if outputs <= 64:  # the other kernels that are compiled
            tile = {"most_pixels": 64, "most_outputs": 160, "rows": 4, "columns": 7}
            yield made(case, "forward", "channels_last", "float16", **block, **tile)
        if 32 < outputs <= 96:
            tile = {"most_pixels": 128, "most_outputs": 96, "rows": 8, "columns": 6}
            yield made(case, "forward", "channels_last", "float16", **block, **tile)
    for case in CAUSAL:
        reach = case.dilation[1] * (case.S - 1)
        for packed in (0, 4):
            causal: dict[str, object] = {"op": "causal", "padding": f"0,0,{reach},0", "packed": packed}
            for layout, extra in (
                ("channels_last", {}),
                ("sliced_last", {"y_layout": "channels_last", "state_layout": "contiguous", "rows": 5}),
                ("contiguous", {"multiprocessors": 1}),
                ("sliced", {"y_layout": "contiguous", "state_layout": "strided", "w_layout": "strided"}),
                ("channels_last", {"rows": 1, "w_layout": "strided"}),
                ("strided", {"offset": 1}),
            ):
                for dtype in DTYPES[count % 2 :: 2]:
                    states = {"states": int(packed == 0 or count % 3 == 0), "wide": count // 2 % 2}
                    yield made(case, "forward", layout, dtype, **causal, **states, **extra)
            if packed:
                long = causal | {"packed": 24}
                yield made(case, "forward", "contiguous", ("float32", "bfloat16")[count % 2], **long, states=count % 2)
            yield made(case, "forward", "channels_last", "float16", **causal, states=1, infinite=1)
            yield made(case, "forward", "contiguous", "float16", **causal, states=1, infinite=1)
    for case in UPDATES:
        reach = case.dilation[1] * (case.S - 1)
        for length, ring, rows in ((reach, 0, 0), (reach, 1, 1), (reach + 1, 0, 1), (reach + 5, 1, 0), (12, 0, 0)):
            if ring and length == 0:
                continue
            update = {
                "op": "causal_update", "kernel": "causal_update", "padding": f"0,0,{reach},0", "y_layout": "contiguous",
                "length": length, "ring": ring, "rows": rows, "wide": count // 2 % 2,
            }  # fmt: skip
            yield made(case, "forward", "sliced_last", DTYPES[count % 2], **update, w_layout="strided")
            yield made(case, "forward", "contiguous", DTYPES[1 + count % 3], **update, state_layout="channels_last")
            yield made(case, "forward", "strided", ("float16", "bfloat16")[count % 2], **update, float_weight=1)
    # What is not zeros in the padding: frames of every kind of plan, and images that are all frame.
    bordered = [
        BY_NAME[name]
        for name in (
            "depthwise_k3", "depthwise_k3_one_channel", "depthwise_k3_dilation_stride", "depthwise_multiplier2",
            "depthwise_k4x3_same", "depthwise_k5_stride2", "grouped_channels3_outputs5", "dense_k3_stride2",
        )
    ]  # fmt: skip
    pairs = [(case, mode) for case in (*bordered, *FRAMES) for mode in ("reflect", "replicate", "circular")]
    pairs += [(case, "replicate") for case in REPLICATED]
    for case, mode in pairs:
        for map in MAPS:
            dtype = DTYPES[count % 4] if map != "grad_weight" else ("float32", "float64")[count % 2]
            for layout in LAYOUTS if case in FRAMES else LAYOUTS[count % 2 :][:1]:
                yield made(case, map, layout, dtype, padding_mode=mode)
                if case in FRAMES:  # (top, bottom, left, right): another frame at every side
                    yield made(case, map, layout, dtype, padding_mode=mode, padding="1,3,0,2")
        count += 1
    yield from PTX_RUNS


RUNS = list(_runs())


def _names() -> list[str]:
    if emulate.why_not() is not None:
        return [f"run{i}" for i in range(len(RUNS))]
    names: dict[str, int] = {}
    result = []
    try:
        kernels = emulate.planned_kernels([run.arguments() for run in RUNS])
    except emulate.CompileError:  # the tests will say so; collecting them must not fail
        kernels = ["unknown"] * len(RUNS)
    for run, planned in zip(RUNS, kernels, strict=True):
        kernel = str(run.extra.get("kernel", planned.removeprefix("cuda_")))
        extra = [f"{key}{value}" for key, value in run.extra.items() if key != "kernel"]
        name = "-".join([kernel, run.map, run.case.name, run.dtype, run.layout, *extra])
        names[name] = names.get(name, 0) + 1
        result.append(name if names[name] == 1 else f"{name}-{names[name]}")
    return result


NAMES = _names()


@dataclass
class Outcome:
    fault: str | None
    launches: set[tuple[str, tuple[str, ...]]]


class Suite:
    """Compiles once, then works through the selected runs on all cores, ahead of the tests that ask for them."""

    def __init__(self, progress) -> None:
        self.runners = emulate.runners(progress=progress)
        self._pool = ThreadPoolExecutor(emulate.JOBS)
        self._outcomes: dict[int, Future[Outcome]] = {}

    def start(self, index: int) -> Future[Outcome]:
        if index not in self._outcomes:
            self._outcomes[index] = self._pool.submit(self._execute, RUNS[index])
        return self._outcomes[index]

    def _execute(self, run: Run) -> Outcome:
        launches: set[tuple[str, tuple[str, ...]]] = set()
        for build, seeds in (("asan", SEEDS), ("race", RACE_SEEDS)):
            arguments = [*run.arguments(), f"seeds=0:{seeds}"]
            done = emulate.run(self.runners[build], arguments, timeout=120 + 30 * seeds)
            if done.returncode != 0:
                seed = (re.findall(r"^case \d+ seed (\d+)$", done.stdout, re.MULTILINE) or ["0"])[-1]
                again = [*run.arguments(), f"seeds={seed}:{int(seed) + 1}"]
                if "elements are wrong" in done.stdout and build == "asan":  # the race build knows who wrote what
                    traced = emulate.run(self.runners["race"], again, timeout=150).stdout
                    told = re.findall(r"^(?:FAULT|  block ).*", traced, re.MULTILINE)
                    done.stdout += "".join(f"race build: {line}\n" for line in told)
                text = re.sub(r"^case \d+ seed \d+\n", "", done.stdout, flags=re.MULTILINE)
                lines = text.splitlines()
                shown = "\n".join(lines if len(lines) <= 60 else [*lines[:40], "...", *lines[-20:]])
                return Outcome(f"{shown}\nrepeat with: {emulate.command(build, again)}", launches)
            launches |= emulate.launched(self.runners[build], done.stdout)
        return Outcome(None, launches)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


@pytest.fixture(scope="module")
def suite(request: pytest.FixtureRequest) -> Iterator[Suite]:
    capture = request.config.pluginmanager.getplugin("capturemanager")

    def progress(text: str) -> None:
        with capture.global_and_fixture_disabled():
            print(f"\r\x1b[Kcompiling for the emulator: {text}", end="", flush=True)

    made = Suite(progress if sys.stdout.isatty() else lambda text: None)
    for item in request.session.items:
        if item.path == request.path and "index" in getattr(getattr(item, "callspec", None), "params", {}):
            made.start(item.callspec.params["index"])
    yield made
    made.close()


@pytest.mark.parametrize("index", range(len(RUNS)), ids=NAMES)
def test_kernel(suite: Suite, index: int) -> None:
    outcome = suite.start(index).result()
    if outcome.fault:
        pytest.fail(f"{NAMES[index]}\n{outcome.fault}", pytrace=False)


def test_every_door_and_kernel_is_run(suite: Suite) -> None:
    """The list of what exists is read from launch.h and the .cu files: what is added there and not run fails here."""
    launches = set().union(*(suite.start(i).result().launches for i in range(len(RUNS))))
    passed = {door for _, doors in launches for door in doors}
    missing_doors = [door for door in emulate.doors() if door not in passed]
    assert not missing_doors, f"declared in csrc/cuda/launch.h and never run by tests/test_emulated.py: {missing_doors}"
    ran = {(emulate.door_source(doors[0]), emulate.plain_name(kernel)) for kernel, doors in launches if doors}
    missing_kernels = [f"{source.name}: {name}" for source, name in emulate.kernels() if (source, name) not in ran]
    assert not missing_kernels, f"__global__ functions that no test runs: {missing_kernels}"
