"""What a run leaves behind: record.json, summary.md and plots in one folder, and the tables on the terminal.

Every table is made from the record alone, so a committed record can be read again:
``python -m benchmarks --read benchmarks/results/<folder>``.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from . import console, plots, products, sequences
from .record import LISTS, LOSING, VIEW_BAR, bars, disagreements, dumps, geometric_mean, losses, timed


@dataclass(frozen=True)
class Table:
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


def write(record: dict, folder: Path) -> list[Path]:
    """Writes the record and everything made of it; returns the files. At most five, however long the run."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in (*folder.glob("*.png"), folder / "record.json", folder / "summary.md"):
        old.unlink(missing_ok=True)
    (folder / "record.json").write_text(dumps(record))
    (folder / "summary.md").write_text(markdown(record))
    return [folder / "record.json", folder / "summary.md", *plots.draw(record, folder)]


def show(record: dict) -> None:
    """The tables on the terminal."""
    for line in headline(record):
        console.say(line)
    for table in tables(record):
        if table.rows:
            console.table(table.title, table.columns, table.rows)
        if table.note:
            console.say(table.note)


def markdown(record: dict) -> str:
    """summary.md."""
    parts = ["# Benchmark summary", *headline(record)]
    for table in tables(record):
        parts.append(f"## {table.title}")
        if table.rows:
            lines = [
                "| " + " | ".join(table.columns) + " |",
                "| --- |" + " ---: |" * (len(table.columns) - 1),
            ]
            parts.append("\n".join(lines + ["| " + " | ".join(row) + " |" for row in table.rows]))
        if table.note:
            parts.append(table.note)
    return "\n\n".join(parts) + "\n"


