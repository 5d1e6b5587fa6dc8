"""Padding modes in the kernels: reflect, replicate and circular against float64 F.pad and convolution."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import grad, vmap
from torch.utils._python_dispatch import TorchDispatchMode

import sepconv_ext
from cases import Case
from harness import ACTIVATIONS, DTYPES, LAYOUTS, assert_as_accurate, dtype_name, only_our_kernels, random
from sepconv_ext import functional, reference

ops = torch.ops.sepconv_ext
MODES = ("reflect", "replicate", "circular")
MAPS = ("forward", "grad_input", "grad_weight")
HALF = (torch.float16, torch.bfloat16)

# name; N, C, H, W, K, R, S, then the geometry; padding of four entries is (top, bottom, left, right).
CASES = (
    Case("depthwise_k3", 2, 24, 19, 7, 24, 3, 3, padding=(1, 1), groups=24, bias=True),
    Case("depthwise_k3_c3", 1, 3, 7, 19, 3, 3, 3, padding=(1, 1), groups=3),
    Case("depthwise_k3_one_channel", 2, 1, 19, 20, 1, 3, 3, padding=(1, 1), bias=True),
    Case("depthwise_k3_c58_stride2", 2, 58, 19, 8, 58, 3, 3, stride=(2, 2), padding=(1, 1), groups=58),
    Case(
        "depthwise_k5_dilation_stride",
        1,
        24,
        19,
        20,
        24,
        5,
        3,
        stride=(2, 3),
        padding=(4, 2),
        dilation=(2, 2),
        groups=24,
    ),
    Case("depthwise_k7_plane7", 2, 24, 7, 7, 24, 7, 7, padding=(3, 3), groups=24, bias=True),
    Case("depthwise_padding_beyond_half", 1, 58, 7, 8, 58, 3, 3, padding=(6, 5), groups=58),
    Case("depthwise_padding_without_need", 1, 3, 9, 40, 3, 1, 1, padding=(2, 3), groups=3, bias=True),
    Case("depthwise_k4x2_same", 1, 6, 8, 9, 6, 4, 2, padding="same", dilation=(1, 3), groups=6),
    Case("depthwise_one_row", 2, 8, 1, 19, 8, 1, 5, padding=(0, 2), groups=8, bias=True),
    Case("depthwise_wide", 1, 3, 12, 70, 3, 3, 3, padding=(1, 1), groups=3),
    Case("multiplier3", 1, 5, 7, 19, 15, 3, 3, padding=(1, 1), groups=5, bias=True),
    Case("grouped", 2, 12, 7, 9, 18, 3, 3, padding=(1, 2), groups=3, bias=True),
    Case("grouped_stride2", 1, 24, 8, 7, 12, 3, 3, stride=(1, 2), padding=(2, 1), groups=2),
    Case("dense", 1, 3, 7, 19, 5, 3, 3, padding=(1, 1), bias=True),
    Case("empty_batch", 0, 8, 6, 6, 8, 3, 3, padding=(1, 1), groups=8, bias=True),
)
# What only replicate allows.
SMALL_IMAGES = (
    Case("one_pixel", 2, 24, 1, 1, 24, 3, 3, padding=(1, 1), groups=24, bias=True),
    Case("one_column", 1, 3, 7, 1, 3, 3, 3, padding=(1, 1), groups=3),
    Case("padding_beyond_the_image", 1, 8, 4, 5, 8, 3, 5, stride=(2, 1), padding=(9, 7), groups=8),
)
# Padding as large as the image, which reflect forbids.
ROUND = (Case("padding_as_large", 1, 3, 4, 5, 3, 3, 3, padding=(4, 5), groups=3),)
LEGAL = [
    *itertools.product(MODES, CASES),
    *itertools.product(("replicate",), SMALL_IMAGES),
    *itertools.product(("replicate", "circular"), ROUND),
]
by_mode = pytest.mark.parametrize("mode", MODES)
by_legal = pytest.mark.parametrize(("mode", "case"), LEGAL, ids=[f"{mode}-{case}" for mode, case in LEGAL])


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """Fresh memory is full of NaN, so that an output element that nobody writes is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def torch_conv2d(x: Tensor, w: Tensor, b: Tensor | None, case: Case, mode: str) -> Tensor:
    top, bottom, left, right = case.four_paddings
    return F.conv2d(F.pad(x, (left, right, top, bottom), mode), w, b, case.stride, 0, case.dilation, case.groups)


def tensors(case: Case, dtype: torch.dtype, device: str, layout: str = "contiguous", grad: bool = False) -> list:
    weight_layout = "strided" if layout == "strided" else "contiguous"
    made = [
        random(case.input_size, dtype, device, layout, seed=1),
        random(case.weight_size, dtype, device, weight_layout, seed=2),
        random((case.K,), dtype, device, seed=3) if case.bias else None,
    ]
    return [None if t is None else t.requires_grad_(grad) for t in made]


