"""What a call returns is a tensor of its own, as torch's is: no view that autograd or a graph could see.

A view made above autograd loses its hooks to an in-place use, refuses `+=` after no_grad, and takes no detach_().
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

import sepconv_ext
from sepconv_ext import functional


class Call(NamedTuple):
    name: str
    run: Callable[..., Tensor]  # of an input and weights
    input: tuple[int, ...]  # batched
    weights: tuple[tuple[int, ...], ...]


CALLS = (
    Call("conv2d", lambda x, w, b: functional.conv2d(x, w, b, 1, 1, 1, 8), (2, 8, 9, 7), ((8, 1, 3, 3), (8,))),
    Call("conv2d_same", lambda x, w: functional.conv2d(x, w, padding="same"), (2, 3, 9, 7), ((5, 3, 4, 3),)),
    Call("pointwise", lambda x, w: functional.pointwise_conv2d(x, w), (2, 8, 9, 7), ((24, 8, 1, 1),)),
    Call("one_pixel", lambda x, w: functional.pointwise_conv2d(x, w), (2, 8, 1, 1), ((24, 8, 1, 1),)),
    Call("dense", lambda x, w: functional.conv2d(x, w, padding=1), (2, 64, 19, 19), ((64, 64, 3, 3),)),
    Call(
        "depthwise_gelu",
        lambda x, w: functional.depthwise_conv2d(x, w, activation="gelu"),
        (2, 8, 9, 7),
        ((16, 1, 3, 3),),
    ),
    Call(
        "reflect",
        lambda x, w: functional.padded_conv2d(x, w, None, 1, 1, 1, 8, padding_mode="reflect"),
        (2, 8, 9, 7),
        ((8, 1, 3, 3),),
    ),
    Call("conv1d", lambda x, w, b: functional.conv1d(x, w, b, 1, 1, 1, 8), (2, 8, 19), ((8, 1, 3), (8,))),
    Call("conv1d_causal", lambda x, w: functional.conv1d(x, w, None, 1, "causal", 2, 8), (2, 8, 19), ((8, 1, 4),)),
    Call("conv1d_pointwise", lambda x, w: functional.conv1d(x, w), (2, 8, 19), ((24, 8, 1),)),
    Call("conv1d_one_step", lambda x, w: functional.conv1d(x, w), (2, 8, 1), ((24, 8, 1),)),
    Call("conv1d_dense", lambda x, w: functional.conv1d(x, w), (2, 64, 190), ((64, 64, 3),)),
    Call(
        "conv1d_circular",
        lambda x, w: functional.padded_conv1d(x, w, None, 1, (1,), 1, 8, padding_mode="circular"),
        (2, 8, 19),
        ((8, 1, 3),),
    ),
    Call(
        "separable",
        lambda x, d, p: functional.separable_conv2d(x, d, p, padding=1, depthwise_activation="relu"),
        (2, 8, 9, 7),
        ((8, 1, 3, 3), (5, 8, 1, 1)),
    ),
    Call(
        "separable_of_two_calls",
        lambda x, d, p: functional.separable_conv2d(x, d, p, padding="same"),
        (2, 8, 9, 7),
        ((16, 1, 4, 7), (5, 16, 1, 1)),
    ),
    Call("spatial", functional.spatial_separable_conv2d, (2, 8, 9, 7), ((8, 3), (8, 3))),
    Call("spatial_shared", lambda x, c, r: functional.spatial_separable_conv2d(x, c, r, 1), (2, 8, 9, 7), ((3,), (3,))),
)
ORDERS = ("contiguous", "channels_last", "unbatched")
by_call = pytest.mark.parametrize("call", CALLS, ids=[call.name for call in CALLS])
by_order = pytest.mark.parametrize("order", ORDERS)


def inputs_of(call: Call, order: str, device: str, grad: bool = True) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    tensors = [torch.randn(size, generator=generator).to(device) for size in (call.input, *call.weights)]
    if order == "channels_last":
        tensors[0] = tensors[0].movedim(1, -1).contiguous().movedim(-1, 1)
    if order == "unbatched":
        tensors[0] = tensors[0][0].clone()
    return [t.requires_grad_(grad) for t in tensors]


def assert_own(t: Tensor) -> None:
    assert not t._is_view()
    assert t.untyped_storage().nbytes() == t.numel() * t.element_size()  # not a part of something larger either


def assert_behaves_as_torchs(run: Callable[..., Tensor], tensors: list[Tensor]) -> None:
    """What torch's own results take: hooks beside in-place use, `+=` after no_grad, detach_()."""
    y = run(*tensors)
    assert_own(y)
    seen = []
    y.register_hook(seen.append)
    before = y.detach().clone()
    y.relu_()
    y.sum().backward()
    assert len(seen) == 1
    torch.testing.assert_close(seen[0], (before > 0).to(before.dtype))
    with torch.no_grad():
        z = run(*tensors)
    z += tensors[1].sum()
    assert z.requires_grad
    run(*tensors).detach_()


