"""The packed 1x1 products of frozen networks: against float64, in every layout, on every instruction set."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import sepconv_ext
from harness import ACTIVATIONS, LAYOUTS, assert_as_accurate, random, with_layout
from sepconv_ext import reference

ops = torch.ops.sepconv_ext

# (N, C, H, W, K): one channel, one row, one pixel; vectors and panels not full; more pixels and more weight than a
# block of either holds; unrolled terms with some left over, in one chain and in the last of three; half a vector of
# outputs left over, behind a whole one and alone, full or not; pixels a page apart; few outputs; nothing.
SIZES = (
    (2, 24, 7, 7, 58),
    (1, 1, 19, 5, 3),
    (3, 58, 1, 19, 16),
    (1, 3, 19, 19, 24),
    (5, 40, 1, 1, 200),
    (1, 33, 31, 30, 33),
    (2, 640, 14, 14, 48),
    (1, 99, 7, 5, 40),
    (1, 614, 4, 4, 21),
    (2, 40, 5, 6, 20),
    (1, 16, 4, 5, 104),
    (1, 1024, 3, 5, 264),
    (2, 40, 5, 7, 1),
    (1, 256, 3, 5, 4),
    (0, 8, 4, 4, 8),
)
by_size = pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
by_layout = pytest.mark.parametrize("layout", LAYOUTS)


def operands(size: tuple[int, ...], layout: str, stride: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Input, weight, bias, and a residual in the layout of the input."""
    N, C, H, W, K = size
    x = random((N, C, H, W), torch.float32, "cpu", layout, seed=1)
    w = random((K, C, 1, 1), torch.float32, "cpu", seed=2)
    output = (N, K, (H - 1) // stride + 1, (W - 1) // stride + 1)
    return x, w, random((K,), torch.float32, "cpu", seed=3), random(output, torch.float32, "cpu", layout, seed=4)


def run(x: Tensor, w: Tensor, b: Tensor | None, r: Tensor | None, stride: int = 1, act: str = "identity") -> Tensor:
    packed = ops.pack_pointwise(w)
    sepconv_ext.reset_kernel_counts()
    y = ops.packed_pointwise(x, packed, b, r, w.shape[0], (stride, stride), act)
    assert sepconv_ext.kernel_counts() == ({"cpu_pointwise_product": 1} if y.numel() else {})
    return y


def check(y: Tensor, x: Tensor, w: Tensor, b: Tensor | None, r: Tensor | None, stride: int, act: str) -> None:
    def summed(dtype: torch.dtype) -> Tensor:
        y = F.conv2d(x.to(dtype), w.to(dtype), None if b is None else b.to(dtype), stride)
        return y if r is None else y + r.to(dtype)

    exact = summed(torch.float64)
    activate = reference.ACTIVATIONS[act]
    assert_as_accurate(y, activate(summed(torch.float32)), activate(exact), act, summed=exact)


@by_layout
@by_size
@pytest.mark.parametrize("stride", [1, 2])
def test_against_float64(size, layout, stride, isa):
    x, w, b, r = operands(size, layout, stride)
    for bias, residual in ((b, None), (None, r), (b, r)):
        y = run(x, w, bias, residual, stride)
        check(y, x, w, bias, residual, stride, "identity")
    assert not y.numel() or y.stride() == F.conv2d(x, w, stride=stride).stride()


@by_layout
@pytest.mark.parametrize("outputs", [58, 24, 1])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation, outputs, layout, isa):
    x, w, b, r = operands((2, 24, 7, 7, outputs), layout)
    check(run(x, w, b, r, 1, activation), x, w, b, r, 1, activation)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("size", [(2, 24, 30, 31, 58), (1, 640, 7, 7, 600), (1, 800, 1, 1, 1000)], ids=str)
