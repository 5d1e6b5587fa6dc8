"""torch.compile(model, backend="sepconv_ext"): what the pass replaces, what it computes, and what freezing does."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd

from harness import random
from sepconv_ext import kernel_counts, reset_kernel_counts
from sepconv_ext.graph.backend import compile_graph, replace_convolutions


class Net(nn.Module):
    """A dense stem, a depthwise pair with a bias, and a skip."""

    def __init__(self, channels: int = 24) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, channels, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.pointwise = nn.Conv2d(channels, channels, 1)
        self.head = nn.Linear(channels, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.norm(self.stem(x)))
        return self.head((x + self.pointwise(F.hardswish(self.depthwise(x)))).mean((2, 3)))


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    reset_kernel_counts()


def eager_pass(seen: list[fx.Graph]):
    """The pass alone, on the graphs that Inductor would have it work on, without Inductor's minutes."""

    def compiler(graph: fx.GraphModule, inputs: list) -> object:
        from functorch.compile import make_boxed_func

        replace_convolutions(graph.graph)
        graph.graph.lint()
        graph.recompile()
        seen.append(graph.graph)
        return make_boxed_func(graph.forward)

    return aot_autograd(fw_compiler=compiler, bw_compiler=compiler)


def calls(graph: fx.Graph) -> Counter[str]:
    return Counter(
        str(node.target) for node in graph.nodes if node.op == "call_function" and "conv" in str(node.target)
    )


def assert_gradients(model: nn.Module, compiled: object, x: Tensor) -> None:
    """Output and all gradients within rounding of float64."""
    exact, plain = copy.deepcopy(model).double(), copy.deepcopy(model)
    inputs = [x.double().requires_grad_(), x.clone().requires_grad_(), x.clone().requires_grad_()]
    outputs = [run(image) for run, image in zip((exact, plain, compiled), inputs, strict=True)]
    for y in outputs:
        y.square().sum().backward()
    pairs = [outputs, [i.grad for i in inputs]]
    pairs += [[p.grad for p in three] for three in zip(*(m.parameters() for m in (exact, plain, model)), strict=True)]
    for wanted, torchs, result in pairs:
        error, usual = ((t.double() - wanted).abs().max().item() for t in (result, torchs))
        assert error <= 3 * usual + 64 * torch.finfo(torch.float32).eps * wanted.abs().max().item()


CONVOLUTIONS = {
    "depthwise": (nn.Conv2d(24, 24, 3, padding=1, groups=24), (2, 24, 19, 7)),
    "stride": (nn.Conv2d(58, 58, 5, stride=2, padding=2, groups=58, bias=False), (2, 58, 14, 19)),
    "multiplier": (nn.Conv2d(3, 6, (3, 1), padding=(1, 0), groups=3), (1, 3, 7, 9)),
    "dilation": (nn.Conv2d(24, 24, 3, dilation=2, padding=2, groups=24), (3, 24, 9, 9)),
}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_all_maps_of_a_convolution(name: str, layout: torch.memory_format) -> None:
    conv, size = CONVOLUTIONS[name]
    conv = copy.deepcopy(conv)
    seen: list[fx.Graph] = []
    x = random(size, torch.float32, "cpu").to(memory_format=layout)
    assert_gradients(conv, torch.compile(conv, backend=eager_pass(seen)), x)
    forward, backward = map(calls, seen)
    assert forward == {"sepconv_ext.conv2d.default": 1}
    assert backward == {"sepconv_ext.conv2d_grad_input.default": 1, "sepconv_ext.conv2d_grad_weight.default": 1}


def test_what_the_plan_leaves_to_torch_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each map by itself: here the forward map and the gradient by the weight are torch's."""
    from sepconv_ext.graph import backend

    monkeypatch.setattr(backend, "_is_ours", lambda map, *_: map == "grad_input")
    conv, size = copy.deepcopy(CONVOLUTIONS["depthwise"][0]), CONVOLUTIONS["depthwise"][1]
    seen: list[fx.Graph] = []
    assert_gradients(conv, torch.compile(conv, backend=eager_pass(seen)), random(size, torch.float32, "cpu"))
    forward, backward = map(calls, seen)
    assert forward == {"aten.convolution.default": 1}
    assert backward == {"sepconv_ext.conv2d_grad_input.default": 1, "aten.convolution_backward.default": 1}
    (left,) = [node for node in seen[1].nodes if "convolution_backward" in str(node.target)]
    assert left.args[-1] == [False, True, True]


