"""Tensors that are not dense: the values and bits of a dense copy, by the same kernel, never by a slow general one.

A view here is what users have: slices of channels, crops, every other row, expanded batches, and gradients as autograd
makes them behind sum, mean, flatten and cat. What lies between the elements of a view is NaN, which no result may show.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import sepconv_ext
from cases import BY_NAME, Case
from harness import (
    DTYPES,
    dtype_name,
    grad_like_output,
    half_kernels,
    only_our_kernels,
    strictness,
    tensors,
    with_layout,
)
from sepconv_ext import functional, reference

ops = torch.ops.sepconv_ext
LAYOUTS = ("contiguous", "channels_last")
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-14, torch.bfloat16: 5e-3}  # of the largest value
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def inside(tensor: Tensor, layout: str, size: tuple[int, ...], index: tuple) -> Tensor:
    """The values as a part of larger memory of that layout, full of NaN elsewhere."""
    larger = torch.full(size, float("nan"), dtype=tensor.dtype).contiguous(memory_format=FORMATS[layout])
    view = larger[index]
    assert view.shape == tensor.shape
    return view.copy_(tensor)


def half_the_channels(t: Tensor, layout: str) -> Tensor:
    N, C, H, W = t.shape
    return inside(t, layout, (N, 2 * C + 1, H, W), (slice(None), slice(C, 2 * C)))


def crop(t: Tensor, layout: str) -> Tensor:
    N, C, H, W = t.shape
    return inside(t, layout, (N, C, H + 2, W + 3), (..., slice(1, H + 1), slice(1, W + 1)))


def every_other(dim: int) -> Callable[[Tensor, str], Tensor]:
    def view(t: Tensor, layout: str) -> Tensor:
        size = [2 * n if i == dim else n for i, n in enumerate(t.shape)]
        return inside(t, layout, tuple(size), tuple(slice(None, None, 2 if i == dim else None) for i in range(4)))

    return view


def expanded_batch(t: Tensor, layout: str) -> Tensor:
    return with_layout(t[:1], layout).expand(t.shape)


def behind_sum(t: Tensor, layout: str) -> Tensor:
    return t[:1, :1, :1, :1].expand(t.shape)


def behind_mean(t: Tensor, layout: str) -> Tensor:
    return t[:, :, :1, :1].contiguous().expand(t.shape)


def behind_channel_sum(t: Tensor, layout: str) -> Tensor:
    return t[:, :1].contiguous().expand(t.shape)


def behind_row_sum(t: Tensor, layout: str) -> Tensor:
    return t[..., :1].contiguous().expand(t.shape)


def other_layout(t: Tensor, layout: str) -> Tensor:
    return with_layout(t, LAYOUTS[1 - LAYOUTS.index(layout)])


def transposed(t: Tensor, layout: str) -> Tensor:
    return t.transpose(2, 3).contiguous(memory_format=FORMATS[layout]).transpose(2, 3)


# Each view, and in which layouts every kernel that this layout has takes it where it is.
VIEWS: dict[str, tuple[Callable[[Tensor, str], Tensor], tuple[str, ...]]] = {
    "half the channels": (half_the_channels, LAYOUTS),
    "crop": (crop, LAYOUTS),
    "every other image": (every_other(0), LAYOUTS),
    "every other row": (every_other(2), LAYOUTS),
    "every other column": (every_other(3), ("channels_last",)),
    "every other channel": (every_other(1), ("contiguous",)),
    "expanded batch": (expanded_batch, ("contiguous",)),  # torch, and so we, answer channels_last ones in NCHW
    "behind sum": (behind_sum, ()),
    "behind mean": (behind_mean, ("channels_last",)),
    "behind channel sum": (behind_channel_sum, ("contiguous",)),
    "behind row sum": (behind_row_sum, ()),
    "other layout": (other_layout, ()),
    "transposed": (transposed, ()),
}
# Of these torch does not see that they are channels_last, and so the result is not.
UNSEEN = ("expanded batch", "transposed", "every other channel")
AS_INPUT = tuple(name for name in VIEWS if not name.startswith("behind") and name != "other layout")


def _depthwise(name: str, N: int, C: int, H: int, W: int, kernel: int | tuple[int, int], **rest) -> Case:
    R, S = reference.pair(kernel)
    return Case(name, N, C, H, W, C, R, S, groups=C, **rest)


# Of each CPU kernel in both layouts: whole and partial vectors of channels and of columns, strips, passes, phases.
KERNELS = (
    _depthwise("k3_c24", 2, 24, 14, 14, 3, padding=(1, 1), bias=True),
    _depthwise("k3_c58_plane19", 2, 58, 19, 17, 3, padding=(1, 1)),
    _depthwise("k3_c3", 2, 3, 9, 21, 3, padding=(1, 1)),
    _depthwise("k3_stride2", 2, 40, 15, 14, 3, stride=(2, 2), padding=(1, 1)),
    _depthwise("k3_stride2_large", 1, 16, 45, 44, 3, stride=(2, 2), padding=(1, 1)),
    _depthwise("k3_dilation2", 2, 24, 14, 13, 3, padding=(2, 2), dilation=(2, 2)),
    _depthwise("k5_c512", 1, 128, 12, 11, 5, padding=(2, 2), bias=True),
    _depthwise("k7", 2, 32, 9, 13, 7, padding=(3, 3)),
    _depthwise("k9", 1, 16, 12, 13, 9, padding=(4, 4)),
    _depthwise("k7_to_one_pixel", 2, 24, 7, 7, 7),
    _depthwise("k4_one_row", 2, 48, 1, 50, (1, 4), padding=(0, 3)),
    BY_NAME["depthwise_multiplier2"],
    BY_NAME["grouped_resnext"],
    BY_NAME["grouped_channels3_outputs5"],
    BY_NAME["pointwise_awkward"],
    BY_NAME["pointwise_one_output"],
    BY_NAME["pointwise_c3"],
    BY_NAME["pointwise_stride2"],
    BY_NAME["dense_k3"],
)

by_layout = pytest.mark.parametrize("layout", LAYOUTS)
by_dtype = pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16), ids=dtype_name)
by_view = pytest.mark.parametrize("view", VIEWS)


def operands(case: Case, dtype: torch.dtype, layout: str) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    x, w, b = tensors(case, dtype, "cpu", layout)
    return x, w, b, grad_like_output(case, dtype, "cpu", layout)


def maps_of(case: Case, x: Tensor, w: Tensor, b: Tensor | None, g: Tensor, of: str) -> dict[str, Tensor]:
    """The maps that read the view: of the input "x", or of the gradient "g"."""
    results = {"grad_weight": ops.conv2d_grad_weight(g, x, w.shape, w.stride(), *case.op_geometry)}
    if of == "x":
        results["forward"] = ops.conv2d(x, w, b, *case.op_geometry, "identity")
    else:
        results["grad_input"] = ops.conv2d_grad_input(g, w, x.shape, x.stride(), *case.op_geometry)
    return results


def exact(which: str, case: Case, x: Tensor, w: Tensor, b: Tensor | None, g: Tensor) -> Tensor:
    if which == "forward":
        return reference.forward(x, w, b, *case.geometry)
    if which == "grad_input":
        return reference.grad_input(g, w, case.input_size, *case.geometry)
    return reference.grad_weight(g, x, case.weight_size, *case.geometry)


@by_view
@by_layout
@by_dtype
@pytest.mark.parametrize("case", KERNELS, ids=str)
def test_a_view_gives_what_its_dense_copy_gives(case: Case, dtype: torch.dtype, layout: str, view: str) -> None:
    """Bit for bit, as the plan is the dense tensors'; and what a float64 reference says."""
    x, w, b, g = operands(case, dtype, layout)
    make = VIEWS[view][0]
    for of in ("x", "g") if view in AS_INPUT else ("g",):
        viewed = make(x if of == "x" else g, layout)
        copy = with_layout(viewed, layout)
        with only_our_kernels(at_least=2):
            actual = maps_of(case, viewed, w, b, g, of) if of == "x" else maps_of(case, x, w, b, viewed, of)
        with strictness(True):
            dense = maps_of(case, copy, w, b, g, of) if of == "x" else maps_of(case, x, w, b, copy, of)
        unseen = layout == "channels_last" and view in UNSEEN
        for which, result in actual.items():
            what = f"{which} of {case}, {view}"
            assert unseen or torch.equal(result, dense[which]), what
            if of == "x":
                truth = exact(which, case, copy, w, b, g)
            else:
                truth = exact(which, case, x, w, b, copy)
            error = (result.double() - truth).abs().max()
            assert error <= TOLERANCE[dtype] * truth.abs().max(), f"{what}: error {error:.3g}"


