"""Inverted residual blocks: the fused kernel against float64 on every instruction set, gradients, errors, machinery."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import sepconv_ext
from harness import LAYOUTS, assert_as_accurate, dtype_name, only_our_kernels, random, with_layout
from sepconv_ext import functional, reference

sys.path.insert(0, str(Path(__file__).parent / "emulator"))
import emulate


class Block(NamedTuple):
    name: str
    N: int
    C: int
    H: int
    W: int
    E: int  # C where nothing is expanded
    K: int
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] | str = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    M: int = 0
    activations: tuple[str, str, str] = ("relu6", "relu6", "identity")
    squeeze: tuple[str, str] = ("silu", "sigmoid")
    residual: bool = False
    bias: bool = True
    expands: bool = True

    def __str__(self) -> str:
        return self.name


# One channel, one row, one pixel; vectors, panels and blocks of pixels not full; strides and paddings of every kind, of
# half a kernel at one end of a row of vectors or at both; taps and steps without a kernel of their own; bands, rings
# that wrap, more than one part of the channels, and of the vectors that go together; images beyond the second-level
# cache; pixels a page apart; nothing.
BLOCKS = (
    Block("plain", 2, 24, 14, 14, 96, 24, residual=True),
    Block("awkward", 3, 3, 19, 7, 58, 5, activations=("silu", "gelu", "hardswish")),
    Block("one_channel", 1, 1, 7, 9, 1, 1, residual=True, bias=False),
    Block("one_row", 2, 8, 1, 19, 24, 8, residual=True),
    Block("page", 1, 1024, 5, 9, 544, 16),
    Block("one_pixel", 5, 24, 1, 1, 40, 16),
    Block("stride", 1, 16, 19, 19, 33, 24, stride=(2, 2)),
    Block("stride_5", 1, 16, 20, 17, 48, 24, (5, 5), (2, 2), (2, 2), activations=("silu", "silu", "identity")),
    Block("stride_7", 1, 16, 15, 15, 32, 8, (7, 7), (2, 2), (3, 3)),
    Block("stride_3", 2, 8, 13, 14, 40, 8, stride=(3, 3)),
    Block("stride_1_2", 1, 8, 9, 16, 24, 8, stride=(1, 2)),
    Block(
        "kernel_7",
        1,
        24,
        12,
        11,
        24,
        24,
        (7, 7),
        (1, 1),
        (3, 3),
        expands=False,
        activations=("relu", "identity", "gelu"),
    ),
    Block("kernel_1x4", 2, 6, 8, 9, 18, 4, (1, 4), (1, 1), (0, 2)),
    Block("kernel_4x2", 1, 6, 9, 8, 20, 4, (4, 2), (2, 1), (2, 0)),
    Block("dilation", 2, 16, 15, 13, 24, 16, (3, 3), (1, 1), (2, 3), (2, 3), residual=True),
    Block("same", 1, 16, 9, 8, 24, 16, (4, 4), padding="same", residual=True),
    Block("no_padding", 1, 16, 9, 9, 24, 8, padding=(0, 0)),
    Block("wide_padding", 1, 4, 3, 2, 20, 4, padding=(4, 5)),
    Block("edges_3", 1, 16, 14, 7, 40, 24, activations=("hardswish", "relu", "identity")),
    Block("edges_5", 1, 16, 7, 14, 72, 40, (5, 5), padding=(2, 2), activations=("relu", "hardswish", "hardswish")),
    Block("edges_5_both", 2, 24, 14, 7, 120, 24, (5, 5), padding=(2, 2), residual=True),
    Block("edges_5_stride", 1, 16, 14, 28, 48, 24, (5, 5), (2, 2), (2, 2)),
    Block("edges_7", 1, 8, 15, 14, 40, 8, (7, 7), padding=(3, 3)),
    Block("edges_gate", 1, 16, 7, 7, 40, 24, (5, 5), padding=(2, 2), M=4, squeeze=("relu", "hardsigmoid")),
    Block("separable", 2, 40, 13, 15, 40, 24, expands=False, activations=("relu", "relu", "relu")),
    Block("bands", 1, 16, 56, 56, 96, 24),
    Block("bands_stride", 1, 16, 60, 61, 144, 24, (5, 5), (2, 2), (2, 2)),
    Block("many_channels", 1, 24, 5, 18, 530, 24),
    Block("more_channels", 1, 8, 4, 15, 1100, 8),
    Block("far", 1, 40, 61, 67, 40, 24, expands=False),
    Block("far_bands", 1, 96, 49, 50, 96, 40, stride=(2, 2), expands=False),
    Block("far_stride", 2, 72, 47, 53, 72, 40, (5, 5), (2, 2), (2, 2), expands=False),
    Block("gate", 2, 24, 9, 10, 72, 40, M=6, activations=("silu", "silu", "identity"), residual=False),
    Block("gate_pixels", 1, 24, 5, 5, 72, 40, (5, 5), padding=(2, 2), M=18),
    Block("gate_hard", 3, 17, 7, 6, 70, 17, M=5, squeeze=("relu", "hardsigmoid"), residual=True),
    Block("gate_separable", 1, 32, 30, 31, 32, 16, M=8, expands=False),
    Block("gate_many_channels", 1, 8, 5, 18, 530, 8, M=4, residual=True),
    Block("gate_bands", 1, 16, 80, 70, 80, 24, stride=(2, 2), M=4),
    Block("gate_one_pixel", 2, 8, 1, 1, 20, 8, M=3, residual=True, bias=False),
    Block("empty", 0, 8, 5, 5, 24, 8, M=4, residual=True),
)
by_block = pytest.mark.parametrize("block", BLOCKS, ids=str)
by_layout = pytest.mark.parametrize("layout", LAYOUTS)


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """Fresh memory is full of NaN, so that an output element that a kernel forgets is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def tensors(block: Block, dtype: torch.dtype = torch.float32, layout: str = "channels_last") -> list[Tensor | None]:
    """Input; weight and bias of expand, depthwise, project, squeeze and excite. Sums are of the input's size."""
    weight_layout = "strided" if layout == "strided" else "contiguous"

    def pair(seed: int, K: int, C: int, kernel: tuple[int, int] = (1, 1)) -> list[Tensor | None]:
        weight = random((K, C, *kernel), dtype, "cpu", weight_layout, seed=seed)
        weight.mul_((C * kernel[0] * kernel[1]) ** -0.5)
        return [weight, random((K,), dtype, "cpu", seed=seed + 10) if block.bias else None]

    made = [random((block.N, block.C, block.H, block.W), dtype, "cpu", layout, seed=1)]
    made += pair(2, block.E, block.C) if block.expands else [None, None]
    made += pair(3, block.E, 1, block.kernel) + pair(4, block.K, block.E)
    made += pair(5, block.M, block.E) + pair(6, block.E, block.M) if block.M else [None] * 4
    return made