def results(x: Tensor, w: Tensor, b: Tensor | None, g: Tensor, case: Case, mode: str) -> tuple[Tensor, ...]:
    """torch's three maps."""
    x, w = (t.detach().requires_grad_() for t in (x, w))
    y = torch_conv2d(x, w, b, case, mode)
    return (y.detach(), *torch.autograd.grad(y, (x, w), g))


def run_map(which: str, x: Tensor, w: Tensor, b: Tensor | None, g: Tensor, case: Case, mode: str) -> Tensor:
    if which == "forward":
        return ops.conv2d(x, w, b, *case.op_geometry, "identity", mode)
    if which == "grad_input":
        return ops.conv2d_grad_input(g, w, x.shape, x.stride(), *case.op_geometry, mode)
    return ops.conv2d_grad_weight(g, x, w.shape, w.stride(), *case.op_geometry, mode)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@by_legal
def test_maps(mode: str, case: Case, dtype: torch.dtype, layout: str, device: str) -> None:
    """No further from the float64 results than torch's padded copy, by our kernels alone."""
    x, w, b = tensors(case, dtype, device, layout)
    g = random(case.output_size, dtype, device, layout, seed=4)
    exact = results(*(None if t is None else t.double() for t in (x, w, b)), g.double(), case, mode)
    peers = results(x, w, b, g, case, mode)
    for which, peer, truth in zip(MAPS, peers, exact, strict=True):
        with only_our_kernels(at_least=1 if case.N else 0):
            actual = run_map(which, x, w, b, g, case, mode)
        assert_as_accurate(actual.cpu(), peer.cpu(), truth.cpu(), f"{which} of {case}")
        like = {"forward": g, "grad_input": x, "grad_weight": w}[which]
        if layout != "strided" and case.N and 1 not in like.shape:
            assert actual.stride() == like.stride()


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
@by_mode
def test_every_instruction_set(mode: str, isa: str) -> None:
    """The best one is what every other test runs."""
    try:
        best = sepconv_ext._C.set_cpu_isa(isa)
    except RuntimeError as error:
        pytest.skip(str(error))
    try:
        for case, layout, dtype in itertools.product(CASES, ("contiguous", "channels_last"), DTYPES):
            x, w, b = tensors(case, dtype, "cpu", layout)
            g = random(case.output_size, dtype, "cpu", layout, seed=4)
            exact = results(*(None if t is None else t.double() for t in (x, w, b)), g.double(), case, mode)
            for which, peer, truth in zip(MAPS, results(x, w, b, g, case, mode), exact, strict=True):
                with only_our_kernels(at_least=1 if case.N else 0):
                    actual = run_map(which, x, w, b, g, case, mode)
                assert_as_accurate(actual, peer, truth, f"{which} of {case}")
    finally:
        sepconv_ext._C.set_cpu_isa(best)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@by_mode
def test_activation(mode: str, activation: str, device: str) -> None:
    case = CASES[0]
    for layout in ("contiguous", "channels_last"):
        x, w, b = tensors(case, torch.float32, device, layout)
        with only_our_kernels():
            y = functional.depthwise_conv2d(x, w, b, padding=1, activation=activation, padding_mode=mode)
        torch.testing.assert_close(y, reference.ACTIVATIONS[activation](torch_conv2d(x, w, b, case, mode)))


GRADIENTS = (
    Case("depthwise", 1, 3, 4, 5, 3, 3, 3, padding=(1, 2), groups=3, bias=True),
    Case("strided", 2, 2, 5, 4, 4, 3, 2, stride=(2, 1), padding=(2, 1), dilation=(1, 2), groups=2),
)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", GRADIENTS, ids=str)
@by_mode
def test_gradients_of_two_orders(mode: str, case: Case, layout: str, device: str) -> None:
    inputs = tensors(case, torch.float64, device, layout, grad=True)

    def call(x, w, b=None):
        return ops.conv2d(x, w, b, *case.op_geometry, "tanh", mode)

    inputs = [t for t in inputs if t is not None]
    with only_our_kernels():
        assert torch.autograd.gradcheck(call, inputs)
        assert torch.autograd.gradgradcheck(call, inputs)


