"""The modules: true nn.Conv2d's, with the same state, the same printed form and the same outputs."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cases import BY_NAME
from harness import ACTIVATIONS, only_our_kernels, random
from sepconv_ext import functional, reference
from sepconv_ext.nn import Conv2d, DepthwiseConv2d, PointwiseConv2d

ARGUMENTS = [
    dict(in_channels=6, out_channels=6, kernel_size=3, groups=6),
    dict(in_channels=6, out_channels=12, kernel_size=(3, 5), stride=2, padding=(1, 2), groups=6, bias=False),
    dict(in_channels=6, out_channels=4, kernel_size=3, padding="same", dilation=2, groups=2),
    dict(in_channels=6, out_channels=4, kernel_size=2, padding="same", groups=2),
    dict(in_channels=6, out_channels=8, kernel_size=1, padding="valid"),
    dict(in_channels=6, out_channels=8, kernel_size=(3, 2), stride=(1, 2), padding=1, dilation=(2, 1)),
]


def twins(arguments: dict, **more) -> tuple[nn.Conv2d, Conv2d]:
    """torch's layer and ours from one seed."""
    made = []
    for cls in (nn.Conv2d, Conv2d):
        torch.manual_seed(1)
        made.append(cls(**arguments, **more))
    return made[0], made[1]


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
def test_conv2d_is_a_conv2d(arguments: dict, padding_mode: str, device: str) -> None:
    theirs, ours = twins(arguments, padding_mode=padding_mode, device=device)
    assert isinstance(ours, nn.Conv2d)
    assert repr(ours) == repr(theirs)
    assert ours.__dict__.keys() == theirs.__dict__.keys()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor)  # one seed, one initialisation
    ours.load_state_dict(theirs.state_dict())

    for size in ((2, 6, 9, 8), (6, 9, 8)):
        x = random(size, torch.float32, device).requires_grad_()
        with only_our_kernels():
            y = ours(x)
        z = theirs(x)
        torch.testing.assert_close(y, z)
        assert y.stride() == z.stride()
        g = torch.randn_like(z)
        ours_grads = torch.autograd.grad(y, (x, *ours.parameters()), g)
        for a, b in zip(ours_grads, torch.autograd.grad(z, (x, *theirs.parameters()), g), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
@pytest.mark.parametrize("multiplier", [1, 3])
def test_depthwise(multiplier: int, padding_mode: str, activation: str, device: str) -> None:
    ours = DepthwiseConv2d(
        6,
        (3, 5),
        stride=2,
        padding=(1, 2),
        multiplier=multiplier,
        padding_mode=padding_mode,
        activation=activation,
        device=device,
    )
    theirs = nn.Conv2d(6, 6 * multiplier, (3, 5), 2, (1, 2), groups=6, padding_mode=padding_mode, device=device)
    theirs.load_state_dict(ours.state_dict())
    x = random((2, 6, 9, 8), torch.float32, device)
    with only_our_kernels():
        y = ours(x)
    torch.testing.assert_close(y, reference.ACTIVATIONS[activation](theirs(x)))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False])
def test_pointwise(bias: bool, activation: str, device: str) -> None:
    ours = PointwiseConv2d(6, 10, bias=bias, activation=activation, device=device)
    theirs = nn.Conv2d(6, 10, 1, bias=bias, device=device)
    theirs.load_state_dict(ours.state_dict())
    x = random((2, 6, 5, 7), torch.float32, device)
    with only_our_kernels():
        y = ours(x)
    torch.testing.assert_close(y, reference.ACTIVATIONS[activation](theirs(x)))


def test_defaults_and_dtype() -> None:
    layer = DepthwiseConv2d(8, 3, dtype=torch.float64)
    assert (layer.stride, layer.padding, layer.dilation) == ((1, 1), (0, 0), (1, 1))
    assert (layer.groups, layer.out_channels, layer.activation) == (8, 8, "identity")
    assert layer.weight.shape == (8, 1, 3, 3) and layer.bias is not None
    assert layer.weight.dtype == layer.bias.dtype == torch.float64
    assert DepthwiseConv2d(8, 3, bias=False).bias is None
    pointwise = PointwiseConv2d(8, 4, device="meta")
    assert pointwise.weight.shape == (4, 8, 1, 1) and pointwise.weight.is_meta


