"""``python -m benchmarks --predict GPU``: what a CUDA kernel should take, from counts of its PTX and public rates.

Nothing here is measured on a GPU, and every figure says so. A layer is planned for the GPU, and launched on the CPU
machine of tests/ptx, which counts instructions, wavefronts of shared memory and sectors. Where the launch is too large
to be executed, fewer images and channels are, with the same cut: its blocks do the same work, and the whole launch's
number of blocks is counted too. Each resource then has a time that the launch cannot beat; the prediction is the
longest of them, and what a launch costs before it.

Few warps leave latency open: a block takes at least the clocks of its warps' instructions, one after the other, and
the blocks that a multiprocessor has no room for begin, with first loads, when others are done.

What the model does not have: loads that are waited for in a block's middle, what ptxas makes of the PTX, caches but for
"each sector once", clocks below the boost clock.
"""

from __future__ import annotations

import functools
import importlib
import json
import math
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import layers

DATA = Path(__file__).with_name("gpus.json")
TESTS = Path(__file__).parent.parent / "tests"
EXECUTED = 3e7  # multiply-adds of a launch that is executed whole: some seconds
SECTOR = 32  # bytes


@dataclass(frozen=True)
class Gpu:
    """Public rates of a GPU, and what is assumed beside them (gpus.json has the sources)."""

    name: str
    capability: int
    ptx: str  # the architecture whose PTX is executed
    multiprocessors: int
    clock_ghz: float
    memory_gbs: float
    shared_kb: int
    fp32_lanes: int  # a clock and multiprocessor, as all that follow
    fp64_lanes: int
    int_lanes: int
    tensor_products: int  # of half types, summed in float, by mma.sync
    l2_mb: int
    source: str
    copied_share: float
    launch_us: float
    latency_us: float
    warp_clocks: float  # of a warp's instruction


@functools.cache
def gpus() -> dict[str, Gpu]:
    data = json.loads(DATA.read_text())
    assumed = {key: value for key, value in data["assumed"].items() if key != "why"}
    return {short: Gpu(**rates, **assumed) for short, rates in data["gpus"].items()}


@dataclass
class Counted:
    """One launch on the machine: of all its blocks."""

    kernel: str = ""
    blocks: int = 1
    threads: int = 32
    shared_bytes: int = 0  # of a block
    least_blocks: int = 0  # of most_threads threads, that its registers are cut for; 0: not said
    most_threads: int = 32
    executed: dict[str, int] = field(default_factory=dict)  # warp instructions, by opcode
    wavefronts: int = 0
    ideal_wavefronts: int = 0
    l1_sectors: int = 0  # asked for, whether near or far
    l2_sectors: int = 0  # each once a block
    memory_sectors: int = 0  # each once
    in_flight: int = 0  # bytes of a block's asynchronous copies, at most


def read_counts(output: str) -> list[Counted]:
    """The launches in what the machine prints with PTX_COUNTS or PTX_DRY."""
    found: list[Counted] = []
    for line in output.splitlines():
        word, _, rest = line.partition(": ")
        numbers = {key: int(value) for key, value in re.findall(r"(\w+)=(-?\d+)(?= |$)", rest)}
        if word == "entry":
            found.append(Counted(kernel=rest))
        elif word == "launch":
            last = found[-1]
            last.blocks, last.threads = numbers["blocks"], numbers["threads"]
            last.shared_bytes, last.least_blocks = numbers["shared"], numbers["least_blocks"]
            last.most_threads = numbers["most_threads"]
        elif word == "executed":
            opcode, times = rest.rsplit(" ", 1)
            found[-1].executed[opcode] = int(times)
        elif word == "traffic":
            found[-1].l2_sectors = numbers["block_reads"] + numbers["block_writes"]
            found[-1].memory_sectors = numbers["reads"] + numbers["writes"]
            found[-1].in_flight = numbers["in_flight"]
        elif word == "memory":
            found[-1].wavefronts += numbers["wavefronts"]
            found[-1].ideal_wavefronts += numbers["ideal"] if numbers["wavefronts"] else 0
            found[-1].l1_sectors += numbers["sectors"]
    return found


