"""convert_(model, fuse=True): what is found, what is refused, what it computes, and that all of it can be undone."""

from __future__ import annotations

import collections
import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode

import sepconv_ext
from harness import only_our_kernels, random
from sepconv_ext import convert_, revert_
from sepconv_ext.fold import fold


class Calls(TorchDispatchMode):
    """Counts the ops that run."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.counts[op._schema.name.split("::")[1]] += 1
        return op(*args, **(kwargs or {}))


def calls(model: nn.Module, x: Tensor) -> dict[str, int]:
    """The ops of one forward pass without gradients, but for views; the second pass, when norms have been folded."""
    with torch.no_grad():
        model(x)
        with Calls() as seen:
            model(x)
    return {name: n for name, n in seen.counts.items() if name not in ("detach", "view", "unsqueeze", "squeeze")}


def depthwise(channels: int, multiplier: int = 1, **arguments) -> nn.Conv2d:
    return nn.Conv2d(channels, channels * multiplier, 3, groups=channels, **{"padding": 1, **arguments})


def lived_in(model: nn.Module) -> nn.Module:
    """Norms with statistics, scales and shifts of their own."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for norm in model.modules():
            if isinstance(norm, nn.BatchNorm2d):
                for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
                    if tensor is not None:
                        tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return model


def mobile_block(act: type[nn.Module] = nn.ReLU6) -> nn.Sequential:
    """expand -> depthwise -> project, each with a batch norm: MobileNetV2's block between a dense stem and a head."""
    torch.manual_seed(1)
    return lived_in(
        nn.Sequential(
            nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), act()),
            nn.Sequential(nn.Conv2d(4, 12, 1, bias=False), nn.BatchNorm2d(12), act()),
            nn.Sequential(depthwise(12, stride=2, bias=False), nn.BatchNorm2d(12), act()),
            nn.Sequential(nn.Conv2d(12, 8, 1, bias=False), nn.BatchNorm2d(8)),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 5),
        )
    ).eval()


@pytest.fixture
def x() -> Tensor:
    return random((2, 3, 9, 8), torch.float32, "cpu")


