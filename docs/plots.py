"""Draws the pictures of docs/ from the records in benchmarks/results: `python -m docs.plots`.

Each picture says which machine, day and number of threads it is from, and what 1.0 stands for.
"""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path

import matplotlib

from benchmarks import plots

matplotlib.use("svg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
LAYERS = RESULTS / "2026-11-22-epyc-2cores" / "record.json"
EAGER = RESULTS / "2026-11-22-epyc-2cores-networks" / "record.json"
NETWORKS = RESULTS / "2026-12-01-xeon-2cores-peers" / "record.json"
MAPS = {"forward": "forward", "grad_input": "gradient by\nthe input", "grad_weight": "gradient by\nthe weight"}
LAYOUTS = {"nchw": "NCHW", "channels_last": "channels_last"}
COLOURS = {"nchw": "#0072b2", "channels_last": "#e69f00"}
GREY = "#7f7f7f"


def draw_layers(axis, record: dict, threads: int) -> None:
    """One dot a layer, the geometric mean as a bar across; a column for each map and layout."""
    ticks = []
    for i, map in enumerate(MAPS):
        for j, layout in enumerate(LAYOUTS):
            ratios = sorted(
                row["speedup"]
                for row in record["layers"]
                if (row["map"], row["layout"], row["threads"]) == (map, layout, threads) and row["speedup"]
            )
            x = 2.6 * i + j
            spread = [x + 0.33 * math.sin(2.4 * k) for k in range(len(ratios))]
            axis.scatter(spread, ratios, s=9, color=COLOURS[layout], alpha=0.55, linewidths=0, label=LAYOUTS[layout])
            mean = statistics.geometric_mean(ratios)
            axis.plot([x - 0.42, x + 0.42], [mean, mean], color="black", linewidth=2)
            axis.annotate(f"{mean:.2f}x", (x, 0.62), ha="center", fontsize=9)
        ticks.append(2.6 * i + 0.5)
    axis.set_yscale("log")
    axis.set_ylim(0.55, 100)
    axis.set_yticks([1, 2, 5, 10, 20, 50], ["1x", "2x", "5x", "10x", "20x", "50x"])
    axis.minorticks_off()
    axis.set_xticks(ticks, MAPS.values())
    axis.axhline(1.0, color=GREY, linewidth=1)
    axis.set_ylabel("torch's time over ours")
    handles, names = axis.get_legend_handles_labels()
    axis.legend(handles[:2], names[:2], frameon=False, fontsize=9, loc="upper left", markerscale=2)
    axis.set_title("Depthwise layers against torch (oneDNN)\n1.0 is torch's time, eager, same layout", fontsize=11)


def draw_networks(axis, rows: list[dict]) -> None:
    """A line for each network; a dot for each batch and number of threads: the best peer's time over ours."""
    names = list(dict.fromkeys(row["model"] for row in rows))
    axis.hlines(range(len(names)), 0, 100, color=GREY, linewidth=0.4, alpha=0.5)
    for batch, threads in sorted({(row["batch"], row["threads"]) for row in rows}):
        some = [row for row in rows if (row["batch"], row["threads"]) == (batch, threads) and row["speedup"]]
        axis.scatter(
            [row["speedup"] for row in some], [names.index(row["model"]) for row in some], s=26, alpha=0.85,
            color=COLOURS["nchw" if threads == 1 else "channels_last"], marker="o" if batch == 1 else "D",
            label=f"N {batch}, {threads} thread{'s' * (threads > 1)}",
        )  # fmt: skip
    axis.axvline(1.0, color="black", linewidth=1)
    axis.set_xlim(0, max(row["speedup"] or 0 for row in rows) + 0.2)
    axis.set_yticks(range(len(names)), names, fontsize=9)
    axis.invert_yaxis()
    axis.legend(frameon=False, fontsize=9, loc="upper right")
    axis.set_xlabel("best peer's time over ours")
    axis.set_title("Whole networks, inference\n1.0 is the better of ONNX Runtime and OpenVINO", fontsize=11)


def results() -> None:
    record = json.loads(LAYERS.read_text())
    machine = f"{record['machine']['device']}, {record['machine']['cores']} cores"
    contest = json.loads(NETWORKS.read_text())
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(6.6, 8.6), layout="constrained", gridspec_kw={"height_ratios": [1, 1.1]}
    )
    draw_layers(top, record, threads=2)
    draw_networks(bottom, contest["networks"])
    for axis in (top, bottom):
        axis.spines[["top", "right"]].set_visible(False)
    count = len({row["layer"] for row in record["layers"]})
    note = (
        f"{machine}, float32. Above: {record['started'][:10]}, the {count} depthwise layers of layers.csv, N 8,\n"
        f"2 threads; bars and figures are geometric means. Below: {contest['started'][:10]},\n"
        f"{contest['machine']['device']}, {contest['machine']['cores']} cores, frozen models."
    )
    figure.supxlabel(note, fontsize=9, color="#444444")
    save(figure, "results")


def networks_against_eager() -> None:
    record = json.loads(EAGER.read_text())
    save(plots.networks(record["models"], plots.origin(record, record["models"])), "networks")


def save(figure, name: str) -> None:
    path = ROOT / "docs" / "images" / f"{name}.svg"
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    print(path.relative_to(ROOT))


def main() -> None:
    plt.rcParams.update({"svg.hashsalt": "sepconv_ext", "svg.fonttype": "path", "font.family": "DejaVu Sans"})
    results()
    networks_against_eager()


if __name__ == "__main__":
    main()
