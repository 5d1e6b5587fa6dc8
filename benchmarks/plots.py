"""The plots of a record, where matplotlib is installed. Each says the machine, the day, the threads and what 1.0 is."""

from __future__ import annotations

from pathlib import Path

from . import console

OURS, PEER, REFERENCE = "#0072b2", "#d55e00", "#7f7f7f"
LAYOUT_COLOURS = {"nchw": "#0072b2", "channels_last": "#e69f00"}
MARKERS = "osD^v"
ROW = 0.2  # inches for a line of text of 8 points


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
        ("speedup", speedup, layers),
        ("floor", floor, layers),
        ("models", networks, models),
    ):
        if rows:
            figure = draw_one(rows, origin(record, rows))
            figure.savefig(folder / f"{name}.png", dpi=100, bbox_inches="tight")
            drawn.append(folder / f"{name}.png")
            _pyplot().close(figure)
    return drawn


def origin(record: dict, rows: list[dict]) -> str:
    """Where these rows are from, in one line: the machine, the day, torch, dtypes and threads."""
    machine = record["machine"]
    where = machine["device"] if machine["device_type"] == "cuda" else f"{machine['device']}, {machine['cores']} cores"
    dtypes = ", ".join(dict.fromkeys(row["dtype"] for row in rows))
    threads = " and ".join(str(count) for count in dict.fromkeys(row["threads"] for row in rows))
    return f"{where}; {record['started'][:10]}; torch {machine['versions']['torch']}; {dtypes}; threads: {threads}"


def _pyplot():
    import matplotlib.pyplot as plt

    return plt