class Recorder(TorchDispatchMode):
    """The names of the ops that ran, and the bytes of the largest tensor that one of them made."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.names.add(function.overloadpacket.__name__)
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@by_mode
def test_no_padded_copy(mode: str, layout: str, device: str) -> None:
    """A training step of a layer calls the ops and copies nothing; one kernel runs the inside, one the border."""
    layer = sepconv_ext.nn.Conv2d(24, 24, 3, padding=1, groups=24, padding_mode=mode, bias=False, device=device)
    x = random((2, 24, 20, 19), torch.float32, device, layout).requires_grad_()
    g = random((2, 24, 20, 19), torch.float32, device, layout)
    with only_our_kernels(), Recorder() as recorder:
        torch.autograd.grad(layer(x), (x, layer.weight), g)
        counts = sepconv_ext.kernel_counts()
    assert recorder.names - {"detach"} == {"conv2d", "conv2d_both_grads"}
    assert counts[f"{device}_borders"] == 3 and sum(counts.values()) == 6


@by_mode
def test_memory(mode: str) -> None:
    """Below the dispatcher too: forward and grad_input allocate what they return and no image besides."""
    case = Case("", 4, 32, 40, 40, 32, 3, 3, padding=(1, 1), groups=32)
    x, w, _ = tensors(case, torch.float32, "cpu", "channels_last")
    for which in ("forward", "grad_input"):
        with torch.profiler.profile(profile_memory=True) as profile, only_our_kernels(at_least=2):
            run_map(which, x, w, None, x, case, mode)
        allocated = sum(max(0, e.self_cpu_memory_usage) for e in profile.key_averages())
        assert 0 < allocated < 1.2 * x.nbytes, f"{which}: {allocated} bytes for a result of {x.nbytes}"


def test_nothing_but_borders(device: str) -> None:
    """Where every output sees the padding the kernel for the inside does not run; without padding the border's."""
    x, w, _ = tensors(CASES[5], torch.float32, device)
    with only_our_kernels():
        functional.padded_conv2d(x[..., :3], w, padding=(6, 2), groups=24, padding_mode="replicate")
        assert sepconv_ext.kernel_counts() == {f"{device}_borders": 1}
    with only_our_kernels():
        functional.padded_conv2d(x, w, groups=24, padding_mode="reflect")
        assert f"{device}_borders" not in sepconv_ext.kernel_counts()


def test_explain() -> None:
    x, w, _ = tensors(CASES[0], torch.float32, "cpu", "channels_last")
    call = dict(padding=1, groups=24, padding_mode="reflect")
    for which in MAPS:
        told = functional.explain(x, w, map=which, **call)
        assert told.aten or ("cpu_borders" in told.reason and "reflect" in told.reason)
    assert "borders" not in functional.explain(x, w, padding=1, groups=24).reason
    small = functional.explain(x[:, :, :2, :2], w, padding=1, groups=24, padding_mode="replicate")
    assert small.aten or small.kernel == "cpu_borders"


@by_mode
def test_same_bits_every_run(mode: str, device: str) -> None:
    runs = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        made = []
        for case, layout in itertools.product(CASES[:-1], ("contiguous", "channels_last")):
            x, w, b = tensors(case, torch.float32, device, layout)
            g = random(case.output_size, torch.float32, device, layout, seed=4)
            with only_our_kernels():
                made += [run_map(which, x, w, b, g, case, mode) for which in MAPS]
        runs.append(made)
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


BAD = [
    ("reflect", (9, 1), (9, 8), "height"),
    ("reflect", (1, 8), (9, 8), "width"),
    ("circular", (10, 1), (9, 8), "height"),
    ("circular", (1, 9), (9, 8), "width"),
    ("replicate", (2, 2), (0, 8), "height"),
    ("reflect", (2, 2), (0, 8), "height"),
    ("circular", (2, 2), (9, 0), "width"),
]


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize(("mode", "padding", "image", "name"), BAD)
def test_padding_that_a_mode_forbids(mode, padding, image, name, requires_grad, device) -> None:
    x = torch.ones(1, 4, *image, device=device, requires_grad=requires_grad)
    w = torch.ones(4, 1, 3, 3, device=device)
    with pytest.raises(Exception) as theirs:
        F.conv2d(F.pad(x, (padding[1], padding[1], padding[0], padding[0]), mode), w, groups=4)
    sepconv_ext.reset_kernel_counts()
    with pytest.raises(type(theirs.value), match=f"(?s){mode}.*{name}|{name}"):
        functional.padded_conv2d(x, w, None, 1, padding, 1, 4, padding_mode=mode)
    assert not sepconv_ext.kernel_counts()


@pytest.mark.parametrize("mode", ["constant", "", "Reflect"])
def test_unknown_mode(mode: str) -> None:
    x, w, _ = tensors(CASES[0], torch.float32, "cpu")
    with pytest.raises(ValueError, match="padding_mode must be one of zeros, reflect, replicate, circular"):
        functional.padded_conv2d(x, w, padding=1, groups=24, padding_mode=mode)