@pytest.mark.parametrize(
    "size", ((2, 24, 14, 13), (1, 640, 1, 50), (3, 17, 7, 1), (2, 3, 9, 21), (1, 70, 33, 40)), ids=str
)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_copies_between_the_layouts_are_exact(dtype: torch.dtype, size: tuple[int, ...], isa: str) -> None:
    """Through a depthwise call by ones: its result is its gradient, in the layout of the input."""
    channels = size[1]
    weight = torch.ones(channels, 1, 1, 1, dtype=dtype)
    geometry = ((1, 1), (0, 0), (1, 1), channels)
    for layout in LAYOUTS:
        strides = with_layout(torch.empty(size), layout).stride()
        for view in ("other layout", "crop", "every other row", "behind row sum", "behind sum"):
            lies = layout if view == "other layout" else LAYOUTS[1 - LAYOUTS.index(layout)]
            g = VIEWS[view][0](torch.randn(size).to(dtype), lies)
            with only_our_kernels():
                result = ops.conv2d_grad_input(g, weight, size, strides, *geometry)
            assert torch.equal(result, g), f"{view} to {layout}"
            assert result.stride() == strides


@by_layout
@pytest.mark.parametrize("view", [name for name in VIEWS if VIEWS[name][1]])
def test_depthwise_kernels_take_views_where_they_lie(view: str, layout: str) -> None:
    make, native = VIEWS[view]
    for case in KERNELS[:11]:
        x, w, b, g = operands(case, torch.float32, layout)
        one_pixel = g.shape[2] * g.shape[3] == 1 or (layout == "contiguous" and 1 in x.shape)
        for of in ("x", "g") if view in AS_INPUT else ("g",):
            for map in ("forward", "grad_weight") if of == "x" else ("grad_input", "grad_weight"):
                dense = _explain(map, case, x, w, b, g)
                viewed = make(x if of == "x" else g, layout)
                said = _explain(map, case, viewed, w, b, g) if of == "x" else _explain(map, case, x, w, b, viewed)
                what = f"{map} of {case}, {view}: {said.kernel}, {said.reason}"
                assert said.kernel == dense.kernel or (layout == "channels_last" and layout not in native), what
                if layout in native and not one_pixel:
                    assert "is copied" not in said.reason, what


