"""The PTX that nvcc emits for the CUDA kernels, executed on the CPU by tests/ptx and compared with float64.

One test is one case of tests/test_emulated.py on one architecture. By default a few cases of the kernels in DEFAULT;
the slow tests take all kernels and cases. tests/ptx/README.md explains the machine and what it cannot see.
"""

from __future__ import annotations

import collections
import functools
import json
import os
import re
import struct
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from benchmarks import predict
from ptx_faults import FAULTS, kernel
from test_emulated import NAMES, RUNS, emulate
from test_golden_ptx import GOLDEN, emulated_output

sys.path.insert(0, str(Path(__file__).parent / "ptx"))
import layers as ptx_layers
import plant

import ptx

pytestmark = [
    pytest.mark.emulated,  # in one process: they share what is compiled
    pytest.mark.skipif(ptx.why_not() is not None, reason=str(ptx.why_not())),
]

# What is compiled and run by default: every family, every way of copying and multiplying, in a minute of nvcc.
DEFAULT = (
    "depthwise_nhwc_mma", "depthwise_nhwc_tma", "depthwise_nchw_mma", "depthwise_grad_weight_nhwc_mma",
    "depthwise_grad_weight", "pointwise_mma", "pointwise_nhwc_mma", "grouped", "grouped_grad_weight", "separable_mma",
    "spatial_separable", "causal_nlc", "causal_ncl", "causal_direct", "causal_update", "borders", "sum_partials",
)  # fmt: skip
EACH, SMALL = 2, 1e6  # default cases of a kernel and map, of so few products


# ---- the machine itself


@functools.cache
def text_program() -> Path:
    sources = [*ptx.MACHINE, ptx.HERE / "text.cpp"]
    return ptx.link([ptx.compile_machine(source) for source in sources], "text")


def run_text(
    folder: Path,
    text: str,
    threads: int = 64,
    data: bytes | None = None,
    out: int = 256,
    seed: int = 0,
    early: bool = False,
) -> tuple[subprocess.CompletedProcess[str], bytes]:
    """Runs an entry of (in, out, work); returns the process and what it wrote."""
    (folder / "kernel.ptx").write_text(text)
    (folder / "in").write_bytes(bytes(range(256)) if data is None else data)
    words = [f"block={threads}", f"seed={seed}", f"in:{folder}/in", f"out:{out}:{folder}/out", "work:256"]
    words += ["early"] if early else []
    done = subprocess.run(
        [text_program(), "run", folder / "kernel.ptx", "kernel", *words], text=True, capture_output=True, timeout=60
    )
    return done, (folder / "out").read_bytes() if done.returncode == 0 else b""


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_seen(tmp_path: Path, name: str) -> None:
    """For several orders of warps; without the fault the same kernel runs."""
    case = FAULTS[name]
    assert case.what in case.right
    done, _ = run_text(tmp_path, case.right, case.threads, early=case.early)
    assert done.returncode == 0, done.stdout
    for seed in range(4):
        wrong = case.right.replace(case.what, case.by, 1)
        done, _ = run_text(tmp_path, wrong, case.threads, seed=seed, early=case.early)
        assert done.returncode == 1 and re.search(case.told, done.stdout), f"seed {seed}: {done.stdout}"


def signed(bits: int, width: int) -> int:
    bits &= (1 << width) - 1
    return bits - (1 << width) if bits >> (width - 1) else bits


def single(bits: int) -> float:
    return struct.unpack("<f", struct.pack("<I", bits & 0xFFFFFFFF))[0]


def half_bits(value: float) -> int:
    return struct.unpack("<H", struct.pack("<e", value))[0]


def from_half(bits: int) -> float:
    return struct.unpack("<e", struct.pack("<H", bits & 0xFFFF))[0]


def quotient(a: int, b: int) -> int:
    """Towards zero."""
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


