"""Derivatives: checked numerically in float64 to the second order, computed where asked for, with the right strides."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

import sepconv_ext
from cases import BY_NAME, FAMILIES, Case
from harness import (
    ACTIVATIONS,
    DTYPES,
    LAYOUTS,
    assert_as_accurate,
    dtype_name,
    grad_like_output,
    only_our_kernels,
    random,
    tensors,
    with_layout,
)
from sepconv_ext import functional, reference

ops = torch.ops.sepconv_ext
by_case = pytest.mark.parametrize("case", FAMILIES, ids=str)
by_layout = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])


def float64_tensors(case: Case, device: str, layout: str):
    x, w, b = tensors(case, torch.float64, device, layout, requires_grad=True)
    return (x, w, b) if b is not None else (x, w)


@by_layout
@by_case
def test_forward_gradients(case: Case, layout: str, device: str) -> None:
    inputs = float64_tensors(case, device, layout)

    def call(x, w, b=None):
        return functional.conv2d(x, w, b, *case.geometry)

    with only_our_kernels(at_least=100):
        assert gradcheck(call, inputs)
        assert gradgradcheck(call, inputs, fast_mode=True)


@by_layout
@by_case
def test_gradients_of_the_gradients(case: Case, layout: str, device: str) -> None:
    """The two gradient maps are ops of their own: their derivatives, and the derivatives of those."""
    x, w, _ = tensors(case, torch.float64, device, layout, requires_grad=True)
    g = grad_like_output(case, torch.float64, device, layout).requires_grad_()

    def by_input(g, w):
        return ops.conv2d_grad_input(g, w, x.shape, x.stride(), *case.op_geometry)

    def by_weight(g, x):
        return ops.conv2d_grad_weight(g, x, w.shape, w.stride(), *case.op_geometry)

    with only_our_kernels(at_least=100):
        for call, inputs in ((by_input, (g, w)), (by_weight, (g, x))):
            assert gradcheck(call, inputs)
            assert gradgradcheck(call, inputs, fast_mode=True)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("case", [FAMILIES[0], FAMILIES[3]], ids=str)
def test_activation_gradients(case: Case, activation: str, device: str) -> None:
    inputs = float64_tensors(case, device, "contiguous")

    def call(x, w, b):
        return ops.conv2d(x, w, b, *case.op_geometry, activation)

    with only_our_kernels(at_least=10):
        assert gradcheck(call, inputs, fast_mode=True)
        assert gradgradcheck(call, inputs, fast_mode=True)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_activation_gradients_in_every_dtype(dtype: torch.dtype, activation: str, device: str) -> None:
    """Against the float64 gradients of the composition, no worse than torch's composition."""
    case = BY_NAME["depthwise_k3"]

    def gradients(convolution, act, *inputs):
        y = act(convolution(*inputs, *case.geometry))
        return torch.autograd.grad(y, inputs, g.to(y))

    inputs = tensors(case, dtype, device, requires_grad=True)
    g = grad_like_output(case, dtype, device)
    native = reference.ACTIVATIONS[activation]
    truth = gradients(F.conv2d, native, *(t.detach().cpu().double().requires_grad_() for t in inputs))
    theirs = gradients(F.conv2d, native, *inputs)
    with only_our_kernels(at_least=3):
        y = ops.conv2d(*inputs, *case.op_geometry, activation)
        ours = torch.autograd.grad(y, inputs, g)
    for name, actual, peer, expected in zip(("input", "weight", "bias"), ours, theirs, truth, strict=True):
        assert_as_accurate(actual.cpu(), peer.cpu(), expected, f"grad of {name} through {activation}")


@pytest.mark.parametrize("needed", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1), (1, 1, 1)], ids=str)
@by_case
def test_only_what_is_needed_is_computed(case: Case, needed: tuple[int, int, int], device: str) -> None:
    inputs = tensors(case, torch.float32, device)
    for tensor, wanted in zip(inputs, needed, strict=True):
        tensor.requires_grad_(bool(wanted))
    peers = [tensor.detach().clone().requires_grad_(tensor.requires_grad) for tensor in inputs]
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = functional.conv2d(*inputs, *case.geometry)
    g = grad_like_output(case, torch.float32, device)
    with only_our_kernels(at_least=needed[0] + needed[1]):
        y.backward(g)
        runs = sum(sepconv_ext.kernel_counts().values())
    assert runs == needed[0] + needed[1]  # one kernel a gradient asked for; the bias's is a plain sum
    F.conv2d(*peers, *case.geometry).backward(g)
    for ours, theirs in zip(inputs, peers, strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4)
    # The input is kept for the weight's gradient and the weight for the input's, and neither without need.
    kept_pointers = {tensor.data_ptr() for tensor in kept}
    assert (inputs[0].data_ptr() in kept_pointers) == bool(needed[1])
    assert (inputs[1].data_ptr() in kept_pointers) == bool(needed[0])