def _explain(map: str, case: Case, x: Tensor, w: Tensor, b: Tensor | None, g: Tensor):
    with strictness(True):
        grad_output = None if map == "forward" else g
        return sepconv_ext.explain(x, w, b, *case.geometry, map=map, grad_output=grad_output)


def test_explain_says_what_is_copied() -> None:
    case = KERNELS[0]
    x, w, b, g = operands(case, torch.float32, "channels_last")
    assert _explain("forward", case, transposed(x, "contiguous"), w, b, g).reason.endswith("input is copied to NCHW")
    for view in (behind_sum, other_layout):
        said = _explain("grad_input", case, x, w, b, view(g, "channels_last"))
        assert said.kernel == "cpu_depthwise_nhwc" and said.reason.endswith("grad_output is copied to channels_last")
    both = _explain("grad_weight", case, every_other(3)(x, "contiguous"), w, b, behind_sum(g, "contiguous"))
    assert both.reason.endswith("input is copied to NCHW; grad_output is copied to NCHW")


@pytest.mark.parametrize("map", ["forward", "grad_input", "grad_weight"])
@pytest.mark.parametrize("view", [crop, every_other(2)], ids=["crop", "every_other_row"])
def test_narrow_rows_of_half_types_are_copied(view: Callable[[Tensor, str], Tensor], map: str) -> None:
    """Converted row by row they took 1.7 times as long as a copy of them and its call."""

    def of_view(side: int, dtype: torch.dtype) -> str:
        case = _depthwise("narrow", 2, 64, side, side, 3, padding=(1, 1))
        x, w, b, g = operands(case, dtype, "contiguous")
        viewed = (x, view(g, "contiguous")) if map == "grad_input" else (view(x, "contiguous"), g)
        said = _explain(map, case, viewed[0], w, b, viewed[1])
        assert said.kernel == "cpu_depthwise_nchw_blocked"
        return said.reason.partition("; ")[2]

    for dtype in (torch.float16, torch.bfloat16):
        assert of_view(7, dtype) == f"{'grad_output' if map == 'grad_input' else 'input'} is copied to NCHW"
        assert of_view(8, dtype) == ""
    assert of_view(7, torch.float32) == ""


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_few_channels_of_groups_are_copied_to_planes(dtype: torch.dtype) -> None:
    """The gradient by the weight in half types, where torch's float32 call is slower than that."""
    for channels, taken in ((3, True), (4, False)):  # 4: float32 has a kernel for channels_last
        x = torch.empty(2, 8 * channels, 14, 14, dtype=dtype).contiguous(memory_format=torch.channels_last)
        w = torch.empty(8 * channels, channels, 3, 3, dtype=dtype)
        with half_kernels(True, True):
            said = sepconv_ext.explain(x, w, None, 1, 1, 1, 8, map="grad_weight")
        assert (said.kernel == "cpu_grouped_planes") == taken, said
        assert ("input is copied to NCHW" in said.reason) == taken, said


