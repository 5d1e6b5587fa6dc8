"""Converted models where models go: several processes, compilers, export, mixed precision, CUDA graphs.

Run as a program, this file is one process of the distributed test.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness import only_our_kernels, random
from sepconv_ext import convert_
from sepconv_ext.nn import SeparableConv2d

WORLD = 2
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def network(norm: bool = True) -> nn.Module:
    """A stem, an inverted residual block, a grouped layer and a SeparableConv2d. With norms: in eval(), with a past."""
    torch.manual_seed(3)

    def block(conv: nn.Module, act: nn.Module | None = None) -> list[nn.Module]:
        return [conv, *([nn.BatchNorm2d(conv.out_channels)] if norm else []), *([act] if act else [])]

    model = nn.Sequential(
        *block(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU()),
        *block(nn.Conv2d(8, 16, 1), nn.ReLU6()),
        *block(nn.Conv2d(16, 16, 5, padding=2, groups=16), nn.Hardswish()),
        *block(nn.Conv2d(16, 8, 1)),
        nn.Conv2d(8, 12, 3, padding=1, groups=2),
        SeparableConv2d(12, 10, 3, stride=2, norm="batch" if norm else None, depthwise_activation="silu"),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(10, 5),
    )
    generator = torch.Generator().manual_seed(4)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.bias.data, module.running_mean, module.running_var):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return model.eval()


@pytest.fixture
def x() -> Tensor:
    return random((4, 3, 17, 16), torch.float32, "cpu")


def gradients(model: nn.Module, x: Tensor, parameters: list[Tensor]) -> tuple[Tensor, ...]:
    y = model(x)
    return (y.detach(), *torch.autograd.grad(y.square().sum(), parameters))


# --- several processes ---


def data() -> tuple[Tensor, Tensor]:
    return random((2 * WORLD, 3, 17, 16), torch.float32, "cpu", seed=6), torch.arange(2 * WORLD)


def train(model: nn.Module, images: Tensor, labels: Tensor, steps: int = 2) -> None:
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(steps):
        optimiser.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimiser.step()


class WrongStrides(torch.autograd.Function):
    """The gradient of a 1x1 kernel with other strides in the dimensions of one element than the weight has."""

    @staticmethod
    def forward(ctx, weight: Tensor) -> Tensor:
        return weight.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad.contiguous().as_strided(grad.shape, (grad.shape[1], 1, grad.shape[1], grad.shape[1]))


class Careless(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(5, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, WrongStrides.apply(self.weight)).mean((2, 3))


def distributed_worker(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder / 'meeting'}", rank=rank, world_size=WORLD)
    images, labels = data()
    mine = slice(rank * len(images) // WORLD, (rank + 1) * len(images) // WORLD)
    result = {}
    for layout, memory_format in LAYOUTS.items():
        model = network(norm=False).train()
        convert_(model)
        model.to(memory_format=memory_format)
        replica = nn.parallel.DistributedDataParallel(model)
        print(f"training {layout}", file=sys.stderr, flush=True)
        train(replica, images[mine].contiguous(memory_format=memory_format), labels[mine])
        result[layout] = model.state_dict()
    print("a careless layer", file=sys.stderr, flush=True)
    train(nn.parallel.DistributedDataParallel(Careless()), images[mine], labels[mine])
    torch.save(result, folder / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


def test_distributed_training_is_training(tmp_path: Path) -> None:
    """Two processes with half of the images each, over gloo: the weights of one process with all of them.

    And no gradient has other strides than its weight, which DistributedDataParallel would warn of and copy."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONWARNINGS": "always"}
    workers = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(tmp_path)], env=environment, stderr=subprocess.PIPE, text=True
        )
        for rank in range(WORLD)
    ]
    try:
        said = [worker.communicate(timeout=300)[1] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(said)
    for text in said:
        ours, careless = text.split("a careless layer")
        assert "stride" not in ours, ours
        assert "strides do not match" in careless  # the warning can be seen

    images, labels = data()
    alone = network(norm=False).train()
    train(alone, images, labels)
    for rank in range(WORLD):
        results = torch.load(tmp_path / f"rank{rank}.pt")
        assert len(results) == 2
        for state in results.values():
            torch.testing.assert_close(dict(state), dict(alone.state_dict()), rtol=1e-4, atol=1e-5)


# --- compilers and export ---


@pytest.fixture
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_compile_without_a_graph_break(training: bool, x: Tensor, _fresh_dynamo) -> None:
    original = network().train(training)
    model = copy.deepcopy(original)
    convert_(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with only_our_kernels(at_least=10):
        results = gradients(compiled, x, list(compiled.parameters()))
    for actual, expected in zip(results, gradients(original, x, list(original.parameters())), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)
    for key, tensor in original.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], tensor)


def test_a_compiled_model_follows_train_and_eval(x: Tensor, _fresh_dynamo) -> None:
    """And a change of a weight: nothing that SeparableConv2d folds is baked into the graph."""
    original, model = network(), network()
    convert_(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), original(x), rtol=1e-4, atol=1e-4)
        for m in (model, original):
            m[0].weight.mul_(1.5), m[4].running_var.add_(1), m.train()
        torch.testing.assert_close(compiled(x), original(x), rtol=1e-3, atol=1e-3)
        for m in (model, original):
            m.eval()
        torch.testing.assert_close(compiled(x), original(x), rtol=1e-4, atol=1e-4)


