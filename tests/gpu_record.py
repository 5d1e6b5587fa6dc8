"""`make gpu`: everything that a GPU should say, within nine minutes.

    python3 tests/gpu_record.py --out gpu --packed gpu.tar.gz            the first command: ours
    python3 tests/gpu_record.py --out gpu --packed gpu.tar.gz --peers    the second: who else, and compute-sanitizer

A plan is a list of steps in the order of their worth, each in a process group of its own and with a limit. What a step
prints goes to a file as it comes, and its end to steps.jsonl at once: wherever a run is cut off, what was done stands
there. A step that hangs is asked to stop, then killed with its children; the next one begins. A plan has a limit
too: late steps get what is left of it. After each step the whole record is packed into one file, the easier to bring
back. No GPU is needed to rehearse that (test_gpu_record.py).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHON = sys.executable
LIMIT = 560  # seconds of a plan
GRACE = 8  # seconds to write a record in, once asked to stop
LEAST = 5  # seconds that a step is worth beginning for


@dataclass(frozen=True)
class Step:
    name: str
    command: tuple[str, ...]
    limit: int  # seconds
    why: str
    tool: str = ""  # a program that it needs
    after: str = ""  # a step that it needs
    environment: Mapping[str, str] = field(default_factory=dict)


def pytest_step(name: str, limit: int, why: str, *arguments: str) -> Step:
    command = (PYTHON, "-m", "pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider", *arguments)
    return Step(name, command, limit, why, after="build")


def bench_step(name: str, limit: int, why: str, out: Path, *arguments: str, tool: tuple[str, ...] = ()) -> Step:
    command = (*tool, PYTHON, "-m", "benchmarks", "--device", "cuda", "--out", str(out / name), *arguments)
    return Step(name, command, limit, why, tool=tool[0] if tool else "", after="build")


# Four workers that an illegal address ends, and nobody else: each file of tests stays with one worker.
PARALLEL = ("-n", "8", "--dist", "loadfile", "--timeout", "20", "--max-worker-restart", "4")
COUNTERS = (
    "dram__bytes.sum,gpu__time_duration.sum,sm__inst_issued.avg.pct_of_peak_sustained_active,"
    "sm__inst_executed_pipe_tensor.sum,l1tex__data_bank_conflicts_pipe_lsu.sum,"
    "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio,launch__registers_per_thread,"
    "launch__shared_mem_config_size,launch__occupancy_limit_registers,sm__warps_active.avg.pct_of_peak_sustained_active"
)


def first_plan(out: Path) -> list[Step]:
    ncu = ("ncu", "--clock-control", "none", "--csv", "--log-file", str(out / "ncu.csv"), "--launch-count", "25",
           "--kernel-name", "regex:sepconv|depthwise|mma|kernel", "--metrics", COUNTERS)  # fmt: skip
    build = {"TORCH_CUDA_ARCH_LIST": "native", "SEPCONV_CUDA": "1"}
    small = ("--layers", "--kinds", "depthwise", "--peers", "torch", "--quick", "--batch", "1")
    fused = (PYTHON, "-m", "benchmarks.fused", str(out / "fused.jsonl"))
    return [
        Step("build", (PYTHON, "setup.py", "--quiet", "build_ext", "--inplace"), 110, "for this GPU alone",
             environment=build),
        pytest_step("golden", 35, "what the inline PTX means", "tests/test_golden_ptx.py"),
        pytest_step("fill", 55, "layers that fill a GPU", "tests/test_functional.py", "-k", "layers_that_fill_a_gpu"),
        pytest_step("maps", 95, "every map, the rest of the tests", "tests", *PARALLEL),
        Step("ncu", (*ncu, PYTHON, str(Path(__file__).resolve()), "--launches"), 45, "what 25 launches count",
             tool="ncu", after="build"),
        bench_step("ours", 70, "times of ours, torch beside them", out, "--layers", "--all", "--kinds", "depthwise",
                   "--peers", "torch", "--quick"),
        Step("fused", fused, 25, "blocks and sequences in one kernel, and in calls", after="build"),
        bench_step("products", 30, "1x1 and grouped layers", out, "--layers", "--kinds", "pointwise,grouped",
                   "--peers", "torch", "--quick", "--dtype", "float16"),
        bench_step("small", 25, "the depthwise ones of one image", out, *small),
        replace(bench_step("early", 25, "the same, where kernels begin early", out, *small),
                environment={"SEPCONV_CUDA_PDL": "1"}),
        bench_step("sweep", 35, "other kernels and cuts than the plan's, for --fit", out,
                   "--sweep", str(out / "sweep.jsonl"), "--budget", "0.02"),
    ]  # fmt: skip


def second_plan(out: Path) -> list[Step]:
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # so that memcheck sees reads past a tensor's end
    sanitizer = [
        Step(tool, ("compute-sanitizer", "--tool", tool, "--error-exitcode", "1", PYTHON, "tests/sanitize_cases.py"),
             120, "edges of every kernel", tool="compute-sanitizer", environment=uncached)
        for tool in ("memcheck", "racecheck")
    ]  # fmt: skip
    peers = Step("peers", (PYTHON, "-m", "benchmarks", "--device", "cuda", "--out", str(out / "peers"), "--layers",
                           "--kinds", "depthwise"), 300, "torch, cuDNN and torch.compile")  # fmt: skip
    return [peers, *sanitizer]


def launches() -> int:
    """25 forward calls for a profiler: layers of the bars, both layouts, half types."""
    sys.path.insert(0, str(ROOT))
    import torch

    from benchmarks import layers
    from sepconv_ext.functional import conv2d

    chosen = layers.select(layers.load(), ["depthwise"])
    formats = (torch.channels_last, torch.contiguous_format)
    for layer, layout in [(layer, layout) for layer in chosen for layout in formats][:25]:
        x = torch.randn(layer.input_size(64), device="cuda", dtype=torch.float16).to(memory_format=layout)
        w = torch.randn(layer.weight_size, device="cuda", dtype=torch.float16)
        conv2d(x, w, None, layer.stride, layer.padding, layer.dilation, layer.groups)
    torch.cuda.synchronize()
    return 0


def stop(process: subprocess.Popen, grace: float) -> None:
    """The process group: asked, then killed."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(grace)
        except subprocess.TimeoutExpired:
            continue
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # children that outlive it
    process.wait()


