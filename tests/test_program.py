"""Programs of frozen networks: each step against float64, in every layout; sizes, threads, memory, and bad text."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sepconv_ext
from harness import ACTIVATIONS, LAYOUTS, assert_as_accurate, random, with_layout
from sepconv_ext import freeze, reference
from sepconv_ext.graph.program import packed, packed_taps
from sepconv_ext.program import Lease

_C = sepconv_ext._C
run = torch.ops.sepconv_ext.program

# (N, C, H, W): one channel, one row, one pixel; vectors not full; more than a task; nothing.
SIZES = ((2, 24, 7, 7), (1, 1, 19, 5), (3, 58, 1, 19), (5, 3, 19, 19), (1, 40, 1, 1), (2, 64, 33, 30), (0, 8, 4, 4))
by_size = pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
by_layout = pytest.mark.parametrize("layout", LAYOUTS)


def constants_of(*tensors: Tensor) -> tuple[Tensor, list[int]]:
    """One row of them, and where each begins."""
    offsets, end = [], 0
    for tensor in tensors:
        offsets.append(end)
        end += tensor.numel()
    return torch.cat([torch.zeros(0), *(tensor.reshape(-1) for tensor in tensors)]), offsets


def run_step(step: str, *inputs: Tensor, constants: Tensor | None = None, result: str = "image") -> Tensor:
    """One step with all inputs as its values."""
    kinds = ["image" if x.dim() == 4 else "matrix" for x in inputs]
    lines = [f"%{i} = input {kind}" for i, kind in enumerate(kinds)]
    name, _, fields = step.partition(" ")
    values = " ".join(f"%{i}" for i in range(len(inputs)))
    n = len(inputs)
    code = "\n".join([*lines, f"%{n} = {name} {values} {fields}", f"return %{n} {result}"])
    (y,) = run(list(inputs), torch.zeros(0) if constants is None else constants, code)
    return y


def weights(*size: int) -> tuple[Tensor, Tensor]:
    return random(size, torch.float32, "cpu", seed=2), random((size[0],), torch.float32, "cpu", seed=3)


# --- each step ---


@pytest.mark.parametrize("activation", ["identity", "relu6", "silu", "hardswish"])
@by_layout
@by_size
def test_product(size: tuple[int, ...], layout: str, activation: str, isa: str) -> None:
    x = random(size, torch.float32, "cpu", layout)
    for K, stride in ((33, 1), (33, 2), (24, 1), (40, 2)):  # 24 and 40: half a panel is left over, a vector of AVX2
        w, b = weights(K, size[1], 1, 1)
        constants, (at_w, at_b) = constants_of(packed(w), b)
        summed = F.conv2d(x.double(), w.double(), b.double(), stride)
        r = random(summed.shape, torch.float32, "cpu", layout, seed=4)
        summed = summed + r.double()
        act = reference.ACTIVATIONS[activation]
        step = f"product weight={at_w} bias={at_b} K={K} stride={stride}x{stride} act={activation}"
        y = run_step(step, x, r, constants=constants)
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert_as_accurate(y, act(F.conv2d(x, w, b, stride) + r), act(summed), summed=summed)


@by_layout
@by_size
def test_depthwise(size: tuple[int, ...], layout: str, isa: str) -> None:
    x, C = random(size, torch.float32, "cpu", layout), size[1]
    for kernel, stride, dilation in ((3, 1, 1), (5, 2, 1), (3, 2, 2)):
        w, b = weights(C, 1, kernel, kernel)
        constants, (at_w, at_b) = constants_of(packed_taps(w), b)
        pad = dilation * (kernel // 2)
        rest = (b, stride, pad, dilation, C)
        summed = F.conv2d(x.double(), w.double(), *(t.double() if isinstance(t, Tensor) else t for t in rest))
        step = (
            f"depthwise weight={at_w} bias={at_b} kernel={kernel}x{kernel} stride={stride}x{stride} "
            f"dilation={dilation}x{dilation} padding={pad}x{pad}x{pad}x{pad} act=relu"
        )
        y = run_step(step, x, constants=constants)
        assert_as_accurate(y, F.conv2d(x, w, *rest).relu(), summed.relu(), summed=summed)


CONVOLUTIONS = {  # kernel, stride, dilation, (top, bottom, left, right)
    "3x3": ((3, 3), (1, 1), (1, 1), (1, 1, 1, 1)),
    "stem": ((3, 3), (2, 2), (1, 1), (1, 2, 0, 2)),
    "dilated": ((3, 3), (1, 1), (2, 2), (2, 2, 2, 2)),
    "patch": ((4, 4), (4, 4), (1, 1), (2, 1, 2, 2)),
    "wide": ((1, 5), (1, 3), (1, 2), (0, 2, 4, 4)),
    # Taps that see padding alone: all but one, but one row's, but one row's and some columns', all of them; and with
    # the one that is left inside the image.
    "one_tap": ((3, 3), (1, 1), (40, 40), (40, 40, 40, 40)),
    "one_row": ((3, 3), (1, 1), (40, 2), (40, 40, 2, 2)),
    "some_taps": ((3, 5), (2, 3), (40, 30), (40, 40, 60, 60)),
    "no_tap": ((2, 2), (1, 1), (90, 90), (45, 45, 45, 45)),
    "inside": ((3, 3), (1, 1), (41, 41), (40, 43, 40, 44)),
}


# Rows of whole blocks of pixels, whose windows AVX2 multiplies by hand.
WHOLE_BLOCKS = (1, 6, 12, 24)


@pytest.mark.parametrize("name", CONVOLUTIONS)
@by_layout
@pytest.mark.parametrize("size", (*SIZES, WHOLE_BLOCKS), ids=lambda size: "x".join(map(str, size)))
def test_convolution(size: tuple[int, ...], layout: str, name: str, isa: str) -> None:
    x = random(size, torch.float32, "cpu", layout)
    kernel, stride, dilation, (top, bottom, left, right) = CONVOLUTIONS[name]
    w, b = weights(24, size[1], *kernel)
    constants, (at_w, at_b) = constants_of(packed(w), b)

    def convolved(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (left, right, top, bottom)), w, b, stride, 0, dilation)

    summed = convolved(x.double(), w.double(), b.double())
    r = random(summed.shape, torch.float32, "cpu", layout, seed=4)
    summed = summed + r.double()
    step = (
        f"conv weight={at_w} bias={at_b} K=24 kernel={kernel[0]}x{kernel[1]} stride={stride[0]}x{stride[1]} "
        f"dilation={dilation[0]}x{dilation[1]} padding={top}x{bottom}x{left}x{right} act=hardswish"
    )
    y = run_step(step, x, r, constants=constants)
    assert_as_accurate(y, F.hardswish(convolved(x, w, b) + r), F.hardswish(summed), summed=summed)


PIXELWISE = {
    "add act=relu": lambda x, y: F.relu(x + y),
    "mul act=silu": lambda x, y: F.silu(x * y),
    "clamp factor=0.5 shift=0.25 low=0 high=1": lambda x: (x * 0.5 + 0.25).clamp(0, 1),
    "layer_norm eps=0.001": lambda x: F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2], eps=1e-3).permute(0, 3, 1, 2),
    "mean": lambda x: x.mean((2, 3), keepdim=True),
    "dense": lambda x: x,
    "max_pool kernel=3x3 stride=2x2 padding=1x1x1x1 ceil=1": lambda x: F.max_pool2d(x, 3, 2, 1, ceil_mode=True),
    "mean_pool kernel=2x2 stride=2x2 padding=1x1x1x1 ceil=1": lambda x: F.avg_pool2d(x, 2, 2, 1, True, False),
    "max_pool kernel=3x3 stride=2x2 padding=1x1x1x1": lambda x: F.max_pool2d(x, 3, 2, 1),
    "mean_pool kernel=3x3 stride=2x2 padding=1x1x1x1": lambda x: F.avg_pool2d(x, 3, 2, 1, False, False),
    "padded_mean_pool kernel=3x3 stride=2x2 padding=1x1x1x1": lambda x: F.avg_pool2d(x, 3, 2, 1),
} | {f"activate act={name}": reference.ACTIVATIONS[name] for name in ACTIVATIONS}


@pytest.mark.parametrize("step", PIXELWISE)
@by_layout
@by_size
def test_pixelwise(size: tuple[int, ...], layout: str, step: str, isa: str) -> None:
    function = PIXELWISE[step]
    count = 2 if step[:3] in ("add", "mul") else 1
    inputs = [random(size, torch.float32, "cpu", layout, seed=seed) for seed in range(count)]
    expected = function(*(x.double() for x in inputs))
    largest = torch.stack([x.abs().amax() for x in inputs]).amax().double() if size[0] else None
    assert_as_accurate(run_step(step, *inputs), function(*inputs), expected, step, summed=largest)


@by_layout
@by_size
def test_scales(size: tuple[int, ...], layout: str, isa: str) -> None:
    N, C, *_ = size
    x, gate = random(size, torch.float32, "cpu", layout), random((N, C, 1, 1), torch.float32, "cpu", seed=1)
    scale, shift = (random((C,), torch.float32, "cpu", seed=seed) for seed in (2, 3))
    constants, (at_scale, at_shift) = constants_of(scale, shift)
    assert torch.equal(run_step("gate", x, gate), x * gate)
    affine = run_step(f"affine weight={at_scale} bias={at_shift}", x, constants=constants)
    per_channel = [t.reshape(-1, 1, 1) for t in (scale, shift)]
    expected = x.double() * per_channel[0].double() + per_channel[1].double()
    assert_as_accurate(affine, x * per_channel[0] + per_channel[1], expected)
    norm = run_step(f"layer_norm weight={at_scale} bias={at_shift} eps=1e-6", x, constants=constants)

    def normed(x: Tensor, *parameters: Tensor) -> Tensor:
        return F.layer_norm(x.permute(0, 2, 3, 1), (C,), *parameters, 1e-6).permute(0, 3, 1, 2)

    assert_as_accurate(norm, normed(x, scale, shift), normed(x.double(), scale.double(), shift.double()))


# --- some channels, and several images as one ---


def program_of(lines: str, inputs: list[Tensor], constants: Tensor | None = None) -> list[Tensor]:
    given = [f"%{i} = input image" for i in range(len(inputs))]
    text = [line.strip() for line in lines.strip().splitlines()]
    return run(inputs, torch.zeros(0) if constants is None else constants, "\n".join([*given, *text]))


def kinds_run(frozen_lines: str, x: Tensor, constants: Tensor) -> Counter[str]:
    code = "\n".join(["%0 = input image", *(line.strip() for line in frozen_lines.strip().splitlines())])
    return Counter(step for step, *_ in _C.program_times([x], constants, code, 1))


@by_layout
@by_size
def test_channels_are_moved(size: tuple[int, ...], layout: str, isa: str) -> None:
    x, other = (random(size, torch.float32, "cpu", layout, seed=seed) for seed in (0, 1))
    C = size[1]
    first, last = C // 3, C - C // 2
    lines = f"""
        %2 = slice %0 begin={first} K={last - first}
        %3 = concat %2 %1 %2
        %4 = interleave %0 %1
        %5 = interleave %0 %1 %0
        return %2 image %3 image %4 image %5 image"""
    part = x[:, first:last]
    turns = [torch.stack(images, 2).flatten(1, 2) for images in ((x, other), (x, other, x))]
    for count in (1, 2):
        torch.set_num_threads(count)
        results = program_of(lines, [x, other])
        for y, right in zip(results, (part, torch.cat([part, other, part], 1), *turns), strict=True):
            assert y.is_contiguous(memory_format=torch.channels_last) and torch.equal(y, right)


@pytest.mark.parametrize("C", [6, 48, 58])
@pytest.mark.parametrize("N", [0, 1, 3])
def test_steps_read_and_write_some_channels(C: int, N: int, isa: str) -> None:
    """Each step that takes pixels which lie apart, reading half of the channels and writing a part of a whole."""
    x = random((N, C, 9, 14), torch.float32, "cpu", "channels_last")
    half = C // 2
    w, b = weights(half, half, 1, 1)
    dense, taps, deep = (weights(half, *size)[0] for size in ((half, 3, 3), (1, 3, 3), (3 * half, 1, 1)))
    wide = random((3 * half, half, 1, 1), torch.float32, "cpu", seed=5)
    dense, wide = dense * half**-0.5, wide * half**-0.5
    constants, at = constants_of(packed(w), b, packed(dense), packed_taps(taps), packed(wide), packed(deep))
    thrice = packed_taps(taps.repeat(3, 1, 1, 1))
    at.append(constants.numel())
    constants = torch.cat([constants, thrice.reshape(-1)])
    kernel = "kernel=3x3 padding=1x1x1x1"
    lines = f"""
        %1 = slice %0 begin=0 K={half}
        %2 = slice %0 begin={C - half} K={half}
        %3 = product %2 residual=%1 weight={at[0]} bias={at[1]} K={half} act=relu
        %4 = conv %2 residual=%3 weight={at[2]} bias={at[1]} K={half} {kernel}
        %5 = depthwise %2 weight={at[3]} bias={at[1]} {kernel} act=relu6
        %6 = add %5 %1 act=relu
        %7 = max_pool %1 {kernel}
        %8 = padded_mean_pool %2 {kernel}
        %9 = product %2 weight={at[4]} K={3 * half} act=relu
        %10 = depthwise %9 weight={at[6]} {kernel}
        %11 = product %10 residual=%1 weight={at[5]} K={half}
        %12 = concat %3 %4 %5 %6 %7
        %13 = concat %8 %11 %2
        %14 = interleave %2 %1
        %15 = concat %12 %13 %14
        return %15 image"""
    kinds = kinds_run(lines, x, constants) if N else Counter()
    # Nothing is copied but the slice that is a part as it is; the block runs as one step.
    assert not N or (kinds["dense"], kinds["slice"], kinds["concat"], kinds["inverted_residual"]) == (0, 0, 1, 1)

    def network(x: Tensor, w: Tensor, b: Tensor, dense: Tensor, taps: Tensor, wide: Tensor, deep: Tensor) -> Tensor:
        one, two = x[:, :half], x[:, C - half :]
        a = F.relu(F.conv2d(two, w, b) + one)
        c = F.conv2d(two, dense, b, padding=1) + a
        d = F.relu6(F.conv2d(two, taps, b, padding=1, groups=half))
        e = F.conv2d(F.relu(F.conv2d(two, wide)), taps.repeat(3, 1, 1, 1), padding=1, groups=3 * half)
        pools = F.max_pool2d(one, 3, 1, 1), F.avg_pool2d(two, 3, 1, 1)
        turns = torch.stack((two, one), 2).flatten(1, 2)
        return torch.cat([a, c, d, F.relu(d + one), *pools, F.conv2d(e, deep) + one, two, turns], 1)

    given = (x, w, b, dense, taps, wide, deep)
    expected, torchs = network(*(t.double() for t in given)), network(*given)
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        results += program_of(lines, [x], constants)
    assert torch.equal(*results)
    assert_as_accurate(results[0], torchs, expected, summed=expected.abs().amax() if N else None)


def test_steps_that_take_dense_images_get_a_copy() -> None:
    x = random((2, 10, 5, 4), torch.float32, "cpu", "channels_last")
    lines = "%1 = slice %0 begin=3 K=5\n%2 = mean %1\n%3 = activate %1 act=relu\n%4 = concat %3 %1\n"
    lines += "%5 = add %0 %0\n%6 = mean %5\n%7 = concat %5 %5\n"  # a part that a mean reads lies by itself
    code = f"%0 = input image\n{lines}return %2 image %4 image %6 image %7 image"
    mean, joined, whole, twice = run([x], torch.zeros(0), code)
    torch.testing.assert_close(whole, 2 * x.mean((2, 3), keepdim=True))
    assert torch.equal(twice, torch.cat([2 * x, 2 * x], 1))
    torch.testing.assert_close(mean, x[:, 3:8].mean((2, 3), keepdim=True))
    assert torch.equal(joined, torch.cat([x[:, 3:8].relu(), x[:, 3:8]], 1))
    kinds = Counter(step for step, *_ in _C.program_times([x], torch.zeros(0), code, 1))
    assert kinds == Counter(dense=1, mean=2, activate=1, concat=2, add=1)


def test_memory_of_a_whole_is_not_taken_over_while_a_part_is_read() -> None:
    """A product that adds to an image of which it reads a part: its first outputs would lie where it still reads."""
    x, w = random((1, 64, 6, 6), torch.float32, "cpu", "channels_last"), weights(64, 32, 1, 1)[0]
    code = """%0 = input image
        %1 = activate %0 act=relu
        %2 = slice %1 begin=0 K=32
        %3 = product %2 residual=%1 weight=0 K=64
        %4 = activate %3 act=relu
        return %4 image"""
    (y,) = run([x], packed(w).reshape(-1), "\n".join(line.strip() for line in code.splitlines()))
    one = x.relu()
    torch.testing.assert_close(y, F.relu(F.conv2d(one[:, :32], w) + one))


GROUPS = ((2, 6), (4, 20), (8, 8), (8, 72), (16, 16), (16, 48), (32, 64), (48, 96))  # channels of a group, of all


@pytest.mark.parametrize("group, C", GROUPS, ids=str)
def test_grouped(group: int, C: int, isa: str) -> None:
    for N, H, W in ((2, 7, 7), (1, 1, 1), (3, 19, 12), (0, 4, 4)):
        x = random((N, C, H, W), torch.float32, "cpu")
        for kernel, stride, dilation in ((3, 1, 1), (3, 2, 1), (5, 1, 2)):
            w, b = weights(C, group, kernel, kernel)
            w, constants = w * group**-0.5, torch.zeros(0)
            constants, (at_w, at_b) = constants_of(packed_taps(w), b)
            pad, groups = dilation * (kernel // 2), C // group
            step = (
                f"grouped groups={groups} weight={at_w} bias={at_b} kernel={kernel}x{kernel} stride={stride}x{stride} "
                f"dilation={dilation}x{dilation} padding={pad}x{pad}x{pad}x{pad} act=relu"
            )
            summed = F.conv2d(x.double(), w.double(), b.double(), stride, pad, dilation, groups)
            torchs = F.conv2d(x, w, b, stride, pad, dilation, groups).relu()
            results = []
            for count in (1, 2):
                torch.set_num_threads(count)
                results.append(run_step(step, x, constants=constants))
            assert torch.equal(*results)
            assert_as_accurate(results[0], torchs, summed.relu(), summed=summed)


class Shuffled(nn.Module):
    """A unit of ShuffleNet V2, one of ResNeXt and a fire module of SqueezeNet."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 24, 3, 2, 1)
        self.one, self.two = nn.Conv2d(12, 12, 1), nn.Conv2d(12, 12, 1)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.up, self.down = nn.Conv2d(24, 32, 1), nn.Conv2d(32, 24, 1)
        self.groups = nn.Conv2d(32, 32, 3, padding=1, groups=4)
        self.squeeze, self.small, self.large = nn.Conv2d(24, 8, 1), nn.Conv2d(8, 10, 1), nn.Conv2d(8, 10, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.stem(x)), 3, 2, ceil_mode=True)
        left, right = x.chunk(2, dim=1)
        right = F.relu(self.two(self.depthwise(F.relu(self.one(right)))))
        x = torch.cat([left, right], dim=1)
        N, C, H, W = x.shape
        x = x.view(N, 2, C // 2, H, W).transpose(1, 2).contiguous().view(N, C, H, W)
        x = F.relu(x + self.down(F.relu(self.groups(F.relu(self.up(x))))))
        x = F.relu(self.squeeze(x))
        x = torch.cat([F.relu(self.small(x)), F.relu(self.large(x))], 1)[:, :17]
        return F.channel_shuffle(torch.cat([x, x[:, 3:10]], 1), 3)


def test_a_network_of_pieces_is_one_call() -> None:
    model = Shuffled().eval()
    frozen = freeze(model, torch.randn(2, 3, 32, 32))
    (code,) = codes(frozen)
    assert not [node for node in frozen.graph.nodes if node.target in (torch.ops.aten.cat.default,)]
    kinds = Counter(line.split()[2] for line in code.splitlines() if " = " in line)
    assert (kinds["grouped"], kinds["interleave"], kinds["max_pool"]) == (1, 2, 1)
    for size in ((2, 3, 32, 32), (1, 3, 37, 45)):
        x = random(size, torch.float32, "cpu")
        exact = copy.deepcopy(model).double()(x.double())
        for count in (1, 2):
            torch.set_num_threads(count)
            torch.testing.assert_close(frozen(x).double(), exact, rtol=1e-5, atol=1e-5)
    x = torch.randn(2, 3, 33, 47)
    torch.library.opcheck(
        run.default, ([x], next(frozen.buffers()), code), test_utils=("test_schema", "test_faketensor")
    )


def test_nan_stays() -> None:
    x = torch.full((1, 3, 3, 3), float("nan"))
    for step in ("max_pool kernel=2x2", "mean", "activate act=relu6", "clamp factor=1 low=0 high=1"):
        assert run_step(step, x).isnan().all(), step


def test_linear() -> None:
    for N, C, K in ((1, 1280, 1000), (3, 5, 17), (64, 24, 16), (0, 8, 8)):
        x, (w, b) = random((N, C), torch.float32, "cpu"), weights(K, C)
        constants, (at_w, at_b) = constants_of(packed(w), b)
        y = run_step(f"product weight={at_w} bias={at_b} K={K}", x, constants=constants, result="matrix")
        assert_as_accurate(y, F.linear(x, w, b), F.linear(x.double(), w.double(), b.double()))


def norm(x: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2], eps=eps).permute(0, 3, 1, 2)


