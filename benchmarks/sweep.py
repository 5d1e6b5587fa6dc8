"""``python -m benchmarks --sweep``: other kernels and cuts than the plan's; ``--fit``: the plan's table from sweeps.

A sweep asks the plan for what makes sense (csrc/cuda/plan_overrule.cpp) and says what each takes: on a GPU by time,
without one by the PTX machine's prediction, which the file says. A file is a line about the GPU, and one for each
layer, written as it comes, so that a sweep that is stopped can be continued. Those in benchmarks/sweeps are tested:
the plan's choice is within 5% of the best, or the row says why not (tests/test_sweep.py).

A fit changes one number of the table after the other where that makes the plan's choices faster, until none does.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import layers, predict

FORMAT = "sepconv_ext sweep, version 1"
FOLDER = Path(__file__).with_name("sweeps")
TABLE = Path(__file__).parent.parent / "csrc/cuda/tuning.h"
EXECUTED = 2e6  # multiply-adds of a launch that a prediction executes whole


@dataclass(frozen=True)
class Tried:
    kernel: str
    tile: dict[str, int]
    microseconds: float
    bound: str = ""


@dataclass
class Row:
    """One map of one layer, and what was tried; the plan's own choice is the first."""

    case: dict[str, Any]  # as the plan's program takes it
    label: str
    tried: list[Tried] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    why: str = ""  # the plan's choice is not within 5% of the best, on purpose

    @property
    def best(self) -> Tried:
        return min(self.tried, key=lambda t: t.microseconds)

    def of(self, kernel: str, tile: dict[str, int]) -> Tried | None:
        return next((t for t in self.tried if (t.kernel, t.tile) == (kernel, tile)), None)


@dataclass
class Sweep:
    gpu: str
    capability: int
    multiprocessors: int
    how: str  # predicted, measured
    rows: list[Row]

    def facts(self) -> dict[str, Any]:
        return {"sm": self.capability, "multiprocessors": self.multiprocessors}


def read(path: Path) -> Sweep:
    head, *lines = (json.loads(line) for line in path.read_text().splitlines())
    if head.pop("format") != FORMAT:
        raise SystemExit(f"{path}: not a {FORMAT}")
    rows = [Row(**(line | {"tried": [Tried(*tried) for tried in line["tried"]]})) for line in lines]
    return Sweep(**head, rows=rows)


def line_of(row: Row) -> str:
    tried = [[t.kernel, t.tile, round(t.microseconds, 3), t.bound] for t in row.tried]
    line = {"case": row.case, "label": row.label, "tried": tried, "failed": row.failed}
    return json.dumps(line | ({"why": row.why} if row.why else {}))


@dataclass(frozen=True)
class Cell:
    """What is swept: one map of one layer."""

    layer: layers.Layer
    map: str
    dtype: str
    layout: str
    batch: int

    @property
    def case(self) -> dict[str, Any]:
        return predict.arguments_of(self.layer, self.map, self.dtype, self.layout, self.batch)

    @property
    def label(self) -> str:
        return f"{self.layer.label} N {self.batch} {self.map} {self.dtype} {self.layout}"


def cells(
    chosen: Sequence[layers.Layer],
    maps: Sequence[str],
    dtypes: Sequence[str],
    layouts: Sequence[str],
    batches: Sequence[int],
) -> Iterator[Cell]:
    for layer in chosen:
        for batch in batches:
            for map in maps:
                for dtype in dtypes:
                    for layout in layouts:
                        yield Cell(layer, map, dtype, layout, batch)


# ---- how long each takes

Timer = Callable[[Cell, Sequence[Any]], Iterable[Tried | str]]  # of the plans to try


