"""The benchmark's own arithmetic (geometry, bytes, operations, floor), its record, and one very small run of it all."""

from __future__ import annotations

import functools
import importlib
import json
import re
import threading
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sepconv_ext
from benchmarks import __main__ as benchmark
from benchmarks import (
    console,
    layer_runs,
    layers,
    machine,
    models,
    networks,
    pairs,
    peers,
    plots,
    record,
    report,
    runtimes,
    sequences,
    timing,
    views,
)
from benchmarks.layers import Layer, floor

README = Path(benchmark.__file__).with_name("README.md").read_text()


def layer(kind="depthwise", c=4, k=4, h=6, w=5, r=3, s=3, stride=(1, 1), pad=(1, 1), dilation=(1, 1), groups=4, bias=0):
    return Layer(kind, c, k, h, w, r, s, *stride, *pad, *dilation, groups, bool(bias))


LAYERS = [
    layer(),
    layer(stride=(2, 1), pad=(0, 2), bias=True),
    layer(r=5, s=3, pad=(2, 1), dilation=(2, 1), h=11),
    layer(kind="grouped", k=6, groups=2),
    layer(kind="pointwise", k=7, r=1, s=1, pad=(0, 0), groups=1, stride=(2, 2)),
    layer(r=7, s=7, pad=(3, 3), h=3, w=3),
]


@pytest.mark.parametrize("case", LAYERS, ids=lambda case: case.label)
def test_geometry_and_work_are_those_of_conv2d(case):
    x = torch.ones(case.input_size(2), dtype=torch.float64, requires_grad=True)
    w = torch.ones(case.weight_size, dtype=torch.float64)
    y = F.conv2d(x, w, None, case.stride, case.padding, case.dilation, case.groups)
    assert tuple(y.shape) == case.output_size(2)
    # Over ones, each output counts the taps that fall inside the image.
    assert case.macs(2) == int(y.sum())
    y.sum().backward()
    read = int((x.grad != 0).sum())
    bias = case.out_channels if case.bias else 0
    assert case.bytes_moved(2, 4, "forward") == 4 * (read + w.numel() + y.numel() + bias)
    assert case.bytes_moved(2, 4, "grad_weight") == 4 * (read + w.numel() + y.numel())
    assert case.bytes_moved(2, 2, "grad_input") == 2 * (x.numel() + w.numel() + y.numel())


def test_floor_is_the_longer_of_traffic_and_arithmetic():
    case = layer()
    slow_memory = floor(case, 1, 4, "forward", bandwidth=1.0, rate=1e9)
    assert slow_memory.bound == "memory" and slow_memory.seconds == case.bytes_moved(1, 4, "forward")
    slow_core = floor(case, 1, 4, "forward", bandwidth=1e12, rate=1.0)
    assert slow_core.bound == "arithmetic" and slow_core.seconds == 2 * case.macs(1)


def test_layers_csv_is_read_whole_and_labels_are_unique():
    rows = [row.split(",") for row in layers.CSV.read_text().splitlines()[1:]]
    everything = []
    for half in layers.HALVES:
        loaded = layers.load(half=half)
        part = [row for row in rows if row[-1] == half]
        assert sum(item.count for item in loaded) == sum(int(row[-2]) for row in part)
        assert sum(len(item.models) for item in loaded) == sum(len(row[0].split()) for row in part)
        everything += loaded
    assert len({item.label for item in everything}) == len(everything)  # no shape is in two halves
    assert len({name for item in layers.load(half="held-out") for name in item.models}) > 55
    for item in everything:
        kind = "depthwise" if item.groups == item.in_channels > 1 else "pointwise" if item.groups == 1 else "grouped"
        assert item.kind == kind and min(item.out_height, item.out_width) > 0
    assert layers.drawn(everything, 9) == layers.drawn(everything, 9) != everything[:9]


def test_representative_layers_cover_every_family():
    loaded = layers.load()
    chosen = layers.select(loaded)
    assert {item.kind for item in chosen} == set(layers.KINDS)
    assert {item.kernel_h for item in chosen if item.kind == "depthwise"} == {3, 5, 7}
    assert 10 < len(chosen) < 40
    assert layers.select(loaded, ["grouped"], everything=True) == [item for item in loaded if item.kind == "grouped"]


def test_bandwidth_is_that_of_the_largest_copy_that_fits():
    table = {1 << 20: 40.0, 1 << 24: 20.0, 1 << 28: 10.0}
    assert [machine.bandwidth_for(table, size) for size in (1, 1 << 20, 1 << 25, 1 << 30)] == [40, 40, 20, 10]