@pytest.mark.parametrize("weight_layout", LAYOUTS)
@pytest.mark.parametrize("input_layout", LAYOUTS)
@by_case
def test_strides_of_the_gradients(case: Case, input_layout: str, weight_layout: str, device: str) -> None:
    """As torch's: the weight's own strides for its gradient (DDP's buckets need that), the input's layout for its."""
    x = random(case.input_size, torch.float32, device, input_layout, seed=1).requires_grad_()
    w = random(case.weight_size, torch.float32, device, weight_layout, seed=2).requires_grad_()
    ours, theirs = (
        torch.autograd.grad(convolution(x, w, None, *case.geometry).square().sum(), (x, w))
        for convolution in (functional.conv2d, F.conv2d)
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)
    if weight_layout != "strided":
        assert ours[1].stride() == w.stride()
    if input_layout != "strided":
        assert ours[0].stride() == x.stride()
    for gradient, tensor in zip(ours, (x, w), strict=True):
        # autograd keeps a leaf's gradient as it comes only where its strides fit
        tensor.grad = None
        assert gradient.is_contiguous() or gradient.is_contiguous(memory_format=torch.channels_last)


def test_dense_but_permuted_weight_keeps_its_strides(device: str) -> None:
    w = torch.randn(3, 3, 8, 2, device=device).permute(2, 3, 0, 1)  # [8, 2, 3, 3], neither NCHW nor channels_last
    w.requires_grad_()
    x = random((2, 4, 6, 6), torch.float32, device)
    functional.conv2d(x, w, groups=2, padding=1).sum().backward()
    assert w.grad.stride() == w.stride()


@by_layout
def test_gradient_penalty_trains_as_torch_does(layout: str, device: str) -> None:
    """Second order in use: a penalty on the input gradient, float32, through two layers."""
    x = random((2, 6, 8, 8), torch.float32, device, layout)
    depthwise = random((6, 1, 3, 3), torch.float32, device, seed=5)
    pointwise = random((4, 6, 1, 1), torch.float32, device, seed=6)

    def penalty(convolution):
        a, d, p = (t.detach().clone().requires_grad_() for t in (x, depthwise, pointwise))
        y = convolution(torch.tanh(convolution(a, d, padding=1, groups=6)), p)
        (slope,) = torch.autograd.grad(y.square().mean(), a, create_graph=True)
        loss = y.mean() + slope.square().sum()
        return (loss, *torch.autograd.grad(loss, (a, d, p)))

    with only_our_kernels(at_least=8):
        ours = penalty(functional.conv2d)
    for a, b in zip(ours, penalty(F.conv2d), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_third_order(device: str) -> None:
    x = random((1, 4, 5, 5), torch.float64, device).requires_grad_()
    w = random((4, 1, 3, 3), torch.float64, device, seed=7).requires_grad_()

    def third(convolution):
        value = convolution(x, w, padding=1, groups=4).pow(3).sum()
        for target in (x, w, x):
            (value,) = torch.autograd.grad(value, target, create_graph=True)
            value = value.square().sum()
        return value

    with only_our_kernels(at_least=8):
        ours = third(functional.conv2d)
    torch.testing.assert_close(ours, third(F.conv2d))


def test_backward_frees_and_complains_as_torch_does(device: str) -> None:
    x, w, b = tensors(FAMILIES[0], torch.float32, device, requires_grad=True)
    y = functional.conv2d(x, w, b, *FAMILIES[0].geometry).sum()
    y.backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.backward()
    z = functional.conv2d(x, w, b, *FAMILIES[0].geometry)
    with torch.no_grad():
        w.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


def test_backward_to_half_the_graph_with_undefined_gradients(device: str) -> None:
    """A double backward in which only one of the two gradient maps carries a gradient."""
    case = FAMILIES[0]

    def second(convolution):
        x, w, b = tensors(case, torch.float64, device, requires_grad=True)
        y = convolution(x, w, b, *case.geometry)
        gx, gw = torch.autograd.grad(y.pow(2).sum(), (x, w), create_graph=True)
        return [torch.autograd.grad(t.sum(), (x, w, b), retain_graph=True) for t in (gx, gw)]

    torch.testing.assert_close(second(functional.conv2d), second(F.conv2d))


def test_empty_batch_gradients(device: str) -> None:
    for name in ("depthwise_k3_empty_batch", "grouped_empty_batch", "pointwise_empty_batch"):
        case = BY_NAME[name]
        inputs = [t for t in tensors(case, torch.float32, device, requires_grad=True) if t is not None]
        y = functional.conv2d(*inputs, *([None] * (3 - len(inputs))), *case.geometry)
        y.sum().backward()
        assert y.shape == case.output_size
        for tensor in inputs:
            assert tensor.grad.shape == tensor.shape and not tensor.grad.any()


def test_unbatched_gradients(device: str) -> None:
    for case in FAMILIES:
        x, w, b = tensors(case, torch.float64, device, requires_grad=True)
        single = x[0]
        ours, theirs = (
            torch.autograd.grad(f(single, w, b, *case.geometry).square().sum(), (x, w, b))
            for f in (functional.conv2d, F.conv2d)
        )
        for a, c in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, c)