def by_prediction(gpu: predict.Gpu) -> Timer:
    def one(cell: Cell, planned: Any) -> Tried | str:
        if not predict.files_of(planned.kernel.removeprefix("cuda_"), cell.map):
            return f"{planned.kernel} {planned.tile}: left out by PTX_ONLY"
        made = predict.predict(
            gpu, cell.layer, cell.map, cell.dtype, cell.layout, cell.batch, chosen=planned, executed=EXECUTED
        )
        if isinstance(made, str):
            return f"{planned.kernel} {planned.tile}: {made}"
        longest = max(made.launches, key=lambda launch: launch.microseconds)
        return Tried(planned.kernel, planned.tile, made.microseconds, longest.bound)

    def all_of(cell: Cell, plans: Sequence[Any]) -> Iterable[Tried | str]:
        for kernel in {planned.kernel.removeprefix("cuda_") for planned in plans}:
            if predict.files_of(kernel, cell.map):
                predict.runner(kernel, cell.map, gpu.ptx)  # linked once, before threads ask for it
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
            return list(pool.map(lambda planned: one(cell, planned), plans))

    return all_of


def by_time(budget: float) -> Timer:
    """On the GPU that torch sees: medians of graph replays, all in turns. What gives another result has failed."""
    import torch

    from sepconv_ext import _C

    from . import machine, peers
    from .timing import CudaClock

    def all_of(cell: Cell, plans: Sequence[Any]) -> Iterable[Tried | str]:
        clock, device, dtype = CudaClock(), torch.device("cuda"), machine.DTYPES[cell.dtype]
        sets = clock.sets(cell.layer.bytes_moved(cell.batch, dtype.itemsize, cell.map))
        operands = [
            peers.Operands.random(cell.layer, cell.batch, dtype, cell.layout, device, seed) for seed in range(sets)
        ]
        ours = peers.ours(cell.layer, cell.map, operands)
        want = ours(0)

        def contender(planned: Any) -> Callable[[int], object]:
            kernel = planned.kernel.removeprefix("cuda_")
            return lambda index: _C.run_plan(kernel, planned.tile, lambda: ours(index))

        found: dict[str, Any] = {}
        entrants: dict[str, Callable[[int], object]] = {}
        for i, planned in enumerate(plans):
            try:
                apart = peers.difference(contender(planned)(0), want)
            except RuntimeError as error:
                found[str(i)] = f"{planned.kernel} {planned.tile}: {str(error).splitlines()[0]}"
                continue
            if apart > peers.TOLERANCE[dtype]:
                found[str(i)] = f"{planned.kernel} {planned.tile}: differs by {apart:.3g}"
            else:
                entrants[str(i)] = contender(planned)
        timing = clock.measure(entrants, sets, budget)
        for i, planned in enumerate(plans):
            name = str(i)
            if name in timing.samples:
                yield Tried(planned.kernel, planned.tile, timing.seconds(name) * 1e6)
            else:
                yield found.get(name) or f"{planned.kernel} {planned.tile}: {timing.errors[name]}"

    return all_of


def run(
    path: Path,
    gpu: str,
    capability: int,
    multiprocessors: int,
    how: str,
    work: Iterable[Cell],
    timer: Timer,
    say: Callable[[str], None] = print,
) -> None:
    """Writes the sweep, or what an earlier one of the same file has not done yet."""
    head = {"gpu": gpu, "capability": capability, "multiprocessors": multiprocessors, "how": how}
    done: set[str] = set()
    if path.exists():
        before = read(path)
        if {key: getattr(before, key) for key in head} != head:
            raise SystemExit(f"{path} is a sweep of {before.gpu}, {before.how}, and this one of {gpu}, {how}")
        done = {row.label for row in before.rows}
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"format": FORMAT, **head}) + "\n")
    for cell in work:
        if cell.label in done:
            continue
        facts = {"sm": capability, "multiprocessors": multiprocessors}
        plans = predict.emulate().alternatives(predict.words(cell.case | facts))
        if not plans[0].kernel.startswith("cuda_"):
            continue
        row = Row(cell.case, cell.label)
        for made in timer(cell, plans):
            if isinstance(made, str):
                row.failed.append(made)
            else:
                row.tried.append(made)
        if not row.tried:
            say(f"{cell.label}: nothing ran; {row.failed[0]}")
            continue
        with path.open("a") as file:
            file.write(line_of(row) + "\n")
        first, best = row.tried[0], row.best
        say(
            f"{cell.label}: {first.kernel} {first.tile} {first.microseconds:.1f} us {how}; best of {len(row.tried)}: "
            f"{best.kernel} {best.tile} {best.microseconds:.1f} us"
        )