@pytest.mark.parametrize("layout", peers.LAYOUTS)
@pytest.mark.parametrize("map", layers.MAPS)
def test_every_peer_computes_the_same(map, layout):
    makers = {name: maker for name, maker in peers.MAKERS.items() if name not in peers.NEEDS_COMPILER}
    makers["ours"] = peers.ours
    for case in (*LAYERS, layer(kind="pointwise", k=7, r=1, s=1, pad=(0, 0), groups=1, bias=True)):
        sets = [peers.Operands.random(case, 2, torch.float64, layout, torch.device("cpu"), seed=0)]
        expected = peers.torch_conv(case, map, sets)(0)
        ran = {name: maker(case, map, sets) for name, maker in makers.items()}
        for name, run in ran.items():
            assert run is None or peers.difference(run(0), expected) < 1e-12, (case.label, name)
        assert (ran["matmul"] is not None) == (case.label.startswith("pw1x1 4>7") and layout == "channels_last")


def test_what_torch_crashes_on_is_not_asked_for():
    cpu = torch.device("cpu")
    strided = layer(kind="pointwise", c=13, k=7, r=1, s=1, pad=(0, 0), groups=1, stride=(2, 2))
    assert [peers.torch_crashes(strided, map, cpu) for map in layers.MAPS] == [False, False, True]
    assert not peers.torch_crashes(replace(strided, in_channels=16), "grad_weight", cpu)
    assert not peers.torch_crashes(replace(strided, stride_h=1, stride_w=1), "grad_weight", cpu)


