"""Factorising: the best approximation of each rank, known filters, dense layers into separable ones and back."""

from __future__ import annotations

import itertools
import runpy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from harness import random
from sepconv_ext.factorize import is_separable, merge, separable_from_conv, separate
from sepconv_ext.nn import DepthwiseConv2d, PointwiseConv2d, SeparableConv2d


def gaussian(size: int, sigma: float) -> torch.Tensor:
    x = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    g = torch.exp(-(x**2) / (2 * sigma**2))
    return g / g.sum()


SMOOTH, SLOPE = torch.tensor([1.0, 2.0, 1.0]), torch.tensor([-1.0, 0.0, 1.0])
RANK_ONE = {
    "box": (torch.full((5,), 0.2), torch.full((3,), 1 / 3)),
    "gaussian": (gaussian(7, 1.5).float(), gaussian(9, 2.0).float()),
    "sobel_x": (SMOOTH, SLOPE),
    "sobel_y": (SLOPE, SMOOTH),
    "negative": (-SMOOTH, SMOOTH),
    "one_pixel": (torch.tensor([2.0]), torch.tensor([-3.0])),
}
DISC = ((torch.arange(9)[:, None] - 4) ** 2 + (torch.arange(9) - 4) ** 2 <= 16).double()
LAPLACE = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]])


# ---- filters ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", RANK_ONE)
def test_known_filters_come_apart_exactly(name: str, dtype: torch.dtype) -> None:
    column, row = (t.to(dtype) for t in RANK_ONE[name])
    kernel = column[:, None] * row
    parts = separate(kernel)
    assert parts.column.dtype == parts.row.dtype == dtype
    assert is_separable(kernel)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(parts.column[0][:, None] * parts.row[0], kernel, rtol=4 * eps, atol=4 * eps)
    # The factors themselves, up to a scale that the two share evenly and a sign that the column decides.
    c, r = parts.column[0].double(), parts.row[0].double()
    assert c[(c.abs() > 0.99 * c.abs().max()).int().argmax()] > 0
    torch.testing.assert_close(c.norm(), r.norm(), rtol=4 * eps, atol=0)
    assert abs(torch.cosine_similarity(c, column.double(), dim=0)) > 1 - 4 * eps
    assert abs(torch.cosine_similarity(r, row.double(), dim=0)) > 1 - 4 * eps


def test_a_tolerance_of_zero_is_met_where_nothing_is_left_out() -> None:
    assert is_separable(torch.ones(1, 5), tolerance=0.0) and is_separable(torch.zeros(3, 3), tolerance=0.0)


@pytest.mark.parametrize("kernel", [DISC, LAPLACE], ids=["disc", "laplace"])
def test_filters_of_a_higher_rank_are_told(kernel: torch.Tensor) -> None:
    assert not is_separable(kernel)
    error = float(separate(kernel).error)
    assert is_separable(kernel, tolerance=1.01 * error) and not is_separable(kernel, tolerance=0.99 * error)
    assert not is_separable(torch.stack([torch.ones_like(kernel), kernel]))  # all must be
    assert is_separable(torch.stack([torch.ones_like(kernel), 2 * torch.ones_like(kernel)]))


@pytest.mark.parametrize("size", [(5, 5), (3, 7), (6, 2), (1, 4), (4, 3, 5), (2, 3, 4, 4)], ids=str)
def test_the_error_is_that_of_the_sum_of_pairs(size: tuple[int, ...]) -> None:
    kernel = torch.randn(size, dtype=torch.float64)
    most = min(size[-2:])
    previous = torch.inf
    for rank in range(1, most + 1):
        parts = separate(kernel, rank)
        assert parts.column.shape == (rank, *size[:-1]) and parts.row.shape == (rank, *size[:-2], size[-1])
        assert parts.error.shape == size[:-2] and parts.errors.shape == (most, *size[:-2])
        left = kernel - torch.einsum("i...r,i...s->...rs", parts.column, parts.row)
        measured = left.norm(dim=(-2, -1)) / kernel.norm(dim=(-2, -1))
        torch.testing.assert_close(parts.error, measured, rtol=1e-9, atol=1e-14)
        torch.testing.assert_close(parts.error, parts.errors[rank - 1])
        assert (parts.error < previous).all()
        previous = parts.error
    assert (previous < 1e-14).all()