@by_order
@by_call
def test_functions(call: Call, order: str, device: str) -> None:
    assert_behaves_as_torchs(call.run, inputs_of(call, order, device))


@by_order
@by_call
def test_gradients(call: Call, order: str, device: str) -> None:
    tensors = inputs_of(call, order, device)
    y = call.run(*tensors)
    for grad, t in zip(torch.autograd.grad(y, tensors, torch.randn_like(y)), tensors, strict=True):
        assert_own(grad)
        assert grad.shape == t.shape and grad.stride() == t.stride()


@by_order
@by_call
def test_compiled(call: Call, order: str, device: str) -> None:
    tensors = inputs_of(call, order, device)
    torch._dynamo.reset()
    compiled = torch.compile(call.run, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*tensors), call.run(*tensors))
    assert_behaves_as_torchs(compiled, tensors)


VIEWS = ("view", "squeeze", "unsqueeze", "reshape", "select", "slice", "permute", "alias")


@by_order
@by_call
def test_exported(call: Call, order: str, device: str) -> None:
    class Module(nn.Module):
        def forward(self, *tensors: Tensor) -> Tensor:
            return call.run(*tensors)

    graph = torch.export.export(Module(), tuple(inputs_of(call, order, device, grad=False))).graph
    results = next(node for node in graph.nodes if node.op == "output").args[0]
    assert not any(view in str(result.target) for result in results for view in VIEWS)


def layers() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    norm = dict(norm="batch", depthwise_activation="relu6")
    return {
        "Conv1d": (sepconv_ext.nn.Conv1d(8, 8, 3, padding="causal", groups=8), (2, 8, 19)),
        "Conv1d_reflect": (sepconv_ext.nn.Conv1d(8, 16, 3, padding=1, padding_mode="reflect"), (2, 8, 19)),
        "Conv2d": (sepconv_ext.nn.Conv2d(8, 8, 3, padding=1, groups=8), (2, 8, 9, 7)),
        "DepthwiseConv2d": (sepconv_ext.nn.DepthwiseConv2d(8, 3, activation="silu"), (2, 8, 9, 7)),
        "PointwiseConv2d": (sepconv_ext.nn.PointwiseConv2d(8, 5, activation="gelu"), (2, 8, 9, 7)),
        "SeparableConv2d": (sepconv_ext.nn.SeparableConv2d(8, 5, 3), (2, 8, 9, 7)),
        "SeparableConv2d_norm": (sepconv_ext.nn.SeparableConv2d(8, 5, 3, **norm).eval(), (2, 8, 9, 7)),
        "SpatialSeparableConv2d": (sepconv_ext.nn.SpatialSeparableConv2d(8, 3), (2, 8, 9, 7)),
    }


@pytest.mark.parametrize("batched", [True, False], ids=["batched", "unbatched"])
@pytest.mark.parametrize("name", list(layers()))
def test_layers(name: str, batched: bool, device: str) -> None:
    layer, size = layers()[name]
    if name == "SeparableConv2d_norm" and not batched:
        pytest.skip("torch's BatchNorm2d takes batches only")
    layer = layer.to(device)
    x = torch.randn(size if batched else size[1:], device=device, requires_grad=True)
    assert_behaves_as_torchs(lambda x, w: layer(x), [x, next(layer.parameters())])