def test_shift_and_add_is_a_depthwise_convolution(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # its arithmetic, not the compiler's
    for case in (LAYERS[0], LAYERS[1], LAYERS[2], LAYERS[5]):
        sets = [peers.Operands.random(case, 2, torch.float32, "nchw", torch.device("cpu"), seed=0)]
        expected = peers.torch_conv(case, "forward", sets)(0)
        assert peers.difference(peers.shift_and_add(case, "forward", sets)(0), expected) < 1e-5


def test_difference_notices_wrong_results():
    expected = torch.tensor([1.0, -4.0])
    assert peers.difference(expected, expected) == 0
    assert peers.difference(torch.tensor([1.0, -3.0]), expected) == 0.25
    assert peers.difference(torch.tensor([1.0, float("nan")]), expected) == float("inf")
    assert peers.difference(torch.zeros(3), expected) == float("inf")


def test_clock_rotates_interleaves_and_survives_a_failing_peer():
    calls = []

    def broken(index):
        raise RuntimeError("no such kernel\nsecond line")

    contenders = {"a": lambda i: calls.append(("a", i)), "b": lambda i: calls.append(("b", i)), "broken": broken}
    clock = timing.CpuClock()
    clock.sample_seconds = 0.0  # one call a sample
    measured = clock.measure(contenders, sets=3, budget=0.0, rounds=4)
    assert measured.errors == {"broken": "RuntimeError: no such kernel"}
    assert {name: len(samples) for name, samples in measured.samples.items()} == {"a": 5, "b": 5}
    assert "".join(who for who, _ in calls[4:]) == "abbaabbaab"
    numbers = [index for _, index in calls]
    assert all((b - a) % 3 != 0 for a, b in pairwise(numbers))


def test_a_second_measurement_does_not_replace_the_first():
    first, more = timing.Timing({"a": [5.0, 5.0, 1.0], "b": [1.0]}), timing.Timing({"a": [1.0, 5.0]}, {"b": "gone"})
    both = first.joined(more)
    assert both.samples == {"a": [5.0, 5.0, 1.0, 1.0, 5.0]} and both.errors == {"b": "gone"}
    assert both.seconds("a") == 5.0


def row(**changes):
    base = dict(
        layer="dw3x3 4 @6x5", kind="depthwise", dtype="float32", layout="nchw", map="forward", threads=1, seconds=1e-3,
        best_peer="torch nchw", best_peer_seconds=2e-3, speedup=2.0, share_of_floor=0.5, floor_seconds=5e-4, aten=False,
        kernel="k", difference=0.0, agrees=True, errors={},
    )  # fmt: skip
    return base | changes


def made_up(rows, batch=8):
    return {
        "format": record.FORMAT,
        "started": "2000-01-01 00:00:00 UTC",
        "seconds": 1.0,
        "settings": {"batch": batch},
        "machine": {
            "device": "a processor", "device_type": "cpu", "cores": 2, "versions": {"torch": "2"}, "commit": None,
            "commit_is_clean": False, "tf32": {"cudnn": False, "matmul": False}, "load_average": [0.0, 0.0, 0.0],
        },
        "copy_bandwidth": {"1": {"1024": 1e9}},
        "matmul_rate": {"1": {"float32": 1e9}},
        "skipped": [],
        "layers": rows,
        "pairs": [],
        "models": [],
        "overhead": [],
    }  # fmt: skip


def test_bars_need_the_mean_and_every_layer():
    good = made_up([row(speedup=1.3), row(speedup=1.2), row(map="grad_weight", speedup=3.9)])
    verdicts = {(bar["map"], bar["layout"]): bar["met"] for bar in record.bars(good)}
    assert verdicts["forward", "nchw"] and verdicts["forward", "all"] and not verdicts["grad_weight", "all"]
    one_slow = made_up([row(speedup=9.0), row(speedup=0.96)])
    assert not any(bar["met"] for bar in record.bars(one_slow))
    assert record.bars(made_up([row()], batch=1)) == []


def test_every_losing_and_every_wrong_row_is_shown():
    rows = [row(layer=f"lost{i}", speedup=0.5 + i / 1000) for i in range(30)]
    rows += [row(layer="wrong", agrees=False, difference=float("inf"))]
    errors = {"sepconv nchw": "RuntimeError: boom"}
    rows += [row(layer="broken", seconds=None, speedup=None, agrees=False, errors=errors)]
    text = report.markdown(made_up(rows))
    assert all(f"| lost{i} |" in text for i in range(30))
    assert len(record.losses(rows)) == 30
    assert "| wrong |" in text and "| broken |" in text and "boom" in text
    assert json.loads(record.dumps(made_up(rows)))["layers"][30]["difference"] == 1e308


def test_plain_tables_line_up():
    lines = console.plain(("layer", "us"), [("a", "1.5"), ("longer", "10.25")]).splitlines()
    assert lines == ["layer      us", "------  -----", "a         1.5", "longer  10.25"]


@pytest.mark.parametrize("right", (True, False))
def test_training_steps_compiled(monkeypatch, right):
    """Both compiled: torch's network by its own backend, and the same network by this package's. What is compared is
    what was compiled: a backend that gets it wrong is found out."""
    asked = []

    def compiled(model, backend="inductor"):
        asked.append((backend, {type(module) for module in model.modules()} & {nn.Conv2d, sepconv_ext.nn.Conv2d}))
        if backend == "sepconv_ext" and not right:
            model.register_forward_hook(lambda module, inputs, output: output * 1.1)
        return model

    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setattr(models, "build", lambda name: _network())
    monkeypatch.setattr(models, "image_size", lambda name: 32)
    plan = models.Plan(
        *(("mobilenet_v2",), torch.device("cpu"), 2, [torch.float32], timing.CpuClock(), [1]),
        modes=("training",),
        compile=True,
        budget=0.01,
        rounds=1,
    )
    rows = list(models.run(plan, lambda _: None, []))
    assert {name.rpartition(" ")[0] for row in rows for name in row["samples_ms"]} == {"sepconv", "torch", "compile"}
    assert all(row["agrees"] is right and row["speedup"] for row in rows)
    assert sorted(asked, key=str) == 2 * [("inductor", {nn.Conv2d})] + 2 * [("sepconv_ext", {nn.Conv2d})]


def test_state_space_models(monkeypatch, tmp_path):
    """The table and the record's fields; and a convolution that gets it wrong is found out."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    monkeypatch.setattr(sequences, "MODELS", {"mamba2": sequences.MODELS["mamba2"]})
    rows = list(sequences.run(lambda _: None, [1], turns=1, scale=16))
    assert [row["mode"] for row in rows] == list(sequences.MODES) and all(row["agrees"] for row in rows)
    text = report.markdown({**made_up([]), "sequences": rows})
    assert all(f"| mamba2 | {mode} | {positions // 16} | 1 |" in text for mode, positions in sequences.MODES.items())
    module = importlib.import_module("transformers.models.mamba2.modeling_mamba2")
    right = module.causal_conv1d_fn
    wrong = functools.wraps(right.__wrapped__)(lambda *args, **kwargs: 1.1 * right(*args, **kwargs))
    monkeypatch.setattr(module, "causal_conv1d_fn", wrong)
    assert not any(row["agrees"] for row in sequences.run(lambda _: None, [1], turns=1, scale=16))


@pytest.mark.parametrize("arguments", (["--dtype", "int8"], ["--models", "vgg"], ["--maps", "backward"]))
def test_unknown_choices_are_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        benchmark.parse(arguments)
    assert "choose from" in capsys.readouterr().err


def test_a_very_small_run(tmp_path, monkeypatch, capsys):
    """All parts, on two tiny layers and one small network; the fields are those that README.md fixes."""
    tiny = [replace(LAYERS[0], models=("m",)), replace(LAYERS[4], models=("m",))]
    monkeypatch.setattr(layers, "load", lambda half: tiny)
    monkeypatch.setattr(models, "build", lambda name: _network())
    monkeypatch.setattr(models, "image_size", lambda name: 32)
    monkeypatch.setattr(networks, "CACHE", tmp_path / "networks")
    monkeypatch.setattr(networks, "Process", InThisProcess)
    monkeypatch.setattr(networks.metadata, "version", lambda package: "0")  # torchvision may not be there
    monkeypatch.setattr(runtimes.Compiled, "make", lambda self, model, images: model)  # no minutes in the compiler
    monkeypatch.setattr(benchmark.overhead, "CALLS", 2)
    monkeypatch.setattr(machine, "copy_bandwidth", lambda *_: {1 << 20: 1e10})
    # torch's own test tools, which another test file imports, lock the TF32 flags that a run sets.
    lock = torch.backends.flags_frozen.__globals__
    monkeypatch.setitem(lock, "__allow_nonbracketed_mutation_flag", True)
    monkeypatch.setattr(machine, "matmul_rate", lambda *_: 1e11)
    monkeypatch.setattr(pairs, "load", lambda: [pairs.Pair(8, 12, 9, 3, 2, 1)])
    monkeypatch.setattr(views, "LAYERS", tuple(tiny))
    monkeypatch.setattr(views, "VIEWS", views.VIEWS[::4])
    arguments = ["--layers", "--separable", "--all", "--views"]
    arguments += ["--models", "mobilenet_v2", "--training", "mobilenet_v2", "--peers", "torch"]
    arguments += ["--overhead", "--products", "--quick", "--device", "cpu"]
    arguments += ["--kinds", "depthwise,pointwise", "--threads", "1", "--batch", "2", "--out", str(tmp_path / "record")]
    code = benchmark.main(arguments)
    assert code == 0, capsys.readouterr().out
    written = record.read(tmp_path / "record")
    asked = [(layer, map) for layer in tiny for map in layers.MAPS]
    asked = [call for call in asked if not peers.torch_crashes(*call, torch.device("cpu"))]
    assert len(written["layers"]) == 2 * len(asked) and len(written["models"]) == 2
    (product,) = written["products"]
    assert product["model"] == tiny[1].label and set(product["seconds_of"]) >= {"torch", "onednn", "sepconv freeze"}
    (network,) = written["networks"]
    assert set(network["seconds_of"]) == {"torch", "sepconv freeze"}
    assert set(network["differences"]) == {
        f"{name} {layout}" for name in network["seconds_of"] for layout in peers.LAYOUTS
    }
    assert len(written["overhead"]) == 2 * len(benchmark.overhead.CASES)
    assert len(written["pairs"]) == 2 * 2
    of_maps = {map: sum(line["map"] == map for line in written["views"]) for map in layers.MAPS}
    inputs, gradients = (sum(view.operand == operand for view in views.VIEWS) for operand in "xg")
    fused = 2  # the separable and the spatial op
    assert of_maps == {
        "forward": 2 * inputs * (len(tiny) + fused),
        "grad_input": 2 * gradients * len(tiny),
        "grad_weight": 2 * (inputs + gradients) * len(tiny),
    }
    fixed = set(re.findall(r"`(\w+)`", README))
    for part in record.LISTS:
        assert {field for line in written[part] for field in line} <= fixed
    assert set(written) | set(written["machine"]) <= fixed
    timed = [line for part in ("layers", "pairs", "products", "networks", "models") for line in written[part]]
    assert all(line["agrees"] and line["speedup"] > 0 for line in timed)
    assert all(line["agrees"] and line["over_copy"] > 0 and line["over_torch"] > 0 for line in written["views"])
    for line in written["pairs"]:  # the output is [2, 12, 5, 5], what lies between the stages [2, 8, 5, 5]
        held = line["held_bytes"]
        if line["mode"] == "training":
            assert held["sepconv"] == 4 * 2 * 12 * 5 * 5 and held["sepconv kept"] - held["sepconv"] == 4 * 2 * 8 * 5 * 5
        assert line["peak_bytes"]["sepconv"] >= held["sepconv"]
    assert all(line["converted"] == 2 for line in written["models"])
    files = {path.name for path in (tmp_path / "record").iterdir()}
    always, drawn = {"record.json", "summary.md"}, {"speedup.png", "floor.png", "models.png"}
    assert always <= files <= always | drawn
    assert benchmark.main(["--read", str(tmp_path / "record")]) == 0


class InThisProcess:
    """A runtime without a process of its own: there the small network is not known.

    One at a time: tracing by torch.fx replaces `nn.Module.__call__` meanwhile, for all threads. Two that overlap leave
    one of the replacements behind, and every later call of a module in this process fails.
    """

    turn = threading.Lock()

    def __init__(self, runtime, folder):
        self.process = self.worker = runtimes.Worker(runtimes.RUNTIMES[runtime]())

    def ask(self, do, **command):
        with self.turn:
            return getattr(self.worker, do)(**command)

    def end(self):
        self.worker.forget()


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_runtime_in_a_process_of_its_own(runtime, tmp_path):
    for package in runtimes.PACKAGES[runtime]:
        pytest.importorskip(package, reason=f"{package} is of the extra 'peers'")
    import numpy
    import onnx
    from onnx import TensorProto, helper

    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 3, 4, 4]) for name in ("images", "y")]
    graph = helper.make_graph([helper.make_node("Relu", ["images"], ["y"])], "network", values[:1], values[1:])
    onnx.save(
        helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 17)]), tmp_path / "network.onnx"
    )
    images = numpy.random.default_rng(0).standard_normal((2, 3, 4, 4)).astype(numpy.float32)
    numpy.save(tmp_path / "images.npy", images)
    numpy.save(tmp_path / "expected.npy", numpy.maximum(images, 0).astype(numpy.float64))
    process = networks.Process(runtime, tmp_path)
    try:
        where = {"batch": 2, "threads": 1, "layout": "nchw"}
        said = process.ask("ready", folder=str(tmp_path), **where)
        assert said["agrees"] and said["difference"] < 1e-6, said
        assert process.ask("time", seconds=1e-3, **where)["samples"]
        assert "KeyError" in process.ask("time", seconds=1e-3, **where | {"threads": 3})["error"]
        process.process.kill()
        assert "its process ended" in process.ask("time", seconds=1e-3, **where)["error"]
    finally:
        process.end()


def test_agreement_of_logits():
    import numpy

    exact = numpy.array([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 6.0001]])
    assert runtimes.agreement(exact + 1e-4, exact)["agrees"]
    assert runtimes.agreement(exact[:, [0, 1, 2, 3, 4, 6, 5]], exact)["agrees"]  # closer than the rounding
    assert not runtimes.agreement(exact[:, [1, 0, 2, 3, 4, 5, 6]], exact)["agrees"]
    assert not runtimes.agreement(exact * numpy.nan, exact)["agrees"]
    assert not runtimes.agreement(exact[:, :6], exact)["agrees"]


def test_a_plot_says_where_it_is_from():
    written = {"started": "2026-11-22 19:30:59 UTC"}
    written["machine"] = {"device": "AMD EPYC", "device_type": "cpu", "cores": 2, "versions": {"torch": "2.14.1"}}
    rows = [{"dtype": "float32", "threads": threads} for threads in (1, 1, 2)]
    assert plots.origin(written, rows) == "AMD EPYC, 2 cores; 2026-11-22; torch 2.14.1; float32; threads: 1 and 2"


def _network():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, stride=4),
        torch.nn.BatchNorm2d(8),
        torch.nn.Conv2d(8, 8, 3, groups=8),
        torch.nn.Conv2d(8, 16, 1),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(16, 1000),
    )


def test_a_slow_looking_layer_is_measured_again():
    budgets = []

    class Stub(timing.CpuClock):
        def measure(self, contenders, sets=1, budget=0.0, rounds=1, graph=True, most=1):
            budgets.append(budget)
            ours = 2.0 if len(budgets) == 1 else 0.5
            return timing.Timing({name: [ours if name.startswith("sepconv") else 1.0] for name in contenders})

    plan = layer_runs.Plan(
        layers=[LAYERS[0]], device=torch.device("cpu"), batch=1, dtypes=[torch.float32], clock=Stub(),
        thread_counts=[1], bandwidth={1: {1: 1e9}}, rate={1: {"float32": 1e9}}, maps=("forward",), budget=1.0,
    )  # fmt: skip
    first, second = layer_runs.run(plan, lambda what: None)
    assert (first["speedup"], first["measured_again"]) == (2.0, True)
    assert (second["speedup"], second["measured_again"]) == (2.0, False)
    assert budgets == [1.0, 4.0, 1.0]
