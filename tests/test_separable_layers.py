"""nn.SeparableConv2d against the block that people write by hand, and grouped layers that have a name."""

from __future__ import annotations

import copy
import io
import math
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sepconv_ext
from harness import ACTIVATIONS, only_our_kernels, random
from sepconv_ext import convert_, reference
from sepconv_ext.fold import fold
from sepconv_ext.nn import Conv2d, DepthwiseConv2d, PointwiseConv2d, SeparableConv2d


class ByHand(nn.Module):
    """The same block of torch's own layers, with the same names."""

    def __init__(self, ours: SeparableConv2d) -> None:
        super().__init__()
        d, p = ours.depthwise, ours.pointwise
        geometry = (d.kernel_size, d.stride, d.padding, d.dilation, d.groups)
        self.depthwise = nn.Conv2d(d.in_channels, d.out_channels, *geometry, d.bias is not None, d.padding_mode)
        self.depthwise_norm = nn.BatchNorm2d(d.out_channels) if ours.depthwise_norm else None
        self.pointwise = nn.Conv2d(p.in_channels, p.out_channels, 1, bias=p.bias is not None)
        self.pointwise_norm = nn.BatchNorm2d(p.out_channels) if ours.pointwise_norm else None
        self.activations = (ours.depthwise_activation, ours.activation)
        self.to(d.weight.device, d.weight.dtype)
        self.load_state_dict(ours.state_dict())
        for name, part in ours.named_children():
            getattr(self, name).train(part.training)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(x)
        if self.depthwise_norm is not None:
            x = self.depthwise_norm(x)
        x = self.pointwise(reference.ACTIVATIONS[self.activations[0]](x))
        if self.pointwise_norm is not None:
            x = self.pointwise_norm(x)
        return reference.ACTIVATIONS[self.activations[1]](x)