def ours(block: Block, *given: Tensor | None) -> Tensor:
    return functional.inverted_residual(
        *given[:7],
        block.stride,
        block.padding,
        block.dilation,
        *block.activations,
        block.residual,
        *given[7:],
        squeeze_activation=block.squeeze[0],
        gate=block.squeeze[1],
    )


def torchs(block: Block, *given: Tensor | None) -> tuple[Tensor, Tensor]:
    """The output, and what stands before its activation."""
    x, we, be, wd, bd, wp, bp, ws, bs, wx, bx = given
    expand, depthwise, project = (reference.ACTIVATIONS[name] for name in block.activations)
    e = x if we is None else expand(F.conv2d(x, we, be))
    d = depthwise(F.conv2d(e, wd, bd, block.stride, block.padding, block.dilation, block.E))
    if ws is not None:
        squeezed = reference.ACTIVATIONS[block.squeeze[0]](F.conv2d(d.mean((2, 3), keepdim=True), ws, bs))
        d = d * getattr(F, block.squeeze[1])(F.conv2d(squeezed, wx, bx))
    y = F.conv2d(d, wp, bp)
    if block.residual:
        y = y + x
    return project(y), y


def check(block: Block, y: Tensor, given: list[Tensor | None]) -> None:
    expected, before = torchs(block, *(t if t is None else t.double() for t in given))
    assert_as_accurate(y, torchs(block, *given)[0], expected, str(block), summed=before)


@by_block
def test_against_float64(block, isa):
    given = tensors(block)
    sepconv_ext.reset_kernel_counts()
    y = ours(block, *given)
    # One channel or one pixel lies both ways, and is taken for contiguous.
    kernel = y.numel() > 0 and block.C > 1 and block.H * block.W > 1
    assert ("cpu_inverted_residual" in sepconv_ext.kernel_counts()) == kernel
    assert not kernel or y.is_contiguous(memory_format=torch.channels_last)
    check(block, y, given)


