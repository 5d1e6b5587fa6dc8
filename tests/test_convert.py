"""convert_ and revert_: the model's own modules, changed and changed back, and nothing else touched."""

from __future__ import annotations

import builtins
import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import sepconv_ext
from harness import only_our_kernels, random, strictness
from sepconv_ext import convert_, revert_


class Block(nn.Module):
    """One convolution of each family, one of them under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.pointwise = nn.Conv2d(8, 8, 1)
        self.again = self.pointwise
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2, padding_mode="reflect")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.depthwise(self.stem(x)))
        return self.grouped(self.again(self.pointwise(x)))


@pytest.fixture
def x() -> torch.Tensor:
    return random((2, 3, 9, 8), torch.float32, "cpu")


def snapshot(model: nn.Module) -> dict:
    """Everything that identifies a model's parts: the very objects, by id."""
    return {
        name: (
            id(module),
            type(module),
            module.training,
            {key: id(value) for key, value in module.__dict__.items()},
            {key: id(value) for key, value in module._parameters.items()},
            {key: id(value) for key, value in module._buffers.items()},
            list(module._forward_hooks.items()),
        )
        for name, module in model.named_modules(remove_duplicate=False)
    }


def reason_for(module: nn.Module) -> str:
    """The one reason for which a lone module is skipped."""
    cls = type(module)
    report = convert_(module)
    assert len(report) == 0 and type(module) is cls
    (entry,) = report.skipped
    return entry.reason


def test_families_and_report(x: torch.Tensor) -> None:
    model = Block()
    expected = model.eval()(x)
    report = convert_(model)
    assert [(entry.name, entry.family) for entry in report] == [
        ("depthwise", "depthwise"),
        ("pointwise", "pointwise"),
        ("grouped", "grouped"),
    ]
    assert len(report) == 3 and bool(report)
    assert [(entry.name, entry.family) for entry in report.skipped] == [("stem", "dense")]
    assert "dense" in report.skipped[0].reason
    for name in ("depthwise", "pointwise", "grouped"):
        assert type(getattr(model, name)) is sepconv_ext.nn.Conv2d
    assert type(model.stem) is nn.Conv2d and model.again is model.pointwise
    with only_our_kernels(at_least=4):
        y = model(x)  # the dense stem is torch's own nn.Conv2d and is not counted
    torch.testing.assert_close(y, expected)


