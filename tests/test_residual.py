"""The op conv2d_residual, activation(conv2d + residual): against float64, its derivatives, and how freeze finds it."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sepconv_ext
from harness import ACTIVATIONS, DTYPES, LAYOUTS, assert_as_accurate, random
from sepconv_ext import functional, reference
from sepconv_ext.graph import lower
from test_cuda_plan import planned, pytestmark  # noqa: F401  (the mark holds for this module too)
from test_freeze import conv_norm, lived_in, ops

op = torch.ops.sepconv_ext.conv2d_residual

# (input, weight, stride, padding, groups): a product, a depthwise layer, groups, padding of four, a sequence.
CALLS = {
    "product": ((2, 8, 7, 6), (12, 8, 1, 1), (1, 1), (0, 0), 1),
    "product stride": ((2, 8, 7, 6), (12, 8, 1, 1), (2, 2), (0, 0), 1),
    "depthwise": ((2, 8, 7, 6), (8, 1, 3, 3), (1, 1), (1, 1), 8),
    "groups": ((2, 8, 7, 6), (4, 4, 3, 3), (1, 1), (2, 0, 1, 1), 2),
    "unbatched": ((8, 7, 6), (12, 8, 1, 1), (1, 1), (0, 0), 1),
    "sequence": ((2, 8, 9), (8, 1, 3), (1,), (1,), 8),
    "no image": ((0, 8, 7, 6), (12, 8, 1, 1), (1, 1), (0, 0), 1),
}
by_call = pytest.mark.parametrize("name", CALLS)


def given(name: str, dtype: torch.dtype = torch.float32, layout: str = "contiguous", device: str = "cpu") -> tuple:
    """The op's arguments but for the activation."""
    size, filters, stride, padding, groups = CALLS[name]
    layout = layout if len(size) == 4 else "contiguous"
    x, w = random(size, dtype, device, layout, seed=1), random(filters, dtype, device, seed=2)
    geometry = (stride, padding, (1,) * len(stride), groups)
    y = torch.ops.sepconv_ext.conv2d(x, w, None, *geometry, "identity")
    return x, w, random((filters[0],), dtype, device, seed=3), random(y.shape, dtype, device, layout, seed=4), *geometry


def expected(x: Tensor, w: Tensor, b: Tensor, r: Tensor, stride, padding, dilation, groups, activation) -> Tensor:
    if len(padding) == 4:
        x, padding = F.pad(x, (*padding[2:], *padding[:2])), (0, 0)
    convolve = F.conv2d if len(stride) == 2 else F.conv1d
    return reference.ACTIVATIONS[activation](convolve(x, w, b, stride, padding, dilation, groups) + r)


@by_call
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values(name: str, layout: str, dtype: torch.dtype, device: str) -> None:
    *tensors, stride, padding, dilation, groups = given(name, dtype, layout, device)
    before = [t.clone() for t in tensors]
    for activation in ("identity", "relu", "silu"):
        rest = (stride, padding, dilation, groups, activation)
        y = op(*tensors, *rest)
        assert y.stride() == torch.ops.sepconv_ext.conv2d(*tensors[:3], *rest[:4], "identity").stride()
        exact = expected(*(t.double() for t in tensors), *rest)
        assert_as_accurate(y, expected(*tensors, *rest), exact)
    assert all(torch.equal(t, kept) for t, kept in zip(tensors, before, strict=True))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_follow_the_sum(activation: str) -> None:
    arguments = given("product", torch.float64)
    torch.testing.assert_close(op(*arguments, activation), expected(*arguments, activation))


def test_residuals_of_any_strides_and_one_image() -> None:
    x, w, b, r, *geometry = given("product", torch.float64, "channels_last")
    for other in (r.contiguous(), r[:1].expand_as(r), r.flip(3)):
        torch.testing.assert_close(op(x, w, b, other, *geometry, "relu"), expected(x, w, b, other, *geometry, "relu"))
    batch = x[:1].expand_as(x)  # computed once, and added to two residuals
    torch.testing.assert_close(op(batch, w, b, r, *geometry, "relu"), expected(batch, w, b, r, *geometry, "relu"))


@by_call
def test_derivatives(name: str) -> None:
    *tensors, stride, padding, dilation, groups = given(name, torch.float64)
    tensors = [t.requires_grad_() for t in tensors]
    call = lambda x, w, b, r: op(x, w, b, r, stride, padding, dilation, groups, "silu")  # noqa: E731
    assert torch.autograd.gradcheck(call, tensors)
    if name == "product":
        assert torch.autograd.gradgradcheck(call, tensors)
        apart = [t.detach() for t in tensors]
        torch.testing.assert_close(torch.func.vmap(call, (0, None, None, 0))(*apart), call(*apart))