def test_gaps_leave_a_bfloat16_gradient_to_the_kernel() -> None:
    """torch's own call, faster on dense pixels, would copy the others first."""
    torch.set_num_threads(1)
    x = torch.empty(4, 640, 1, 512, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    w = torch.empty(640, 1, 1, 3, dtype=torch.bfloat16)
    wide = torch.empty(4, 1280, 1, 512, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    gradients = {x: True, wide[:, 640:]: False, x[..., :1].expand_as(x): False, x.contiguous(): True}
    with half_kernels(True, False):
        for g, torchs in gradients.items():
            said = sepconv_ext.explain(x, w, None, 1, (0, 1), 1, 640, map="grad_input", grad_output=g)
            assert (said.kernel == "aten") == torchs, (g.stride(), said)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_1x1_of_half_types_sums_no_gradient_of_the_other_layout(dtype: torch.dtype) -> None:
    """Such a gradient was copied number by number, or multiplied as it lay: twice as slow as copying it first."""
    x, w = torch.empty(4, 8, 14, 14, dtype=dtype), torch.empty(128, 8, 1, 1, dtype=dtype)
    g = torch.empty(4, 128, 14, 14, dtype=dtype)

    def copied(x: Tensor, g: Tensor) -> str:
        with half_kernels(True, True):
            plan = functional.explain(x, w, map="grad_weight", grad_output=g)
        assert plan.kernel == "cpu_pointwise_matmul"
        return plan.reason.partition("; ")[2]

    for layout, name in (("contiguous", "NCHW"), ("channels_last", "channels_last")):
        image = with_layout(x, layout)
        assert copied(image, other_layout(g, layout)) == f"grad_output is copied to {name}"
        assert copied(image, half_the_channels(g, layout)) == copied(image, behind_sum(g, layout)) == ""


@by_dtype
@by_layout
def test_an_expanded_batch_is_computed_once(layout: str, dtype: torch.dtype) -> None:
    """In every layout of the image, with torch's strides, which are NCHW for an expanded channels_last batch."""
    image = with_layout(torch.randn(1, 24, 9, 7).to(dtype), layout)
    x = image.expand(5, 24, 9, 7)
    b = torch.randn(24).to(dtype)
    for w, groups in ((torch.randn(24, 1, 3, 3), 24), (torch.randn(24, 24, 1, 1), 1), (torch.randn(24, 4, 3, 3), 6)):
        w = w.to(dtype)
        said = functional.explain(x, w, b, padding=1, groups=groups)
        assert said.reason.endswith("the batch is one image, computed once"), said.reason
        assert said.kernel == functional.explain(image, w, b, padding=1, groups=groups).kernel
        for mode in ("zeros", "reflect"):
            y = functional.padded_conv2d(x, w, b, 1, 1, 1, groups, padding_mode=mode)
            one = functional.padded_conv2d(image, w, b, 1, 1, 1, groups, padding_mode=mode)
            assert torch.equal(y, one.expand(y.shape))
            theirs = torch.nn.functional.conv2d(x, w, b, 1, 1, 1, groups)
            assert y.stride() == theirs.stride()


@by_dtype
@by_layout
def test_fused_calls_compute_an_expanded_batch_once(layout: str, dtype: torch.dtype) -> None:
    """Bit for bit the one image's result: by its kernel, not by that of the layout that torch takes the batch for."""
    image = with_layout(torch.randn(1, 24, 9, 7).to(dtype), layout)
    x = image.expand(5, 24, 9, 7)
    depthwise, pointwise = torch.randn(24, 1, 3, 3).to(dtype), torch.randn(20, 24, 1, 1).to(dtype)
    column, row = torch.randn(24, 5).to(dtype), torch.randn(24, 3).to(dtype)
    for call in (
        lambda t: functional.separable_conv2d(t, depthwise, pointwise, padding=1),
        lambda t: functional.spatial_separable_conv2d(t, column, row, padding=(2, 1)),
    ):
        with only_our_kernels():
            y, one = call(x), call(image)
        assert torch.equal(y, one.expand(y.shape)) and y.is_contiguous()


@pytest.mark.parametrize("groups", (1, 12))
def test_torch_is_given_an_expanded_batch_in_its_layout(groups: int) -> None:
    """torch would bring it into NCHW, which costs more than the copy."""
    x = with_layout(torch.randn(1, 24, 30, 30), "channels_last").expand(8, 24, 30, 30)
    w, g = torch.randn(48, 24 // groups, 3, 3), with_layout(torch.randn(8, 48, 30, 30), "channels_last")
    with strictness(False):
        said = functional.explain(x, w, None, 1, 1, 1, groups, map="grad_weight", grad_output=g)
        assert said.kernel == "aten" and said.reason.endswith("input is copied to channels_last"), said
        actual = ops.conv2d_grad_weight(g, x, w.shape, w.stride(), (1, 1), (1, 1), (1, 1), groups)
    exact = reference.grad_weight(g, x.contiguous(), w.shape, 1, 1, 1, groups)
    torch.testing.assert_close(actual.double(), exact, rtol=1e-4, atol=1e-3)


@by_dtype
def test_a_sequence_out_of_a_wider_projection(dtype: torch.dtype) -> None:
    """Mamba's: [N, L, C] is a slice of a projection's result, and its transpose goes into a causal convolution."""
    projected = torch.randn(2, 37, 90).to(dtype)
    projected[..., :20], projected[..., 68:] = float("nan"), float("nan")
    x, w = projected[..., 20:68].transpose(1, 2), torch.randn(48, 1, 4).to(dtype)
    with only_our_kernels():
        y = functional.conv1d(x, w, None, padding=3, groups=48)
    assert sepconv_ext.kernel_counts()["cpu_depthwise_nhwc"] == 1
    dense = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(y, functional.conv1d(dense, w, None, padding=3, groups=48))
    assert y.stride() == functional.conv1d(dense, w, None, padding=3, groups=48).stride()


@by_layout
@by_dtype
@pytest.mark.parametrize("view", AS_INPUT)
def test_separable_and_spatial_calls_of_views(view: str, dtype: torch.dtype, layout: str) -> None:
    torch.manual_seed(0)
    for C, H, W in ((24, 9, 21), (3, 14, 7), (1, 7, 9)):
        x = with_layout(torch.randn(2, C, H, W).to(dtype), layout)
        wd, wp = torch.randn(C, 1, 3, 3).to(dtype), torch.randn(20, C, 1, 1).to(dtype)
        column, row = torch.randn(C, 5).to(dtype), torch.randn(C, 3).to(dtype)
        viewed = VIEWS[view][0](x, layout)
        copy = with_layout(viewed, layout)
        calls = (
            lambda t, wd=wd, wp=wp: functional.separable_conv2d(t, wd, wp, padding=1),
            lambda t, column=column, row=row: functional.spatial_separable_conv2d(t, column, row, padding=(2, 1)),
        )
        for call in calls:
            with only_our_kernels():
                actual = call(viewed)
            with only_our_kernels():
                expected = call(copy)
            if layout == "channels_last" and view in UNSEEN:  # another kernel
                assert (actual - expected).abs().max() <= 4 * TOLERANCE[dtype] * expected.abs().max()
            else:
                assert torch.equal(actual, expected)


@by_layout
def test_gradients_through_views(layout: str) -> None:
    """What autograd makes: a slice into the layer, and sum, mean, flatten and cat behind it; against torch."""
    torch.manual_seed(0)
    weight = torch.randn(24, 1, 3, 3)
    full = torch.randn(2, 50, 9, 8).contiguous(memory_format=FORMATS[layout])
    heads = (
        lambda y: y.sum(),
        lambda y: y.mean((2, 3)).square().sum(),
        lambda y: (y.flatten(1) @ torch.linspace(-1, 1, 24 * 63)).sum(),
        lambda y: torch.cat([y, y * 2], 1)[:, 12:].square().sum(),
    )
    for head in heads:
        grads = []
        for conv in (functional.conv2d, torch.nn.functional.conv2d):
            x, w = full.clone(memory_format=torch.preserve_format).requires_grad_(), weight.clone().requires_grad_()
            head(conv(x[:, 13:37, :, 1:], w, None, 1, 1, 1, 24)).backward()
            grads.append((x.grad, w.grad))
        for ours, theirs in zip(*grads, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
