"""Proof that the emulated tests see: faults are planted in copies of the real kernels, and at least 95% must be caught.

tests/emulator/mutate.py plants them (dropped barriers and waits, bounds and indices off by one, forgotten writes, wrong
shuffles). A fair sample is run: every dropped synchronisation and wrong shuffle, and one in SAMPLE of the
rest; MUTANTS=all (that is `make test-mutations`) runs every one. tests/emulator/survivors.txt lists who survives and
why.
"""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import test_emulated
from test_emulated import RUNS, Run

sys.path.insert(0, str(Path(__file__).parent / "emulator"))
import emulate
import mutate

pytestmark = [*test_emulated.pytestmark, pytest.mark.slow]

ALL = os.environ.get("MUTANTS") == "all"
SAMPLE = 8  # of the other faults, every so many-th
MOST_RUNS, MOST_RACE_RUNS = 150, 32  # the cheapest
# Cases that always run.
KEPT = (
    *test_emulated.EDGES,
    *test_emulated.WALKS,
    *test_emulated.DIAGONALS,
    *test_emulated.CORES,
    *test_emulated.BOXES,
    *test_emulated.PLANES,
    *test_emulated.PRODUCTS,
    *test_emulated.GROUPS,
    *test_emulated.PLAIN,
    *test_emulated.SPATIAL,
    *(case for case, *_ in test_emulated.BLOCKS),
    *test_emulated.CAUSAL,
    *test_emulated.UPDATES,
)
SURVIVORS = Path(__file__).parent / "emulator" / "survivors.txt"
# Headers whose device code is mutated together with a kernel that uses it.
HEADERS = {
    "depthwise_direct.cu": ("common.cuh",),
    "depthwise_grad_weight_nchw.cu": ("depthwise_grad_weight.cuh",),
    "depthwise_large_grad_weight.cu": ("depthwise_large.cuh",),
    "depthwise_nhwc.cu": ("depthwise_nhwc.cuh",),
    "depthwise_nchw_mma.cu": ("depthwise_nchw_mma.cuh", "depthwise_single_output.cuh"),
    "depthwise_toeplitz.cu": ("depthwise_toeplitz.cuh",),
    "depthwise_nchw.cu": ("depthwise_nchw.cuh",),
    "grouped_nhwc_mma.cu": ("grouped_nhwc_mma.cuh",),
    "inverted_residual.cu": ("inverted_residual.cuh",),
    "pointwise.cu": ("pointwise.cuh",),
    "pointwise_nhwc_mma.cu": ("pointwise_nhwc_mma.cuh",),
    "separable.cu": ("separable.cuh",),
}


def known_survivors() -> dict[str, str]:
    """Fault -> why no test can or need see it."""
    lines = SURVIVORS.read_text().splitlines() if SURVIVORS.exists() else []
    pairs = (line.split(" # ", 1) for line in lines if line.strip() and not line.startswith("#"))
    return {fault.strip(): reason.strip() for fault, reason in pairs}


def _limited(run: Run) -> Run:
    """The copies hold float32 and float16 only."""
    return dataclasses.replace(run, dtype="float16" if run.half else "float32")


