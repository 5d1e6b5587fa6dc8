"""Where torch's own convolution fails (csrc/cpu/torch_faults.cpp), this package's call returns, finite and right.

What may crash or hang runs in a process of its own. Faults of other processors than this one are checked by the plan.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from harness import half_kernels
from sepconv_ext import functional

# Each line is one call with its gradients against float64: layouts of input, weight and grad_output, then the shapes.
PROGRAM = """
import sys, torch, torch.nn.functional as F
from sepconv_ext import functional

def permuted(t): return t.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0)
def channels_last(t): return t.contiguous(memory_format=torch.channels_last)
def plain(t): return t

def check(dtype, size, weight_size, stride, padding, dilation, groups, of_x, of_w, repeats=1):
    for _ in range(repeats):
        x, w = torch.randn(size).to(dtype), torch.randn(weight_size).to(dtype)
        X, W = x.double().requires_grad_(), w.double().requires_grad_()
        x, w = of_x(x).requires_grad_(), of_w(w).requires_grad_()
        args = (None, stride, padding, dilation, groups)
        y, Y = functional.conv2d(x, w, *args), F.conv2d(X, W, *args)
        g = torch.randn(Y.shape).to(dtype)
        got = (y, *torch.autograd.grad(y, (x, w), of_x(g)))
        want = (Y, *torch.autograd.grad(Y, (X, W), g.double()))
        for name, a, b in zip(("output", "grad_input", "grad_weight"), got, want):
            assert ((a.double() - b).norm() / b.norm()).item() < 2e-2, f"{name} of {dtype} {size} {weight_size}"
    print("right", flush=True)

torch.manual_seed(0)
torch.set_num_threads(int(sys.argv[1]))
f64, f32, f16, b16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
CALLS
"""

STRIDED_1X1 = """
check(f32, (32, 4, 32, 32), (8, 4, 1, 1), 2, 0, 1, 1, channels_last, plain, 3)
check(f32, (5, 7, 28, 28), (64, 7, 1, 1), (1, 2), 0, 1, 1, channels_last, channels_last, 3)
check(f32, (3, 6, 17, 9), (8, 3, 1, 1), 2, 0, 1, 2, channels_last, plain, 3)
"""
HALF_WEIGHT_GRADIENTS = """
for c in (8, 24, 31): check(b16, (3, c, 61, 1), (c, 1, 7, 7), (2, 4), 3, 1, c, channels_last, plain)
check(b16, (5, 31, 7, 2), (8, 31, 7, 7), 2, 6, 1, 1, channels_last, plain, 4)
check(b16, (2, 32, 5, 31), (8, 8, 3, 3), 1, 2, 2, 4, channels_last, plain)
check(f16, (2, 16, 9, 9), (8, 16, 3, 3), 1, 1, 1, 1, plain, plain)
check(b16, (2, 12, 9, 9), (8, 12, 1, 1), 1, 0, 1, 1, plain, plain)
"""
FEW_CHANNELS = """
check(b16, (2, 2, 2, 37), (2, 1, 31, 31), 1, 15, 1, 2, permuted, channels_last)
check(b16, (2, 8, 1, 100), (8, 1, 1, 15), 1, (0, 7), 1, 8, channels_last, plain)
check(f16, (2, 4, 1, 50), (4, 1, 1, 15), 1, (0, 7), 1, 4, channels_last, plain)
"""
WIDE_AND_ONE_COLUMN = """
check(b16, (3, 8, 28, 15), (3, 8, 6, 8), 1, (3, 4), 1, 1, plain, plain)
check(b16, (2, 24, 5, 28), (24, 12, 1, 8), (1, 2), (0, 4), 1, 2, channels_last, plain)
check(b16, (17, 64, 56, 2), (32, 4, 11, 11), (4, 3), 5, 1, 16, plain, plain)
check(b16, (3, 8, 56, 2), (3, 8, 9, 9), 2, 4, 1, 1, channels_last, plain)
check(b16, (2, 32, 5, 2), (8, 32, 3, 3), (1, 2), 1, 1, 1, plain, plain)
for c in (32, 48, 64): check(b16, (1, c, 8, 1), (2 * c, 1, 13, 13), (1, 3), 6, 1, c, channels_last, plain)
check(b16, (2, 64, 3, 4), (192, 1, 1, 13), 2, (0, 5), 1, 64, channels_last, plain)
"""
PERMUTED_WEIGHTS = """
check(f64, (3, 33, 28, 2), (8, 33, 6, 1), 1, 0, 1, 1, channels_last, permuted)
check(f16, (3, 32, 19, 33), (4, 16, 3, 1), 1, 0, 1, 2, plain, permuted)
check(f64, (2, 8, 9, 9), (8, 8, 3, 3), 1, 1, 1, 1, plain, permuted)
"""
ODD_STRIDES = """
check(f32, (1, 32, 1, 19), (8, 8, 11, 1), 1, (13, 1), 1, 4, channels_last, permuted)
check(f32, (2, 15, 37, 56), (15, 3, 11, 1), (1, 3), (5, 0), 1, 5, channels_last, permuted)
check(f32, (2, 8, 9, 11), (8, 4, 1, 3), 1, (0, 1), 1, 2, channels_last, lambda t: channels_last(t.mT).mT)
check(b16, (2, 32, 9, 11), (32, 16, 3, 1), 1, (1, 0), 1, 2, channels_last, permuted)
"""
TALL_FILTERS = """
check(f32, (1, 33, 14, 5), (1, 33, 31, 31), 1, 15, 1, 1, plain, plain, 3)
check(f32, (1, 65, 14, 7), (2, 65, 27, 13), (1, 3), (13, 6), 1, 1, plain, plain, 3)
check(f32, (1, 16, 11, 6), (32, 16, 29, 4), (1, 3), (14, 2), 1, 1, plain, plain, 3)
check(f32, (1, 3, 19, 2), (32, 3, 19, 6), (2, 1), (9, 3), 1, 1, plain, plain, 3)
check(b16, (1, 65, 14, 7), (2, 65, 31, 31), (1, 3), 15, 1, 1, plain, channels_last)
"""


@pytest.mark.parametrize(
    ("calls", "threads", "rights"),
    [
        (STRIDED_1X1, 1, 3),
        (STRIDED_1X1, 4, 3),
        (HALF_WEIGHT_GRADIENTS, 1, 7),
        (FEW_CHANNELS, 2, 3),
        (WIDE_AND_ONE_COLUMN, 1, 9),
        (PERMUTED_WEIGHTS, 1, 3),
        (ODD_STRIDES, 1, 4),
        (TALL_FILTERS, 1, 5),
    ],
    ids=[
        *("strided_1x1", "strided_1x1_threads", "half_weight_gradients"),
        *("few_channels", "wide_and_one_column", "permuted_weights", "odd_strides", "tall_filters"),
    ],
)
def test_returns_right(calls: str, threads: int, rights: int) -> None:
    """Before: a corrupted heap or a hang (strided 1x1, tall filters), an exception or wrong values (permuted weights,
    odd strides), NaN or a hang (AVX-512)."""
    program = PROGRAM.replace("CALLS", calls)
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive", "SEPCONV_STRICT": "0"}
    done = subprocess.run(
        [sys.executable, "-c", program, str(threads)], capture_output=True, text=True, timeout=200, env=environment
    )
    assert (done.returncode, done.stdout.count("right")) == (0, rights), done.stderr[-400:]


def kernel(map: str, dtype: torch.dtype, size: tuple, weight_size: tuple, groups: int, stride: int = 1) -> str:
    x = torch.empty(size, dtype=dtype).contiguous(memory_format=torch.channels_last)
    w = torch.empty(weight_size, dtype=dtype)
    padding = (weight_size[2] // 2, weight_size[3] // 2)
    return functional.explain(x, w, None, stride, padding, 1, groups, map=map)


@pytest.mark.parametrize("kernels", [False, True], ids=["without_kernels", "with_kernels"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_plan_of_half_types(dtype: torch.dtype, kernels: bool) -> None:
    """On any processor: no hang of few channels, no weight gradient by torch's half types, dense ones in float32."""
    with half_kernels(kernels, kernels):
        check_plan_of_half_types(dtype)


