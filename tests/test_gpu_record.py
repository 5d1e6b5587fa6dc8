"""gpu_record.py rehearsed without a GPU: stand-ins for the steps that end well, fail, hang, and hang with children."""

from __future__ import annotations

import itertools
import json
import os
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import gpu_record
from benchmarks import __main__ as benchmarks
from benchmarks import fused, predict
from gpu_record import Step, first_plan, run_plan, second_plan

sys.path.insert(0, str(Path(__file__).parent / "emulator"))
import emulate

import sanitize_cases

ROOT = Path(__file__).resolve().parent.parent

# Deaf to SIGTERM, and so is its child; it says its child's number first.
DEAF = """
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = os.fork()
if child:
    print(child, flush=True)
time.sleep(60)
"""
# Writes its record when it is asked to stop, as the benchmark does.
POLITE = """
import signal, sys, time
def leave(*_):
    print("record", flush=True)
    sys.exit(130)
signal.signal(signal.SIGTERM, leave)
print("row 1", flush=True)
time.sleep(60)
"""


def step(name: str, code: str, limit: int = 20, **rest: object) -> Step:
    return Step(name, (sys.executable, "-I", "-S", "-c", code), limit, "rehearsal", **rest)  # type: ignore[arg-type]


def run(plan: list[Step], out: Path, **rest: object) -> dict[str, dict]:
    rows = run_plan(plan, out, grace=0.5, say=lambda text: None, **rest)  # type: ignore[arg-type]
    written = [json.loads(line) for line in (out / "steps.jsonl").read_text().splitlines()]
    assert written == rows and [row["name"] for row in rows] == [s.name for s in plan]
    return {str(row["name"]): row for row in rows}


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def test_steps_end_as_they_do(tmp_path: Path) -> None:
    plan = [
        step("build", "print('built')"),
        step("wrong", "raise SystemExit(3)", after="build"),
        step("peer", "pass", tool="a-tool-that-nobody-has"),
        step("late", "print('still run')", after="build"),
        step("set", "import os; print(os.environ['WANTED'])", environment={"WANTED": "yes"}),
    ]
    rows = run(plan, tmp_path)
    assert [rows[s.name]["status"] for s in plan] == ["ok", "failed", "not run", "ok", "ok"]
    assert rows["wrong"]["code"] == 3
    assert "a-tool-that-nobody-has" in rows["peer"]["reason"]
    assert (tmp_path / "build.txt").read_text() == "built\n" and (tmp_path / "set.txt").read_text() == "yes\n"


def test_without_a_build_nothing_that_needs_it_runs(tmp_path: Path) -> None:
    rows = run(
        [step("build", "raise SystemExit(1)"), step("tests", "pass", after="build"), step("other", "pass")], tmp_path
    )
    assert [rows[name]["status"] for name in rows] == ["failed", "not run", "ok"]
    assert "build" in rows["tests"]["reason"]


def test_who_hangs_is_killed_with_children_and_named(tmp_path: Path) -> None:
    began = time.monotonic()
    rows = run([step("deaf", DEAF, 3), step("next", "print('goes on')")], tmp_path)
    assert time.monotonic() - began < 30
    assert rows["deaf"]["status"] == "timed out" and rows["next"]["status"] == "ok"
    child = int((tmp_path / "deaf.txt").read_text())
    until = time.monotonic() + 10
    while alive(child) and time.monotonic() < until:
        time.sleep(0.05)
    assert not alive(child)


def test_who_is_asked_to_stop_may_write_its_record(tmp_path: Path) -> None:
    plan = [step("bench", POLITE, 3)]
    run_plan(plan, tmp_path, grace=10, say=lambda text: None)
    assert (tmp_path / "bench.txt").read_text() == "row 1\nrecord\n"


def test_late_steps_get_what_is_left(tmp_path: Path) -> None:
    plan = [step("first", POLITE, 20), step("second", "pass")]
    rows = run(plan, tmp_path, limit=3, least=1)
    assert rows["first"]["status"] == "timed out" and rows["first"]["limit"] < 3
    assert rows["second"]["status"] == "not run" and "no time" in rows["second"]["reason"]


def test_the_record_is_one_file_after_each_step(tmp_path: Path) -> None:
    """A step sees what the steps before it left behind, packed; and at the end everything is there."""
    out, packed = tmp_path / "gpu", tmp_path / "back" / "gpu.tar.gz"
    read = f"import tarfile; print(sorted(tarfile.open({str(packed)!r}).getnames()))"
    deep = f"import pathlib; p = pathlib.Path({str(out)!r}, 'ours'); p.mkdir(); (p / 'record.json').write_text('1')"
    rows = run([step("first", deep), step("second", read), step("third", DEAF, 2)], out, packed=packed)
    assert [row["status"] for row in rows.values()] == ["ok", "ok", "timed out"]
    first = ["gpu", "gpu/first.txt", "gpu/ours", "gpu/ours/record.json", "gpu/steps.jsonl"]
    assert (out / "second.txt").read_text() == f"{first}\n"
    with tarfile.open(packed) as archive:
        names = archive.getnames()
    assert sorted(names) == sorted([*first, "gpu/second.txt", "gpu/third.txt"])
    assert list(packed.parent.iterdir()) == [packed]