def runs_of(source: Path) -> list[Run]:
    """The cheapest test of each kind (map, layout, dtype, kernel size, stride, ...) that runs this file's kernels."""
    candidates = [_limited(run) for run in RUNS]
    planned = emulate.planned_kernels([run.arguments() for run in candidates])
    chosen: dict[tuple, Run] = {}
    for run, name in zip(candidates, planned, strict=True):
        kernel = str(run.extra.get("kernel", name.removeprefix("cuda_")))
        apart = f"{kernel}_grad_weight.cu" in {path.name for path in SOURCES} and kernel != "depthwise"
        stem = f"{kernel}_grad_weight" if apart and run.map == "grad_weight" else kernel
        # The one-pass kernels leave sums that are whole to themselves.
        sums = run.map == "grad_weight" and not stem.startswith("depthwise_grad_weight_")
        files = {stem, "sum_partials"} if sums else {stem}
        if stem == "depthwise_nchw" and run.map == "grad_input" and run.case.stride == (2, 2):
            files = {"depthwise_nchw_stride2"}
        if stem == "grouped_nhwc_mma" and run.map == "grad_input" and run.case.stride == (2, 2):
            files = {"grouped_nhwc_mma_stride2"}
        if "padding_mode" in run.extra:
            files = {"borders"}
        if source.stem not in files:
            continue
        c = run.case
        odd = c.C % 8 != 0 or (c.C // c.groups) % 4 != 0
        edge = c.name if c in (*KEPT, *test_emulated.SUMS, *test_emulated.FRAMES) else ""
        curved = run.activation in ("gelu", "silu", "sigmoid", "tanh")
        key = (
            edge,
            curved,
            run.map,
            run.layout,
            run.dtype,
            c.R,
            c.stride != (1, 1),
            c.dilation != (1, 1),
            odd,
            *sorted(run.extra),
            run.extra.get("padding_mode"),
        )
        if source.stem == "sum_partials":
            key = ("", run.layout, run.dtype, *sorted(run.extra.items()))
        if key not in chosen or _cost(run) < _cost(chosen[key]):
            chosen[key] = run
    edges = [run for run in chosen.values() if run.case in KEPT]
    rest = sorted((run for run in chosen.values() if run not in edges), key=_cost)
    return sorted([*edges, *rest[:MOST_RUNS]], key=_cost)


def _cost(run: Run) -> int:
    c = run.case
    n, k, p, q = c.output_size
    return n * k * p * q * c.C // c.groups * c.R * c.S + 200 * n * k * p * q


@dataclasses.dataclass
class Copy:
    """A kernel file with its faults, compiled in both builds."""

    mutants: list[mutate.Mutant]
    runners: dict[str, Path]


def _files(source: Path) -> list[Path]:
    """The source, and the headers that are mutated with it."""
    return [source, *(find_header(name) for name in HEADERS.get(source.name, ()))]


def find_header(name: str) -> Path:
    (path,) = emulate.KERNELS.rglob(name)
    return path


def _texts(source: Path, planted: list[mutate.Mutant]) -> tuple[str, dict[str, str]]:
    texts = {}
    # All headers, so that none of them pulls in the original of another.
    for path in {*_files(source), *emulate.KERNELS.rglob("*.cuh")}:
        numbers = [i for i, m in enumerate(planted) if m.file == path]
        text = mutate.plant(path.read_text(), [planted[i] for i in numbers], numbers)
        texts[str(path.relative_to(emulate.CSRC))] = mutate.limit_dtypes(text)
    return texts.pop(str(source.relative_to(emulate.CSRC))), texts


def compile_copy(source: Path) -> Copy:
    planted = [m for path in _files(source) for m in mutate.find(path, path.read_text())]
    while True:  # faults that no compiler accepts (a switch in a constant expression) are not faults
        try:
            emulate.compile_object(source, "race", *_texts(source, planted), check=True)
            break
        except emulate.CompileError as error:
            places = {
                (Path(f).name, int(line)) for f, line in re.findall(r"^(\S+?):(\d+):\d+: error", str(error), re.M)
            }
            spans = [range(m.line, m.line + m.what.count("\n") + 1) for m in planted]
            kept = [
                m for m, span in zip(planted, spans, strict=True) if not any((m.file.name, at) in places for at in span)
            ]
            if len(kept) == len(planted):
                raise
            planted = kept

    def link(build: str) -> Path:
        objects = [emulate.compile_object(s, build) for s in emulate.sources() if s != source]
        return emulate.link([*objects, emulate.compile_object(source, build, *_texts(source, planted))], build)

    with ThreadPoolExecutor(emulate.JOBS) as pool:
        runners = dict(zip(emulate.BUILDS, pool.map(link, emulate.BUILDS), strict=True))
    return Copy(planted, runners)


def _arguments(runs: Iterable[Run], seeds: int) -> list[str]:
    cases = [[*run.arguments(), f"seeds=0:{seeds}"] for run in runs]
    return [word for i, case in enumerate(cases) for word in (["--"] if i else []) + case]


def caught_by(copy: Copy, runs: list[Run], number: int, timeout: float) -> str | None:
    """How the fault shows: the kind of the first report; None if it does not."""
    for build in emulate.BUILDS:
        seeds = 4 if copy.mutants[number].kind == "drop" else 1
        try:
            some = runs if build == "asan" else runs[:MOST_RACE_RUNS]
            done = emulate.run(copy.runners[build], _arguments(some, seeds), timeout, {"EMULATOR_MUTANT": str(number)})
        except subprocess.TimeoutExpired:
            return "never ends"
        if done.returncode != 0:
            report = re.search(
                r"AddressSanitizer: [\w-]+|runtime error: [\w -]+|FAULT with seed \d+: [^\n;]*", done.stdout
            )
            text = report.group() if report else f"exit status {done.returncode}"
            return re.sub(r"FAULT with seed \d+: (\d+ of \d+ )?| at byte.*", "", text)[:70]
    return None


SOURCES = emulate.kernel_sources()


@pytest.fixture(scope="module", autouse=True)
def _sound_objects() -> None:
    """Compiles everything that the copies are linked with, on all cores."""
    emulate.runners()


@pytest.mark.parametrize("source", SOURCES, ids=[source.stem for source in SOURCES])
def test_planted_faults_are_caught(source: Path, record_property) -> None:
    copy = compile_copy(source)
    runs = runs_of(source)
    assert runs, f"no test in test_emulated.py runs {source.name}"
    started = time.monotonic()
    sound = {
        build: emulate.run(runner, _arguments(runs[:MOST_RACE_RUNS] if build == "race" else runs, 1), 600)
        for build, runner in copy.runners.items()
    }
    for build, done in sound.items():
        assert done.returncode == 0, f"the copy without a fault fails in the {build} build:\n{done.stdout[-3000:]}"
    timeout = 20 + 10 * (time.monotonic() - started)  # a fault may make a loop endless
    chosen = [i for i, m in enumerate(copy.mutants) if ALL or m.kind in ("drop", "shuffle") or i % SAMPLE == 0]
    with ThreadPoolExecutor(emulate.JOBS) as pool:
        verdicts = list(pool.map(lambda i: caught_by(copy, runs, i, timeout), chosen))
    known = known_survivors()
    survivors = [copy.mutants[i] for i, verdict in zip(chosen, verdicts, strict=True) if verdict is None]
    caught = len(chosen) - len(survivors)
    reports = Counter(re.sub(r"\d+", "N", v) for v in verdicts if v)
    text = [f"{source.name}: {caught} of {len(chosen)} planted faults caught, with {len(runs)} cases"]
    text += [f"  {count:4} {report}" for report, count in reports.most_common()]
    text += [f"  survives: {m}" + (f"   # {known[m.key]}" if m.key in known else "") for m in survivors]
    print("\n".join(text))
    record_property("mutants", {"caught": caught, "planted": len(chosen)})
    unexplained = [m.key for m in survivors if m.key not in known]
    # Faults that make no difference (survivors.txt) cannot be caught and do not count.
    possible = len(chosen) - (len(survivors) - len(unexplained))
    assert caught >= 0.95 * possible, "\n".join(text)
    assert not (ALL and unexplained), "add a case that sees it, or a line to survivors.txt:\n" + "\n".join(unexplained)