def lived_in(layer: nn.Module) -> nn.Module:
    """Statistics and shifts that are not the initial zeros and ones."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for norm in layer.modules():
            if isinstance(norm, nn.BatchNorm2d):
                for tensor, low in (
                    (norm.weight, 0.5),
                    (norm.bias, -1),
                    (norm.running_mean, -1),
                    (norm.running_var, 0.3),
                ):
                    tensor.copy_(torch.rand(tensor.shape, generator=generator) * 1.5 + low)
    return layer


LAYERS = {
    "plain": dict(in_channels=6, out_channels=10, kernel_size=3),
    "multiplier3_coprime": dict(in_channels=5, out_channels=7, kernel_size=3, multiplier=3),
    "mobilenet": dict(
        in_channels=8, out_channels=12, kernel_size=3, stride=2, norm="batch", activation="relu6",
        depthwise_activation="relu6",
    ),
    "mobilenet_v2_half": dict(in_channels=8, out_channels=4, kernel_size=5, norm="batch", depthwise_activation="relu6"),
    "xception": dict(
        in_channels=6, out_channels=9, kernel_size=3, norm="batch", depthwise_norm=False, activation="relu"
    ),
    "no_bias": dict(in_channels=4, out_channels=4, kernel_size=(3, 5), bias=False, depthwise_activation="silu"),
    "dilated": dict(in_channels=4, out_channels=6, kernel_size=3, dilation=2, stride=2, activation="hardswish"),
    "even_kernel": dict(in_channels=4, out_channels=6, kernel_size=(2, 4)),
    "reflect": dict(in_channels=4, out_channels=6, kernel_size=3, padding_mode="reflect", norm="batch"),
    "one_channel": dict(in_channels=1, out_channels=5, kernel_size=3, multiplier=4, depthwise_activation="gelu"),
    "unpadded": dict(in_channels=4, out_channels=6, kernel_size=3, padding=0, save_intermediate=True),
}  # fmt: skip
by_layer = pytest.mark.parametrize("arguments", LAYERS.values(), ids=LAYERS.keys())


@by_layer
def test_eval_is_one_call(arguments: dict, device: str) -> None:
    ours = lived_in(SeparableConv2d(**arguments, device=device)).eval()
    by_hand = ByHand(ours)
    for size in ((2, arguments["in_channels"], 9, 12), (arguments["in_channels"], 9, 12)):
        x = random(size, torch.float32, device)
        with torch.no_grad():
            if len(size) == 4:
                with only_our_kernels():
                    y = ours(x)
            else:
                y = ours(x)
            expected = by_hand(x if len(size) == 4 else x[None])
        torch.testing.assert_close(y, expected if len(size) == 4 else expected[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@by_layer
def test_gradients_and_statistics(arguments: dict, training: bool, device: str) -> None:
    """Also in eval(), where the folded weights are part of the graph: as when norms are frozen."""
    ours = lived_in(SeparableConv2d(**arguments, device=device)).train(training)
    by_hand = ByHand(ours)
    x = random((3, arguments["in_channels"], 8, 7), torch.float32, device)
    results = []
    for layer in (ours, by_hand):
        image = x.clone().requires_grad_()
        y = layer(image)
        results.append((y, *torch.autograd.grad(y.square().sum(), (image, *layer.parameters()))))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)
    for name, tensor in by_hand.state_dict().items():  # the running statistics moved alike, or not at all
        torch.testing.assert_close(ours.state_dict()[name], tensor)


def test_eval_after_training_sees_the_new_weights_and_statistics(device: str) -> None:
    ours = lived_in(SeparableConv2d(**LAYERS["mobilenet"], device=device))
    x = random((4, 8, 9, 9), torch.float32, device)
    for _ in range(3):
        ours.eval()
        with torch.no_grad():
            torch.testing.assert_close(ours(x), ByHand(ours)(x), rtol=1e-4, atol=1e-4)
        ours.train()
        ours(x).square().mean().backward()
        torch.optim.SGD(ours.parameters(), lr=0.5).step()
        ours(x)  # moves nothing but the statistics


@pytest.mark.parametrize("height", [7, 8])
@pytest.mark.parametrize("kernel", [1, 3, 5, (3, 7)])
@pytest.mark.parametrize("stride", [1, 2, 3, (1, 2)])
@pytest.mark.parametrize("dilation", [1, 2])
def test_same_gives_one_output_for_every_stride(kernel, stride, dilation: int, height: int) -> None:
    layer = SeparableConv2d(2, 3, kernel, stride=stride, dilation=dilation)
    rows, columns = stride if isinstance(stride, tuple) else (stride, stride)
    y = layer(torch.zeros(1, 2, height, 11))
    assert y.shape == (1, 3, math.ceil(height / rows), math.ceil(11 / columns))


def test_same_at_stride_2_lies_as_in_torchvision() -> None:
    """A single bright pixel in the middle of the first window is seen by the first output."""
    layer = SeparableConv2d(1, 1, 3, stride=2, bias=False)
    with torch.no_grad():
        layer.depthwise.weight.copy_(torch.arange(9.0).view(1, 1, 3, 3))
        layer.pointwise.weight.fill_(1)
    x = torch.zeros(1, 1, 4, 4)
    x[0, 0, 0, 0] = 1
    assert layer(x)[0, 0].tolist() == [[4, 0], [0, 0]]  # the kernel's centre, not its corner


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"kernel_size is 4.*stride is 2"):
        SeparableConv2d(4, 4, 4, stride=2)
    with pytest.raises(ValueError, match="norm must be None or 'batch', but is 'layer'"):
        SeparableConv2d(4, 4, 3, norm="layer")
    with pytest.raises(ValueError, match=r"depthwise_activation must be one of.*'swish'"):
        SeparableConv2d(4, 4, 3, depthwise_activation="swish")
    with pytest.raises(ValueError, match=r"activation must be one of.*'Relu'"):
        SeparableConv2d(4, 4, 3, activation="Relu")
    with pytest.raises(RuntimeError):
        SeparableConv2d(4, 4, 3)(torch.zeros(1, 5, 6, 6))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_every_activation(activation: str, training: bool) -> None:
    ours = lived_in(
        SeparableConv2d(4, 6, 3, norm="batch", activation=activation, depthwise_activation=activation)
    ).train(training)
    x = random((2, 4, 6, 5), torch.float32, "cpu")
    torch.testing.assert_close(ours(x), ByHand(ours)(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype: torch.dtype, device: str) -> None:
    ours = lived_in(SeparableConv2d(**LAYERS["mobilenet"], device=device)).eval()
    x = random((2, 8, 9, 8), dtype, device)
    expected = ByHand(ours).double()(x.double())
    ours = ours.to(dtype)
    with torch.no_grad():
        y = ours(x)
    assert y.dtype == dtype
    tolerance = {torch.float64: 1e-6, torch.bfloat16: 5e-2, torch.float16: 1e-2}[dtype]
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)


def test_folded_weights_follow_every_change(device: str) -> None:
    """What is kept between calls is made again after a change of any of its sources, of their dtype or their place."""
    layer = lived_in(SeparableConv2d(**LAYERS["mobilenet"], device=device)).eval()
    other = lived_in(SeparableConv2d(**LAYERS["mobilenet"], device=device))
    x = random((1, 8, 6, 6), torch.float32, device)

    def replace_parameter() -> None:
        layer.pointwise.weight = nn.Parameter(layer.pointwise.weight * 0.5)

    def replace_data() -> None:
        layer.depthwise.weight.data = layer.depthwise.weight.data * 3

    changes = [
        lambda: layer.depthwise.weight.mul_(2),
        lambda: layer.depthwise_norm.running_var.add_(1),
        lambda: layer.pointwise_norm.bias.sub_(0.3),
        lambda: layer.load_state_dict(other.state_dict()),
        replace_parameter,
        replace_data,
        lambda: layer.half().float(),
        lambda: layer.to(memory_format=torch.channels_last),
        lambda: layer.pointwise_norm.train(),
        lambda: layer.eval(),
    ]
    with torch.no_grad():
        for change in changes:
            kept = layer(x)
            assert torch.equal(layer(x), kept)
            change()
            torch.testing.assert_close(layer(x), ByHand(layer)(x), rtol=1e-4, atol=1e-4)


def test_kept_weights_are_not_made_again() -> None:
    layer = lived_in(SeparableConv2d(**LAYERS["mobilenet"])).eval()
    x = random((1, 8, 6, 6), torch.float32, "cpu")
    with torch.no_grad():
        layer(x)
        first = layer._chain.weights(x)
        assert all(
            a is b
            for one, two in zip(first, layer._chain.weights(x), strict=True)
            for a, b in zip(one, two, strict=True)
        )
        layer.pointwise.weight.mul_(2)
        second = layer._chain.weights(x)
    # In the same memory, so that a captured CUDA graph reads them.
    assert [t.data_ptr() for pair in first for t in pair] == [t.data_ptr() for pair in second for t in pair]


def test_inference_mode_leaves_nothing_unusable_behind() -> None:
    layer = lived_in(SeparableConv2d(**LAYERS["mobilenet"])).eval().requires_grad_(False)
    x = random((1, 8, 6, 6), torch.float32, "cpu")
    with torch.inference_mode():
        expected = layer(x)
    image = x.clone().requires_grad_()
    y = layer(image)  # the kept weights were made inside inference mode
    y.sum().backward()
    torch.testing.assert_close(y, expected.clone())
    with torch.inference_mode():
        made_inside = lived_in(SeparableConv2d(**LAYERS["mobilenet"])).eval()
        made_inside.load_state_dict(layer.state_dict())
        torch.testing.assert_close(made_inside(x), expected)


def test_hooks_on_parts_are_served() -> None:
    layer = lived_in(SeparableConv2d(**LAYERS["mobilenet"])).eval()
    x = random((1, 8, 6, 6), torch.float32, "cpu")
    seen = []
    handles = [
        part.register_forward_hook(
            lambda module, arguments, output: seen.append((arguments[0].shape[1], output.shape[1]))
        )
        for part in (layer.depthwise, layer.depthwise_norm, layer.pointwise, layer.pointwise_norm)
    ]
    y = layer(x)
    assert seen == [(8, 8), (8, 8), (8, 12), (12, 12)]
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(layer(x), y, rtol=1e-4, atol=1e-4)


def test_hooks_that_another_thread_registers() -> None:
    """Whoever looks at a part meanwhile changes no result: a layer decides once a call how it runs."""
    layer = lived_in(SeparableConv2d(**LAYERS["mobilenet"])).eval()
    x = random((1, 8, 6, 6), torch.float32, "cpu")
    wrong, done = [], threading.Event()

    def observe() -> None:
        while not done.is_set():
            layer.depthwise_norm.register_forward_hook(lambda *_: None).remove()

    def serve() -> None:
        for _ in range(200):
            with torch.no_grad():
                apart = (layer(x) - expected).abs().max().item()
            if apart > 1e-4:
                wrong.append(apart)

    with torch.no_grad():
        expected = ByHand(layer)(x)
    observer, *serving = [threading.Thread(target=observe), *(threading.Thread(target=serve) for _ in range(3))]
    for thread in (observer, *serving):
        thread.start()
    for thread in serving:
        thread.join()
    done.set()
    observer.join()
    assert not wrong


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_fold(dtype: torch.dtype, bias: bool, device: str) -> None:
    conv, norm = nn.Conv2d(6, 8, 3, groups=2, bias=bias), lived_in(nn.BatchNorm2d(8, eps=1e-2))
    norm.eval(), conv.to(device, dtype), norm.to(device, dtype)
    x = random((2, 6, 7, 7), dtype, device)
    weight, shift = fold(conv, norm)
    assert weight.dtype == shift.dtype == dtype
    tolerance = 1e-5 if dtype != torch.bfloat16 else 5e-2
    exact = copy.deepcopy(norm).double()(copy.deepcopy(conv).double()(x.double()))
    torch.testing.assert_close(F.conv2d(x, weight, shift, groups=2).double(), exact, rtol=tolerance, atol=tolerance)


def test_exchanged_and_parametrized_parts() -> None:
    layer = lived_in(SeparableConv2d(**LAYERS["mobilenet"])).eval()
    x = random((1, 8, 6, 6), torch.float32, "cpu")
    layer(x)
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(layer)
    assert type(synchronised.pointwise_norm) is nn.SyncBatchNorm
    with torch.no_grad():
        synchronised.pointwise_norm.bias.add_(1)

    def by_hand() -> torch.Tensor:
        depthwise = F.relu6(layer.depthwise_norm(layer.depthwise(x)))
        return F.relu6(layer.pointwise_norm(layer.pointwise(depthwise)))

    torch.testing.assert_close(layer(x), by_hand(), rtol=1e-4, atol=1e-4)
    torch.nn.utils.parametrizations.weight_norm(layer.pointwise)
    torch.testing.assert_close(layer(x), by_hand(), rtol=1e-4, atol=1e-4)
    layer.pointwise = nn.Sequential(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 12, 1))
    torch.testing.assert_close(layer(x), by_hand(), rtol=1e-4, atol=1e-4)


def test_state_dict_names_and_printed_form() -> None:
    layer = SeparableConv2d(8, 12, 3, norm="batch", activation="relu6")
    assert [name for name, _ in layer.named_parameters()] == [
        "depthwise.weight",
        "depthwise_norm.weight",
        "depthwise_norm.bias",
        "pointwise.weight",
        "pointwise_norm.weight",
        "pointwise_norm.bias",
    ]
    text = repr(layer)
    assert "activation=relu6" in text and "depthwise_activation" not in text and "groups=8" in text
    plain = SeparableConv2d(8, 12, 3)
    assert plain.depthwise.bias is not None and plain.pointwise.bias is not None and plain.depthwise_norm is None
    assert type(plain.depthwise) is Conv2d and isinstance(plain.depthwise, nn.Conv2d)
    assert sum(p.numel() for p in SeparableConv2d(8, 12, 3, bias=False).parameters()) == 8 * 9 + 8 * 12
    meta = SeparableConv2d(8, 12, 3, norm="batch", device="meta", dtype=torch.float64)
    assert all(p.is_meta and p.dtype == torch.float64 for p in meta.parameters())


@by_layer
def test_copies_and_pickles(arguments: dict) -> None:
    layer = lived_in(SeparableConv2d(**arguments)).eval()
    x = random((1, arguments["in_channels"], 7, 7), torch.float32, "cpu")
    with torch.no_grad():
        expected = layer(x)
    saved = io.BytesIO()
    torch.save(layer, saved)
    saved.seek(0)
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(saved, weights_only=False)):
        with torch.no_grad():
            assert torch.equal(copied(x), expected)
            copied.depthwise.weight.zero_()
            assert torch.equal(layer(x), expected)  # copies are their own
    fresh = SeparableConv2d(**arguments).eval()
    fresh.load_state_dict(layer.state_dict())
    with torch.no_grad():
        assert torch.equal(fresh(x), expected)


def test_save_intermediate_spares_the_backward_pass_a_convolution() -> None:
    x = random((1, 4, 7, 7), torch.float32, "cpu").requires_grad_()
    runs = []
    for keep in (False, True):
        layer = SeparableConv2d(4, 6, 3, depthwise_activation="relu", save_intermediate=keep)
        y = layer(x)
        sepconv_ext.reset_kernel_counts()
        y.sum().backward()
        runs.append(sum(sepconv_ext.kernel_counts().values()))
    assert runs[1] < runs[0]


def test_channels_last_stays(device: str) -> None:
    layer = SeparableConv2d(8, 12, 3, stride=2, norm="batch", device=device).eval()
    x = random((2, 8, 9, 8), torch.float32, device, "channels_last")
    assert layer(x).is_contiguous(memory_format=torch.channels_last)


# --- grouped convolutions that are known by name: nn.Conv2d(groups=g) ---


@pytest.mark.parametrize("layer", ["conv2", "conv4", "conv5"])
def test_alexnets_two_groups(layer: str, device: str) -> None:
    """Krizhevsky et al., 2012: the network lay on two GPUs, and three of its layers saw their own GPU's maps only."""
    arguments = {
        "conv2": dict(in_channels=96, out_channels=256, kernel_size=5, padding=2, groups=2),
        "conv4": dict(in_channels=384, out_channels=384, kernel_size=3, padding=1, groups=2),
        "conv5": dict(in_channels=384, out_channels=256, kernel_size=3, padding=1, groups=2),
    }[layer]
    _assert_grouped_layer(arguments, device)