S = functools.partial(signed, width=32)
# An instruction on %r10, %r11, %r12 (three words of 32 bits) and %rd10, %rd11 (of 64), and its result in %r13 or %rd13.
MEANINGS: dict[str, Callable[..., int]] = {
    "add.s32 %r13, %r10, %r11": lambda a, b, c, x, y: a + b,
    "sub.s32 %r13, %r10, %r11": lambda a, b, c, x, y: a - b,
    "mul.lo.s32 %r13, %r10, %r11": lambda a, b, c, x, y: a * b,
    "mul.hi.s32 %r13, %r10, %r11": lambda a, b, c, x, y: S(a) * S(b) >> 32,
    "mul.hi.u32 %r13, %r10, %r11": lambda a, b, c, x, y: a * b >> 32,
    "mul.wide.s32 %rd13, %r10, %r11": lambda a, b, c, x, y: S(a) * S(b),
    "mul.wide.u32 %rd13, %r10, %r11": lambda a, b, c, x, y: a * b,
    "mul.lo.s64 %rd13, %rd10, %rd11": lambda a, b, c, x, y: x * y,
    "mad.lo.s32 %r13, %r10, %r11, %r12": lambda a, b, c, x, y: a * b + c,
    "mad.wide.s32 %rd13, %r10, %r11, %rd10": lambda a, b, c, x, y: S(a) * S(b) + x,
    "div.s32 %r13, %r10, %r12": lambda a, b, c, x, y: quotient(S(a), S(c)),
    "rem.s32 %r13, %r10, %r12": lambda a, b, c, x, y: S(a) - S(c) * quotient(S(a), S(c)),
    "div.u32 %r13, %r10, %r12": lambda a, b, c, x, y: a // c,
    "div.s64 %rd13, %rd10, %rd11": lambda a, b, c, x, y: quotient(signed(x, 64), signed(y, 64)),
    "min.s32 %r13, %r10, %r11": lambda a, b, c, x, y: min(S(a), S(b)),
    "min.u32 %r13, %r10, %r11": lambda a, b, c, x, y: min(a, b),
    "max.s64 %rd13, %rd10, %rd11": lambda a, b, c, x, y: max(signed(x, 64), signed(y, 64)),
    "neg.s32 %r13, %r10": lambda a, b, c, x, y: -a,
    "abs.s32 %r13, %r10": lambda a, b, c, x, y: abs(S(a)),
    "not.b32 %r13, %r10": lambda a, b, c, x, y: ~a,
    "xor.b64 %rd13, %rd10, %rd11": lambda a, b, c, x, y: x ^ y,
    "shl.b32 %r13, %r10, 5": lambda a, b, c, x, y: a << 5,
    "shl.b32 %r13, %r10, 32": lambda a, b, c, x, y: 0,
    "shr.u32 %r13, %r10, 7": lambda a, b, c, x, y: a >> 7,
    "shr.s32 %r13, %r10, 7": lambda a, b, c, x, y: S(a) >> 7,
    "shr.s32 %r13, %r10, 99": lambda a, b, c, x, y: -1 if S(a) < 0 else 0,
    "shr.u64 %rd13, %rd10, 40": lambda a, b, c, x, y: x >> 40,
    "bfi.b32 %r13, %r10, %r11, 9, 11": lambda a, b, c, x, y: b & ~(2047 << 9) | (a & 2047) << 9,
    "bfe.u32 %r13, %r10, 9, 11": lambda a, b, c, x, y: a >> 9 & 2047,
    "bfe.u32 %r13, %r10, 25, 11": lambda a, b, c, x, y: a >> 25,
    "bfe.s32 %r13, %r10, 9, 11": lambda a, b, c, x, y: (a >> 9 & 2047) - (a >> 19 & 1) * 2048,
    "bfe.s32 %r13, %r10, 25, 11": lambda a, b, c, x, y: S(a) >> 25,
    "bfe.s64 %rd13, %rd10, 40, 0": lambda a, b, c, x, y: 0,
    "cvt.s64.s32 %rd13, %r10": lambda a, b, c, x, y: S(a),
    "cvt.u64.u32 %rd13, %r10": lambda a, b, c, x, y: a,
    "cvt.u32.u64 %r13, %rd10": lambda a, b, c, x, y: x,
    "setp.lt.s32 %p1, %r10, %r11; selp.u32 %r13, 1, 0, %p1": lambda a, b, c, x, y: int(S(a) < S(b)),
    "setp.gt.u32 %p1, %r10, %r11; selp.u32 %r13, 1, 0, %p1": lambda a, b, c, x, y: int(a > b),
    "setp.lt.f32 %p1, %f10, %f11; selp.u32 %r13, 1, 0, %p1": lambda a, b, c, x, y: int(single(a) < single(b)),
    "setp.geu.f32 %p1, %f10, %f11; selp.u32 %r13, 1, 0, %p1": lambda a, b, c, x, y: int(not single(a) < single(b)),
    "mov.b64 %rd13, {%r10, %r11}": lambda a, b, c, x, y: a | b << 32,
    "mov.b32 {%rs1, %rs2}, %r10; mov.b32 %r13, {%rs2, %rs1}": lambda a, b, c, x, y: a >> 16 | a << 16,
    "copysign.f32 %f13, %f10, %f11; mov.b32 %r13, %f13": lambda a, b, c, x, y: a & 1 << 31 | b & (1 << 31) - 1,
    "ld.u32 %r13, [%rd9+4]": lambda a, b, c, x, y: b,  # a generic address
    "shfl.sync.bfly.b32 %r13, %r1, 5, 31, -1": lambda a, b, c, x, y, t: t ^ 5,
    "shfl.sync.idx.b32 %r13, %r1, 3, 31, -1": lambda a, b, c, x, y, t: t // 32 * 32 + 3,
    "shfl.sync.down.b32 %r13, %r1, 4, 31, -1": lambda a, b, c, x, y, t: t + 4 if t % 32 < 28 else t,
    "shfl.sync.up.b32 %r13, %r1, 4, 0, -1": lambda a, b, c, x, y, t: t - 4 if t % 32 >= 4 else t,
    # Two halves, exact in float64 and rounded once.
    "{fma.rn.f16x2 %r13, %r14, %r15, %r16;}": lambda a, b, c, x, y: sum(
        half_bits(from_half(p >> s) * from_half(q >> s) + from_half(r >> s)) << s
        for p, q, r in [tuple(v & 0x83FF83FF | 0x3C003C00 for v in (a, b, c))]
        for s in (0, 16)
    ),
}  # fmt: skip


