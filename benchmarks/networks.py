"""Whole networks in inference, against the runtimes that people use for it, each in a process of its own.

The processes take turns: one is asked to run for a moment while the others wait. Of each turn the median call counts,
and of all turns the median. A runtime that can work in both memory layouts is tried in both, and goes on in the
better one. A speed-up is over the best of the peers.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import numpy as np
import torch

from . import models
from .runtimes import LAYER_PEERS, OURS, PACKAGES, PEERS, RUNTIMES

SMALL_WORK = ("mobilenet_v3_small", "mobilenet_v2@32")  # one image at a time
NETWORKS = (*models.MODELS, *SMALL_WORK)
CACHE = Path(tempfile.gettempdir()) / "sepconv_ext_networks"
DROPPED = 1.15  # a layout that is that much slower than its runtime's other one in the first turn is dropped


@dataclass
class Plan:
    """What to time, and how long."""

    names: tuple[str, ...]  # as mobilenet_v2, or mobilenet_v2@32 for images of that size
    batches: tuple[int, ...] = (1, 8)
    thread_counts: tuple[int, ...] = (1, 2)
    runtimes: tuple[str, ...] = tuple(RUNTIMES)
    seconds: float = 0.06  # of one turn
    turns: int = 7
    folder: Path = field(default_factory=lambda: CACHE)
    prepare: Callable[[str, Path, int, bool], Path] = field(default_factory=lambda: prepare)

    def batches_of(self, name: str) -> tuple[int, ...]:
        return (1,) if name in SMALL_WORK else self.batches

    def __len__(self) -> int:
        return sum(len(self.batches_of(name)) for name in self.names)


class Process:
    """A runtime's process, started when it is first asked."""

    def __init__(self, runtime: str, folder: Path) -> None:
        self.runtime, self.log = runtime, folder / f"{runtime}.log"
        self.process: subprocess.Popen | None = None

    def ask(self, do: str, **command: object) -> dict:
        if self.process is None:
            command_line = [sys.executable, "-m", "benchmarks.runtimes", self.runtime]
            root = Path(__file__).resolve().parents[1]
            environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
            with open(self.log, "w") as log:
                self.process = subprocess.Popen(
                    *(command_line,), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
                    cwd=root, env=environment,
                )  # fmt: skip
        try:
            self.process.stdin.write(json.dumps({"do": do, **command}) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if line:
            return json.loads(line)
        code = self.process.wait()
        self.process = None
        last = self.log.read_text(errors="replace").strip().splitlines()[-1:]
        return {"error": f"its process ended with {code}: {''.join(last)}"[:300]}

    def end(self) -> None:
        if self.process is not None:
            self.process.stdin.close()
            self.process.wait()
            self.process = None


def run(plan: Plan, advance: Callable[[str], None], skipped: list[str]) -> Iterator[dict]:
    """Yields the record's network rows. What cannot be measured here is named in ``skipped``."""
    plan.folder.mkdir(parents=True, exist_ok=True)
    names = []
    for name in plan.runtimes:
        missing = [package for package in PACKAGES.get(name, ()) if importlib.util.find_spec(package) is None]
        if missing:
            skipped.append(f"{name}: {', '.join(missing)} not installed (the extra 'peers')")
        else:
            names.append(name)
    processes = {name: Process(name, plan.folder) for name in names}
    try:
        for network in plan.names:
            try:
                largest, onnx = max(plan.batches_of(network)), bool(set(PACKAGES) & set(names))
                folder = plan.prepare(network, plan.folder, largest, onnx)
            except ImportError as error:
                skipped.append(f"{network}: {error}")
                continue
            layouts = {name: RUNTIMES[name].layouts for name in names}
            for batch in plan.batches_of(network):
                advance(f"{network}, N {batch}")
                yield from _contest(plan, network, folder, batch, processes, layouts)
            for process in processes.values():
                if process.process is not None:
                    process.ask("forget")
    finally:
        for process in processes.values():
            process.end()


def prepare(network: str, root: Path, batch: int, onnx: bool) -> Path:
    """A folder with the network's weights, images, float64 logits, and its ONNX file; kept from one run to the next."""
    name, size = models.name_of(network), models.image_size(network)
    versions = [metadata.version("torch"), metadata.version("timm" if name in models.TIMM else "torchvision")]
    mark = hashlib.sha256(repr((Path(models.__file__).read_text(), versions)).encode()).hexdigest()[:12]
    folder = root / mark / network
    if not (folder / "expected.npy").exists() or len(np.load(folder / "expected.npy")) < batch:
        folder.mkdir(parents=True, exist_ok=True)
        model = models.build(name)
        images, _ = models.photographs(max(batch, 8), size)
        models.calibrate(model, images)
        torch.save(model.state_dict(), folder / "weights.pt")
        np.save(folder / "images.npy", images[:batch].numpy())
        with torch.no_grad():
            exact = model.double()(images[:batch].double())
        np.save(folder / "expected.npy", exact.numpy())
    if onnx and not (folder / "network.onnx").exists():
        model = models.build(name).eval()
        model.load_state_dict(torch.load(folder / "weights.pt"))
        images = torch.zeros(2, 3, size, size)
        torch.onnx.export(
            *(model, (images,), folder / "new.onnx"), dynamo=True, external_data=False, verbose=False,
            input_names=["images"], output_names=["logits"], dynamic_shapes=({0: "batch"},),
        )  # fmt: skip
        (folder / "new.onnx").rename(folder / "network.onnx")
    return folder


def _contest(
    plan: Plan, network: str, folder: Path, batch: int, processes: dict[str, Process], layouts: dict[str, tuple]
) -> Iterator[dict]:
    """A row for each number of threads. Layouts that proved slow in all of them are dropped from `layouts`."""

    def ready(name: str) -> dict:
        said = {}
        for layout in layouts[name]:
            for threads in plan.thread_counts:
                where = {"batch": batch, "threads": threads, "layout": layout}
                said[threads, layout] = processes[name].ask("ready", folder=str(folder), **where)
        return said

    with ThreadPoolExecutor(max_workers=len(os.sched_getaffinity(0))) as pool:
        said = dict(zip(processes, pool.map(ready, processes), strict=True))
    kept: dict[str, set] = {name: set() for name in processes}
    for threads in plan.thread_counts:
        answers = {(name, layout): said[name][threads, layout] for name in processes for layout in layouts[name]}
        errors = {" ".join(who): error for who, answer in answers.items() if (error := _error(answer))}
        able = [who for who in answers if " ".join(who) not in errors]
        samples = _turns(plan, processes, able, batch, threads, errors)
        seconds = {who: statistics.median(taken) for who, taken in samples.items()}
        best = {name: min((who for who in samples if who[0] == name), key=seconds.get) for name, _ in samples}
        for name, layout in best.values():
            kept[name].add(layout)
        ours, peer = (
            min((who for name, who in best.items() if name in group), key=seconds.get, default=None)
            for group in (OURS, PEERS | LAYER_PEERS)
        )
        differences = {" ".join(who): answer["difference"] for who, answer in answers.items() if "difference" in answer}
        yield {
            "model": network,
            "mode": "inference",
            "batch": batch,
            "image_size": np.load(folder / "images.npy", mmap_mode="r").shape[-1],
            "dtype": "float32",
            "threads": threads,
            "layout": ours[1] if ours else "-",
            "ours": ours and ours[0],
            "seconds": seconds.get(ours),
            "best_peer": peer and " ".join(peer),
            "best_peer_seconds": seconds.get(peer),
            "speedup": seconds[peer] / seconds[ours] if ours and peer else None,
            "seconds_of": {name: seconds[who] for name, who in best.items()},
            "differences": differences,
            "difference": max((d for who, d in differences.items() if who.startswith(tuple(OURS))), default=None),
            "agrees": not any(who.startswith(tuple(OURS)) for who in errors),
            "samples_ms": {" ".join(who): [round(1e3 * s, 4) for s in taken] for who, taken in samples.items()},
            "errors": errors,
        }
    for name in processes:
        if kept[name]:
            layouts[name] = tuple(layout for layout in layouts[name] if layout in kept[name])


def _turns(
    plan: Plan, processes: dict[str, Process], left: list[tuple[str, str]], batch: int, threads: int, errors: dict
) -> dict[tuple[str, str], list[float]]:
    """Seconds of each turn's median call, of those that ran to the end."""
    samples: dict[tuple[str, str], list[float]] = {who: [] for who in left}
    for turn in range(plan.turns):
        for name, layout in left[::-1] if turn % 2 else left:  # nobody always runs after the same neighbour
            where = {"batch": batch, "threads": threads, "layout": layout}
            answer = processes[name].ask("time", seconds=plan.seconds, **where)
            if "error" in answer:
                errors[f"{name} {layout}"] = answer["error"]
            else:
                samples[name, layout].append(statistics.median(answer["samples"]))
        left = [who for who in left if " ".join(who) not in errors]
        if turn == 0:
            fastest = {name: min(samples[who][0] for who in left if who[0] == name) for name, _ in left}
            left = [who for who in left if samples[who][0] <= DROPPED * fastest[who[0]]]
    return {who: samples[who] for who in left}


def _error(answer: dict) -> str:
    """Why a variant is not timed, if so: what is wrong is no peer."""
    if "error" in answer:
        return answer["error"]
    wrong = f"differs from float64 by {answer['difference']:.1e} of the largest logit, or in its five best"
    return "" if answer["agrees"] else wrong