@pytest.mark.parametrize("channels, stride", [(128, 1), (256, 2), (512, 1)], ids=["conv2_x", "conv3_1", "conv4_x"])
def test_resnexts_cardinality(channels: int, stride: int, device: str) -> None:
    """Xie et al., 2017: ResNeXt-50 (32x4d), the 3x3 layers with a cardinality of 32."""
    arguments = dict(
        in_channels=channels, out_channels=channels, kernel_size=3, stride=stride, padding=1, groups=32, bias=False
    )
    _assert_grouped_layer(arguments, device)


def test_groups_divide_both_channel_counts() -> None:
    """The finest grouping is gcd(C, K); the separable layer needs none of it."""
    C, K = 12, 18
    allowed = []
    for groups in range(1, C + 1):
        try:
            Conv2d(C, K, 3, groups=groups)(torch.zeros(1, C, 4, 4))
        except ValueError:
            continue
        allowed.append(groups)
    assert allowed == [g for g in range(1, C + 1) if math.gcd(C, K) % g == 0]
    assert SeparableConv2d(C, K, 3)(torch.zeros(1, C, 4, 4)).shape == (1, K, 4, 4)


def _assert_grouped_layer(arguments: dict, device: str) -> None:
    layer = nn.Conv2d(**arguments, device=device)
    x = random((1, arguments["in_channels"], 9, 9), torch.float32, device)
    image = x.clone().requires_grad_()
    expected = layer(image)
    g = torch.randn_like(expected)
    gradients = torch.autograd.grad(expected, (image, layer.weight), g)
    assert len(convert_(layer)) == 1
    with only_our_kernels(at_least=3):
        y = layer(image)
        ours = torch.autograd.grad(y, (image, layer.weight), g)
    for actual, wanted in zip((y, *ours), (expected, *gradients), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-3, atol=1e-3)