def headline(record: dict) -> list[str]:
    machine = record["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    commit = (machine["commit"] or "unknown")[:12] + ("" if machine["commit_is_clean"] else " with local changes")
    speeds = []
    for threads, table in record["copy_bandwidth"].items():
        rates = ", ".join(f"{name} {rate / 1e9:,.0f} GFLOP/s" for name, rate in record["matmul_rate"][threads].items())
        at = "" if machine["device_type"] == "cuda" else f" on {threads} threads"
        speeds.append(f"copy {table[max(table, key=int)] / 1e9:,.1f} GB/s, matrix product {rates}{at}")
    lines = [
        f"{machine['device']}, {machine['cores']} cores; {versions}; commit {commit}; {record['started']}; "
        f"{record['seconds']:.0f} s.",
        f"Measured here: {'; '.join(speeds)}. TF32: {_tf32(machine['tf32'])}.",
    ]
    load = (machine["load_average"] or [0.0])[0]
    if machine["device_type"] == "cpu" and load > 0.7:
        lines.append(f"The machine was busy (load average {load:.1f} at the start): wall-clock times are unreliable.")
    return lines


def tables(record: dict) -> list[Table]:
    """Every table of the report, in reading order."""
    found = []
    layers = record["layers"]
    if layers:
        found += [_bars(record), _means(layers), _losses(layers), _worst(layers)]
    if record.get("pairs"):  # records of before have none
        found.append(_pairs(record["pairs"]))
    if record.get("networks"):  # likewise
        found += [_networks(record["networks"]), _networks_means(record["networks"])]
    if record.get("products"):  # likewise
        found.append(Table("1x1 layers, packed weights", *products.means(record["products"])))
        found.append(Table("Losing 1x1 layers", *products.losing(record["products"])))
    if record["models"]:
        found += [_models(record["models"]), _models_means(record["models"])]
    if record.get("sequences"):  # likewise
        found.append(Table("State-space models", *sequences.shown(record["sequences"])))
    if record["overhead"]:
        found.append(_overhead(record["overhead"]))
    if record.get("views"):  # likewise
        found += [_views(record["views"]), _slow_views(record["views"])]
    found.append(_trouble(record))
    return [table for table in found if table is not None]


def _bars(record: dict) -> Table | None:
    rows = [
        (
            b["map"],
            b["layout"],
            str(b["threads"]),
            str(b["layers"]),
            _x(b["mean"]),
            _x(b["bar"]),
            _x(b["worst"]),
            _yes(b["met"]),
        )
        for b in bars(record)
    ]
    columns = (
        "map",
        "layout",
        "threads",
        "layers",
        "geometric mean",
        "bar",
        "worst",
        f"mean met, none below {LOSING}",
    )
    return Table("Depthwise layers against oneDNN: are the bars met?", columns, rows) if rows else None


def _means(rows: list[dict]) -> Table:
    keys = ("kind", "dtype", "map", "layout", "threads")
    groups: dict[tuple, list[dict]] = {}
    for row in timed(rows):
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    shown = []
    for group, part in groups.items():
        ups = [row["speedup"] for row in part]
        share = statistics.median(row["share_of_floor"] for row in part)
        routed = sum(row["aten"] for row in part)
        lost = sum(up < LOSING for up in ups)
        figures = (
            _x(geometric_mean(ups)),
            _x(min(ups)),
            _x(max(ups)),
            f"{100 * share:.0f}%",
            str(routed),
            str(lost),
        )
        shown.append((*map(str, group), str(len(part)), *figures))
    columns = (*keys, "layers", "geometric mean", "worst", "best", "of floor", "by ATen", "losing")
    note = (
        'Speed-up: time of the best peer over ours. "of floor": floor over our time, the median over the layers, with '
        'floor = max(bytes / copy bandwidth, operations / rate). "by ATen": how many layers the plan routes to torch.'
    )
    return Table("Layers", columns, shown, note)


_ROW_COLUMNS = (
    "layer",
    "map",
    "dtype",
    "layout",
    "threads",
    "ours",
    "best peer",
    "its time",
    "speed-up",
    "of floor",
    "kernel",
)


def _row(row: dict) -> tuple[str, ...]:
    times = (_time(row["seconds"]), row["best_peer"], _time(row["best_peer_seconds"]), _x(row["speedup"]))
    share = f"{100 * row['share_of_floor']:.0f}%"
    return (
        row["layer"],
        row["map"],
        row["dtype"],
        row["layout"],
        str(row["threads"]),
        *times,
        share,
        row["kernel"],
    )


def _losses(rows: list[dict]) -> Table:
    lost = losses(rows)
    note = "" if lost else f"None: no layer is slower than {LOSING} times its best peer."
    return Table(f"Losing layers (below {LOSING}x, measured twice)", _ROW_COLUMNS, [_row(row) for row in lost], note)


def _worst(rows: list[dict], count: int = 5) -> Table:
    shown = []
    for map in dict.fromkeys(row["map"] for row in rows):
        part = sorted((row for row in timed(rows) if row["map"] == map), key=lambda row: row["speedup"])
        shown += [_row(row) for row in part[:count]]
    return Table(f"The {count} least speed-ups of each map", _ROW_COLUMNS, shown)


def _models(rows: list[dict]) -> Table:
    shown = []
    for row in rows:
        where = (*(row[key] for key in ("model", "mode", "dtype", "layout")), str(row["threads"]), str(row["batch"]))
        times = (
            _time(row["seconds"]),
            row["best_peer"] or "-",
            _time(row["best_peer_seconds"]),
            _x(row["speedup"]),
        )
        top = "-" if row["same_top5"] is None else _yes(row["same_top5"])
        taken = row.get("peak_bytes", {})  # records of before have none
        both = (taken.get(f"{who} {row['layout']}") for who in ("sepconv", "torch"))
        memory = " / ".join("-" if size is None else f"{size / 2**20:.1f}" for size in both)
        shown.append(
            (*where, *times, memory, str(row["converted"]), f"{row['difference']:.1e}", top, _yes(row["agrees"]))
        )
    columns = ("model", "mode", "dtype", "layout", "threads", "batch", "ours", "best peer", "its time", "speed-up")
    note = (
        "Memory: the most that a call takes at a time beyond parameters and images, ours / torch in this layout. "
        "Converted: convolutions replaced."
    )
    last = ("memory, MB", "converted", "difference", "same top 5", "agrees")
    return Table("Models", (*columns, *last), shown, note)


def _models_means(rows: list[dict]) -> Table:
    groups: dict[tuple, list[dict]] = {}
    for row in timed(rows):
        groups.setdefault((row["mode"], row["dtype"], row["layout"], str(row["threads"])), []).append(row)
    shown = [(*where, *_figures([row["speedup"] for row in part])) for where, part in groups.items()]
    return Table("Models, over the best peer", ("mode", "dtype", "layout", "threads", *_FIGURES), shown)


_FIGURES = ("networks", "geometric mean", "worst", "best", "slower than the best peer")


def _figures(ups: list[float]) -> tuple[str, ...]:
    return str(len(ups)), _x(geometric_mean(ups)), _x(min(ups)), _x(max(ups)), str(sum(up < 1 for up in ups))


def _networks(rows: list[dict]) -> Table:
    names = list(dict.fromkeys(name for row in rows for name in row["seconds_of"]))
    shown = []
    for row in rows:
        network = row["model"] if "@" in row["model"] else f"{row['model']}@{row['image_size']}"
        times = [_milliseconds(row["seconds_of"].get(name)) for name in names]
        shown.append((network, str(row["batch"]), str(row["threads"]), *times, _x(row["speedup"])))
    note = (
        "Milliseconds a batch in inference, float32; each runtime in a process of its own, in turns, in the better of "
        "both layouts. The last column is the best peer's time over the better of ours: below 1.0 this package loses."
    )
    return Table("Whole networks", ("network", "N", "threads", *names, "over the best"), shown, note)


def _networks_means(rows: list[dict]) -> Table:
    groups: dict[tuple, list[dict]] = {}
    for row in timed(rows):
        groups.setdefault((row["batch"], row["threads"]), []).append(row)
    groups["all", "all"] = timed(rows)
    ups = {where: [row["speedup"] for row in part] for where, part in groups.items()}
    shown = [(str(batch), str(threads), *_figures(part)) for (batch, threads), part in ups.items() if part]
    return Table("Whole networks, over the best peer", ("N", "threads", *_FIGURES), shown)


def _pairs(rows: list[dict]) -> Table:
    shown = []
    for row in rows:
        taken, held = (
            {name: f"{size / 2**20:.1f} MB" for name, size in row[key].items()} for key in ("peak_bytes", "held_bytes")
        )
        training = row["mode"] == "training"
        shown.append(
            (
                row["layer"],
                row["mode"],
                row["dtype"],
                row["layout"],
                str(row["threads"]),
                _time(row["seconds"]),
                _time(row["seconds_of"].get("sepconv kept")),
                _time(row["seconds_of"].get("sepconv, two calls")),
                _time(row["best_peer_seconds"]),
                _x(row["speedup"]),
                f"{taken['sepconv']} / {taken['torch']}",
                f"{held['sepconv']} / {held['sepconv kept']} / {held['torch']}" if training else "-",
            )
        )
    columns = ("pair", "mode", "dtype", "layout", "threads", "one call", "kept", "two calls", "torch", "speed-up")
    note = (
        "Depthwise, relu, 1x1, relu. One call: separable_conv2d as the plan runs it; kept: with save_intermediate; two "
        "calls: this package's depthwise and pointwise convolution. Most memory: that a call takes at a time, its "
        "results included, one call / torch. Held: from the forward to the backward pass, the output included, one "
        "call / kept / torch: what adds up over the layers of a network."
    )
    return Table("Depthwise-separable pairs", (*columns, "most memory", "held"), shown, note)


def _overhead(rows: list[dict]) -> Table:
    shown = [
        (row["what"], f"{row['ours_us']:.2f} us", f"{row['torch_us']:.2f} us", _x(row["ratio"], 3)) for row in rows
    ]
    note = (
        "Ratio: our host time a call over torch's; below 1 is better. The shape is tiny, so that the call is the cost."
    )
    return Table("Host time a call", ("call", "ours", "torch", "ratio"), shown, note)


def _views(rows: list[dict]) -> Table:
    """Op x map x view, over layouts, dtypes and thread counts."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["layer"], row["map"], row["view"]), []).append(row)
    shown = []
    for group, part in groups.items():
        figures = []
        for peer in ("over_copy", "over_torch"):
            ups = [row[peer] for row in part if row[peer] is not None]
            figures += [_x(geometric_mean(ups)), _x(min(ups))] if ups else ["-", "-"]
        kernels = " / ".join(dict.fromkeys(row["kernel"] for row in part if row["kernel"]))
        shown.append((*group, str(len(part)), *figures, kernels or "-"))
    columns = ("op", "map", "view", "rows", "over a copy", "worst", "over torch", "worst", "kernels")
    note = (
        "Speed-up over a dense copy and our own call on it, and over torch on the same view: geometric mean and least "
        "of both layouts, the dtypes and the thread counts. One operand is a view; the others are dense."
    )
    return Table("Views", columns, shown, note)


def _slow_views(rows: list[dict]) -> Table:
    slow = [(min(up for up in (row["over_copy"], row["over_torch"], 1e9) if up is not None), row) for row in rows]
    slow = sorted((pair for pair in slow if pair[0] < VIEW_BAR), key=lambda pair: pair[0])
    where = ("layer", "map", "view", "layout", "dtype", "threads")
    columns = ("op", *where[1:], "ours", "over a copy", "over torch", "kernel", "reason")
    shown = [
        (
            *(str(row[key]) for key in where),
            _time(row["seconds"]),
            _x(row["over_copy"]),
            _x(row["over_torch"]),
            row["kernel"] or "-",
            row["reason"] or "-",
        )
        for _, row in slow
    ]
    note = "" if shown else f"None: no view is slower than {VIEW_BAR} times its copy or torch, of {len(rows)} rows."
    return Table(f"Losing views (below {VIEW_BAR}x, measured twice)", columns, shown, note)


def _trouble(record: dict) -> Table:
    rows = []
    for row in disagreements(record):
        what = row.get("layer") or row["model"]
        why = next((text for name, text in row["errors"].items() if name.startswith("sepconv")), "")
        why = why or ("it did not run" if row["difference"] is None else f"difference {row['difference']:.2e}")
        of = " ".join(filter(None, (row.get("map") or row["mode"], row.get("view"))))
        rows.append((what, of, row["dtype"], row["layout"], str(row["threads"]), why))
    lines = []
    for row in (row for name in LISTS if name != "overhead" for row in record.get(name, ())):
        lines += [f"{name}: {text}" for name, text in row["errors"].items() if not name.startswith("sepconv")]
    lines = [f"- {text} ({lines.count(text)} rows)" for text in dict.fromkeys(lines)]
    lines = [f"- skipped: {text}" for text in record["skipped"]] + lines
    note = "\n".join(([] if rows else ["Every result agreed with torch's."]) + lines)
    return Table("Wrong results and skipped cases", ("case", "of", "dtype", "layout", "threads", "what"), rows, note)


def _x(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}x"


def _yes(value: bool) -> str:
    return "yes" if value else "NO"


def _tf32(flags: dict) -> str:
    on = [name for name, value in flags.items() if value]
    return "on for " + " and ".join(on) if on else "off everywhere"


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:.3g}"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    for unit, scale in (("s", 1), ("ms", 1e3), ("us", 1e6)):
        if seconds * scale >= 1:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"
