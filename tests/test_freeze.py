"""freeze: what it finds, what it computes, and how what it returns behaves."""

from __future__ import annotations

import copy
import io
import operator
import pickle
import threading
from collections import Counter
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

import sepconv_ext
from harness import random
from sepconv_ext import convert_, freeze
from sepconv_ext.nn import SeparableConv2d
from sepconv_ext.program import parse


def lived_in(model: nn.Module) -> nn.Module:
    """In eval(), norms with statistics, scales and shifts of their own."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for norm in model.modules():
            if isinstance(norm, nn.modules.batchnorm._BatchNorm):
                for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
                    tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return model.eval()


def conv_norm(*sizes: int, act: type[nn.Module] = nn.ReLU6, **arguments) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(*sizes, bias=False, **arguments), nn.BatchNorm2d(sizes[1]), act())


class Block(nn.Module):
    """expand -> depthwise -> project, and the input added."""

    def __init__(self, channels: int = 8, act: type[nn.Module] = nn.ReLU6) -> None:
        super().__init__()
        wide = 3 * channels
        self.expand = conv_norm(channels, wide, 1, act=act)
        self.depthwise = conv_norm(wide, wide, 3, padding=1, groups=wide, act=act)
        self.project = conv_norm(wide, channels, 1, act=nn.Identity)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.project(self.depthwise(self.expand(x)))


def small_network() -> nn.Module:
    torch.manual_seed(1)
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(8, 5))
    return lived_in(nn.Sequential(conv_norm(3, 8, 3, stride=2, padding=1), Block(), head))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return small_network()


@pytest.fixture(scope="module")
def frozen(model: nn.Module) -> nn.Module:
    return freeze(model, torch.randn(1, 3, 16, 16))


@pytest.fixture
def x() -> Tensor:
    return random((2, 3, 16, 16), torch.float32, "cpu")


def ops(frozen: nn.Module) -> Counter[str]:
    """How often each op stands in a frozen network's graph; of programs the steps, convolutions by the op's name."""
    found: Counter[str] = Counter()
    for node in frozen.graph.nodes:
        if node.target is torch.ops.sepconv_ext.program.default:
            kinds = Counter(line.kind for line in parse(node.args[2])[0] if line.kind != "input")
            for kind, count in kinds.items():
                found[_CONVOLUTIONS.get(kind, kind)] += count
        elif node.op == "call_function" and node.target is not operator.getitem:
            found[getattr(node.target, "_opname", str(node.target))] += 1
    return found


_CONVOLUTIONS = dict.fromkeys(("product", "conv", "depthwise", "grouped"), "conv2d")


def assert_says_the_same(model: nn.Module, frozen: nn.Module, *inputs: Tensor, classes: bool = False) -> None:
    """No further from the float64 network than three times what torch's own float32 layers are."""
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(*(x.double() for x in inputs))
        expected, actual = model(*inputs), frozen(*inputs)
    assert actual.shape == expected.shape and actual.stride() == expected.stride()
    error, torchs = ((y - exact).abs().max().item() for y in (actual, expected))
    floor = 16 * torch.finfo(torch.float32).eps * exact.abs().max().item()
    assert error <= 3 * torchs + floor, f"error {error:.3g}, torch's {torchs:.3g}, floor {floor:.3g}"
    if classes:
        assert torch.equal(actual.topk(5).indices, exact.topk(5).indices)


def check(model: nn.Module, *inputs: Tensor) -> Counter[str]:
    """The ops of the frozen model, which says the same."""
    frozen = freeze(lived_in(model), inputs)
    assert_says_the_same(model, frozen, *inputs)
    return ops(frozen)


# --- what is found ---


def test_a_block_with_its_residual(model: nn.Module, frozen: nn.Module, x: Tensor) -> None:
    assert_says_the_same(model, frozen, x)
    report = frozen.report
    assert [entry.name for entry in report.replaced if entry.family != "linear"] == [
        *("0.0", "1.expand.0", "1.depthwise.0", "1.project.0")
    ]
    assert [entry.name for entry in report.folded] == ["0.1", "1.expand.1", "1.depthwise.1", "1.project.1"]
    chains = {entry.name: entry.summary for entry in report.fused}
    assert chains["0.0"] == "dense, batch norm, relu6"
    assert "pointwise, batch norm, residual" in chains.get("1.project.0", chains.get("1.depthwise.0 -> 1.project.0"))
    assert [entry.name for entry in report.blocks] == ["1.expand.0 -> 1.depthwise.0 -> 1.project.0"]
    assert report.costs["parameters"][1] < report.costs["parameters"][0]
    assert report.costs["bytes"][1] < report.costs["bytes"][0]
    assert "4 batch norms folded" in report.headline and report.headline[:40] in str(report)
    assert not {"batch_norm", "hardtanh", "hardtanh_", "dropout"} & ops(frozen).keys()


