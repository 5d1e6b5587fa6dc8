"""nn.InvertedResidual against the block of torch's own layers, and against torchvision's and timm's blocks."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

import sepconv_ext
from harness import random
from sepconv_ext import reference
from sepconv_ext.nn import Conv2d, InvertedResidual
from test_separable_layers import lived_in


class ByHand(nn.Module):
    """The same block of torch's own layers, with the same names."""

    def __init__(self, ours: InvertedResidual) -> None:
        super().__init__()
        for name, part in ours.named_children():
            twin = part
            if isinstance(part, nn.Conv2d):
                geometry = (part.kernel_size, part.stride, part.padding, part.dilation, part.groups)
                twin = nn.Conv2d(part.in_channels, part.out_channels, *geometry, part.bias is not None)
                twin.to(part.weight.device, part.weight.dtype)
            setattr(self, name, copy.deepcopy(twin))
        self.load_state_dict(ours.state_dict())
        self.activations = [
            reference.ACTIVATIONS[name] for name in (ours.activation, ours.squeeze_activation, ours.project_activation)
        ]
        self.gate, self.residual = getattr(F, ours.gate), ours.residual

    def part(self, name: str, x: Tensor) -> Tensor:
        norm = getattr(self, f"{name}_norm", None)
        x = getattr(self, name)(x)
        return x if norm is None else norm(x)

    def forward(self, x: Tensor) -> Tensor:
        inner, squeezed, last = self.activations
        e = inner(self.part("expand", x)) if hasattr(self, "expand") else x
        d = inner(self.part("depthwise", e))
        if hasattr(self, "squeeze"):
            d = d * self.gate(self.excite(squeezed(self.squeeze(d.mean((2, 3), keepdim=True)))))
        y = self.part("project", d)
        return last(x + y if self.residual else y)


