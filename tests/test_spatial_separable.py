"""Column and row filters in one pass: against the dense product and other libraries' filters; gradients; machinery."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sepconv_ext
from harness import DTYPES, LAYOUTS, assert_as_accurate, only_our_kernels, random, strictness
from sepconv_ext.factorize import separate
from sepconv_ext.functional import spatial_separable_conv2d
from sepconv_ext.nn import SpatialSeparableConv2d

# name: input size, R, S, padding
SHAPES = {
    "k3": ((2, 5, 9, 20), 3, 3, 1),
    "k3x5_three_channels": ((2, 3, 12, 37), 3, 5, (1, 2)),
    "k4_same": ((1, 19, 7, 8), 4, 4, "same"),
    "k7x2_valid": ((2, 4, 17, 9), 7, 2, "valid"),
    "k1x9_two_tiles": ((1, 2, 3, 1100), 1, 9, (0, 4)),
    "k5_many_channels": ((1, 70, 6, 30), 5, 5, 2),
    "k9x1_wide_padding": ((2, 3, 4, 5), 9, 1, (9, 3)),
    "one_pixel": ((2, 6, 1, 1), 3, 3, 1),
    "one_channel": ((3, 1, 11, 6), 3, 3, 1),
    "long": ((1, 2, 40, 50), 31, 45, (15, 22)),
    "empty_batch": ((0, 3, 5, 5), 3, 3, 1),
}
BLUR = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16


def filters(C: int, R: int, S: int, dtype: torch.dtype, device: str, shared: tuple = (False, False)) -> tuple:
    column = random((1 if shared[0] else C, R), dtype, device, seed=2)
    return column, random((1 if shared[1] else C, S), dtype, device, seed=3)


def by_conv2d(x: Tensor, column: Tensor, row: Tensor, padding) -> Tensor:
    """One depthwise convolution with the products of the filters."""
    kernel = (column[:, :, None] * row[:, None]).expand(x.shape[1], -1, -1)
    return F.conv2d(x, kernel[:, None], padding=padding, groups=x.shape[1])


def by_two_convs(x: Tensor, column: Tensor, row: Tensor, padding) -> Tensor:
    """What people write: two depthwise convolutions, with the image between them."""
    C, R, S = x.shape[1], column.shape[1], row.shape[1]
    if isinstance(padding, str):
        vertical, horizontal = padding, padding
    else:
        pair = (padding, padding) if isinstance(padding, int) else padding
        vertical, horizontal = (pair[0], 0), (0, pair[1])
    # oneDNN (torch 2.14) takes minutes for long filters of float16 on processors with AVX512-FP16, and of bfloat16 in
    # channels_last: take float32, rounded once by each convolution.
    wide = torch.float32 if x.element_size() == 2 and max(R, S) > 9 else x.dtype
    column, row = (w.expand(C, -1)[:, None].to(wide) for w in (column, row))
    between = F.conv2d(x.to(wide), column[..., None], padding=vertical, groups=C).to(x.dtype)
    return F.conv2d(between.to(wide), row[:, :, None], padding=horizontal, groups=C).to(x.dtype)


# ---- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", SHAPES)
def test_values(name: str, layout: str, dtype: torch.dtype, device: str) -> None:
    """By our kernel alone, in the layout of a convolution's output, as accurate as two convolutions of torch."""
    size, R, S, padding = SHAPES[name]
    x = random(size, dtype, device, layout)
    for shared in ((False, False), (True, True), (False, True)):
        column, row = filters(size[1], R, S, dtype, device, shared)
        with only_our_kernels(at_least=int(size[0] > 0)):
            y = spatial_separable_conv2d(x, column, row, padding)
        exact = by_conv2d(x.double(), column.double(), row.double(), padding)
        peer = by_two_convs(x.contiguous(), column, row, padding)
        assert_as_accurate(y, peer, exact, f"shared {shared}")
        assert y.stride() == torch.empty_like(exact, memory_format=torch.preserve_format).stride() or size[0] == 0
        kernels = [k for k in sepconv_ext.kernel_counts() if "spatial_separable" in k]
        assert len(kernels) == (size[0] > 0)