def run_step(step: Step, limit: float, log: Path, grace: float) -> tuple[str, int | None]:
    """How it ended: ok, failed or timed out; and its exit status."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **step.environment}
    with log.open("wb") as output:
        process = subprocess.Popen(
            step.command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=output,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            stop(process, grace)
            return "timed out", process.returncode
        except BaseException:
            stop(process, grace)
            raise
    return ("ok" if code == 0 else "failed"), code


def pack(out: Path, packed: Path) -> None:
    """All files of the record in one, which is whole whenever it is read."""
    packed.parent.mkdir(parents=True, exist_ok=True)
    part = packed.with_name(packed.name + ".part")
    with tarfile.open(part, "w:gz") as archive:
        archive.add(out, arcname=out.name)
    part.replace(packed)


def run_plan(
    plan: Sequence[Step],
    out: Path,
    limit: float = LIMIT,
    grace: float = GRACE,
    least: float = LEAST,
    find: Callable[[str], str | None] = shutil.which,
    packed: Path | None = None,
    say: Callable[[str], None] = lambda text: print(text, flush=True),
) -> list[dict[str, object]]:
    """Runs the steps in turn; returns what steps.jsonl says of each."""
    out.mkdir(parents=True, exist_ok=True)
    began, rows = time.monotonic(), []
    for step in plan:
        passed = time.monotonic() - began
        allowed = min(step.limit, limit - passed - grace)
        broken = [row["name"] for row in rows if row["name"] == step.after and row["status"] != "ok"]
        reason = ""
        if step.tool and find(step.tool) is None:
            reason = f"{step.tool} is not on this machine"
        elif broken:
            reason = f"{step.after} is not done"
        elif allowed < min(least, step.limit):
            reason = "no time is left"
        row: dict[str, object] = {"name": step.name, "why": step.why, "command": list(step.command), "began": passed}
        if reason:
            row |= {"status": "not run", "reason": reason, "seconds": 0.0, "limit": step.limit}
        else:
            log = out / f"{step.name}.txt"
            status, code = run_step(step, allowed, log, grace)
            seconds = time.monotonic() - began - passed
            row |= {"status": status, "code": code, "seconds": seconds, "limit": allowed, "log": log.name}
        rows.append(row)
        with (out / "steps.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        if packed:
            pack(out, packed)
        say(f"{step.name}: {row['status']}{f' ({reason})' if reason else ''}, {row['seconds']:.0f} s")
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "gpu", help="folder for the record")
    parser.add_argument("--packed", type=Path, metavar="FILE", help="the record as one file too, after each step")
    parser.add_argument("--peers", action="store_true", help="the second plan")
    parser.add_argument("--launches", action="store_true", help="the calls that ncu counts")
    options = parser.parse_args(arguments)
    if options.launches:
        return launches()
    out = options.out.resolve()
    rows = run_plan(second_plan(out) if options.peers else first_plan(out), out, packed=options.packed)
    return 0 if all(row["status"] == "ok" for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