LAYERS = {
    "v2": dict(in_channels=8, out_channels=8, hidden_channels=24),
    "v2_first": dict(in_channels=8, out_channels=5, hidden_channels=8),
    "v2_stride": dict(in_channels=6, out_channels=10, hidden_channels=36, stride=2),
    "v3": dict(
        in_channels=8, out_channels=8, hidden_channels=20, kernel_size=5, squeeze_channels=6, activation="hardswish",
        gate="hardsigmoid",
    ),
    "efficientnet": dict(
        in_channels=7, out_channels=9, hidden_channels=42, kernel_size=5, stride=2, squeeze_channels=2,
        activation="silu", squeeze_activation="silu",
    ),
    "no_norms": dict(in_channels=6, out_channels=6, hidden_channels=13, norm=None, project_activation="relu"),
    "dilated": dict(in_channels=4, out_channels=4, hidden_channels=12, dilation=2, residual=False),
    "awkward": dict(in_channels=5, out_channels=7, hidden_channels=11, kernel_size=(3, 5), stride=(1, 2), padding=1),
    "even_kernel": dict(in_channels=4, out_channels=4, hidden_channels=8, kernel_size=(2, 4), norm=None),
}  # fmt: skip
by_layer = pytest.mark.parametrize("arguments", LAYERS.values(), ids=LAYERS.keys())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
@by_layer
def test_eval_is_one_call(arguments: dict, layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = lived_in(InvertedResidual(**arguments)).eval()
    exact = ByHand(ours).double()
    x = random((2, arguments["in_channels"], 9, 12), torch.float32, "cpu").to(memory_format=layout)
    sepconv_ext.reset_kernel_counts()
    with torch.no_grad():
        y = ours(x)
        expected = exact(x.double())
        if layout is torch.channels_last:
            assert sepconv_ext.kernel_counts() == {"cpu_inverted_residual": 1}
        calls: list[object] = []
        monkeypatch.setattr(Conv2d, "forward", lambda self, x: calls.append(self))
        ours(x)
        assert not calls
        monkeypatch.undo()
        torch.testing.assert_close(ours(x[0]), y[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@by_layer
def test_gradients_and_statistics(arguments: dict, training: bool) -> None:
    """Also in eval(), where the folded weights are part of the graph: as when norms are frozen."""
    ours = lived_in(InvertedResidual(**arguments)).double().train(training)
    by_hand = ByHand(ours)
    x = random((3, arguments["in_channels"], 8, 7), torch.float64, "cpu")
    results = []
    for layer in (ours, by_hand):
        image = x.clone().requires_grad_()
        y = layer(image)
        y.square().mean().backward()
        results.append([y, image.grad, *(p.grad for p in layer.parameters()), *layer.buffers()])
    for actual, wanted in zip(*results, strict=True):
        torch.testing.assert_close(actual, wanted)


@by_layer
def test_weights_are_initialised_as_in_the_papers(arguments: dict) -> None:
    torch.manual_seed(0)
    wide = {name: 64 * n if "channels" in name else n for name, n in arguments.items()}
    for name, part in InvertedResidual(**wide).named_children():
        if isinstance(part, nn.Conv2d):
            wanted = math.sqrt(2 / (part.out_channels // part.groups * math.prod(part.kernel_size)))
            assert part.weight.std().item() == pytest.approx(wanted, rel=0.1), name
            assert part.bias is None or not part.bias.any()


def test_an_exchanged_part_and_hooks_are_seen() -> None:
    ours = lived_in(InvertedResidual(8, 8, 24, squeeze_channels=4)).eval()
    x = random((1, 8, 6, 6), torch.float32, "cpu")
    with torch.no_grad():
        before = ours(x)
        ours.depthwise.weight *= 2
        torch.testing.assert_close(ours(x), ByHand(ours)(x), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(ours(x), before)
        y, seen = ours(x), []
        for part in (ours.expand, ours.depthwise_norm, ours.squeeze, ours.project):
            handle = part.register_forward_hook(lambda module, args, output: seen.append(output))
            torch.testing.assert_close(ours(x), y, rtol=1e-4, atol=1e-4)
            handle.remove()
        assert len(seen) == 4
        ours.project = nn.Conv2d(24, 8, 1)
        ours.activation = "silu"
        torch.testing.assert_close(ours(x), ByHand(ours)(x), rtol=1e-4, atol=1e-4)


def test_dropped_paths() -> None:
    ours = lived_in(InvertedResidual(4, 4, 8, drop_path=0.25)).train()
    whole = copy.deepcopy(ours)
    whole.drop_path = 0.0
    x = random((400, 4, 3, 3), torch.float32, "cpu")
    torch.manual_seed(3)
    with torch.no_grad():
        branch, dropped = whole(x) - x, ours(x) - x
    kept = dropped.flatten(1).abs().amax(1) > 0
    assert 0.65 < kept.float().mean() < 0.85
    torch.testing.assert_close(dropped[kept], branch[kept] / 0.75, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(x), whole.eval()(x))


def test_copies_pickles_and_state() -> None:
    ours = lived_in(InvertedResidual(8, 8, 24, squeeze_channels=4)).eval()
    x = random((1, 8, 6, 6), torch.float32, "cpu")
    with torch.no_grad():
        y = ours(x)
        for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            assert torch.equal(twin(x), y)
        memory = io.BytesIO()
        torch.save(ours.state_dict(), memory)
        memory.seek(0)
        other = InvertedResidual(8, 8, 24, squeeze_channels=4).eval()
        other.load_state_dict(torch.load(memory))
        assert torch.equal(other(x), y)
    names = {name.rpartition(".")[0] for name in ours.state_dict()}
    assert names == {
        *("expand", "expand_norm", "depthwise", "depthwise_norm", "squeeze", "excite", "project", "project_norm")
    }
    assert "residual=True" in repr(ours) and "gate=sigmoid" in repr(ours)


@by_layer
def test_compile_export_and_freeze(arguments: dict) -> None:
    ours = lived_in(InvertedResidual(**arguments)).eval()
    x = random((2, arguments["in_channels"], 9, 12), torch.float32, "cpu")
    with torch.no_grad():
        y = ours(x)
        torch.compiler.reset()  # what other tests compiled of the class counts for its limit
        torch.testing.assert_close(torch.compile(ours, fullgraph=True, backend="aot_eager")(x), y)
        exported = torch.export.export(ours, (x,))
        torch.testing.assert_close(exported.module()(x), y)
        frozen = sepconv_ext.freeze(ours, x)
        torch.testing.assert_close(frozen(x), y, rtol=1e-4, atol=1e-4)
    assert any("inverted_residual" in str(node.target) for node in exported.graph.nodes)
    # Stage by stage it is known to the rewriter, and one call with what stands around it.
    assert [str(n.target) for n in frozen.graph.nodes if "sepconv" in str(n.target)] == ["sepconv_ext.program.default"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(activation="mish"), "activation must be one of"),
        (dict(squeeze_activation="mish"), "squeeze_activation must be one of"),
        (dict(gate="tanh"), "gate must be 'sigmoid' or 'hardsigmoid', but is 'tanh'"),
        (dict(norm="layer"), "norm must be None or 'batch', but is 'layer'"),
        (dict(stride=2, residual=True), "stride is 2, in_channels is 8 and out_channels is 8"),
        (dict(out_channels=9, residual=True), "in_channels is 8 and out_channels is 9"),
        (dict(drop_path=1.0), r"drop_path must be in \[0, 1\), but is 1.0"),
        (dict(drop_path=0.1, stride=2), "drop_path needs a residual"),
        (dict(kernel_size=2, stride=2), "padding='same' at a stride needs a kernel of odd extent"),
    ],
    ids=str,
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InvertedResidual(**dict(in_channels=8, out_channels=8, hidden_channels=16) | arguments)


# --- blocks of others ---

TORCHVISION = ("mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0")
TIMM = ("mobilenetv3_small_100", "mnasnet_small", "efficientnet_lite0", "tf_efficientnet_b0")


def blocks_of(name: str) -> list[nn.Module]:
    torch.manual_seed(2)
    if name in TORCHVISION:
        model = getattr(pytest.importorskip("torchvision").models, name)()
    else:
        timm = pytest.importorskip("timm")
        model = timm.create_model(name, drop_path_rate=0.1)
    kinds = ("InvertedResidual", "MBConv", "DepthwiseSeparableConv")
    return [module for module in lived_in(model).modules() if type(module).__name__ in kinds]


@pytest.mark.parametrize("name", TORCHVISION + TIMM[:3])
def test_blocks_of_torchvision_and_timm(name: str) -> None:
    blocks = blocks_of(name)
    assert len(blocks) >= 11
    for block in blocks:
        ours = InvertedResidual.from_block(block.eval())
        assert not ours.training
        assert {id(p) for p in ours.parameters()} == {id(p) for p in block.parameters()}
        assert {id(b) for b in ours.buffers()} == {id(b) for b in block.buffers()}
        size = (2, (ours.depthwise if ours.expand is None else ours.expand).in_channels, 7, 7)
        with torch.no_grad():
            x = random(size, torch.float32, "cpu")
            exact = copy.deepcopy(block).double()(x.double())
            torch.testing.assert_close(ours(x).double(), exact, rtol=1e-4, atol=1e-4 * exact.abs().max().item())
        ours.drop_path = 0.0
        for part in block.modules():  # both of torchvision's and timm's, which draw other numbers than ours
            if type(part).__name__ in ("StochasticDepth", "DropPath"):
                part.p = part.drop_prob = 0.0
        twin = copy.deepcopy(block).train()
        torch.testing.assert_close(ours.train()(x), twin(x), rtol=1e-3, atol=1e-3 * exact.abs().max().item())
        for mine, theirs in zip(ours.buffers(), block.buffers(), strict=True):
            assert mine is theirs
        for mine, theirs in zip(block.buffers(), twin.buffers(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


def test_stochastic_depth_is_kept() -> None:
    shares = [InvertedResidual.from_block(block).drop_path for block in blocks_of("efficientnet_b0")]
    assert shares[0] == 0 and 0.1 < max(shares) < 0.2
    shares = [InvertedResidual.from_block(block).drop_path for block in blocks_of("efficientnet_lite0")]
    assert shares[0] == 0 and 0.05 < max(shares) < 0.1


def test_blocks_that_are_refused() -> None:
    with pytest.raises(ValueError, match="block must be an InvertedResidual or MBConv of torchvision"):
        InvertedResidual.from_block(nn.Conv2d(3, 3, 1))
    block = blocks_of("mobilenet_v2")[1]
    for change, message in (
        (lambda conv: conv[0].__setitem__(2, nn.PReLU()), "has an activation that is none of this package's: PReLU"),
        (lambda conv: conv[0].__setitem__(2, nn.ReLU()), "has relu and relu6"),
        (lambda conv: conv[1].__setitem__(0, nn.Conv2d(96, 96, 3, groups=48, bias=False)), "a depthwise convolution"),
        (lambda conv: conv[1].__setitem__(1, nn.GroupNorm(8, 96)), "GroupNorm"),
        (lambda conv: conv.__setitem__(2, nn.Conv2d(96, 24, 3, bias=False)), "must have 1x1 convolutions"),
        (lambda conv: conv.__setitem__(2, nn.Conv2d(96, 24, 1)), "must have no bias before a norm"),
        (lambda conv: conv.append(nn.Conv2d(24, 24, 1)), "must have 2 or 3 convolutions in a row, but has 4"),
    ):
        changed = copy.deepcopy(block)
        change(changed.conv)
        with pytest.raises(ValueError, match=message):
            InvertedResidual.from_block(changed)
    hooked, pruned = copy.deepcopy(block), copy.deepcopy(block)
    hooked.conv[1].register_forward_hook(lambda module, inputs, output: output * 0)
    prune.l1_unstructured(pruned.conv[2], "weight", 0.5)
    for changed in (hooked, pruned):
        with pytest.raises(ValueError, match="block must have no hooks"):
            InvertedResidual.from_block(changed)
    shuffle = pytest.importorskip("torchvision").models.shufflenet_v2_x0_5()
    with pytest.raises(ValueError, match=r"but is torchvision\.models\.shufflenetv2\.InvertedResidual"):
        InvertedResidual.from_block(shuffle.stage2[0])


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ("tf_efficientnet_b0", r"must have convolutions that are nn\.Conv2d"),  # padding as TensorFlow has it
        ("fbnetc_100", "must have no 1x1 convolution first or one that expands"),
    ],
)
def test_blocks_of_timm_that_are_refused(network: str, message: str) -> None:
    pytest.importorskip("timm")
    blocks = blocks_of(network)
    with pytest.raises(ValueError, match=message):
        [InvertedResidual.from_block(block) for block in blocks]


def test_autocast_leaves_the_sum_wide() -> None:
    """As in torch's blocks, where the input of a sum keeps its dtype; one op would cast it."""
    block = InvertedResidual(8, 8, 16)
    x = torch.randn(2, 8, 5, 5)
    for training in (True, False):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert block.train(training)(x).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert InvertedResidual(8, 12, 16).eval()(x).dtype == torch.bfloat16