def test_only_the_class_changes_and_revert_restores_all() -> None:
    model = Block()
    model.depthwise.weight.requires_grad_(False)
    model.pointwise.eval()
    model.grouped.register_forward_hook(lambda module, arguments, output: output + 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before, state, text = snapshot(model), {k: v.clone() for k, v in model.state_dict().items()}, repr(model)

    convert_(model)
    during = snapshot(model)
    for name, (identity, _, training, _, parameters, buffers, hooks) in before.items():
        now = during[name]
        assert (now[0], now[2], now[4], now[5], now[6]) == (identity, training, parameters, buffers, hooks)
    assert repr(model) == text
    assert model.state_dict().keys() == state.keys()
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
    assert not model.depthwise.weight.requires_grad

    assert revert_(model) == 3
    assert snapshot(model) == before
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    assert revert_(model) == 0


def test_hooks_run_once_converted(x: torch.Tensor) -> None:
    model, seen = Block().eval(), []
    model.grouped.register_forward_pre_hook(lambda module, arguments: seen.append("before"))
    model.grouped.register_forward_hook(lambda module, arguments, output: seen.append("after"))
    model.grouped.register_full_backward_hook(lambda module, grads, outputs: seen.append("backward"))
    convert_(model)
    model(x).sum().backward()
    assert seen == ["before", "after", "backward"]


def test_filter(x: torch.Tensor) -> None:
    model, asked = Block(), []

    def depthwise_only(name: str, module: nn.Module) -> bool:
        asked.append((name, module))
        return module.groups == module.in_channels

    report = convert_(model, depthwise_only)
    assert [entry.name for entry in report] == ["depthwise"]
    assert [name for name, _ in asked] == ["depthwise", "pointwise", "grouped"]
    assert all(module is model.get_submodule(name) for name, module in asked)
    assert {e.name: e.reason for e in report.skipped}["grouped"] == "filter_fn said no"
    # What was refused can be converted later, and what was converted is not converted twice.
    later = convert_(model)
    assert [entry.name for entry in later] == ["pointwise", "grouped"]
    assert {e.name: e.reason for e in later.skipped}["depthwise"] == "converted before"


def test_the_model_itself_is_a_convolution() -> None:
    layer = nn.Conv2d(4, 4, 3, groups=4)
    weight = layer.weight
    (entry,) = convert_(layer)
    assert entry.name == "" and type(layer) is sepconv_ext.nn.Conv2d and layer.weight is weight
    assert revert_(layer) == 1 and type(layer) is nn.Conv2d


def test_one_channel_is_depthwise() -> None:
    (entry,) = convert_(nn.Conv2d(1, 16, 3))
    assert entry.family == "depthwise"


class Scaled(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class SameCodeOtherName(nn.Conv2d):
    pass


def test_reasons_for_skipping() -> None:
    assert "Scaled" in reason_for(Scaled(4, 4, 3, groups=4))
    assert "SameCodeOtherName" in reason_for(SameCodeOtherName(4, 4, 3, groups=4))
    assert "lazy" in reason_for(nn.LazyConv2d(4, 1))
    assert "no kernel for torch.complex64" in reason_for(nn.Conv2d(4, 4, 3, groups=4, dtype=torch.complex64))
    assert "sepconv_ext layer" in reason_for(sepconv_ext.nn.DepthwiseConv2d(4, 3))
    assert "sepconv_ext layer" in reason_for(sepconv_ext.nn.Conv2d(4, 4, 3, groups=4))
    assert "dense" in reason_for(nn.Conv2d(4, 4, 3))
    assert "dense" in reason_for(nn.Conv2d(4, 4, 1, padding=1))
    patched = nn.Conv2d(4, 4, 3, groups=4)
    patched.forward = patched.forward
    assert "on the instance" in reason_for(patched)
    assert "TorchScript" in reason_for(torch.jit.script(nn.Conv2d(4, 4, 3, groups=4)))


def test_quantised_ones_are_skipped() -> None:
    config = torch.ao.quantization.get_default_qat_qconfig("fbgemm")
    prepared = nn.Conv2d(4, 4, 3, groups=4)
    prepared.qconfig = config
    assert "prepared for quantisation" in reason_for(prepared)
    assert reason_for(torch.ao.nn.qat.Conv2d(4, 4, 3, groups=4, qconfig=config)) == "quantised"
    assert reason_for(torch.ao.nn.quantized.Conv2d(4, 4, 3, groups=4)) == "quantised"


def test_tensor_subclasses_are_skipped() -> None:
    class Tagged(torch.Tensor):
        pass

    layer = nn.Conv2d(4, 4, 3, groups=4)
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Tagged))
    assert "tensor subclass" in reason_for(layer)


def test_lazy_after_its_first_forward() -> None:
    layer = nn.LazyConv2d(6, 1)
    layer(torch.zeros(1, 3, 4, 4))
    assert len(convert_(layer)) == 1


def test_other_modules_are_not_mentioned() -> None:
    model = nn.Sequential(nn.ConvTranspose3d(4, 4, 3, groups=4), nn.Linear(4, 4))
    report = convert_(model)
    assert not report and not report.skipped


@pytest.mark.parametrize("convert_first", [False, True])
def test_parametrizations(convert_first: bool) -> None:
    layer = nn.Conv2d(4, 4, 3, groups=4)
    x = random((1, 4, 6, 6), torch.float32, "cpu")
    if convert_first:
        convert_(layer)
    parametrizations.weight_norm(layer)
    expected_state = layer.state_dict().keys()
    native = torch.nn.functional.conv2d(x, layer.weight, layer.bias, groups=4)
    sibling = copy.deepcopy(layer)
    if not convert_first:
        assert len(convert_(layer)) == 1
        assert not isinstance(sibling, sepconv_ext.nn.Conv2d)  # deep copies share a class; the copy must not change
    assert isinstance(layer, sepconv_ext.nn.Conv2d) and parametrize.is_parametrized(layer, "weight")
    assert type(layer).__name__ == "ParametrizedConv2d"
    assert layer.state_dict().keys() == expected_state
    with only_our_kernels():
        torch.testing.assert_close(layer(x), native)
    assert isinstance(copy.deepcopy(layer), sepconv_ext.nn.Conv2d)

    assert revert_(layer) == 1
    assert not isinstance(layer, sepconv_ext.nn.Conv2d) and parametrize.is_parametrized(layer, "weight")
    torch.testing.assert_close(layer(x), native)
    parametrize.remove_parametrizations(layer, "weight")
    assert type(layer) is nn.Conv2d
    torch.testing.assert_close(layer(x), native)


