"""Transposed convolutions: torch's functions and layers, by the gradient of the convolution that goes the other way."""

from __future__ import annotations

import copy
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sepconv_ext
from harness import DTYPES, assert_as_accurate, dtype_name, only_our_kernels, random, with_layout
from sepconv_ext import convert_, functional, revert_

pytest.importorskip("expecttest", reason="torch's own test machinery imports it")

from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db

OPINFOS = {
    d: next(op for op in op_db if op.name == f"nn.functional.conv_transpose{d}d" and not op.variant_test_name)
    for d in (1, 2)
}
MODULEINFOS = {d: next(m for m in module_db if m.module_cls.__name__ == f"ConvTranspose{d}d") for d in (1, 2)}
OURS = {1: functional.conv_transpose1d, 2: functional.conv_transpose2d}
TORCHS = {1: F.conv_transpose1d, 2: F.conv_transpose2d}
LAYOUTS = ("contiguous", "channels_last")
by_dims = pytest.mark.parametrize("dims", (1, 2))


class Case(NamedTuple):
    name: str
    N: int
    K: int
    P: int
    Q: int
    C: int
    R: int
    groups: int
    stride: int = 1
    padding: int = 0
    output_padding: int = 0
    dilation: int = 1

    @property
    def geometry(self) -> tuple:
        return self.stride, self.padding, self.output_padding, self.groups, self.dilation

    def __str__(self) -> str:
        return self.name


CASES = (
    Case("one_channel_one_row", 2, 1, 1, 7, 1, 3, 1, padding=1),
    Case("three_channels", 2, 3, 7, 19, 3, 4, 3, stride=2, padding=1),
    Case("bilinear_c24", 1, 24, 19, 7, 24, 4, 24, stride=2, padding=1),
    Case("c58_output_padding", 2, 58, 7, 7, 58, 3, 58, stride=2, padding=1, output_padding=1),
    Case("c24_dilation_stride3", 1, 24, 7, 5, 24, 3, 24, stride=3, padding=2, output_padding=2, dilation=2),
    Case("multiplier2", 2, 3, 7, 1, 6, 3, 3, stride=2),
    Case("groups", 2, 24, 7, 6, 58, 2, 2, stride=2),
    Case("dense", 1, 3, 7, 19, 24, 3, 1, stride=2, padding=1, output_padding=1),
    Case("one_tap", 2, 24, 7, 7, 12, 1, 1),
    Case("empty_batch", 0, 24, 7, 7, 24, 3, 24, stride=2),
)


