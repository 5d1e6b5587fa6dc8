"""Every op in terms of aten: the table, and those who look into it (export, ONNX), and those who do not (Inductor)."""

from __future__ import annotations

import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import sepconv_ext
from harness import ACTIVATIONS, random
from sepconv_ext import convert_, freeze, functional
from sepconv_ext.decompositions import TABLE

ops = torch.ops.sepconv_ext


def t(*size: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return random(size, dtype, "cpu", seed=seed)


def last(x: Tensor) -> Tensor:
    """The same numbers with the channels next to each other in memory."""
    if x.dim() == 3:
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    return x.contiguous(memory_format=torch.channels_last)


# --- the table against the ops ---

MODES = {"zeros": (2, 1), "asymmetric": (1, 0, 2, 3), "reflect": (2, 1), "replicate": (2, 1, 0, 3), "circular": (1, 2)}


def convolutions() -> Iterator[tuple[str, str, tuple]]:
    """conv2d and its gradients: images and sequences, with and without a batch, in both memory orders."""
    for mode, padding in MODES.items():
        zeros = "zeros" if mode == "asymmetric" else mode
        for batch in ((2,), ()):
            for stride, dilation in (((2, 1), (1, 2)), ((1, 1), (1, 1))):
                x, w, b = t(*batch, 4, 9, 8), t(8, 2, 3, 2, seed=2), t(8, seed=3)
                geometry = (stride, padding, dilation, 2)
                y = ops.conv2d(x, w, b, *geometry, "identity", zeros)
                name = f"{mode} {batch} {stride}"
                yield "conv2d", name, (x, w, b, *geometry, "silu", zeros)
                yield "conv2d_grad_input", name, (y, w, x.shape, x.stride(), *geometry, zeros)
                yield "conv2d_grad_weight", name, (y, x, w.shape, w.stride(), *geometry, zeros)
                if batch:
                    wide = (last(y), w, x.shape, last(x).stride(), *geometry, zeros)
                    yield "conv2d", f"{name} channels_last", (last(x), w, None, *geometry, "identity", zeros)
                    yield "conv2d_grad_input", f"{name} channels_last", wide
                    yield "conv2d_both_grads", name, (y, x, w, *geometry, zeros)
        for batch in ((2,), ()):
            row = padding[:2] if len(padding) == 2 else padding[2:]
            row = row[1:] if mode != "asymmetric" else row
            x, w = t(*batch, 4, 11), t(4, 1, 3, seed=2)
            geometry = ((2,), row, (1,), 4)
            y = ops.conv2d(x, w, None, *geometry, "identity", zeros)
            name = f"sequence {mode} {batch}"
            yield "conv2d", name, (x, w, None, *geometry, "relu", zeros)
            yield "conv2d_grad_input", name, (y, w, x.shape, x.stride(), *geometry, zeros)
            yield "conv2d_grad_weight", name, (y, x, w.shape, w.stride(), *geometry, zeros)
            if batch:
                yield "conv2d", f"{name} channels last", (last(x), w, None, *geometry, "relu", zeros)
                wide = (last(y), w, x.shape, last(x).stride(), *geometry, zeros)
                yield "conv2d_grad_input", f"{name} channels last", wide
    for activation in ACTIVATIONS:
        yield "conv2d", activation, (t(2, 4, 5, 5), t(4, 1, 3, 3), None, (1, 1), (1, 1), (1, 1), 4, activation)
        added = (t(2, 4, 5, 5), t(6, 4, 1, 1), t(6), t(2, 6, 5, 5, seed=3), (1, 1), (0, 0), (1, 1), 1, activation)
        yield "conv2d_residual", activation, added


def compounds() -> Iterator[tuple[str, str, tuple]]:
    x, d, p, bd, bp = t(2, 6, 9, 8), t(6, 1, 3, 3), t(5, 6, 1, 1), t(6), t(5, seed=4)
    for activation in ACTIVATIONS:
        pair = (x, d, bd, p, bp, (2, 1), (1, 1), (1, 1), activation, "tanh")
        yield "separable_conv2d", activation, pair
        for output, intermediate in ((True, True), (False, True), (True, False)):
            yield "separable_conv2d_training", f"{activation} {output} {intermediate}", (*pair, output, intermediate)
    for column, row in ((t(6, 3), t(6, 5)), (t(3), t(1, 5))):
        for padding in ((1, 2), (1, 0, 2, 3)):
            yield "spatial_separable_conv2d", f"{list(column.shape)} {padding}", (x, column, row, padding)
            yield "spatial_separable_conv2d", f"unbatched {padding}", (x[0], column, row, padding)
    geometry = ((1, 1), (1, 1), (1, 1))
    e, deep, project = t(12, 6, 1, 1), t(12, 1, 3, 3), t(6, 12, 1, 1)
    s, b = (t(3, 12, 1, 1), t(3), t(12, 3, 1, 1), t(12)), t(12)
    acts = ("relu", "silu", "relu", "hardsigmoid", "identity")
    yield "inverted_residual", "whole", (x, e, b, deep, b, project, t(6), *s, *geometry, *acts, True)
    none = (None,) * 4
    acts = ("relu", "silu", "relu", "sigmoid", "relu6")
    yield "inverted_residual", "bare", (x, None, None, d, None, p, None, *none, (2, 2), *geometry[1:], *acts, False)


def sequences() -> Iterator[tuple[str, str, tuple]]:
    N, C, L, width = 3, 5, 12, 4
    numbers = torch.tensor([[0] * 5 + [1] * 7, [3] * 12, [-1] * 2 + [4] * 7 + [-1] * 3])
    for dilation in (1, 2):
        reach = (width - 1) * dilation
        for states in (None, t(N, C, reach, seed=5)):
            for seq_idx in (None, numbers, numbers.int()):
                for lie in (lambda x: x, last):
                    x, g, w = lie(t(N, C, L)), lie(t(N, C, L, seed=6)), t(C, width, seed=7)
                    bias = t(C, seed=8)
                    name = f"{dilation} {states is None} {seq_idx is None} {lie is last}"
                    yield "causal_conv1d", name, (x, w, bias, states, seq_idx, dilation, "silu")
                    by_input = (g, w, seq_idx, x.stride(), dilation, states is not None)
                    yield "causal_conv1d_grad_input", name, by_input
                    yield "causal_conv1d_grad_weight", name, (g, x, states, seq_idx, width, dilation)
        rows = torch.tensor([4, -1, 0])
        for tokens in (1, 3, 9):
            for seen in (None, torch.tensor([0, 5, 13])):
                for indices in (None, rows, torch.full((3,), -1)):
                    state = t(3 if indices is None else 6, C, reach + 1, seed=9)
                    name = f"{dilation} {tokens} {seen is None} {indices}"
                    update = (t(N, C, tokens), state, t(C, width), None, seen, indices, dilation, "silu")
                    yield "causal_conv1d_update", name, update
    half = (t(2, 5, 7, dtype=torch.bfloat16), t(5, 4, dtype=torch.bfloat16), None, None, torch.zeros(2, 7).long())
    yield "causal_conv1d", "bfloat16", (*half, 1, "silu")


PROGRAM = """%0 = input image
%1 = input matrix
%2 = conv %0 weight=0 bias=448 K=16 kernel=3x3 stride=2x2 padding=1x1x1x1 act=relu6
%3 = depthwise %2 weight=464 kernel=3x3 padding=1x1x0x2 dilation=1x1 act=silu
%4 = grouped %2 weight=464 kernel=3x3 padding=1x1x1x1 groups=4
%5 = product %3 weight=0 bias=448 K=16 residual=%4 act=hardswish
%6 = slice %5 begin=3 K=7
%7 = slice %5 begin=2 K=7
%8 = interleave %6 %7
%9 = concat %8 %2
%10 = layer_norm %9 weight=3 bias=60 eps=1e-05
%11 = affine %10 weight=7 bias=90
%12 = layer_norm %11 eps=0.001
%13 = mean %12
%14 = clamp %13 factor=0.16 shift=0.5 low=0 high=1
%15 = gate %12 %14
%16 = mul %15 %12 act=relu
%17 = add %16 %15 act=gelu
%18 = max_pool %17 kernel=3x3 stride=2x2 padding=1x1x1x1 ceil=1
%19 = mean_pool %17 kernel=3x2 stride=2x2 padding=1x1x0x0
%20 = padded_mean_pool %17 kernel=3x3 stride=1x2 padding=1x1x1x1
%21 = activate %14 act=tanh
%22 = dense %21
%23 = product %1 weight=0 K=5
return %18 image %19 image %20 image %22 matrix %23 matrix %9 image"""


def programs() -> Iterator[tuple[str, str, tuple]]:
    yield "program", "every step", ([t(2, 3, 13, 12), t(2, 9)], t(2048, seed=11), PROGRAM)
    yield "pack_pointwise", "", (t(21, 6, 1, 1),)
    packed = ops.pack_pointwise(t(21, 6, 1, 1))
    for residual in (None, t(2, 21, 3, 3)):
        yield "packed_pointwise", f"{residual is None}", (t(2, 6, 5, 5), packed, t(21), residual, 21, (2, 2), "silu")


SAMPLES = [*convolutions(), *compounds(), *sequences(), *programs()]
by_op = pytest.mark.parametrize("name", sorted({name for name, *_ in SAMPLES}))


class OnlyAten(TorchDispatchMode):
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        assert op.namespace in ("aten", "prim", "prims"), f"{op} in a decomposition"
        return op(*args, **(kwargs or {}))


def copied(arguments: tuple) -> list:
    return [a.clone() if isinstance(a, Tensor) else a for a in arguments]


def tensors(result: object) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


@by_op
def test_the_table_computes_what_the_op_does(name: str) -> None:
    """Values, sizes, memory order and what is written in place; and by ops of aten alone."""
    op = getattr(ops, name).default
    for _, what, arguments in (sample for sample in SAMPLES if sample[0] == name):
        ours, plain = copied(arguments), copied(arguments)
        expected = tensors(op(*ours))
        with OnlyAten():
            actual = tensors(TABLE[op](*plain))
        tolerance = 2e-2 if expected[0].dtype == torch.bfloat16 else 2e-4
        same = dict(rtol=tolerance, atol=tolerance, msg=lambda text, what=what: f"{what}: {text}")
        torch.testing.assert_close(actual, expected, **same)
        written = [[a for a in arguments if isinstance(a, Tensor)] for arguments in (plain, ours)]
        torch.testing.assert_close(*written, **same)
        if "grad_weight" not in name and "both" not in name:  # a filter's gradient is read by an optimiser alone
            for a, e in zip(actual, expected, strict=True):
                assert torch.empty_like(a).stride() == torch.empty_like(e).stride(), f"{name} {what}"


def test_packed_pointwise_out() -> None:
    *arguments, residual, K, stride, activation = next(s for s in SAMPLES if s[0] == "packed_pointwise")[2]
    expected = ops.packed_pointwise(*arguments, residual, K, stride, activation)
    out = torch.empty_like(expected)
    assert TABLE[ops.packed_pointwise.out](*arguments, residual, K, stride, activation, out=out) is out
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


def test_every_op_of_the_library_is_in_the_table_and_tried() -> None:
    names = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith("sepconv_ext::")]
    assert len(names) >= 15
    known = {op.name().removesuffix(".default") for op in TABLE}
    assert known == set(names)
    assert {f"sepconv_ext::{name}" for name, *_ in SAMPLES} | {"sepconv_ext::packed_pointwise.out"} == known