def test_both_gradients_of_a_product_stay_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch makes those of a 1x1 in one call: where it has to make one of them, it makes both."""
    from sepconv_ext.graph import backend

    monkeypatch.setattr(backend, "_is_ours", lambda map, *_: map == "grad_input")
    seen: list[fx.Graph] = []
    x = random((2, 24, 9, 7), torch.float32, "cpu")
    conv = nn.Conv2d(24, 16, 1)
    assert_gradients(conv, torch.compile(conv, backend=eager_pass(seen)), x)
    assert calls(seen[1]) == {"aten.convolution_backward.default": 1}
    torch.compiler.reset()
    frozen = nn.Conv2d(24, 16, 1).requires_grad_(False)
    torch.compile(frozen, backend=eager_pass(seen))(x.requires_grad_()).sum().backward()
    assert calls(seen[3]) == {"sepconv_ext.conv2d_grad_input.default": 1}


def test_transposed_and_one_dimensional_ones_stay() -> None:
    class Others(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.line = nn.ConvTranspose2d(8, 8, 2, stride=2, groups=8), nn.Conv1d(8, 8, 3, groups=8)

        def forward(self, x: Tensor) -> Tensor:
            return self.line(self.up(x).flatten(2))

    seen: list[fx.Graph] = []
    model = Others()
    assert_gradients(model, torch.compile(model, backend=eager_pass(seen)), random((2, 8, 5, 5), torch.float32, "cpu"))
    assert not any("sepconv_ext" in name for graph in seen for name in calls(graph))


def test_a_training_step_of_a_network() -> None:
    model = Net().train()
    seen: list[fx.Graph] = []
    compiled = torch.compile(model, backend=eager_pass(seen))
    x = random((4, 3, 20, 18), torch.float32, "cpu")
    expected = copy.deepcopy(model)
    compiled(x).square().sum().backward()
    expected(x).square().sum().backward()
    for actual, wanted in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(
            actual.grad, wanted.grad, rtol=1e-3, atol=1e-3 * wanted.grad.abs().max().item() + 1e-6
        )
    assert set(kernel_counts()) - {"aten"}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_graph_for_all_sizes_has_the_kernels(name: str, layout: torch.memory_format) -> None:
    """From the second size of batch on, and with images of another size, torch.compile makes one with symbols."""
    conv, size = copy.deepcopy(CONVOLUTIONS[name][0]), CONVOLUTIONS[name][1]
    seen: list[fx.Graph] = []
    compiled = torch.compile(conv, backend=eager_pass(seen), dynamic=True)
    for n, more in ((5, 0), (2, 0), (3, 4)):  # rows and columns alike: two sizes that are equal have one symbol
        x = random((n, size[1], size[2] + more, size[3] + more), torch.float32, "cpu").to(memory_format=layout)
        conv.zero_grad()
        assert_gradients(conv, compiled, x)
    assert len(seen) == 2, "one graph for all sizes"
    forward, backward = map(calls, seen)
    assert forward == {"sepconv_ext.conv2d.default": 1}
    assert backward == {"sepconv_ext.conv2d_grad_input.default": 1, "sepconv_ext.conv2d_grad_weight.default": 1}


@pytest.mark.slow
def test_by_inductor_with_batches_of_any_size() -> None:
    model = Net()
    expected = copy.deepcopy(model)
    compiled = torch.compile(model, backend="sepconv_ext", dynamic=True)
    for n in (4, 6):
        x = random((n, 3, 20, 18), torch.float32, "cpu")
        for network in (compiled, expected):
            reset_kernel_counts()
            network(x).square().mean().backward()
            assert network is expected or set(kernel_counts()) - {"aten"}
        for actual, wanted in zip(model.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(actual.grad, wanted.grad, rtol=1e-3, atol=1e-3)
            actual.grad = wanted.grad = None


@pytest.mark.slow
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
def test_by_inductor(layout: torch.memory_format) -> None:
    """Training, then inference by the weights as they have become, by the backend's name."""
    model = Net().to(memory_format=layout)
    compiled = torch.compile(model, backend="sepconv_ext")
    x = random((4, 3, 20, 18), torch.float32, "cpu").to(memory_format=layout)
    expected = copy.deepcopy(model)
    for _ in range(2):
        for run, parameters in ((compiled, model.parameters()), (expected, expected.parameters())):
            run(x).square().mean().backward()
            with torch.no_grad():
                for p in parameters:
                    p -= 0.1 * p.grad
                    p.grad = None
    assert set(kernel_counts()) - {"aten"}
    for actual, wanted in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-3, atol=1e-3)
    model.eval(), expected.eval()
    for factor in (1, 2):
        with torch.no_grad():
            model.depthwise.weight *= factor
            expected.depthwise.weight *= factor
            y, wanted = compiled(x), expected(x)
        assert y.stride() == wanted.stride()
        torch.testing.assert_close(y, wanted, rtol=1e-3, atol=1e-3)