# Warp instructions by the unit that executes them: the first pattern that fits.
UNITS = (
    ("tensor", r"mma\."),
    ("special", r"(ex2|rcp|sqrt|rsqrt|lg2|tanh|sin|cos)\."),
    ("fp64", r"\w+\..*f64$"),
    ("fp32", r"(fma|mul|add|sub|max|min|neg|abs)\..*(f32|f16|f16x2|bf16|bf16x2|f32x2)$"),
    ("access", r"(ld|st|ldmatrix|cp|mbarrier|fence)\."),
    ("control", r"(bra|ret|bar|exit|shfl|vote|elect|griddepcontrol)"),
    ("integer", r""),
)


def by_unit(executed: dict[str, int]) -> dict[str, int]:
    units = dict.fromkeys((name for name, _ in UNITS), 0)
    for opcode, times in executed.items():
        units[next(name for name, pattern in UNITS if re.match(pattern, opcode))] += times
    return units


# mma.m16n8k16, and mma.sp.m16n8k32 in as many products: half of its columns are zeros that are left out.
PRODUCTS = 16 * 8 * 16


@dataclass(frozen=True)
class Launch:
    """A prediction: of one kernel on one GPU, all times in microseconds."""

    kernel: str
    blocks: int
    resident: int  # blocks of a multiprocessor
    waves: float
    busiest: float  # the share of work of the busiest multiprocessor over the mean
    bounds: dict[str, float]
    overhead: float  # launch and first loads
    in_flight_kb: float  # of a multiprocessor's asynchronous copies
    bank_conflicts: float  # wavefronts over those without conflicts

    @property
    def bound(self) -> str:
        return max(self.bounds, key=self.bounds.__getitem__)

    @property
    def microseconds(self) -> float:
        return self.overhead + self.bounds[self.bound]