def test_results_do_not_depend_on_threads(size, layout):
    x, w, b, r = operands(size, layout)
    packed, results = ops.pack_pointwise(w), []
    for count in (1, 2, 3, 8):
        torch.set_num_threads(count)
        assert torch.equal(ops.pack_pointwise(w), packed)
        results.append(ops.packed_pointwise(x, packed, b, r, w.shape[0], (1, 1), "relu6"))
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_panels():
    w = random((40, 7, 1, 1), torch.float32, "cpu")
    packed = ops.pack_pointwise(w)
    assert packed.shape == (3, 7, 16)
    unpacked = packed.transpose(1, 2).reshape(48, 7)
    assert torch.equal(unpacked[:40], w.view(40, 7)) and not unpacked[40:].any()
    strided = with_layout(w, "strided")
    assert torch.equal(ops.pack_pointwise(strided), packed)
    assert torch.equal(ops.pack_pointwise(w.view(40, 7).t().contiguous().t().view(40, 7, 1, 1)), packed)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_slices_of_channels(layout, isa):
    """Input, residual and result are slices of wider tensors, which keep what stands beside them."""
    x, w, b, r = operands((2, 24, 7, 19, 58), layout)
    wide_x = with_layout(torch.full((2, 40, 7, 19), float("nan")), layout)
    wide_x[:, 3:27] = x
    wide_y = with_layout(torch.full((2, 70, 7, 19), 7.0), layout)
    wide_y[:, 5:63] = r
    out = wide_y[:, 5:63]
    ops.packed_pointwise.out(wide_x[:, 3:27], ops.pack_pointwise(w), b, out, 58, (1, 1), "silu", out=out)
    check(out, x, w, b, r, 1, "silu")
    assert (wide_y[:, :5] == 7).all() and (wide_y[:, 63:] == 7).all()


def test_not_a_number_stays_in_its_pixel(isa):
    x, w, b, _ = operands((1, 24, 7, 7, 58), "channels_last")
    x[0, 3, 2, 4] = float("nan")
    for layout in ("contiguous", "channels_last"):
        y = run(with_layout(x, layout), w, b, None, 1, "relu6")
        bad = y.isnan().any(1)[0]
        assert bad[2, 4] and bad.sum() == 1 and y[0, :, 2, 4].isnan().all()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_op_in_torchs_machinery(layout):
    x, w, b, r = operands((2, 24, 7, 7, 58), layout)
    torch.library.opcheck(ops.pack_pointwise.default, (w,))
    torch.library.opcheck(ops.packed_pointwise.default, (x, ops.pack_pointwise(w), b, r, 58, [1, 1], "relu"))
    torch.library.opcheck(ops.packed_pointwise.default, (x, ops.pack_pointwise(w), None, None, 58, [2, 3], "silu"))


def test_no_derivative_is_an_error():
    x, w, b, _ = operands((1, 3, 4, 4, 8), "contiguous")
    y = ops.packed_pointwise(x.requires_grad_(), ops.pack_pointwise(w), b, None, 8, (1, 1), "identity")
    with pytest.raises(RuntimeError, match="not implemented"):
        y.sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": torch.zeros(1, 24, 7, 7, dtype=torch.float64)}, "input must be float32, but is Double"),
        ({"input": torch.zeros(24, 7, 7)}, "input must have 4 dimensions, but has 3"),
        ({"input": torch.zeros(1, 25, 7, 7)}, r"packed must be contiguous, of size \[4, 25, 16\]"),
        ({"out_channels": 65}, r"packed must be contiguous, of size \[5, 24, 16\]"),
        ({"bias": torch.zeros(57)}, r"bias must have size \[58\]"),
        ({"residual": torch.zeros(1, 58, 7, 1)}, r"residual must have the result's size \[1, 58, 7, 7\]"),
        ({"stride": (0, 1)}, "stride must be at least 1"),
        ({"activation": "swish"}, "activation"),
        ({"out": torch.zeros(1, 58, 7, 14)[..., ::2]}, "output must have dense planes"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_errors(change, message):
    arguments = {
        "input": torch.zeros(1, 24, 7, 7),
        "packed": torch.zeros(4, 24, 16),
        "bias": None,
        "residual": None,
        "out_channels": 58,
        "stride": (1, 1),
        "activation": "identity",
    } | change
    op = ops.packed_pointwise.out if "out" in change else ops.packed_pointwise
    with pytest.raises((RuntimeError, ValueError), match=message):
        op(**arguments)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.zeros(8, 3, 3, 3), "weight must have a kernel of 1x1, but has 3x3"),
        (torch.zeros(8, 3), "weight must have 4 dimensions, but has 2"),
        (torch.zeros(8, 3, 1, 1, dtype=torch.float16), "weight must be float32, but is Half"),
    ],
)
def test_errors_of_packing(weight, message):
    with pytest.raises(RuntimeError, match=message):
        ops.pack_pointwise(weight)