def test_no_other_pair_is_nearer() -> None:
    """Gradient descent on a column and a row, from where it likes to start, ends no nearer than the SVD."""
    kernel = torch.randn(5, 4, dtype=torch.float64)
    best = separate(kernel).error * kernel.norm()
    column, row = (torch.randn(n, dtype=torch.float64, requires_grad=True) for n in (5, 4))
    optimizer = torch.optim.LBFGS([column, row], max_iter=200)

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        left = (kernel - column[:, None] * row).square().sum()
        left.backward()
        return left

    optimizer.step(loss)
    assert loss().sqrt() >= best * (1 - 1e-9)


def test_a_zero_filter_has_no_error() -> None:
    parts = separate(torch.zeros(2, 3, 3), rank=2)
    assert (parts.errors == 0).all() and (parts.column == 0).all() and (parts.row == 0).all()


def test_what_separate_refuses() -> None:
    with pytest.raises(ValueError, match=r"rank must be 1 to min\(R, S\) = 3, but is 4"):
        separate(torch.ones(3, 5), rank=4)
    with pytest.raises(ValueError, match="but is 0"):
        separate(torch.ones(3, 5), rank=0)
    with pytest.raises(ValueError, match="at least 2 dimensions"):
        separate(torch.ones(3))


# ---- dense layers ----------------------------------------------------------------------------------------------------

DENSE = {
    "plain": dict(in_channels=5, out_channels=7, kernel_size=3, padding=1),
    "strided": dict(in_channels=3, out_channels=4, kernel_size=(3, 5), stride=(2, 1), padding=(1, 4), dilation=(1, 2)),
    "same": dict(in_channels=4, out_channels=20, kernel_size=(2, 4), padding="same", bias=False),
    "reflect": dict(in_channels=2, out_channels=3, kernel_size=3, padding=1, padding_mode="reflect"),
    "one_output": dict(in_channels=4, out_channels=1, kernel_size=3),
    "pointwise": dict(in_channels=4, out_channels=6, kernel_size=1),
}


