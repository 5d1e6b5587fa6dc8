"""Properties over random geometries: equality with torch in float64, and the adjoint identities of the three maps."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from cases import Case
from harness import ACTIVATIONS, LAYOUTS, grad_like_output, only_our_kernels, random, tensors
from sepconv_ext import functional, reference

ops = torch.ops.sepconv_ext

# The same examples every time; a failing one prints itself, and belongs into cases.py then.
settings.register_profile(
    "sepconv_ext",
    max_examples=150,
    deadline=None,
    derandomize=True,
    print_blob=True,
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.function_scoped_fixture],
)
settings.load_profile("sepconv_ext")

small = st.integers(1, 4)
layouts = st.sampled_from(LAYOUTS)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any geometry whose output has at least one pixel."""
    family = draw(st.sampled_from(["depthwise", "grouped", "pointwise", "dense"]))
    groups = draw(st.sampled_from([1, 2, 3, 8, 17, 33])) if family in ("depthwise", "grouped") else 1
    inside = 1 if family == "depthwise" else draw(st.integers(1, 9))
    kernel = st.integers(1, 1) if family == "pointwise" else st.integers(1, 7)
    case = Case(
        name=family,
        N=draw(st.integers(0, 3)),
        C=groups * inside,
        H=draw(st.integers(1, 20)),
        W=draw(st.integers(1, 40)),
        K=groups * draw(st.integers(1, 5)),
        R=draw(kernel),
        S=draw(kernel),
        stride=(draw(small), draw(small)),
        padding=(draw(st.integers(0, 5)), draw(st.integers(0, 5))),
        dilation=(draw(st.integers(1, 3)), draw(st.integers(1, 3))),
        groups=groups,
        bias=draw(st.booleans()),
    )
    if draw(st.integers(0, 4)) == 0:
        case = replace(case, stride=(1, 1), padding="same")
    assume(min(case.output_size[2:]) >= 1)
    return case


@given(case=cases(), layout=layouts, weight_layout=layouts, unbatched=st.booleans())
def test_equals_torch(case: Case, layout: str, weight_layout: str, unbatched: bool) -> None:
    """Values, output strides and gradients are F.conv2d's, and no call falls back to it."""
    unbatched = unbatched and case.N > 0
    x, _, b = tensors(case, torch.float64, "cpu", layout)
    w = random(case.weight_size, torch.float64, "cpu", weight_layout, seed=2)
    leaves = [t.requires_grad_() for t in (x, w, b) if t is not None]
    image = x[0] if unbatched else x

    theirs = F.conv2d(image, w, b, *case.geometry)
    g = torch.randn_like(theirs)
    their_gradients = torch.autograd.grad(theirs, leaves, g)
    with only_our_kernels(at_least=0 if case.N == 0 else 3):
        ours = functional.conv2d(image, w, b, *case.geometry)
        our_gradients = torch.autograd.grad(ours, leaves, g)

    torch.testing.assert_close(ours, theirs)
    if case.N > 0:  # torch gives some empty results strides of 0
        assert ours.stride() == theirs.stride()
    for actual, expected in zip(our_gradients, their_gradients, strict=True):
        torch.testing.assert_close(actual, expected)


@given(case=cases(), layout=layouts, sides=st.tuples(*[st.integers(0, 5)] * 4), seed=st.integers(0, 99))
def test_adjoint_identities(case: Case, layout: str, sides: tuple[int, int, int, int], seed: int) -> None:
    """<C(x, w), g> = <x, Cx(g, w)> = <w, Cw(g, x)>, with any padding on each of the four sides."""
    rows, columns = reference.output_size(case.input_size, case.weight_size, case.stride, sides, case.dilation)[2:]
    assume(rows >= 1 and columns >= 1)
    geometry = (case.stride, sides, case.dilation, case.groups)
    x, w, _ = tensors(case, torch.float64, "cpu", layout)
    g = random((case.N, case.K, rows, columns), torch.float64, "cpu", layout, seed=seed)
    with only_our_kernels(at_least=0 if case.N == 0 else 3):
        y = ops.conv2d(x, w, None, *geometry, "identity")
        gx = ops.conv2d_grad_input(g, w, x.shape, x.stride(), *geometry)
        gw = ops.conv2d_grad_weight(g, x, w.shape, w.stride(), *geometry)
    product = (y * g).sum()
    torch.testing.assert_close((x * gx).sum(), product, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close((w * gw).sum(), product, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(y, reference.forward(x, w, None, *geometry))


@given(case=cases(), layout=layouts, activation=st.sampled_from(ACTIVATIONS))
def test_epilogue_is_the_composition(case: Case, layout: str, activation: str) -> None:
    """Bias and activation in the epilogue equal the same two steps after the convolution, to the last bits."""
    x, w, b = tensors(replace(case, bias=True), torch.float64, "cpu", layout)
    with only_our_kernels(at_least=0 if case.N == 0 else 2):
        fused = ops.conv2d(x, w, b, *case.op_geometry, activation)
        plain = ops.conv2d(x, w, b, *case.op_geometry, "identity")
    torch.testing.assert_close(fused, reference.ACTIVATIONS[activation](plain))


@given(case=cases(), layout=layouts, other=layouts, dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_layout_does_not_change_the_result(case: Case, layout: str, other: str, dtype: torch.dtype) -> None:
    """One value, whatever the strides; kernels may differ in the order of additions alone."""
    with only_our_kernels(at_least=0 if case.N == 0 else 2):
        a, c = (
            ops.conv2d(*tensors(case, dtype, "cpu", which), *case.op_geometry, "identity") for which in (layout, other)
        )
    torch.testing.assert_close(a, c, rtol=2e-5 if dtype == torch.float32 else 1.6e-2, atol=1e-4)


@given(case=cases())
def test_reference_agrees_with_torch(case: Case) -> None:
    """The oracle itself, against F.conv2d and its autograd."""
    x, w, b = tensors(case, torch.float64, "cpu", requires_grad=True)
    y = F.conv2d(x, w, b, *case.geometry)
    g = grad_like_output(case, torch.float64, "cpu")
    gx, gw = torch.autograd.grad(y, (x, w), g)
    with torch.no_grad():
        torch.testing.assert_close(reference.forward(x, w, b, *case.geometry), y)
        torch.testing.assert_close(reference.grad_input(g, w, x.shape, *case.geometry), gx)
        torch.testing.assert_close(reference.grad_weight(g, x, w.shape, *case.geometry), gw)