@pytest.mark.parametrize("instruction", MEANINGS)
def test_meaning(tmp_path: Path, instruction: str) -> None:
    """What the PTX manual says of an instruction, on edges and on numbers from everywhere."""
    edges = [0, 1, 2, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x7FC00000, 0x3F800000, 0xBF800000]
    state, rows = 12345, []
    for t in range(64):
        words = []
        for i in range(7):
            state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
            words.append(edges[(state >> 40) % len(edges)] if (t + i) % 5 == 0 and i < 2 else state >> 32)
        words[2] = words[2] % 1000 + 1
        words[6] |= 1
        rows.append(words)
    body = """
      mul.wide.u32 %rd8, %r1, 28;
      add.s64 %rd9, %rd1, %rd8;
      ld.global.u32 %r10, [%rd9]; ld.global.u32 %r11, [%rd9+4]; ld.global.u32 %r12, [%rd9+8];
      ld.global.u32 %r20, [%rd9+12]; ld.global.u32 %r21, [%rd9+16];
      ld.global.u32 %r22, [%rd9+20]; ld.global.u32 %r23, [%rd9+24];
      mov.b64 %rd10, {%r20, %r21}; mov.b64 %rd11, {%r22, %r23};
      mov.b32 %f10, %r10; mov.b32 %f11, %r11;
      and.b32 %r14, %r10, 0x83FF83FF; or.b32 %r14, %r14, 0x3C003C00;
      and.b32 %r15, %r11, 0x83FF83FF; or.b32 %r15, %r15, 0x3C003C00;
      and.b32 %r16, %r12, 0x83FF83FF; or.b32 %r16, %r16, 0x3C003C00;
      mov.u32 %r13, 0; mov.u64 %rd13, 0;
      """
    wide = "%rd13" in instruction
    store = "%rd13" if wide else "%rd14"
    tail = "" if wide else "cvt.u64.u32 %rd14, %r13;"
    body += f"{instruction}{'' if instruction.startswith('{') else ';'}\n{tail}\n"
    body += f"mul.wide.u32 %rd15, %r1, 8; add.s64 %rd16, %rd2, %rd15; st.global.u64 [%rd16], {store};"
    data = b"".join(struct.pack("<7I", *(w & 0xFFFFFFFF for w in row)) for row in rows)
    done, out = run_text(tmp_path, kernel(body), data=data, out=512)
    assert done.returncode == 0, done.stdout
    for t, (row, got) in enumerate(zip(rows, struct.unpack("<64Q", out), strict=True)):
        a, b, c = (w & 0xFFFFFFFF for w in row[:3])
        x, y = ((row[i] & 0xFFFFFFFF) | (row[i + 1] & 0xFFFFFFFF) << 32 for i in (3, 5))
        mean = MEANINGS[instruction]
        want = mean(a, b, c, x, y, t) if "shfl" in instruction else mean(a, b, c, x, y)
        assert got == want % 2 ** (64 if wide else 32), f"thread {t}: {a:#x} {b:#x} {c:#x} {x:#x} {y:#x}"


# CUTLASS' (thread, value) -> element for SM80_16x8x16_F32F16F16F32_TN (cute/atom/mma_traits_sm80.hpp): the steps of
# thread % 4, of thread / 4, and of each bit of the value, in a matrix whose rows (of B: columns) lie side by side.
CUTLASS = {"A": (16, (32, 1), (16, 8, 128)), "B": (8, (16, 1), (8, 64)), "C": (16, (32, 1), (16, 8))}


def test_products_have_the_layouts_of_cutlass(tmp_path: Path) -> None:
    """Public code beside our reading of the manual: a mistake that the emulator's authors share shows."""

    def place(matrix: str, thread: int, value: int) -> tuple[int, int]:
        rows, (fast, slow), bits = CUTLASS[matrix]
        at = thread % 4 * fast + thread // 4 * slow + sum(step for i, step in enumerate(bits) if value >> i & 1)
        return at % rows, at // rows

    left = [[(3 * m * m + 5 * k) % 15 - 7 for k in range(16)] for m in range(16)]
    right = [[(7 * n + 2 * k * k) % 13 - 6 for k in range(16)] for n in range(8)]
    start = [[100 * m + n for n in range(8)] for m in range(16)]
    data = b""
    for t in range(32):
        for matrix, name, count, form in ((left, "A", 8, "e"), (right, "B", 4, "e"), (start, "C", 4, "f")):
            numbers = [matrix[i][j] for i, j in (place(name, t, v) for v in range(count))]
            data += struct.pack(f"<{count}{form}", *numbers)
    loads = "".join(f"ld.global.u32 %r{10 + i}, [%rd9+{4 * i}];" for i in range(6))
    loads += "".join(f"ld.global.f32 %f{1 + i}, [%rd9+{24 + 4 * i}];" for i in range(4))
    body = f"""
      mul.wide.u32 %rd8, %r1, 40; add.s64 %rd9, %rd1, %rd8; {loads}
      mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {{%f11,%f12,%f13,%f14}}, {{%r10,%r11,%r12,%r13}},
        {{%r14,%r15}}, {{%f1,%f2,%f3,%f4}};
      mul.wide.u32 %rd10, %r1, 16; add.s64 %rd11, %rd2, %rd10;
      st.global.v4.f32 [%rd11], {{%f11,%f12,%f13,%f14}};"""
    done, out = run_text(tmp_path, kernel(body), threads=32, data=data, out=512)
    assert done.returncode == 0, done.stdout
    for t in range(32):
        for v, got in enumerate(struct.unpack_from("<4f", out, 16 * t)):
            m, n = place("C", t, v)
            assert got == start[m][n] + sum(a * b for a, b in zip(left[m], right[n], strict=True)), (t, v)