# --- models ---


class Decoder(nn.Module):
    """Converted: depthwise, pointwise and grouped layers, transposed ones; and sequences with states."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU6(), nn.Conv2d(8, 8, 3, 2, 1, groups=8), nn.SiLU())
        self.up = nn.ConvTranspose2d(8, 8, 4, 2, 1, groups=8)
        self.odd = nn.ConvTranspose2d(8, 4, 3, 2, 1, output_padding=1, groups=2)
        self.around = nn.Conv2d(8, 8, 3, padding=1, groups=4, padding_mode="circular")
        self.row = nn.Conv1d(4, 4, 3, padding=2, groups=4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.around(self.up(self.down(x)))
        return x, self.row(self.odd(x).flatten(2))


class Mixer(nn.Module):
    """A state-space model's convolution, where the channels lie next to each other, from a state."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 16)
        self.conv = sepconv_ext.nn.CausalConv1d(8, 4, activation="silu")

    def forward(self, x: Tensor, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, gate = self.inner(x).chunk(2, -1)
        plain = self.conv(x.transpose(1, 2))
        y, states = functional.causal_conv1d(
            x.transpose(1, 2), self.conv.weight, self.conv.bias, "silu", states, return_final_states=True
        )
        return y.transpose(1, 2) * gate, states, plain.transpose(1, 2).view(x.shape)


def converted() -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    model = Decoder().eval()
    assert len(convert_(model)) == 6
    return model, (t(2, 3, 12, 10),)


class Clip(nn.Module):
    """A block with squeeze-and-excitation, reflected borders, and a depthwise convolution of two images as a volume."""

    def __init__(self) -> None:
        super().__init__()
        self.block = sepconv_ext.nn.InvertedResidual(6, 6, 12, 3, squeeze_channels=4)
        self.mirrored = sepconv_ext.nn.Conv2d(6, 6, 3, padding=1, groups=6, padding_mode="reflect")
        self.volume = sepconv_ext.nn.Conv3d(6, 12, 3, padding=1, groups=6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(x)
        return self.volume(torch.stack((y, self.mirrored(y)), 2))


def clip() -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    return Clip().eval(), (t(2, 6, 11, 9),)


def causal() -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    return Mixer().eval(), (t(2, 9, 6), t(2, 8, 3))


def frozen() -> tuple[nn.Module, tuple[Tensor, ...]]:
    torchvision = pytest.importorskip("torchvision", reason="torchvision is an extra")
    torch.manual_seed(0)
    x = t(2, 3, 32, 32)
    network = freeze(torchvision.models.mobilenet_v3_small(num_classes=10).eval(), x)
    assert network.report.programs
    return network, (x,)


def tokens() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A frozen transformer of images, whose linear layers over tokens are packed products."""
    timm = pytest.importorskip("timm", reason="timm is an extra")
    torch.manual_seed(0)
    x = t(2, 3, 32, 32)
    arguments = dict(img_size=32, patch_size=8, depth=2, embed_dim=64, num_heads=2, num_classes=10)
    network = freeze(timm.create_model("deit_tiny_patch16_224", **arguments).eval(), x)
    assert "packed_pointwise" in str(network.graph)
    return network, (x,)


MODELS = {"converted": converted, "causal": causal, "clip": clip, "frozen": frozen, "tokens": tokens}
by_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())


def any_batch(model: nn.Module, arguments: tuple[Tensor, ...]) -> tuple:
    """The sizes that may change, as torch.export wants to be told: a frozen network's forward takes *args."""
    batch = torch.export.Dim("batch", min=1, max=64)
    sizes = tuple({0: batch} for _ in arguments)
    return (sizes,) if isinstance(model, sepconv_ext.graph.Frozen) else sizes


def exported(model: nn.Module, arguments: tuple[Tensor, ...]) -> torch.export.ExportedProgram:
    with torch.no_grad():
        return torch.export.export(model, arguments, dynamic_shapes=any_batch(model, arguments))


def namespaces(program: torch.export.ExportedProgram) -> set[str]:
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    return {target.namespace for target in targets if isinstance(target, torch._ops.OpOverload)}


@by_model
def test_run_decompositions_gives_plain_aten(make: Callable) -> None:
    model, arguments = make()
    program = exported(model, arguments)
    assert "sepconv_ext" in namespaces(program)  # until it is asked for
    plain = program.run_decompositions()
    assert namespaces(plain) == {"aten"}
    one = tuple(argument[:1] for argument in arguments)
    for inputs in (arguments, one):
        torch.testing.assert_close(plain.module()(*inputs), model(*inputs), rtol=1e-3, atol=1e-4)


class Step(nn.Module):
    """A token of decoding, which writes its state in place."""

    def forward(self, x: Tensor, state: Tensor, weight: Tensor) -> Tensor:
        return functional.causal_conv1d_update(x, state, weight, None, "silu") * 2


def step() -> tuple[Tensor, ...]:
    return t(2, 8), t(2, 8, 3), t(8, 4, seed=2)


def test_decoding_in_place_becomes_plain_aten() -> None:
    """And the state is written; or the op is kept, by choice and by Inductor."""
    program = torch.export.export(Step(), step())
    plain = program.run_decompositions()
    assert "sepconv_ext" not in str(plain.graph)
    expected, actual = step(), step()
    torch.testing.assert_close(plain.module()(*actual), Step()(*expected), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(actual[1], expected[1])
    assert not torch.equal(actual[1], step()[1])

    table = torch.export.default_decompositions()
    del table[ops.causal_conv1d_update.default]
    kept = program.run_decompositions(table)
    assert "sepconv_ext.causal_conv1d_update" in str(kept.graph)
    given = step()
    torch.testing.assert_close(kept.module()(*given), Step()(*step()))
    torch.testing.assert_close(given[1], expected[1])


def test_an_op_is_kept_by_choice() -> None:
    model, arguments = converted()
    table = torch.export.default_decompositions()
    del table[ops.conv2d.default]
    program = exported(model, arguments).run_decompositions(table)
    targets = {str(node.target) for node in program.graph.nodes if "sepconv_ext" in str(node.target)}
    assert targets == {"sepconv_ext.conv2d.default"}
    assert "sepconv_ext" in namespaces(exported(model, arguments).run_decompositions({}))


def test_the_table_is_there_whoever_was_imported_first_and_inductor_keeps_the_ops() -> None:
    code = """
assert ops.conv2d.default in torch.export.default_decompositions()
assert ops.conv2d.default not in decompositions
"""
    first = "import torch\nimport sepconv_ext\nfrom torch._inductor.decomposition import decompositions\n"
    second = "import torch\nfrom torch._inductor.decomposition import decompositions\nimport sepconv_ext\n"
    for imports in (first, second):
        subprocess.run([sys.executable, "-c", f"{imports}ops = torch.ops.sepconv_ext\n{code}"], check=True)


@by_model
def test_onnx(make: Callable, tmp_path: Path) -> None:
    """As it is, without revert_, for any number of images: what onnxruntime computes is what the model computes."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is an extra")
    pytest.importorskip("onnxscript", reason="onnxscript, which torch.onnx needs, is an extra")
    model, arguments = make()
    path = tmp_path / "model.onnx"
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        sizes = any_batch(model, arguments)
        torch.onnx.export(model, arguments, path, dynamo=True, dynamic_shapes=sizes, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for inputs in (arguments, tuple(argument[:1] for argument in arguments)):
        feed = {node.name: x.numpy() for node, x in zip(session.get_inputs(), inputs, strict=True)}
        with torch.no_grad():
            expected = tensors(model(*inputs))
        results = [torch.from_numpy(result) for result in session.run(None, feed)]
        torch.testing.assert_close(results, expected, rtol=1e-3, atol=1e-4)


RUN = """
import sys, torch
library, folder = sys.argv[1:]
torch.ops.load_library(library)
x, y = torch.load(f"{folder}/data.pt")
network = torch._inductor.aoti_load_package(f"{folder}/model.pt2")
torch.testing.assert_close(network(x), y)
assert "sepconv_ext" not in sys.modules
"""


@pytest.mark.slow
def test_a_package_of_aotinductor_needs_the_library_alone(tmp_path: Path) -> None:
    """It holds our ops, and runs in a process that has imported nothing of this package."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=8)).eval()
    convert_(model)
    x = t(2, 3, 8, 8)
    with torch.no_grad():
        program = torch.export.export(model, (x,))
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        torch.save((x, model(x)), tmp_path / "data.pt")
    assert b"sepconv_ext::conv2d" in b"".join(contents(Path(package)))
    command = [sys.executable, "-c", RUN, sepconv_ext._C.__file__, str(tmp_path)]
    subprocess.run(command, check=True, cwd=tmp_path)


def contents(package: Path) -> Iterator[bytes]:
    with zipfile.ZipFile(package) as files:
        yield from map(files.read, files.namelist())
