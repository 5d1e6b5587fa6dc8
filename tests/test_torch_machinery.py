"""torch's machinery around the ops: opcheck, compile, export, autocast, flop counts, layouts, torch.func, graphs."""

from __future__ import annotations

import contextlib
import copy
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils.flop_counter import FlopCounterMode

import sepconv_ext
from cases import BY_NAME, FAMILIES, GPU_LAYERS, Case
from harness import LAYOUTS, grad_like_output, only_our_kernels, random, tensors, with_layout
from sepconv_ext import functional
from sepconv_ext.nn import DepthwiseConv2d, PointwiseConv2d

ops = torch.ops.sepconv_ext
by_case = pytest.mark.parametrize("case", FAMILIES, ids=str)
by_layout = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])


# ---- torch.library.opcheck -------------------------------------------------------------------------------------------


@by_layout
@pytest.mark.parametrize("case", [*FAMILIES, BY_NAME["depthwise_k4x3_same"], BY_NAME["grouped_empty_batch"]], ids=str)
def test_opcheck(case: Case, layout: str, device: str) -> None:
    """Schemas, fake kernels (sizes, strides, dtypes), autograd registration and tracing, with dynamic shapes."""
    x, w, b = tensors(case, torch.float32, device, layout, requires_grad=True)
    g = grad_like_output(case, torch.float32, device, layout).requires_grad_()
    for activation in ("identity", "relu6"):
        torch.library.opcheck(ops.conv2d.default, (x, w, b, *case.op_geometry, activation))
    by_input = (g, w, list(x.shape), list(x.stride()), *case.op_geometry)
    torch.library.opcheck(ops.conv2d_grad_input.default, by_input)
    by_weight = (g, x, list(w.shape), list(w.stride()), *case.op_geometry)
    torch.library.opcheck(ops.conv2d_grad_weight.default, by_weight)
    with torch.no_grad():  # its gradient is that of the two
        torch.library.opcheck(ops.conv2d_both_grads.default, (g, x, w, *case.op_geometry))


# ---- layouts ---------------------------------------------------------------------------------------------------------


def strides_with_meaning(tensor: Tensor) -> list[int]:
    """The strides of the dimensions that have more than one element; nothing in an empty tensor has any."""
    if tensor.numel() == 0:
        return []
    return [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]


IMAGES = {
    "plain": (2, 6, 7, 8),
    "one_channel": (2, 1, 7, 8),
    "one_pixel": (2, 6, 1, 1),
    "one_row": (2, 6, 1, 8),
    "one_image": (1, 6, 7, 8),
    "one_value": (1, 1, 1, 1),
    "empty_batch": (0, 6, 7, 8),
}


# (size, strides asked for): dense but for dimensions of size 1 or 0, which may have any; with gaps; in channels_last.
ASKED = (
    ((1, 4, 5, 7), (2240, 35, 7, 1)),
    ((1, 4, 5, 7), (2240, 1, 28, 4)),
    ((2, 4, 5, 1), (20, 5, 1, 9)),
    ((2, 4, 5, 7), (280, 35, 7, 1)),
    ((2, 4, 5, 7), (999, 1, 28, 4)),
    ((0, 4, 5, 7), (9, 35, 7, 1)),
)


@pytest.mark.parametrize(("size", "stride"), ASKED)
def test_gradients_of_odd_strides_as_the_fake_kernel_promises(size: tuple, stride: tuple, device: str) -> None:
    """Strides of dense tensors are kept to the last number, also where they mean nothing; others become dense."""

    def strides() -> tuple[int, ...]:
        g, w = torch.ones(size, device=device), torch.ones(size[1], 1, 3, 3, device=device)
        return ops.conv2d_grad_input(g, w, size, stride, (1, 1), (1, 1), (1, 1), size[1]).stride()

    real = strides()
    with FakeTensorMode():
        assert strides() == real