def test_parametrization_removed_while_converted() -> None:
    layer = parametrizations.weight_norm(nn.Conv2d(4, 4, 3, groups=4))
    convert_(layer)
    parametrize.remove_parametrizations(layer, "weight")
    assert type(layer) is sepconv_ext.nn.Conv2d
    assert revert_(layer) == 1 and type(layer) is nn.Conv2d


def test_parametrized_class_comes_back_itself() -> None:
    layer = parametrizations.weight_norm(nn.Conv2d(4, 4, 3, groups=4))
    cls = type(layer)
    convert_(layer)
    revert_(layer)
    assert type(layer) is cls


def test_what_others_put_into_the_class_stays() -> None:
    """A class made at run time over ours, with methods of its own: reverted, it is the same over torch's."""
    layer, sibling = nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 4, 3, groups=4)
    x = random((1, 4, 6, 6), torch.float32, "cpu")
    expected = 2 * layer(x)
    convert_(layer)
    convert_(sibling)

    class Mixed:
        tag = "mixed"

    class Doubled(Mixed, type(layer)):
        def forward(self, x: torch.Tensor, *, factor: int = 2) -> torch.Tensor:
            return factor * super().forward(x)

    class Named(Doubled):
        name = "named"

    layer.__class__ = sibling.__class__ = Named
    with only_our_kernels():
        torch.testing.assert_close(layer(x), expected)
    assert revert_(layer) == 1
    with strictness(True):
        sepconv_ext.reset_kernel_counts()
        torch.testing.assert_close(layer(x), expected)
        assert sepconv_ext.kernel_counts() == {}
    assert not isinstance(layer, sepconv_ext.nn.Conv2d) and isinstance(layer, nn.Conv2d) and isinstance(layer, Mixed)
    assert type(layer).__name__ == "Named" and layer.name == "named" and layer.tag == "mixed"
    assert type(sibling) is Named  # a class is shared by whoever made it; the other layer keeps it
    with only_our_kernels():
        sibling(x)


# --- tools that go by a class or an op ---


def test_scripting_says_what_to_do() -> None:
    layers = (sepconv_ext.nn.SeparableConv2d(4, 4, 3), sepconv_ext.nn.SpatialSeparableConv2d(4, 3))
    for layer in (nn.Conv2d(4, 4, 3, groups=4), nn.Conv1d(4, 4, 3, groups=4), *layers):
        model = nn.Sequential(layer, nn.ReLU())
        convert_(model)
        with pytest.raises(RuntimeError, match="revert_"):
            torch.jit.script(model)
        if revert_(model):
            torch.jit.script(model)


@pytest.mark.parametrize("cls", [nn.Conv1d, nn.Conv2d])
@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
def test_a_replaced_function_of_torch_is_called(
    cls: type, padding_mode: str, monkeypatch: pytest.MonkeyPatch, x: torch.Tensor
) -> None:
    """As profilers do to count: DeepSpeed's, for example."""
    layer = cls(3, 3, 3, padding=1, groups=3, padding_mode=padding_mode)
    x = x if cls is nn.Conv2d else x[..., 0]
    expected, called, name = layer(x), [], cls.__name__.lower()
    torchs = getattr(torch.nn.functional, name)
    convert_(layer)
    monkeypatch.setattr(torch.nn.functional, name, lambda *a, **k: called.append(name) or torchs(*a, **k))
    torch.testing.assert_close(layer(x), expected)
    assert called == [name]
    monkeypatch.undo()
    with only_our_kernels():
        torch.testing.assert_close(layer(x), expected)
    assert called == [name]


def test_a_causal_layer_has_no_function_of_torchs(monkeypatch: pytest.MonkeyPatch, x: torch.Tensor) -> None:
    layer = sepconv_ext.nn.Conv1d(3, 3, 3, padding="causal", groups=3)
    expected = layer(x[..., 0])
    monkeypatch.setattr(torch.nn.functional, "conv1d", lambda *_: None)
    torch.testing.assert_close(layer(x[..., 0]), expected)


def test_the_report_names_what_needs_revert() -> None:
    report = convert_(nn.Sequential(nn.Conv2d(4, 4, 3, groups=4)))
    for word in ("revert_", "quantisation", "FLOP", "jit.script"):
        assert word in report.note and word in str(report)
    assert convert_(nn.Linear(2, 2)).note == ""


def quantised(model: nn.Module, x: torch.Tensor) -> int:
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    prepared = prepare_fx(copy.deepcopy(model).eval(), get_default_qconfig_mapping("x86"), (x,))
    prepared(x)
    return sum(type(m).__module__.startswith("torch.ao.nn.quantized") for m in convert_fx(prepared).modules())


