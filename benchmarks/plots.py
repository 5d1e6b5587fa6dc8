"""The plots of a record, where matplotlib is installed."""

from __future__ import annotations

from pathlib import Path

from . import console

OURS, PEER, REFERENCE = "#0072b2", "#d55e00", "#7f7f7f"
LAYOUT_COLOURS = {"nchw": "#0072b2", "channels_last": "#e69f00"}
MARKERS = "osD^v"


def draw(record: dict, folder: Path) -> list[Path]:
    """speedup.png and floor.png of the layers, models.png; returns those drawn."""
    if not record["layers"] and not record["models"]:
        return []
    try:
        import matplotlib
    except ImportError:
        console.say("No plots: matplotlib is not installed.")
        return []
    matplotlib.use("Agg")
    drawn = []
    layers = [row for row in record["layers"] if row["speedup"] is not None]
    models = [row for row in record["models"] if row["speedup"] is not None]
    for name, draw_one, rows in (
        ("speedup", _speedup, layers),
        ("floor", _floor, layers),
        ("models", _models, models),
    ):
        if rows:
            figure = draw_one(rows, record["machine"]["device"])
            figure.savefig(folder / f"{name}.png", dpi=100, bbox_inches="tight")
            drawn.append(folder / f"{name}.png")
            _pyplot().close(figure)
    return drawn


def _pyplot():
    import matplotlib.pyplot as plt

    return plt


def _series(rows: list[dict]) -> dict[tuple, list[dict]]:
    """Rows by (layout, dtype, threads): one colour a layout, one marker for each of the others."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["layout"], row["dtype"], row["threads"]), []).append(row)
    return groups


def _speedup(rows: list[dict], device: str):
    plt = _pyplot()
    maps = list(dict.fromkeys(row["map"] for row in rows))
    labels = list(dict.fromkeys(row["layer"] for row in rows))
    place = {label: index for index, label in enumerate(labels)}
    width = max(7.0, 0.17 * len(labels) + 2)
    figure, axes = plt.subplots(
        len(maps), 1, figsize=(width, 2.4 * len(maps) + 1.6), sharex=True, squeeze=False, layout="constrained"
    )
    kinds = {key[1:]: None for key in _series(rows)}
    marker = {kind: MARKERS[index % len(MARKERS)] for index, kind in enumerate(kinds)}
    for axis, map in zip(axes[:, 0], maps, strict=True):
        for (layout, dtype, threads), part in _series([row for row in rows if row["map"] == map]).items():
            axis.scatter(
                [place[row["layer"]] for row in part],
                [row["speedup"] for row in part],
                s=14,
                color=LAYOUT_COLOURS[layout],
                marker=marker[dtype, threads],
                alpha=0.8,
                linewidths=0,
                label=f"{layout}, {dtype}, threads: {threads}",
            )
        axis.axhline(1.0, color=REFERENCE, linewidth=1)
        axis.set_yscale("log")
        axis.set_ylabel(f"{map}\nspeed-up")
        axis.grid(axis="y", which="both", alpha=0.2)
        axis.set_axisbelow(True)
    axes[-1, 0].set_xticks(range(len(labels)), labels, rotation=90, fontsize=6)
    axes[-1, 0].set_xlim(-0.8, len(labels) - 0.2)
    handles, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, fontsize=7, ncols=2, loc="outside lower left", frameon=False)
    figure.suptitle(f"Time of the best peer over ours, by layer: {device}", fontsize=10)
    return figure


def _floor(rows: list[dict], device: str):
    plt = _pyplot()
    maps = list(dict.fromkeys(row["map"] for row in rows))
    figure, axes = plt.subplots(
        1, len(maps), figsize=(4.2 * len(maps), 4), sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    low, high = (pick(row["floor_seconds"] for row in rows) * 1e6 for pick in (min, max))
    for axis, map in zip(axes[0], maps, strict=True):
        part = [row for row in rows if row["map"] == map]
        floors = [row["floor_seconds"] * 1e6 for row in part]
        peers, mine = ([row[key] * 1e6 for row in part] for key in ("best_peer_seconds", "seconds"))
        axis.scatter(floors, peers, s=10, color=PEER, alpha=0.6, linewidths=0, label="best peer")
        axis.scatter(floors, mine, s=10, color=OURS, alpha=0.6, linewidths=0, label="sepconv_ext")
        axis.plot([low, high], [low, high], color=REFERENCE, linewidth=1, label="the floor")
        axis.set(xscale="log", yscale="log", title=map, xlabel="floor, us")
        axis.grid(which="major", alpha=0.2)
        axis.set_axisbelow(True)
    axes[0, 0].set_ylabel("time, us")
    axes[0, 0].legend(fontsize=8, frameon=False)
    figure.suptitle(f"Time against the floor: {device}", fontsize=10)
    return figure


def _models(rows: list[dict], device: str):
    plt = _pyplot()
    names = [
        f"{row['model']}, {row['mode']}, {row['layout']}, {row['dtype']}, threads: {row['threads']}" for row in rows
    ]
    figure, axis = plt.subplots(figsize=(7, 0.24 * len(rows) + 1.2))
    colours = [LAYOUT_COLOURS[row["layout"]] for row in rows]
    bars = axis.barh(names, [row["speedup"] for row in rows], color=colours, height=0.7)
    axis.bar_label(bars, [f"{row['speedup']:.2f}" for row in rows], fontsize=7, padding=2)
    axis.axvline(1.0, color=REFERENCE, linewidth=1)
    axis.invert_yaxis()
    axis.tick_params(axis="y", labelsize=7)
    axis.set_xlabel("time of the best peer over ours")
    axis.set_title(f"Models: {device}", fontsize=10)
    return figure