def tensors(case: Case, dtype: torch.dtype, device: str, layout: str) -> list[Tensor]:
    x = random((case.N, case.K, case.P, case.Q), dtype, device, layout)
    w = random((case.K, case.C // case.groups, case.R, case.R), dtype, device, seed=1)
    return [x, w, random((case.C,), dtype, device, seed=2)]


def in_layout(x: Tensor, channels_last: bool) -> Tensor:
    """A batch of sequences or images, with its channels next to each other in memory if asked."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else x


def only_torchs(arguments: dict) -> bool:
    """An output_padding that is not below the stride."""
    output_padding, stride = (torch.tensor(arguments.get(n, d)) for n, d in (("output_padding", 0), ("stride", 1)))
    return bool((output_padding >= stride).any())


@pytest.mark.parametrize("channels_last", (False, True))
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@by_dims
def test_samples(dims: int, dtype: torch.dtype, channels_last: bool, device: str) -> None:
    """torch's own: the same values and gradients, no further from float64 than torch's; by an op of ours."""
    made = list(OPINFOS[dims].sample_inputs(device, dtype, requires_grad=True))
    assert len(made) >= 6, "torch's samples have moved"
    for sample in made:
        x = sample.input
        if x.dim() == dims + 2:
            x = in_layout(x.detach(), channels_last).requires_grad_()
        inputs = [x, *(t for t in sample.args if isinstance(t, Tensor))]
        exact_inputs = [t.detach().double().requires_grad_() for t in inputs]
        sepconv_ext.reset_kernel_counts()
        y, peer = (function[dims](*inputs, **sample.kwargs) for function in (OURS, TORCHS))
        assert sum(sepconv_ext.kernel_counts().values()) == (0 if only_torchs(sample.kwargs) else 1)
        exact = TORCHS[dims](*exact_inputs, **sample.kwargs)
        g = torch.randn_like(peer)
        ours, theirs = (torch.autograd.grad(t, inputs, g) for t in (y, peer))
        truths = torch.autograd.grad(exact, exact_inputs, g.double())
        assert y.dtype == peer.dtype and (dims == 1 or y.stride() == peer.stride())
        if len(inputs) == 3 and g.element_size() == 2:  # a half type is rounded before the bias is added, and after
            given = y
            y, peer = (function[dims](*inputs[:2], **sample.kwargs) for function in (OURS, TORCHS))
            exact = TORCHS[dims](*exact_inputs[:2], **sample.kwargs)
            assert only_torchs(sample.kwargs) or torch.equal(given, y + inputs[2].view(-1, *[1] * dims))
        for actual, other, truth in zip((y, *ours), (peer, *theirs), (exact, *truths), strict=True):
            assert_as_accurate(actual.detach(), other.detach(), truth.detach(), f"{tuple(x.shape)} {sample.kwargs}")


@by_dims
def test_types_without_a_kernel_are_torchs(dims: int, device: str) -> None:
    for sample in OPINFOS[dims].sample_inputs(device, torch.complex64):
        y, expected = (f[dims](sample.input, *sample.args, **sample.kwargs) for f in (OURS, TORCHS))
        torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("training", (True, False))
@by_dims
def test_module_samples(dims: int, training: bool, device: str) -> None:
    """torch's own for the layer; the layer of ours from the same arguments, and a converted one."""
    info = MODULEINFOS[dims]
    made = info.module_inputs_func(info, device, torch.float64, False, training)
    assert len(made) >= 2, "torch's samples have moved"
    for sample in made:
        arguments, keywords = sample.constructor_input.args, sample.constructor_input.kwargs
        layers = []
        for cls in (info.module_cls, getattr(sepconv_ext.nn, info.module_cls.__name__)):
            torch.manual_seed(1)
            layers.append(cls(*arguments, **{**keywords, "device": device, "dtype": torch.float64}).train(training))
        theirs, ours = layers
        assert repr(ours) == repr(theirs) and ours.__dict__.keys() == theirs.__dict__.keys()
        call = sample.forward_input
        torch.testing.assert_close(ours(*call.args, **call.kwargs), theirs(*call.args, **call.kwargs))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(case: Case, layout: str, device: str) -> None:
    inputs = [t.requires_grad_() for t in tensors(case, torch.float32, device, layout)]
    exact_inputs = [t.detach().double().requires_grad_() for t in inputs]
    exact = F.conv_transpose2d(*exact_inputs, *case.geometry)
    g = random(exact.shape, torch.float32, device, layout, seed=3)
    truths = torch.autograd.grad(exact, exact_inputs, g.double())
    sepconv_ext.reset_kernel_counts()
    y = functional.conv_transpose2d(*inputs, *case.geometry)
    grads = torch.autograd.grad(y, inputs, g)
    if case.N:
        counts = sepconv_ext.kernel_counts()
        assert sum(counts.values()) >= 3
        assert case.groups < case.K or case.groups < case.C or not counts.get("aten"), counts  # ours, if depthwise
    peer = F.conv_transpose2d(*inputs, *case.geometry)
    peers = torch.autograd.grad(peer, inputs, g)
    for name, ours, theirs, truth in zip("yxwb", (y, *grads), (peer, *peers), (exact, *truths), strict=True):
        assert_as_accurate(ours.detach(), theirs.detach(), truth.detach(), f"{name} of {case}")
    assert y.stride() == peer.stride() or not y.numel()
    assert not case.N or (grads[0].stride(), grads[1].stride()) == (inputs[0].stride(), inputs[1].stride())


@by_dims
def test_slices_and_unbatched(dims: int, device: str) -> None:
    """Operands with gaps between their values, and inputs without a batch."""
    wide = random((2, 12, *[11] * dims), torch.float32, device)
    x = wide[:, 2:8, ..., 1:9]
    w = random((6, 2, *[4] * dims), torch.float32, device, seed=1)[:, :1, ..., 1:]
    for some in (x, x[0], x[:, :, ::2]):
        with only_our_kernels():
            y = OURS[dims](some, w, None, 2, 1, 1, 6)
        exact = TORCHS[dims](some.double(), w.double(), None, 2, 1, 1, 6)
        torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("groups", "layout"), ((1, "channels_last"), (2, "contiguous"), (4, "channels_last")))
def test_derivatives_of_every_order(groups: int, layout: str, device: str) -> None:
    x = random((1, 4, 3, 2), torch.float64, device, layout).requires_grad_()
    w = random((4, 4 // groups, 3, 2), torch.float64, device, seed=1).requires_grad_()
    b = random((4,), torch.float64, device, seed=2).requires_grad_()

    def call(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return functional.conv_transpose2d(x, w, b, 2, 1, 1, groups)

    assert torch.autograd.gradcheck(call, (x, w, b), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, (x, w, b))


def test_what_only_the_dilation_allows(device: str) -> None:
    """An output_padding at or above the stride is no convolution's gradient: torch's function has it."""
    x, w = random((2, 4, 5, 6), torch.float32, device), random((4, 1, 3, 3), torch.float32, device, seed=1)
    arguments = (x, w, None, 1, 1, (2, 1), 4, 3)
    torch.testing.assert_close(functional.conv_transpose2d(*arguments), F.conv_transpose2d(*arguments))


WRONG = {
    "output_padding as large as the stride": dict(stride=2, output_padding=2),
    "negative padding": dict(padding=-1),
    "negative output_padding": dict(output_padding=-1),
    "stride 0": dict(stride=0),
    "dilation 0": dict(dilation=0),
    "three strides": dict(stride=(1, 1, 1)),
    "stride of a wrong type": dict(stride=1.5),
    "groups of a wrong type": dict(groups=1.5),
    "groups that do not divide": dict(groups=3),
    "nothing left": dict(padding=9),
    "bias of a wrong size": dict(bias=torch.zeros(7)),
    "bias of another dtype": dict(bias=torch.zeros(4, dtype=torch.float64)),
    "weight of another dtype": dict(weight=torch.zeros(4, 1, 3, 3, dtype=torch.float64)),
    "weight of other channels": dict(weight=torch.zeros(6, 1, 3, 3)),
    "weight of too few dimensions": dict(weight=torch.zeros(4, 1, 3)),
    "weight that is none": dict(weight=None),
    "input that is none": dict(input=[1.0]),
    "input of too few dimensions": dict(input=torch.zeros(4, 5)),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
def test_errors_are_torchs(wrong: dict) -> None:
    arguments = dict(input=torch.zeros(2, 4, 5, 5), weight=torch.zeros(4, 1, 3, 3), groups=4) | wrong
    with pytest.raises((TypeError, ValueError, RuntimeError)) as theirs:
        F.conv_transpose2d(**arguments)
    with pytest.raises(type(theirs.value)) as ours:
        functional.conv_transpose2d(**arguments)
    assert type(ours.value) is type(theirs.value)


@by_dims
def test_padding_modes_are_torchs_error(dims: int) -> None:
    cls = getattr(sepconv_ext.nn, f"ConvTranspose{dims}d")
    with pytest.raises(ValueError, match="zeros"):
        cls(4, 4, 3, groups=4, padding_mode="reflect")
    layer = cls(4, 4, 3, groups=4)
    layer.padding_mode = "reflect"
    with pytest.raises(ValueError, match="zeros"):
        layer(torch.zeros(1, 4, *[5] * dims))


def test_output_size() -> None:
    layer = sepconv_ext.nn.ConvTranspose2d(4, 4, 3, 2, 1, groups=4)
    theirs = nn.ConvTranspose2d(4, 4, 3, 2, 1, groups=4)
    theirs.load_state_dict(layer.state_dict())
    x = random((2, 4, 5, 6), torch.float32, "cpu")
    for size in ([9, 12], [10, 11], [2, 4, 10, 12]):
        with only_our_kernels():
            y = layer(x, size)
        torch.testing.assert_close(y, theirs(x, size))
    with pytest.raises(ValueError):
        layer(x, [11, 12])


class Decoder(nn.Module):
    """One of each family, in both numbers of dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.ConvTranspose2d(6, 8, 2, 2)
        self.depthwise = nn.ConvTranspose2d(8, 8, 4, 2, 1, groups=8, bias=False)
        self.grouped = nn.ConvTranspose2d(8, 4, 3, 2, 1, 1, groups=2)
        self.line = nn.ConvTranspose1d(4, 4, 3, 2, groups=4)
        self.narrow = nn.ConvTranspose1d(1, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        line = self.line(self.grouped(self.depthwise(self.dense(x))).flatten(2))
        return self.narrow(line.mean(1, keepdim=True))


def test_convert_and_revert() -> None:
    model = Decoder()
    x = random((2, 6, 3, 2), torch.float32, "cpu")
    state, classes = copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()]
    expected = model(x)
    report = convert_(model)
    assert [(e.name, e.family) for e in report] == [
        ("depthwise", "depthwise"),
        ("grouped", "grouped"),
        ("line", "depthwise"),
    ]
    assert [(e.name, e.family) for e in report.skipped] == [("dense", "dense"), ("narrow", "dense")]
    assert model.state_dict().keys() == state.keys()
    model.load_state_dict(state)
    sepconv_ext.reset_kernel_counts()
    torch.testing.assert_close(model(x), expected)
    assert sum(sepconv_ext.kernel_counts().values()) == 3
    torch.testing.assert_close(copy.deepcopy(model)(x), expected)
    assert revert_(model) == 3 and [type(m) for m in model.modules()] == classes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    torch.testing.assert_close(model(x), expected)


def test_a_replaced_function_of_torch_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, called = sepconv_ext.nn.ConvTranspose2d(3, 3, 3, groups=3), []
    monkeypatch.setattr(F, "conv_transpose2d", lambda *a, **k: called.append(1) or torch.conv_transpose2d(*a, **k))
    layer(torch.zeros(1, 3, 4, 4))
    assert called


def test_compiled_and_traced() -> None:
    layer = sepconv_ext.nn.ConvTranspose2d(6, 6, 4, 2, 1, groups=6)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = random((2, 6, 5, 4), torch.float32, "cpu").requires_grad_()
    expected = layer(x)
    g = torch.randn_like(expected)
    with only_our_kernels(at_least=3):
        y = compiled(x)
        grads = torch.autograd.grad(y, (x, *layer.parameters()), g)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(grads, torch.autograd.grad(expected, (x, *layer.parameters()), g))
    graph = torch.fx.symbolic_trace(layer)
    assert functional.conv_transpose2d in [node.target for node in graph.graph.nodes]
    torch.testing.assert_close(graph(x), expected)


@pytest.mark.parametrize("dims", [1, 2])
def test_jit_trace(dims: int) -> None:
    """A trace takes torch's function, which keeps sizes open."""
    layer = getattr(sepconv_ext.nn, f"ConvTranspose{dims}d")(4, 4, 3, 2, 1, groups=4)
    x = torch.randn(2, 4, *[5] * dims)
    with torch.no_grad():
        traced = torch.jit.trace(layer, x)
        other = torch.randn(3, 4, *[7] * dims)
        torch.testing.assert_close(traced(other), layer(other))


def test_mkldnn_tensors_are_left_to_torch() -> None:
    x, w = torch.randn(1, 4, 5, 5), torch.randn(4, 4, 3, 3)
    with torch.no_grad():
        torch.testing.assert_close(
            functional.conv_transpose2d(x.to_mkldnn(), w).to_dense(), functional.conv_transpose2d(x, w)
        )


def test_autocast_casts_as_for_torch() -> None:
    layer = sepconv_ext.nn.ConvTranspose2d(6, 6, 4, 2, 1, groups=6)
    x = random((2, 6, 5, 4), torch.float32, "cpu")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        expected = F.conv_transpose2d(x, layer.weight, layer.bias, 2, 1, 0, 6)
    assert y.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=0.05, atol=0.05)
    y.float().sum().backward()
    assert layer.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bilinear_upsampling(layout: str, device: str) -> None:
    """The filter of FCN's decoder, depthwise: F.interpolate but for the border, where it continues the image."""
    taps = torch.tensor([0.25, 0.75, 0.75, 0.25], device=device)
    weight = torch.outer(taps, taps).repeat(24, 1, 1, 1)
    x = with_layout(random((2, 24, 7, 19), torch.float32, device), layout)
    with only_our_kernels():
        y = functional.conv_transpose2d(x, weight, stride=2, padding=1, groups=24)
    expected = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
    assert y.shape == expected.shape
    torch.testing.assert_close(y[..., 1:-1, 1:-1], expected[..., 1:-1, 1:-1])
