"""Costs: the closed formulas, torch's own counting of operations on whole networks, and a model left as it was."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import sepconv_ext
from sepconv_ext import functional
from sepconv_ext.cost import Cost, cost
from sepconv_ext.nn import Conv2d, DepthwiseConv2d, PointwiseConv2d, SeparableConv2d, SpatialSeparableConv2d

N, C, K, H, W = 2, 8, 12, 10, 9
P, Q = 5, 9  # stride (2, 1), padding 1, 3x3


def counted(model: nn.Module, *inputs: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(*inputs)
    return counter.get_total_flops() // 2


FORMULAS = {
    "dense": (nn.Conv2d(C, K, 3, (2, 1), 1), K * C * 9 * P * Q, K * C * 9 + K, (N, K, P, Q)),
    "grouped": (nn.Conv2d(C, K, 3, (2, 1), 1, groups=4), K * C * 9 // 4 * P * Q, K * C * 9 // 4 + K, (N, K, P, Q)),
    "depthwise": (DepthwiseConv2d(C, 3, (2, 1), 1, multiplier=3), C * 3 * 9 * P * Q, C * 30, (N, 3 * C, P, Q)),
    "pointwise": (PointwiseConv2d(C, K, bias=False), K * C * H * W, K * C, (N, K, H, W)),
    "transposed": (
        nn.ConvTranspose2d(C, K, 3, 2, groups=2),
        H * W * C * K * 9 // 2,
        C * K * 9 // 2 + K,
        (N, K, 21, 19),
    ),
    "norm": (nn.BatchNorm2d(C), 0, 2 * C, (N, C, H, W)),
    "linear": (nn.Linear(W, 5), C * H * W * 5, W * 5 + 5, (N, C, H, 5)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", FORMULAS)
def test_the_closed_formulas(kind: str, dtype: torch.dtype) -> None:
    """Each layer has a cost that was written down by hand, and that torch counts too."""
    layer, macs, parameters, output_size = FORMULAS[kind]
    report = cost(layer, (N, C, H, W), dtype)
    assert [part.kind for part in report.layers] == [kind]
    part = report.layers[0]
    assert part.input_size == (N, C, H, W) and part.output_size == output_size
    assert (report.macs, report.parameters) == (part.macs, part.parameters) == (N * macs, parameters)
    moved = N * C * H * W + parameters + torch.Size(output_size).numel()
    assert report.bytes == part.bytes == moved * dtype.itemsize
    assert report.intensity == part.intensity == pytest.approx(2 * N * macs / (moved * dtype.itemsize))
    assert report.macs == counted(layer, torch.zeros(N, C, H, W))


def test_one_and_three_dimensions() -> None:
    for layer, size in ((nn.Conv1d(4, 8, 3, groups=4), (2, 4, 10)), (nn.Conv3d(2, 3, 2), (1, 2, 4, 5, 6))):
        assert cost(layer, size).macs == counted(layer, torch.zeros(size)) > 0


def test_a_separable_pair_costs_what_the_formula_says() -> None:
    T = 2
    pair = nn.Sequential(
        DepthwiseConv2d(C, 3, padding=1, multiplier=T, bias=False), PointwiseConv2d(C * T, K, bias=False)
    )
    report = cost(pair, (N, C, H, W))
    assert report.macs == N * H * W * (C * 9 * T + C * T * K)
    assert report.parameters == C * 9 * T + C * T * K
    assert {kind: part.macs for kind, part in report.by_kind().items()} == {
        "depthwise": N * H * W * C * 9 * T,
        "pointwise": N * H * W * C * T * K,
    }


@pytest.mark.parametrize("norm", [None, "batch"])
def test_a_separable_layer_is_one_layer(norm: str | None) -> None:
    """Its intermediate costs no bytes; the counting leaves nothing behind in what the layer keeps folded."""
    T = 2
    layer = SeparableConv2d(C, K, 3, stride=2, multiplier=T, norm=norm, activation="relu").eval()
    x = torch.randn(N, C, H, W)
    with torch.no_grad():
        before = layer(x)
        report = cost(layer, (N, C, H, W))
        assert torch.equal(layer(x), before)
    assert [part.kind for part in report.layers] == ["separable"]
    assert report.macs == N * 5 * 5 * (C * 9 * T + C * T * K) == counted(layer, x)
    parameters = sum(p.numel() for p in layer.parameters())
    assert report.bytes == 4 * (N * C * H * W + parameters + N * K * 5 * 5)
    fresh = SeparableConv2d(C, K, 3, norm=norm).eval()
    cost(fresh, (N, C, H, W))
    assert type(fresh(x)) is torch.Tensor


@pytest.mark.parametrize("padding,W_between", [("same", W), (0, W), ((0, 3), W), ("reflect", W + 4)], ids=str)
@pytest.mark.parametrize("shared", [False, True])
def test_a_spatially_separable_layer(shared: bool, padding: object, W_between: int) -> None:
    mode = dict(padding_mode="reflect") if padding == "reflect" else dict(padding=padding)
    layer = SpatialSeparableConv2d(C, (3, 5), shared=shared, **mode)
    report = cost(layer, (N, C, H, W))
    _, _, P, Q = report.layers[0].output_size
    assert report.layers[0].kind == "spatial"
    assert report.macs == N * C * P * (3 * W_between + 5 * Q) == counted(layer, torch.zeros(N, C, H, W))
    assert report.parameters == (1 if shared else C) * 8


NETWORKS = ["mobilenet_v2", "resnext50_32x4d", "convnext_tiny", "shufflenet_v2_x1_0"]


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_cost_what_torch_counts(name: str) -> None:
    """Before and after convert_, without a remainder that belongs to no layer."""
    models = pytest.importorskip("torchvision.models")
    with torch.device("meta"):
        model = models.get_model(name)
    size = (2, 3, 96, 64)
    before = cost(model, size)
    assert before.macs == counted(model, torch.empty(size, device="meta")) > 0
    assert before.parameters == sum(p.numel() for p in model.parameters())
    assert sum(part.macs for part in before.layers if part.kind == "other") == 0
    assert len(sepconv_ext.convert_(model)) > 0
    after = cost(model, size)
    assert after.macs == counted(model, torch.empty(size, device="meta"))
    assert after.layers == before.layers


def test_attention_is_counted_in_other() -> None:
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    report = cost(model, (3, 7, 16))
    heads = 3 * 7 * 7 * 16 * 2  # scores and their use
    assert report.macs == 3 * 7 * (16 * 48 + 16 * 16 + 16 * 32 * 2) + heads
    assert report.layers[-1].kind == "other" and report.parameters == sum(p.numel() for p in model.parameters())


class Twice(nn.Module):
    """Calls one layer twice, another under two names, and owns a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.a = Conv2d(4, 4, 1)
        self.b = nn.Conv2d(4, 4, 3, padding=1)
        self.c = self.b
        self.d = nn.Conv2d(4, 4, 3, padding=1)
        self.d.weight = self.b.weight
        self.scale = nn.Parameter(torch.ones(4, 1, 1))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = self.d(self.c(self.b(self.a(self.a(x)))))
        return self.scale * functional.depthwise_conv2d(x, self.b.weight[:, :1]) + y