def assert_same(model: nn.Module, original: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(model(x), original(x), rtol=1e-4, atol=1e-4)


def fused(model: nn.Module, x: Tensor | None = None, **arguments):
    """The converted model's report; the outputs stay."""
    original = copy.deepcopy(model)
    report = convert_(model, fuse=True, **arguments)
    if x is not None:
        assert_same(model, original, x)
    return report


def why_not(model: nn.Module, x: Tensor) -> str:
    """The one reason why the one depthwise convolution of a model is in no separable chain."""
    report = fused(model, x)
    assert not [entry for entry in report.fused if entry.family == "separable"]
    (entry,) = report.unpaired
    return entry.reason


# --- what is found ---


def test_a_block_becomes_three_calls(x: Tensor) -> None:
    model = mobile_block()
    report = fused(model, x)
    assert [(entry.name, entry.family) for entry in report.fused] == [
        ("0.0", "dense"),
        ("1.0", "pointwise"),
        ("2.0 -> 3.0", "separable"),
    ]
    assert report.fused[2].summary == "depthwise, batch norm, relu6 -> pointwise, batch norm"
    assert [entry.name for entry in report.folded] == ["0.1", "1.1", "2.1", "3.1"]
    assert not report.unpaired and len(report) == 3
    ops = calls(model, x)
    assert ops["separable_conv2d"] == 1 and ops["conv2d"] == 1  # ours; the stem is torch's "convolution"
    assert ops["hardtanh"] == 1  # the stem's ReLU6 stays a module
    assert not {"native_batch_norm", "_native_batch_norm_legit_no_training", "batch_norm", "mul"} & ops.keys()
    with torch.no_grad(), only_our_kernels(at_least=2):
        model(x)


ACTIVATIONS = [nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish, nn.Sigmoid, nn.Tanh, nn.GELU, nn.LeakyReLU, nn.Identity]


@pytest.mark.parametrize("act", ACTIVATIONS, ids=lambda act: act.__name__)
def test_every_activation(act: type[nn.Module]) -> None:
    model = lived_in(nn.Sequential(depthwise(4, 2), nn.BatchNorm2d(8), act(), nn.Conv2d(8, 5, 1), act())).eval()
    x = random((2, 4, 6, 7), torch.float32, "cpu")
    report = fused(model, x)
    assert [entry.family for entry in report.fused] == ["separable"]
    assert calls(model, x) == {"separable_conv2d": 1}


@pytest.mark.parametrize("act", [nn.GELU(approximate="tanh"), nn.LeakyReLU(0.2), nn.Mish()], ids=str)
def test_activations_that_no_kernel_has(act: nn.Module) -> None:
    model = nn.Sequential(depthwise(4), act, nn.Conv2d(4, 5, 1)).eval()
    assert f"{type(act).__name__} follows" in why_not(model, random((2, 4, 6, 7), torch.float32, "cpu"))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_fold(dtype: torch.dtype, bias: bool, affine: bool, device: str) -> None:
    conv = nn.Conv2d(6, 8, 3, groups=2, bias=bias)
    norm = lived_in(nn.BatchNorm2d(8, affine=affine, eps=1e-2) if affine else nn.BatchNorm2d(8, affine=False))
    norm.eval(), conv.to(device, dtype), norm.to(device, dtype)
    x = random((2, 6, 7, 7), dtype, device)
    weight, shift = fold(conv, norm)
    assert weight.dtype == shift.dtype == dtype
    tolerance = 1e-5 if dtype != torch.bfloat16 else 5e-2
    exact = copy.deepcopy(norm).double()(copy.deepcopy(conv).double()(x.double()))
    torch.testing.assert_close(F.conv2d(x, weight, shift, groups=2).double(), exact, rtol=tolerance, atol=tolerance)


def test_fold_is_differentiable() -> None:
    conv, norm = nn.Conv2d(4, 6, 1).double(), lived_in(nn.BatchNorm2d(6)).double().eval()
    x = random((2, 4, 5, 5), torch.float64, "cpu")
    parameters = [*conv.parameters(), *norm.parameters()]
    results = [
        torch.autograd.grad(y.square().sum(), parameters) for y in (F.conv2d(x, *fold(conv, norm)), norm(conv(x)))
    ]
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(
    "geometry",
    [dict(stride=2, padding=0), dict(dilation=2, padding="same"), dict(padding_mode="reflect"), dict(bias=False)],
    ids=str,
)
def test_geometry_of_the_depthwise_stage(geometry: dict) -> None:
    model = nn.Sequential(depthwise(4, **geometry), nn.ReLU(), nn.Conv2d(4, 7, 1, bias=False)).eval()
    x = random((2, 4, 9, 8), torch.float32, "cpu")
    assert [entry.family for entry in fused(model, x).fused] == ["separable"]


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_padding_modes_of_single_stages(mode: str) -> None:
    x = random((2, 4, 9, 8), torch.float32, "cpu")
    for groups, act in ((4, nn.ReLU()), (2, nn.Identity()), (1, nn.Identity())):
        conv = nn.Conv2d(4, 4, 3, padding=1, groups=groups, padding_mode=mode)
        model = lived_in(nn.Sequential(conv, nn.BatchNorm2d(4), act)).eval()
        assert len(fused(model, x).fused) == 1


def test_only_true_pointwise_convolutions_follow() -> None:
    x = random((2, 4, 9, 8), torch.float32, "cpu")
    for second in (nn.Conv2d(4, 8, 1, stride=2), nn.Conv2d(4, 8, 1, padding=1), nn.Conv2d(4, 8, 1, groups=2)):
        assert "Conv2d follows" in why_not(nn.Sequential(depthwise(4), second).eval(), x)


def test_layers_of_ours_with_an_activation() -> None:
    layers = sepconv_ext.nn
    model = nn.Sequential(
        layers.DepthwiseConv2d(4, 3, activation="silu"), layers.PointwiseConv2d(4, 6, activation="relu")
    )
    x = random((2, 4, 9, 8), torch.float32, "cpu")
    (entry,) = fused(model, x).fused
    assert entry.summary == "depthwise, silu -> pointwise, relu"
    assert calls(model, x) == {"separable_conv2d": 1}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_separable_layers_are_chains_already(training: bool) -> None:
    layer = sepconv_ext.nn.SeparableConv2d(4, 6, 3, norm="batch", activation="relu")
    model = lived_in(nn.Sequential(nn.Conv2d(4, 4, 1), layer, nn.BatchNorm2d(6), depthwise(6), nn.Conv2d(6, 6, 1)))
    report = fused(model.train(training), random((2, 4, 9, 8), torch.float32, "cpu"))
    assert [entry.name for entry in report.fused] == ["3 -> 4"] and not report.unpaired
    assert len(report) == 3  # and its own two convolutions were ours before


def test_identities_on_the_way() -> None:
    """timm puts an nn.Identity where a block has no squeeze-and-excitation."""
    model = nn.Sequential(
        depthwise(4), nn.Identity(), nn.BatchNorm2d(4), nn.Identity(), nn.Identity(), nn.Conv2d(4, 6, 1)
    )
    x, seen = random((2, 4, 9, 8), torch.float32, "cpu"), []
    report = fused(model.eval(), x)
    assert [entry.family for entry in report.fused] == ["separable"]
    for i in (1, 3, 4):
        hook = model[i].register_forward_hook(lambda module, arguments, output: seen.append(output.shape[1]))
        model(x)
        hook.remove()
    assert seen == [4, 4, 4]  # what lies between, not the chain's output


def test_norms_of_other_packages() -> None:
    x = random((2, 4, 9, 8), torch.float32, "cpu")
    torchvision = pytest.importorskip("torchvision", reason="torchvision is an extra")
    frozen = torchvision.ops.FrozenBatchNorm2d(4)
    frozen.running_mean.add_(0.5), frozen.running_var.mul_(3), frozen.bias.add_(1)
    model = nn.Sequential(depthwise(4), frozen, nn.Conv2d(4, 6, 1))
    assert [entry.family for entry in fused(model, x).fused] == ["separable"]
    assert calls(model.train(), x) == {"separable_conv2d": 1}  # it is as frozen in train()
    timm = pytest.importorskip("timm", reason="timm is an extra")
    model = nn.Sequential(depthwise(4), timm.layers.BatchNormAct2d(4, act_layer=nn.SiLU), nn.Conv2d(4, 6, 1)).eval()
    assert fused(lived_in(model), x).fused[0].summary == "depthwise, batch norm, silu -> pointwise"
    dropping = timm.layers.BatchNormAct2d(4, drop_layer=nn.Dropout)
    assert "BatchNormAct2d follows" in why_not(nn.Sequential(depthwise(4), dropping, nn.Conv2d(4, 6, 1)).eval(), x)


# --- what is refused ---


class Written(nn.Module):
    """A depthwise-separable block whose forward is given."""

    def __init__(self, forward) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.depthwise = depthwise(4)
        self.norm = nn.BatchNorm2d(4)
        self.act = nn.ReLU()
        self.pointwise = nn.Conv2d(4, 4, 1)
        self.last = nn.BatchNorm2d(4)
        self.written = forward
        lived_in(self).eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.written(self, x)


REFUSED = {
    "the convolution is called twice": (
        lambda m, x: m.pointwise(m.act(m.norm(m.depthwise(m.depthwise(x))))),
        "it is used in several places",
    ),
    "the pointwise one is called twice": (
        lambda m, x: m.pointwise(m.pointwise(m.act(m.norm(m.depthwise(x))))),
        "used in several places",
    ),
    "the norm is shared": (lambda m, x: m.norm(m.pointwise(m.act(m.norm(m.depthwise(x))))), "used in several places"),
    "the activation is shared": (
        lambda m, x: m.act(m.pointwise(m.act(m.norm(m.depthwise(x))))),
        "ReLU follows, which is used in several places",
    ),
    "what lies between is used elsewhere": (
        lambda m, x: m.pointwise(y := m.act(m.norm(m.depthwise(x)))) + y,
        "its output is used in 2 places",
    ),
    "squeeze and excitation": (
        lambda m, x: m.pointwise((y := m.act(m.depthwise(x))) * y.mean((2, 3), keepdim=True)),
        "its output is used in 2 places",
    ),
    "its shape is looked at": (
        lambda m, x: m.pointwise((y := m.depthwise(x)).view(y.shape[0], 4, y.shape[2], y.shape[3])),
        "its output is used in",
    ),
    "a function between": (lambda m, x: m.pointwise(F.relu(m.norm(m.depthwise(x)))), "relu() follows"),
    "a method between": (lambda m, x: m.pointwise(m.norm(m.depthwise(x)).relu()), "relu() follows"),
    "a call by keyword": (lambda m, x: m.pointwise(m.act(input=m.depthwise(x))), "ReLU follows, called with more"),
    "nothing behind it": (lambda m, x: m.depthwise(m.pointwise(x)), "its output is returned"),
}


@pytest.mark.parametrize("forward, reason", REFUSED.values(), ids=REFUSED.keys())
def test_what_keeps_a_pair_apart(forward, reason: str) -> None:
    assert reason in why_not(Written(forward), random((2, 4, 7, 8), torch.float32, "cpu"))


STRAIGHT = Written(lambda m, x: m.last(m.pointwise(m.act(m.norm(m.depthwise(x)))))).written


@pytest.mark.parametrize("part", ["norm", "act", "pointwise"])
def test_parts_with_hooks(part: str) -> None:
    model = Written(STRAIGHT)
    seen = []
    getattr(model, part).register_forward_hook(lambda module, arguments, output: seen.append(output.mean()))
    assert "which has hooks" in why_not(model, random((2, 4, 7, 8), torch.float32, "cpu"))
    assert len(seen) == 2 and torch.allclose(*seen)  # once in the original, once converted, and not while tracing


def test_parametrized_parts() -> None:
    model = Written(STRAIGHT)
    parametrizations.weight_norm(model.pointwise)
    assert "which is parametrized" in why_not(model, random((2, 4, 7, 8), torch.float32, "cpu"))
    model = Written(STRAIGHT)
    torch.nn.utils.spectral_norm(model.depthwise)  # works by a hook
    assert "it has hooks" in why_not(model, random((2, 4, 7, 8), torch.float32, "cpu"))


def test_norms_that_cannot_be_folded() -> None:
    x = random((2, 4, 7, 8), torch.float32, "cpu")
    for norm in (nn.BatchNorm2d(4, track_running_stats=False), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4)):
        model = nn.Sequential(depthwise(4), norm, nn.Conv2d(4, 6, 1)).eval()
        assert f"{type(norm).__name__} follows" in why_not(model, x)


