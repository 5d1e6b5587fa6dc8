"""Depthwise convolutions of volumes: torch's function and layer, as sums over the maps of their planes."""

from __future__ import annotations

import copy
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sepconv_ext
from harness import DTYPES, assert_as_accurate, dtype_name, only_our_kernels
from sepconv_ext import convert_, functional, revert_, volumes

pytest.importorskip("expecttest", reason="torch's own test machinery imports it")

from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db

LAYOUTS = {"NCDHW": torch.contiguous_format, "NDHWC": torch.channels_last_3d}
by_layout = pytest.mark.parametrize("layout", LAYOUTS)


class Case(NamedTuple):
    name: str
    N: int
    C: int
    size: tuple[int, int, int]
    taps: tuple[int, int, int]
    multiplier: int = 1
    stride: int | tuple = 1
    padding: int | tuple | str = 0
    dilation: int | tuple = 1
    bias: bool = True

    @property
    def geometry(self) -> tuple:
        return self.stride, self.padding, self.dilation, self.C

    def __str__(self) -> str:
        return self.name


CASES = (
    Case("3x3x3", 2, 24, (6, 9, 10), (3, 3, 3), padding=1),
    Case("two_channels", 1, 2, (4, 7, 5), (3, 3, 3), padding=1),
    Case("stride2_c58", 2, 58, (7, 9, 11), (3, 3, 3), stride=2, padding=1, bias=False),
    Case("stride_of_the_depth", 1, 16, (9, 7, 7), (3, 3, 3), stride=(3, 1, 1), padding=(1, 1, 1)),
    Case("stride_of_the_planes", 1, 16, (5, 8, 9), (3, 3, 3), stride=(1, 2, 2), padding=1),
    Case("dilation", 1, 8, (9, 9, 10), (3, 3, 3), padding=2, dilation=2),
    Case("dilation_and_stride_of_the_depth", 1, 8, (11, 6, 6), (3, 1, 3), stride=(2, 1, 1), dilation=(3, 1, 1)),
    Case("even_taps_same", 1, 8, (5, 6, 7), (2, 4, 2), padding="same"),
    Case("valid", 2, 12, (5, 6, 7), (5, 3, 1), padding="valid"),
    Case("multiplier3", 1, 4, (4, 6, 6), (3, 3, 3), multiplier=3, padding=1),
    Case("depth_alone", 2, 24, (6, 5, 7), (5, 1, 1), padding=(2, 0, 0)),
    Case("planes_alone", 2, 24, (3, 8, 8), (1, 3, 3), padding=(0, 1, 1)),
    Case("more_padding_than_planes", 1, 8, (2, 5, 5), (3, 3, 3), padding=(4, 1, 1)),
    Case("taps_beyond_the_planes", 1, 8, (1, 5, 5), (3, 3, 3), padding=(1, 1, 1)),
    Case("one_tap", 1, 8, (3, 4, 5), (1, 1, 1)),
)
by_case = pytest.mark.parametrize("case", CASES, ids=str)


def values(*size: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)


def tensors(case: Case, dtype: torch.dtype, layout: str) -> list[Tensor]:
    x = values(case.N, case.C, *case.size, dtype=dtype).contiguous(memory_format=LAYOUTS[layout])
    w = values(case.C * case.multiplier, 1, *case.taps, dtype=dtype, seed=1)
    return [x, w, *([values(len(w), dtype=dtype, seed=2)] if case.bias else [])]


def called(function: object, case: Case, inputs: list[Tensor]) -> Tensor:
    return function(*inputs[:2], inputs[2] if case.bias else None, *case.geometry)


def order(t: Tensor) -> list[int]:
    """The strides of the dimensions that have more than one entry."""
    return [step for step, n in zip(t.stride(), t.shape, strict=True) if n > 1]


@pytest.fixture(params=["whole", "plane_by_plane"])
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """All planes at once, and one at a time."""
    monkeypatch.setattr(volumes, "_CHUNK", 1 << 40 if request.param == "whole" else 1)
    return request.param


