"""The layers whose counts are kept, one or two for each kernel: real shapes with few channels and images.

python tests/ptx/layers.py                                  runs all of them and writes counts.json
python tests/ptx/layers.py depthwise_nhwc_mma pointwise_mma  those of these .cu files; the others stay as they are
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import ptx

RECORD = ptx.HERE / "counts.json"
RECORDED = (*ptx.ARCHITECTURES, "100")


def _layer(
    map: str, dtype: str, layout: str, N: int, C: int, size: int, R: int, stride: int = 1, **rest: object
) -> list[str]:
    pad = R // 2
    values = {
        "map": map, "dtype": dtype, "layout": layout, "N": N, "C": C, "H": size, "W": size, "K": C, "R": R,
        "S": R, "groups": C, "stride": f"{stride},{stride}", "padding": f"{pad},{pad},{pad},{pad}",
        "multiprocessors": 1,
    }  # fmt: skip
    return [f"{key}={value}" for key, value in (values | rest).items()]


def _sequence(op: str, dtype: str, layout: str, N: int, C: int, L: int, S: int, **rest: object) -> list[str]:
    values = {
        "op": op, "dtype": dtype, "layout": layout, "N": N, "C": C, "W": L, "K": C, "S": S, "groups": C,
        "padding": f"0,0,{S - 1},0", "bias": 1, "activation": "silu", "multiprocessors": 1,
    }  # fmt: skip
    return [f"{key}={value}" for key, value in (values | rest).items()]


def _block(N: int, C: int, E: int, K: int, size: int, stride: int = 1, **rest: object) -> list[str]:
    block = {"op": "inverted_residual", "inputs": C, "outputs": K, "bias": 1, "expand_activation": "relu6"}
    return _layer("forward", "bfloat16", "channels_last", N, E, size, 3, stride, **block, activation="relu6", **rest)


LAST, PLANES = "channels_last", "contiguous"
# By the .cu files that a layer needs.
LAYERS: dict[str, dict[str, list[str]]] = {
    # 32 channels: a whole block, as in every layer of a network.
    "depthwise_nhwc_mma": {
        "k7 7x7": _layer("forward", "float16", LAST, 8, 32, 7, 7),
        "k7 14x14": _layer("forward", "float16", LAST, 4, 32, 14, 7),
        "k7 56x56": _layer("forward", "float16", LAST, 1, 32, 56, 7),
        "k5 28x28": _layer("forward", "float16", LAST, 1, 32, 28, 5),
    },
    "depthwise_nhwc_tma": {"k7 5x14": _layer("forward", "float32", LAST, 5, 64, 14, 7, H=5)},
    "depthwise_nhwc": {
        "k3 14x14": _layer("forward", "float32", LAST, 1, 64, 14, 3),
        "k3 stride 2 28x28": _layer("forward", "float16", LAST, 1, 64, 28, 3, 2),
    },
    "depthwise_nchw_mma": {
        "k5 28x28": _layer("forward", "float16", PLANES, 4, 2, 28, 5),
        "k7 14x14": _layer("forward", "float16", PLANES, 8, 2, 14, 7),
        "k5 112x112": _layer("forward", "float16", PLANES, 1, 1, 112, 5),
    },
    "depthwise_nchw_mma_grad_weight sum_partials": {"k5 28x28": _layer("grad_weight", "float16", PLANES, 4, 2, 28, 5)},
    "depthwise_nchw depthwise_nchw_stride2": {
        "k3 28x28": _layer("forward", "float32", PLANES, 1, 8, 28, 3),
        "k3 7x7": _layer("forward", "float16", PLANES, 2, 16, 7, 3),
        "k3 stride 2 28x28": _layer("grad_input", "float32", PLANES, 1, 8, 28, 3, 2),
    },
    "depthwise_grad_weight_nhwc_mma sum_partials": {
        "k7 7x7": _layer("grad_weight", "float16", LAST, 8, 32, 7, 7),
        "k7 14x14": _layer("grad_weight", "float16", LAST, 2, 32, 14, 7),
    },
    "depthwise_grad_weight_nhwc sum_partials": {"k7 14x14": _layer("grad_weight", "float32", LAST, 1, 32, 14, 7)},
    "depthwise_grad_weight_nchw sum_partials": {
        "k3 7x7": _layer("grad_weight", "float16", PLANES, 8, 8, 7, 3),
        "k3 stride 2 14x14": _layer("grad_weight", "float16", PLANES, 8, 8, 14, 3, 2),
    },
    "depthwise_toeplitz": {"k31 28x28": _layer("forward", "float16", PLANES, 1, 2, 28, 31)},
    "depthwise_toeplitz_grad_weight sum_partials": {
        "k31 28x28": _layer("grad_weight", "float16", PLANES, 1, 2, 28, 31)
    },
    "depthwise_large": {"k13 28x28": _layer("forward", "float32", PLANES, 1, 2, 28, 13)},
    "depthwise_large_grad_weight sum_partials": {"k13 28x28": _layer("grad_weight", "float32", PLANES, 1, 2, 28, 13)},
    "depthwise_direct": {"k9 14x14": _layer("forward", "float64", LAST, 1, 16, 14, 9)},
    "pointwise_mma": {
        "64 to 64 14x14": _layer("forward", "float16", LAST, 1, 64, 14, 1, groups=1, kernel="pointwise_mma"),
        "64 to 64 14x14 planes": _layer("forward", "float16", PLANES, 1, 64, 14, 1, groups=1),
    },
    "pointwise_nhwc_mma": {
        "24 to 144 14x14": _layer("forward", "float16", LAST, 4, 24, 14, 1, groups=1, K=144),
        "144 to 24 14x14": _layer("forward", "float16", LAST, 4, 144, 14, 1, groups=1, K=24),
        "64 to 64 14x14": _layer("grad_input", "float16", LAST, 4, 64, 14, 1, groups=1),
        "144 to 24 14x14 residual": _layer(
            "forward", "float16", LAST, 4, 144, 14, 1, groups=1, K=24, bias=1, activation="relu", residual=1
        ),
    },
    "pointwise_nhwc_mma_grad_weight sum_partials": {
        "24 to 144 14x14": _layer("grad_weight", "float16", LAST, 4, 24, 14, 1, groups=1, K=144)
    },
    "pointwise": {"64 to 64 14x14": _layer("forward", "float32", LAST, 1, 64, 14, 1, groups=1)},
    "grouped": {"k3 7x7": _layer("forward", "float16", LAST, 1, 32, 7, 3, groups=4, kernel="grouped")},
    "grouped_grad_weight sum_partials": {
        "k3 7x7": _layer("grad_weight", "float16", LAST, 1, 32, 7, 3, groups=4, kernel="grouped")
    },
    "grouped_nhwc_mma": {
        "of 4 56x56": _layer("forward", "float16", LAST, 1, 64, 56, 3, groups=16),
        "of 8 28x28": _layer("grad_input", "float16", LAST, 1, 64, 28, 3, groups=8),
        "of 16 14x14": _layer("forward", "float16", LAST, 2, 64, 14, 3, groups=4),
        "of 16 stride 2 28x28": _layer("forward", "float16", LAST, 1, 64, 28, 3, 2, groups=4),
    },
    "grouped_nhwc_mma_stride2": {
        "of 8 28x28": _layer("grad_input", "float16", LAST, 1, 64, 28, 3, 2, groups=8),
        "of 16 14x14": _layer("grad_input", "float16", LAST, 2, 64, 14, 3, 2, groups=4),
    },
    "grouped_nhwc_mma_grad_weight sum_partials": {
        "of 4 56x56": _layer("grad_weight", "float16", LAST, 1, 64, 56, 3, groups=16),
        "of 16 14x14": _layer("grad_weight", "float16", LAST, 2, 64, 14, 3, groups=4),
        "of 8 stride 2 28x28": _layer("grad_weight", "float16", LAST, 1, 64, 28, 3, 2, groups=8),
    },
    "causal_nlc": {
        "k4 1024": _sequence("causal", "bfloat16", LAST, 1, 256, 1024, 4, states=1),
        "k4 1024 packed": _sequence("causal", "float32", LAST, 1, 128, 1024, 4, packed=256),
    },
    "causal_ncl": {
        "k4 1024": _sequence("causal", "bfloat16", PLANES, 1, 8, 1024, 4, states=1),
        "k4 1024 packed": _sequence("causal", "float32", PLANES, 1, 8, 1024, 4, packed=256),
        "k4 1001": _sequence("causal", "bfloat16", PLANES, 1, 8, 1001, 4, states=1),
    },
    "causal_direct": {
        "k4 128": _sequence("causal", "bfloat16", LAST, 1, 65, 128, 4, states=1),
        "k7 128": _sequence("causal", "float32", LAST, 1, 64, 128, 7, states=1),
    },
    "causal_update": {
        "k4 1 token": _sequence("causal_update", "bfloat16", PLANES, 4, 256, 1, 4),
        "k4 1 token ring": _sequence("causal_update", "float32", LAST, 4, 256, 1, 4, ring=1, rows=1, length=4),
    },
    "inverted_residual": {
        "24 to 144 to 24 56x56": _block(1, 24, 144, 24, 56, residual=1),
        "16 to 96 to 24 stride 2 112x112": _block(1, 16, 96, 24, 112, 2),
        "64 to 384 to 64 14x14": _block(1, 64, 384, 64, 14, residual=1),
        "160 to 960 to 160 7x7": _block(1, 160, 960, 160, 7, residual=1),
    },
    "separable_mma": {"k3 14x14": _layer("forward", "float16", LAST, 1, 32, 14, 3, op="separable", outputs=64)},
    "separable": {"k3 14x14": _layer("forward", "float32", LAST, 1, 32, 14, 3, op="separable", outputs=64)},
}


def counts(used: ptx.Runner, arguments: list[str], arch: str) -> dict[str, object]:
    """Warp instructions of all launches, how busy shared memory is beside them, and of each kind of access wavefronts
    (ideal ones) or sectors a request."""
    done = used.run(arguments, arch, counts=True, timeout=300)
    if done.returncode:
        raise RuntimeError(f"{done.stdout}\n{ptx.command(arch, arguments)}")
    instructions = sum(map(int, re.findall(r"^counts: .* instructions=(\d+)", done.stdout, re.MULTILINE)))
    sums: dict[str, list[int]] = {}
    for line in re.findall(r"^memory: (.*)", done.stdout, re.MULTILINE):
        *numbers, what = line.split(" ", 5)
        values = [int(number.split("=")[1]) for number in numbers]
        sums[what] = [a + b for a, b in zip(sums.get(what, [0] * 5), values, strict=True)]
    shared = {w: [round(v[1] / v[0], 3), round(v[2] / v[0], 3)] for w, v in sums.items() if v[1]}
    sectors = {w: round(v[3] / v[0], 3) for w, v in sums.items() if v[3]}
    plan = re.search(r"^plan: (?:cuda_)?(.*)", done.stdout, re.MULTILINE)[1]
    # Clocks of shared memory over those of four schedulers: from about one on, bank conflicts cost time.
    busy = round(sum(v[1] for v in sums.values()) * 4 / instructions, 2)
    return {"plan": plan, "instructions": instructions, "busy": busy, "wavefronts": shared, "sectors": sectors}


def is_more(now: dict[str, object], recorded: dict[str, object]) -> list[str]:
    """What a kernel does more of than is recorded."""
    more = []
    if now["instructions"] > recorded["instructions"]:
        more.append(f"instructions: {now['instructions']}, recorded {recorded['instructions']}")
    for what, (wavefronts, _) in now["wavefronts"].items():
        most = recorded["wavefronts"].get(what, [0, 0])[0]
        if wavefronts > most:
            more.append(f"{what}: {wavefronts} wavefronts a request, recorded {most}")
    for what, sectors in now["sectors"].items():
        if sectors > recorded["sectors"].get(what, 0):
            more.append(f"{what}: {sectors} sectors a request, recorded {recorded['sectors'].get(what, 0)}")
    return more


def cases(arch: str) -> Iterator[tuple[str, str, list[str]]]:
    """The .cu files, name in counts.json and arguments of the layers of an architecture. What 12.0 gets is 10.0's but
    for boxes, which it has not (test_ptx.py)."""
    for files, layers in LAYERS.items():
        if arch != "80" or files != "depthwise_nhwc_tma":
            yield from ((files, f"{files.split()[0]} {name}", arguments) for name, arguments in layers.items())


def main(only: list[str]) -> int:
    stems = {stem for files in LAYERS if not only or files.split()[0] in only for stem in files.split()}
    record: dict[str, dict[str, dict[str, object]]] = json.loads(RECORD.read_text()) if only else {}
    for arch in RECORDED:
        used = ptx.runner([path for path in ptx.kernel_sources() if path.stem in stems], ptx.together(arch))
        for files, name, arguments in cases(arch):
            if not only or files.split()[0] in only:
                print(arch, name, flush=True)
                record.setdefault(arch, {})[name] = counts(used, arguments, arch)
    RECORD.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