def check_plan_of_half_types(dtype: torch.dtype) -> None:
    for map in ("forward", "grad_input", "grad_weight"):
        for size, taps in (((1, 8, 1, 5000), (1, 15)), ((2, 2, 64, 64), (31, 31)), ((2, 16, 64, 64), (3, 3))):
            plan = kernel(map, dtype, size, (size[1], 1, *taps), size[1])
            assert plan.kernel != "aten", f"{map} {size}: {plan.reason}"
    dense = kernel("grad_weight", dtype, (4, 64, 28, 28), (64, 64, 3, 3), 1)
    assert dense.kernel != "aten" or "float32" in dense.reason
    pointwise = kernel("grad_weight", dtype, (4, 64, 28, 28), (64, 64, 1, 1), 1)
    assert pointwise.kernel != "aten" or "float32" in pointwise.reason


def test_plan_of_strided_1x1() -> None:
    """Few channels alone are kept from torch: its weight gradient of 16 and more channels is sound."""
    for channels, groups in ((4, 1), (8, 1), (15, 1), (16, 2)):
        size, weight_size = (8, channels, 56, 56), (64, channels // groups, 1, 1)
        assert kernel("grad_weight", torch.float32, size, weight_size, groups, stride=2).kernel != "aten"
    assert kernel("grad_weight", torch.float32, (8, 64, 56, 56), (64, 64, 1, 1), 1, stride=2).kernel == "aten"


def test_plan_of_tall_filters() -> None:
    """Where one row of the output sees the whole filter, torch is right, and dense convolutions are its."""
    for rows, stride, padding, taken in ((19, 1, 9, True), (18, 1, 9, False), (20, 2, 9, True), (19, 2, 9, False)):
        x, w = torch.empty(1, 16, rows, 8), torch.empty(32, 16, 19, 5)
        plan = functional.explain(x, w, None, (stride, 1), (padding, 2), map="grad_weight")
        assert (plan.kernel == "aten") == taken, f"{rows} rows, stride {stride}: {plan.reason}"


def test_plan_of_strided_gradients_in_bfloat16() -> None:
    """oneDNN takes 30 to 120 times as long as the kernel here; without a stride it is the faster one for large ones."""
    torch.set_num_threads(1)
    with half_kernels(True, False):
        check_plan_of_strided_gradients()


def check_plan_of_strided_gradients() -> None:
    for map, stride, taken in (("grad_input", 2, False), ("grad_input", 1, True), ("forward", 2, True)):
        plan = kernel(map, torch.bfloat16, (8, 256, 56, 56), (256, 1, 3, 3), 256, stride)
        assert (plan.kernel == "aten") == taken, f"{map}, stride {stride}: {plan.reason}"
    for taps, taken in ((7, False), (9, True)):
        plan = kernel("forward", torch.bfloat16, (1, 48, 56, 56), (48, 1, taps, taps), 48, 2)
        assert (plan.kernel == "aten") == taken, f"{taps} taps a row: {plan.reason}"
    small = kernel("forward", torch.bfloat16, (1, 116, 40, 40), (116, 1, 3, 3), 116)
    assert small.kernel == "cpu_depthwise_nhwc", small.reason
