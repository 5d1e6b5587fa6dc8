"""Padding, dilation and stride far beyond the image: the cost follows the image and the taps that meet it."""

from __future__ import annotations

import os
import random as random_numbers
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import sepconv_ext
from harness import assert_as_accurate, only_our_kernels, random, with_layout
from sepconv_ext import functional, reference
from test_torch_machinery import strides_with_meaning

FAR = 1 << 20  # squared, as many numbers as no machine holds


HERE = Path(__file__).parent


def test_spans_against_all_pairs(tmp_path: Path) -> None:
    """The arithmetic alone."""
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        pytest.skip("no C++ compiler")
    flags = ["-std=c++20", "-O1", f"-I{HERE.parent / 'csrc'}"]
    subprocess.run([compiler, *flags, HERE / "overlap.cpp", "-o", tmp_path / "overlap"], check=True)
    done = subprocess.run([tmp_path / "overlap"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def maps(convolve, x: Tensor, w: Tensor, b: Tensor | None, grad: Tensor | None = None) -> list[Tensor]:
    """The output, and the gradients of all that goes in, each map in a call of its own and both in one."""
    given = [t.detach().requires_grad_() for t in (x, w, b) if t is not None]
    y = convolve(*given)
    grad = torch.ones_like(y) if grad is None else grad.to(y.dtype)
    alone = [torch.autograd.grad(convolve(*given), t, grad)[0] for t in given]
    return [y.detach(), *alone, *torch.autograd.grad(y, given, grad)]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("seed", range(24))
def test_far_taps_and_outputs(seed: int, layout: str, device: str) -> None:
    pick = random_numbers.Random(seed)
    dtype = pick.choice((torch.float32, torch.float64, torch.bfloat16))
    groups, C, K = pick.choice(((6, 6, 6), (6, 6, 12), (2, 4, 6), (1, 4, 5)))
    H, W, R, S = pick.randint(1, 7), pick.randint(1, 9), pick.randint(1, 4), pick.randint(1, 5)
    dilation, stride = (pick.choice((1, 3, 17, 40)), pick.randint(1, 40)), (pick.choice((1, 2, 9)), pick.randint(1, 50))
    padding = tuple(  # somewhere from the least that a kernel needs on
        max(0, dilation[i] * ((R, S)[i] - 1) + 1 - (H, W)[i] + 1) // 2 + pick.choice((0, 1, 30)) for i in (0, 1)
    )
    x = with_layout(random((2, C, H, W), dtype, device, seed=1), layout)
    w = with_layout(random((K, C // groups, R, S), dtype, device, seed=2), layout)
    b = random((K,), dtype, device, seed=3)
    arguments = (stride, padding, dilation, groups)

    def torchs(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.conv2d(x, w, b, *arguments)

    expected = maps(torchs, x.double(), w.double(), b.double())
    grad = random(expected[0].shape, dtype, device, seed=4)
    expected = maps(torchs, x.double(), w.double(), b.double(), grad)
    ours = maps(lambda x, w, b: functional.conv2d(x, w, b, *arguments), x, w, b, grad)
    theirs = maps(torchs, x, w, b, grad)
    for name, a, t, e in zip("y gx gw gb gx gw gb".split(), ours, theirs, expected, strict=True):
        assert_as_accurate(a, t, e, f"{name} of {x.shape}, {w.shape}, {arguments}")
        if layout != "strided":
            assert strides_with_meaning(a) == strides_with_meaning(t), name


def center(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """What is left of a 3x3 kernel whose other taps are far away."""
    return F.conv2d(x, w[..., 1:2, 1:2], b, groups=len(w) if w.shape[1] == 1 else 1)


@pytest.mark.parametrize("activation", ["identity", "silu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("C", [1, 6, 64])
def test_dilation_without_end(C: int, dtype: torch.dtype, activation: str, device: str) -> None:
    x, w, b = (random(size, dtype, device) for size in ((2, C, 8, 7), (C, 1, 3, 3), (C,)))

    def ours(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return functional.depthwise_conv2d(x, w, b, 1, FAR, FAR, activation)

    def expected(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return reference.ACTIVATIONS[activation](center(x, w, b))

    exact = maps(expected, x.double(), w.double(), b.double())
    for a, t, e in zip(maps(ours, x, w, b), maps(expected, x, w, b), exact, strict=True):
        assert_as_accurate(a, t, e)


def test_dilation_of_other_ops(device: str) -> None:
    x, w, b = (random(size, torch.float32, device) for size in ((2, 4, 8, 7), (4, 1, 3, 3), (4,)))
    p = random((5, 4, 1, 1), torch.float32, device)
    y = functional.separable_conv2d(x, w, p, b, padding=FAR, dilation=FAR)
    torch.testing.assert_close(y, F.conv2d(center(x, w, b), p))
    y = functional.separable_conv2d(x.double(), w.double(), p.double(), b.double(), padding=FAR, dilation=FAR)
    torch.testing.assert_close(y, F.conv2d(center(x.double(), w.double(), b.double()), p.double()))
    sequence = functional.conv1d(x[:, :, 0], w[:, :, 1], b, 1, FAR, FAR, 4)
    torch.testing.assert_close(sequence, center(x, w, b)[:, :, 0])
    dense = random((3, 4, 3, 3), torch.float32, device)
    torch.testing.assert_close(functional.conv2d(x, dense, None, 1, FAR, FAR), center(x, dense, None))
    same = functional.conv2d(x, w, b, 1, "same", FAR, 4)
    torch.testing.assert_close(same, center(x, w, b))
    causal = functional.conv1d(x[:, :, 0], w[:, :, 1], b, 1, "causal", FAR, 4)
    torch.testing.assert_close(causal, F.conv1d(x[:, :, 0], w[:, :, 1, 2:], b, groups=4))


def test_nothing_meets(device: str) -> None:
    """Taps on both sides of the image, and none in it: the bias, and zeros."""
    x, w, b = (random(size, torch.float32, device) for size in ((2, 4, 3, 3), (4, 1, 2, 2), (4,)))
    y, gx, gw, gb, *_ = maps(lambda x, w, b: functional.depthwise_conv2d(x, w, b, 1, 51, 101, "relu"), x, w, b)
    assert y.shape == (2, 4, 4, 4) and torch.equal(y[0, :, 1, 1], b.relu())
    torch.testing.assert_close(y, F.conv2d(x, w, b, 1, 51, 101, 4).relu())
    y, gx, gw, gb, *_ = maps(lambda x, w, b: functional.conv2d(x, w, b, FAR, FAR // 2, FAR - 1, 4), x, w, b)
    assert y.shape == (2, 4, 1, 1) and torch.equal(y, b.view(1, 4, 1, 1).expand_as(y))
    assert not gx.any() and not gw.any() and torch.equal(gb, torch.full_like(b, 2))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("stride", [100, (1 << 31) + 1, (1 << 62) + 1])
def test_stride_without_end(stride: int, channels_last: bool, device: str) -> None:
    x, w, b = (random(size, torch.float32, device) for size in ((2, 32, 5, 5), (32, 1, 3, 3), (32,)))
    x = x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    ours = maps(lambda x, w, b: functional.conv2d(x, w, b, stride, 1, 1, 32), x, w, b)
    for a, e in zip(ours, maps(lambda x, w, b: F.conv2d(x, w, b, 7, 1, 1, 32), x, w, b), strict=True):
        torch.testing.assert_close(a, e)
    ours = maps(lambda x, w, b: functional.padded_conv2d(x, w, b, stride, 1, 1, 32, padding_mode="reflect"), x, w, b)
    theirs = maps(lambda x, w, b: F.conv2d(F.pad(x, (1, 1, 1, 1), "reflect"), w, b, 7, 0, 1, 32), x, w, b)
    for a, e in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)


def test_explain_names_the_kernel_that_runs() -> None:
    x, w = random((1, 64, 33, 33), torch.float32, "cpu"), random((64, 1, 3, 3), torch.float32, "cpu")
    explained = sepconv_ext.explain(x, w, None, 1, FAR, FAR, 64)
    sepconv_ext.reset_kernel_counts()
    functional.conv2d(x, w, None, 1, FAR, FAR, 64)
    assert sepconv_ext.kernel_counts() == {explained.kernel: 1}
    with only_our_kernels():
        functional.conv2d(x, w, None, 1, FAR, FAR, 64)