@pytest.mark.filterwarnings("ignore")
def test_revert_is_the_way_to_quantisation(x: torch.Tensor) -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 3, groups=3), nn.ReLU(), nn.Conv2d(3, 4, 1))
    expected = quantised(model, x)
    assert expected > 0
    convert_(model)
    revert_(model)
    assert quantised(model, x) == expected


# --- weights that are hooks' and attributes' ---


def test_pruning_and_old_style_weight_norm() -> None:
    """Both work through hooks and plain attributes."""
    for wrap in (
        lambda m: prune.l1_unstructured(m, "weight", 0.5),
        lambda m: torch.nn.utils.spectral_norm(m).eval(),
    ):
        layer = nn.Conv2d(4, 4, 3, groups=4)
        wrap(layer)
        x = random((1, 4, 6, 6), torch.float32, "cpu")
        expected = layer(x)
        assert len(convert_(layer)) == 1
        with only_our_kernels():
            torch.testing.assert_close(layer(x), expected)


def test_copies_and_pickles_of_converted_models(x: torch.Tensor) -> None:
    model = Block().eval()
    expected = model(x)
    convert_(model)
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    loaded = torch.load(saved, weights_only=False)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
        assert type(copied.grouped) is sepconv_ext.nn.Conv2d and copied.again is copied.pointwise
        torch.testing.assert_close(copied(x), expected)
        assert revert_(copied) == 3 and type(copied.grouped) is nn.Conv2d
        torch.testing.assert_close(copied(x), expected)
    assert type(model.grouped) is sepconv_ext.nn.Conv2d  # copies are their own

    fresh = Block().eval()
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(fresh(x), expected)


def test_layers_of_ours_are_not_reverted() -> None:
    model = nn.Sequential(sepconv_ext.nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 4, 3, groups=4))
    convert_(model)
    assert revert_(model) == 1
    assert [type(module) for module in model] == [sepconv_ext.nn.Conv2d, nn.Conv2d]


def test_meta_model_is_converted_and_materialised() -> None:
    with torch.device("meta"):
        layer = nn.Conv2d(4, 4, 3, groups=4)
    assert len(convert_(layer)) == 1
    layer.to_empty(device="cpu").reset_parameters()
    with only_our_kernels():
        layer(torch.zeros(1, 4, 5, 5))


def test_report_prints(monkeypatch: pytest.MonkeyPatch) -> None:
    report = convert_(Block())
    pretty = str(report)
    real_import = builtins.__import__

    def without_rich(name, *arguments, **keywords):
        if name.split(".")[0] == "rich":
            raise ImportError(name)
        return real_import(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without_rich)
    plain = str(report)
    for text in (pretty, plain):
        assert "3 of 4 convolutions replaced" in text
        for word in ("depthwise", "pointwise", "grouped", "stem", "dense"):
            assert word in text
    assert "0 of 0" in str(convert_(nn.Linear(2, 2)))


def test_report_shortens_long_lists() -> None:
    model = nn.Sequential(*(nn.Conv2d(2, 2, 3, groups=2) for _ in range(40)))
    text = str(convert_(model))
    assert "40" in text and "and 37 more" in text and len(text.splitlines()) < 12


@pytest.mark.parametrize(
    "name", ["mobilenet_v2", "mobilenet_v3_small", "shufflenet_v2_x0_5", "resnext50_32x4d", "convnext_tiny"]
)
def test_real_models(name: str) -> None:
    torchvision = pytest.importorskip("torchvision", reason="torchvision is an extra")
    with torch.device("meta"):
        model = getattr(torchvision.models, name)(weights=None)
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    report = convert_(model)
    assert len(report) + len(report.skipped) == len(convolutions)
    sparse = [m for m in convolutions if m.groups > 1 or m.kernel_size == (1, 1)]
    assert len(report) == len(sparse) > 0
    assert revert_(model) == len(report)


def test_a_real_model_computes_the_same() -> None:
    torchvision = pytest.importorskip("torchvision", reason="torchvision is an extra")
    model = torchvision.models.mobilenet_v2(weights=None).eval()
    x = random((2, 3, 64, 64), torch.float32, "cpu")
    with torch.no_grad():
        expected = model(x)
        report = convert_(model)
        with only_our_kernels(at_least=len(report)):
            y = model(x)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


def test_strict_is_not_left_on() -> None:
    with strictness(True):
        assert sepconv_ext._C.strict()
    assert not sepconv_ext._C.strict()