@by_layout
@by_case
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_values_and_gradients(dtype: torch.dtype, case: Case, layout: str, pieces: str) -> None:
    """No further from float64 than torch's own, in its memory order, and by kernels of ours."""
    inputs = [t.requires_grad_() for t in tensors(case, dtype, layout)]
    exact_inputs = [t.detach().double().requires_grad_() for t in inputs]
    exact, peer = called(F.conv3d, case, exact_inputs), called(F.conv3d, case, inputs)
    g = values(*exact.shape, dtype=dtype, seed=3).contiguous(memory_format=LAYOUTS[layout])
    with only_our_kernels(at_least=2):
        y = called(functional.conv3d, case, inputs)
        grads = torch.autograd.grad(y, inputs, g)
    assert_as_accurate(y, peer, exact, f"{case} forward")
    expected = torch.empty_like(exact).contiguous(memory_format=LAYOUTS[layout])
    assert order(y) == order(expected)  # torch's too, but for float64 in NDHWC, which it computes in NCDHW
    assert dtype != torch.float32 or order(y) == order(peer)
    truths = torch.autograd.grad(exact, exact_inputs, g.double())
    theirs = torch.autograd.grad(peer, inputs, g)
    for name, actual, other, truth, t in zip("xwb", grads, theirs, truths, inputs, strict=False):
        assert_as_accurate(actual, other, truth, f"{case} {name}")
        assert order(actual) == order(t), f"{case} {name}"


@by_layout
@pytest.mark.parametrize("case", [c for c in CASES if c.C <= 12], ids=str)
def test_derivatives_of_every_order(case: Case, layout: str) -> None:
    smaller = case._replace(N=1, size=tuple(min(n, 5 if n < 9 else 9) for n in case.size), C=2)
    inputs = [t.requires_grad_() for t in tensors(smaller, torch.float64, layout)]
    call = lambda *given: called(functional.conv3d, smaller, list(given))  # noqa: E731
    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