def test_classes_of_their_own_and_patched_forwards() -> None:
    class Custom(nn.Conv2d):
        pass

    x = random((2, 4, 7, 8), torch.float32, "cpu")
    assert "a class of its own: Custom" in why_not(nn.Sequential(depthwise(4), Custom(4, 4, 1)), x)
    model = nn.Sequential(depthwise(4), nn.ReLU(), nn.Conv2d(4, 4, 1))
    model[1].forward = F.relu6
    assert "forward replaced" in why_not(model, x)


def test_filter(x: Tensor) -> None:
    model, asked = mobile_block(), []

    def no_projections(name: str, module: nn.Module) -> bool:
        asked.append(name)
        return name not in ("0.0", "3.0")

    report = fused(model, x, filter_fn=no_projections)
    assert sorted(asked) == ["0.0", "1.0", "2.0", "3.0"]  # each once
    assert [(entry.name, entry.family) for entry in report.fused] == [("1.0", "pointwise"), ("2.0", "depthwise")]
    assert [entry.reason for entry in report.unpaired] == ["the pointwise convolution behind it was skipped"]


def test_fused_once(x: Tensor) -> None:
    model = mobile_block()
    fused(model, x)
    again = convert_(model, fuse=True)
    assert not again and not again.fused and not again.unpaired
    assert revert_(model) == 3 and len(fused(model, x).fused) == 3
    # What was converted without fusing can be fused later.
    model = mobile_block()
    convert_(model)
    later = fused(model, x)
    assert not later and len(later.fused) == 3 and revert_(model) == 3


# --- models that do not trace ---


class Branching(nn.Module):
    """Asks a tensor for its value: torch.fx cannot follow."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) if x.sum() > -1e9 else x


class CallsItsParts(nn.Module):
    """Does not trace, and steps into an nn.Sequential."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleList([Branching(mobile_block()), nn.Linear(5, 5)])

    def forward(self, x: Tensor) -> Tensor:
        for part in self.body:
            x = part(x)
        return x


def test_parts_of_untraceable_models(x: Tensor) -> None:
    for model in (Branching(mobile_block()), Branching(Branching(mobile_block())), CallsItsParts()):
        report = fused(model.eval(), x)
        assert [entry.family for entry in report.fused] == ["dense", "pointwise", "separable"]
        assert calls(model, x)["separable_conv2d"] == 1
    # Around an untraceable part, too.
    around = nn.Sequential(depthwise(3), nn.Conv2d(3, 3, 1), Branching(mobile_block()), nn.Identity()).eval()
    assert [entry.name for entry in fused(around, x).fused if entry.family == "separable"] == [
        "0 -> 1",
        "2.body.2.0 -> 2.body.3.0",
    ]


def test_two_names_in_a_model_that_is_traced_in_parts(x: Tensor) -> None:
    """The part that does not trace may call the module by its other name."""
    model = Branching(mobile_block())
    model.alias = model.body[2][0]
    assert [entry.family for entry in fused(model.eval(), x).fused] == ["dense", "pointwise", "pointwise"]
    traced = Written(STRAIGHT)
    traced.alias = traced.depthwise
    assert [entry.family for entry in convert_(traced, fuse=True).fused] == ["separable"]


def test_a_model_with_hooks_is_traced_around_them(x: Tensor) -> None:
    model, seen = mobile_block(), []
    model.register_forward_pre_hook(lambda module, arguments: seen.append(type(arguments[0])))
    model[2].register_forward_hook(lambda module, arguments, output: seen.append(output.shape))
    report = convert_(model, fuse=True)
    assert not seen  # tracing runs nobody's hooks
    assert [entry.family for entry in report.fused] == ["dense", "pointwise", "depthwise", "pointwise"]
    model(x)
    assert seen == [Tensor, torch.Size([2, 12, 5, 4])]


