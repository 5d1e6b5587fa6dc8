"""The warp instructions as a real GPU executes them, compared bit for bit with the emulator (tests/emulator/golden.cu).

The emulator and the wrappers of ptx.cuh were written from one reading of the PTX manual; only a GPU can say
that the reading is right. The comparison needs one (mark `cuda`); that the emulator's half runs, and that no wrapper
is left out, is checked everywhere.
"""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from test_emulated import emulate
from test_emulated import pytestmark as emulator_marks

GOLDEN = emulate.HERE / "golden.cu"


# What is compiled for compute capabilities 9.0 to 11.x.
TMA = "tma elect_one mbar_init fence_mbar_init mbar_expect mbar_wait fence_async_copies tma_load_4d"


def emulated_output(build: str) -> dict[str, str]:
    sources = [GOLDEN, *(emulate.HERE / f"{name}.cpp" for name in emulate.RUNTIME_CORE)]
    with ThreadPoolExecutor(emulate.JOBS) as pool:
        objects = list(pool.map(lambda source: emulate.compile_object(source, build), sources))
    program = emulate.link(objects, build, "golden")
    done = emulate.run(program, [])
    assert done.returncode == 0, done.stdout
    return dict(line.split(": ", 1) for line in done.stdout.splitlines() if ": " in line)


def wrappers() -> list[str]:
    """The functions of ptx.cuh that kernels call."""
    text = without_comments(next(emulate.KERNELS.rglob("ptx.cuh")).read_text())
    names = re.findall(r"__device__ (?:__forceinline__ )?[\w<>]+ (\w+)(?:<[\w]+>)?\(", text)
    return sorted(set(names) - {"shared_address"})  # a helper of the wrappers


def without_comments(text: str) -> str:
    return re.sub(r"//[^\n]*", "", text)


def test_every_wrapper_has_a_golden_test() -> None:
    golden = without_comments(GOLDEN.read_text())
    emulated = (emulate.HERE / "ptx_emulated.h").read_text()
    for name in wrappers():
        assert re.search(rf"\b{name}\b", golden), f"{name} of ptx.cuh is missing in tests/emulator/golden.cu"
        assert re.search(rf"\b{name}\b", emulated), f"{name} of ptx.cuh has no body in the emulator"


@pytest.mark.parametrize("build", emulate.BUILDS)
@pytest.mark.emulated
@emulator_marks[1]
def test_the_emulator_runs_every_wrapper(build: str) -> None:
    """With three layouts spelt out once more, in another way than matrix.cpp does."""
    output = emulated_output(build)
    words = {name: [int(word, 16) for word in line.split()] for name, line in output.items()}
    for dtype in ("float16", "bfloat16"):
        sums = [struct.unpack("<f", struct.pack("<I", word))[0] for word in words[f"mma_sp_m16n8k32 {dtype}"]]
        assert sums == sparse_product()
    for lane in range(32):
        for matrix in range(4):  # row r of matrix m is shared row (8 m + r) ^ 5, whose element i is row * 256 + i
            row = (8 * matrix + lane // 4) ^ 5
            low = row * 256 + 2 * (lane % 4)
            assert words["ldmatrix_x4"][lane * 4 + matrix] == low | (low + 1) << 16
            rows = [(8 * matrix + 2 * (lane % 4) + i) ^ 5 for i in (0, 1)]
            low, high = (row * 256 + lane // 4 for row in rows)
            assert words["ldmatrix_x4_trans"][lane * 4 + matrix] == low | high << 16
        first, second = ((2 * lane + i) * 2654435761 % 2**32 if lane % 3 else 0 for i in (0, 1))
        loaded = words["load16_if load32_if load64_if opaque"][lane * 4 : lane * 4 + 4]
        assert loaded == [first & 0xFFFF, first, first, second]
        for box, (c, w, h, n) in enumerate(((0, -2, 0, 0), (4, 5, 1, 1), (0, 0, -1, 1), (2, 1, 0, 1))):
            c, w = c + lane % 4, w + lane // 4
            inside = c < 7 and 0 <= w < 10 and h >= 0
            value = (((n * 3 + h) * 10 + w) * 8 + c) * 2654435761 if inside else 0
            assert words[TMA][lane * 4 + box] == (value + 1) % 2**32  # and one lane is elected


def sparse_product() -> list[float]:
    """What mma_sp_golden of golden.cu prints: the layouts of the PTX manual, from the side of the matrices."""

    def number(i: int) -> int:
        return (i * 2654435761 % 2**32 >> 28) - 8

    def left(row: int, k: int) -> int:
        group, four = row % 8, k // 4
        nibble = (4 * group + four // 4) * 8 + row // 8 * 4 + four % 4  # of `kept`, over all lanes
        kept = 0xEDC984 >> nibble * 7 % 6 * 4 & 15
        kept = (kept & 3, kept >> 2)
        if k % 4 not in kept:
            return 0
        register = (4 * group + four % 4) * 4 + four // 4 * 2 + row // 8
        return number(2 * register + kept.index(k % 4))

    def right(k: int, column: int) -> int:
        return number(2 * (1000 + (4 * column + k % 8 // 2) * 4 + k // 8) + k % 2)

    def sum_of(lane: int, i: int) -> int:
        row, column = lane // 4 + i // 2 * 8, lane % 4 * 2 + i % 2
        return number(5000 + lane * 4 + i) + sum(left(row, k) * right(k, column) for k in range(32))

    return [float(sum_of(lane, i)) for lane in range(32) for i in range(4)]


def _nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = ([str(Path(home) / "bin" / "nvcc")] if home else []) + ["/usr/local/cuda/bin/nvcc"]
    return next((path for path in candidates if os.access(path, os.X_OK)), None) or shutil.which("nvcc")


@pytest.mark.cuda
@emulator_marks[1]
def test_a_gpu_agrees_bit_for_bit(tmp_path: Path) -> None:
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("mma.sync m16n8k16 and cp.async need compute capability 8.0")
    nvcc = _nvcc()
    if nvcc is None:
        pytest.skip("no nvcc to compile tests/emulator/golden.cu with")
    major, minor = torch.cuda.get_device_capability()
    program = tmp_path / "golden"
    architecture = f"-gencode=arch=compute_{major}{minor},code=sm_{major}{minor}"
    command = [nvcc, "-std=c++20", f"-I{emulate.CSRC}", architecture, "-o", str(program), str(GOLDEN)]
    command.append(str(next(emulate.KERNELS.rglob("tensor_map.cpp"))))
    with ThreadPoolExecutor(1) as pool:  # nvcc and the emulator's compiler at the same time: the step has a limit
        building = pool.submit(subprocess.run, command, capture_output=True, text=True)
        emulated = emulated_output("asan")
        built = building.result()
    assert built.returncode == 0, built.stderr
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    gpu = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    if not 9 <= major < 12:
        emulated.pop(TMA)
    assert gpu.keys() == emulated.keys()
    wrong = [name for name in gpu if gpu[name] != emulated[name]]
    detail = "\n".join(f"{name}\n  GPU      {gpu[name]}\n  emulator {emulated[name]}" for name in wrong)
    assert not wrong, f"the GPU and the emulator disagree:\n{detail}"
