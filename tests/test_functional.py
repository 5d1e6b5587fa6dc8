"""The three maps against the float64 oracles: every case x dtype x layout x device, with proof that our kernels ran."""

from __future__ import annotations

import functools
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import sepconv_ext
from cases import BY_NAME, CASES, FAMILIES, GPU_LAYERS, Case
from harness import (
    ACTIVATIONS,
    DTYPES,
    LAYOUTS,
    assert_as_accurate,
    dtype_name,
    grad_like_output,
    half_kernels,
    only_our_kernels,
    random,
    strictness,
    tensors,
    untouched_memory,
)
from sepconv_ext import functional, reference

ops = torch.ops.sepconv_ext
MAPS = ("forward", "grad_input", "grad_weight")

by_layout = pytest.mark.parametrize("layout", LAYOUTS)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)


class Results(NamedTuple):
    forward: Tensor
    grad_input: Tensor
    grad_weight: Tensor


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """Fresh memory is full of NaN, so that an output element that a kernel forgets is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@functools.lru_cache(maxsize=16)
def expected(case: Case, dtype: torch.dtype) -> Results:
    """The float64 results on the values that `dtype` holds."""
    x, w, b = tensors(case, dtype, "cpu")
    g = grad_like_output(case, dtype, "cpu")
    return Results(
        reference.forward(x, w, b, *case.geometry),
        reference.grad_input(g, w, case.input_size, *case.geometry),
        reference.grad_weight(g, x, case.weight_size, *case.geometry),
    )


@functools.lru_cache(maxsize=16)
def peer(case: Case, dtype: torch.dtype, device: str, layout: str) -> Results:
    """torch's own results on the same inputs."""
    x, w, b = tensors(case, dtype, device, layout, requires_grad=True)
    g = grad_like_output(case, dtype, device, layout)
    if dtype in (torch.bfloat16, torch.float16) and case.S > 9:
        # oneDNN (torch 2.14) takes minutes for such a depthwise call, of float16 on processors with AVX512-FP16: take
        # float32, rounded once.
        y = F.conv2d(x.float(), w.float(), None if b is None else b.float(), *case.geometry).to(dtype)
    else:
        y = F.conv2d(x, w, b, *case.geometry)
    return Results(y.detach(), *torch.autograd.grad(y, (x, w), g))


def run_map(which: str, case: Case, dtype: torch.dtype, device: str, layout: str) -> Tensor:
    x, w, b = tensors(case, dtype, device, layout)
    if which == "forward":
        return ops.conv2d(x, w, b, *case.op_geometry, "identity")
    g = grad_like_output(case, dtype, device, layout)
    if which == "grad_input":
        return ops.conv2d_grad_input(g, w, x.shape, x.stride(), *case.op_geometry)
    return ops.conv2d_grad_weight(g, x, w.shape, w.stride(), *case.op_geometry)


@pytest.mark.parametrize("which", MAPS)
@by_layout
@by_dtype
@pytest.mark.parametrize("case", CASES, ids=str)
def test_maps(which: str, case: Case, dtype: torch.dtype, layout: str, device: str) -> None:
    with only_our_kernels(at_least=0 if case.N == 0 else 1):
        actual = run_map(which, case, dtype, device, layout)
    assert_as_accurate(
        actual.cpu(),
        getattr(peer(case, dtype, device, layout), which).cpu(),
        getattr(expected(case, dtype), which),
        f"{which} of {case}",
    )


@pytest.mark.cuda
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=dtype_name)
@pytest.mark.parametrize("case", GPU_LAYERS, ids=str)
def test_layers_that_fill_a_gpu(case: Case, dtype: torch.dtype, layout: str, device: str = "cuda") -> None:
    """The tiles of large problems, against float64 on the same GPU."""
    with only_our_kernels(at_least=len(MAPS)):
        actual = Results(*(run_map(which, case, dtype, device, layout) for which in MAPS))
    x, w, b = (None if t is None else t.double() for t in tensors(case, dtype, device))
    x.requires_grad_(), w.requires_grad_()
    y = F.conv2d(x, w, b, *case.geometry)
    exact = Results(y.detach(), *torch.autograd.grad(y, (x, w), grad_like_output(case, dtype, device).double()))
    tolerance = 1e-4 if dtype == torch.float32 else 2e-3
    for which in MAPS:
        got, want = getattr(actual, which).double(), getattr(exact, which)
        atol = tolerance * want.abs().max().item()
        torch.testing.assert_close(got, want, rtol=0, atol=atol, msg=lambda m, which=which: f"{which} of {case}: {m}")