def test_what_differs_between_train_and_eval() -> None:
    def forward(m, x):
        y = m.depthwise(x)
        return (m.pointwise(y), y) if m.training else m.pointwise(y)

    model = Written(forward)
    x = random((2, 4, 7, 8), torch.float32, "cpu")
    report = convert_(model, fuse=True)
    assert not report.fused and [entry.reason for entry in report.unpaired] == ["train() and eval() differ there"]
    assert model.train()(x)[1].shape[1] == 4 and model.eval()(x).shape[1] == 4


def test_optional_arguments_keep_their_defaults() -> None:
    class Masked(Written):
        def forward(self, x, mask=None, scale=1.0):
            y = self.depthwise(x)
            if mask is not None:
                y = y * mask
            return self.pointwise(y) * scale

    assert [entry.family for entry in fused(Masked(None), random((2, 4, 7, 8), torch.float32, "cpu")).fused] == [
        "separable"
    ]


def test_a_forward_that_keeps_things_on_the_model(x: Tensor) -> None:
    def forward(m, x):
        m.latest = m.pointwise(m.depthwise(x))
        m.seen = getattr(m, "seen", 0) + 1
        return m.latest

    model = Written(forward)
    before = model.__dict__.keys()
    convert_(model, fuse=True)
    assert model.__dict__.keys() == before and not hasattr(model, "seen")


def test_a_model_that_cannot_be_copied(x: Tensor) -> None:
    model = mobile_block()
    model.stream = (letter for letter in "generators have no copies")
    report = convert_(model, fuse=True)
    assert len(report) == 3 and not report.fused
    assert "cannot be copied for tracing" in report.unpaired[0].reason
    model(x)


# --- train() and eval() ---


def test_training_is_what_it_was(x: Tensor) -> None:
    """Losses, gradients, statistics: as the original; and eval() in between sees each new weight and statistic."""
    original = mobile_block()
    model = copy.deepcopy(original)
    convert_(model, fuse=True)
    optimisers = [torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9) for m in (original, model)]
    labels = torch.tensor([1, 3])
    for _ in range(4):
        losses = []
        for m, optimiser in zip((original, model), optimisers, strict=True):
            m.train()
            optimiser.zero_grad()
            losses.append(F.cross_entropy(m(x), labels))
            losses[-1].backward()
            optimiser.step()
            m.eval()
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-4)
        assert_same(model, original, x)
        for key, tensor in original.state_dict().items():
            torch.testing.assert_close(model.state_dict()[key], tensor, rtol=1e-3, atol=1e-3)


def test_statistics_that_move_without_a_step(x: Tensor) -> None:
    """Batch norm writes its statistics where autograd's version counter does not see it."""
    original, model = mobile_block(), mobile_block()
    convert_(model, fuse=True)
    with torch.no_grad():
        for m in (original, model):
            m(x), m.train(), m(3 * x), m.eval()
        assert_same(model, original, x)


def test_reported_when_converted_in_training() -> None:
    model = mobile_block().train()
    model.append(nn.Unflatten(1, (5, 1, 1))).extend([depthwise(5), nn.ReLU(), nn.Conv2d(5, 5, 1)])
    report = convert_(model, fuse=True)
    reasons = {entry.name: entry.reason for entry in report.fused}
    assert "from eval() on" in reasons["2.0 -> 3.0"] and reasons["8 -> 10"] == ""
    assert "batch statistics" in str(report)
    x = random((2, 3, 9, 8), torch.float32, "cpu")
    assert calls(model, x)["separable_conv2d"] == 1  # the chain without a norm
    assert calls(model.eval(), x)["separable_conv2d"] == 2


def test_gradients_in_eval(x: Tensor) -> None:
    """Frozen norms: folded weights are part of the graph, so every parameter has its gradient."""
    original = mobile_block()
    model = copy.deepcopy(original)
    convert_(model, fuse=True)
    gradients = []
    for m in (original, model):
        image = x.clone().requires_grad_()
        gradients.append(torch.autograd.grad(m(image).square().sum(), (image, *m.parameters())))
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


def test_training_with_frozen_norms(x: Tensor) -> None:
    """train() with the norms alone in eval(), as detectors are fine-tuned: fused, and differentiable."""
    model = mobile_block()
    convert_(model, fuse=True)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval().requires_grad_(False)
    assert calls(model, x)["separable_conv2d"] == 1
    model(x).sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


def test_one_norm_in_training_is_enough(x: Tensor) -> None:
    model, original = mobile_block(), mobile_block()
    convert_(model, fuse=True)
    for m in (model, original):
        m[3][1].train()
    assert "separable_conv2d" not in calls(model, x)
    assert_same(model, original, x)


# --- nothing else changes, and all of it can be undone ---


def snapshot(model: nn.Module) -> dict:
    return {
        name: (
            id(module),
            type(module),
            module.training,
            {key: id(value) for key, value in vars(module).items()},
            {key: id(value) for key, value in module._parameters.items()},
            {key: id(value) for key, value in module._buffers.items()},
        )
        for name, module in model.named_modules(remove_duplicate=False)
    }


ADDED = ("forward", "_sepconv_original_class")


def test_round_trip(x: Tensor) -> None:
    model = mobile_block()
    model[2][0].weight.requires_grad_(False)
    model[3].register_forward_hook(lambda module, arguments, output: output + 1)
    optimiser = torch.optim.Adam(model.parameters())
    model.train()(x).sum().backward()
    optimiser.step()
    model.eval()
    before, text = snapshot(model), repr(model)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    held = copy.deepcopy(optimiser.state_dict())

    report = convert_(model, fuse=True)
    assert report.fused
    for name, after in snapshot(model).items():  # but for the classes of convolutions and the forward of members
        assert [after[i] for i in (0, 2, 4, 5)] == [before[name][i] for i in (0, 2, 4, 5)]
        assert after[3].items() - before[name][3].items() <= {(key, after[3].get(key)) for key in ADDED}
    assert repr(model) == text and model.state_dict().keys() == state.keys()
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    with torch.no_grad():
        model(x)

    assert revert_(model) == len(report) == 3
    assert snapshot(model) == before and repr(model) == text
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    assert {id(p) for group in optimiser.param_groups for p in group["params"]} == {id(p) for p in model.parameters()}
    torch.testing.assert_close(optimiser.state_dict(), held)
    assert revert_(model) == 0


