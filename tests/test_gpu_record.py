"""gpu_record.py rehearsed without a GPU: stand-ins for the steps that end well, fail, hang, and hang with children."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytest

import gpu_record
from benchmarks import __main__ as benchmarks
from gpu_record import Step, first_plan, run_plan, second_plan

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