ACTIVATIONS = {
    "relu": (nn.ReLU(), F.relu, torch.relu, lambda t: t.clamp(min=0), lambda t: t.clamp_min(0)),
    "relu6": (nn.ReLU6(), F.relu6, nn.Hardtanh(0, 6), lambda t: t.clamp(0, 6)),
    "leaky_relu": (nn.LeakyReLU(), F.leaky_relu),
    "gelu": (nn.GELU(), F.gelu, lambda t: 0.5 * t * (1 + torch.erf(t / 2**0.5))),
    "silu": (nn.SiLU(inplace=True), F.silu, lambda t: t * torch.sigmoid(t), lambda t: torch.sigmoid(t) * t),
    "hardswish": (
        *(nn.Hardswish(), F.hardswish, lambda t: t * F.hardsigmoid(t), lambda t: t * F.relu6(t + 3) / 6),
        *(lambda t: t * (F.relu6(t + 3) / 6), lambda t: t * (t + 3).clamp(0, 6) * (1 / 6)),
    ),
    "sigmoid": (nn.Sigmoid(), torch.sigmoid),
    "tanh": (nn.Tanh(), torch.tanh),
}


class Called(nn.Module):
    """A convolution, and a function of its output."""

    def __init__(self, function, conv: nn.Module | None = None) -> None:
        super().__init__()
        self.conv = conv or nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        first, *rest = inputs
        return self.function(self.conv(first), *rest)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_however_it_is_written(name: str) -> None:
    x = random((2, 4, 6, 7), torch.float32, "cpu")
    model = lived_in(nn.Sequential(*map(Called, ACTIVATIONS[name])))
    frozen = freeze(model, x)
    assert_says_the_same(model, frozen, x)
    assert ops(frozen) == {"contiguous": 1, "conv2d": len(ACTIVATIONS[name])}
    assert {entry.summary for entry in frozen.report.fused} == {f"depthwise, {name}"}


OTHERS = {
    "slope": lambda t: F.leaky_relu(t, 0.2),
    "tanh gelu": lambda t: F.gelu(t, approximate="tanh"),
    "other bounds": lambda t: t.clamp(0, 5),
    "shifted": lambda t: t * F.relu6(t + 2) / 6,
    "mish": F.mish,
}


def test_what_only_looks_like_an_activation() -> None:
    x = random((2, 4, 6, 7), torch.float32, "cpu")
    model = lived_in(nn.Sequential(*map(Called, OTHERS.values())))
    frozen = freeze(model, x)
    assert_says_the_same(model, frozen, x)
    assert not frozen.report.fused


CONSTANTS = {
    "a factor": lambda t: t * 0.5,
    "a factor for each channel": lambda t: t * torch.arange(1.0, 5).reshape(4, 1, 1),
    "a quotient": lambda t: t / torch.full((1, 4, 1, 1), 3.0),
    "a term": lambda t: 1.5 + t,
    "a difference": lambda t: t - torch.arange(4.0).reshape(1, 4, 1, 1),
}


def test_constants_behind_a_convolution() -> None:
    x = random((2, 4, 6, 7), torch.float32, "cpu")
    assert check(nn.Sequential(*map(Called, CONSTANTS.values())), x) == {"contiguous": 1, "conv2d": len(CONSTANTS)}


def test_constants_that_do_not_fold() -> None:
    x = random((2, 4, 6, 7), torch.float32, "cpu")
    found = check(nn.Sequential(Called(lambda t: t * torch.linspace(0, 1, 7)), Called(lambda t: 2 - t)), x)
    assert found["conv2d"] == 2 and found["mul"] + found["mul_"] == 1 and found["rsub"] + found["sub"] == 1


def test_residuals() -> None:
    def added(conv: Tensor, other: Tensor) -> Tensor:
        return F.relu(other + conv)

    x, y = (random((2, 4, 6, 7), torch.float32, "cpu", seed=seed) for seed in (0, 1))
    model = lived_in(Called(added))
    frozen = freeze(model, (x, y))
    assert_says_the_same(model, frozen, x, y)
    (entry,) = frozen.report.fused
    assert entry.summary == "depthwise, residual, relu"
    # A sum that broadcasts, a scaled one, and a value that is needed besides are no residuals.
    for function in (
        lambda conv, y: conv + y[:1],
        lambda conv, y: torch.add(conv, y, alpha=2),
        lambda conv, y: (conv + y) * conv,
    ):
        model = lived_in(Called(function))
        frozen = freeze(model, (x, y))
        assert_says_the_same(model, frozen, x, y)
        assert not frozen.report.fused


def test_in_place_activations_seen_by_others() -> None:
    """Xception's skips read what a ReLU has written."""

    def forward(conv: Tensor) -> Tensor:
        return conv + F.max_pool2d(F.relu(conv, inplace=True), 3, 1, 1)

    check(Called(forward), random((2, 4, 6, 7), torch.float32, "cpu"))

    def through_a_view(conv: Tensor) -> Tensor:
        conv[:, :2].relu_()
        return conv

    check(Called(through_a_view), random((2, 4, 6, 7), torch.float32, "cpu"))