def test_what_takes_the_place_of_calls_is_timed(tmp_path: Path) -> None:
    """The step "fused", rehearsed on the CPU."""
    file = tmp_path / "deep" / "fused.jsonl"
    fused.main([str(file), "--device", "cpu", "--batch", "1", "--budget", "0.001", "--most", "1"])
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["what"].split()[0] for row in rows] == ["causal", "causal", "decoding", "block"]
    for row in rows:
        assert row["difference"] < 0.02 and not row["errors"] and "failed" not in row
        assert {"one kernel", "torch"} <= set(row["microseconds"])
    (command,) = (s.command for s in first_plan(tmp_path) if s.name == "fused")
    assert command[1:3] == ("-m", "benchmarks.fused") and Path(command[3]).is_relative_to(tmp_path)


@pytest.mark.parametrize("made", [first_plan, second_plan])
def test_plans_fit(made, tmp_path: Path) -> None:
    """Whatever hangs, a plan ends within its limit; each name once; each file there; a build before its users."""
    plan = made(tmp_path)
    assert sum(s.limit for s in plan) <= gpu_record.LIMIT - gpu_record.GRACE
    names = [s.name for s in plan]
    assert len(set(names)) == len(names)
    for i, s in enumerate(plan):
        assert not s.after or s.after in names[:i], s.name
        for word in s.command:
            if word.startswith("tests") or word.endswith(".py"):
                assert (ROOT / word).exists(), word
        if "benchmarks" in s.command:
            words = list(s.command[s.command.index("benchmarks") + 1 :])
            where = words.index("--device")
            options = benchmarks.parse([*words[:where], *words[where + 2 :]])  # without the GPU that is not here
            assert options.out.is_relative_to(tmp_path)
            assert options.sweep is None or options.sweep.is_relative_to(tmp_path)
    if made is first_plan:
        assert names[0] == "build" and all(s.after == "build" for s in plan[1:])
        assert names[-1] == "sweep"  # what there is time for; its rows are written as they come


def planned_for_the_sanitizer() -> Iterator[dict[str, object]]:
    """What sanitize_cases.py calls, as the plan's program takes it."""

    def pair(value: object) -> str:
        return ",".join(map(str, value if isinstance(value, tuple) else (value, value)))

    dtypes = [str(dtype).removeprefix("torch.") for dtype in sanitize_cases.DTYPES]
    layouts, maps = ("contiguous", "channels_last"), ("forward", "grad_input", "grad_weight")
    for (x, w, keywords), dtype, layout in itertools.product(sanitize_cases.CASES, dtypes, layouts):
        h, v = pair(keywords.get("padding", 0)).split(",")
        case = {"dtype": dtype, "layout": layout, **dict(zip("NCHW", x, strict=True))}
        case |= {"K": w[0], "R": w[2], "S": w[3], "groups": keywords.get("groups", 1), "padding": f"{h},{h},{v},{v}"}
        case |= {name: pair(keywords.get(name, 1)) for name in ("stride", "dilation")}
        yield from (case | {"map": map} for map in maps)
    for dtype, layout in itertools.product(dtypes, layouts):
        case = {"dtype": dtype, "layout": layout, "N": 2, "C": 24, "H": 9, "W": 7, "K": 24, "R": 3, "S": 3}
        yield case | {"groups": 24, "padding": "1,1,1,1", "op": "separable", "outputs": 70}
    for (N, C, H, W), E, K, kernel, stride, residual in sanitize_cases.BLOCKS:
        case = {"N": N, "C": E, "H": H, "W": W, "K": E, "R": kernel, "S": kernel, "groups": E}
        case |= {"padding": ",".join([str(kernel // 2)] * 4), "stride": f"{stride},{stride}", "outputs": K}
        case |= {"op": "inverted_residual", "inputs": C if C != E else 0, "residual": int(residual)}
        yield case | {"dtype": "float16", "layout": "channels_last"}
    for dtype, layout, (C, L, S) in itertools.product(dtypes, layouts, sanitize_cases.SEQUENCES):
        case = {"op": "causal", "dtype": dtype, "layout": layout, "N": 2, "C": C, "W": L, "K": C, "S": S, "groups": C}
        yield case | {"padding": f"0,0,{S - 1},0"}


@pytest.mark.skipif(emulate.why_not() is not None, reason=str(emulate.why_not()))
def test_the_sanitizer_sees_every_kernel() -> None:
    """By the plan of an H100; kernels that no plan chooses are called by hand, or by ops that have no plan."""
    asked = [predict.words({**case, "sm": 90, "multiprocessors": 132}) for case in planned_for_the_sanitizer()]
    ran = set(emulate.planned_kernels(asked)) | {f"cuda_{kernel}" for kernel, *_ in sanitize_cases.BY_HAND}
    without_plan = {"cuda_borders", "cuda_spatial_separable", "cuda_causal_update"}
    assert sanitize_cases.kernels() - ran == without_plan
    for kernel, cut, (x, w, keywords) in sanitize_cases.BY_HAND:
        layer = {"dtype": "float32", "layout": "channels_last", **dict(zip("NCHW", x, strict=True)), "K": w[0]}
        layer |= {"R": w[2], "S": w[3], "groups": w[0], "padding": ",".join([str(keywords["padding"])] * 4)}
        (by_hand,) = emulate.plans([predict.words(layer | {"kernel": kernel, **cut})])
        assert by_hand.kernel == f"cuda_{kernel}" and by_hand.tile == cut
