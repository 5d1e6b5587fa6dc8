"""A record: what one run measured, as JSON, and the conclusions that can be drawn from it alone."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable
from pathlib import Path

FORMAT = "sepconv_ext benchmark record, version 1"
LISTS = ("layers", "pairs", "networks", "products", "models", "sequences", "overhead", "views")  # one row a line

LOSING = 0.97  # a speed-up below this is a loss; what looks like one is measured again, longer, before it is called one

VIEW_BAR = 0.95  # the same for a view, over a dense copy and the same call, and over torch

# What the CPU kernels are held to: geometric means over the depthwise layers, float32, batch 8, against oneDNN.
CPU_BARS = {"forward": 1.2, "grad_input": 1.2, "grad_weight": 4.0}


def dumps(record: dict) -> str:
    """JSON with one line per row, so that records can be compared line by line."""
    short = {key: value for key, value in record.items() if key not in LISTS}
    text = json.dumps(_finite(short), indent=1, allow_nan=False)
    for key in LISTS:
        rows = ",\n".join(json.dumps(_finite(row), allow_nan=False) for row in record.get(key, []))
        text = text[:-2] + f',\n "{key}": [\n{rows}\n ]\n}}'
    return text + "\n"


def read(folder: Path) -> dict:
    """The record of a folder."""
    return json.loads((folder / "record.json").read_text())


def timed(rows: Iterable[dict]) -> list[dict]:
    """Rows in which both sides ran."""
    return [row for row in rows if row["speedup"] is not None]


def geometric_mean(values: Iterable[float]) -> float:
    return math.exp(statistics.fmean(math.log(value) for value in values))


def losses(rows: Iterable[dict]) -> list[dict]:
    """Rows slower than LOSING times the best peer, worst first."""
    return sorted((row for row in timed(rows) if row["speedup"] < LOSING), key=lambda row: row["speedup"])


def disagreements(record: dict) -> list[dict]:
    """Rows whose result was wrong, or that our side could not run at all."""
    rows = (row for name in LISTS if name != "overhead" for row in record.get(name, ()))
    return [row for row in rows if not row["agrees"] or row["seconds"] is None]


def bars(record: dict) -> list[dict]:
    """The CPU bars against the record: one dict per map, layout and thread count, and one per map for all of them.

    Empty where the record is not about depthwise layers in float32 with batch 8 on a CPU."""
    rows = [row for row in timed(record["layers"]) if row["kind"] == "depthwise" and row["dtype"] == "float32"]
    others = record["settings"].get("layers") in ("learnt", "held-out")
    if record["machine"]["device_type"] != "cpu" or record["settings"]["batch"] != 8 or others:
        return []
    found = []
    for map, bar in CPU_BARS.items():
        mine = [row for row in rows if row["map"] == map]
        parts = {}
        for row in mine:
            parts.setdefault((row["layout"], row["threads"]), []).append(row["speedup"])
        if mine:
            parts["all", "all"] = [row["speedup"] for row in mine]
        for (layout, threads), ups in parts.items():
            mean, worst = geometric_mean(ups), min(ups)
            where = {"map": map, "layout": layout, "threads": threads, "layers": len(ups)}
            found.append({**where, "mean": mean, "bar": bar, "worst": worst, "met": mean >= bar and worst >= LOSING})
    return found


def _finite(value):
    """JSON has no infinity: a result of the wrong shape, or with a NaN, differs by 1e308."""
    if isinstance(value, float) and not math.isfinite(value):
        return 1e308
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return value