def test_torchs_machinery() -> None:
    for name in ("product", "depthwise", "sequence"):
        *tensors, stride, padding, dilation, groups = given(name)
        rest = (list(stride), list(padding), list(dilation), groups, "relu")
        torch.library.opcheck(op.default, (*tensors, *rest))
        torch.library.opcheck(op.default, (*(t.requires_grad_() for t in tensors), *rest))
    arguments = given("product")
    with torch.autocast("cpu", torch.bfloat16):
        assert op(*arguments, "relu").dtype == torch.bfloat16
    with torch.inference_mode():
        torch.testing.assert_close(op(*arguments, "gelu"), expected(*arguments, "gelu"))
    compiled = torch.compile(lambda *a: op(*a, "relu"), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*arguments), expected(*arguments, "relu"))


def test_wrong_arguments_are_named() -> None:
    x, w, b, r, *geometry = given("product")
    with pytest.raises(RuntimeError, match=r"residual must have the result's size \[2, 12, 7, 6\], but has \[2, 12, 7"):
        op(x, w, b, r[..., :5], *geometry, "relu")
    with pytest.raises(RuntimeError, match=r"residual.*(float64|double|Double)"):
        op(x, w, b, r.double(), *geometry, "relu")
    with pytest.raises(ValueError, match="swish"):
        op(x, w, b, r, *geometry, "swish")


def test_no_plan_of_the_cpu_adds_a_residual() -> None:
    x, w, b, *_ = given("product")
    assert not functional.explain(x, w, b, residual=True).adds_residual


# --- networks, as a plan for a GPU has them: on the CPU in bfloat16, where the op is a sum behind the convolution ---


class Bottleneck(nn.Module):
    """The last product of a residual block, and what follows the sum."""

    def __init__(self, C: int, K: int, last: nn.Module, kernel: int = 1) -> None:
        super().__init__()
        self.first = conv_norm(K, C, 1)
        self.product = conv_norm(C, K, kernel, padding=kernel // 2, act=nn.Identity)
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.product(self.first(x)) + x)


class Permuted(nn.Module):
    """A block of ConvNeXt behind its depthwise layer: Linear layers over channels, the block's scale, the sum."""

    def __init__(self, C: int) -> None:
        super().__init__()
        self.norm, self.expand, self.project = nn.LayerNorm(C), nn.Linear(C, 4 * C), nn.Linear(4 * C, C)
        self.scale = nn.Parameter(torch.rand(C, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(F.gelu(self.expand(self.norm(x.permute(0, 2, 3, 1)))))
        return x + self.scale * y.permute(0, 3, 1, 2)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[sepconv_ext._C.Explanation]:
    """The plan speaks for an H200."""
    answers = []

    def explain(x, w, b, stride, padding, dilation, groups, activation, residual):
        assert x.is_contiguous(memory_format=torch.channels_last) and w.dtype == b.dtype == x.dtype and residual
        (N, C, H, W), (K, _, R, S) = x.shape, w.shape
        sides = padding if len(padding) == 4 else (padding[0], padding[0], padding[1], padding[1])
        words = {"stride": stride, "padding": sides, "dilation": dilation}
        plan = planned(
            map="forward", dtype=str(x.dtype).rpartition(".")[2], layout="channels_last", N=N, C=C, H=H, W=W, K=K,
            R=R, S=S, groups=groups, residual=1, activation=activation, strict=0, sm=90, multiprocessors=132,
            **{k: ",".join(map(str, v)) for k, v in words.items()},
        )  # fmt: skip
        answers.append(plan)
        return type("Said", (), {"adds_residual": plan.kernel == "cuda_pointwise_nhwc_mma"})

    monkeypatch.setattr(lower.functional, "explain", explain)
    return answers


def found(model: nn.Module, channels: int, size: int) -> Counter[str]:
    """The ops of the network, frozen for 128 images, which says what the model says."""
    model = lived_in(model).bfloat16()
    frozen = sepconv_ext.freeze(model, torch.empty(128, channels, size, size, dtype=torch.bfloat16))
    x = random((2, channels, size, size), torch.bfloat16, "cpu")
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(frozen(x), expected, rtol=3e-2, atol=3e-2 * expected.abs().max().item())
    return Counter({name: n for name, n in ops(frozen).items() if name.startswith(("conv", "add", "relu"))})


@pytest.mark.parametrize("last", [nn.Identity(), nn.ReLU(), nn.SiLU()])
def test_freeze_puts_the_sum_and_what_follows_it_into_the_product(asked: list, last: nn.Module) -> None:
    assert found(Bottleneck(128, 256, last), 256, 28) == Counter(conv2d=1, conv2d_residual=1)
    assert len(asked) == 1


def test_freeze_does_so_in_blocks_of_convnext(asked: list) -> None:
    counted = found(Permuted(96), 96, 56)
    assert counted == Counter(conv2d=1, conv2d_residual=1)


def test_freeze_leaves_sums_that_no_kernel_adds(asked: list) -> None:
    assert found(Bottleneck(1024, 256, nn.ReLU()), 256, 7)["conv2d_residual"] == 0
    assert found(Bottleneck(16, 16, nn.ReLU(), kernel=3), 16, 7)["conv2d_residual"] == 0
    assert len(asked) == 2