@pytest.mark.parametrize("weight_layout", LAYOUTS)
@pytest.mark.parametrize("input_layout", LAYOUTS)
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("grouping", ["depthwise", "pointwise_or_dense", "grouped"])
@pytest.mark.parametrize("image", IMAGES.values(), ids=IMAGES.keys())
def test_output_strides_are_torchs(
    image: tuple[int, ...], grouping: str, kernel: int, input_layout: str, weight_layout: str, device: str
) -> None:
    channels = image[1]
    groups = {"depthwise": channels, "pointwise_or_dense": 1, "grouped": 2 if channels % 2 == 0 else 1}[grouping]
    for outputs in {channels, 2 * channels, groups}:
        w = random((outputs, channels // groups, kernel, kernel), torch.float32, device, weight_layout)
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            x = random(image, dtype, device, input_layout)
            arguments = (x, w.to(dtype), None, 1, kernel // 2, 1, groups)
            expected, actual = F.conv2d(*arguments), functional.conv2d(*arguments)
            assert strides_with_meaning(actual) == strides_with_meaning(expected), f"{dtype}, {outputs} outputs"
            meta = functional.conv2d(x.to("meta"), w.to("meta", dtype), *arguments[2:])
            assert meta.stride() == actual.stride() and meta.shape == actual.shape


@by_case
def test_unbatched_is_a_batch_of_one(case: Case, device: str) -> None:
    x, w, b = tensors(case, torch.float32, device)
    for image in (x[0], with_layout(x, "channels_last")[0], with_layout(x, "strided")[0]):
        with only_our_kernels():
            y = functional.conv2d(image, w, b, *case.geometry)
        expected = F.conv2d(image, w, b, *case.geometry)
        torch.testing.assert_close(y, expected)
        assert y.stride() == expected.stride()


# ---- torch.compile and torch.export ----------------------------------------------------------------------------------


def small_model(device: str = "cpu") -> nn.Module:
    """A separable block and its strided follower, on this package's layers."""
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.BatchNorm2d(8),
        DepthwiseConv2d(8, 3, padding=1, activation="relu6"),
        PointwiseConv2d(8, 12, bias=False, activation="silu"),
        nn.Conv2d(12, 12, 3, padding="same", groups=4),
        DepthwiseConv2d(12, (3, 5), stride=2, padding=(1, 2), padding_mode="circular"),
    )
    sepconv_ext.convert_(model)
    return model.to(device)


def gradients(model: Callable, x: Tensor, parameters: list[Tensor]) -> tuple[Tensor, ...]:
    x = x.clone().requires_grad_()
    y = model(x)
    return (y.detach(), *torch.autograd.grad(y.square().sum(), (x, *parameters)))


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@by_layout
def test_compile_whole_model(layout: str, device: str) -> None:
    model = small_model(device)
    x = random((2, 3, 17, 16), torch.float32, device, layout)
    eager = gradients(model, x, list(model.parameters()))
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    with only_our_kernels(at_least=12):
        traced = gradients(compiled, x, list(compiled.parameters()))
    for a, b in zip(traced, eager, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        assert a.stride() == b.stride()


@by_case
def test_compile_function_with_dynamic_shapes(case: Case, device: str) -> None:
    """Other sizes run without another compilation. (Sizes that are equal at first would be taken as one symbol.)"""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(functional.conv2d, backend=counter, fullgraph=True, dynamic=True)
    for N, H, W in ((11, 19, 23), (3, 12, 10), (5, 11, 17)):
        x, w, b = tensors(case, torch.float32, device, requires_grad=True)
        x = random((N, case.C, H, W), torch.float32, device).requires_grad_()
        results = []
        for function in (compiled, F.conv2d):
            y = function(x, w, b, *case.geometry)
            results.append((y, *torch.autograd.grad(y.square().sum(), (x, w, b))))
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-3)
    assert counter.frame_count == 1


@pytest.mark.parametrize("padding", ["same", "valid", 1, (1, 0)])
def test_compile_every_spelling_of_padding(padding: object, device: str) -> None:
    x, w = random((2, 4, 6, 7), torch.float32, device), random((4, 1, 2, 3), torch.float32, device)
    for image in (x, x[0]):
        compiled = torch.compile(functional.conv2d, backend="aot_eager", fullgraph=True)
        with only_our_kernels():
            y = compiled(image, w, padding=padding, groups=4)
        torch.testing.assert_close(y, F.conv2d(image, w, padding=padding, groups=4))


def test_compile_by_inductor() -> None:
    """The default backend generates C++ around our ops (forward alone: the compiler is slow)."""
    if shutil.which("g++") is None:
        pytest.skip("inductor needs g++")
    x = random((2, 4, 7, 6), torch.float32, "cpu")
    w = random((4, 1, 3, 3), torch.float32, "cpu")

    def block(x: Tensor) -> Tensor:
        return functional.conv2d(x * 2, w, padding=1, groups=4) + 1

    with torch.no_grad(), only_our_kernels(at_least=1):
        y = torch.compile(block, fullgraph=True)(x)
    torch.testing.assert_close(y, block(x))


def test_convert_after_compile() -> None:
    """A compiled model that is converted afterwards computes the same."""
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.ReLU())
    x = random((1, 4, 6, 6), torch.float32, "cpu")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    expected = compiled(x)
    assert len(sepconv_ext.convert_(compiled)) == 1
    torch.testing.assert_close(compiled(x), expected)
    assert sepconv_ext.revert_(compiled) == 1


def test_export_with_a_dynamic_batch() -> None:
    model = small_model().eval()
    x = random((2, 3, 17, 16), torch.float32, "cpu")
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    targets = [str(node.target) for node in program.graph.nodes]
    assert targets.count("sepconv_ext.conv2d.default") == 4
    for n in (2, 5):
        other = random((n, 3, 17, 16), torch.float32, "cpu", seed=n)
        with only_our_kernels(at_least=4):
            y = program.module()(other)
        torch.testing.assert_close(y, model(other))


# ---- autocast and flop counts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@by_case
def test_autocast(case: Case, dtype: torch.dtype, device: str) -> None:
    """Runs in the reduced type, returns it, and gives the parameters gradients of their own type."""
    results = []
    for convolution, proof in ((functional.conv2d, only_our_kernels(3)), (F.conv2d, contextlib.nullcontext())):
        x, w, b = tensors(case, torch.float32, device, "channels_last", requires_grad=True)
        with proof:
            with torch.autocast(device, dtype=dtype):
                y = convolution(x, w, b, *case.geometry)
            y.float().square().mean().backward()
        assert y.dtype == dtype and x.grad.dtype == w.grad.dtype == b.grad.dtype == torch.float32
        results.append((y.float(), x.grad, w.grad, b.grad))
    tolerance = {torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    for actual, expected in zip(results[0][:2], results[1][:2], strict=True):  # the output and the input's gradient
        assert strides_with_meaning(actual) == strides_with_meaning(expected)
    assert results[0][2].stride() == w.stride()


def test_autocast_leaves_float64_and_mixed_types_to_torchs_rules(device: str) -> None:
    """float64 is not cast, as in torch; a float64 input beside a float32 weight is torch's error."""
    x, w = torch.ones(1, 2, 4, 4, device=device), torch.ones(2, 1, 3, 3, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert functional.conv2d(x.double(), w.double(), groups=2).dtype == torch.float64
        assert functional.conv2d(x.bfloat16(), w, groups=2).dtype == torch.bfloat16
        with pytest.raises(RuntimeError):
            F.conv2d(x.double(), w, groups=2)
        with pytest.raises(RuntimeError):
            functional.conv2d(x.double(), w, groups=2)


def test_autocast_trains_a_converted_model(device: str) -> None:
    """With a GradScaler-free bfloat16 step: losses of torch's layers and of ours stay together."""
    losses = []
    for convert in (False, True):
        torch.manual_seed(5)
        model = nn.Sequential(
            nn.Conv2d(4, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ReLU(), nn.Conv2d(8, 2, 1)
        ).to(device)
        if convert:
            assert len(sepconv_ext.convert_(model)) == 3
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        x, target = random((4, 4, 8, 8), torch.float32, device), random((4, 2, 8, 8), torch.float32, device, seed=9)
        trace = []
        for _ in range(5):
            optimizer.zero_grad()
            with torch.autocast(device, dtype=torch.bfloat16):
                y = model(x)
            loss = F.mse_loss(y.float(), target)
            loss.backward()
            optimizer.step()
            trace.append(loss.item())
        losses.append(trace)
    assert losses[1][-1] < losses[1][0]
    torch.testing.assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    "case", [*FAMILIES, BY_NAME["depthwise_k2_same"], BY_NAME["depthwise_multiplier3_stride2"]], ids=str
)
@pytest.mark.parametrize("needed", [(0, 0), (1, 0), (0, 1), (1, 1)], ids=str)
def test_flop_counts(case: Case, needed: tuple[int, int], device: str) -> None:
    """Two operations a multiply-accumulate in each of the three maps: F.conv2d's figures where torch's are right.

    torch counts the gradient of a grouped weight as if it were dense, that is `groups` times too high.
    """

    def count(convolution: Callable) -> int:
        x, w, _ = tensors(case, torch.float32, device)
        x.requires_grad_(bool(needed[0]))
        w.requires_grad_(bool(needed[1]))
        with FlopCounterMode(display=False) as counter:
            y = convolution(x, w, None, *case.geometry)
            if any(needed):
                y.sum().backward()
        return counter.get_total_flops()

    N, K, P, Q = case.output_size
    one_map = 2 * N * K * P * Q * (case.C // case.groups) * case.R * case.S
    assert count(functional.conv2d) == (1 + sum(needed)) * one_map
    assert count(F.conv2d) == (1 + needed[0] + needed[1] * case.groups) * one_map


# ---- torch.func and forward-mode differentiation ---------------------------------------------------------------------

CASE = FAMILIES[0]


def both(compute: Callable[[Callable], object]) -> tuple[object, object]:
    """The same computation on our conv2d and on torch's."""
    return compute(functional.conv2d), compute(F.conv2d)


@by_case
def test_forward_mode(case: Case, device: str) -> None:
    x, w, b = tensors(case, torch.float64, device)

    def compute(convolution):
        def f(x, w, b):
            return convolution(x, w, b, *case.geometry)

        tangents = torch.randn_like(x, generator=None), torch.ones_like(w), torch.ones_like(b)
        return jvp(f, (x, w, b), (torch.ones_like(x), *tangents[1:]))

    torch.testing.assert_close(*both(compute))


@by_case
@pytest.mark.parametrize("which", ["input", "weight", "bias"])
def test_dual_numbers(which: str, case: Case, device: str) -> None:
    """A tangent on one argument alone, in the dual level of torch.autograd.forward_ad."""
    inputs = dict(zip(("input", "weight", "bias"), tensors(case, torch.float64, device), strict=True))

    def compute(convolution):
        with torch.autograd.forward_ad.dual_level():
            dual = dict(inputs)
            dual[which] = torch.autograd.forward_ad.make_dual(inputs[which], torch.ones_like(inputs[which]))
            y = convolution(*dual.values(), *case.geometry)
            tangent = torch.autograd.forward_ad.unpack_dual(y).tangent
        assert tangent is not None
        return tangent

    torch.testing.assert_close(*both(compute))


def test_forward_mode_gradcheck(device: str) -> None:
    x, w, b = tensors(CASE, torch.float64, device, requires_grad=True)

    def call(x, w, b):
        return functional.conv2d(x, w, b, *CASE.geometry)

    assert torch.autograd.gradcheck(
        call, (x, w, b), check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True, fast_mode=True
    )
    assert torch.autograd.gradgradcheck(call, (x, w, b), check_fwd_over_rev=True, fast_mode=True)


@pytest.mark.parametrize("in_dims", [(0, None), (None, 0), (0, 0), (1, None), (0, 2)], ids=str)
@by_case
def test_vmap(case: Case, in_dims: tuple, device: str) -> None:
    x, w, _ = tensors(case, torch.float64, device)
    xs = x if in_dims[0] is None else torch.stack([x, 2 * x, -x], in_dims[0])
    ws = w if in_dims[1] is None else torch.stack([w, w + 1, -w], in_dims[1])

    def compute(convolution):
        return vmap(lambda x, w: convolution(x, w, None, *case.geometry), in_dims)(xs, ws)

    torch.testing.assert_close(*both(compute))


def test_vmap_of_unbatched_images(device: str) -> None:
    x, w, b = tensors(CASE, torch.float64, device)
    torch.testing.assert_close(*both(lambda f: vmap(lambda image: f(image, w, b, *CASE.geometry))(x)))


def test_jacobians_and_hessian(device: str) -> None:
    x = random((1, 2, 4, 3), torch.float64, device)
    w = random((2, 1, 3, 3), torch.float64, device)

    def compute(convolution):
        def f(x, w):
            return convolution(x, w, None, 1, 1, 1, 2)

        return (
            jacrev(f, argnums=(0, 1))(x, w),
            jacfwd(f, argnums=(0, 1))(x, w),
            hessian(lambda x, w: f(x, w).tanh().sum(), argnums=(0, 1))(x, w),
            vjp(f, x, w)[1](torch.ones(1, 2, 4, 3, dtype=torch.float64, device=device)),
        )

    torch.testing.assert_close(*both(compute))


def test_per_sample_gradients(device: str) -> None:
    """functional_call + grad + vmap over a converted model."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.Tanh(), nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(6, 4, 3, groups=2))
    model = model.double().to(device)
    x = random((5, 3, 7, 7), torch.float64, device)

    def compute() -> dict[str, Tensor]:
        def loss(parameters, image):
            return functional_call(model, parameters, (image[None],)).square().sum()

        parameters = {name: p.detach() for name, p in model.named_parameters()}
        return vmap(grad(loss), in_dims=(None, 0))(parameters, x)

    expected = compute()
    assert len(sepconv_ext.convert_(model)) == 3
    torch.testing.assert_close(compute(), expected)


def test_functional_call_runs_our_kernels(device: str) -> None:
    model = DepthwiseConv2d(4, 3, device=device)
    swapped = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    with only_our_kernels():
        y = functional_call(model, swapped, (torch.ones(1, 4, 5, 5, device=device),))
    assert (y == 10).all()


def test_torch_function_is_honoured() -> None:
    """Subclasses and modes that intercept torch functions see the call, as they see F.conv2d."""
    seen: list[str] = []

    class Spy(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, arguments=(), keywords=None):
            seen.append(getattr(function, "__name__", str(function)))
            return function(*arguments, **(keywords or {}))

    class Tagged(torch.Tensor):
        pass

    x, w = torch.randn(1, 4, 5, 5), torch.randn(4, 1, 3, 3)
    with Spy():
        y = functional.conv2d(x, w, groups=4)
    assert any("conv2d" in name for name in seen)
    torch.testing.assert_close(y, F.conv2d(x, w, groups=4))
    tagged = functional.conv2d(x.as_subclass(Tagged), w, groups=4)
    assert type(tagged) is type(F.conv2d(x.as_subclass(Tagged), w, groups=4)) is Tagged


def test_inference_mode(device: str) -> None:
    x, w, b = tensors(CASE, torch.float32, device, requires_grad=True)
    with torch.inference_mode(), only_our_kernels():
        y = functional.conv2d(x, w, b, *CASE.geometry)
    assert y.is_inference() and not y.requires_grad
    torch.testing.assert_close(y.clone(), F.conv2d(x, w, b, *CASE.geometry).detach())


def test_checkpoint(device: str) -> None:
    """Recomputation in the backward pass gives the same gradients."""
    x, w, b = tensors(CASE, torch.float32, device, requires_grad=True)

    def block(x):
        return functional.conv2d(x, w, b, *CASE.geometry)

    plain = torch.autograd.grad(block(x).square().sum(), (x, w, b))
    again = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
    for a, c in zip(torch.autograd.grad(again.square().sum(), (x, w, b)), plain, strict=True):
        assert torch.equal(a, c)


# ---- CUDA graphs -----------------------------------------------------------------------------------------------------


@pytest.mark.cuda
@by_layout
# One of them a tensor map's, which goes with the launch.
@pytest.mark.parametrize("case", [*FAMILIES, *(c for c in GPU_LAYERS if c.name == "depthwise_fill_boxes_k7")], ids=str)
def test_cuda_graph_capture(case: Case, layout: str) -> None:
    """Forward and both gradients replay from a captured graph, on new data."""
    x, w, b = tensors(case, torch.float32, "cuda", layout, requires_grad=True)
    g = grad_like_output(case, torch.float32, "cuda", layout)

    def step():
        y = functional.conv2d(x, w, b, *case.geometry)
        return (y, *torch.autograd.grad(y, (x, w), g))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x.mul_(-2)
        g.add_(1)
    graph.replay()
    for a, c in zip(captured, step(), strict=True):
        torch.testing.assert_close(a, c)


@pytest.mark.cuda
def test_a_thread_that_has_not_used_its_device() -> None:
    """Autograd's may not have: the driver, which makes tensor maps, wants the context that a launch would bring."""
    (case,) = (case for case in GPU_LAYERS if case.name == "depthwise_fill_boxes_k7")
    x, w, b = tensors(case, torch.float32, "cuda", "channels_last")
    expected = functional.conv2d(x, w, b, *case.geometry)
    functional.conv2d(x, w, b, *case.geometry)  # leaves memory to the thread, which would bring the context too
    with ThreadPoolExecutor(1) as thread:
        result = thread.submit(functional.conv2d, x, w, b, *case.geometry).result()
    assert torch.equal(result, expected)


@pytest.mark.cuda
def test_cuda_graph_of_one_kernel_with_two_sizes_of_shared_memory() -> None:
    """Shared memory is granted to a kernel once for all its launches: a smaller one takes none from an earlier one."""
    (case,) = (case for case in GPU_LAYERS if case.name == "depthwise_fill_k31")
    made = [tensors(case, torch.float32, "cuda", layout) for layout in ("channels_last", "contiguous")]

    def step():  # about 90 and 60 KB a block
        return [functional.conv2d(x, w, b, *case.geometry) for x, w, b in made]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        expected = step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    for a, c in zip(captured, expected, strict=True):
        assert torch.equal(a, c)


@pytest.mark.cuda
def test_the_current_stream_is_used() -> None:
    """On a side stream behind a long sleep, the result waits for the sleep: no kernel runs on the default stream."""
    x, w, b = tensors(CASE, torch.float32, "cuda")
    expected = F.conv2d(2 * x, w, b, *CASE.geometry)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        x.mul_(2)
        y = functional.conv2d(x, w, b, *CASE.geometry)
    side.synchronize()
    torch.testing.assert_close(y, expected)


def test_import_leaves_out_what_only_a_capture_needs() -> None:
    """sympy takes half a second of every process that imports this package, and torch itself does without."""
    program = (
        "import torch, sys; before = 'sympy' in sys.modules; import sepconv_ext; print(before, 'sympy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    before, after = done.stdout.split()
    assert before == after