def test_norms_before_and_behind() -> None:
    """A norm before a 1x1 convolution folds; before a padded one only its statistics would be wrong at the border."""
    x = random((2, 4, 6, 7), torch.float32, "cpu")
    assert check(nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 1)), x) == {"contiguous": 1, "conv2d": 1}
    grouped = nn.Conv2d(4, 6, 3, groups=2)
    assert check(nn.Sequential(nn.BatchNorm2d(4), grouped), x) == {"contiguous": 2, "conv2d": 1}
    assert check(nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding=1)), x)["affine"] == 1
    tokens = random((2, 5, 8), torch.float32, "cpu")
    assert check(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 6)), tokens)["layer_norm"] == 1
    assert check(nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6)), tokens[0])["addcmul"] == 0


class Mixed(nn.Module):
    """MixNet: kernels of several sizes, then one norm."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, k, padding=k // 2, groups=4, bias=False) for k in (3, 5))
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        parts = [conv(part) for conv, part in zip(self.convs, x.chunk(2, 1), strict=True)]
        return F.silu(self.norm(torch.cat(parts, 1)), inplace=True)


def test_a_norm_behind_a_concatenation() -> None:
    found = check(Mixed(), random((2, 8, 6, 7), torch.float32, "cpu"))
    assert found["conv2d"] == 2 and not {"silu", "silu_", "addcmul"} & found.keys()


class ConvNeXt(nn.Module):
    """Its block, with the pixels' channels last for LayerNorm and the two linear layers."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.up, self.down = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)
        self.scale = nn.Parameter(torch.rand(channels, 1, 1))
        nn.init.uniform_(self.norm.weight, 0.5, 1.5)
        nn.init.normal_(self.norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        pixels = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + self.scale * self.down(F.gelu(self.up(pixels))).permute(0, 3, 1, 2)


class Tokens(nn.Module):
    """Two linear layers over the tokens of a transformer, with what stands around them."""

    def __init__(self, channels: int, hidden: int, bias: bool = True) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(channels, hidden, bias), nn.Linear(hidden, channels, bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(x)))


@pytest.mark.parametrize("size", [(2, 19, 24), (1, 197, 58), (3, 1, 7), (2, 5, 1)], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_linear_layers_over_tokens(size: tuple[int, ...], bias: bool) -> None:
    x, model = random(size, torch.float32, "cpu"), lived_in(Tokens(size[-1], 3 * size[-1], bias))
    frozen = freeze(model, x)
    found = ops(frozen)
    assert found["packed_pointwise"] == 2 and not {"linear", "gelu", "gelu_"} & found.keys()
    assert [entry.family for entry in frozen.report.replaced] == ["linear", "linear"]
    sepconv_ext.reset_kernel_counts()
    assert_says_the_same(model, frozen, x)
    assert sepconv_ext.kernel_counts()["cpu_pointwise_product"] == 2
    more = random((size[0] + 2, *size[1:]), torch.float32, "cpu", seed=7)
    assert_says_the_same(model, frozen, more)  # any batch
    wide = random((*size[:-1], 2 * size[-1]), torch.float32, "cpu", seed=8)
    assert_says_the_same(model, frozen, wide[..., : size[-1]])  # not dense
    half = freeze(copy.deepcopy(model).bfloat16(), x.bfloat16())
    assert ops(half)["linear"] == 2 and "packed_pointwise" not in ops(half)


def test_packed_products_elsewhere_are_refused_in_words() -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key("sepconv_ext::packed_pointwise", "CUDA")


def test_convnext() -> None:
    x = random((2, 8, 9, 8), torch.float32, "cpu")
    model = lived_in(ConvNeXt())
    frozen = freeze(model, x)
    assert_says_the_same(model, frozen, x)
    found = ops(frozen)
    assert found["layer_norm"] == 1 and not {"linear", "gelu", "gelu_", "mul", "mul_"} & found.keys()
    assert [(entry.name, entry.summary) for entry in frozen.report.fused] == [
        ("up", "pointwise, layer norm's scale and shift, gelu"),
        ("down", "pointwise, constant, residual"),
    ]


def test_channel_shuffle() -> None:
    def shuffled(x: Tensor) -> Tensor:
        N, C, H, W = x.shape
        return x.view(N, 2, C // 2, H, W).transpose(1, 2).contiguous().view(N, C, H, W)

    x = random((2, 4, 6, 7), torch.float32, "cpu")
    assert check(Called(shuffled), x)["interleave"] == 1
    assert "interleave" not in check(Called(lambda x: x.view(2, 2, 2, 7, 6).transpose(1, 2).reshape(x.shape)), x)


def test_layers_of_this_package(x: Tensor) -> None:
    torch.manual_seed(0)
    separable = SeparableConv2d(8, 12, 3, norm="batch", activation="relu")
    model = lived_in(nn.Sequential(conv_norm(3, 8, 3), separable, Block(12)))
    convert_(model)
    frozen = freeze(model, x)
    assert_says_the_same(model, frozen, x)
    assert len(frozen.report.replaced) == 6 and not {"addcmul", "relu", "relu_"} & ops(frozen).keys()


def test_weights_that_are_computed_are_constants(x: Tensor) -> None:
    conv = torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 6, 1))
    assert check(nn.Sequential(conv), x) == {"contiguous": 1, "conv2d": 1}