def test_load_state_dict_into_a_fused_model(x: Tensor) -> None:
    torch.manual_seed(9)
    other = lived_in(mobile_block())
    with torch.no_grad():
        for tensor in other.state_dict().values():
            tensor.mul_(1.5) if tensor.is_floating_point() else None
    model = mobile_block()
    convert_(model, fuse=True)
    with torch.no_grad():
        model(x)
    model.load_state_dict(other.state_dict())
    assert_same(model, other, x)
    other.load_state_dict(model.state_dict())
    assert_same(model, other, x)


def test_a_parameter_that_is_taken_away(x: Tensor) -> None:
    model, original = mobile_block(), mobile_block()
    convert_(model, fuse=True)
    with torch.no_grad():
        model(x)
    for m in (model, original):
        m[3][1].bias = None
        m[2][1].weight = None
    assert_same(model, original, x)


def test_moved_models(x: Tensor) -> None:
    model, original = mobile_block(), mobile_block()
    convert_(model, fuse=True)
    with torch.no_grad():
        model(x)
    assert_same(model.double(), original.double(), x.double())
    assert_same(model.float(), original.float(), x)
    image = x.to(memory_format=torch.channels_last)
    assert_same(model.to(memory_format=torch.channels_last), original.to(memory_format=torch.channels_last), image)


def test_copies_and_pickles(x: Tensor) -> None:
    model = mobile_block()
    convert_(model, fuse=True)
    with torch.no_grad():
        expected = model(x)
    fresh = mobile_block()
    convert_(fresh, fuse=True)
    assert len(pickle.dumps(model)) < len(pickle.dumps(fresh)) + 200  # what is folded is not stored
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(saved, weights_only=False)):
        assert calls(copied, x)["separable_conv2d"] == 1
        with torch.no_grad():
            assert torch.equal(copied(x), expected)
            for p in copied.parameters():
                p.mul_(1.25)
            changed = copied(x)
            assert torch.equal(model(x), expected)  # the copy's chain is made of the copy's modules
        assert revert_(copied) == 3 and "separable_conv2d" not in calls(copied, x)
        torch.testing.assert_close(changed, copied(x).detach(), rtol=1e-4, atol=1e-4)
    assert calls(model, x)["separable_conv2d"] == 1


def test_hooks_that_come_later(x: Tensor) -> None:
    """A chain whose module somebody watches runs module by module: every module sees what it always saw."""
    model, original = mobile_block(), mobile_block()
    convert_(model, fuse=True)
    seen: dict[int, list[Tensor]] = {}
    handles = []
    for i, m in enumerate((model, original)):
        for part in (m[2][0], m[2][1], m[2][2], m[3][0], m[3][1]):
            handles.append(part.register_forward_hook(lambda _, a, output, i=i: seen.setdefault(i, []).append(output)))
    assert_same(model, original, x)
    assert len(seen[0]) == 5
    for mine, theirs in zip(seen[0], seen[1], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    for handle in handles:
        handle.remove()
    assert calls(model, x)["separable_conv2d"] == 1


def test_parametrizations_that_come_later(x: Tensor) -> None:
    model, original = mobile_block(), mobile_block()
    convert_(model, fuse=True)
    for m in (model, original):
        parametrizations.weight_norm(m[3][0])
        m[3][0].parametrizations.weight.original0.data.mul_(2)
    assert_same(model, original, x)
    torch.testing.assert_close(model(x), original(x), rtol=1e-4, atol=1e-4)  # with gradients wanted
    assert revert_(model) == 3
    assert_same(model, original, x)


def test_averaged_models(x: Tensor) -> None:
    """torch's AveragedModel copies the model and writes into the copy."""
    model, original = mobile_block(), mobile_block()
    convert_(model, fuse=True)
    averages = [torch.optim.swa_utils.AveragedModel(m).eval() for m in (model, original)]
    for _ in range(2):
        for m, average in zip((model, original), averages, strict=True):
            with torch.no_grad():
                average(x)
                for p in m.parameters():
                    p.mul_(1.1)
            average.update_parameters(m)
        assert_same(*averages, x)


def test_cost_of_a_fused_model(x: Tensor) -> None:
    """sepconv_ext.cost watches every module, and leaves the model fused."""
    model = mobile_block()
    expected = sepconv_ext.cost(model, x.shape)
    convert_(model, fuse=True)
    assert sepconv_ext.cost(model, x.shape).macs == expected.macs
    assert calls(model, x)["separable_conv2d"] == 1


# --- torch's machinery ---


def test_functional_call_and_vmap(x: Tensor) -> None:
    model, original = mobile_block().double(), mobile_block().double()
    convert_(model, fuse=True)
    x = x.double()
    state = {
        name: tensor * 1.25 if tensor.is_floating_point() else tensor for name, tensor in model.state_dict().items()
    }
    with torch.no_grad():
        model(x)
        torch.testing.assert_close(functional_call(model, state, (x,)), functional_call(original, state, (x,)))
        assert_same(model, original, x)
    stacked = {name: torch.stack([p, 2 * p]) for name, p in model.named_parameters()}
    results = [vmap(lambda p, m=m: functional_call(m, p, (x,)))(stacked) for m in (model, original)]
    torch.testing.assert_close(*results)
    assert_same(model, original, x)


def test_tracing_a_fused_model(x: Tensor) -> None:
    model = mobile_block()
    convert_(model, fuse=True)
    graph = torch.fx.symbolic_trace(model)
    assert_same(graph, model, x)
    with torch.no_grad():
        traced = torch.jit.trace(model, x)
    assert_same(traced, model, x)


def test_a_graph_follows_its_parameters(x: Tensor) -> None:
    """Folding is part of what torch.fx traces, also where nobody wants gradients: nothing folded is baked in."""
    model = mobile_block()
    convert_(model, fuse=True)
    with torch.no_grad():
        model(x)
        graph = torch.fx.symbolic_trace(model)
        model[2][0].weight.mul_(1.5)
        model[3][1].running_var.add_(1)
    assert_same(graph, model, x)


def test_scripting_needs_revert(x: Tensor) -> None:
    model, original = mobile_block(), mobile_block()
    convert_(model, fuse=True)
    with pytest.raises(Exception):  # noqa: B017 (what torch.jit raises is its own affair, as long as it is loud)
        torch.jit.script(model)
    revert_(model)
    assert_same(torch.jit.script(model), original, x)


def test_fake_tensors(x: Tensor) -> None:
    model = mobile_block()
    convert_(model, fuse=True)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        assert model(mode.from_tensor(x)).shape == (2, 5)
    assert_same(model, mobile_block(), x)


def test_gradients_by_the_input_alone(x: Tensor) -> None:
    """torch.func.grad over a model whose parameters are closed over: what it makes inside must not be kept."""
    model, original = mobile_block(), mobile_block()
    convert_(model, fuse=True)
    results = [torch.func.grad(lambda image, m=m: m(image).square().sum())(x) for m in (model, original)]
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)
    for m in (model, original):
        m.requires_grad_(False)
    results = [torch.func.grad(lambda image, m=m: m(image).square().sum())(x) for m in (model, original)]
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)
    assert_same(model, original, x)