@by_mode
def test_layers_beyond_their_kernels(mode: str) -> None:
    """Types without a kernel, dense layers outside of strict mode, transforms and forward-mode AD go to torch."""
    case = Case("", 2, 4, 7, 8, 6, 3, 3, padding=(1, 2), groups=2, bias=True)
    x, w, b = (t.to(torch.complex64) for t in tensors(case, torch.float32, "cpu"))
    y = functional.padded_conv2d(x, w, b, 1, (1, 2), 1, 2, padding_mode=mode)
    torch.testing.assert_close(y, torch_conv2d(x, w, b, case, mode))

    dense = nn.Conv2d(32, 32, 3, padding=1, padding_mode=mode)
    ours = sepconv_ext.nn.Conv2d(32, 32, 3, padding=1, padding_mode=mode)
    ours.load_state_dict(dense.state_dict())
    x = random((2, 32, 20, 19), torch.float32, "cpu").requires_grad_()
    g = torch.randn(2, 32, 20, 19)
    sepconv_ext.reset_kernel_counts()
    grads = [torch.autograd.grad(layer(x), (x, layer.weight), g) for layer in (ours, dense)]
    assert sepconv_ext.kernel_counts() == {"aten": 3}
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)

    x, w, b = tensors(case, torch.float64, "cpu")

    def loss(x, w, b):
        return functional.padded_conv2d(x, w, b, 1, (1, 2), 1, 2, padding_mode=mode).sin().sum()

    def torch_loss(x, w, b):
        return torch_conv2d(x, w, b, case, mode).sin().sum()

    for f, g in zip(grad(loss, (0, 1))(x, w, b), grad(torch_loss, (0, 1))(x, w, b), strict=True):
        torch.testing.assert_close(f, g)
    images = x.unsqueeze(0).expand(2, -1, -1, -1, -1)
    mapped = vmap(lambda t: functional.padded_conv2d(t, w, b, 1, (1, 2), 1, 2, padding_mode=mode))(images)
    torch.testing.assert_close(mapped[1], torch_conv2d(x, w, b, case, mode))
    tangent = torch.randn_like(x)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        out = torch.autograd.forward_ad.unpack_dual(
            functional.padded_conv2d(dual, w, b, 1, (1, 2), 1, 2, padding_mode=mode)
        )
    torch.testing.assert_close(out.tangent, torch_conv2d(tangent, w, None, case, mode))


@by_mode
def test_torchs_own_route_has_second_derivatives(mode: str) -> None:
    """grad_input by torch's functions, which torch.func differentiates again."""
    case = Case("", 1, 4, 5, 6, 4, 3, 3, padding=(1, 2), groups=2)
    x, w, _ = tensors(case, torch.float64, "cpu")
    g = random(case.output_size, torch.float64, "cpu", seed=4)

    def ours(g, w):
        return run_map("grad_input", x, w, None, g, case, mode).sin().sum()

    def theirs(g, w):
        _, pull = torch.func.vjp(lambda t: torch_conv2d(t, w, None, case, mode), x)
        return pull(g)[0].sin().sum()

    for a, b in zip(grad(ours, (0, 1))(g, w), grad(theirs, (0, 1))(g, w), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@by_mode
def test_opcheck(mode: str, layout: str, device: str) -> None:
    case = CASES[0]
    x, w, b = tensors(case, torch.float32, device, layout, grad=True)
    g = random(case.output_size, torch.float32, device, layout, seed=4).requires_grad_()
    torch.library.opcheck(ops.conv2d.default, (x, w, b, *case.op_geometry, "relu", mode))
    torch.library.opcheck(
        ops.conv2d_grad_input.default, (g, w, list(x.shape), list(x.stride()), *case.op_geometry, mode)
    )
    torch.library.opcheck(
        ops.conv2d_grad_weight.default, (g, x, list(w.shape), list(w.stride()), *case.op_geometry, mode)
    )


@by_mode
def test_compile_autocast_and_trace(mode: str, device: str) -> None:
    layer = sepconv_ext.nn.Conv2d(6, 6, 3, padding=1, groups=6, padding_mode=mode, device=device)
    x = random((2, 6, 7, 9), torch.float32, device)
    y = layer(x)
    counter = CompileCounterWithBackend("aot_eager")
    for made in (torch.compile(layer, backend=counter, fullgraph=True), torch.fx.symbolic_trace(layer)):
        with torch.no_grad(), only_our_kernels():
            torch.testing.assert_close(made(x), y)
    assert counter.frame_count == 1
    with torch.autocast(device, torch.bfloat16), only_our_kernels():
        reduced = layer(x)
    assert reduced.dtype == torch.bfloat16
    torch.testing.assert_close(reduced.float(), y, rtol=0.05, atol=0.05)