@pytest.mark.parametrize(
    ("size", "kernel", "layout", "avx512", "threads", "ours"),
    [
        ((1, 4, 8, 16, 16), (7, 7, 7), "NCDHW", False, 1, True),
        ((1, 4, 8, 16, 16), (7, 7, 7), "NCDHW", True, 1, False),
        ((1, 16, 8, 16, 16), (5, 1, 1), "NDHWC", True, 2, False),
        ((1, 16, 8, 16, 16), (5, 1, 1), "NDHWC", True, 1, True),
        ((1, 16, 8, 16, 16), (5, 1, 1), "NDHWC", False, 2, True),
        ((1, 16, 8, 16, 16), (5, 1, 1), "NCDHW", True, 2, True),
        ((1, 32, 32, 32, 32), (3, 3, 3), "NCDHW", True, 1, False),
        ((2, 32, 32, 32, 32), (3, 3, 3), "NCDHW", True, 1, True),
    ],
)
def test_which_forward_calls_are_torchs(
    size: tuple[int, ...],
    kernel: tuple[int, ...],
    layout: str,
    avx512: bool,
    threads: int,
    ours: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By measurement (benchmarks/notes/volumes.md), where nothing is differentiated."""
    monkeypatch.setattr(sepconv_ext.volumes, "_has_avx512", lambda: avx512)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    x, w = torch.randn(size), torch.randn(size[1], 1, *kernel)
    x = x.to(memory_format=torch.channels_last_3d) if layout == "NDHWC" else x
    padding = tuple(n // 2 for n in kernel)
    sepconv_ext.reset_kernel_counts()
    y = functional.conv3d(x, w, padding=padding, groups=size[1])
    assert bool(sepconv_ext.kernel_counts()) == ours
    torch.testing.assert_close(y, F.conv3d(x, w, padding=padding, groups=size[1]), rtol=1e-4, atol=1e-4)


def test_only_the_gradients_that_are_asked_for() -> None:
    case = CASES[0]
    for wanted in range(3):
        inputs = [t.requires_grad_(i == wanted) for i, t in enumerate(tensors(case, torch.float32, "NCDHW"))]
        call = (called(function, case, inputs).square().sum() for function in (functional.conv3d, F.conv3d))
        ours, theirs = (torch.autograd.grad(total, inputs[wanted])[0] for total in call)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("view", ["every other plane", "crop", "transposed", "unbatched"])
def test_views(view: str) -> None:
    x, w = values(2, 8, 8, 9, 10), values(8, 1, 3, 3, 3, seed=1)
    x = {
        "every other plane": x[:, :, ::2],
        "crop": x[..., 1:7, 2:9],
        "transposed": x.transpose(2, 4),
        "unbatched": x[1],
    }[view]
    for weight in (w, w.transpose(2, 4)):
        with only_our_kernels():
            y = functional.conv3d(x, weight, None, 1, 1, 1, 8)
        expected = F.conv3d(x.double(), weight.double(), None, 1, 1, 1, 8)
        torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)


# --- torch's own samples, errors and layers ---

OPINFO = next(op for op in op_db if op.name == "nn.functional.conv3d" and not op.variant_test_name)
MODULEINFO = next(m for m in module_db if m.module_cls is nn.Conv3d)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=dtype_name)
def test_samples(dtype: torch.dtype) -> None:
    made = list(OPINFO.sample_inputs("cpu", dtype))
    assert len(made) >= 6, "torch's samples have moved"
    for sample in made:
        call = (sample.input, *sample.args)
        ours, theirs = functional.conv3d(*call, **sample.kwargs), F.conv3d(*call, **sample.kwargs)
        torch.testing.assert_close(ours, theirs)


def test_error_inputs() -> None:
    """Where torch raises, we raise the same."""
    errors = list(OPINFO.error_inputs("cpu")) if OPINFO.error_inputs_func else []
    calls = [((e.sample_input.input, *e.sample_input.args), e.sample_input.kwargs) for e in errors]
    x, w = values(1, 4, 5, 5, 5), values(4, 1, 3, 3, 3)
    calls += [
        ((x, w), dict(groups=3)),
        ((x, w, values(3)), dict(groups=4)),
        ((x, w), dict(groups=4, stride=0)),
        ((x, w), dict(groups=4, stride=2, padding="same")),
        ((x, w), dict(groups=4, padding=-1)),
        ((x, w), dict(groups=4, padding="somehow")),
        ((x, w), dict(groups=4, dilation=(1, 2))),
        ((x[..., :2], w), dict(groups=4)),
        ((x, w.double()), dict(groups=4)),
        ((x, "filters"), dict(groups=4)),
    ]
    for call, keywords in calls:
        with pytest.raises(Exception) as theirs:
            F.conv3d(*call, **keywords)
        with pytest.raises(type(theirs.value)) as ours:
            functional.conv3d(*call, **keywords)
        said = str(theirs.value).partition("(")[0]  # torch lists the types that it was given
        assert str(ours.value).startswith(said)


@pytest.mark.parametrize("training", [False, True])
def test_the_layer_is_torchs(training: bool) -> None:
    made = MODULEINFO.module_inputs_func(MODULEINFO, "cpu", torch.float64, False, training)
    assert len(made) >= 2, "torch's samples have moved"
    for sample in made:
        arguments, keywords = sample.constructor_input.args, sample.constructor_input.kwargs
        layers = []
        for cls in (nn.Conv3d, sepconv_ext.nn.Conv3d):
            torch.manual_seed(1)
            layers.append(cls(*arguments, **{**keywords, "device": "cpu", "dtype": torch.float64}).train(training))
        theirs, ours = layers
        assert repr(ours) == repr(theirs) and ours.__dict__.keys() == theirs.__dict__.keys()
        call = sample.forward_input
        torch.testing.assert_close(ours(*call.args, **call.kwargs), theirs(*call.args, **call.kwargs))


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_padding_modes(mode: str) -> None:
    theirs = nn.Conv3d(8, 8, 3, padding=(1, 2, 1), groups=8, padding_mode=mode)
    ours = copy.deepcopy(theirs)
    convert_(ours)
    x = values(2, 8, 4, 5, 6)
    with only_our_kernels():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


# --- models ---


class Video(nn.Module):
    """A stem of pixels, a block as X3D has it (1x1x1, depthwise, 1x1x1), a grouped one, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv3d(3, 8, 1), nn.Conv3d(8, 8, (5, 1, 1), padding=(2, 0, 0), groups=8))
        self.block = nn.Sequential(
            nn.Conv3d(8, 16, 1),
            nn.BatchNorm3d(16),
            nn.ReLU(),
            nn.Conv3d(16, 16, 3, stride=(1, 2, 2), padding=1, groups=16, bias=False),
            nn.SiLU(),
            nn.Conv3d(16, 8, 1),
        )
        self.grouped = nn.Conv3d(8, 8, 3, padding=1, groups=2)
        self.one = nn.Conv3d(1, 4, 3)  # of a single channel: dense

    def forward(self, x: Tensor) -> Tensor:
        x = self.grouped(self.block(self.stem(x)))
        return self.one(x.mean(1, keepdim=True)).mean((2, 3, 4))