@pytest.mark.parametrize(
    "case",
    [
        Case("from_memory_k3", 2, 128, 73, 75, 128, 3, 3, padding=(1, 1), groups=128),
        Case("from_memory_k3_no_whole_lines", 2, 145, 73, 75, 145, 3, 3, padding=(1, 1), groups=145),
        Case("from_memory_k5_stride2", 2, 152, 102, 75, 152, 5, 5, stride=(2, 2), padding=(2, 2), groups=152),
    ],
    ids=str,
)
def test_cpu_grad_weight_of_more_than_the_caches_hold(case: Case) -> None:
    """From 10 MB on the channels_last kernels take other loops, and fetch ahead."""
    x, _, _ = tensors(case, torch.float32, "cpu", "channels_last")
    assert x.nbytes + torch.Size(case.output_size).numel() * 4 > 10 << 20
    with only_our_kernels():
        actual = run_map("grad_weight", case, torch.float32, "cpu", "channels_last")
    theirs, truth = peer(case, torch.float32, "cpu", "channels_last"), expected(case, torch.float32)
    assert_as_accurate(actual, theirs.grad_weight, truth.grad_weight, f"grad_weight of {case}")


@pytest.mark.parametrize("long_runs", [True, False])
@pytest.mark.parametrize("taps", [3, 5, 7])
def test_cpu_grad_weight_with_a_stride_by_runs_and_by_tiles(taps: int, long_runs: bool, isa: str) -> None:
    """Rows of an image as long runs, or as tiles, whichever the processor at hand likes."""
    case = _depthwise(f"k{taps}_s2", 3, 58, 19, 30, taps, stride=(2, 2), padding=(taps // 2, taps // 2))
    before = sepconv_ext._C.set_likes_long_runs(long_runs)
    try:
        with only_our_kernels():
            actual = run_map("grad_weight", case, torch.float32, "cpu", "channels_last")
    finally:
        sepconv_ext._C.set_likes_long_runs(before)
    theirs, truth = peer(case, torch.float32, "cpu", "channels_last"), expected(case, torch.float32)
    assert_as_accurate(actual, theirs.grad_weight, truth.grad_weight, f"{case} with {isa}")


def test_cpu_grad_weight_adds_short_sums() -> None:
    """Thousands of positive products, one after the other, would cost 7 eps and more, growing with the batch."""
    case = Case("long_sums", 8, 1024, 28, 28, 1024, 5, 5, padding=(2, 2), groups=1024)
    x = tensors(case, torch.float32, "cpu", "channels_last")[0].abs_()
    g = grad_like_output(case, torch.float32, "cpu", "channels_last").abs_()
    with only_our_kernels():
        actual = ops.conv2d_grad_weight(g, x, case.weight_size, (25, 25, 5, 1), *case.op_geometry)
    truth = reference.grad_weight(g, x, case.weight_size, *case.geometry)
    assert (actual - truth).abs().max() <= 4 * torch.finfo(torch.float32).eps * truth.max()


@by_layout
@by_dtype
@pytest.mark.parametrize("case", CASES, ids=str)
def test_maps_on_every_instruction_set(case: Case, dtype: torch.dtype, layout: str, isa: str) -> None:
    assert sepconv_ext._C.build_info()["cpu_isa"] == isa
    theirs, truth = peer(case, dtype, "cpu", layout), expected(case, dtype)
    for which in MAPS:
        with only_our_kernels(at_least=0 if case.N == 0 else 1):
            actual = run_map(which, case, dtype, "cpu", layout)
        assert_as_accurate(actual, getattr(theirs, which), getattr(truth, which), f"{which} of {case} with {isa}")


def _depthwise(name: str, N: int, C: int, H: int, W: int, kernel: int | tuple[int, int], **rest) -> Case:
    R, S = reference.pair(kernel)
    return Case(name, N, C, H, W, C, R, S, groups=C, **rest)


# For the CPU's kernels in blocks of channels, and how many of the three maps take them: whole blocks and rests of
# channels and of pixels, planes of fewer pixels than a vector has lanes, each stride and padding, strips, parts of the
# images.
BLOCKED = {
    _depthwise("k3", 2, 64, 7, 7, 3, padding=(1, 1), bias=True): 3,
    _depthwise("k3_rest", 5, 24, 10, 9, 3, padding=(1, 1), bias=True): 3,
    _depthwise("k3_c31_stride1x2", 2, 31, 10, 11, 3, stride=(1, 2), padding=(1, 1)): 3,
    _depthwise("k3_stride2x1", 2, 48, 13, 14, 3, stride=(2, 1), padding=(0, 1), bias=True): 3,
    _depthwise("k3_rows_unread", 1, 32, 16, 18, 3, stride=(2, 2)): 3,
    _depthwise("k3_few_pixels", 3, 45, 3, 2, 3, padding=(1, 1)): 3,
    _depthwise("k3_wide_padding", 2, 32, 5, 6, 3, padding=(4, 3), bias=True): 3,
    _depthwise("k2_stride2", 2, 16, 9, 8, 2, stride=(2, 2)): 2,
    _depthwise("k1_stride2", 2, 16, 9, 8, 1, stride=(2, 2)): 2,
    _depthwise("k5_stride2", 1, 47, 15, 16, 5, stride=(2, 2), padding=(1, 2)): 3,
    _depthwise("k7", 2, 32, 14, 13, 7, padding=(3, 3), bias=True): 3,
    _depthwise("k7_one_row", 2, 16, 1, 40, (1, 7), padding=(0, 3)): 3,
    _depthwise("k4_one_row", 3, 32, 1, 50, (1, 4), padding=(0, 3), bias=True): 3,
    _depthwise("k4x3_same", 2, 16, 9, 8, (4, 3), padding="same"): 2,
    _depthwise("k3_dilation", 2, 16, 14, 13, 3, padding=(2, 2), dilation=(2, 2), bias=True): 2,
    _depthwise("k3_huge_dilation", 1, 16, 1, 7, (1, 3), padding=(0, 1 << 20), dilation=(1, 1 << 20)): 0,
    _depthwise("k9", 1, 16, 12, 13, 9, padding=(4, 4)): 2,
    _depthwise("strips", 2, 64, 79, 80, 3, padding=(1, 1)): 1,
    _depthwise("strips_below_the_image", 1, 64, 20, 60, 3, padding=(43, 1)): 1,
    _depthwise("strips_shared", 1, 16, 75, 75, 5, padding=(2, 2)): 1,
    _depthwise("k4_long_row", 2, 64, 1, 250, (1, 4), padding=(0, 3)): 3,
    _depthwise("k8x1_few_pixels", 2, 45, 11, 1, (8, 1)): 2,
    _depthwise("strips_stride2", 3, 16, 91, 90, 5, stride=(2, 2), padding=(2, 2)): 1,
}
# Likewise, of few channels, for the kernels for 3x3 on small planes.
SMALL_PLANES = {
    _depthwise("small_k3", 3, 8, 21, 22, 3, padding=(1, 1), bias=True): 2,
    _depthwise("small_k3_no_padding", 2, 3, 16, 33, 3, padding=(0, 2)): 2,
    _depthwise("small_k3_stride2", 2, 10, 30, 29, 3, stride=(2, 2), padding=(1, 1), bias=True): 1,
    _depthwise("small_k3_stride2_rows_unread", 2, 5, 16, 33, 3, stride=(2, 2)): 1,
    _depthwise("small_k3_few_rows", 2, 8, 3, 17, 3, padding=(1, 1)): 2,
}


# Computed as smaller calls, of what overlaps (overlap.h): their kernels are those of that size.
REACH_FAR = {"k3_huge_dilation", "strips_below_the_image"}


@pytest.mark.parametrize("dense", [True, False], ids=["dense", "apart"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize("case", [*BLOCKED, *SMALL_PLANES], ids=str)
def test_kernels_on_contiguous_planes(case: Case, dtype: torch.dtype, dense: bool, isa: str) -> None:
    """Also with planes that do not follow each other in memory, and a weight whose columns do."""
    theirs, truth = peer(case, dtype, "cpu", "contiguous"), expected(case, dtype)
    x, w, b = tensors(case, dtype, "cpu", "contiguous")
    g = grad_like_output(case, dtype, "cpu", "contiguous")
    like_x = (x.shape, x.stride())
    if not dense:
        x, g = (torch.stack([t, torch.full_like(t, float("nan"))], dim=2)[:, :, 0] for t in (x, g))
        w = w.mT.contiguous().mT
    with only_our_kernels():
        actual = Results(
            ops.conv2d(x, w, b, *case.op_geometry, "identity"),
            ops.conv2d_grad_input(g, w, *like_x, *case.op_geometry),
            ops.conv2d_grad_weight(g, x, w.shape, w.stride(), *case.op_geometry),
        )
        counts = sepconv_ext.kernel_counts()
    if case.name not in REACH_FAR:
        assert counts.get("cpu_depthwise_nchw_blocked", 0) == BLOCKED.get(case, 0)
        assert counts.get("cpu_depthwise_nchw_3x3", 0) == SMALL_PLANES.get(case, 0)
    assert actual.grad_weight.stride() == w.stride()
    for which in MAPS:
        what = f"{which} of {case} with {isa}"
        assert_as_accurate(getattr(actual, which), getattr(theirs, which), getattr(truth, which), what)


# Taps that lie apart are neighbours among the columns, and rows, of a phase: more phases than columns, phases that
# meet no input, strides that share a factor with the dilation or have none, padding wider than it, channels for whole
# and for partial vectors, a row cut into parts.
DILATED = (
    _depthwise("k3_d12", 1, 40, 25, 26, 3, padding=(12, 12), dilation=(12, 12), bias=True),
    _depthwise("k3_d5_few_columns", 2, 16, 4, 3, 3, padding=(5, 5), dilation=(5, 5)),
    _depthwise("k3_d4_stride2", 2, 24, 15, 18, 3, stride=(2, 2), padding=(4, 4), dilation=(4, 4), bias=True),
    _depthwise("k3_d2_stride3", 1, 33, 14, 17, 3, stride=(3, 3), padding=(2, 1), dilation=(2, 2)),
    _depthwise("k5_d6x4_stride4x6", 1, 64, 31, 29, 5, stride=(4, 6), padding=(9, 11), dilation=(6, 4)),
    _depthwise("k7_d3", 1, 58, 20, 22, 7, padding=(9, 9), dilation=(3, 3), bias=True),
    _depthwise("k9_d2_no_padding", 1, 16, 19, 24, 9, dilation=(2, 2)),
    _depthwise("k4_d3_same", 2, 32, 7, 19, 4, padding="same", dilation=(3, 3)),
    _depthwise("k3_d7_partial_vectors", 2, 3, 17, 16, 3, padding=(7, 7), dilation=(7, 7), bias=True),
    _depthwise("row_k3_d16", 1, 512, 1, 300, (1, 3), padding=(0, 16), dilation=(1, 16), bias=True),
    _depthwise("row_k4", 1, 400, 1, 301, (1, 4), padding=(0, 3), bias=True),
    _depthwise("row_k5_stride2", 1, 320, 1, 299, (1, 5), stride=(1, 2), padding=(0, 2)),
)
# Fewer channels than a vector has lanes: up to half of them, and more; each stride, as pixels next to each other and
# apart; fewer columns than a block has, rows and columns that no tap sees, all of a filter outside.
FEW = tuple(
    _depthwise(f"c{C}_k{R}x{S}_s{stride[0]}x{stride[1]}_p{padding[0]}x{padding[1]}", 2, C, H, W, (R, S), **geometry)
    for C in (2, 3, 5, 8, 9, 12, 15)
    for H, W, R, S, stride, padding in (
        (19, 40, 3, 3, (1, 1), (1, 1)),
        (13, 3, 5, 2, (1, 1), (2, 1)),
        (18, 21, 5, 5, (2, 2), (2, 2)),
        (9, 31, 3, 7, (3, 4), (0, 3)),
        (4, 5, 3, 3, (2, 1), (4, 5)),
        (1, 1200, 1, 4, (1, 1), (0, 3)),
    )
    for geometry in [dict(stride=stride, padding=padding, bias=True)]
)


def _of_slices(which: str, case: Case, dtype: torch.dtype) -> Tensor:
    """The map of images whose pixels lie apart: NaN stands between them."""
    x, w, b = tensors(case, dtype, "cpu", "channels_last")
    g = grad_like_output(case, dtype, "cpu", "channels_last")
    like_x = (x.shape, x.stride())
    wide = [torch.cat([t, torch.full_like(t, float("nan"))], dim=1) for t in (x, g)]
    x, g = (t.to(memory_format=torch.channels_last)[:, : case.C] for t in wide)
    if which == "forward":
        return ops.conv2d(x, w, b, *case.op_geometry, "identity")
    if which == "grad_weight":
        return ops.conv2d_grad_weight(g, x, w.shape, w.stride(), *case.op_geometry)
    return ops.conv2d_grad_input(g, w, *like_x, *case.op_geometry)


# Groups that fill vectors, share them, or are wider, and a last vector in part; each stride, as phases of which some
# see no tap; taps that are neighbours or not; padding wider than the filter; rows and columns that no tap sees.
GROUPS_LAST = tuple(
    Case(f"c{C}g{C // group}_k{R}x{S}_s{stride[0]}x{stride[1]}", N, C, H, W, C, R, S, groups=C // group, **geometry)
    for group, C in ((2, 58), (4, 24), (4, 128), (8, 24), (8, 80))
    for N, H, W, R, S, stride, padding, dilation in (
        (2, 14, 13, 3, 3, (1, 1), (1, 1), (1, 1)),
        (1, 19, 18, 3, 3, (2, 2), (1, 1), (1, 1)),
        (3, 7, 9, 1, 1, (3, 2), (0, 0), (1, 1)),
        (1, 9, 21, 5, 4, (1, 2), (3, 1), (1, 1)),
        (2, 4, 3, 3, 3, (1, 1), (4, 5), (1, 1)),
        (1, 12, 11, 3, 2, (1, 1), (2, 0), (2, 3)),
    )
    for geometry in [dict(stride=stride, padding=padding, dilation=dilation, bias=True)]
)


@pytest.mark.parametrize("case", GROUPS_LAST, ids=str)
def test_groups_of_channels_last(case: Case, isa: str) -> None:
    """Of any number of threads, which share images and kernel rows, the same bits; of slices of channels, too."""
    theirs, truth = peer(case, torch.float32, "cpu", "channels_last"), expected(case, torch.float32)
    for which in MAPS:
        results = []
        for threads in (1, 4):
            torch.set_num_threads(threads)
            with only_our_kernels():
                results.append(run_map(which, case, torch.float32, "cpu", "channels_last"))
                assert sepconv_ext.kernel_counts() == {"cpu_grouped_nhwc": 1}
        assert torch.equal(*results)
        with only_our_kernels():
            assert torch.equal(results[0], _of_slices(which, case, torch.float32))
        what = f"{which} of {case} with {isa}"
        assert_as_accurate(results[0], getattr(theirs, which), getattr(truth, which), what)


@pytest.mark.parametrize(
    ("group", "dtype", "kernel", "stride", "avx512", "map", "taken"),
    [
        (4, torch.float32, 5, 1, False, "forward", "cpu_grouped_nhwc"),
        (8, torch.float32, 3, 1, False, "forward", "cpu_grouped_nhwc"),
        (8, torch.float32, 5, 1, True, "forward", "aten"),
        (8, torch.float32, 3, 2, True, "grad_input", "cpu_grouped_nhwc"),
        (8, torch.float32, 1, 2, True, "grad_input", "aten"),
        (8, torch.float32, 3, 1, False, "grad_input", "aten"),
        (8, torch.float32, 3, 1, False, "grad_weight", "aten"),
        (8, torch.float32, 3, 2, False, "grad_weight", "cpu_grouped_nhwc"),
        (16, torch.float32, 3, 1, True, "forward", "aten"),
        (4, torch.bfloat16, 3, 1, True, "forward", "aten"),
        (4, torch.bfloat16, 3, 1, True, "grad_weight", "cpu_grouped_nhwc"),
        (4, torch.float16, 3, 1, True, "forward", "cpu_grouped_nhwc"),
    ],
)
def test_groups_last_that_the_plan_gives_to_torch(group, dtype, kernel, stride, avx512, map, taken) -> None:
    """16 groups on 14x14 in channels_last, with oneDNN's kernels for AVX-512 and without. Half types in float32."""
    x = torch.empty(2, 16 * group, 14, 14, dtype=dtype).to(memory_format=torch.channels_last)
    w = torch.empty(16 * group, group, kernel, kernel, dtype=dtype)
    with half_kernels(avx512, False), strictness(False):
        said = functional.explain(x, w, None, stride, kernel // 2, 1, 16, map=map)
    assert said.kernel == taken, said.reason


@pytest.mark.parametrize(
    ("group", "size", "kernel", "taken"),
    [
        (4, 14, 3, "cpu_grouped_nhwc"),
        (8, 27, 3, "cpu_grouped_nhwc"),
        (8, 14, 5, "aten"),
        (4, 28, 3, "cpu_grouped_planes"),
        (16, 14, 3, "aten"),
    ],
)
@pytest.mark.parametrize("map", MAPS)
def test_small_planes_of_groups_are_turned(group: int, size: int, kernel: int, taken: str, map: str) -> None:
    """Contiguous, with oneDNN's kernels for AVX-512: copies to channels_last and back are less than what they gain."""
    x, w = torch.empty(2, 16 * group, size, size), torch.empty(16 * group, group, kernel, kernel)
    with half_kernels(True, True), strictness(False):
        said = functional.explain(x, w, None, 1, kernel // 2, 1, 16, map=map)
    if map == "grad_weight" and kernel == 5:
        taken = "cpu_grouped_nhwc"
    assert said.kernel == taken, said.reason
    assert ("copied to channels_last" in said.reason) == (taken == "cpu_grouped_nhwc"), said.reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize("case", [*DILATED, *FEW], ids=str)
def test_rows_of_channels_last(case: Case, dtype: torch.dtype, isa: str) -> None:
    """Of any number of threads, which share a row, the same bits. Images that are slices give them, too."""
    theirs, truth = peer(case, dtype, "cpu", "channels_last"), expected(case, dtype)
    for which in ("forward", "grad_input"):
        results = []
        for threads in (1, 4):
            torch.set_num_threads(threads)
            with only_our_kernels():
                results.append(run_map(which, case, dtype, "cpu", "channels_last"))
                assert sepconv_ext.kernel_counts() == {"cpu_depthwise_nhwc": 1}
        assert torch.equal(*results)
        assert torch.equal(results[0], _of_slices(which, case, dtype))
        what = f"{which} of {case} with {isa}"
        assert_as_accurate(results[0], getattr(theirs, which), getattr(truth, which), what)


@pytest.mark.parametrize(
    ("C", "map", "taken"),
    [
        (3, "forward", False),
        (8, "grad_input", False),
        (12, "forward", True),
        (16, "forward", False),
        (3, "grad_weight", True),
        (12, "grad_weight", True),
        (16, "grad_weight", False),
    ],
)
def test_few_channels_that_the_plan_gives_to_torch(C: int, map: str, taken: bool) -> None:
    """Of 8x56x56 in channels_last, with oneDNN's kernels for AVX-512."""
    x = torch.empty(8, C, 56, 56).to(memory_format=torch.channels_last)
    with half_kernels(True, True), strictness(False):
        said = functional.explain(x, torch.empty(C, 1, 3, 3), None, 1, 1, 1, C, map=map)
    assert (said.kernel == "aten") == taken, said.reason


@pytest.mark.parametrize(
    ("C", "size", "stride", "taken"),
    [
        (58, 56, 2, True),
        (48, 56, 2, True),
        (64, 56, 2, False),
        (58, 28, 2, False),
        (58, 56, 1, False),
        (24, 56, 2, False),
    ],
)
def test_strided_gradients_that_the_plan_gives_to_torch(C: int, size: int, stride: int, taken: bool) -> None:
    """By the input, of 8 images in channels_last, with oneDNN's kernels for AVX-512; never by the weight."""
    x = torch.empty(8, C, size, size).to(memory_format=torch.channels_last)
    with half_kernels(True, True), strictness(False):
        said = functional.explain(x, torch.empty(C, 1, 3, 3), None, stride, 1, 1, C, map="grad_input")
        by_weight = functional.explain(x, torch.empty(C, 1, 3, 3), None, stride, 1, 1, C, map="grad_weight")
    assert (said.kernel == "aten") == taken, said.reason
    assert by_weight.kernel == "cpu_depthwise_nhwc"


@pytest.mark.parametrize(
    ("padding", "dilation", "taken"),
    [((1, 1, 1, 1), 1, True), ((1, 1, 2, 0), 1, False), ((4, 4, 4, 4), 4, True), ((7, 7, 7, 7), 7, False)],
)
def test_what_onednn_pads_by_a_copy_or_by_its_reference(padding, dilation, taken) -> None:
    """bfloat16 in channels_last, which goes to oneDNN where that multiplies without widening."""
    x = torch.empty(32, 256, 28, 28, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    w = torch.empty(256, 1, 3, 3, dtype=torch.bfloat16)
    with half_kernels(True, True), strictness(False):
        said = sepconv_ext._C.explain("forward", x, w, None, (1, 1), padding, (dilation, dilation), 256)
    assert (said.kernel == "aten") == taken, said.reason


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@by_dtype
@pytest.mark.parametrize(
    "case",
    [BY_NAME[n] for n in ("depthwise_k3", "depthwise_k5_stride2", "grouped_resnext", "pointwise_awkward")],
    ids=str,
)
def test_activation(case: Case, dtype: torch.dtype, layout: str, activation: str, device: str) -> None:
    x, w, b = tensors(case, dtype, device, layout)
    x = x * 3  # reach the far ends of the activations
    with only_our_kernels():
        actual = ops.conv2d(x, w, b, *case.op_geometry, activation)
    native = reference.ACTIVATIONS[activation](F.conv2d(x, w, b, *case.geometry))
    summed = reference.forward(x.cpu(), w.cpu(), None if b is None else b.cpu(), *case.geometry)
    truth = reference.ACTIVATIONS[activation](summed)
    half = dtype in (torch.bfloat16, torch.float16)  # summed in float32: the rounding of the result counts
    assert_as_accurate(actual.cpu(), native.cpu(), truth, f"{activation} of {case}", None if half else summed)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_keeps_nan_and_infinity(activation: str, device: str) -> None:
    special = torch.tensor([float("nan"), float("inf"), float("-inf"), 0.0, 7.0, -7.0], device=device)
    native = reference.ACTIVATIONS[activation](special)
    x = special.reshape(1, 1, 1, 6)
    with only_our_kernels():
        actual = functional.depthwise_conv2d(x, torch.ones(1, 1, 1, 1, device=device), activation=activation)
    # At an infinity torch's own formulas may multiply by zero: there is nothing to agree with then.
    sane = ~(native.isnan() & special.isinf())
    assert actual.flatten()[0].isnan()
    torch.testing.assert_close(actual.flatten()[sane], native[sane], equal_nan=True)


@pytest.mark.parametrize("case", FAMILIES, ids=str)
def test_functional_forms(case: Case, device: str) -> None:
    """conv2d, depthwise_conv2d and pointwise_conv2d are one op with different argument lists."""
    x, w, b = tensors(case, torch.float32, device)
    y = F.conv2d(x, w, b, *case.geometry)
    with only_our_kernels():
        torch.testing.assert_close(functional.conv2d(x, w, b, *case.geometry), y)
    if case.family == "depthwise":
        with only_our_kernels():
            z = functional.depthwise_conv2d(x, w, b, case.stride, case.padding, case.dilation, activation="relu6")
        torch.testing.assert_close(z, F.relu6(y))
    if case.family == "pointwise":
        with only_our_kernels():
            torch.testing.assert_close(functional.pointwise_conv2d(x, w, b, activation="gelu"), F.gelu(y))


@pytest.fixture(params=[1, 2])
def _threads(request: pytest.FixtureRequest) -> None:
    torch.set_num_threads(request.param)


@by_layout
@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("kind", ["every_second", "one_for_all"])
def test_bias_that_is_not_dense(kind: str, layout: str, device: str) -> None:
    """A bias with gaps, or one number for all channels, wherever the plan sends the call."""
    one = torch.full((1,), 2.0, device=device)
    for x_size, w_size, groups in (
        ((2, 64, 20, 20), (96, 64, 1, 1), 1),
        ((1, 16, 1, 2), (24, 16, 1, 1), 1),
        ((2, 64, 14, 14), (64, 16, 3, 3), 4),
        ((2, 48, 20, 20), (48, 1, 3, 3), 48),
    ):
        x, w = random(x_size, torch.float32, device, layout), random(w_size, torch.float32, device, seed=2)
        many = random((2 * w_size[0],), torch.float32, device, seed=3)
        b = many[::2] if kind == "every_second" else one.expand(w_size[0])
        y = F.conv2d(x.double(), w.double(), b.double(), groups=groups)
        torch.testing.assert_close(functional.conv2d(x, w, b, groups=groups).double(), y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize("which", MAPS)
def test_same_bits_every_run(which: str, dtype: torch.dtype, layout: str, threads: int, device: str) -> None:
    """The same bits on every run, whatever the number of threads."""
    cases = [case for case in CASES if case.N > 0 and case.family != "pointwise"]
    torch.set_num_threads(2)
    with only_our_kernels():
        first = [run_map(which, case, dtype, device, layout) for case in cases]
    torch.set_num_threads(threads)
    with only_our_kernels():
        again = [run_map(which, case, dtype, device, layout) for case in cases]
    different = [str(case) for case, a, b in zip(cases, first, again, strict=True) if not torch.equal(a, b)]
    assert not different


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("which", MAPS)
def test_same_bits_pointwise(which: str, layout: str, device: str) -> None:
    """Matrix products may be torch's, whose bits may depend on the number of threads, but not on the run."""
    for case in (case for case in CASES if case.N > 0 and case.family == "pointwise"):
        first, again = (run_map(which, case, torch.float32, device, layout) for _ in range(2))
        assert torch.equal(first, again), str(case)


def far_apart(tensor: Tensor, gap: int) -> Tensor:
    """The same values with images `gap` elements apart. Memory between them is reserved and never touched."""
    n, c, h, w = tensor.shape
    with untouched_memory():
        storage = torch.empty((n - 1) * gap + c * h * w, dtype=tensor.dtype, device=tensor.device)
    return storage.as_strided((n, c, h, w), (gap, h * w, w, 1)).copy_(tensor)


@pytest.mark.parametrize("which", MAPS)
@pytest.mark.parametrize("case", FAMILIES, ids=str)
def test_offsets_beyond_32_bits(case: Case, which: str, device: str) -> None:
    """Elements more than 2^31 apart are found: any 32-bit offset would read elsewhere."""
    dtype, gap = torch.bfloat16, 2**31 + 64
    x, w, b = tensors(case, dtype, device)
    g = grad_like_output(case, dtype, device)
    far_x, far_g = far_apart(x, gap), far_apart(g, gap)
    with only_our_kernels(at_least=2):
        if which == "forward":
            near = ops.conv2d(x, w, b, *case.op_geometry, "identity")
            far = ops.conv2d(far_x, w, b, *case.op_geometry, "identity")
        elif which == "grad_input":
            near = ops.conv2d_grad_input(g, w, x.shape, x.stride(), *case.op_geometry)
            far = ops.conv2d_grad_input(far_g, w, x.shape, x.stride(), *case.op_geometry)
        else:
            near = ops.conv2d_grad_weight(g, x, w.shape, w.stride(), *case.op_geometry)
            far = ops.conv2d_grad_weight(far_g, far_x, w.shape, w.stride(), *case.op_geometry)
    torch.testing.assert_close(far, near, rtol=2e-2, atol=2e-2)  # another kernel may take the strided images


@pytest.mark.parametrize(
    ("dtype", "size", "weight_size", "groups", "stride", "map", "taken"),
    [
        (torch.float64, (2, 64, 28, 28), (64, 32, 3, 3), 2, 1, "grad_weight", True),
        (torch.float64, (2, 64, 28, 28), (64, 32, 3, 3), 2, 1, "forward", False),
        (torch.float64, (2, 64, 28, 28), (64, 16, 3, 3), 4, 1, "grad_weight", False),
        (torch.float64, (2, 64, 28, 28), (64, 16, 1, 1), 4, 1, "forward", True),
        (torch.float64, (2, 64, 28, 28), (64, 8, 1, 1), 8, 1, "forward", False),
        (torch.float32, (4, 8, 7, 7), (16, 4, 5, 5), 2, 2, "grad_weight", True),
        (torch.float32, (4, 8, 7, 7), (16, 4, 5, 5), 2, 2, "grad_input", False),
        (torch.float32, (1, 8, 7, 7), (16, 4, 5, 5), 2, 2, "grad_weight", False),
    ],
)
def test_groups_that_the_plan_gives_to_torch(dtype, size, weight_size, groups, stride, map, taken) -> None:
    """float64 of many channels a group, and small weight gradients whose lanes take longer than a call of torch's."""
    x, w = torch.empty(size, dtype=dtype), torch.empty(weight_size, dtype=dtype)
    with strictness(False):
        said = functional.explain(x, w, None, stride, weight_size[-1] // 2, 1, groups, map=map)
    assert (said.kernel == "aten") == taken, said.reason


@pytest.mark.parametrize(("rows", "taps", "stride", "taken"), [(31, 3, 2, True), (29, 3, 2, False), (31, 5, 2, False)])
def test_multipliers_that_the_plan_gives_to_torch(rows: int, taps: int, stride: int, taken: bool) -> None:
    """Gradients by the input in channels_last with a stride: oneDNN is faster for 3x3, from 16x16 outputs on."""
    x, w = torch.empty(2, 48, rows, 32).to(memory_format=torch.channels_last), torch.empty(96, 1, taps, taps)
    with strictness(False):
        said = functional.explain(x, w, None, stride, taps // 2, 1, 48, map="grad_input")
    assert (said.kernel == "aten") == taken, said.reason


@by_layout
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize(
    ("size", "weight_size", "groups", "stride", "widened"),
    [
        ((3, 40, 9, 7), (24, 40, 1, 1), 1, 1, True),
        ((2, 64, 13, 12), (33, 64, 1, 1), 1, 2, True),
        ((2, 32, 15, 9), (24, 32, 3, 3), 1, 1, True),
        ((2, 64, 14, 14), (64, 32, 3, 3), 2, 1, True),
        ((2, 64, 14, 14), (64, 16, 3, 3), 4, 1, False),
        ((2, 3, 33, 32), (16, 3, 3, 3), 1, 2, False),
        ((4, 116, 28, 28), (116, 1, 3, 3), 116, 1, False),
    ],
)  # fmt: skip
def test_half_types_without_kernels_of_onednn(size, weight_size, groups, stride, widened, dtype, layout) -> None:
    """torch's loops take ten times as long and more: what has no kernel here is multiplied in float32, rounded once."""
    padding = weight_size[-1] // 2
    x, w = random(size, dtype, "cpu", layout, seed=1), random(weight_size, dtype, "cpu", "contiguous", seed=2)
    b = random((weight_size[0],), dtype, "cpu", seed=3)
    wide = [t.double().requires_grad_() for t in (x, w)]
    expected = F.relu(F.conv2d(*wide, b.double(), stride, padding, 1, groups))
    g = random(tuple(expected.shape), dtype, "cpu", layout, seed=4)
    expected = (expected, *torch.autograd.grad(expected, wide, g.double()))
    leaves = [t.requires_grad_() for t in (x, w)]
    with half_kernels(False, False), strictness(False):
        for map in MAPS:
            said = functional.explain(x, w, None, stride, padding, 1, groups, map=map)
            if map != "grad_weight" or widened:  # torch's NaN keep others of that map in float32, too
                assert ("in float32, rounded once" in said.reason) == widened, said.reason
            assert widened or said.kernel != "aten" or "returns NaN" in said.reason, said.reason
        y = torch.relu(functional.conv2d(x, w, b, stride, padding, 1, groups))
        actual = (y, *torch.autograd.grad(y, leaves, g))
    for name, ours, exact in zip(MAPS, actual, expected, strict=True):
        # Half an eps for the one rounding, and float32's sums.
        worst = (ours.double() - exact).abs() - (0.51 * torch.finfo(dtype).eps * exact.abs())
        assert ours.dtype == dtype and worst.max() <= 2e-5 * exact.abs().max(), f"{name}: {worst.max():.2e}"


@pytest.mark.slow
def test_more_than_2_to_31_outputs(device: str) -> None:
    """An output of 2^31 + 2^15 elements; the input is one row, expanded."""
    rows, columns = 2**16 + 1, 2**15
    row = random((1, 1, 1, columns), torch.bfloat16, device)
    weight = torch.full((1, 1, 1, 1), 2.0, dtype=row.dtype, device=device)
    with untouched_memory(), only_our_kernels():
        y = functional.conv2d(row.expand(1, 1, rows, columns), weight)
    assert y.numel() > 2**31
    for index in (0, 2**15, 2**16 - 1, 2**16):
        torch.testing.assert_close(y[0, 0, index], 2 * row[0, 0, 0], rtol=0, atol=0)