def test_weights_of_the_input_stay(x: Tensor) -> None:
    class Dynamic(nn.Module):
        def forward(self, x: Tensor, w: Tensor) -> Tensor:
            return F.conv2d(x, w)

    frozen = freeze(Dynamic().eval(), (x, torch.randn(4, 3, 1, 1)))
    weight = torch.randn(4, 3, 1, 1)
    torch.testing.assert_close(frozen(x, weight), F.conv2d(x, weight))
    assert [entry.reason for entry in frozen.report.skipped] == ["no convolution of images by constants"]


def test_regions_without_influence(x: Tensor) -> None:
    """Gradients switched on or off inside a forward, and autocast switched off."""

    class Regions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1, groups=3) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", enabled=False):
                y = self.convs[0](x)
                with torch.enable_grad():
                    z = F.relu(self.convs[1](y))
            return self.convs[2](z) + y

    model = lived_in(Regions())
    frozen = freeze(model, x)
    assert not frozen.report.left and len(frozen.report.replaced) == 3
    assert_says_the_same(model, frozen, x)


def test_other_padding_and_other_ranks(x: Tensor) -> None:
    check(nn.Sequential(nn.Conv2d(3, 6, (3, 4), padding="same", dilation=2), nn.ReLU()), x)
    check(nn.Sequential(nn.Conv2d(3, 3, 3, padding=1, groups=3, padding_mode="reflect"), nn.ReLU()), x)
    check(nn.Sequential(nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6), nn.ReLU()), random((2, 3, 9), torch.float32, "cpu"))
    check(nn.Sequential(nn.ConvTranspose2d(3, 6, 2, stride=2), nn.BatchNorm2d(6)), x)


# --- how it behaves ---


def test_any_batch_and_other_sizes(model: nn.Module, frozen: nn.Module) -> None:
    """Frozen with one image of 16x16."""
    for size in ((1, 3, 16, 16), (5, 3, 16, 16), (0, 3, 16, 16), (2, 3, 23, 9), (1, 3, 1, 1)):
        x = random(size, torch.float32, "cpu")
        with torch.no_grad():
            torch.testing.assert_close(frozen(x), model(x), rtol=1e-4, atol=1e-4)


NO_IMAGES = {
    # What follows the convolution, and whether it has an answer for an empty batch.
    "pooled and seen as a matrix": (lambda y: F.adaptive_avg_pool2d(y, 1).view(-1, 8), True),
    "a gate of it": (
        lambda y: F.interpolate(torch.sigmoid(F.avg_pool2d(y, 2)), size=y.shape[2:], mode="nearest"),
        True,
    ),
    "asks for an odd size": (lambda y: y * 2 if y.shape[0] * y.shape[2] % 2 != 0 else y, True),
    "a size to be found": (lambda y: y.view(y.shape[0], -1), False),
    "another result": (lambda y: y * 2 if y.numel() != 0 else y.sum(0), False),
}


@pytest.mark.parametrize("name", NO_IMAGES)
def test_no_images(name: str) -> None:
    """torch.export asks whether sizes are 0, and forgets what a model asks: what the model makes of none counts."""
    function, takes = NO_IMAGES[name]
    model = lived_in(Called(function, nn.Conv2d(3, 8, 3, stride=2, padding=1)))
    frozen = freeze(model, torch.zeros(1, 3, 14, 14))
    for n in (1, 3):
        assert_says_the_same(model, frozen, random((n, 3, 14, 14), torch.float32, "cpu"))
    none = torch.zeros(0, 3, 14, 14)
    if takes:
        assert frozen(none).shape == model(none).shape
    else:
        with pytest.raises(RuntimeError, match=r"must have size \[at least 1, 3, any, any\], but has \[0, 3, 14"):
            frozen(none)


def test_a_small_example_takes_larger_images() -> None:
    """Of 8x8 pixels one is left at the end; torch would take the size 1 for a condition."""
    torch.manual_seed(1)
    layers = [conv_norm(3, 8, 3, stride=2, padding=1), *(conv_norm(8, 8, 3, stride=2, padding=1) for _ in range(2))]
    model = lived_in(nn.Sequential(*layers, ConvNeXt(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)))
    frozen = freeze(model, torch.zeros(1, 3, 8, 8))
    for size in ((1, 3, 8, 8), (3, 3, 8, 8), (2, 3, 64, 40), (1, 3, 5, 7), (1, 3, 1, 1)):
        assert_says_the_same(model, frozen, random(size, torch.float32, "cpu"))


