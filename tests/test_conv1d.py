"""1-D convolutions: images of one row to the kernels, in both memory orders."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import sepconv_ext
from harness import DTYPES, assert_as_accurate, dtype_name, only_our_kernels, random, strictness
from sepconv_ext import functional


class Case(NamedTuple):
    name: str
    N: int
    C: int
    L: int
    K: int
    S: int
    groups: int
    stride: int = 1
    padding: int | str = 0
    dilation: int = 1

    @property
    def geometry(self) -> tuple:
        return self.stride, self.padding, self.dilation, self.groups

    def __str__(self) -> str:
        return self.name


CASES = (
    Case("k3", 2, 24, 41, 24, 3, 24, padding=1),
    Case("k3_one_channel", 2, 1, 19, 1, 3, 1, padding=1),
    Case("k3_c3", 2, 3, 7, 3, 3, 3, padding=1),
    Case("k3_stride2_dilation3", 2, 58, 37, 58, 3, 58, stride=2, padding=3, dilation=3),
    Case("k4_same", 2, 24, 20, 24, 4, 24, padding="same"),
    Case("k4_causal", 3, 64, 130, 64, 4, 64, padding="causal"),
    Case("k4_causal_dilation2_stride3", 2, 58, 33, 58, 4, 58, stride=3, padding="causal", dilation=2),
    Case("k31", 1, 24, 65, 24, 31, 24, padding=15),
    Case("k31_causal_longer_than_the_sequence", 2, 8, 19, 8, 31, 8, padding="causal"),
    Case("multiplier2", 2, 12, 21, 24, 3, 12, padding="valid"),
    Case("groups", 2, 12, 21, 18, 5, 3, padding=2),
    Case("pointwise", 2, 24, 21, 40, 1, 1),
    Case("pointwise_one_pixel", 2, 24, 1, 40, 1, 1),
    Case("dense", 2, 6, 17, 5, 3, 1, padding=1),
    Case("empty_batch", 0, 8, 9, 8, 3, 8, padding=1),
)
ORDERS = ("NCL", "NLC")
by_case = pytest.mark.parametrize("case", CASES, ids=str)
by_order = pytest.mark.parametrize("order", ORDERS)


def in_order(sequence: Tensor, order: str) -> Tensor:
    """The same [N, C, L] values, with channels (NLC) or positions (NCL) next to each other in memory."""
    return sequence.contiguous() if order == "NCL" else sequence.transpose(1, 2).contiguous().transpose(1, 2)


def tensors(case: Case, dtype: torch.dtype, device: str, order: str = "NCL", grad: bool = False) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    sizes = (case.N, case.C, case.L), (case.K, case.C // case.groups, case.S), (case.K,)
    x, w, b = (torch.randn(size, generator=generator, dtype=torch.float64).to(device, dtype) for size in sizes)
    return [t.requires_grad_(grad) for t in (in_order(x, order), w, b)]


def torch_conv1d(x: Tensor, w: Tensor, b: Tensor | None, stride, padding, dilation, groups) -> Tensor:
    if padding == "causal":
        x, padding = F.pad(x, (dilation * (w.shape[2] - 1), 0)), 0
    return F.conv1d(x, w, b, stride, padding, dilation, groups)


@by_order
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@by_case
def test_values_gradients_and_memory_order(case: Case, dtype: torch.dtype, order: str, device: str) -> None:
    x, w, _ = inputs = tensors(case, dtype, device, order, grad=True)
    exact_inputs = [t.detach().double().requires_grad_() for t in inputs]
    peer, exact = torch_conv1d(*inputs, *case.geometry), torch_conv1d(*exact_inputs, *case.geometry)
    g = torch.randn(exact.shape, dtype=torch.float64).to(device, dtype)
    with only_our_kernels(at_least=3 if case.N else 0):
        y = functional.conv1d(*inputs, *case.geometry)
        grads = torch.autograd.grad(y, inputs, in_order(g, order), allow_unused=True)
    peers = torch.autograd.grad(peer, inputs, g)
    truths = torch.autograd.grad(exact, exact_inputs, g.double())
    for name, ours, theirs, truth in zip("yxwb", (y, *grads), (peer, *peers), (exact, *truths), strict=True):
        assert_as_accurate(ours.detach().cpu(), theirs.detach().cpu(), truth.detach().cpu(), f"{name} of {case}")
    if y.numel() and 1 not in y.shape[1:] and case.C > 1:
        assert y.stride() == in_order(y, order).stride()
    assert grads[0].stride() == x.stride() and grads[1].stride() == w.stride()


@pytest.mark.parametrize("padding", [1, "same", "causal"])
def test_unbatched(padding: int | str, device: str) -> None:
    x, w, b = tensors(CASES[0], torch.float32, device)
    with only_our_kernels():
        y = functional.conv1d(x[0], w, b, padding=padding, groups=24)
    torch.testing.assert_close(y, torch_conv1d(x[0], w, b, 1, padding, 1, 24))


class Recorder(TorchDispatchMode):
    """Which ops ran, and where the tensors that they took and gave lie."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, list[int]] = {}

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        results = result if isinstance(result, tuple) else (result,)
        tensors = [t for t in (*arguments, *results) if isinstance(t, Tensor)]
        self.seen[function.overloadpacket.__name__] = [t.data_ptr() for t in tensors]
        return result