@pytest.mark.parametrize("isa", sepconv_ext._C.build_info()["cpu_isas"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set(dtype: torch.dtype, isa: str) -> None:
    try:
        before = sepconv_ext._C.set_cpu_isa(isa)
    except ValueError as error:
        pytest.skip(str(error))
    try:
        for layout in LAYOUTS:
            x = random((2, 19, 11, 37), dtype, "cpu", layout)
            column, row = filters(19, 5, 6, dtype, "cpu")
            y = spatial_separable_conv2d(x, column, row, (2, 3))
            exact = by_conv2d(x.double(), column.double(), row.double(), (2, 3))
            assert_as_accurate(y, by_two_convs(x, column, row, (2, 3)), exact, layout)
    finally:
        sepconv_ext._C.set_cpu_isa(before)


def test_threads_do_not_matter() -> None:
    x, (column, row) = random((2, 3, 37, 700), torch.float32, "cpu"), filters(3, 5, 9, torch.float32, "cpu")
    results = []
    threads = torch.get_num_threads()
    for n in (1, 2, 5):
        torch.set_num_threads(n)
        for layout in LAYOUTS[:2]:
            image = x.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else x
            results.append(spatial_separable_conv2d(image, column, row, 2))
    torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results[2::2])
    assert all(torch.equal(results[1], other) for other in results[3::2])


def test_an_infinite_pixel_stays_where_the_filter_reaches(device: str) -> None:
    for layout in LAYOUTS:
        x = random((1, 3, 20, 60), torch.float32, device, layout)
        x[0, 1, 9, 30] = torch.inf
        column, row = filters(3, 3, 5, torch.float32, device)
        y = spatial_separable_conv2d(x, column, row, (1, 2))
        expected = torch.zeros_like(y, dtype=torch.bool)
        expected[0, 1, 8:11, 28:33] = True
        assert torch.equal(~y.isfinite(), expected)


@pytest.mark.parametrize("name", ["gaussian", "box", "sobel_h", "sobel_v", "prewitt_h", "scharr_v"])
def test_filters_of_other_libraries(name: str) -> None:
    """On a photograph, exactly: Gaussian, box and edge filters as scikit-image and scipy compute them."""
    data, skimage_filters = pytest.importorskip("skimage.data"), pytest.importorskip("skimage.filters")
    ndimage = pytest.importorskip("scipy.ndimage")
    photo = data.camera()[::2, ::2] / 255.0
    x = torch.from_numpy(photo)[None]
    if name == "gaussian":
        expected = ndimage.gaussian_filter(photo, 2.0, mode="constant", truncate=4.0)
        at = torch.arange(-8, 9, dtype=torch.float64)
        column = row = torch.softmax(-(at**2) / 8, 0)
    elif name == "box":
        expected = ndimage.uniform_filter(photo, (5, 9), mode="constant")
        column, row = torch.full((5,), 0.2, dtype=torch.float64), torch.full((9,), 1 / 9, dtype=torch.float64)
    else:
        expected = getattr(skimage_filters, name)(photo)
        smooth = {"sobel": [1.0, 2, 1], "prewitt": [1.0, 1, 1], "scharr": [3.0, 10, 3]}[name.split("_")[0]]
        smooth, slope = torch.tensor(smooth, dtype=torch.float64), torch.tensor([1.0, 0, -1]).double()
        smooth = smooth / smooth.sum()
        column, row = (slope, smooth) if name.endswith("_h") else (smooth, slope)
    y = spatial_separable_conv2d(x, column, row, padding="same")[0]
    inside = (slice(8, -8), slice(8, -8))  # at the border some of them treat what lies outside in their own way
    torch.testing.assert_close(y.abs()[inside], torch.from_numpy(expected).abs()[inside], rtol=1e-9, atol=1e-12)


def test_gaussian_blur_of_torchvision() -> None:
    """The op that torchvision's gaussian_blur could be: reflected borders, one kernel for all channels."""
    blur = pytest.importorskip("torchvision.transforms.functional").gaussian_blur
    x = random((2, 3, 40, 50), torch.float32, "cpu")
    expected = blur(x, [9, 5], [2.0, 1.0])  # (width, height)
    at = torch.arange(9.0) - 4
    row, column = torch.softmax(-(at**2) / 8, 0), torch.softmax(-(at[2:7] ** 2) / 2, 0)
    layer = SpatialSeparableConv2d.from_filters(column, row, channels=3, padding_mode="reflect")
    torch.testing.assert_close(layer(x), expected)


def test_the_sum_of_pairs_is_the_whole_filter() -> None:
    """separate() of a filter of rank 3, pair by pair, is the dense convolution with it."""
    at = torch.arange(-3, 4, dtype=torch.float64)
    disc = (at[:, None] ** 2 + at**2 <= 9.5).double()
    parts = separate(disc, rank=3)
    assert parts.errors[1] > 1e-3 > 1e-12 > parts.error
    x = random((1, 2, 20, 21), torch.float64, "cpu")
    y = sum(spatial_separable_conv2d(x, c, r, padding="same") for c, r in zip(parts.column, parts.row, strict=True))
    torch.testing.assert_close(y, F.conv2d(x, disc.expand(2, 1, 7, 7), padding=3, groups=2))


# ---- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", [0, 1, (4, 3), "same"], ids=str)
@pytest.mark.parametrize("shared", [(False, False), (True, True), (False, True)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradcheck(layout: str, shared: tuple, padding: object, device: str) -> None:
    x = random((2, 3, 5, 6), torch.float64, device, layout)
    inputs = [t.requires_grad_() for t in (x, *filters(3, 3, 2, torch.float64, device, shared))]
    with strictness(True):
        assert torch.autograd.gradcheck(lambda *t: spatial_separable_conv2d(*t, padding), inputs, fast_mode=True)
        assert torch.autograd.gradgradcheck(lambda *t: spatial_separable_conv2d(*t, padding), inputs, fast_mode=True)


@pytest.mark.parametrize("needed", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients(dtype: torch.dtype, needed: tuple, device: str) -> None:
    """Against torch's two convolutions, for those inputs alone that ask; the image's gradient is one fused pass."""
    x, (column, row) = random((2, 5, 9, 20), dtype, device), filters(5, 3, 5, dtype, device)
    g = random((2, 5, 9, 20), dtype, device, seed=5)
    results = []
    for convolve in (spatial_separable_conv2d, by_two_convs):
        for t, wanted in zip((x, column, row), needed, strict=True):
            t.requires_grad_(bool(wanted))
        sepconv_ext.reset_kernel_counts()
        asked = [t for t in (x, column, row) if t.requires_grad]
        with strictness(convolve is spatial_separable_conv2d):
            results.append(torch.autograd.grad(convolve(x, column, row, (1, 2)), asked, g))
        if convolve is spatial_separable_conv2d:
            counts = sepconv_ext.kernel_counts()
            assert sum(n for k, n in counts.items() if "spatial_separable" in k) == 1 + needed[0], counts
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    for actual, expected in zip(*results, strict=True):
        assert actual.shape == expected.shape and actual.dtype == dtype
        scale = expected.abs().max().item()
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * scale)


def test_a_learnt_filter_is_found() -> None:
    """Fitting a layer to the output of a known filter finds that filter."""
    torch.manual_seed(1)
    x = random((4, 2, 16, 16), torch.float32, "cpu")
    target = spatial_separable_conv2d(x, BLUR, BLUR, padding="same")
    layer = SpatialSeparableConv2d(2, 5)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        error = F.mse_loss(layer(x), target)
        error.backward()
        return error

    optimizer.step(loss)
    learnt = layer.column[:, :, None] * layer.row[:, None]
    torch.testing.assert_close(learnt, (BLUR[:, None] * BLUR).expand(2, 5, 5), rtol=0, atol=2e-3)


# ---- torch's machinery -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
def test_opcheck(layout: str, device: str) -> None:
    for shared in ((False, False), (True, False)):
        x = random((2, 4, 5, 6), torch.float32, device, layout).requires_grad_()
        column, row = (t.requires_grad_() for t in filters(4, 3, 2, torch.float32, device, shared))
        torch.library.opcheck(torch.ops.sepconv_ext.spatial_separable_conv2d, (x, column, row, (1, 1, 0, 1)))


def test_compile_and_export() -> None:
    layer = SpatialSeparableConv2d(3, (3, 5))
    x = random((2, 3, 9, 8), torch.float32, "cpu").requires_grad_()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    results = []
    for module in (layer, compiled):
        with only_our_kernels():
            y = module(x)
            results.append((y, *torch.autograd.grad(y.square().sum(), (x, *layer.parameters()))))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)
    batch = torch.export.Dim("batch", min=1, max=8)
    program = torch.export.export(layer, (x.detach(),), dynamic_shapes=({0: batch},))
    other = random((5, 3, 9, 8), torch.float32, "cpu", seed=9)
    torch.testing.assert_close(program.module()(other), layer(other))
    traced = torch.fx.symbolic_trace(layer)
    assert [n.target.__name__ for n in traced.graph.nodes if n.op == "call_function"] == ["spatial_separable_conv2d"]


def test_transforms(device: str) -> None:
    """vmap, forward-mode differentiation and complex images go through ATen; autocast runs in the reduced type."""
    x, (column, row) = random((3, 2, 4, 7, 6), torch.float64, device), filters(4, 3, 3, torch.float64, device)
    each = torch.stack([spatial_separable_conv2d(image, column, row, 1) for image in x])
    torch.testing.assert_close(torch.func.vmap(lambda image: spatial_separable_conv2d(image, column, row, 1))(x), each)
    _, tangent = torch.func.jvp(
        lambda c: spatial_separable_conv2d(x[0], c, row, 1), (column,), (torch.ones_like(column),)
    )
    torch.testing.assert_close(tangent, spatial_separable_conv2d(x[0], torch.ones_like(column), row, 1))
    whole = spatial_separable_conv2d(*(t.to(torch.complex64) for t in (x[0], column, row)), 1)
    torch.testing.assert_close(whole.real, each[0].float(), rtol=1e-4, atol=1e-4)
    with torch.autocast(device, dtype=torch.bfloat16):
        y = spatial_separable_conv2d(x[0].float(), column.float(), row.float(), 1)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), each[0], rtol=2e-2, atol=1e-1)