@by_layout
@by_block
def test_layouts(block, layout):
    given = tensors(block, layout=layout)
    check(block, ours(block, *given), given)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["plain", "gate_hard"])
def test_other_dtypes(name, dtype):
    block = next(b for b in BLOCKS if b.name == name)
    given = tensors(block, dtype)
    y = ours(block, *given)
    expected = torchs(block, *(t if t is None else t.double() for t in given))[0]
    bound = {torch.float64: 1e-12, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    assert y.dtype == dtype
    assert (y.double() - expected).abs().max() <= bound * expected.abs().max()


@pytest.mark.parametrize(
    "name", ["plain", "awkward", "bands_stride", "separable", "gate", "gate_bands", "gate_separable"]
)
def test_results_do_not_depend_on_threads(name):
    block = next(b for b in BLOCKS if b.name == name)
    for N in (1, 2, 5):
        given = tensors(block._replace(N=N))
        results = []
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            results.append(ours(block, *given))
        assert all(torch.equal(results[0], other) for other in results[1:])


def test_slices_and_unbatched():
    block = BLOCKS[0]
    given = tensors(block)
    whole = ours(block, *given)
    wide = torch.full((2, 30, 14, 14), float("nan")).to(memory_format=torch.channels_last)
    wide[:, 3:27] = given[0]
    torch.testing.assert_close(ours(block, wide[:, 3:27], *given[1:]), whole)
    torch.testing.assert_close(ours(block, given[0][1], *given[1:]), whole[1])


SMALL = Block("small", 2, 3, 5, 4, 6, 3, M=2, activations=("tanh", "silu", "sigmoid"), residual=True)
SMALL_SEPARABLE = Block(
    "small_separable", 2, 4, 5, 5, 4, 3, stride=(2, 2), activations=("tanh", "gelu", "tanh"), expands=False
)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("block", [SMALL, SMALL_SEPARABLE], ids=str)
def test_gradients_of_first_and_second_order(block, layout):
    given = [t if t is None else t.requires_grad_() for t in tensors(block, torch.float64, layout)]
    present = [t for t in given if t is not None]

    def call(*values: Tensor) -> Tensor:
        left = iter(values)
        return ours(block, *(None if t is None else next(left) for t in given))

    assert gradcheck(call, present)
    assert gradgradcheck(call, present)


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.name in ("plain", "gate", "separable")], ids=str)
def test_gradients_are_torchs(block):
    given = [t if t is None else t.requires_grad_() for t in tensors(block)]
    present = [t for t in given if t is not None]
    y = ours(block, *given)
    g = torch.randn_like(y)
    actual = torch.autograd.grad(y, present, g)
    expected = torch.autograd.grad(torchs(block, *given)[0], present, g)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-3, atol=1e-3)
    # With gradients the values are those of inference, up to the order of additions.
    with torch.no_grad():
        torch.testing.assert_close(ours(block, *given), y.detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", ["plain", "awkward", "gate_hard", "separable", "same"])
def test_opcheck(name, layout):
    block = next(b for b in BLOCKS if b.name == name)
    x, we, be, wd, bd, wp, bp, ws, bs, wx, bx = tensors(block._replace(H=7, W=6), layout=layout)
    padding = functional._padding(block.padding, wd.shape, block.stride, block.dilation)
    arguments = (x, we, be, wd, bd, wp, bp, ws, bs, wx, bx, block.stride, padding, block.dilation)
    names = (*block.activations[:2], *block.squeeze, block.activations[2], block.residual)
    op = torch.ops.sepconv_ext.inverted_residual.default
    torch.library.opcheck(op, (*arguments, *names))
    torch.library.opcheck(op, (x.clone().requires_grad_(), *arguments[1:], *names))


def test_compile_export_and_transforms():
    block = next(b for b in BLOCKS if b.name == "gate")
    given = tensors(block)
    y = ours(block, *given)
    with torch.no_grad():
        compiled = torch.compile(lambda *t: ours(block, *t), fullgraph=True, backend="aot_eager")(*given)
    assert torch.equal(compiled, y)

    class Module(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return ours(block, x, *given[1:])

    with torch.no_grad():
        exported = torch.export.export(Module(), (given[0],))
    assert any("inverted_residual" in str(node.target) for node in exported.graph.nodes)
    assert torch.equal(exported.module()(given[0]), y)
    mapped = torch.func.vmap(lambda x: ours(block, x[None], *given[1:])[0])(given[0])
    torch.testing.assert_close(mapped, y, rtol=1e-4, atol=1e-4)


def explained(block: Block, *given: Tensor | None):
    return functional.explain_inverted_residual(
        *given[:7], block.stride, block.padding, block.dilation, block.residual, *given[7:]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32], ids=str)
@by_layout
@pytest.mark.parametrize("name", ["plain", "gate", "separable", "one_pixel", "same"])
def test_the_plan_explains_itself(name, layout, dtype):
    block = next(b for b in BLOCKS if b.name == name)
    given = [t if t is None else t.to(dtype) for t in tensors(block, layout=layout)]
    said = explained(block, *given)
    assert said.reason and said.aten == (dtype == torch.int32)
    if dtype == torch.int32:
        return
    sepconv_ext.reset_kernel_counts()
    ours(block, *given)
    ran = "cpu_inverted_residual" in sepconv_ext.kernel_counts()
    assert ran == (said.kernel == "cpu_inverted_residual") and (ran or said.kernel == "composite")
    assert not (name == "plain" and layout == "channels_last" and dtype == torch.float32) or ran


def test_explaining_other_ranks_devices_and_errors():
    block = BLOCKS[0]
    given = tensors(block)
    assert explained(block, given[0][1], *given[1:]).kernel == "composite"  # unbatched: no image of its own
    with pytest.raises(RuntimeError, match=r"a residual needs an output of input's size \[24, 14, 14\]"):
        explained(block._replace(stride=(2, 2)), *given)
    meta = [t if t is None else t.to("meta") for t in given]
    said = explained(block, *meta)
    assert said.kernel == "composite" and "no kernel for this device" in said.reason
    import sepconv_ext._C as compiled

    place = (block.stride, block.padding, block.dilation, block.residual)
    if sepconv_ext.has_cuda():
        # For a GPU that need not be there.
        half = [t if t is None else t.bfloat16() for t in given]
        said = compiled.explain_inverted_residual(*half, *place, cuda_device=(84, 75))
        assert said.kernel == "composite" and said.reason
    else:
        with pytest.raises(RuntimeError, match="cuda_device was given, but this build has no CUDA part"):
            compiled.explain_inverted_residual(*given, *place, cuda_device=(84, 86))


def test_flops_are_counted():
    from torch.utils.flop_counter import FlopCounterMode

    block = next(b for b in BLOCKS if b.name == "gate")
    counts = []
    for call in (ours, lambda *given: torchs(*given)[0]):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            call(block, *tensors(block))
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]