# --- the report ---


def test_costs() -> None:
    """By the closed formulas: a chain reads its input and its weights and writes its output; a norm leaves a bias."""
    C, T, K, H, W = 6, 2, 10, 8, 9
    model = nn.Sequential(depthwise(C, T, bias=False), nn.BatchNorm2d(C * T), nn.ReLU(), nn.Conv2d(C * T, K, 1)).eval()
    report = convert_(model, fuse=True, input_size=(1, C, H, W))
    weights = 9 * C * T + C * T * K + K
    between = C * T * H * W
    assert report.costs == {
        "parameters": (weights + 2 * C * T, weights + C * T),
        "MACs": (H * W * (9 * C * T + C * T * K),) * 2,
        "bytes": (
            4 * ((C * H * W + between + 9 * C * T) + (2 * between + 2 * C * T) + (between + K * H * W + C * T * K + K)),
            4 * (C * H * W + K * H * W + weights + C * T),
        ),
    }
    text = " ".join(str(report).split())  # the headline is as wide as its table
    for word in (
        "1 chains fused (1 separable)",
        "1 batch norms folded",
        "0 -> 3",
        "parameters",
        f"{weights + C * T:,}",
    ):
        assert word in text
    assert list(convert_(mobile_block(), fuse=True).costs) == ["parameters"]
    assert convert_(mobile_block()).costs == {}


# --- what changes around a chain after it was fused ---


def _small(channels: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(channels, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 1), nn.BatchNorm2d(12),
    )  # fmt: skip
    for norm in net.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.running_mean), nn.init.uniform_(norm.running_var, 0.5, 2.0)
    return net.eval()


def _put(net: nn.Sequential, place: int, module: nn.Module) -> None:
    net[place] = module