@pytest.mark.parametrize("padding", [1, "same", "causal"])
@by_order
def test_nothing_is_copied(order: str, padding: int | str, device: str) -> None:
    """The ops alone, whose operands are the caller's memory and whose results are what the caller gets."""
    x, w, b = tensors(CASES[0], torch.float32, device, order, grad=True)
    with Recorder() as recorder:
        y = functional.conv1d(x, w, b, 1, padding, 1, 24)
        g = in_order(torch.ones_like(y), order)
        recorder.seen.pop("ones_like", None)
        gx, gw = torch.autograd.grad(y, (x, w), g)
    views = {"detach", "transpose"}  # of the test's own
    computing = recorder.seen.keys() - views
    assert computing <= {"conv2d", "conv2d_both_grads", "clone"}, computing
    assert recorder.seen["conv2d"] == [x.data_ptr(), w.data_ptr(), b.data_ptr(), y.data_ptr()]
    assert recorder.seen["conv2d_both_grads"] == [t.data_ptr() for t in (g, x, w, gx, gw)]


def test_channels_next_to_each_other_take_the_channels_last_kernels() -> None:
    case = Case("", 2, 64, 130, 64, 4, 64, padding="causal")
    for order, kernels in (("NLC", {"cpu_depthwise_nhwc": 3}), ("NCL", {"cpu_depthwise_nchw_blocked": 3})):
        x, w, b = tensors(case, torch.float32, "cpu", order, grad=True)
        with only_our_kernels():
            y = functional.conv1d(x, w, b, *case.geometry)
            y.backward(in_order(torch.ones_like(y), order))
            counts = sepconv_ext.kernel_counts()
        assert counts == kernels


def test_causal_sees_nothing_later(device: str) -> None:
    case = Case("", 1, 8, 20, 8, 4, 8, padding="causal", dilation=2)
    x, w, b = tensors(case, torch.float32, device)
    later = x.clone()
    later[..., 11:] += 1
    y, z = (functional.conv1d(t, w, b, *case.geometry) for t in (x, later))
    assert torch.equal(y[..., :11], z[..., :11]) and not torch.equal(y[..., 11], z[..., 11])


@by_order
@pytest.mark.parametrize("name", ["k3_c3", "k4_causal_dilation2_stride3", "groups"])
def test_gradcheck(name: str, order: str, device: str) -> None:
    case = next(case for case in CASES if case.name == name)._replace(L=9, N=1)
    if case.groups == case.C:
        case = case._replace(C=3, K=3, groups=3)
    inputs = tensors(case, torch.float64, device, order, grad=True)
    with only_our_kernels():
        assert torch.autograd.gradcheck(functional.conv1d, (*inputs, *case.geometry))
        assert torch.autograd.gradgradcheck(functional.conv1d, (*inputs, *case.geometry))