def test_autocast():
    block = BLOCKS[0]
    given = tensors(block)
    with torch.autocast("cpu", torch.bfloat16):
        y = ours(block, *given)
    assert y.dtype == torch.bfloat16


ERRORS = {
    "depthwise_weight must have size [96, 1, R, S]": dict(depthwise_weight=torch.randn(95, 1, 3, 3)),
    "expand_weight must have 24 input channels": dict(expand_weight=torch.randn(96, 23, 1, 1)),
    "project_weight must have 96 input channels": dict(project_weight=torch.randn(24, 95, 1, 1)),
    "project_weight must have a kernel of 1x1": dict(project_weight=torch.randn(24, 96, 3, 3)),
    "expand_bias": dict(expand_bias=torch.randn(95)),
    "squeeze_weight and excite_weight come together, but excite_weight is None": dict(
        squeeze_weight=torch.randn(4, 96, 1, 1)
    ),
    "squeeze_bias needs a squeeze_weight": dict(squeeze_bias=torch.randn(4)),
    "excite_weight must have 96 output channels": dict(
        squeeze_weight=torch.randn(4, 96, 1, 1), excite_weight=torch.randn(95, 4, 1, 1)
    ),
    "a residual needs an output of input's size [24, 14, 14], but it is [24, 7, 7]": dict(stride=2),
    "depthwise_weight has dtype Double, but input has dtype Float": dict(
        depthwise_weight=torch.randn(96, 1, 3, 3, dtype=torch.float64)
    ),
    "input must have 4 dimensions, but has 2": dict(input=torch.randn(24, 14)),
}


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("message", ERRORS)
def test_errors_name_the_argument(message, requires_grad):
    names = "input expand_weight expand_bias depthwise_weight depthwise_bias project_weight project_bias".split()
    arguments = dict(zip(names, tensors(BLOCKS[0])[:7], strict=True))
    arguments |= dict(stride=1, padding=1, residual=True) | ERRORS[message]
    if requires_grad:
        arguments["project_weight"] = arguments["project_weight"].clone().requires_grad_()
    with pytest.raises(RuntimeError) as error:
        functional.inverted_residual(**arguments)
    assert message in str(error.value)