def predict_launch(gpu: Gpu, counted: Counted, blocks: int, more: float, moved: float | None = None) -> Launch:
    """`counted`: a launch that was executed; `blocks`: of the whole one, which does `more` times its work, and touches
    `moved` times the memory (default: as much more). Blocks that each take all images of a channel do more work in the
    whole, and are not more of them."""
    warps = math.ceil(counted.threads / 32)
    few = gpu.capability in (86, 89, 120)  # multiprocessors of 48 warps and 24 blocks, else of 64 and 32
    limits = [(48 if few else 64) // warps, 24 if few else 32]
    limits.append(int(gpu.shared_kb * 1024 // (counted.shared_bytes + 1024)))  # a kilobyte of each is the runtime's
    if counted.least_blocks:  # smaller blocks take fewer registers
        limits.append(counted.least_blocks * math.ceil(counted.most_threads / 32) // warps)
    resident = max(min(limits), 1)
    # The busiest multiprocessor has whole blocks; as long as one has few, their number is what counts.
    busiest = math.ceil(blocks / gpu.multiprocessors) * gpu.multiprocessors / blocks
    scale = more / gpu.multiprocessors * busiest  # of the counts, to the busiest multiprocessor's
    units = by_unit(counted.executed)
    pairs = sum(times for opcode, times in counted.executed.items() if opcode.endswith(".f32x2"))  # issue once, for two
    if pairs:  # PTX makes and parts them by moves, of which the GPU's code has none
        units["integer"] -= sum(counted.executed.get(move, 0) for move in ("mov.b64", "mov.b32"))
    clocks = {
        "issue": sum(units.values()) / 4,
        "fp32": (units["fp32"] + pairs) * 32 / gpu.fp32_lanes,
        "fp64": units["fp64"] * 32 / gpu.fp64_lanes,
        "integer": units["integer"] * 32 / gpu.int_lanes,
        "special functions": units["special"] * 32 / 16,
        "tensor cores": units["tensor"] * PRODUCTS / gpu.tensor_products,
        "shared memory": counted.wavefronts,
        "L1": counted.l1_sectors * SECTOR / 128,
        "L2 to a multiprocessor": counted.l2_sectors * SECTOR / 64,
    }
    bounds = {name: value * scale / (gpu.clock_ghz * 1e3) for name, value in clocks.items() if value}
    of_a_warp = sum(units.values()) * more / (blocks * warps) * gpu.warp_clocks / (gpu.clock_ghz * 1e3)
    rounds = math.ceil(math.ceil(blocks / gpu.multiprocessors) / resident)
    bounds["latency"] = rounds * (of_a_warp + gpu.latency_us) - gpu.latency_us  # the first is part of the overhead
    touched = counted.memory_sectors * SECTOR * (more if moved is None else moved)
    bounds["memory"] = touched / (gpu.memory_gbs * 1e3 * gpu.copied_share)
    return Launch(
        kernel=counted.kernel,
        blocks=blocks,
        resident=resident,
        waves=blocks / (resident * gpu.multiprocessors),
        busiest=busiest,
        bounds=bounds,
        overhead=gpu.launch_us + gpu.latency_us,
        in_flight_kb=counted.in_flight * resident / 1024,
        bank_conflicts=counted.wavefronts / counted.ideal_wavefronts if counted.ideal_wavefronts else 1.0,
    )


# ---- layers on the machine


def _module(path: str, what: str) -> Any:
    """A module below tests/, or the reason why it cannot run here as a SystemExit."""
    folder, name = path.split("/")
    sys.path.insert(0, str(TESTS / folder))
    module = importlib.import_module(name)
    if reason := module.why_not():
        raise SystemExit(f"{what}: {reason}")
    return module


@functools.cache
def emulate() -> Any:
    """tests/emulator/emulate.py: the plan, compiled alone."""
    return _module("emulator/emulate", "the plan is asked in a program of its own")


@functools.cache
def machine() -> Any:
    """tests/ptx/ptx.py."""
    return _module("ptx/ptx", "--predict executes the kernels' PTX")


def arguments_of(layer: layers.Layer, map: str, dtype: str, layout: str, batch: int) -> dict[str, object]:
    """A layer as the machine's runner takes it."""
    pad = f"{layer.pad_h},{layer.pad_h},{layer.pad_w},{layer.pad_w}"
    return {
        "map": map, "dtype": dtype, "layout": "contiguous" if layout == "nchw" else layout,
        "N": batch, "C": layer.in_channels, "H": layer.height, "W": layer.width, "K": layer.out_channels,
        "R": layer.kernel_h, "S": layer.kernel_w, "groups": layer.groups, "padding": pad, "bias": int(layer.bias),
        "stride": f"{layer.stride_h},{layer.stride_w}", "dilation": f"{layer.dilation_h},{layer.dilation_w}",
    }  # fmt: skip


def words(arguments: dict[str, object]) -> list[str]:
    return [f"{key}={value}" for key, value in arguments.items()]


OF_PLANES = ("depthwise_nchw", "depthwise_nchw_mma", "depthwise_toeplitz")


def smaller(
    arguments: dict[str, object], tile: dict[str, int], macs: int, executed: float = EXECUTED, kernel: str = ""
) -> dict[str, object]:
    """The same layer with fewer images and channels, as few as are executed in seconds. Blocks that share the work of
    a channel, or the tiles of a product, become fewer with the images, so that each does what it does in the whole."""
    if macs <= executed:
        return {}
    N, C, K = (int(arguments[key]) for key in ("N", "C", "K"))
    shared = "blocks" if "blocks" in tile else "splits"
    splits = tile.get(shared, 1)
    images = min(max(tile.get("images", 1), math.ceil(2 * N / splits) if splits > 1 else 1), N)
    less: dict[str, object] = {"N": images}
    if splits > 1:
        # At least two splits, whose sums another kernel adds, as in the whole.
        less[shared] = max(round(splits * images / N), 2 if shared == "splits" else 1)
    # Blocks have up to 64 neighbouring channels, but for kernels that take a plane each, or as many as their cut says.
    channels = next((c for c in (64, 96, 48, 40, 32) if C % c == 0), 64)
    if kernel in OF_PLANES:
        channels = max(2 * tile.get("planes", 1), 8)
    if arguments["groups"] == C and channels < C:
        less |= {"C": channels, "K": channels * (K // C), "groups": channels}
    return less


@dataclass(frozen=True)
class Prediction:
    layer: str
    map: str
    dtype: str
    layout: str
    batch: int
    kernel: str
    executed: str  # what was executed of it
    floor_us: float  # operands read once and the result written once, at the data sheet's bandwidth
    launches: tuple[Launch, ...]

    @property
    def microseconds(self) -> float:
        return sum(launch.microseconds for launch in self.launches)


def files_of(kernel: str, map: str) -> list[Path]:
    ptx = machine()
    stems = {kernel, f"{kernel}_stride2"} if map != "grad_weight" else {kernel, f"{kernel}_grad_weight", "sum_partials"}
    return [path for path in ptx.kernel_sources() if path.stem in stems]


@functools.cache
def runner(kernel: str, map: str, arch: str):
    ptx = machine()
    return ptx.runner(files_of(kernel, map), ptx.together(arch))


def planned_for(gpu: Gpu, arguments: dict[str, object]) -> dict[str, object]:
    return arguments | {"sm": gpu.capability, "multiprocessors": gpu.multiprocessors}


def predict(
    gpu: Gpu,
    layer: layers.Layer,
    map: str,
    dtype: str,
    layout: str,
    batch: int,
    chosen: Any = None,
    executed: float = EXECUTED,
    **finish: object,
) -> Prediction | str:
    """A prediction, or why there is none. `chosen` (emulate.Planned): another kernel and cut than the plan's. `finish`:
    what is done to the sums, such as activation="gelu" or residual=1, which the plan then reckons with."""
    ptx = machine()
    arguments = planned_for(gpu, arguments_of(layer, map, dtype, layout, batch)) | finish
    if finish and chosen is None:
        arguments["strict"] = 0
    planned = chosen or ptx.emulate.plans([words(arguments)])[0]
    kernel = planned.kernel.removeprefix("cuda_")
    if not planned.kernel.startswith("cuda_") or kernel == "pointwise_matmul":
        return f"{layer.label} {map} {dtype} {layout}: {planned.kernel}, which is torch's"
    if chosen:
        arguments |= {"kernel": kernel, **planned.tile}
    used = runner(kernel, map, gpu.ptx)
    less = smaller(arguments, planned.tile, layer.macs(batch), executed, kernel)
    whole = read_counts(used.run(words(arguments), gpu.ptx, timeout=300, dry=True).stdout)
    pinned = {"kernel": kernel, **planned.tile} if less else {}
    done = used.run(words(arguments | pinned | less), gpu.ptx, counts=True, timeout=300)
    if done.returncode:
        return f"{layer.label} {map} {dtype} {layout}: {done.stdout.splitlines()[-1]}"
    counted = read_counts(done.stdout)
    share = int(arguments["N"]) * int(arguments["C"]) / (
        int(less.get("N", arguments["N"])) * int(less.get("C", arguments["C"]))
    )  # fmt: skip
    # What packs weights or adds partial sums beside the main launch, which moves the images, has its threads, whatever
    # the images; there are as many sums as the whole has splits.
    main = max(counted, key=lambda launch: launch.memory_sectors)
    sums = planned.tile.get("splits", 1) / int(less.get("splits", planned.tile.get("splits", 1)))
    launches = []
    for small, large in zip(counted, whole, strict=False):
        blocks = large.blocks / small.blocks
        more, moved = (share, share) if small is main else (blocks, blocks * sums)
        launches.append(predict_launch(gpu, small, large.blocks, more, moved))
    itemsize = {"float64": 8, "float32": 4}.get(dtype, 2)
    added = itemsize * batch * layer.out_channels * layer.out_height * layer.out_width if finish.get("residual") else 0
    return Prediction(
        layer=layer.label, map=map, dtype=dtype, layout=layout, batch=batch, kernel=kernel,
        executed=", ".join(f"{key} {value}" for key, value in less.items()) if less else "whole",
        floor_us=(layer.bytes_moved(batch, itemsize, map) + added) / (gpu.memory_gbs * 1e3), launches=tuple(launches),
    )  # fmt: skip


# ---- what is printed


def layer_of(text: str) -> layers.Layer:
    """A depthwise layer in words, such as "C=96 H=56 R=7": W, S and K are as H, R and C, the padding keeps the size."""
    given = dict(word.split("=") for word in text.split())
    unknown = set(given) - {"C", "K", "H", "W", "R", "S", "stride", "groups", "bias"}
    if unknown or not {"C", "H", "R"} <= set(given):
        raise SystemExit(f"--layer: expected C=, H=, R= and possibly K, W, S, stride, groups, bias; got {text!r}")
    n = {key: int(value) for key, value in given.items()}
    C, H, R, stride = n["C"], n["H"], n["R"], n.get("stride", 1)
    S, groups = n.get("S", R), n.get("groups", C)
    kind = "pointwise" if R == S == groups == 1 else "depthwise" if groups == C else "grouped"
    sizes = (C, n.get("K", C), H, n.get("W", H), R, S, stride, stride, R // 2, S // 2, 1, 1, groups)
    return layers.Layer(kind, *sizes, bias=bool(n.get("bias")))


HEAD = (
    "| layer | map | dtype, layout | kernel | executed | blocks (a multiprocessor), waves | bounds in us | "
    "bank conflicts | predicted us | floor us |"
)


def row(p: Prediction) -> Iterable[str]:
    for launch in p.launches:
        first = launch is p.launches[0]
        longest = sorted(launch.bounds.items(), key=lambda item: -item[1])[:4]
        bounds = ", ".join(f"{key} {value:.1f}" for key, value in longest)
        name = p.kernel if first else "sum_partials"
        yield (
            f"| {p.layer} | {p.map} | {p.dtype}, {p.layout} | {name} | {p.executed} | "
            f"{launch.blocks} ({launch.resident}), {launch.waves:.2f} | {bounds} | "
            f"{launch.bank_conflicts:.2f}x | {launch.microseconds:.1f} | {p.floor_us if first else 0:.1f} |"
        )


def show(
    name: str,
    chosen: Sequence[layers.Layer],
    maps: Sequence[str],
    dtypes: Sequence[str],
    layouts: Sequence[str],
    batch: int,
) -> int:
    gpu = gpus()[name]
    print(f"Predictions for {gpu.name}, N {batch}. Nothing here is measured: counts of the PTX over public rates.")
    print(f"Rates: {gpu.source}.")
    print(
        f"Assumed: {gpu.copied_share:.0%} of the memory's bandwidth; {gpu.launch_us} us a launch and "
        f"{gpu.latency_us} us for its first loads, which each predicted time includes."
    )
    print("\n" + HEAD + "\n" + "|" + " --- |" * (HEAD.count("|") - 1))
    skipped = []
    for layer in chosen:
        for map in maps:
            for dtype in dtypes:
                for layout in layouts:
                    made = predict(gpu, layer, map, dtype, layout, batch)
                    if isinstance(made, str):
                        skipped.append(made)
                        continue
                    for line in row(made):
                        print(line, flush=True)
    for reason in skipped:
        print(f"not predicted: {reason}")
    return 0
