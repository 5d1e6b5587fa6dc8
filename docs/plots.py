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
NETWORKS = RESULTS / "2026-11-30-xeon-2cores-peers" / "record.json"
MAPS = {"forward": "forward", "grad_input": "gradient by\nthe input", "grad_weight": "gradient by\nthe weight"}
LAYOUTS = {"nchw": "NCHW", "channels_last": "channels_last"}
COLOURS = {"nchw": "#0072b2", "channels_last": "#e69f00"}
LOSS, GREY = "#b2432b", "#7f7f7f"


def networks() -> list[tuple[str, float]]:
    """(label, the best peer's time over ours)."""
    rows = json.loads(NETWORKS.read_text())["networks"]
    return [
        (f"{row['model']}@{row['image_size']}, N {row['batch']}, {row['threads']} thr.", row["speedup"]) for row in rows
    ]


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


def draw_networks(axis) -> None:
    rows = networks()
    colours = [LOSS if ratio < 1 else COLOURS["nchw"] for _, ratio in rows]
    bars = axis.barh([label for label, _ in rows], [ratio for _, ratio in rows], color=colours, height=0.62)
    axis.bar_label(bars, [f"{ratio:.2f}x" for _, ratio in rows], padding=3, fontsize=9)
    axis.axvline(1.0, color=GREY, linewidth=1)
    axis.set_xlim(0, max(1.2, *(ratio + 0.2 for _, ratio in rows)))
    axis.invert_yaxis()
    axis.tick_params(axis="y", labelsize=9)
    axis.set_xlabel("best peer's time over ours")
    title = "Whole networks, inference\n1.0 is the better of ONNX Runtime and OpenVINO"
    axis.set_title(title, fontsize=11)


def results() -> None:
    record = json.loads(LAYERS.read_text())
    machine = f"{record['machine']['device']}, {record['machine']['cores']} cores"
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(6.6, 7.4), layout="constrained", gridspec_kw={"height_ratios": [1.2, 1]}
    )
    draw_layers(top, record, threads=2)
    draw_networks(bottom)
    for axis in (top, bottom):
        axis.spines[["top", "right"]].set_visible(False)
    count = len({row["layer"] for row in record["layers"]})
    note = (
        f"{machine}, float32. Above: {record['started'][:10]}, the {count} depthwise layers of layers.csv, N 8,\n"
        f"2 threads; bars and figures are geometric means. Below: {NETWORKS.parent.name[:10]}, 224x224,\n"
        "2 cores of a Xeon, frozen models; thr. is threads."
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
