"""1x1 layers of layers.csv with weights packed once: a frozen layer against ONNX Runtime, oneDNN and torch.

Each is a network of one layer, so that the contest is that of networks.py: processes in turns, both layouts of those
that know two. What looks slower than 0.97 of torch or ONNX Runtime is measured again with three times the turns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from . import networks
from .layers import Layer
from .record import LOSING, geometric_mean

OURS = "sepconv freeze"
BARS = {"onnxruntime": 1.2, "onednn": 2.0, "torch": 1.0}  # peers, and the geometric means that are aimed at


def plan_of(layers: list[Layer], batches: list[int], threads: list[int], turns: int) -> networks.Plan:
    """A turn is shorter than a network's, as most calls take less than a millisecond."""
    known = {layer.label: layer for layer in layers}

    def prepare(label: str, root: Path, batch: int, onnx: bool) -> Path:
        return _prepare(known[label], root, batch, onnx)

    return networks.Plan(
        names=tuple(known),
        batches=tuple(batches),
        thread_counts=tuple(threads),
        runtimes=(*BARS, OURS),
        seconds=0.03,
        turns=turns,
        prepare=prepare,
    )


def _prepare(layer: Layer, root: Path, batch: int, onnx: bool) -> Path:
    """The same folder for all layers, as some would fill hundreds of megabytes: the processes forget each layer."""
    folder = root / "layer"
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    module = torch.nn.Conv2d(layer.in_channels, layer.out_channels, 1, layer.stride, bias=layer.bias).eval()
    images = torch.randn(layer.input_size(batch))
    torch.save(module, folder / "module.pt")
    np.save(folder / "images.npy", images.numpy())
    if onnx:
        _write_onnx(module, folder / "network.onnx")
    with torch.no_grad():
        np.save(folder / "expected.npy", module.double()(images.double()).numpy())
    return folder


def _write_onnx(module: torch.nn.Conv2d, path: Path) -> None:
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    sizes = {"images": ["batch", *(None,) * 3], "y": [None] * 4}
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, size) for name, size in sizes.items()]
    constants = [numpy_helper.from_array(p.detach().numpy(), name) for name, p in module.named_parameters()]
    reads = ["images", *(constant.name for constant in constants)]
    node = helper.make_node("Conv", reads, ["y"], strides=module.stride)
    graph = helper.make_graph([node], "layer", values[:1], values[1:], constants)
    onnx.save(helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 17)]), path)


def run(plan: networks.Plan, advance: Callable[[str], None], skipped: list[str]) -> Iterator[dict]:
    """Yields the record's rows, one a layer, N and thread count."""
    rows = list(networks.run(plan, advance, skipped))
    lost = {row["model"] for row in rows if least(row) < LOSING}
    longer = replace(plan, names=tuple(name for name in plan.names if name in lost), turns=3 * plan.turns)
    again = {_key(row): row for row in networks.run(longer, advance, [])} if lost else {}
    for row in rows:
        yield again.get(_key(row), row) | {"measured_again": _key(row) in again}


def _key(row: dict) -> tuple:
    return row["model"], row["batch"], row["threads"]


def over(row: dict, peer: str) -> float | None:
    """The peer's time over ours."""
    ours, theirs = (row["seconds_of"].get(name) for name in (OURS, peer))
    return theirs / ours if ours and theirs else None


def least(row: dict) -> float:
    """Over torch and over ONNX Runtime, the lesser; LOSING where neither ran."""
    return min((up for up in (over(row, "torch"), over(row, "onnxruntime")) if up is not None), default=LOSING)


def means(rows: list[dict]) -> tuple[list[str], list[tuple[str, ...]], str]:
    """Columns, rows and a note: geometric means by N, threads and the number of pixels."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        for pixels in ("all", "one" if row["image_size"] == 1 else "more"):
            groups.setdefault((str(row["batch"]), str(row["threads"]), pixels), []).append(row)
    groups["all", "all", "all"] = rows
    columns = ["N", "threads", "pixels", "layers"]
    for peer, bar in BARS.items():
        columns += [f"over {peer}" + (f" (bar {bar:g}x)" if bar > 1 else ""), "worst"]
    shown = []
    for group, part in groups.items():
        figures = []
        for peer in BARS:
            ups = [up for up in (over(row, peer) for row in part) if up is not None]
            figures += [f"{geometric_mean(ups):.2f}x", f"{min(ups):.2f}x"] if ups else ["-", "-"]
        shown.append((*group, str(len(part)), *figures))
    note = (
        "The peer's time over that of the frozen layer, whose weight was packed before; float32, each runtime in a "
        "process of its own, in turns, in the better of both layouts. oneDNN is called by name."
    )
    return columns, shown, note


def losing(rows: list[dict]) -> tuple[list[str], list[tuple[str, ...]], str]:
    """The same of the layers that are slower than 0.97 of torch or of ONNX Runtime, the worst over torch first."""
    lost = sorted((row for row in rows if least(row) < LOSING), key=lambda row: over(row, "torch") or 0)
    columns = ["layer", "N", "threads", "ours, us", *(f"over {peer}" for peer in BARS)]
    shown = [
        (
            *(str(row[key]) for key in ("model", "batch", "threads")),
            f"{1e6 * row['seconds']:.4g}",
            *(f"{over(row, peer):.2f}x" if over(row, peer) else "-" for peer in BARS),
        )
        for row in lost
    ]
    return columns, shown, "" if lost else f"None, of {len(rows)} rows."