# Sizes as above, then: many pixels in several bands; weights of more than a mebibyte, for few pixels and for many.
PERCEPTRONS = (*((size, 4 * size[1] + 3) for size in SIZES), ((1, 24, 40, 40), 100), ((1, 300, 5, 5), 900))
PERCEPTRONS += (((2, 300, 16, 15), 900),)


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("size, hidden", PERCEPTRONS, ids=str)
def test_two_products(size: tuple[int, ...], hidden: int, normed: bool, isa: str) -> None:
    """Two blocks of two products, the second in the memory of its own input."""
    C = size[1]
    x, (w, b), (w1, b1), (w2, b2) = (
        random(size, torch.float32, "cpu"),
        weights(C, C),
        weights(hidden, C),
        weights(C, hidden),
    )
    w, w1, w2 = w * C**-0.5, w1 * C**-0.5, w2 * hidden**-0.5
    constants, at = constants_of(*(packed(t) if t.dim() == 2 else t for t in (w, b, w1, b1, w2, b2)))
    first, mlp = (
        f"weight={at[0]} bias={at[1]} K={C}",
        (f"weight={at[2]} bias={at[3]} K={hidden} act=gelu", at[4], at[5]),
    )
    lines = ["%0 = input image", f"%1 = product %0 {first}"]
    for block in range(2):
        base = 1 + 3 * block
        lines.append(
            f"%{base + 1} = layer_norm %{base} eps=1e-6" if normed else f"%{base + 1} = activate %{base} act=relu"
        )
        lines.append(f"%{base + 2} = product %{base + 1} {mlp[0]}")
        lines.append(f"%{base + 3} = product %{base + 2} %{base} weight={mlp[1]} bias={mlp[2]} K={C} act=relu6")
    code = "\n".join([*lines, "return %7 image"])

    def network(*values: Tensor) -> tuple[Tensor, Tensor]:
        x, w, b, w1, b1, w2, b2 = values
        y = F.conv2d(x, w[:, :, None, None], b)
        for _ in range(2):
            inner = norm(y, 1e-6) if normed else y.relu()
            before = y + F.conv2d(F.gelu(F.conv2d(inner, w1[:, :, None, None], b1)), w2[:, :, None, None], b2)
            y = F.relu6(before)
        return y, before

    kinds = Counter(step[0] for step in _C.program_times([x], constants, code, 1)) if size[0] else Counter(perceptron=2)
    assert kinds["perceptron"] == 2 and kinds["layer_norm"] == 0
    given = (x, w, b, w1, b1, w2, b2)
    expected, before = network(*(t.double() for t in given))
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(run([x], constants, code)[0])
    assert_as_accurate(results[0], network(*given)[0], expected, summed=before)
    assert all(torch.equal(results[0], other) for other in results[1:])