def test_costs_are_those_of_the_example(model: nn.Module) -> None:
    def costs(N: int, size: int) -> dict[str, tuple[int, int]]:
        return freeze(model, torch.zeros(N, 3, size, size)).report.costs

    one, five, large = costs(1, 16), costs(5, 16), costs(1, 32)
    macs = 64 * (8 * 27 + 8 * 24 + 24 * 9 + 24 * 8) + 8 * 5
    assert one["MACs"] == (macs, macs)
    assert five["MACs"] == (5 * macs, 5 * macs)
    assert large["MACs"][0] == 4 * (macs - 40) + 40
    assert one["parameters"] == five["parameters"] == large["parameters"]
    # The input, what each layer writes, and of the frozen one the sum in the last product.
    written = 64 * (8 + 24 + 24 + 8) + 8 + 5
    assert 4 * written < one["bytes"][1] < one["bytes"][0]
    assert all(abs(5 * a - b) < 5 * 4 * 4000 for a, b in zip(one["bytes"], five["bytes"], strict=True))


def test_channels_last_in_is_taken(model: nn.Module, frozen: nn.Module, x: Tensor) -> None:
    assert_says_the_same(model, frozen, x.to(memory_format=torch.channels_last))
    body = lived_in(Block(3))
    image = x.to(memory_format=torch.channels_last)
    assert freeze(body, image)(image).is_contiguous(memory_format=torch.channels_last)
    assert freeze(body, x)(x).is_contiguous()


def test_errors_by_name(model: nn.Module, frozen: nn.Module, x: Tensor) -> None:
    with pytest.raises(RuntimeError, match=r"input must have size \[any, 3, any, any\], but has \[2, 4, 16, 16\]"):
        frozen(random((2, 4, 16, 16), torch.float32, "cpu"))
    with pytest.raises(RuntimeError, match="input must have size"):
        frozen(x[0])
    with pytest.raises(TypeError, match="input must be a Tensor, but is a str"):
        frozen("x")
    with pytest.raises(TypeError, match="takes its arguments as the example had them"):
        frozen(x, x)
    with pytest.raises(RuntimeError, match=r"input requires gradients.*convert_"):
        frozen(x.clone().requires_grad_())
    frozen(x)
    with pytest.raises(RuntimeError, match=r"input requires gradients.*convert_"):
        frozen(x.clone().requires_grad_())  # of a size that was seen
    with pytest.raises(RuntimeError, match=r"training mode: 1\.expand\.1.*convert_"):
        training = copy.deepcopy(model)
        training[1].expand[1].train()
        freeze(training, x)
    with pytest.raises(TypeError, match="example_inputs must be a tensor or a tuple with one, but is str"):
        freeze(model, "x")


def test_a_fixed_batch(model: nn.Module, x: Tensor) -> None:
    fixed = freeze(model, x, dynamic_batch=False)
    fixed(x)
    with pytest.raises(RuntimeError, match=r"input must have size \[2, 3, any, any\], but has \[1, 3, 16, 16\]"):
        fixed(x[:1])


def test_ways_that_depend_on_the_size() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) if x.shape[2] > 8 else -self.conv(x)

    model = Branch().eval()
    frozen = freeze(model, torch.randn(2, 3, 16, 16))
    x = torch.randn(1, 3, 9, 9)
    torch.testing.assert_close(frozen(x), model(x))
    with pytest.raises(RuntimeError, match=r"x must have size \[any, 3, at least 9, any\], but has \[1, 3, 8, 8\]"):
        frozen(torch.randn(1, 3, 8, 8))


def test_ways_that_depend_on_several_sizes() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, *images: Tensor) -> Tensor:
            (x,) = images
            return self.conv(x) if x.shape[2] > x.shape[3] else -self.conv(x)

    model = Branch().eval()
    frozen = freeze(model, torch.randn(2, 3, 16, 12))
    x = torch.randn(1, 3, 9, 8)
    torch.testing.assert_close(frozen(x), model(x))
    size = r"images\[0\]\.shape\[\d\]"
    wanted = rf"sizes must satisfy {size} .* {size}, as the example's do, but images_0 has size \[1, 3, 8, 9\]"
    with pytest.raises(RuntimeError, match=rf"{wanted}.* freeze it with an example of that size"):
        frozen(torch.randn(1, 3, 8, 9))


def test_the_model_is_untouched(x: Tensor) -> None:
    model = small_network()
    seen = []
    model[1].expand[0].register_forward_hook(lambda *_: seen.append("hook"))
    before = {name: (id(tensor), tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}
    attributes = {name: dict(vars(module)) for name, module in model.named_modules()}
    frozen = freeze(model, x)
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert id(tensor) == before[name][0] and torch.equal(tensor, before[name][1]), name
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == attributes
    # And the frozen one is its own: neither weights nor hooks of the model are seen any more.
    with torch.no_grad():
        expected = frozen(x)
        for parameter in model.parameters():
            parameter.zero_()
        seen.clear()
        assert torch.equal(frozen(x), expected) and not seen


def test_copies(frozen: nn.Module, x: Tensor) -> None:
    saved = io.BytesIO()
    torch.save(frozen, saved)
    saved.seek(0)
    expected = frozen(x)
    for copied in (copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen)), torch.load(saved, weights_only=False)):
        assert torch.equal(copied(x), expected)
        assert str(copied.report) == str(frozen.report)
        for buffer in copied.buffers():
            buffer.zero_()
        assert not torch.equal(copied(x), expected) and torch.equal(frozen(x), expected)
        copied.load_state_dict(frozen.state_dict())
        assert torch.equal(copied(x), expected)
    assert not list(frozen.parameters())