def video() -> tuple[nn.Module, nn.Module, Tensor]:
    """torch's, ours and a clip."""
    torch.manual_seed(0)
    theirs = Video()
    ours = copy.deepcopy(theirs)
    report = convert_(ours)
    assert [entry.name for entry in report.replaced] == ["stem.1", "block.3"]
    assert all("not depthwise" in entry.reason for entry in report.skipped)
    return theirs, ours, values(2, 3, 6, 12, 12)


def test_a_converted_model_trains_as_torchs() -> None:
    theirs, ours, x = video()
    learned = []
    for model in (theirs, ours):
        optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            model(x).square().mean().backward()
            optimiser.step()
            optimiser.zero_grad()
        learned.append(dict(model.state_dict()))
    torch.testing.assert_close(learned[1], learned[0], rtol=1e-3, atol=1e-5)
    assert revert_(ours) == 2 and type(ours.block[3]) is nn.Conv3d


def test_transforms_and_dual_numbers_go_through_torchs() -> None:
    x, w = values(2, 4, 4, 5, 5), values(4, 1, 3, 3, 3)
    each = torch.func.vmap(lambda image: functional.conv3d(image, w, None, 1, 1, 1, 4))(x)
    torch.testing.assert_close(each, F.conv3d(x, w, None, 1, 1, 1, 4))
    call = lambda t: functional.conv3d(t, w, None, 1, 1, 1, 4)  # noqa: E731
    _, tangent = torch.func.jvp(call, (x,), (x,))
    torch.testing.assert_close(tangent, call(x), rtol=1e-4, atol=1e-5)


def test_autocast() -> None:
    x, w, b = values(1, 8, 4, 6, 6), values(8, 1, 3, 3, 3), values(8)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = (f(x, w, b, 1, 1, 1, 8) for f in (functional.conv3d, F.conv3d))
    assert ours.dtype == theirs.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


def test_compile_and_export() -> None:
    """Compiled, a graph without breaks holds calls of conv2d, backward too; exported, it is torch's convolution."""
    theirs, ours, x = video()
    for model in (theirs, ours):
        model.eval()
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    grads = []
    for model in (theirs, compiled):
        grads.append(
            torch.autograd.grad(
                model(x).square().sum(), list(theirs.parameters() if model is theirs else ours.parameters())
            )
        )
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-3, atol=1e-4)
    program = torch.export.export(ours, (x,))
    assert not any("sepconv_ext" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(x), theirs(x), rtol=1e-4, atol=1e-5)