def test_unbatched_and_one_dimensional(device: str) -> None:
    x, (column, row) = (
        random((2, 3, 8, 9), torch.float32, device),
        filters(3, 3, 5, torch.float32, device, (True, True)),
    )
    y = spatial_separable_conv2d(x, column, row, "same")
    torch.testing.assert_close(spatial_separable_conv2d(x[1], column[0], row[0], "same"), y[1])


def test_what_is_refused(device: str) -> None:
    x, c, r = torch.ones(1, 3, 5, 5, device=device), torch.ones(3, 3, device=device), torch.ones(3, 3, device=device)
    for arguments, words in {
        (x, c[:2], r): r"column must have size \[3, R\], one filter a channel of input, or \[1, R\], but has \[2, 3\]",
        (x, c, r[None]): r"row must have size \[3, S\].*but has \[1, 3, 3\]",
        (x[0, 0], c, r): "input must have 4 dimensions, but has 2",
        (x, c.double(), r): "column has dtype Double, but input has dtype Float",
        (x, c[:, :0], r): "column and row must have a kernel of at least 1x1, but has 0x3",
        (x, c, r, -1): "padding must be at least 0",
        (x, c, r, (1, 2, 3)): "padding must be one value or 2",
        (x, c, r, "reflect"): "padding must be 'same' or 'valid', but is 'reflect'",
        (x, torch.ones(3, 6, device=device), r): "column and row of height 6 .*padded input has a height of 5",
    }.items():
        with pytest.raises(RuntimeError, match=words):
            spatial_separable_conv2d(*arguments)