def test_unknown_names_are_value_errors():
    given = tensors(BLOCKS[0])
    with pytest.raises(ValueError, match="gate must be one of sigmoid, hardsigmoid, but is 'softmax'"):
        functional.inverted_residual(*given[:7], gate="softmax", padding=1)
    with pytest.raises(ValueError, match="activation must be one of"):
        functional.inverted_residual(*given[:7], expand_activation="mish", padding=1)


def test_strided_biases_and_weights():
    block = next(b for b in BLOCKS if b.name == "gate")
    given = tensors(block)
    strided = [
        t if t is None or t.dim() == 4 else with_layout(t[:, None, None, None], "strided").flatten() for t in given
    ]
    every_second = [t if t is None or t.dim() == 4 else torch.stack([t, t * 0], 1)[:, 0] for t in given]
    assert torch.equal(ours(block, *every_second), ours(block, *given))
    assert torch.equal(ours(block, *strided), ours(block, *given))


def in_one_kernel(block: Block) -> bool:
    """Whether the CUDA kernel can compute it: whole vectors of channels, 3x3 and 5x5 of stride 1 and 2.

    A tile's pixels are in shared memory with all of their input's channels: 1024 are too many."""
    whole = block.C % 8 == block.E % 8 == block.K % 8 == 0 and block.N > 0 and not block.M and block.C < 1024
    plain = block.dilation == (1, 1) and block.padding != "same" and (block.expands or not block.residual)
    return whole and plain and block.kernel in ((3, 3), (5, 5)) and block.stride in ((1, 1), (2, 2))


@pytest.mark.emulated
@pytest.mark.skipif(emulate.why_not() is not None, reason=str(emulate.why_not()))
def test_which_blocks_are_one_kernel_on_a_gpu() -> None:
    """By the plan, which needs no GPU: test_on_a_gpu holds the GPU to it."""

    def words(b: Block) -> list[str]:
        top, left = (0, 0) if b.padding == "same" else b.padding
        case = {"op": "inverted_residual", "dtype": "float16", "layout": "channels_last", "N": b.N, "H": b.H, "W": b.W}
        case |= {"C": b.E, "K": b.E, "groups": b.E, "R": b.kernel[0], "S": b.kernel[1]}
        case |= {"padding": f"{top},{top},{left},{left}", "inputs": b.C if b.expands else 0, "outputs": b.K}
        case |= {"stride": f"{b.stride[0]},{b.stride[1]}", "dilation": f"{b.dilation[0]},{b.dilation[1]}"}
        return [f"{key}={value}" for key, value in (case | {"residual": int(b.residual)}).items()]

    blocks = [b for b in BLOCKS if b.N and not b.M]  # what else the binding leaves to calls
    planned = emulate.planned_kernels([words(b) for b in blocks])
    assert [k == "cuda_inverted_residual" for k in planned] == [in_one_kernel(b) for b in blocks]
    assert sum(map(in_one_kernel, BLOCKS)) >= 10


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize("block", [b for b in BLOCKS if in_one_kernel(b) and b.H * b.W > 1], ids=str)
def test_on_a_gpu(block: Block, dtype: torch.dtype) -> None:
    """One pixel has no layout, and goes by calls."""
    given = tensors(block, dtype)
    exact, before = torchs(block, *(t if t is None else t.double() for t in given))
    on_gpu = [t if t is None else t.cuda() for t in given]
    on_gpu[0] = on_gpu[0].contiguous(memory_format=torch.channels_last)
    with only_our_kernels():
        y = ours(block, *on_gpu)
        assert sepconv_ext.kernel_counts() == {"cuda_inverted_residual": 1}
    close = 8 * torch.finfo(dtype).eps * before.abs().max().item()
    torch.testing.assert_close(y.cpu().double(), exact, rtol=0, atol=close)