BAD = {
    "input_1d": lambda x, w, b: (x[0, 0], w, b),
    "input_4d": lambda x, w, b: (x[None], w, b),
    "weight_2d": lambda x, w, b: (x, w[0], b),
    "weight_4d": lambda x, w, b: (x, w[None], b),
    "bias_length": lambda x, w, b: (x, w, b[1:]),
    "channels": lambda x, w, b: (x[:, 1:], w, b),
    "weight_dtype": lambda x, w, b: (x, w.double(), b),
    "kernel_too_long": lambda x, w, b: (x[..., :2], w, b),
    "list_input": lambda x, w, b: ([1.0], w, b),
    "no_weight": lambda x, w, b: (x, None, b),
    "float_stride": lambda x, w, b: (x, w, b, 1.5),
    "zero_stride": lambda x, w, b: (x, w, b, 0),
    "two_strides": lambda x, w, b: (x, w, b, (1, 1)),
    "two_paddings": lambda x, w, b: (x, w, b, 1, (1, 1)),
    "negative_padding": lambda x, w, b: (x, w, b, 1, -1),
    "unknown_padding": lambda x, w, b: (x, w, b, 1, "bogus"),
    "same_with_stride": lambda x, w, b: (x, w, b, 2, "same"),
    "same_input_4d": lambda x, w, b: (x[None], w, b, 1, "same"),
    "same_weight_4d": lambda x, w, b: (x, w[None], b, 1, "same"),
    "zero_dilation": lambda x, w, b: (x, w, b, 1, 0, 0),
    "float_groups": lambda x, w, b: (x, w, b, 1, 0, 1, 3.0),
    "too_many": lambda x, w, b: (x, w, b, 1, 0, 1, 3, 0),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str, device: str) -> None:
    """torch's exception type, and no kernel run."""
    arguments = BAD[name](*tensors(CASES[2], torch.float32, device))
    arguments += (1, 0, 1, 3)[len(arguments) - 3 :]
    with pytest.raises(Exception) as theirs:
        F.conv1d(*arguments)
    sepconv_ext.reset_kernel_counts()
    with pytest.raises(Exception) as ours:
        functional.conv1d(*arguments)
    assert type(ours.value) is type(theirs.value), f"{ours.value!r} instead of {theirs.value!r}"
    assert not sepconv_ext.kernel_counts()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("input_4d", "input must have 3 or 2 dimensions, but has 4"),
        ("same_input_4d", "input must have 3 or 2 dimensions, but has 4"),
        ("weight_2d", "weight must have 3 dimensions, but has 2"),
        ("two_strides", "stride must be one value, but has 2 entries"),
        ("unknown_padding", "padding must be 'same', 'valid' or 'causal', but is 'bogus'"),
    ],
)
def test_messages_name_the_argument(name: str, words: str) -> None:
    arguments = BAD[name](*tensors(CASES[2], torch.float32, "cpu"))
    with pytest.raises(RuntimeError, match=words):
        functional.conv1d(*arguments)


ARGUMENTS = [
    dict(in_channels=6, out_channels=6, kernel_size=3, groups=6),
    dict(in_channels=6, out_channels=12, kernel_size=5, stride=2, padding=2, groups=6, bias=False),
    dict(in_channels=6, out_channels=4, kernel_size=4, padding="same", dilation=2, groups=2),
    dict(in_channels=6, out_channels=8, kernel_size=1, padding="valid"),
]


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
def test_conv1d_is_a_conv1d(arguments: dict, padding_mode: str, device: str) -> None:
    made = []
    for cls in (nn.Conv1d, sepconv_ext.nn.Conv1d):
        torch.manual_seed(1)
        made.append(cls(**arguments, padding_mode=padding_mode, device=device))
    theirs, ours = made
    assert isinstance(ours, nn.Conv1d) and repr(ours) == repr(theirs)
    assert ours.__dict__.keys() == theirs.__dict__.keys()
    assert all(torch.equal(ours.state_dict()[name], t) for name, t in theirs.state_dict().items())
    for size in ((2, 6, 17), (6, 17)):
        x = torch.randn(size, device=device, requires_grad=True)
        with only_our_kernels():
            y = ours(x)
        z = theirs(x)
        torch.testing.assert_close(y, z)
        g = torch.randn_like(z)
        grads = (torch.autograd.grad(out, (x, *layer.parameters()), g) for out, layer in ((y, ours), (z, theirs)))
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "replicate", "circular"])
def test_causal_layer(padding_mode: str, device: str) -> None:
    layer = sepconv_ext.nn.Conv1d(
        6, 6, 4, stride=2, padding="causal", dilation=3, groups=6, padding_mode=padding_mode, device=device
    )
    assert "padding=causal" in repr(layer)
    x = torch.randn(2, 6, 17, device=device)
    padded = F.pad(x, (9, 0), mode="constant" if padding_mode == "zeros" else padding_mode)
    with only_our_kernels():
        y = layer(x)
    torch.testing.assert_close(y, F.conv1d(padded, layer.weight, layer.bias, 2, 0, 3, 6))
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert repr(copied) == repr(layer) and torch.equal(copied(x), y)


def test_unknown_padding_of_a_layer() -> None:
    with pytest.raises(ValueError, match="padding"):
        sepconv_ext.nn.Conv1d(4, 4, 3, padding="bogus")