# --- a network ---


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * F.hardsigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1)))))


class Network(nn.Module):
    """A stem, a block with squeeze-and-excitation and a skip, two results."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(3, 12, 3, 2, 1, bias=False), nn.BatchNorm2d(12), nn.Hardswish())
        self.expand = nn.Sequential(nn.Conv2d(12, 40, 1), nn.SiLU())
        self.depthwise = nn.Sequential(nn.Conv2d(40, 40, 5, padding=2, groups=40), nn.SiLU())
        self.excite = SqueezeExcite(40)
        self.project = nn.Conv2d(40, 12, 1)
        self.head = nn.Linear(12, 7)
        for norm in (module for module in self.modules() if isinstance(module, nn.BatchNorm2d)):
            nn.init.uniform_(norm.running_mean), nn.init.uniform_(norm.running_var, 0.5, 1.5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.stem(x)
        y = y + self.project(self.excite(self.depthwise(self.expand(y))))
        return self.head(y.mean((2, 3))), F.max_pool2d(y, 3, 2, 1)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return Network().eval()


@pytest.fixture
def frozen(model: nn.Module) -> nn.Module:
    return freeze(model, torch.randn(1, 3, 32, 32))


def codes(frozen: nn.Module) -> list[str]:
    return [node.args[2] for node in frozen.graph.nodes if node.target is run.default]


def test_a_network_is_one_call(model: nn.Module, frozen: nn.Module) -> None:
    (code,) = codes(frozen)
    kinds = [line.split()[2] for line in code.splitlines() if " = " in line]
    convolutions = {"conv": 1, "depthwise": 1, "product": 5}
    assert Counter(kinds) == {"input": 1, **convolutions, "mean": 2, "clamp": 1, "gate": 1, "max_pool": 1}
    (entry,) = frozen.report.programs
    assert entry.name == "stem.0 -> head" and "5 product" in entry.summary
    assert not frozen.report.skipped


@pytest.mark.parametrize("size", [(1, 3, 32, 32), (2, 3, 32, 32), (5, 3, 17, 50), (3, 3, 1, 1), (0, 3, 32, 32)])
def test_any_size_and_any_number_of_threads(model: nn.Module, frozen: nn.Module, size: tuple) -> None:
    x = random(size, torch.float32, "cpu")
    exact, expected = (copy.deepcopy(model).to(t)(x.to(t)) for t in (torch.float64, torch.float32))
    results = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        results.append(frozen(x))
        for y, right, torchs in zip(results[-1], exact, expected, strict=True):
            assert y.shape == right.shape and y.is_contiguous() == torchs.is_contiguous()
            torch.testing.assert_close(y.double(), right, rtol=1e-5, atol=1e-5)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_team_of_more_threads_than_cores(frozen: nn.Module) -> None:
    """Threads that come late, or only when the network is done, from several callers at once: every task runs once."""
    x = random((1, 3, 64, 64), torch.float32, "cpu")
    torch.set_num_threads(1)
    expected, wrong = frozen(x), []

    def serve() -> None:
        for _ in range(50):
            if not all(torch.equal(a, b) for a, b in zip(frozen(x), expected, strict=True)):
                wrong.append(1)

    torch.set_num_threads(16)
    serve()
    callers = [threading.Thread(target=serve) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


def test_a_team_takes_strips_in_turns(isa: str) -> None:
    """Blocks and products of so many multiply-adds that each thread gets some shares; few pixels with a far weight."""
    for C, K, H, W in ((64, 128, 33, 29), (512, 600, 7, 7), (40, 24, 61, 50)):
        x = random((1, C, H, W), torch.float32, "cpu", "channels_last")
        taps, (w, b), (square, _) = weights(C, 1, 3, 3)[0], weights(K, C, 1, 1), weights(K, K, 1, 1)
        w, square = w * C**-0.5, square * K**-0.5
        constants, at = constants_of(packed_taps(taps), packed(w), b, packed(square))
        lines = f"""
            %1 = depthwise %0 weight={at[0]} kernel=3x3 padding=1x1x1x1 act=relu
            %2 = product %1 weight={at[1]} bias={at[2]} K={K} act=relu
            %3 = product %2 residual=%2 weight={at[3]} K={K}
            return %3 image"""

        def network(x: Tensor, taps: Tensor, w: Tensor, b: Tensor, square: Tensor) -> Tensor:
            y = F.conv2d(F.conv2d(x, taps, padding=1, groups=x.shape[1]).relu(), w, b).relu()
            return F.conv2d(y, square) + y

        given = (x, taps, w, b, square)
        expected, torchs = network(*(t.double() for t in given)), network(*given)
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results += program_of(lines, [x], constants)
        assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
        assert_as_accurate(results[0], torchs, expected, summed=expected.abs().amax())


def test_each_image_by_itself(frozen: nn.Module) -> None:
    """What stands beside an image in its batch does not change a bit of its result."""
    x = random((7, 3, 40, 24), torch.float32, "cpu")
    together = frozen(x)
    for i in range(7):
        assert all(torch.equal(a[i : i + 1], b) for a, b in zip(together, frozen(x[i : i + 1]), strict=True))


@by_layout
def test_every_layout_of_the_input(frozen: nn.Module, layout: str) -> None:
    x = random((2, 3, 20, 20), torch.float32, "cpu")
    expected = frozen(x)
    for given in (with_layout(x, layout), x[:, :, 2:-1, 1:], x[:1].expand(4, -1, -1, -1)):
        same = frozen(given.clone(memory_format=torch.contiguous_format))
        assert all(torch.equal(a, b) for a, b in zip(frozen(given), same, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(frozen(with_layout(x, layout)), expected, strict=True))


def test_many_callers(frozen: nn.Module) -> None:
    inputs = [torch.randn(1 + i % 3, 3, 12 + 2 * i, 16) for i in range(8)]
    expected = [frozen(x) for x in inputs]
    wrong = []

    def serve(x: Tensor, want: tuple) -> None:
        for _ in range(30):
            if not all(torch.equal(a, b) for a, b in zip(frozen(x), want, strict=True)):
                wrong.append(tuple(x.shape))

    callers = [threading.Thread(target=serve, args=pair) for pair in zip(inputs, expected, strict=True)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


def test_results_are_fresh(frozen: nn.Module) -> None:
    x = torch.randn(2, 3, 32, 32)
    first = frozen(x)
    kept = [y.clone() for y in first]
    frozen(torch.randn(2, 3, 32, 32))
    assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True))


def forget_programs() -> None:
    """Of the programs that nobody keeps, only such as need no memory are left."""
    gc.collect()
    for i in range(20):
        step = f"%1 = clamp %0 factor=1 shift={i} low=0 high=1"
        run([torch.zeros(1, 1, 1, 1)], torch.zeros(0), f"%0 = input image\n{step}\nreturn %1 image")


def test_memory_goes_with_the_last_copy(model: nn.Module) -> None:
    forget_programs()
    before = _C.idle_arena_bytes()
    layers = nn.Sequential(nn.Conv2d(5, 31, 1), nn.Conv2d(31, 31, 3, padding=1), nn.ReLU()).eval()
    frozen = freeze(layers, torch.randn(1, 5, 8, 8))
    frozen(torch.randn(1, 5, 64, 64))
    kept = _C.idle_arena_bytes() - before
    assert kept >= 4 * 31 * 64 * 64
    for _ in range(20):
        frozen(torch.randn(1, 5, 64, 64))
    assert _C.idle_arena_bytes() - before == kept  # used again and again
    copied, restored = copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))
    del frozen, copied
    gc.collect()
    assert _C.idle_arena_bytes() - before == kept
    del restored
    gc.collect()
    assert _C.idle_arena_bytes() == before


def test_programs_that_nobody_keeps_are_few() -> None:
    forget_programs()
    before = _C.idle_arena_bytes()
    x = torch.randn(1, 4, 16, 16)
    for factor in range(100):
        line = f"%1 = clamp %0 factor={factor} low=0 high=1\n%2 = add %1 %0\nreturn %2 image"
        run([x], torch.zeros(0), f"%0 = input image\n{line}")
    assert _C.idle_arena_bytes() - before <= 16 * 4 * 4 * 16 * 16 * 16
    leases = [Lease(f"%0 = input image\n%1 = mean %0 eps={i}\nreturn %1 image") for i in range(40)]
    assert len(leases) == 40


# --- what runs as one step ---


def steps_run(frozen: nn.Module, x: Tensor) -> Counter[str]:
    (code,) = codes(frozen)
    return Counter(step for step, *_ in _C.program_times([x], next(frozen.buffers()), code, 1))


class Inverted(nn.Module):
    """An inverted residual block whose parts may be needed elsewhere."""

    def __init__(self, gate: nn.Module | None, also: str = "", stride: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.expand, self.project = nn.Conv2d(8, 40, 1), nn.Conv2d(40, 8, 1)
        self.depthwise = nn.Conv2d(40, 40, 3, stride, 1, groups=40)
        self.down, self.up, self.gate, self.also = nn.Conv2d(40, 4, 1), nn.Conv2d(4, 40, 1), gate, also

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        e = F.silu(self.expand(x))
        d = F.relu6(self.depthwise(e))
        g = d
        if self.gate is not None:
            g = d * self.gate(self.up(F.silu(self.down(d.mean((2, 3), keepdim=True)))))
        y = self.project(g)
        y = y + x if y.shape == x.shape else y
        return (y, {"e": e, "d": d}[self.also]) if self.also else (y,)


@pytest.mark.parametrize("gate", [None, nn.Sigmoid(), nn.Hardsigmoid(), nn.Tanh()], ids=str)
@pytest.mark.parametrize("also", ["", "e", "d"])
@pytest.mark.parametrize("stride", [1, 2])
def test_inverted_residual_blocks(gate: nn.Module | None, also: str, stride: int) -> None:
    model, x = Inverted(gate, also, stride).eval(), random((3, 8, 19, 12), torch.float32, "cpu")
    frozen = freeze(model, x)
    fused = also != "d" and not isinstance(gate, nn.Tanh)
    assert steps_run(frozen, x)["inverted_residual"] == (1 if fused else 0)
    exact = copy.deepcopy(model).double()(x.double())
    for count in (1, 2):
        torch.set_num_threads(count)
        for y, right in zip(frozen(x), exact, strict=True):
            torch.testing.assert_close(y.double(), right, rtol=1e-5, atol=1e-5)


class ConvNeXtBlock(nn.Module):
    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.up, self.down = nn.Linear(channels, hidden), nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        pixels = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + self.down(F.gelu(self.up(pixels))).permute(0, 3, 1, 2)


@pytest.mark.parametrize("channels, hidden", [(24, 96), (58, 200), (24, 30)])
def test_two_products_behind_a_norm(channels: int, hidden: int) -> None:
    model = nn.Sequential(ConvNeXtBlock(channels, hidden), ConvNeXtBlock(channels, hidden)).eval()
    x = random((2, channels, 9, 13), torch.float32, "cpu")
    frozen = freeze(model, x)
    assert steps_run(frozen, x)["perceptron"] == 2
    torch.testing.assert_close(frozen(x).double(), copy.deepcopy(model).double()(x.double()), rtol=1e-5, atol=1e-5)


def test_a_value_is_input_and_residual_at_once() -> None:
    """Such a product must not write where it reads."""

    class Doubled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layers = nn.ModuleList(nn.Conv2d(24, 24, k, padding=k // 2) for k in (1, 3, 1, 1))
            self.up, self.down = nn.Conv2d(24, 96, 1), nn.Conv2d(96, 24, 1)

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = F.relu(x + layer(x))
            return self.layers[0](x + self.down(self.up(x)))

    model, x = Doubled().eval(), random((2, 24, 14, 15), torch.float32, "cpu")
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double())
        torch.testing.assert_close(freeze(model, x)(x).double(), exact, rtol=1e-5, atol=1e-5)


# --- as torch's machinery sees it ---


def test_opcheck(frozen: nn.Module) -> None:
    (code,) = codes(frozen)
    constants = next(frozen.buffers())
    for x in (torch.randn(2, 3, 16, 16), torch.randn(1, 3, 9, 8).to(memory_format=torch.channels_last)):
        torch.library.opcheck(run.default, ([x], constants, code), test_utils=("test_schema", "test_faketensor"))


def test_exported_and_compiled(frozen: nn.Module) -> None:
    x = torch.randn(2, 3, 32, 32)
    batch = ({0: torch.export.Dim.AUTO},)
    exported = torch.export.export(frozen, (x,), dynamic_shapes=(batch,), strict=False)
    larger = torch.randn(5, 3, 32, 32)
    for again in (exported.module(), torch.compile(frozen, backend="eager", dynamic=True)):
        for y, expected in zip(again(larger), frozen(larger), strict=True):
            assert torch.equal(y, expected)


def test_no_derivative(frozen: nn.Module) -> None:
    (code,) = codes(frozen)
    x = torch.randn(1, 3, 16, 16, requires_grad=True)
    y, _ = run([x], next(frozen.buffers()), code)
    with pytest.raises(RuntimeError, match="derivative for sepconv_ext::program is not implemented"):
        y.sum().backward()


def test_flops(model: nn.Module) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    x = torch.randn(2, 3, 32, 32)
    frozen = freeze(model, x)
    with FlopCounterMode(display=False) as counter:
        frozen(x)
    assert counter.get_total_flops() == 2 * frozen.report.costs["MACs"][1]


def test_another_dtype_is_refused(model: nn.Module) -> None:
    half = freeze(model, torch.randn(1, 3, 32, 32)).to(torch.bfloat16)
    with pytest.raises(TypeError, match="constants must be float32 for a frozen program, but is BFloat16"):
        half(torch.randn(1, 3, 32, 32))
    with pytest.raises(TypeError, match=r"inputs\[0\] must be float32 for a frozen program, but is Double"):
        freeze(model, torch.randn(1, 3, 32, 32))(torch.randn(1, 3, 32, 32).double())


BAD = {
    "%0 = input picture\nreturn %0 image": "neither image nor matrix: 'picture'",
    "%0 = input image\n%1 = fold %0\nreturn %1 image": "unknown step 'fold'",
    "%0 = input image\n%2 = mean %0\nreturn %2 image": "the next value is not '%2'",
    "%0 = input image\n%1 = mean %3\nreturn %1 image": "unknown value '%3'",
    "%0 = input image\n%1 = mean %0 size=3\nreturn %1 image": "unknown field 'size'",
    "%0 = input image\n%1 = mean %0 K=3y\nreturn %1 image": "not a number: '3y'",
    "%0 = input image\n%1 = add %0\nreturn %1 image": "wrong number of values for 'add'",
    "%0 = input image\n%1 = activate %0 act=sawtooth\nreturn %1 image": "unknown activation 'sawtooth'",
    "%0 = input image\n%1 = mean %0": "the program returns nothing",
    "%0 = input image\nreturn %0 image": "an input, or a value that is returned already, is returned",
    "%0 = input image\n%1 = max_pool %0 stride=0x1\nreturn %1 image": "a size below its least one",
    "%0 = input image\n%1 = max_pool %0 kernel=9x9\nreturn %1 image": "smaller than a kernel of 9 x 9",
    "%0 = input image\n%1 = activate %0\nreturn %1 matrix": "more than one pixel is returned as a matrix",
    "%0 = input image\n%1 = product %0 weight=0 K=8\nreturn %1 image": "the constants are too few for a step: product",
    "%0 = input image\n%1 = mean %0\n%2 = add %0 %1\nreturn %2 image": "must be of one size",
    "%0 = input image\n%1 = slice %0 begin=2 K=2\nreturn %1 image": "channels 2 to 4 of an image",
    "%0 = input image\n%1 = mean %0\n%2 = concat %0 %1\nreturn %2 image": "what is put together, but for channels,",
    "%0 = input image\n%1 = grouped %0 groups=2 weight=0\nreturn %1 image": "3 channels in 2 groups: a group must",
    "%0 = input image\n%1 = gate %0 %0\nreturn %1 image": "the channels and their gate must be of one size",
}


@pytest.mark.parametrize("code", BAD)
def test_bad_text(code: str) -> None:
    with pytest.raises(RuntimeError, match="a frozen program: ") as error:
        run([torch.randn(1, 3, 5, 5)], torch.zeros(16), code)
    assert BAD[code] in str(error.value)


def test_bad_tensors() -> None:
    code = "%0 = input image\n%1 = input matrix\n%2 = mean %0\nreturn %2 image"
    image, matrix, none = torch.randn(2, 3, 5, 5), torch.randn(2, 3), torch.zeros(0)
    with pytest.raises(RuntimeError, match="takes 2 inputs, but got 1"):
        run([image], none, code)
    with pytest.raises(RuntimeError, match=r"inputs\[1\] must have 2 dimensions, but has 4"):
        run([image, image], none, code)
    with pytest.raises(RuntimeError, match=r"inputs\[1\] must have as many images as inputs\[0\], 2, but has 1"):
        run([image, matrix[:1]], none, code)
    with pytest.raises(RuntimeError, match="constants must be one dense row"):
        run([image, matrix], torch.zeros(4, 4), code)