# CUTLASS' (thread, bit) -> bit for ldmatrix (cute/atom/copy_traits_sm75.hpp): the thread that names a row of sixteen
# bytes, and where each thread's two halves of a register come from; the registers are a matrix (1024 bits) apart.
@pytest.mark.parametrize("trans", ["", ".trans"])
@pytest.mark.parametrize("count", [2, 4])
def test_ldmatrix_has_the_layout_of_cutlass(tmp_path: Path, count: int, trans: str) -> None:
    places = [(3 * row + 1) % (8 * count) for row in range(8 * count)]  # rows lie in no order: addresses matter
    words = [half for row in range(8 * count) for half in range(8 * places.index(row), 8 * places.index(row) + 8)]
    data = struct.pack(f"<{len(words)}H", *words)
    registers = ", ".join(f"%r{20 + i}" for i in range(count))
    body = f"""
      shl.b32 %r5, %r1, 4; add.s32 %r6, %r2, %r5; cvt.u64.u32 %rd8, %r5; add.s64 %rd9, %rd1, %rd8;
      setp.lt.u32 %p2, %r1, {8 * count};
      @%p2 ld.global.v4.u32 {{%r10, %r11, %r12, %r13}}, [%rd9];
      @%p2 st.shared.v4.u32 [%r6], {{%r10, %r11, %r12, %r13}};
      bar.sync 0;
      mul.lo.s32 %r7, %r1, 3; add.s32 %r7, %r7, 1; and.b32 %r7, %r7, {8 * count - 1};
      shl.b32 %r7, %r7, 4; add.s32 %r7, %r2, %r7;
      ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {{{registers}}}, [%r7];
      mul.wide.u32 %rd10, %r1, {4 * count}; add.s64 %rd11, %rd2, %rd10;
      st.global.v{count}.u32 [%rd11], {{{registers}}};"""
    done, out = run_text(tmp_path, kernel(body), threads=32, data=data, out=128 * count)
    assert done.returncode == 0, done.stdout
    for t in range(32):
        for i, got in enumerate(struct.unpack_from(f"<{2 * count}H", out, 4 * count * t)):
            matrix, half = i // 2, i % 2
            bit = 256 * (t % 4) + 16 * (t // 4) + 128 * half if trans else 32 * t + 16 * half
            assert got == (1024 * matrix + bit) // 16, (t, i)


def test_sparse_metadata_has_the_layout_of_cutlass(tmp_path: Path) -> None:
    """CUTLASS keeps 16 bits for sixteen columns of a row. It orders them (util/host_reorder.h, reorder_meta) so that a
    plain ldmatrix gives each lane its word (gemm/warp/mma_tensor_op_tile_iterator_sparse.h) and two products of sixteen
    rows take one register, by selectors 0 and 1 (gemm/warp/mma_sparse_tensor_op.h). What the bits mean it says in
    util/host_uncompress.h, by which the expected sums are made."""
    pairs = [4 * second + first for second in range(4) for first in range(second)]  # which two of four columns
    kept = [pairs[(5 * r + 3 * c + r * c) % 6] for r in range(32) for c in range(8)]
    packed = [[(3 * r * r + 5 * i + 1) % 15 - 7 for i in range(16)] for r in range(32)]
    right = [[(7 * n + 2 * k * k) % 13 - 6 for k in range(32)] for n in range(8)]

    def reordered() -> list[int]:
        """The words of 32 bits: two neighbouring columns of 16-bit metadata side by side."""
        halves = [0] * 64
        for row in range(32):
            for column in range(2):
                to, at = row % 8 * 4 + row // 8, column  # rows first: eights interleaved
                if to % 2 != at:  # then the other diagonal of blocks of two by two is exchanged
                    to, at = (to + 1, 0) if at else (to - 1, 1)
                halves[2 * to + at] = sum(kept[8 * row + 4 * column + four] << 4 * four for four in range(4))
        return [halves[2 * i] | halves[2 * i + 1] << 16 for i in range(32)]

    data, words = b"", reordered()
    for t in range(32):
        g, pair = t // 4, 2 * (t % 4)
        for first_row in (0, 16):
            for i in range(4):
                row, column = first_row + g + 8 * (i % 2), pair + 8 * (i // 2)
                data += struct.pack("<2e", *packed[row][column : column + 2])
        data += b"".join(struct.pack("<2e", *right[g][pair + 8 * i : pair + 8 * i + 2]) for i in range(4))
        data += struct.pack("<I", words[t])
    product = """
      mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32 {{%f11,%f12,%f13,%f14}},
        {{{}}}, {{%r18,%r19,%r20,%r21}}, {{%f1,%f1,%f1,%f1}}, %r22, 0x{};
      st.global.v4.f32 [%rd11+{}], {{%f11,%f12,%f13,%f14}};"""
    body = "mul.wide.u32 %rd8, %r1, 52; add.s64 %rd9, %rd1, %rd8; mov.f32 %f1, 0f00000000;"
    body += "".join(f"ld.global.u32 %r{10 + i}, [%rd9+{4 * i}];" for i in range(13))
    body += "mul.wide.u32 %rd10, %r1, 32; add.s64 %rd11, %rd2, %rd10;"
    body += product.format("%r10,%r11,%r12,%r13", 0, 0) + product.format("%r14,%r15,%r16,%r17", 1, 16)
    done, out = run_text(tmp_path, kernel(body), threads=32, data=data, out=1024)
    assert done.returncode == 0, done.stdout
    for t in range(32):
        for i, got in enumerate(struct.unpack_from("<8f", out, 32 * t)):
            row, n = 16 * (i // 4) + t // 4 + 8 * (i % 4 // 2), t % 4 * 2 + i % 2
            bits = [kept[8 * row + j // 2] >> 2 * (j % 2) & 3 for j in range(16)]  # of packed number j
            want = sum(packed[row][j] * right[n][j // 2 * 4 + bits[j]] for j in range(16))
            assert got == want, (row, n)


# ---- the kernels


@functools.cache
def planned(arch: str) -> list[str]:
    """The kernel that each of RUNS takes on an architecture, without cuda_."""
    names = emulate.planned_kernels([ptx.for_arch(run.arguments(), arch) for run in RUNS])
    return [str(run.extra.get("kernel", n.removeprefix("cuda_"))) for run, n in zip(RUNS, names, strict=True)]


def files_of(index: int, arch: str) -> set[str]:
    """The .cu files whose kernels a run may start."""
    run, name = RUNS[index], planned(arch)[index]
    stems = {path.stem for path in emulate.kernel_sources()}
    files = {name, f"{name}_stride2"} if run.map != "grad_weight" else {name, f"{name}_grad_weight", "sum_partials"}
    if "padding_mode" in run.extra:
        files.add("borders")
    return files & stems


def runs_on(index: int, arch: str) -> bool:
    """Boxes are for 9.0 and newer, but not for 12.0."""
    return not (arch in ("80", "120") and planned(arch)[index] == "depthwise_nhwc_tma")


def products_of(index: int) -> int:
    c = RUNS[index].case
    return c.N * c.K * c.H * c.W * c.R * c.S * c.C // c.groups


def chosen() -> list[tuple[int, str]]:
    """A few of RUNS for each kernel in DEFAULT, on each architecture: small ones."""
    taken: collections.Counter[tuple[str, ...]] = collections.Counter()
    result = []
    for index, run in enumerate(RUNS):
        for arch in ptx.ARCHITECTURES if products_of(index) < SMALL else ():
            files = files_of(index, arch)
            key = (planned(arch)[index], run.map, arch, *(["borders"] if "padding_mode" in run.extra else []))
            if runs_on(index, arch) and files and files <= set(DEFAULT) and taken[key] < EACH:
                taken[key] += 1
                result.append((index, arch))
    return result


CHOSEN = chosen() if ptx.why_not() is None else []
REST = [(i, a) for i in range(len(RUNS)) for a in ptx.ARCHITECTURES if CHOSEN and runs_on(i, a)]
REST = [pair for pair in REST if pair not in set(CHOSEN)]


@functools.cache
def runner(all_kernels: bool) -> ptx.Runner:
    return ptx.runner([p for p in emulate.kernel_sources() if all_kernels or p.stem in DEFAULT])


@functools.cache
def newer(all_kernels: bool) -> ptx.Runner:
    """For 10.0 and 12.0; by default small kernels, for the time that nvcc takes."""
    some = ("causal_direct", "depthwise_nhwc_tma")
    return ptx.runner([p for p in emulate.kernel_sources() if all_kernels or p.stem in some], ptx.NEWER)


def check(index: int, arch: str, all_kernels: bool) -> set[tuple[str, str]]:
    """Runs a case; returns the kernels that were launched: file and name."""
    arguments = RUNS[index].arguments()
    done = runner(all_kernels).run(arguments, arch)
    if done.returncode != 0:
        pytest.fail(f"{done.stdout}\nrepeat with: {ptx.command(arch, arguments)}", pytrace=False)
    return ptx.launched(done.stdout)


@pytest.mark.parametrize(
    ("arch", "kernel"), [("100", "causal_direct"), ("100", "depthwise_nhwc_tma"), ("120", "causal_direct")]
)
def test_newer_architectures(arch: str, kernel: str) -> None:
    for index in [i for i, name in enumerate(planned(arch)) if name == kernel][:4]:
        done = newer(False).run(RUNS[index].arguments(), arch)
        assert done.returncode == 0 and ptx.launched(done.stdout), done.stdout


def plain(text: str) -> str:
    """PTX without what differs from one run of nvcc to the next, or by the name of the architecture."""
    text = re.sub(r"//[^\n]*|^\.target .*$", "", text, flags=re.MULTILINE)
    return re.sub(r"_[0-9a-f]{8}_\d+_(\w+?)_cu_[0-9a-f]{8}(_\d+)?", r"\1", text)


@pytest.mark.slow
def test_what_12_0_gets_is_what_10_0_gets() -> None:
    """nvcc makes other PTX for 10.0 than for 9.0a of every kernel, and the same for 12.0: it is counted once."""
    used = newer(True)
    differ = {name for name in used.ptx["100"] if len({plain(used.ptx[a][name].read_text()) for a in ptx.NEWER}) > 1}
    assert differ == {"depthwise_nhwc_tma"}  # 12.0 has no boxes


@functools.cache
def doors_by_file() -> dict[str, list[str]]:
    """The doors of launch.h, by the .cu file that defines them, without its ending."""
    found: dict[str, list[str]] = {}
    for door in emulate.doors():
        found.setdefault(emulate.door_source(door).stem, []).append(door)
    return found


def doors_passed(index: int, files: set[str]) -> set[str]:
    """Doors whose kernels were launched: of a file with several the one that is named as the case's map. (nvcc's host
    code jumps from a door to its kernel's launch, so that the call stack does not have it.)"""
    passed = set()
    for file in files:
        doors = doors_by_file()[file]
        passed |= {door for door in doors if len(doors) == 1 or door.endswith(f"_{RUNS[index].map}")}
    return passed


LAUNCHED: dict[tuple[int, str], set[tuple[str, str]]] = {}  # what the tests of this process have run


@pytest.mark.parametrize("index, arch", CHOSEN, ids=[f"{NAMES[i]}-{arch}" for i, arch in CHOSEN])
def test_kernel(index: int, arch: str) -> None:
    LAUNCHED[index, arch] = check(index, arch, all_kernels=False)


def doors_of(files: set[str]) -> set[str]:
    return {door for file in files for door in doors_by_file()[file]}


def test_every_door_is_run() -> None:
    """launch.h has the doors: those of DEFAULT are run on every architecture that has them, others by slow tests."""
    for arch in ptx.ARCHITECTURES:
        passed = set()
        for index in (i for i, a in CHOSEN if a == arch):
            if (index, arch) not in LAUNCHED:
                LAUNCHED[index, arch] = check(index, arch, all_kernels=False)
            passed |= doors_passed(index, {file for file, _ in LAUNCHED[index, arch]})
        missing = doors_of(set(DEFAULT)) - passed
        if arch == "80":
            missing -= doors_of({"depthwise_nhwc_tma"})  # has no body before 9.0
        assert not missing, f"no case of test_kernel runs {sorted(missing)} for {arch}"


@pytest.mark.slow
def test_every_kernel_of_every_door_is_run() -> None:
    """Two cases of each kernel and map, for 9.0: every door of launch.h, and every __global__ function."""
    taken: collections.Counter[tuple[str, ...]] = collections.Counter()
    ran, passed = set(), set()
    for index, run in enumerate(RUNS):
        key = (planned("90a")[index], run.map, run.dtype[:5], "padding_mode" * ("padding_mode" in run.extra))
        if taken[key] < 2:
            taken[key] += 1
            launched = check(index, "90a", all_kernels=True)
            ran |= launched
            passed |= doors_passed(index, {file for file, _ in launched})
    assert not set(emulate.doors()) - passed
    assert not [f"{path.stem}: {name}" for path, name in emulate.kernels() if (path.stem, name) not in ran]


@pytest.mark.parametrize("all_kernels", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_every_entry_is_understood(all_kernels: bool) -> None:
    """An opcode that the machine does not know fails by name, also in kernels that no case runs."""
    files = [path for names in runner(all_kernels).ptx.values() for path in names.values()]
    done = subprocess.run([text_program(), "parse", *files], text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("arch", ["90a", "100"])
def test_the_emulator_and_the_machine_agree(arch: str) -> None:
    """Every wrapper of ptx.cuh on golden.cu's inputs, bit for bit: two readings of the manual, of which a GPU is the
    judge (test_golden_ptx.py)."""
    compiled = ptx.compile_kernels(GOLDEN, (arch,))
    sources = [*ptx.MACHINE, ptx.HERE / "runtime.cpp"]
    objects = [ptx.compile_machine(source) for source in sources]
    objects += [emulate.compile_object(p, "race") for p in (ptx.TENSOR_MAP, emulate.HERE / "tensor.cpp")]
    program = ptx.link([compiled.object, *objects], "golden")
    done = emulate.run(program, [], variables={"PTX_FILES": str(compiled.ptx[arch])})
    assert done.returncode == 0, done.stdout
    lines = [line for line in done.stdout.splitlines() if ": " in line and not line.startswith("entry: ")]
    ours = dict(line.split(": ", 1) for line in lines)
    assert ours == emulated_output("race")


# Files whose PTX gets planted faults by default; the slow test takes all.
PLANTED = (
    "depthwise_nhwc_mma", "depthwise_nhwc_tma", "depthwise_nchw_mma", "depthwise_grad_weight_nhwc_mma", "pointwise_mma",
    "separable_mma",
)  # fmt: skip
MUTANTS = int(os.environ.get("PTX_MUTANTS", "12"))  # of each
MUTANT_SEED = int(os.environ.get("PTX_SEED", "1"))
CAUGHT, CAUGHT_OF_ONE = 0.95, 0.75  # at least this share of those that make a difference, and of a single file's
PLANTED_RUNS = 9  # of a file and map; most faults are caught by the first ones
WITHOUT_EFFECT = Path(__file__).parent / "ptx" / "survivors.txt"


def runs_of(stem: str, all_kernels: bool) -> list[int]:
    """What may launch kernels of a .cu file, small ones first."""
    files = {index: files_of(index, "90a") for index, run in enumerate(RUNS) if "infinite" not in run.extra}
    found = [index for index in files if stem in files[index] and (all_kernels or files[index] <= set(DEFAULT))]
    return sorted(found, key=products_of)


def planted_runs(runs: Sequence[int]) -> list[int]:
    """A few of each map: of the dtype, filter rows, stride and layout that most of its cases have, so that they execute
    the same entries."""
    alike: dict[str, dict[tuple[object, ...], list[int]]] = {}
    for index in runs:
        run = RUNS[index]
        key = (run.dtype, run.case.R, run.case.stride, "last" in run.layout)
        alike.setdefault(run.map, {}).setdefault(key, []).append(index)
    most = [max(of_map.values(), key=len) for of_map in alike.values()]
    return [index for group in most for index in spread(group, PLANTED_RUNS)]


def spread(runs: Sequence[int], count: int) -> list[int]:
    return [runs[i * len(runs) // min(count, len(runs))] for i in range(min(count, len(runs)))]


def without_effect(fault: plant.Planted, stem: str) -> bool:
    """Whether survivors.txt names the fault: by file, kind and change, registers without their numbers."""
    lines = [line.split(" # ")[0].strip() for line in WITHOUT_EFFECT.read_text().splitlines() if " # " in line]
    return any(fault.plain().strip() in (line, line.removeprefix(f"{stem}: ")) for line in lines)


# Of boxes and their mbarriers: an instruction is removed wherever it stands.
BOX_FAULTS = {
    "wait": (r"wait: mbarrier\.try_wait[^}]*done:", "read before the wait"),
    "fence_of_reads": (r"fence\.proxy\.async[^;]*;", "no fence"),
    "fence_of_mbarriers": (r"fence\.mbarrier_init[^;]*;", "has not been told of this mbarrier"),
    "arrival": (r"mbarrier\.arrive[^;]*;", "waits for ever"),
    "initialisation": (r"mbarrier\.init[^;]*;", "unwritten shared"),
    "copy": (r"cp\.async\.bulk[^;]*;", "waits for ever"),
    "early_beginning": (r"griddepcontrol\.wait;", "global memory before griddepcontrol.wait"),
}


@pytest.mark.parametrize("name", BOX_FAULTS)
def test_fault_of_boxes_is_seen(name: str, tmp_path: Path) -> None:
    pattern, told = BOX_FAULTS[name]
    text, count = re.subn(pattern, "", runner(False).ptx["90a"]["depthwise_nhwc_tma"].read_text())
    assert count
    (tmp_path / "kernel.ptx").write_text(text)
    index = next(i for i, a in CHOSEN if a == "90a" and NAMES[i].startswith("depthwise_nhwc_tma-forward-boxes_k5"))
    replaced = {"depthwise_nhwc_tma": tmp_path / "kernel.ptx"}
    done = runner(False).run(RUNS[index].arguments(), "90a", replaced=replaced)
    assert done.returncode == 1 and told in done.stdout, done.stdout


def survives(used: ptx.Runner, stem: str, fault: plant.Planted, runs: Iterable[int], folder: Path) -> bool:
    """Whether none of the runs shows the fault."""
    changed = folder / f"{stem}-{fault.line}-{abs(hash(fault))}.ptx"
    changed.write_text(fault.apply(used.ptx["90a"][stem].read_text().split("\n")))
    for index in runs:
        if used.run(RUNS[index].arguments(), "90a", replaced={stem: changed}, timeout=300).returncode != 0:
            changed.unlink()
            return False
    return True


def lines_of(used: ptx.Runner, stem: str, index: int) -> set[int]:
    """The lines of a file's PTX that a run executes."""
    text = used.ptx["90a"][stem].read_text()
    done = used.run(RUNS[index].arguments(), "90a", lines=True)
    assert done.returncode == 0, done.stdout
    found = re.findall(r"^lines: (\S+)((?: \d+)+)$", done.stdout, re.MULTILINE)
    return {int(line) for entry, lines in found if f".entry {entry}(" in text for line in lines.split()}


def entries_of(used: ptx.Runner, index: int) -> set[str]:
    done = used.run(RUNS[index].arguments(), "90a", dry=True)
    return set(re.findall(r"^entry: (\S+)$", done.stdout, re.MULTILINE))


def check_planted(used: ptx.Runner, stems: Sequence[str], folder: Path, wide: bool, least: float) -> None:
    """Plants a sample in lines that several cases execute; any of these cases may show a fault, and with `wide` any
    that launches the same entry. What makes no difference, by survivors.txt, does not count."""
    work = []
    with ThreadPoolExecutor(emulate.JOBS) as pool:
        for stem in stems:
            every, text = runs_of(stem, wide), used.ptx["90a"][stem].read_text()
            runs = spread(every, 6 * PLANTED_RUNS) if wide else planted_runs(every)
            executed = dict(zip(runs, pool.map(functools.partial(lines_of, used, stem), runs), strict=True))
            times = collections.Counter(line for lines in executed.values() for line in lines)
            often = sorted(line for line in times if times[line] >= min(3, max(times.values())))
            more = [index for index in every if index not in executed] if wide else []
            entries = dict(zip(more, pool.map(functools.partial(entries_of, used), more), strict=True))
            for fault in plant.sample(text, often, MUTANTS, MUTANT_SEED):
                tried = [index for index in runs if fault.line in executed[index]]
                entry = re.findall(r"\.entry (\w+)", "\n".join(text.split("\n")[: fault.line]))[-1]
                tried += [index for index, launched in entries.items() if entry in launched]
                work.append((stem, fault, tried))
        survived = list(pool.map(lambda job: survives(used, *job, folder), work))
    left = [(stem, fault) for (stem, fault, _), is_left in zip(work, survived, strict=True) if is_left]
    harmless = [f"{stem}: {fault}" for stem, fault in left if without_effect(fault, stem)]
    missed = [f"{stem}: {fault}" for stem, fault in left if not without_effect(fault, stem)]
    share = 1 - len(missed) / (len(work) - len(harmless))
    print(f"{share:.1%} of {len(work) - len(harmless)} planted faults are caught", *missed, sep="\n  ")
    print(f"{len(harmless)} have no effect (survivors.txt)", *harmless, sep="\n  ")
    assert len(work) == MUTANTS * len(stems) and share >= least, "\n".join(missed)


def test_planted_faults_are_caught(tmp_path: Path) -> None:
    check_planted(runner(False), PLANTED, tmp_path, wide=False, least=CAUGHT)


@pytest.mark.slow
@pytest.mark.parametrize("stem", [path.stem for path in emulate.kernel_sources()])
def test_planted_faults_of_every_kernel_are_caught(stem: str, tmp_path: Path) -> None:
    """PTX_MUTANTS=20 PTX_SEED=2 take another sample."""
    check_planted(runner(True), [stem], tmp_path, wide=True, least=CAUGHT_OF_ONE)


def counted(slow: bool) -> list[tuple[str, str, list[str]]]:
    """Architecture, name in counts.json and arguments of the layers of DEFAULT, or (slow) of the others and of 10.0."""
    found = [(a, files, name, case) for a in ptx_layers.RECORDED for files, name, case in ptx_layers.cases(a)]
    fast = [a in ptx.ARCHITECTURES and set(files.split()) <= set(DEFAULT) for a, files, *_ in found]
    return [(a, name, case) for (a, _, name, case), is_fast in zip(found, fast, strict=True) if is_fast != slow]


def check_counts(arch: str, name: str, arguments: list[str], all_kernels: bool) -> None:
    recorded = json.loads(ptx_layers.RECORD.read_text())[arch][name]
    used = newer(all_kernels) if arch in ptx.NEWER else runner(all_kernels)
    more = ptx_layers.is_more(ptx_layers.counts(used, arguments, arch), recorded)
    assert not more, "\n".join([*more, "meant? python tests/ptx/layers.py writes the record anew"])


@pytest.mark.parametrize("arch, name, arguments", counted(slow=False), ids=lambda value: str(value)[:40])
def test_counts(arch: str, name: str, arguments: list[str]) -> None:
    """No kernel gets more instructions, and no access more wavefronts or sectors a request, than recorded."""
    check_counts(arch, name, arguments, all_kernels=False)


@pytest.mark.slow
@pytest.mark.parametrize("arch, name, arguments", counted(slow=True), ids=lambda value: str(value)[:40])
def test_counts_of_the_others(arch: str, name: str, arguments: list[str]) -> None:
    check_counts(arch, name, arguments, all_kernels=True)


def test_conflicts_are_explained() -> None:
    """Where shared memory is as busy as the schedulers, requests are near their ideal, or banks.md has the kernel."""
    notes = (ptx.HERE.parents[1] / "benchmarks/notes/banks.md").read_text()
    named = set(re.findall(r"\*\*(\w+)\*\*", notes.partition("## What is left")[2]))
    found = set()
    for layers in json.loads(ptx_layers.RECORD.read_text()).values():
        for name, recorded in layers.items():
            worst = max((seen / ideal for seen, ideal in recorded["wavefronts"].values()), default=1)
            if recorded["busy"] >= 0.8 and worst > 1.15:
                found.add(recorded["plan"] if recorded["plan"] in named else name.split()[0])
    assert found and found <= named


def test_more_than_recorded_is_seen() -> None:
    recorded = {"instructions": 10, "wavefronts": {"ld.shared.f32": [2.0, 1.0]}, "sectors": {"ld.global.f32": 4.0}}
    worse = [
        {**recorded, "instructions": 11},
        {**recorded, "wavefronts": {"ld.shared.f32": [2.1, 1.0]}},
        {**recorded, "wavefronts": {"ld.shared.u16": [1.0, 1.0]}},
        {**recorded, "sectors": {"ld.global.f32": 4.1}},
    ]
    assert not ptx_layers.is_more(recorded, recorded)
    assert all(len(ptx_layers.is_more(now, recorded)) == 1 for now in worse)


def test_a_smaller_launch_predicts_the_same() -> None:
    """`python -m benchmarks --predict`: fewer images and channels with the same cut, and the whole layer."""
    gpu, layer = predict.gpus()["H100"], predict.layer_of("C=128 H=14 R=7")
    whole, smaller = (
        predict.predict(gpu, layer, "forward", "float16", "channels_last", 16, executed=most)
        for most in (predict.EXECUTED, 0)
    )
    assert isinstance(whole, predict.Prediction) and isinstance(smaller, predict.Prediction)
    assert whole.executed == "whole" and "N 2" in smaller.executed
    assert whole.kernel == smaller.kernel == "depthwise_nhwc_mma"
    (a,), (b,) = whole.launches, smaller.launches
    assert a.blocks == b.blocks and a.bank_conflicts == b.bank_conflicts == 1
    assert {"memory", "issue", "tensor cores", "shared memory"} <= set(a.bounds)
    assert b.bounds == pytest.approx(a.bounds, rel=0.1)
    assert a.bounds["memory"] * gpu.copied_share == pytest.approx(whole.floor_us, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("index, arch", REST, ids=[f"{NAMES[i]}-{arch}" for i, arch in REST])
def test_every_kernel(index: int, arch: str) -> None:
    check(index, arch, all_kernels=True)