def test_shared_layers_and_parameters() -> None:
    """Every call costs; every parameter counts once; a functional call outside of layers is in `other`."""
    report = cost(Twice(), [(1, 4, 6, 6), (1, 4, 4, 4)])
    pixels = 36
    assert [(part.name, part.macs) for part in report.layers] == [
        ("a", 2 * 16 * pixels), ("b", 2 * 144 * pixels), ("d", 144 * pixels), ("other", 16 * 4 * 9)
    ]  # fmt: skip
    assert [part.parameters for part in report.layers] == [20, 148, 4, 4]
    assert report.parameters == sum(p.numel() for p in Twice().parameters())
    assert report.layers[0].bytes == 2 * (4 * pixels + 20 + 4 * pixels) * 4


def test_the_model_stays_as_it_was() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Conv2d(4, 4, 1)).train()
    model[1].eval()
    before = copy.deepcopy(model.state_dict())
    cost(model, (2, 3, 8, 8))
    assert [module.training for module in model.modules()] == [True, True, False, True, True]
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.values(), strict=True))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert model(torch.ones(2, 3, 8, 8)).requires_grad


def test_a_failing_model_is_left_in_order() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3)).train()
    with pytest.raises(RuntimeError):
        cost(model, (1, 5, 8, 8))
    assert model.training and not model[0]._forward_hooks and not model[0]._forward_pre_hooks
    assert torch.backends.mha.get_fastpath_enabled()


def test_other_dtypes_and_a_conversion_change_bytes_only() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 8, 1)).half()
    full, half = cost(model, (1, 4, 8, 8)), cost(model, (1, 4, 8, 8), torch.float16)
    assert (full.macs, full.parameters, full.bytes) == (half.macs, half.parameters, 2 * half.bytes)


def small() -> Cost:
    return cost(nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.Conv2d(32, 32, 3, groups=32)), (1, 3, 34, 34))


def test_the_table() -> None:
    text = str(small())
    assert "1.28k parameters, 1.14M MACs, 658kB (float32)" in text
    for words in (
        ("0", "dense", "1x32x32x32", "896", "885k"),
        ("2", "depthwise", "1x32x30x30", "320", "259k"),
        ("total",),
    ):
        assert any(all(word in line.replace("│", " ").split() for word in words) for line in text.splitlines()), text
    assert "norm" in small().table("kind") and "1x32" not in small().table("kind")
    many = cost(nn.Sequential(*(nn.Conv2d(2, 2, 1) for _ in range(30))), (1, 2, 4, 4))
    assert str(many) == many.table("kind") and len(many.table("layer").splitlines()) > 30


def test_the_table_without_rich(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("rich", "rich.console"):
        monkeypatch.setitem(sys.modules, name, None)
    lines = str(small()).splitlines()
    assert lines[1].split() == ["layer", "kind", "output", "parameters", "MACs", "bytes", "ops/byte"]
    assert lines[2].split()[:4] == ["0", "dense", "1x32x32x32", "896"] and len(lines) == 6


def test_the_plot() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    report = small()
    ax = report.plot()
    discs = {collection.get_label().split(":")[0]: collection.get_offsets() for collection in ax.collections}
    assert discs.keys() == {"dense", "depthwise"}
    dense = report.layers[0]
    assert discs["dense"].tolist() == [[dense.intensity, dense.macs]]
    assert report.plot(ax) is ax


def test_layers_that_give_several_tensors_or_are_called_by_keyword() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.LSTM(6, 5, batch_first=True), nn.Linear(5, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(input=self.first(x)[0])

    found = cost(Recurrent(), (2, 7, 6))
    assert found.parameters == sum(p.numel() for p in Recurrent().parameters())
    with pytest.raises(ValueError, match="input_size"):
        cost(nn.Linear(2, 2), ())