def _series(rows: list[dict], *keys: str) -> dict[tuple, list[dict]]:
    """Rows by their values of `keys`, in the order of the first of each."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups


def speedup(rows: list[dict], origin: str):
    """A line for each layer, a column for each map; a colour for each layout, a marker for each dtype and threads."""
    plt = _pyplot()
    maps = list(dict.fromkeys(row["map"] for row in rows))
    labels = list(dict.fromkeys(row["layer"] for row in rows))
    place = {label: index for index, label in enumerate(labels)}
    size = (3.2 * len(maps) + 2, ROW * len(labels) + 2)
    figure, axes = plt.subplots(1, len(maps), figsize=size, sharey=True, squeeze=False, layout="constrained")
    kinds = _series(rows, "dtype", "threads")
    marker = {kind: MARKERS[index % len(MARKERS)] for index, kind in enumerate(kinds)}
    for axis, map in zip(axes[0], maps, strict=True):
        of_map = [row for row in rows if row["map"] == map]
        for (layout, dtype, threads), part in _series(of_map, "layout", "dtype", "threads").items():
            axis.scatter(
                [row["speedup"] for row in part],
                [place[row["layer"]] for row in part],
                s=18,
                color=LAYOUT_COLOURS[layout],
                marker=marker[dtype, threads],
                alpha=0.8,
                linewidths=0,
                label=f"{layout}, {dtype}, threads: {threads}",
            )
        axis.axvline(1.0, color=REFERENCE, linewidth=1)
        _speedup_ticks(axis, [row["speedup"] for row in of_map])
        axis.set_title(map, fontsize=10)
        axis.tick_params(labelsize=8, top=True, labeltop=True)
        axis.grid(axis="x", which="major", alpha=0.3)
        axis.grid(axis="y", alpha=0.2)
        axis.set_axisbelow(True)
    axes[0, 0].set_yticks(range(len(labels)), labels)
    axes[0, 0].set_ylim(len(labels) - 0.4, -0.6)
    handles, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, fontsize=8, ncols=2, loc="outside lower left", frameon=False)
    figure.suptitle(f"Time of the best peer over ours, by layer; 1.0 is the best peer\n{origin}", fontsize=10)
    return figure


def _speedup_ticks(axis, ratios: list[float]) -> None:
    """A logarithmic axis that names its ticks as people do: 0.5x, 1x, 2x, 5x, 10x."""
    ticks = [digit * 10.0**power for power in range(-3, 4) for digit in (1, 2, 5)]
    low, high = min([*ratios, 1.0]) * 0.9, max([*ratios, 1.0]) * 1.1
    axis.set_xscale("log")
    axis.set_xlim(low, high)
    axis.set_xticks([tick for tick in ticks if low <= tick <= high])
    axis.minorticks_off()
    axis.xaxis.set_major_formatter("{x:g}x")


def floor(rows: list[dict], origin: str):
    plt = _pyplot()
    maps = list(dict.fromkeys(row["map"] for row in rows))
    figure, axes = plt.subplots(
        1, len(maps), figsize=(4.2 * len(maps), 4.2), sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    low, high = (pick(row["floor_seconds"] for row in rows) * 1e6 for pick in (min, max))
    for axis, map in zip(axes[0], maps, strict=True):
        part = [row for row in rows if row["map"] == map]
        floors = [row["floor_seconds"] * 1e6 for row in part]
        peers, mine = ([row[key] * 1e6 for row in part] for key in ("best_peer_seconds", "seconds"))
        axis.scatter(floors, peers, s=10, color=PEER, alpha=0.6, linewidths=0, label="best peer")
        axis.scatter(floors, mine, s=10, color=OURS, alpha=0.6, linewidths=0, label="sepconv_ext")
        axis.plot([low, high], [low, high], color=REFERENCE, linewidth=1, label="the floor: 1.0 of what is possible")
        axis.set(xscale="log", yscale="log", title=map, xlabel="floor, us")
        axis.grid(which="major", alpha=0.2)
        axis.set_axisbelow(True)
    axes[0, 0].set_ylabel("time, us")
    axes[0, 0].legend(fontsize=8, frameon=False)
    figure.suptitle(f"Time against the floor: memory or arithmetic at the measured rates\n{origin}", fontsize=10)
    return figure


def networks(rows: list[dict], origin: str):
    """A network is one group of bars, one for each mode, layout, dtype and number of threads."""
    plt = _pyplot()
    models = _series(rows, "model")
    series = list(_series(rows, "mode", "layout", "dtype", "threads"))
    varied = [len({key[i] for key in series}) > 1 for i in range(4)]
    figure, axis = plt.subplots(figsize=(6.6, ROW * 0.8 * len(models) * (len(series) + 1) + 1.6), layout="constrained")
    for index, key in enumerate(series):
        mode, layout, _, threads = key
        part = [row for row in rows if (row["mode"], row["layout"], row["dtype"], row["threads"]) == key]
        places = [list(models).index((row["model"],)) * (len(series) + 1) + index for row in part]
        ratios = [row["speedup"] for row in part]
        words = (mode, layout, key[2], f"threads: {threads}")
        label = ", ".join(word for word, shown in zip(words, varied, strict=True) if shown) or mode
        alpha = 1.0 if mode == "inference" else 0.5
        bars = axis.barh(places, ratios, color=LAYOUT_COLOURS[layout], alpha=alpha, height=0.9, label=label)
        axis.bar_label(bars, [f"{ratio:.2f}" for ratio in ratios], fontsize=7, padding=2)
    middles = [index * (len(series) + 1) + (len(series) - 1) / 2 for index in range(len(models))]
    axis.set_yticks(middles, [model for (model,) in models], fontsize=9)
    axis.axvline(1.0, color=REFERENCE, linewidth=1)
    axis.set_ylim(len(models) * (len(series) + 1) - 1, -1)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_xlabel(f"time of the best peer over ours; 1.0 is the best peer\n{origin}", fontsize=8)
    handles, names = axis.get_legend_handles_labels()
    figure.legend(handles, names, fontsize=8, ncols=2, loc="outside upper center", frameon=False)
    return figure