# Shapes whose gradients go both to ATen on a CPU, or neither, or one; the last ones have a small grad_output, whose
# memory does not cover the input that ATen wants to see the layout of.
TOGETHER = {
    "pointwise": ((2, 48, 30, 30), (64, 48, 1, 1), 1, 0, 1),
    "grouped": ((2, 64, 14, 14), (64, 16, 3, 3), 1, 1, 4),
    "depthwise": ((2, 64, 30, 30), (64, 1, 3, 3), 1, 1, 64),
    "blocked": ((2, 640, 7, 7), (640, 1, 3, 3), 1, 1, 640),
    "few_channels": ((64, 11, 7, 7), (11, 1, 3, 3), 1, 1, 11),
    "grouped_stride2": ((2, 64, 31, 30), (64, 32, 3, 3), 2, 1, 2),
    "dense_stride3": ((2, 16, 31, 30), (8, 16, 3, 3), 3, 1, 1),
}


@by_layout
@pytest.mark.parametrize("name", TOGETHER)
def test_gradients_together_are_gradients_apart(name: str, layout: str, device: str) -> None:
    """One op for both gradients gives what the two ops give, strides included, in one call of ATen or two kernels."""
    x_size, w_size, stride, padding, groups = TOGETHER[name]
    x, w = (random(size, torch.float32, device, layout).requires_grad_() for size in (x_size, w_size))
    y = functional.conv2d(x, w, None, stride, padding, 1, groups)
    g = random(y.shape, torch.float32, device, layout, seed=3)
    (gx,), (gw,) = (torch.autograd.grad(y, (t,), g, retain_graph=True) for t in (x, w))
    sepconv_ext.reset_kernel_counts()
    both = torch.autograd.grad(y, (x, w), g)
    assert sum(sepconv_ext.kernel_counts().values()) == 2  # a call of ATen for both counts for each
    expected = torch.autograd.grad(
        F.conv2d(x.double(), w.double(), None, stride, padding, 1, groups), (x, w), g.double()
    )
    for together, apart, exact in zip(both, (gx, gw), expected, strict=True):
        assert together.stride() == apart.stride()
        torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(together, exact, rtol=1e-4, atol=1e-3)


def test_tangents_pass_through_the_backward(device: str) -> None:
    """Forward-mode derivatives of a first-order backward: the op for both gradients has none, its parts have."""
    tangents = []
    for convolution in (functional.conv2d, F.conv2d):
        x = random((2, 48, 20, 20), torch.float32, device, seed=1).requires_grad_()
        w = random((64, 48, 1, 1), torch.float32, device, seed=2).requires_grad_()
        g = random((2, 64, 20, 20), torch.float32, device, seed=3)
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(g, g.flip(0))
            grads = torch.autograd.grad(convolution(x, w), (x, w), dual)
            tangents.append([torch.autograd.forward_ad.unpack_dual(t).tangent for t in grads])
    for ours, theirs in zip(*tangents, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


def test_with_layout_gives_what_it_says() -> None:
    """The harness itself: a strided tensor is really strided."""
    x = torch.randn(2, 3, 4, 5)
    strided = with_layout(x, "strided")
    assert torch.equal(strided, x) and strided.stride(-1) == 2 and not strided.is_contiguous()
    assert with_layout(x, "channels_last").stride() == (60, 1, 15, 3)