def test_arguments_that_make_no_layer() -> None:
    for make in (DepthwiseConv2d, lambda channels, _, **named: PointwiseConv2d(channels, 4, **named)):
        with pytest.raises(ValueError, match=r"activation must be one of .* but is 'foo'"):
            make(3, 3, activation="foo")
    for make in (lambda **named: DepthwiseConv2d(3, 3, **named), lambda **named: SeparableConv2d(3, 4, 3, **named)):
        for multiplier in (0, -1):
            with pytest.raises(ValueError, match=f"multiplier must be a positive integer, but is {multiplier}"):
                make(multiplier=multiplier)


@pytest.mark.parametrize(
    ("name", "part"),
    (
        ("pointwise", Conv2d(3, 8, 1, stride=2)),
        ("pointwise", Conv2d(3, 8, 3, padding=1)),
        ("depthwise", Conv2d(3, 3, 3, padding=1)),
    ),
    ids=("stride", "kernel", "dense"),
)
def test_parts_that_are_exchanged_for_other_convolutions(name: str, part: Conv2d) -> None:
    layer = SeparableConv2d(3, 8, 3, norm="batch", activation="relu").eval()
    setattr(layer, name, part)
    x = torch.randn(2, 3, 9, 9)
    with torch.no_grad():
        expected = layer.pointwise_norm(layer.pointwise(layer.depthwise_norm(layer.depthwise(x)))).relu()
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
        layer = SeparableConv2d(3, 8, 3).eval()
        layer.pointwise.stride = (2, 2)
        assert layer(x).shape == (2, 8, 5, 5)
        layer.depthwise.forward = torch.zeros_like
        torch.testing.assert_close(layer(x), layer.pointwise.bias[:, None, None].expand(2, 8, 5, 5))