def test_printed_form_names_the_activation() -> None:
    assert repr(DepthwiseConv2d(4, 3, activation="silu")).endswith("groups=4, activation=silu)")
    assert "activation" not in repr(DepthwiseConv2d(4, 3))
    assert repr(PointwiseConv2d(4, 2, activation="relu")).startswith("PointwiseConv2d(4, 2, kernel_size=(1, 1)")


@pytest.mark.parametrize("activation", ["swish", "", "Relu"])
def test_unknown_activation(activation: str) -> None:
    with pytest.raises(ValueError, match="activation"):
        DepthwiseConv2d(4, 3, activation=activation)(torch.zeros(1, 4, 5, 5))


@pytest.mark.parametrize(
    "layer",
    [
        Conv2d(4, 4, 3, groups=2),
        DepthwiseConv2d(4, 3, padding=1, activation="gelu"),
        PointwiseConv2d(4, 2, activation="tanh"),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_copies_and_pickles(layer: nn.Module) -> None:
    x = random((1, 4, 6, 6), torch.float32, "cpu")
    saved = io.BytesIO()
    torch.save(layer, saved)
    saved.seek(0)
    loaded = torch.load(saved, weights_only=False)
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), loaded):
        assert type(copied) is type(layer) and repr(copied) == repr(layer)
        with only_our_kernels():
            assert torch.equal(copied(x), layer(x))


def test_training_step_moves_the_weights_as_torch_does(device: str) -> None:
    case = BY_NAME["depthwise_k3"]
    arguments = dict(in_channels=case.C, out_channels=case.K, kernel_size=3, padding=1, groups=case.C)
    theirs, ours = twins(arguments, device=device)
    x = random(case.input_size, torch.float32, device)
    for layer in (theirs, ours):
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            F.mse_loss(layer(x), x).backward()
            optimizer.step()
    torch.testing.assert_close(ours.weight, theirs.weight)
    torch.testing.assert_close(ours.bias, theirs.bias)
    assert ours.weight.grad.stride() == ours.weight.stride()


@pytest.mark.parametrize("padding", [1, "same"])
def test_trace_and_fx(padding: int | str) -> None:
    """A traced and a symbolically traced module still call our op."""
    layer = nn.Sequential(DepthwiseConv2d(4, 3, padding=padding, activation="relu"), PointwiseConv2d(4, 6))
    x = random((1, 4, 6, 6), torch.float32, "cpu")
    with torch.no_grad():
        traced = torch.jit.trace(layer, x)
    graph = torch.fx.symbolic_trace(layer)
    for form in (traced, graph):
        with only_our_kernels(at_least=2):
            y = form(x)
        torch.testing.assert_close(y, layer(x))


@pytest.mark.parametrize("changed", [dict(padding=(0, 0)), dict(dilation=(2, 2)), dict(stride=(2, 2))], ids=str)
@pytest.mark.parametrize("padding", [1, "same"])
def test_what_changes_after_construction_pads_as_in_torch(padding: int | str, changed: dict) -> None:
    """torch pads other than by zeros by what padding and dilation were in the beginning."""
    theirs, ours = (cls(4, 4, 3, padding=padding, groups=4, padding_mode="reflect") for cls in (nn.Conv2d, Conv2d))
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 4, 9, 9)
    for layer in (theirs, ours):
        for name, value in changed.items():
            setattr(layer, name, value)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("layer", ["separable", "spatial"])
def test_traced_with_padding_same(layer: str) -> None:
    x, w, p = torch.randn(1, 4, 9, 9), torch.randn(4, 1, 3, 3), torch.randn(4, 4, 1, 1)

    def call(x: torch.Tensor) -> torch.Tensor:
        if layer == "separable":
            return functional.separable_conv2d(x, w, p, padding="same")
        return functional.spatial_separable_conv2d(x, w[:, 0, 0], w[:, 0, 0], padding="same")

    traced, other = torch.jit.trace(call, x), torch.randn(2, 4, 7, 8)
    torch.testing.assert_close(traced(other), call(other))


@pytest.mark.parametrize("mode", ("zeros", "reflect", "replicate", "circular"))
def test_channels_last_stays_channels_last_under_every_padding_mode(mode: str) -> None:
    layer = Conv2d(4, 4, 3, padding=1, groups=4, padding_mode=mode)
    x = torch.randn(2, 4, 8, 8).contiguous(memory_format=torch.channels_last)
    assert layer(x).is_contiguous(memory_format=torch.channels_last)