def test_threads(frozen: nn.Module) -> None:
    """One network, eight threads, images of several sizes; and somebody who registers hooks meanwhile."""
    inputs = [torch.randn(1 + i % 3, 3, 12 + 2 * i, 16) for i in range(8)]
    expected = [frozen(x) for x in inputs]
    wrong = []

    def serve(x: Tensor, want: Tensor) -> None:
        for _ in range(20):
            try:
                if not torch.equal(frozen(x), want):
                    wrong.append(tuple(x.shape))
            except Exception as error:
                wrong.append(repr(error))

    threads = [threading.Thread(target=serve, args=pair) for pair in zip(inputs, expected, strict=True)]
    for thread in threads:
        thread.start()
    for _ in range(50):
        frozen.network.register_forward_hook(lambda *_: None).remove()
    for thread in threads:
        thread.join()
    assert not wrong


def test_one_program_is_called_directly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Python's way to an op; but whoever looks on sees the op all the same."""
    layer, x = nn.Conv2d(5, 7, 1).eval(), torch.randn(2, 5, 3, 4)
    frozen, counter = freeze(layer, x), FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        expected = layer(x)
        counted = counter.get_total_flops()
        y = frozen(x)
    assert counter.get_total_flops() == 2 * counted > 0
    torch.testing.assert_close(y, expected)
    assert y.is_contiguous() and y.stride() == expected.stride()

    class Seen(Tensor):
        names: ClassVar[list[str]] = []

        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            cls.names.append(str(function))
            return super().__torch_function__(function, types, args, kwargs or {})

    frozen(x.as_subclass(Seen))
    assert any("program" in name for name in Seen.names)

    class Mode(TorchFunctionMode):
        names: ClassVar[list[str]] = []

        def __torch_function__(self, function, types, args=(), kwargs=None):
            self.names.append(str(function))
            return function(*args, **kwargs or {})

    with Mode():
        frozen(x)
    assert any("program" in name for name in Mode.names)
    assert torch.equal(torch.jit.trace(frozen, x)(2 * x), frozen(2 * x))
    moved = copy.deepcopy(frozen)
    next(moved.buffers()).zero_()
    assert not moved(x).any() and torch.equal(frozen(x), y)

    def in_python(*_: object) -> None:
        raise AssertionError("called by Python's way")

    monkeypatch.setattr(frozen.network, "forward", in_python)
    assert torch.equal(frozen(x), y)


def test_half_types(model: nn.Module, x: Tensor) -> None:
    half = copy.deepcopy(model).bfloat16()
    frozen = freeze(half, x.bfloat16())
    with torch.no_grad():
        exact, expected = copy.deepcopy(half).double()(x.bfloat16().double()), half(x.bfloat16())
        actual = frozen(x.bfloat16())
    assert actual.dtype == torch.bfloat16
    error, torchs = ((y.double() - exact).abs().max().item() for y in (actual, expected))
    assert error <= torchs + 0.01 * exact.abs().max().item()


def test_nested_arguments_and_results(model: nn.Module) -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, images: list[Tensor], scale: float) -> dict[str, Tensor | list[Tensor]]:
            done = [self.conv(image) for image in images]
            return {"first": done[0] * scale, "all": done}

    model = Nested().eval()
    images = [torch.randn(2, 3, 5, 5), torch.randn(2, 3, 7, 7)]
    frozen = freeze(model, (images, 0.5))
    with torch.no_grad():
        torch.testing.assert_close(frozen(images, 0.5), model(images, 0.5))
    with pytest.raises(ValueError, match=r"was 0\.5 when the network was frozen, but is 2\.0"):
        frozen(images, 2.0)


def test_exported_again(frozen: nn.Module, x: Tensor) -> None:
    program = torch.export.export(frozen, (x,), dynamic_shapes=(({0: torch.export.Dim.AUTO},),), strict=False)
    torch.testing.assert_close(program.module()(x), frozen(x))


