"""Inverted residual blocks in networks for a GPU: what freeze and torch.compile make of the plan's words, without one.

The network lies on the CPU in bfloat16, and its plan is asked for a GPU that need not be there: the op of a block
computes the same there by calls.
"""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from harness import random
from sepconv_ext import freeze, functional
from sepconv_ext.nn import Conv2d
from test_cuda_plan import emulate, planned, pytestmark  # noqa: F401  (the mark holds for this module too)
from test_freeze import Block, conv_norm, lived_in, ops

GPUS = {"RTX 4090": (89, 128), "H200": (90, 132)}  # capability, multiprocessors
BLOCK, CALLS = Counter(inverted_residual=1), Counter(conv2d=3)


@pytest.fixture(params=["RTX 4090"])
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The plan speaks for this GPU."""
    sm, multiprocessors = GPUS[request.param]

    def explain(x, we, be, wd, bd, wp, bp, stride, padding, dilation, residual) -> emulate.Planned:
        assert x.is_contiguous(memory_format=torch.channels_last) and {be.dtype, bd.dtype, bp.dtype} == {x.dtype}
        (N, C, H, W), (E, _, R, S), K = x.shape, wd.shape, wp.shape[0]
        assert we.shape == (E, C, 1, 1) and wp.shape == (K, E, 1, 1)
        sides = padding if len(padding) == 4 else (padding[0], padding[0], padding[1], padding[1])
        words = {"stride": stride, "padding": sides, "dilation": dilation}
        return planned(
            op="inverted_residual", map="forward", dtype=str(x.dtype).rpartition(".")[2], layout="channels_last",
            N=N, C=E, H=H, W=W, K=E, R=R, S=S, groups=E, inputs=C, outputs=K, residual=int(residual), strict=0,
            sm=sm, multiprocessors=multiprocessors, **{k: ",".join(map(str, v)) for k, v in words.items()},
        )  # fmt: skip

    monkeypatch.setattr(functional, "explain_inverted_residual", explain)
    return request.param


def found(model: nn.Module, channels: int = 24, size: int = 56) -> Counter[str]:
    """The convolutions of the frozen network, planned for 128 images, which says what the model says."""
    model = lived_in(model).bfloat16()
    frozen = freeze(model, torch.empty(128, channels, size, size, dtype=torch.bfloat16))
    x = random((2, channels, size, size), torch.bfloat16, "cpu")
    with torch.no_grad():
        exact, expected, actual = copy.deepcopy(model).double()(x.double()), model(x), frozen(x)
    error, torchs = ((y.double() - exact).abs().max().item() for y in (actual, expected))
    assert error <= torchs + 0.01 * exact.abs().max().item()
    names = ops(frozen)
    return Counter({name: n for name, n in names.items() if "conv" in name or "residual" in name})


@pytest.mark.parametrize("gpu", GPUS, indirect=True)
def test_a_block_is_one_call_where_the_plan_says_so(gpu: str) -> None:
    assert found(Block(24)) == (BLOCK if gpu == "RTX 4090" else CALLS)


def test_report_and_costs(gpu: str) -> None:
    frozen = freeze(lived_in(Block(24)).bfloat16(), torch.empty(128, 24, 56, 56, dtype=torch.bfloat16))
    (chain,) = frozen.report.fused
    assert (chain.family, chain.name) == ("inverted residual", "expand.0 -> depthwise.0 -> project.0")
    assert chain.summary.startswith("pointwise, batch norm, relu6 -> depthwise, batch norm, relu6 -> pointwise")
    assert len(frozen.report.replaced) == 3 and not frozen.report.skipped
    image = 2 * 128 * 56 * 56 * 24
    assert 2 * image <= frozen.report.costs["bytes"][1] <= 4 * image  # and what is added, which is the input


class Around(Block):
    """A block whose parts are seen by others too, or whose sum is another."""

    def __init__(self, what: str) -> None:
        super().__init__(24)
        self.what = what
        if what == "relu after the sum":
            self.last = nn.ReLU()
        if what == "reflect":
            self.depthwise[0] = Conv2d(72, 72, 3, padding=1, groups=72, bias=False, padding_mode="reflect")
        if what in ("stride before", "stride behind"):
            part = self.expand if what == "stride before" else self.project
            part[0].stride = (2, 2)

    def forward(self, x: Tensor) -> Tensor:
        e = self.expand(x)
        d = self.depthwise(e)
        y = self.project(d)
        if self.what == "relu after the sum":
            return self.last(x + y)
        if self.what == "other sum":
            return y + x.flip(2)
        if self.what == "read between":
            return (y + x) * d.mean((1, 2, 3), keepdim=True)
        if self.what == "squeeze-and-excitation":
            return self.project(d * d.mean((2, 3), keepdim=True).sigmoid())
        return y


@pytest.mark.parametrize("what", ["relu after the sum", "other sum", "no sum"])
def test_sums_of_every_kind(gpu: str, what: str) -> None:
    assert found(Around(what)) == BLOCK


@pytest.mark.parametrize(
    "what", ["reflect", "stride before", "stride behind", "read between", "squeeze-and-excitation"]
)
def test_what_is_no_block_stays_calls(gpu: str, what: str) -> None:
    assert found(Around(what)) == CALLS


def test_blocks_in_a_row_and_pairs_between(gpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A 1x1 belongs to one block alone; what no block takes may be a pair."""
    asked: list[tuple[int, ...]] = []

    def explain(x: Tensor, *weights: object) -> emulate.Planned:
        asked.append(tuple(x.shape))
        return emulate.Planned("composite", {}, "")

    monkeypatch.setattr(functional, "explain_separable", explain)
    wide = conv_norm(24, 24, 3, padding=1, groups=24)
    rest = conv_norm(24, 40, 1)
    assert found(nn.Sequential(Block(24), Block(24), wide, rest)) == Counter(inverted_residual=2, conv2d=2)
    assert asked == [(128, 24, 56, 56)]


def test_by_torch_compile_with_freezing(gpu: str) -> None:
    from sepconv_ext.graph import backend

    seen: list[torch.fx.GraphModule] = []
    freeze_graph = backend._frozen

    def frozen(*given: object) -> object:
        made = freeze_graph(*given)
        seen.append(made)
        return made

    torch.compiler.reset()
    model = lived_in(Block(24)).bfloat16()
    x = random((128, 24, 56, 56), torch.bfloat16, "cpu")
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "_frozen", frozen)
        y = torch.compile(model, backend="sepconv_ext", options={"freezing": True})(x)
        expected = model(x)
    assert ops(seen[0])["inverted_residual"] == 1
    torch.testing.assert_close(y, expected, rtol=3e-2, atol=3e-2 * expected.abs().max().item())