def dense(name: str) -> tuple[nn.Conv2d, torch.Tensor]:
    conv = nn.Conv2d(**DENSE[name]).double()
    return conv, random((2, conv.in_channels, 11, 10), torch.float64, "cpu")


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_full_multiplier_is_exact(name: str) -> None:
    conv, x = dense(name)
    most = min(conv.out_channels, conv.kernel_size[0] * conv.kernel_size[1])
    layer, error, errors = separable_from_conv(conv.eval(), multiplier=most)
    assert error < 1e-14 and len(errors) == most and not layer.training
    torch.testing.assert_close(layer(x), conv(x), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", DENSE)
def test_the_error_against_the_multiplier(name: str) -> None:
    """It is the distance of the merged weight, falls with every multiplier, and agrees between calls."""
    conv, _ = dense(name)
    previous = torch.inf
    for multiplier, expected in enumerate(separable_from_conv(conv).errors, start=1):
        layer, error, _ = separable_from_conv(conv, multiplier)
        distance = (merge(layer).weight - conv.weight).norm() / conv.weight.norm()
        torch.testing.assert_close(distance.item(), error, rtol=1e-9, atol=1e-14)
        assert error == expected and error < previous
        previous = error


def test_no_nearer_layer_of_the_same_multiplier() -> None:
    """Training the separable layer towards the dense weight does not come nearer."""
    conv = nn.Conv2d(3, 6, 3, bias=False).double()
    layer, error, _ = separable_from_conv(conv, 2)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    depthwise, pointwise = layer.depthwise.weight, layer.pointwise.weight
    optimizer = torch.optim.LBFGS([depthwise, pointwise], max_iter=300)

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        weight = torch.einsum("kct,ctrs->kcrs", pointwise.view(6, 3, 2), depthwise.view(3, 2, 3, 3))
        left = (weight - conv.weight.detach()).square().sum()
        left.backward()
        return left

    before = loss().sqrt() / conv.weight.norm()
    optimizer.step(loss)
    after = loss().sqrt() / conv.weight.norm()
    assert before > after >= error * (1 - 1e-9)


def test_the_sizes_of_the_closed_formula() -> None:
    conv = nn.Conv2d(8, 16, (3, 5), bias=False)
    layer, _, _ = separable_from_conv(conv, 2)
    assert sum(p.numel() for p in layer.parameters()) == 8 * 15 * 2 + 8 * 2 * 16


def test_a_separable_layer_stays_itself() -> None:
    """A dense layer that was merged from multiplier 2 comes apart with multiplier 2, without error."""
    pair = nn.Sequential(DepthwiseConv2d(4, 3, padding=1, multiplier=2, bias=False), PointwiseConv2d(8, 9)).double()
    _, _, errors = separable_from_conv(merge(pair))
    assert errors[0] > 1e-3 and max(errors[1:]) < 1e-14


def test_what_separable_from_conv_refuses() -> None:
    with pytest.raises(ValueError, match=r"multiplier must be 1 to min\(K, R \* S\) = 9, but is 10"):
        separable_from_conv(nn.Conv2d(3, 16, 3), 10)
    with pytest.raises(ValueError, match=r"dense \(groups = 1\), but has groups = 2"):
        separable_from_conv(nn.Conv2d(4, 4, 3, groups=2))
    with pytest.raises(TypeError, match="but is a Linear"):
        separable_from_conv(nn.Linear(3, 3))


# ---- merging ---------------------------------------------------------------------------------------------------------


def pairs():
    biases = list(itertools.product((True, False), repeat=2))
    for (first, second), padding, stride, multiplier in itertools.product(biases, (0, (2, 1)), (1, 2), (1, 3)):
        depthwise = dict(kernel_size=(3, 2), padding=padding, stride=stride, dilation=(1, 2), bias=first)
        yield dict(depthwise, multiplier=multiplier), dict(bias=second)
    yield dict(kernel_size=3, padding="same"), dict(stride=2)
    yield dict(kernel_size=3, padding="same"), dict(stride=(1, 3), padding="valid")
    yield dict(kernel_size=3, padding=1, stride=2, padding_mode="circular"), dict(stride=2)
    yield dict(kernel_size=2, padding="same"), dict(groups=2)
    yield dict(kernel_size=3, multiplier=2), dict(groups=4)
    yield dict(kernel_size=1, stride=2, bias=False), dict(padding=(2, 1), stride=(1, 2))
    yield dict(kernel_size=1, bias=False, padding_mode="reflect"), dict(padding=1)


@pytest.mark.parametrize("depthwise,pointwise", list(pairs()), ids=str)
def test_merge_equals_the_pair(depthwise: dict, pointwise: dict) -> None:
    first = DepthwiseConv2d(4, **depthwise)
    second = nn.Conv2d(first.out_channels, 12, 1, **pointwise)
    pair = nn.Sequential(first, nn.Identity(), second).double().eval()
    x = random((2, 4, 11, 12), torch.float64, "cpu")
    merged = merge(pair)
    assert type(merged) is nn.Conv2d and merged.groups == second.groups and not merged.training
    assert (merged.bias is None) == (first.bias is None and second.bias is None)
    torch.testing.assert_close(merged(x), pair(x), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_merge_of_a_separable_layer(bias: bool, stride: int) -> None:
    layer = SeparableConv2d(4, 7, 3, stride=stride, multiplier=2, bias=bias).double()
    x = random((2, 4, 9, 8), torch.float64, "cpu")
    torch.testing.assert_close(merge(layer)(x), layer(x), rtol=1e-10, atol=1e-12)


def test_merge_keeps_dtype_and_takes_no_part_in_autograd() -> None:
    pair = nn.Sequential(DepthwiseConv2d(4, 3, dtype=torch.bfloat16), PointwiseConv2d(4, 5, dtype=torch.bfloat16))
    merged = merge(pair)
    assert merged.weight.dtype == merged.bias.dtype == torch.bfloat16
    assert merged.weight.is_leaf and merged.weight.requires_grad


D, P = DepthwiseConv2d(4, 3), PointwiseConv2d(4, 5)
REFUSED = {
    "relu": (nn.Sequential(D, nn.ReLU(), P), ValueError, "a pair with a ReLU"),
    "relu_behind": (nn.Sequential(D, P, nn.ReLU()), ValueError, "a pair with a ReLU"),
    "batch_norm": (nn.Sequential(D, nn.BatchNorm2d(4), P), ValueError, "BatchNorm2d: fold or remove it first"),
    "fused": (nn.Sequential(DepthwiseConv2d(4, 3, activation="relu6"), P), ValueError, "activation is 'relu6'"),
    "fused_behind": (nn.Sequential(D, PointwiseConv2d(4, 5, activation="silu")), ValueError, "activation is 'silu'"),
    "not_depthwise": (nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), P), ValueError, "depthwise .*groups = 2"),
    "not_pointwise": (nn.Sequential(D, nn.Conv2d(4, 5, 3)), ValueError, "must be 1x1 on 4 channels, but is 3x3 on 4"),
    "channels": (nn.Sequential(D, PointwiseConv2d(8, 5)), ValueError, "on 4 channels, but is 1x1 on 8"),
    "padding": (nn.Sequential(D, nn.Conv2d(4, 5, 1, padding=1)), ValueError, "pads the result of the first"),
    "padding_and_bias": (
        nn.Sequential(DepthwiseConv2d(4, 1), nn.Conv2d(4, 5, 1, padding=1)),
        ValueError,
        "pads the result of the first",
    ),
    "uneven_same": (
        nn.Sequential(DepthwiseConv2d(4, 2, padding="same"), nn.Conv2d(4, 5, 1, stride=2)),
        ValueError,
        "pads unevenly",
    ),
    "groups": (
        nn.Sequential(DepthwiseConv2d(2, 3, multiplier=2), nn.Conv2d(4, 4, 1, groups=4)),
        ValueError,
        "4 groups",
    ),
    "separable": (SeparableConv2d(4, 5, 3, activation="relu"), ValueError, "an activation: activation is 'relu'"),
    "separable_between": (
        SeparableConv2d(4, 5, 3, depthwise_activation="relu"),
        ValueError,
        "depthwise_activation is 'relu'",
    ),
    "separable_norm": (SeparableConv2d(4, 5, 3, norm="batch"), ValueError, "a pair with a BatchNorm2d"),
    "one": (nn.Sequential(D), TypeError, "must hold two convolutions"),
    "three": (nn.Sequential(D, P, P), TypeError, "must hold two convolutions"),
    "not_a_pair": (nn.Conv2d(4, 4, 3), TypeError, "but is a Conv2d"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_merge_refuses_what_no_convolution_equals(name: str) -> None:
    pair, error, words = REFUSED[name]
    with pytest.raises(error, match=words):
        merge(pair)


def test_depthwise_bias_under_padding_is_exact_and_f_conv2d_agrees() -> None:
    """The bias is added where the depthwise result is, also next to the border: the padding is before it."""
    depthwise = torch.ones(1, 1, 3, 3)
    pair = nn.Sequential(DepthwiseConv2d(1, 3, padding=1), PointwiseConv2d(1, 1, bias=False))
    with torch.no_grad():
        pair[0].weight.copy_(depthwise)
        pair[0].bias.fill_(10)
        pair[1].weight.fill_(2)
        y = merge(pair)(torch.ones(1, 1, 3, 3))
    torch.testing.assert_close(y, 2 * (F.conv2d(torch.ones(1, 1, 3, 3), depthwise, padding=1) + 10))


# ---- the example -----------------------------------------------------------------------------------------------------


def test_the_example_separates_a_photographs_blur(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for needed in ("matplotlib", "skimage"):
        pytest.importorskip(needed)
    example = runpy.run_path(str(Path(__file__).parent.parent / "examples" / "separate_blur.py"))
    results = example["main"](tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 50_000
    assert results["Gaussian"].filter_errors[0] < 1e-6 and results["Gaussian"].image_errors[0] < 1e-5
    for name in ("out of focus", "moving camera"):
        result = results[name]
        assert result.filter_errors[0] > 0.1 and result.filter_errors == sorted(result.filter_errors, reverse=True)
        assert result.image_errors[-1] < 0.1 * result.image_errors[0]
    assert "Gaussian       within 1% with 1 pair(s), 42 products a pixel (dense: 441)" in capsys.readouterr().out


def test_what_has_no_real_singular_values_is_refused_by_name() -> None:
    for of in (is_separable, separate):
        with pytest.raises(ValueError, match=r"kernel must have at least 2 dimensions .* but has 0"):
            of(torch.tensor(1.0))
        for dtype in (torch.int64, torch.complex64):
            with pytest.raises(TypeError, match=f"kernel must be real floating point, but is {dtype}"):
                of(torch.ones(3, 3, dtype=dtype))
    with pytest.raises(TypeError, match=r"conv.weight must be real"):
        separable_from_conv(nn.Conv2d(2, 3, 3, dtype=torch.complex64))
    pair = nn.Sequential(nn.Conv2d(2, 2, 3, groups=2), nn.Conv2d(2, 3, 1)).to(torch.complex64)
    with pytest.raises(TypeError, match=r"depthwise.weight must be real"):
        merge(pair)