class Unexportable(nn.Module):
    """A branch that depends on values, between two parts that do not."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(conv_norm(3, 8, 3), Block())
        self.heads = nn.ModuleList([nn.Conv2d(8, 4, 1), conv_norm(8, 4, 1)])

    def forward(self, x: Tensor) -> Tensor:
        features = self.body(x)
        return self.heads[int(features.sum().item() > 0)](features)


def test_part_by_part(x: Tensor) -> None:
    torch.manual_seed(0)
    model = lived_in(Unexportable())
    frozen = freeze(model, x)
    assert_says_the_same(model, frozen, x)
    assert_says_the_same(model, frozen, -3 * x[:1])  # the other head, which the example did not take
    report = frozen.report
    assert [entry.name for entry in report.replaced][:4] == [
        *("body.0.0", "body.1.expand.0", "body.1.depthwise.0", "body.1.project.0")
    ]
    whole, other_head = report.left
    assert whole.name == "" and "Unexportable" in whole.family and whole.reason
    assert other_head.name.startswith("heads.") and other_head.reason == "it is not called on the example"
    assert "left" in str(report)
    assert torch.equal(pickle.loads(pickle.dumps(frozen))(x), frozen(x))


@pytest.mark.parametrize("asks", ("guards", "places"))
def test_a_torch_that_keeps_to_itself_what_it_asked(monkeypatch: pytest.MonkeyPatch, x: Tensor, asks: str) -> None:
    """What freeze reads of torch's own is in this release; a release without it is named, and nothing goes wrong."""
    model, export, release = small_network(), torch.export.export, torch.__version__
    assert hasattr(torch.fx.experimental._config, "backed_size_oblivious"), release

    def forgetful(*args: object, **kwargs: object) -> torch.export.ExportedProgram:
        program = export(*args, **kwargs)
        assert hasattr(program, "_guards_code"), release
        if asks == "guards":
            del program._guards_code
        values = [node.meta["val"] for node in program.graph.nodes if isinstance(node.meta.get("val"), Tensor)]
        sizes = [n for value in values for n in value.shape if isinstance(n, torch.SymInt)]
        for guard in sizes[0].node.shape_env.guards if sizes and asks == "places" else ():
            assert hasattr(guard.sloc, "framework_loc"), release
            object.__setattr__(guard, "sloc", None)
        return program

    monkeypatch.setattr(torch.export, "export", forgetful)
    frozen = freeze(model, x)
    assert_says_the_same(model, frozen, x)
    if asks == "guards":
        assert release in frozen.report.left[0].reason