# --- frozen ---


def test_frozen_at_any_size_of_batch() -> None:
    model = Net().eval()
    compiled = torch.compile(model, backend="sepconv_ext", options={"freezing": True})
    x = random((4, 3, 20, 18), torch.float32, "cpu")
    with torch.no_grad():
        for n in (4, 3, 2, 1):  # from the second on torch.compile makes one for all sizes
            torch.testing.assert_close(compiled(x[:n]), model(x[:n]), rtol=1e-5, atol=1e-5)
        before = compiled(x)
        model.depthwise.weight *= 2
        assert torch.equal(compiled(x), before)  # as Inductor's freezing: the weights are those of the first call


def test_frozen_by_inductors_own_setting() -> None:
    from torch._inductor import config

    model = Net().eval().to(memory_format=torch.channels_last)
    x = random((2, 3, 20, 18), torch.float32, "cpu").to(memory_format=torch.channels_last)
    reset_kernel_counts()
    with torch.no_grad(), config.patch(freezing=True):
        y = torch.compile(model, backend="sepconv_ext")(x)
        assert set(kernel_counts()) - {"aten"}
        torch.testing.assert_close(y, model(x), rtol=1e-5, atol=1e-5)


def test_frozen_with_sizes_as_numbers() -> None:
    class Resized(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).reshape(x.shape[0] * 7) * x.shape[0]

    model = Resized().eval()
    compiled = torch.compile(model, backend="sepconv_ext", options={"freezing": True}, dynamic=True)
    x = random((4, 3, 20, 18), torch.float32, "cpu")
    with torch.no_grad():
        for image in (x, x[:3, :, :16, :16]):
            torch.testing.assert_close(compiled(image), model(image), rtol=1e-5, atol=1e-5)


def test_what_cannot_be_frozen_is_inductors(monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward that counts its calls in a buffer."""
    import torch._inductor.compile_fx as inductor

    handed: list[dict] = []

    def compile_fx(graph: fx.GraphModule, inputs: object, config_patches: dict) -> object:
        handed.append(config_patches)
        return graph.forward

    monkeypatch.setattr(inductor, "compile_fx", compile_fx)

    class Counting(Net):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.count += 1
            return super().forward(x)

    model = Counting().eval()
    x = random((2, 3, 20, 18), torch.float32, "cpu")
    with torch.no_grad():
        y = torch.compile(model, backend="sepconv_ext", options={"freezing": True})(x)
    assert handed == [{"freezing": True}] and model.count == 1
    torch.testing.assert_close(y, Net.forward(model, x))


# --- how it is found, and what it refuses ---


def test_it_is_found_by_name() -> None:
    program = (
        "import torch, torch._dynamo.backends.registry as registry\n"
        "{}\n"
        "found = registry.lookup_backend('sepconv_ext')\n"
        "assert found.__module__ == 'sepconv_ext.graph.backend', found\n"
    )
    subprocess.run([sys.executable, "-c", program.format("import sepconv_ext")], check=True, timeout=120)


def test_unknown_options_are_refused() -> None:
    with pytest.raises(RuntimeError, match=r"options of torch.compile must be Inductor's own, but 'max_speed' is none"):
        compile_graph(fx.symbolic_trace(nn.Identity()), [torch.ones(1)], options={"max_speed": True})
