"""1x1 convolutions of float32 by the products here: which calls they take, and that every map of every layout, stride,
view and instruction set gives what float64 says."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import sepconv_ext
from harness import LAYOUTS, assert_as_accurate, half_kernels, only_our_kernels, random, strictness
from sepconv_ext import functional

ops = torch.ops.sepconv_ext
MAPS = ("forward", "grad_input", "grad_weight")

# (N, C, H, W, K): one channel, one row, panels and blocks that are not full, more pixels and weights than a block has.
SIZES = (
    (2, 24, 7, 7, 58),
    (3, 1, 19, 5, 58),
    (2, 58, 1, 19, 1),
    (1, 3, 19, 19, 24),
    (33, 40, 1, 1, 200),
    (1, 33, 31, 30, 33),
    (3, 300, 14, 14, 40),
    (1, 1100, 5, 4, 300),
)
STRIDES = ((1, 1), (2, 2), (3, 1), (1, 2))


def maps_of(x: Tensor, w: Tensor, b: Tensor | None, g: Tensor, stride: tuple[int, int]) -> dict[str, Tensor]:
    geometry = (stride, (0, 0), (1, 1), 1)
    return {
        "forward": ops.conv2d(x, w, b, *geometry, "identity"),
        "grad_input": ops.conv2d_grad_input(g, w, x.shape, x.stride(), *geometry),
        "grad_weight": ops.conv2d_grad_weight(g, x, w.shape, w.stride(), *geometry),
    }


def torchs(x: Tensor, w: Tensor, b: Tensor | None, g: Tensor, stride: tuple[int, int], dtype: torch.dtype) -> dict:
    x, w, g = (t.to(dtype).contiguous() for t in (x, w, g))
    by_input, by_weight, _ = ops_backward(g, x, w, stride)
    return {"forward": F.conv2d(x, w, None if b is None else b.to(dtype), stride), "grad_input": by_input,
            "grad_weight": by_weight}  # fmt: skip


def ops_backward(g: Tensor, x: Tensor, w: Tensor, stride: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.aten.convolution_backward(
        g, x, w, None, stride, (0, 0), (1, 1), False, (0, 0), 1, (True, True, False)
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stride", STRIDES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
def test_every_map_against_float64(size: tuple[int, ...], stride: tuple[int, int], layout: str, isa: str) -> None:
    N, C, H, W, K = size
    x = random((N, C, H, W), torch.float32, "cpu", layout, seed=1)
    w = random((K, C, 1, 1), torch.float32, "cpu", "strided" if layout == "strided" else "contiguous", seed=2)
    b = random((K,), torch.float32, "cpu", seed=3)
    g = random((N, K, (H - 1) // stride[0] + 1, (W - 1) // stride[1] + 1), torch.float32, "cpu", layout, seed=4)
    with only_our_kernels(at_least=3):
        actual = maps_of(x, w, b, g, stride)
        counts = sepconv_ext.kernel_counts()
    products = 2 if stride != (1, 1) else 3  # with a stride the gradient by the input is no product
    few = H * W == 1 or x.numel() * K <= 16 * 1024  # for cpu_pointwise, where the weight's channels are dense
    assert few or counts.get("cpu_pointwise_product", 0) >= products, counts
    exact, peer = torchs(x, w, b, g, stride, torch.float64), torchs(x, w, b, g, stride, torch.float32)
    for map in MAPS:
        assert_as_accurate(actual[map], peer[map], exact[map], f"{map} with {counts}")


@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
def test_no_bit_depends_on_the_number_of_threads(layout: str) -> None:
    x, g = random((3, 130, 23, 21), torch.float32, "cpu", layout), random((3, 70, 23, 21), torch.float32, "cpu", layout)
    w = random((70, 130, 1, 1), torch.float32, "cpu")
    results = []
    for count in (1, 2, 3, 7):
        torch.set_num_threads(count)
        with only_our_kernels(at_least=3):
            results.append(maps_of(x, w, None, g, (1, 1)))
    for other in results[1:]:
        for map in MAPS:
            assert torch.equal(other[map], results[0][map]), map


@pytest.mark.parametrize("order", ((3, 0, 2, 1), (2, 0, 1, 3), (3, 1, 2, 0), (1, 0, 2, 3)), ids=str)
@pytest.mark.parametrize("stride", ((1, 1), (2, 1)), ids=str)
def test_gradients_take_the_strides_of_permuted_operands(order: tuple[int, ...], stride: tuple[int, int]) -> None:
    def permuted(t: Tensor) -> Tensor:
        return t.permute(order).contiguous().permute([order.index(dim) for dim in range(4)])

    x = permuted(random((3, 40, 14, 15), torch.float32, "cpu", seed=1))
    w = permuted(random((24, 40, 1, 1), torch.float32, "cpu", seed=2))
    g = permuted(random((3, 24, (14 - 1) // stride[0] + 1, 15), torch.float32, "cpu", seed=3))
    for strict in (False, True):
        with strictness(strict):
            actual = maps_of(x, w, None, g, stride)
        exact = torchs(x, w, None, g, stride, torch.float64)
        for map in MAPS:
            torch.testing.assert_close(actual[map].double(), exact[map], rtol=1e-4, atol=1e-4)
        assert actual["grad_input"].stride() == x.stride() and actual["grad_weight"].stride() == w.stride()


@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
@pytest.mark.parametrize("behind", ("sum", "mean"))
def test_a_gradient_of_one_pixel_is_read_where_it_lies(layout: str, behind: str) -> None:
    x, w = random((2, 24, 9, 7), torch.float32, "cpu", layout), random((40, 24, 1, 1), torch.float32, "cpu")
    g = torch.tensor(0.25).expand(2, 40, 9, 7) if behind == "sum" else torch.randn(2, 40, 1, 1).expand(2, 40, 9, 7)
    with strictness(True):
        for map in ("grad_input", "grad_weight"):
            said = sepconv_ext.explain(x, w, map=map, grad_output=g)
            assert said.kernel == "cpu_pointwise_product", said
            assert map == "grad_weight" or "copied" not in said.reason, said  # it wants dense pixels, of one plane
        actual = maps_of(x, w, None, g, (1, 1))
    exact = torchs(x, w, None, g, (1, 1), torch.float64)
    for map in ("grad_input", "grad_weight"):
        torch.testing.assert_close(actual[map].double(), exact[map], rtol=1e-4, atol=1e-4)


# Of each rule of csrc/cpu/plan_pointwise.cpp, a call that it takes and one that it leaves to torch.
PLANS = (
    # (threads, layout, (N, C, K, size, stride), map), whether the product takes it
    ((1, "contiguous", (1, 64, 64, 7, 1), "forward"), True),
    ((1, "channels_last", (1, 64, 64, 7, 1), "grad_weight"), True),
    ((1, "contiguous", (1, 96, 24, 56, 1), "forward"), False),
    ((1, "contiguous", (1, 96, 24, 56, 1), "grad_input"), True),
    ((1, "contiguous", (1, 24, 96, 56, 1), "grad_input"), False),
    ((1, "channels_last", (1, 32, 96, 112, 1), "grad_input"), True),
    ((1, "channels_last", (1, 1024, 2048, 7, 1), "grad_input"), False),
    ((1, "channels_last", (1, 1024, 2048, 7, 1), "grad_weight"), True),
    ((1, "channels_last", (1, 128, 256, 28, 1), "grad_weight"), False),
    ((1, "contiguous", (1, 48, 104, 56, 2), "forward"), True),
    ((1, "contiguous", (1, 48, 104, 56, 2), "grad_weight"), True),
    ((1, "channels_last", (8, 96, 192, 56, 2), "grad_weight"), False),
    ((2, "contiguous", (8, 48, 288, 75, 1), "forward"), True),
    ((2, "contiguous", (8, 896, 2016, 14, 1), "forward"), False),
    ((2, "contiguous", (8, 40, 120, 28, 1), "grad_input"), True),
    ((2, "contiguous", (8, 1024, 1024, 14, 1), "grad_input"), False),
    ((2, "contiguous", (8, 80, 480, 14, 1), "grad_weight"), False),
    ((2, "contiguous", (1, 1024, 1024, 7, 1), "grad_weight"), True),
    ((2, "channels_last", (1, 384, 64, 14, 1), "forward"), True),
    ((2, "channels_last", (8, 64, 128, 56, 1), "forward"), False),
    ((2, "channels_last", (1, 256, 128, 56, 1), "grad_input"), True),
    ((2, "channels_last", (8, 64, 128, 56, 1), "grad_input"), False),
    ((2, "channels_last", (1, 104, 104, 28, 1), "grad_weight"), True),
    ((2, "channels_last", (8, 32, 16, 112, 1), "grad_weight"), False),
    ((1, "contiguous", (1, 128, 1, 32, 1), "forward"), False),  # MKL has code of its own for one output
    ((1, "channels_last", (8, 64, 2, 28, 1), "forward"), False),
    ((1, "channels_last", (1, 64, 1, 20, 1), "forward"), True),
    ((1, "contiguous", (1, 128, 1, 32, 1), "grad_weight"), False),
    ((1, "contiguous", (1, 128, 1, 32, 1), "grad_input"), True),
    ((1, "contiguous", (16, 48, 288, 28, 1), "forward"), True),  # from 16 images on torch takes oneDNN
)  # fmt: skip


@pytest.mark.parametrize(("call", "taken"), PLANS, ids=str)
def test_what_the_plan_gives_to_the_products(call: tuple, taken: bool) -> None:
    count, layout, (N, C, K, size, stride), map = call
    torch.set_num_threads(count)
    x = torch.empty(N, C, size, size).contiguous(memory_format=getattr(torch, f"{layout}_format", torch.channels_last))
    with strictness(False):
        said = sepconv_ext.explain(x, torch.empty(K, C, 1, 1), None, stride, map=map)
    assert said.kernel == ("cpu_pointwise_product" if taken else "aten"), said


def test_other_dtypes_and_asymmetric_padding_are_not_the_products() -> None:
    x, w = torch.randn(1, 24, 9, 9), torch.randn(40, 24, 1, 1)
    assert sepconv_ext.explain(x.double(), w.double()).kernel != "cpu_pointwise_product"
    with half_kernels(True, True):  # else in float32, as where it is small
        large = torch.empty(4, 64, 28, 28).bfloat16()
        assert sepconv_ext.explain(large, torch.empty(64, 64, 1, 1).bfloat16()).kernel != "cpu_pointwise_product"
    geometry = ((2, 2), (0, 1, 0, 2), (1, 1), 1)  # zeros below and to the right: outputs that read no pixel
    actual = ops.conv2d(x, w, None, *geometry, "identity")
    torch.testing.assert_close(actual, F.conv2d(F.pad(x, (0, 2, 0, 1)), w, None, 2), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_small_products_of_half_types_are_made_in_float32(dtype: torch.dtype, layout: str) -> None:
    """oneDNN's call costs more than the product, whether it has kernels of the type or not."""
    x, g = (random((4, c, 7, 7), dtype, "cpu", layout, seed=c) for c in (32, 40))
    w, b = random((40, 32, 1, 1), dtype, "cpu"), random((40,), dtype, "cpu")
    exact = torchs(*(t.double() for t in (x, w, b, g)), (1, 1), torch.float64)
    peer = torchs(x, w, b, g, (1, 1), torch.float32)
    with half_kernels(True, True), strictness(False):
        for map in MAPS:
            said = sepconv_ext.explain(x, w, b, map=map)
            assert said.kernel == "cpu_pointwise_product" and "rounded once" in said.reason, said
        sepconv_ext.reset_kernel_counts()
        actual = maps_of(x, w, b, g, (1, 1))
        assert sepconv_ext.kernel_counts() == {"cpu_pointwise_product": 3}
    for map in MAPS:
        assert actual[map].dtype == dtype
        assert_as_accurate(actual[map], peer[map].to(dtype), exact[map], map)


@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
@pytest.mark.parametrize("stride", (1, 2))
def test_second_derivatives(layout: str, stride: int) -> None:
    def second(conv, dtype: torch.dtype) -> list[Tensor]:
        x = random((2, 24, 9, 7), dtype, "cpu", layout, seed=1).requires_grad_()
        w = random((40, 24, 1, 1), dtype, "cpu", seed=2).requires_grad_()
        first = torch.autograd.grad(conv(x, w, None, stride).square().sum(), (x, w), create_graph=True)
        return torch.autograd.grad(sum(t.square().sum() for t in first), (x, w))

    sepconv_ext.reset_kernel_counts()
    ours, exact = second(functional.conv2d, torch.float32), second(F.conv2d, torch.float64)
    assert sepconv_ext.kernel_counts()["cpu_pointwise_product"] >= 4
    for actual, expected in zip(ours, exact, strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-3 * expected.abs().max().item())