@pytest.mark.cuda
def test_filters_too_long_for_the_tile_take_two_convolutions() -> None:
    x, (column, row) = random((1, 2, 3, 9000), torch.float32, "cuda"), filters(2, 1, 8001, torch.float32, "cuda")
    with only_our_kernels():
        y = spatial_separable_conv2d(x, column, row, (0, 4000))
        assert "cuda_spatial_separable" not in sepconv_ext.kernel_counts()
    expected = by_two_convs(x.double(), column.double(), row.double(), (0, 4000))
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-2)


# ---- the layer -------------------------------------------------------------------------------------------------------


def test_the_layer() -> None:
    layer = SpatialSeparableConv2d(4, (3, 5))
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == {"column": (4, 3), "row": (4, 5)}
    assert str(layer) == "SpatialSeparableConv2d(4, kernel_size=(3, 5), padding='same')"
    x = random((2, 4, 7, 8), torch.float32, "cpu")
    assert layer(x).shape == x.shape and layer(x[0]).shape == x[0].shape
    other = SpatialSeparableConv2d(4, (3, 5))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x)) and torch.equal(copy.deepcopy(layer)(x), layer(x))
    shared = SpatialSeparableConv2d(4, 3, padding=(0, 1), padding_mode="circular", shared=True)
    assert str(shared) == (
        "SpatialSeparableConv2d(4, kernel_size=(3, 3), padding=(0, 1), padding_mode='circular', shared=True)"
    )
    expected = by_conv2d(F.pad(x, (1, 1, 0, 0), mode="circular"), shared.column, shared.row, 0)
    torch.testing.assert_close(shared(x), expected)


def test_the_layers_start_as_conv2d_starts() -> None:
    """The product of the filters has the variance of a fresh depthwise weight."""
    layer, conv = SpatialSeparableConv2d(4000, (3, 5)), nn.Conv2d(4000, 4000, (3, 5), groups=4000)
    product = layer.column[:, :, None] * layer.row[:, None]
    torch.testing.assert_close(product.var(), conv.weight.var(), rtol=0.05, atol=0)


def test_from_filters() -> None:
    layer = SpatialSeparableConv2d.from_filters(BLUR, BLUR[1:4], channels=3)
    assert layer.kernel_size == (5, 3) and layer.shared
    x = random((1, 3, 6, 6), torch.float32, "cpu")
    torch.testing.assert_close(layer(x), spatial_separable_conv2d(x, BLUR, BLUR[1:4], (2, 1)))
    each = SpatialSeparableConv2d.from_filters(BLUR.repeat(3, 1), BLUR.repeat(3, 1), channels=3, padding=0)
    assert not each.shared and each(x).shape == (1, 3, 2, 2)