@pytest.mark.parametrize(
    "change",
    (
        lambda net: _put(net, 0, nn.Conv2d(3, 8, 3)),
        lambda net: _put(net, 1, nn.Identity()),
        lambda net: _put(net, 5, nn.Tanh()),
        lambda net: net.insert(5, nn.Tanh()),
        lambda net: net.__delitem__(5),
        lambda net: setattr(net[4], "eps", 0.5),
        lambda net: (setattr(net[4], "track_running_stats", False), setattr(net[4], "running_mean", None),
                     setattr(net[4], "running_var", None)),
        lambda net: _put(net, 4, nn.SyncBatchNorm(8).eval()),
    ),
    ids=("convolution", "norm", "activation", "insert", "delete", "eps", "batch_statistics", "sync_batch_norm"),
)  # fmt: skip
def test_a_changed_module_ends_its_chain(change: Callable) -> None:
    net, plain = _small(), _small()
    convert_(net, fuse=True)
    x = torch.randn(2, 3, 11, 11)
    with torch.no_grad():
        net(x)
        for model in (net, plain):
            torch.manual_seed(1)
            change(model)
        torch.testing.assert_close(net(x), plain(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", (torch.optim.SGD, torch.optim.AdamW))
def test_a_fused_optimisers_step_is_seen(kind: type) -> None:
    """torch's fused optimisers leave the versions of the parameters alone."""
    net = _small()
    convert_(net, fuse=True)
    optimiser = kind(net.parameters(), lr=0.05, fused=True)
    x = torch.randn(2, 3, 11, 11)
    with torch.no_grad():
        before = net(x)
    net(x).square().mean().backward()
    optimiser.step()
    with torch.no_grad():
        after = net(x)
        assert not torch.equal(before, after)
        torch.testing.assert_close(after, copy.deepcopy(net)(x), rtol=1e-5, atol=1e-6)


class _Tapped(nn.Module):
    """Goes over its layers one by one, in a way that torch.fx cannot trace."""

    def __init__(self) -> None:
        super().__init__()
        self.f = _small()

    def forward(self, x: Tensor) -> list[Tensor]:
        taps = []
        for i, layer in enumerate(self.f):
            x = layer(x)
            if i in (1, 4) and x.shape[0] > 0:
                taps.append(x)
        return [*taps, x] if float(x.sum()) < 1e30 else taps


class _Flagged(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = _small()

    def forward(self, x: Tensor, middle: bool = False) -> Tensor:
        x = self.f[4](self.f[3](self.f[:3](x)))
        return x if middle else self.f[7](self.f[6](self.f[5](x)))


def test_a_middle_that_somebody_takes_is_not_fused_away() -> None:
    x = torch.randn(2, 3, 11, 11)
    with torch.no_grad():
        both = (_Tapped(), lambda m: m(x)), (_Flagged(), lambda m: [m(x), m(x, middle=True)])
        for model, call in both:
            model.eval()
            expected = call(copy.deepcopy(model))
            convert_(model, fuse=True)
            for got, want in zip(call(model), expected, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_hooks_on_all_modules_are_hooks() -> None:
    net, seen = _small(), []
    convert_(net, fuse=True)
    watch = nn.modules.module.register_module_forward_hook
    handle = watch(lambda module, _, out: seen.append((type(module), out.shape)))
    try:
        net(torch.randn(2, 3, 11, 11))
    finally:
        handle.remove()
    assert (nn.ReLU, (2, 8, 7, 7)) in seen


def test_a_wrong_input_size_changes_nothing() -> None:
    net = _small()
    with pytest.raises(RuntimeError):
        convert_(net, fuse=True, input_size=(1, 5, 11, 11))
    assert type(net[3]) is nn.Conv2d and not any("forward" in vars(module) for module in net)


def _in_blocks() -> nn.Sequential:
    layers = _small()
    return nn.Sequential(*(nn.Sequential(*layers[part]) for part in (slice(3), slice(3, 6), slice(6, 8)))).eval()


def _replace_class(module: nn.Module) -> None:
    class Halved(type(module)):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) / 2

    module.__class__ = Halved


@pytest.mark.parametrize(
    "change",
    (
        lambda net: _put(net, 1, nn.Conv2d(8, 8, 3)),
        lambda net: _put(net, 2, nn.Tanh()),
        lambda net: net.insert(2, nn.Tanh()),
        lambda net: net[1].append(nn.Tanh()),
        lambda net: setattr(net[1][1], "forward", torch.tanh),
        lambda net: setattr(net[1], "forward", torch.tanh),
        lambda net: setattr(net[2][0], "stride", (2, 2)),
        lambda net: setattr(net[1][2], "max_val", 0.1),
        lambda net: _replace_class(net[1][1]),
        lambda net: _replace_class(net[1]),
    ),
    ids=("first_block", "last_block", "block_between", "layer_between", "forward", "blocks_forward", "stride",
         "max_val", "class", "blocks_class"),
)  # fmt: skip
@pytest.mark.parametrize("compiled", (False, True), ids=("eager", "compiled"))
def test_what_changes_around_the_blocks_of_a_chain(change: Callable, compiled: bool) -> None:
    nets = _in_blocks(), _in_blocks()
    for net in nets:
        net[1][2] = nn.ReLU6()
    assert [entry.name for entry in convert_(nets[0], fuse=True).fused] == ["0.0", "1.0 -> 2.0"]
    x = torch.randn(2, 3, 11, 11)
    torch._dynamo.reset()
    run = torch.compile(nets[0], backend="eager") if compiled else nets[0]
    with torch.no_grad():
        run(x)
        for net in nets:
            torch.manual_seed(1)
            change(net)
        torch.testing.assert_close(run(x), nets[1](x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("block", range(3))
@pytest.mark.parametrize("in_place", (False, True), ids=("wrapped", "in_place"))
def test_a_block_that_is_compiled_by_itself(block: int, in_place: bool) -> None:
    plain, net = _in_blocks(), _in_blocks()
    convert_(net, fuse=True)
    x = torch.randn(2, 3, 11, 11)
    for model in (plain, net):  # a pass that ends early: checkpointing makes such, too
        model.train()[1](model[0](x))
        model.eval()
    torch._dynamo.reset()
    if in_place:
        net[block].compile(backend="eager")
    else:
        net[block] = torch.compile(net[block], backend="eager")
    with torch.no_grad():
        for training in (False, True, False):
            result, expected = (model.train(training)(x) for model in (net, plain))
            torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)


def test_a_hook_on_what_holds_a_part_of_a_chain_sees_what_it_saw() -> None:
    plain, net, seen = _in_blocks(), _in_blocks(), []
    convert_(net, fuse=True)
    for model in (plain, net):
        model[1].register_forward_hook(lambda module, _, out: seen.append(out))
    x = torch.randn(2, 3, 11, 11)
    with torch.no_grad():
        torch.testing.assert_close(net(x), plain(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(*seen, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("place", range(8))
def test_a_hook_that_takes_itself_away(place: int) -> None:
    """The chain runs apart to its end, and as one op the next time."""
    plain, net = _small(), _small()
    convert_(net, fuse=True)
    x = torch.randn(2, 3, 11, 11)
    for model in (plain, net):
        handle = model[place].register_forward_hook(lambda *_, held=(held := []): held.pop().remove())
        held.append(handle)
    for _ in range(2):
        assert_same(net, plain, x)
    assert calls(net, x)["separable_conv2d"] == 1


def test_a_part_that_was_called_alone_in_train_does_not_work_twice() -> None:
    plain, net = _small(), _small()
    convert_(net, fuse=True)
    x = torch.randn(2, 3, 11, 11)
    for model in (plain, net):
        model.train()[0](x)
        model.eval()
    assert_same(net, plain, x)


def test_a_step_of_another_models_optimiser_spoils_no_gradient() -> None:
    """A fixed network that two losses go through, with a step of another network's optimiser between them."""
    gradients = []
    for net in (_small(), _small()):
        if gradients:
            convert_(net, fuse=True)
        net.requires_grad_(False)
        x = torch.randn(2, 3, 11, 11, generator=torch.Generator().manual_seed(1), requires_grad=True)
        other = nn.Parameter(torch.ones(1))
        optimiser = torch.optim.SGD([other], lr=0.1)
        first = net(x)
        other.square().backward()
        optimiser.step()
        (first * net(x)).sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_a_gradient_through_weights_that_were_changed_since_is_refused() -> None:
    """As torch refuses it; what was computed with other tensors keeps its own."""
    plain, net = _small().requires_grad_(False), _small().requires_grad_(False)
    convert_(net, fuse=True)
    gradients = []
    for model in (plain, net):
        x = torch.ones(2, 3, 11, 11, requires_grad=True)
        states = [{name: (1 + i) * value for name, value in model.state_dict().items()} for i in range(2)]
        first, second = (functional_call(model, state, (x,)) for state in states)
        (first * second).sum().backward()
        gradients.append(x.grad)
        out = model(x)
        with torch.no_grad():
            model[3].weight.mul_(2)
            model(x)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


class _Untraceable(nn.Module):
    """Takes the parts of its parts one by one: the middle is wanted too."""

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.f = layers

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.run(x) if float(x.sum()) < 1e30 else []


class _Reaching(_Untraceable):
    def go(self, layers: nn.Module, x: Tensor) -> list[Tensor]:
        taps = []
        for layer in layers:
            x = layer(x)
            taps.append(x)
        return taps

    def run(self, x: Tensor) -> list[Tensor]:
        return self.go(self.f, x)


class _InAList(_Reaching):
    def run(self, x: Tensor) -> list[Tensor]:
        taps = []
        for block in self.f:
            taps += self.go(block, x)
        return taps


class _BySubscript(_Reaching):
    def run(self, x: Tensor) -> list[Tensor]:
        return self.go(self.f[0], x)


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.dw, self.norm, self.act, self.pw = _small()[:3], *_small()[3:7]

    def forward(self, x: Tensor) -> Tensor:
        return self.pw(self.act(self.norm(self.dw(self.stem(x)))))


class _ByName(_Reaching):
    def run(self, x: Tensor) -> list[Tensor]:
        taps = []
        for block in self.f:
            x = block.norm(block.dw(block.stem(x)))
            taps.append(x)
            x = block.pw(block.act(x))
        return [*taps, x]


def _go_over(layers: nn.Module, x: Tensor) -> list[Tensor]:
    taps = []
    for layer in layers:
        x = layer(x)
        taps.append(x)
    return taps


def _go_on(layers: nn.Module, x: Tensor) -> list[Tensor]:
    return _go_over(layers, x)


class _ByAFunction(_Untraceable):
    def run(self, x: Tensor) -> list[Tensor]:
        taps = []
        for block in self.f:
            taps += _go_on(block, x)
        return taps


class _ByAStaticMethod(_Untraceable):
    go = staticmethod(_go_over)

    def run(self, x: Tensor) -> list[Tensor]:
        taps = []
        for block in self.f:
            taps += self.go(block, x)
        return taps


class _ByAProperty(_Reaching):
    @property
    def layers(self) -> nn.Module:
        return self.f

    def run(self, x: Tensor) -> list[Tensor]:
        return self.go(self.layers, x)


class _ByTheBase(_Reaching):
    def run(self, x: Tensor) -> list[Tensor]:
        return super().run(x)


_without_source: dict = {}
exec(
    """
class WithoutSource(Base):
    def run(self, x):
        return self.go(self.f, x)
""",
    {"Base": _Reaching, "__name__": __name__},
    _without_source,
)


@pytest.mark.parametrize(
    "make",
    (
        lambda: _Reaching(_small()),
        lambda: _ByAFunction(nn.ModuleList([_small()])),
        lambda: _ByAStaticMethod(nn.ModuleList([_small()])),
        lambda: _ByAProperty(_small()),
        lambda: _ByTheBase(_small()),
        lambda: _without_source["WithoutSource"](_small()),
        lambda: _InAList(nn.ModuleList([_small()])),
        lambda: _BySubscript(nn.Sequential(_small(), nn.Identity())),
        lambda: _ByName(nn.ModuleList([_Block()])),
    ),
    ids=("by_a_method", "by_a_function", "by_a_static_method", "by_a_property", "by_the_base", "without_source",
         "in_a_list", "by_subscript", "by_name"),
)  # fmt: skip
def test_parts_that_an_untraceable_forward_reaches_for_are_not_fused(make: Callable) -> None:
    plain, net = make().eval(), make().eval()
    convert_(net, fuse=True)
    x = torch.randn(2, 3, 11, 11)
    with torch.no_grad():
        for got, want in zip(net(x), plain(x), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


class _TwoFlags(_Block):
    def forward(self, x: Tensor, middle: bool = False, logits: bool = True) -> Tensor:
        x = self.norm(self.dw(self.stem(x)))
        if middle and logits:
            return x
        return self.pw(self.act(x))


class _CallsAPartWithAFlag(_Reaching):
    def run(self, x: Tensor) -> list[Tensor]:
        return [self.f(x, middle=True), self.f(x)]


@pytest.mark.parametrize("of_a_part", (False, True), ids=("of_the_model", "of_a_part"))
def test_flags_are_tried_one_by_one(of_a_part: bool) -> None:
    plain, net = (_CallsAPartWithAFlag(_TwoFlags()).eval() if of_a_part else _TwoFlags().eval() for _ in range(2))
    report = convert_(net, fuse=True)
    assert [entry.reason for entry in report.unpaired] == ["middle of a forward changes what is there"]
    x = torch.randn(2, 3, 11, 11)
    with torch.no_grad():
        got, want = ((m(x) if of_a_part else [m(x), m(x, middle=True)]) for m in (net, plain))
        for mine, torchs in zip(got, want, strict=True):
            torch.testing.assert_close(mine, torchs, rtol=1e-4, atol=1e-5)


def test_a_relu6_with_other_bounds_is_none() -> None:
    net = nn.Sequential(depthwise(3), nn.ReLU6(), nn.Conv2d(3, 3, 1))
    net[1].max_val = 0.1
    assert "ReLU6 follows" in why_not(net, torch.randn(2, 3, 9, 9))


@pytest.mark.parametrize("grad", (False, True))
def test_jit_trace_sees_parameters(grad: bool) -> None:
    net = _small()
    convert_(net, fuse=True)
    x = torch.randn(2, 3, 11, 11)
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(net, x)  # checks itself against a second trace
        net.load_state_dict({name: 2 * value for name, value in net.state_dict().items()})
        torch.testing.assert_close(traced(x), net(x), rtol=1e-4, atol=1e-4)


def test_make_fx_sees_parameters() -> None:
    net = _small()
    convert_(net, fuse=True)
    x = torch.randn(2, 3, 11, 11)
    with torch.no_grad():
        net(x)  # its folded weights are kept
        traced = make_fx(net)(x)
        net.load_state_dict({name: 2 * value for name, value in net.state_dict().items()})
        torch.testing.assert_close(traced(x), net(x), rtol=1e-4, atol=1e-4)