def test_convert_and_revert() -> None:
    model = nn.Sequential(
        nn.Conv1d(3, 8, 3, padding=1),  # dense: stays
        nn.Conv1d(8, 8, 31, padding=15, groups=8),
        nn.Conv1d(8, 12, 1),
        nn.Conv1d(12, 12, 5, padding="same", groups=4, padding_mode="circular"),
        nn.LazyConv1d(4, 3),
    )
    classes = [type(layer) for layer in model]
    report = sepconv_ext.convert_(model)
    assert [(entry.name, entry.family) for entry in report] == [
        ("1", "depthwise"),
        ("2", "pointwise"),
        ("3", "grouped"),
    ]
    assert [entry.name for entry in report.skipped] == ["0", "4"]
    assert [type(model[i]) for i in (1, 2, 3)] == [sepconv_ext.nn.Conv1d] * 3
    x = torch.randn(2, 3, 40)
    with only_our_kernels(at_least=3):
        y = model[:4](x)
    assert sepconv_ext.revert_(model) == 3
    assert [type(layer) for layer in model] == classes
    torch.testing.assert_close(y, model[:4](x))


def test_parametrized_layers_convert_and_revert() -> None:
    layer = torch.nn.utils.parametrizations.weight_norm(nn.Conv1d(6, 6, 3, groups=6))
    before = type(layer)
    assert len(sepconv_ext.convert_(layer)) == 1 and isinstance(layer, sepconv_ext.nn.Conv1d)
    with only_our_kernels():
        layer(torch.randn(1, 6, 9))
    assert sepconv_ext.revert_(layer) == 1 and type(layer) is before


@pytest.mark.parametrize("padding", [1, "same", "causal"])
def test_compile_and_trace(padding: int | str, device: str) -> None:
    layer = sepconv_ext.nn.Conv1d(6, 6, 4, padding=padding, groups=6, device=device)
    x = torch.randn(2, 6, 17, device=device)
    y = layer(x)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for made in (compiled, torch.fx.symbolic_trace(layer), torch.jit.trace(layer, x)):
        with torch.no_grad(), only_our_kernels():
            torch.testing.assert_close(made(x), y)
    assert counter.frame_count == 1


def test_autocast_and_transforms() -> None:
    x, w, b = tensors(CASES[0], torch.float32, "cpu")
    with torch.autocast("cpu", torch.bfloat16), only_our_kernels():
        assert functional.conv1d(x, w, b, padding="causal", groups=24).dtype == torch.bfloat16
    mapped = torch.func.vmap(lambda t: functional.conv1d(t, w, b, padding=1, groups=24))(x)
    torch.testing.assert_close(mapped, F.conv1d(x, w, b, padding=1, groups=24))


class Casts(TorchDispatchMode):
    """Counts what is cast, by its size."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._to_copy.default:
            self.sizes[args[0].numel()] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("unbatched", [False, True])
@pytest.mark.parametrize(
    ("kind", "pixels"),
    [(nn.Conv1d, (10,)), (nn.ConvTranspose1d, (10,)), (nn.ConvTranspose2d, (5, 6)), (nn.Conv3d, (3, 5, 6))],
)
def test_autocast_casts_a_weight_once(kind: type, pixels: tuple[int, ...], unbatched: bool, checkpointed: bool) -> None:
    """Used twice under one autocast, in a checkpoint too, and with the gradients of torch's layer."""
    theirs = kind(8, 8, 3, padding=1, groups=8)
    ours = copy.deepcopy(theirs)
    sepconv_ext.convert_(ours)
    x = random((8, *pixels) if unbatched else (2, 8, *pixels), torch.float32, "cpu")
    results = []
    for layer in (ours, theirs):
        with torch.autocast("cpu", torch.bfloat16), Casts() as casts:
            run = (lambda t: checkpoint(layer, t, use_reentrant=False)) if checkpointed else layer  # noqa: B023
            y = run(run(x))
        y.float().square().mean().backward()
        results.append((casts.sizes, y, layer.weight.grad, layer.bias.grad))
    assert results[0][0] == results[1][0] and results[0][0][layer.weight.numel()] == 1
    torch.testing.assert_close(results[0][1:], results[1][1:], rtol=2e-2, atol=2e-2)


def test_types_without_a_kernel_go_to_torch() -> None:
    x, w, b = (t.to(torch.complex64) for t in tensors(CASES[0], torch.float32, "cpu"))
    torch.testing.assert_close(
        functional.conv1d(x, w, b, padding=1, groups=24), F.conv1d(x, w, b, padding=1, groups=24)
    )
    with strictness(True), pytest.raises(RuntimeError, match="SEPCONV_STRICT"):
        functional.conv1d(x, w, b, groups=24)