# ---- what the plan makes of it


def words_of(sweep: Sweep, row: Row, changed: dict[str, float] | None = None) -> list[str]:
    tuned = {f"tuning.{name}": f"{value:g}" for name, value in (changed or {}).items()}
    return predict.words(row.case | sweep.facts() | tuned)


def losses(sweep: Sweep, changed: dict[str, float] | None = None) -> list[tuple[Row, Any, float]]:
    """Of each row what the plan chooses now, and its time over the best; what was not tried counts as the worst."""
    chosen = predict.emulate().plans([words_of(sweep, row, changed) for row in sweep.rows])
    found = []
    for row, planned in zip(sweep.rows, chosen, strict=True):
        tried = row.of(planned.kernel, planned.tile)
        taken = tried.microseconds if tried else max(t.microseconds for t in row.tried)
        found.append((row, planned, taken / row.best.microseconds))
    return found


FACTORS = (0.25, 0.5, 0.67, 0.8, 1.25, 1.5, 2, 4)


def is_of_sums(name: str) -> bool:
    """Numbers that fix the order of additions: they are the same in every row."""
    return name.startswith("grad_weight_")


def fit(sweeps: Sequence[Sweep], say: Callable[[str], None] = print) -> dict[str, float]:
    """The numbers that should change in the row of these sweeps' architecture."""

    def cost(changed: dict[str, float]) -> float:
        ratios = [ratio for sweep in sweeps for _, _, ratio in losses(sweep, changed)]
        return sum(map(math.log, ratios)) / len(ratios)

    names = row_of(predict.emulate().tuning(), sweeps[0].capability)[1]
    changed: dict[str, float] = {}
    least = cost(changed)
    say(f"{math.expm1(least):.2%} above the best, in the mean of {sum(len(s.rows) for s in sweeps)} rows")
    better = True
    while better:
        better = False
        for name, value in names.items():
            if name in ("shared_kb", "bytes_a_clock"):
                continue  # facts
            now = changed.get(name, value)
            for factor in FACTORS:
                tried = changed | {name: float(f"{now * factor:.3g}")}
                if (made := cost(tried)) < least - 1e-4:
                    say(f"{name} {now:g} -> {tried[name]:g}: {math.expm1(made):.2%}")
                    least, changed, better = made, tried, True
    return changed


def row_of(table: dict[int, dict[str, float]], capability: int) -> tuple[int, dict[str, float]]:
    """The row that a compute capability has, as tuning_for of tuning.h."""
    found = max((row for row in table if 0 < row <= capability), default=min(row for row in table if row))
    return found, table[found]


def write_table(table: dict[int, dict[str, float]], path: Path = TABLE) -> None:
    """The rows of tuning.h: what differs from the defaults (row 0)."""
    rows = []
    for capability, numbers in table.items():
        if capability:
            named = [f".{name} = {value:g}" for name, value in numbers.items() if value != table[0][name]]
            rows.append("    {" + ", ".join([f".capability = {capability}", *named]) + "},\n")
    text, count = re.subn(
        r"(constexpr Tuning kTunings\[\] = \{\n).*?(\};)", lambda m: m[1] + "".join(rows) + m[2], path.read_text(),
        flags=re.DOTALL,
    )  # fmt: skip
    if count != 1:
        raise SystemExit(f"{path}: no table")
    path.write_text(text)


def fit_files(paths: Sequence[Path]) -> int:
    """Writes the numbers that the sweeps want into the table."""
    sweeps = [read(path) for path in paths]
    if len({sweep.capability for sweep in sweeps}) > 1:
        raise SystemExit("--fit: sweeps of one architecture at a time")
    changed = fit(sweeps)
    table = predict.emulate().tuning()
    row, _ = row_of(table, sweeps[0].capability)
    for name, value in changed.items():
        for capability in [c for c in table if c] if is_of_sums(name) else [row]:
            table[capability][name] = value
    if changed:
        write_table(table)
        print(f"{TABLE}: row {row} changed; tests/test_cuda_plan.py may name cuts that it chose before")
    else:
        print("nothing to change")
    return 0