def targets(program: torch.export.ExportedProgram) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
def test_export(strict: bool, x: Tensor, tmp_path: Path, _fresh_dynamo) -> None:
    model = network()
    expected = model(x)
    convert_(model)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},), strict=strict)
    assert targets(program).count("sepconv_ext.separable_conv2d.default") == 1
    assert targets(program).count("sepconv_ext.conv2d.default") == 4
    torch.export.save(program, tmp_path / "program.pt2")
    module = torch.export.load(tmp_path / "program.pt2").module()
    with only_our_kernels(at_least=4):
        torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(module(x[:3]), model(x[:3]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["mobilenet_v2", "shufflenet_v2_x0_5"])
def test_export_of_a_real_network(name: str) -> None:
    torchvision = pytest.importorskip("torchvision", reason="torchvision is an extra")
    model = getattr(torchvision.models, name)(weights=None).eval()
    report = convert_(model)
    x = random((1, 3, 32, 32), torch.float32, "cpu")
    with torch.no_grad():
        program = torch.export.export(model, (x,))
        assert targets(program).count("sepconv_ext.conv2d.default") == len(report) > 10
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-4)


def test_compile_of_a_real_network(_fresh_dynamo) -> None:
    torchvision = pytest.importorskip("torchvision", reason="torchvision is an extra")
    model = torchvision.models.mobilenet_v2(weights=None).eval()
    convert_(model)
    x = random((1, 3, 32, 32), torch.float32, "cpu")
    with torch.no_grad():
        y = torch.compile(model, backend="eager", fullgraph=True)(x)
        torch.testing.assert_close(y, model(x), rtol=1e-4, atol=1e-4)


# --- mixed precision ---


@pytest.mark.parametrize("norm", [False, True], ids=["no_norms", "norms"])
def test_autocast_training_with_a_grad_scaler(norm: bool, device: str) -> None:
    """float16 with a GradScaler, an overflowed first step included: losses stay with those of torch's layers."""
    traces = []
    for convert in (False, True):
        model = network(norm).train().to(device)
        if convert:
            convert_(model)
        scaler = torch.amp.GradScaler(device, init_scale=2.0**40, growth_interval=2)
        optimiser = torch.optim.SGD(model.parameters(), lr=0.05)
        images = random((4, 3, 17, 16), torch.float32, device)
        labels = torch.arange(4, device=device)
        losses, scales = [], []
        for _ in range(30):
            optimiser.zero_grad()
            with torch.autocast(device, dtype=torch.float16):
                logits = model(images)
            assert logits.dtype == torch.float16
            loss = F.cross_entropy(logits.float(), labels)
            scaler.scale(loss).backward()
            scaler.step(optimiser)
            # Of a skipped step the next loss is the same. Where a gradient by the weight is rounded once here, torch's
            # may overflow: the losses are compared step taken by step taken.
            before = scaler.get_scale()
            scaler.update()
            if scaler.get_scale() >= before:
                losses.append(loss.item())
            scales.append(scaler.get_scale())
        assert all(p.dtype == torch.float32 for p in model.parameters())
        assert min(scales) < 2.0**40  # steps were skipped
        assert losses[-1] < losses[0]  # and others were not
        traces.append(losses)
    both = min(map(len, traces))
    assert both >= 4
    torch.testing.assert_close(torch.tensor(traces[1][:both]), torch.tensor(traces[0][:both]), rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_inference(dtype: torch.dtype, device: str) -> None:
    model = network().to(device)
    x = random((4, 3, 17, 16), torch.float32, device)
    with torch.no_grad():
        expected = model(x)
        convert_(model)
        with torch.autocast(device, dtype=dtype):
            y = model(x)
        assert y.dtype == dtype
        torch.testing.assert_close(y.float(), expected, rtol=5e-2, atol=5e-2)
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)  # nothing was kept in the reduced type


# --- CUDA graphs ---


@pytest.mark.cuda
def test_cuda_graph_of_a_converted_model() -> None:
    """Replays on new images, and, once the weights that it was captured with are made anew, with new weights."""
    original, model = network().cuda(), network().cuda()
    convert_(model)
    x = random((4, 3, 17, 16), torch.float32, "cuda")
    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            model(x)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = model(x)
        x.mul_(-2)
        graph.replay()
        torch.testing.assert_close(y, original(x), rtol=1e-3, atol=1e-3)
        for m in (model, original):
            m[3].weight.mul_(1.5)
        model(x)
        graph.replay()
        torch.testing.assert_close(y, original(x), rtol=1e-3, atol=1e-3)


@pytest.mark.cuda
def test_capture_without_a_warm_up() -> None:
    """What is folded while a graph is captured has no value yet and must not be kept."""
    original, model = network().cuda(), network().cuda()
    convert_(model)
    x = random((4, 3, 17, 16), torch.float32, "cuda")
    with torch.no_grad():
        original(x), network().cuda()(x)  # cuDNN and cuBLAS make their handles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = model(x)
        torch.testing.assert_close(model(x), original(x), rtol=1e-3, atol=1e-3)
        graph.replay()
        torch.testing.assert_close(y, original(x), rtol=1e-3, atol=1e-3)


if __name__ == "__main__":
    distributed_worker(int(sys.argv[1]), Path(sys.argv[2]))