def test_a_model_that_fails_on_the_example() -> None:
    """timm's halonet26t takes images of 256 pixels and asserts so without a word."""

    class Picky(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            assert x.shape[2] % 8 == 0
            return x

    with pytest.raises(RuntimeError, match=r"fails on example_inputs of size \[\[1, 3, 10, 10\]\]: AssertionError"):
        freeze(Picky().eval(), torch.zeros(1, 3, 10, 10))


# --- whole networks ---

NETWORKS = {
    # convolutions and linear layers; norms folded; blocks, where it has some
    "mobilenet_v2": (53, 52, 16),
    "mobilenet_v3_large": (64, 46, 14),
    "efficientnet_b0": (82, 49, 15),
    "convnext_tiny": (59, 0, 0),
    "shufflenet_v2_x1_0": (57, 56, 0),
    "mnasnet1_0": (53, 52, 16),
    "resnext50_32x4d": (54, 53, 0),
    "regnet_y_400mf": (86, 53, 0),
    "mobilenetv1_100": (28, 27, 0),
    "legacy_xception": (75, 40, None),
    "ghostnet_100": (96, 80, None),
    "mixnet_s": (124, 49, None),
}
TIMM = ("mobilenetv1_100", "legacy_xception", "ghostnet_100", "mixnet_s")


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name in TIMM:
        model = pytest.importorskip("timm", reason="timm is an extra").create_model(name)
    else:
        models = pytest.importorskip("torchvision", reason="torchvision is an extra").models
        model = models.get_model(name, weights=None)
    for key, parameter in model.named_parameters():
        if key.endswith("layer_scale"):  # ConvNeXt starts them at 1e-6, which would switch its blocks off
            nn.init.constant_(parameter, 0.2)
    return lived_in(model)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_frozen_network_says_what_it_said(name: str) -> None:
    model = network(name)
    x = random((2, 3, 64, 64), torch.float32, "cpu")
    frozen = freeze(model, x)
    assert_says_the_same(model, frozen, x, classes=True)
    products, norms, blocks = NETWORKS[name]
    report = frozen.report
    calls = {node.target for node in frozen.graph.nodes if node.op == "call_function"}
    assert len(report.programs) == 1 and calls == {torch.ops.sepconv_ext.program.default, operator.getitem}
    assert len(report.replaced) + len(report.skipped) == products
    assert sum(entry.family == "batch norm" for entry in report.folded) == norms
    assert blocks is None or len(report.blocks) == blocks
    assert not {"batch_norm", "addcmul", "silu", "hardswish", "relu6", "view"} & ops(frozen).keys()


# Of other kinds: image size, and whether other image sizes are taken.
OTHER_KINDS = {
    "segmentation.lraspp_mobilenet_v3_large": (64, True),
    "segmentation.deeplabv3_mobilenet_v3_large": (64, True),
    "segmentation.fcn_resnet50": (64, True),
    "detection.fasterrcnn_mobilenet_v3_large_fpn": (128, True),
    "detection.ssdlite320_mobilenet_v3_large": (320, True),
    "squeezenet1_1": (64, True),
    "googlenet": (64, True),
    "densenet121": (64, True),
    "resnet18": (64, True),
    "swin_t": (64, False),
    "timm/mobilevit_xxs": (128, False),
    "timm/mobilevitv2_050": (128, False),
    "timm/efficientformer_l1": (224, False),
    "timm/efficientvit_b0": (64, True),
    "timm/edgenext_xx_small": (128, True),
    "timm/fastvit_t8": (128, True),
    "timm/repvit_m1": (128, True),
    "timm/rexnet_100": (64, True),
    "timm/mobileone_s0": (64, True),
    "timm/ghostnetv2_100": (64, True),
    "timm/mobilenetv4_conv_small": (64, True),
    "timm/mobilenetv4_hybrid_medium": (128, True),
    "timm/convnextv2_atto": (64, True),
    "timm/poolformer_s12": (64, True),
    "timm/levit_128s": (224, False),
    "timm/nfnet_f0": (64, True),
    "timm/regnetz_b16": (64, True),
    "timm/xception41": (96, True),
    "timm/starnet_s1": (64, True),
    "timm/caformer_s18": (64, True),
}
SAMPLE = ("squeezenet1_1",)


def of_another_kind(name: str) -> nn.Module:
    torch.manual_seed(0)
    package, _, timms = name.partition("/")
    if timms:
        model = pytest.importorskip("timm", reason="timm is an extra").create_model(timms)
    else:
        models = pytest.importorskip("torchvision", reason="torchvision is an extra").models
        part, _, name = package.rpartition(".")
        given = {"weights_backbone": None} if part else {"init_weights": False} if name == "googlenet" else {}
        model = getattr(getattr(models, part) if part else models, name)(weights=None, **given)
        model = model.backbone if part == "detection" else model
    for parameter in model.parameters():
        if parameter.dim() <= 3 and 0 < parameter.abs().max() < 1e-3:  # scales that would switch their blocks off
            nn.init.constant_(parameter, 0.2)
    with torch.no_grad():  # statistics of its own
        for norm in model.modules():
            if isinstance(norm, nn.modules.batchnorm._BatchNorm):
                norm.momentum = None
        model.train()(torch.randn(4, 3, *[OTHER_KINDS[f"{package}/{timms}" if timms else package][0]] * 2))
    return model.eval()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in SAMPLE)) for name in OTHER_KINDS]
)
def test_a_network_of_another_kind(name: str) -> None:
    """Frozen with one image: itself, more of them, and larger ones; every result of it."""
    size, any_size = OTHER_KINDS[name]
    model = of_another_kind(name)
    images = [random((n, 3, size, size), torch.float32, "cpu", seed=n) for n in (1, 3)]
    images += [random((2, 3, size + 32, size), torch.float32, "cpu")] * any_size
    frozen = freeze(model, images[0])
    assert not frozen.report.left
    exact = copy.deepcopy(model).double()
    for x in images:
        with torch.no_grad():
            results = [pytree.tree_leaves(run) for run in (exact(x.double()), model(x), frozen(x))]
        for wanted, torchs, actual in zip(*results, strict=True):
            assert actual.shape == wanted.shape
            error, usual = ((t - wanted).abs().max().item() for t in (actual, torchs))
            assert error <= 3 * usual + 16 * torch.finfo(torch.float32).eps * wanted.abs().max().item()
            if actual.dim() == 2:  # the same five best; two that are closer than the rounding may change places
                best, expected = (wanted.gather(1, t.topk(5).indices) for t in (actual, wanted))
                assert (best - expected).abs().max() <= 2 * error
    if not any_size:
        with pytest.raises(RuntimeError, match=r"(must have size|sizes must satisfy) .*\[1, 3, \d+, \d+\]"):
            frozen(random((1, 3, size + 32, size), torch.float32, "cpu"))


class AsksForOne(nn.Module):
    """Another way through its forward where a size, or something made of sizes, is 1."""

    def __init__(self, asks) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.asks, self.conv = asks, nn.Conv2d(8, 8, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y * 2 if self.asks(x, y) else y


@pytest.mark.parametrize("size", [(2, 8, 16, 16), (1, 8, 1, 1), (1, 8, 2, 2)], ids=str)
@pytest.mark.parametrize(
    "asks",
    [
        lambda x, y: x.shape[2] // 8 > 1,
        lambda x, y: x.shape[2] * x.shape[3] > 1,
        lambda x, y: x.shape[3] != 1,
        lambda x, y: y.shape[2] > 1,
    ],
    ids=["part", "pixels", "width", "inside"],
)
@torch.no_grad()
def test_branches_on_a_size_of_one(asks, size: tuple[int, ...]) -> None:
    """Right or refused by name: what torch asks for itself leaves the same traces as what the model asks."""
    model = AsksForOne(asks).eval()
    frozen = freeze(model, torch.zeros(size))
    for other in (size, (2, 8, 5, 3), (1, 8, 1, 1), (1, 8, 16, 16), (3, 8, 16, 16)):
        x = torch.randn(other)
        try:
            y = frozen(x)
        except RuntimeError as error:
            assert other != size and "size" in str(error)
        else:
            torch.testing.assert_close(y, model(x))
