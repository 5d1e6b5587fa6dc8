"""What the compiler made of the CUDA kernels, read from the binary itself: no GPU is needed.

No kernel keeps registers or arrays in local memory (but one number of one, see keeps_one_number); the kernels that live
on memory move wide vectors; those for tensor cores use them. cuobjdump reads it: it comes with the CUDA toolkit, and
with triton, which a CUDA torch brings.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import sepconv_ext

HALVES, FLOAT = ("__half", "__nv_bfloat16"), ("f",)


@dataclass(frozen=True)
class Function:
    """A kernel of the binary, compiled for one architecture."""

    symbol: str
    arch: str
    registers: int
    stack: int
    local: int

    @property
    def file(self) -> str:
        """Its source, without the ending."""
        return self._parts[1]

    @property
    def kernel(self) -> str:
        start = self._parts.end()
        return self.symbol[start : start + int(self._parts[2])]

    @property
    def arguments(self) -> str:
        """Its template arguments, as mangled: I6__halfLi8ELi3E..."""
        return self.symbol[self._parts.end() + int(self._parts[2]) :]

    @property
    def dtype(self) -> str:
        """The first template argument where that is a type: __half, __nv_bfloat16, f or d."""
        found = re.match(r"I(?:\d+(__half|__nv_bfloat16)|([fd]))", self.arguments)
        return next(filter(None, found.groups())) if found else ""

    @property
    def numbers(self) -> list[int]:
        """The template arguments that are numbers, in their order."""
        return [int(n) for n in re.findall(r"Li(\d+)E", self.arguments.split("EEv")[0] + "E")]

    @property
    def capability(self) -> int:
        """Of its architecture: 90 for sm_90a."""
        return int(re.search(r"\d+", self.arch)[0])

    @property
    def _parts(self) -> re.Match:
        # namespace {anonymous} in the file of that name, the length of the kernel's name, the name
        found = re.search(r"_GLOBAL__N__[0-9a-f]+_\d+_(\w+?)_cu_[0-9a-f]{8}(\d+)", self.symbol)
        assert found, self.symbol
        return found

    def __str__(self) -> str:
        return f"{self.file}: {self.kernel}{self.arguments.split('EEv')[0]} ({self.arch})"


def cuobjdump() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin:
        homes.append(str(Path(triton.origin).parent / "backends" / "nvidia"))
    found = (shutil.which("cuobjdump", path=str(Path(home) / "bin")) for home in homes if home)
    return shutil.which("cuobjdump") or next(filter(None, found), None)


def dump(option: str) -> Iterator[str]:
    """cuobjdump's lines, one by one: all the code is some 100 MB of text."""
    command = [cuobjdump(), option, sepconv_ext._C.__file__]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        yield from process.stdout
    assert process.returncode == 0, f"{' '.join(command)} failed"


@pytest.fixture(scope="module")
def functions() -> list[Function]:
    if not sepconv_ext.has_cuda():
        pytest.skip("this build has no CUDA kernels")
    if cuobjdump() is None:
        pytest.skip("no cuobjdump: it comes with the CUDA toolkit and with triton")
    found, arch = [], ""
    for line in dump("--dump-resource-usage"):
        if line.startswith("arch = "):
            arch = line.removeprefix("arch = ").strip()
        elif name := re.search(r"Function (\S+):", line):
            symbol = name[1]
        elif use := re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", line):
            found.append(Function(symbol, arch, *map(int, use.groups())))
    return found


@pytest.fixture(scope="module")
def code(functions: list[Function]) -> dict[tuple[str, str], set[str]]:
    """The instructions of each function, by architecture and symbol, with their modifiers: LDG.E.128.CONSTANT."""
    found, arch, current = {}, "", set()
    for line in dump("--dump-sass"):
        if instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", line):
            current.add(instruction[1])
        elif name := re.search(r"Function : (\S+)", line):
            current = found.setdefault((arch, name[1]), set())
        elif line.startswith("arch = "):
            arch = line.removeprefix("arch = ").strip()
    return found


def test_every_kernel_file_is_in_the_binary(functions: list[Function]) -> None:
    sources = Path(__file__).resolve().parent.parent.joinpath("csrc", "cuda").rglob("*.cu")
    assert {f.file for f in functions} == {source.stem for source in sources}


def keeps_one_number(f: Function) -> bool:
    """With 64-bit indices a division is a call, across which nvcc 13.0 keeps one number on the stack from 10.0 on."""
    wide = f.file == "grouped_grad_weight" and re.match(r"I(?:13__nv_bfloat16|6__half|f|d)l", f.arguments) is not None
    return wide and f.capability >= 100 and f.stack <= 8 and f.local == 0


def test_no_local_memory(functions: list[Function]) -> None:
    """No spilled register, and no array that is indexed at run time."""
    using = [f for f in functions if (f.stack or f.local) and not keeps_one_number(f)]
    assert not using, "\n".join(f"{f}: {f.stack} bytes of stack, {f.local} of local memory" for f in using)


# file, dtypes, template numbers by position, instructions that must be there, with modifiers in this order
EXPECTED = {
    # Pairs of channels, 32 neighbouring ones a warp: its loads are of 128 or 256 consecutive bytes.
    "depthwise_nhwc_float": ("depthwise_nhwc", FLOAT, {0: 2}, ("LDG.64", "STG.64")),
    "depthwise_nhwc_tma": ("depthwise_nhwc_tma", ("",), {}, ("UTMALDG.4D", "SYNCS.TRYWAIT")),
    "depthwise_nchw": ("depthwise_nchw", (*HALVES, *FLOAT), {}, ("LDGSTS.128",)),
    "depthwise_nchw_half": ("depthwise_nchw", HALVES, {}, ("STG.64",)),
    "depthwise_nchw_float": ("depthwise_nchw", FLOAT, {}, ("STG.128",)),
    "depthwise_nchw_stride2": ("depthwise_nchw_stride2", (*HALVES, *FLOAT), {}, ("LDGSTS.128", "STG.128")),
    "depthwise_grad_weight_nchw": ("depthwise_grad_weight_nchw", (*HALVES, *FLOAT), {}, ("LDGSTS.128",)),
    "depthwise_grad_weight_nhwc": ("depthwise_grad_weight_nhwc", (*HALVES, *FLOAT), {}, ("LDGSTS.128",)),
    "depthwise_direct": ("depthwise_direct", HALVES, {0: 8}, ("LDG.128", "STG.128")),
    "depthwise_large": ("depthwise_large", FLOAT, {}, ("LDGSTS.128", "LDS.128", "STG.128")),
    "depthwise_large_grad_weight": ("depthwise_large_grad_weight", FLOAT, {}, ("LDGSTS.128", "LDS.128")),
    "depthwise_nchw_mma": ("depthwise_nchw_mma", HALVES, {}, ("HMMA.16816.F32", "LDSM", "LDGSTS.64", "STG.128")),
    "depthwise_nchw_mma_grad_weight": (
        "depthwise_nchw_mma_grad_weight",
        HALVES,
        {},
        ("HMMA.16816.F32", "LDSM", "LDGSTS.64"),
    ),
    "depthwise_toeplitz_grad_weight": ("depthwise_toeplitz_grad_weight", HALVES, {}, ("HMMA.16816.F32", "LDSM")),
    "depthwise_toeplitz": ("depthwise_toeplitz", HALVES, {}, ("HMMA.16816.F32", "LDSM")),
    "depthwise_nhwc_mma": ("depthwise_nhwc_mma", HALVES, {}, ("HMMA.SP.16832.F32", "LDSM", "LDGSTS.128", "STG.128")),
    "depthwise_grad_weight_nhwc_mma": (
        "depthwise_grad_weight_nhwc_mma",
        HALVES,
        {},
        ("HMMA.16816.F32", "LDSM.16.MT88", "LDGSTS.64"),
    ),
    "pointwise_nhwc_mma": ("pointwise_nhwc_mma", HALVES, {}, ("HMMA.16816.F32", "LDSM", "LDGSTS.128", "STG.128")),
    "grouped_nhwc_mma": ("grouped_nhwc_mma", HALVES, {}, ("HMMA.16816.F32", "LDSM", "LDGSTS.128", "STG.128")),
    "grouped_nhwc_mma_stride2": (
        "grouped_nhwc_mma_stride2",
        HALVES,
        {},
        ("HMMA.16816.F32", "LDSM", "LDGSTS.128", "STG.128"),
    ),
    "grouped_nhwc_mma_grad_weight": (
        "grouped_nhwc_mma_grad_weight",
        HALVES,
        {},
        ("HMMA.16816.F32", "LDSM.16.MT88", "LDGSTS.128"),
    ),
    "pointwise_mma": ("pointwise_mma", HALVES, {}, ("HMMA.16816.F32", "LDSM", "LDGSTS.128")),
    "separable_mma": ("separable_mma", HALVES, {}, ("HMMA.16816.F32", "LDSM")),
}


# The compute capabilities for which a kernel has a body, where it is not all.
ONLY_FOR = {"depthwise_nhwc_tma": range(90, 120)}


@pytest.mark.parametrize("name", EXPECTED)
def test_instructions(functions: list[Function], code: dict[tuple[str, str], set[str]], name: str) -> None:
    file, dtypes, numbers, wanted = EXPECTED[name]
    chosen = [
        f
        for f in functions
        if f.file == file
        and f.dtype in dtypes
        and (file not in ONLY_FOR or f.capability in ONLY_FOR[file])
        and all(i < len(f.numbers) and f.numbers[i] == n for i, n in numbers.items())
    ]
    if file in ONLY_FOR and not any(f.capability in ONLY_FOR[file] for f in functions):
        pytest.skip("this build has no machine code for a GPU that the kernel is for")
    assert chosen, f"no kernel of {file} fits {dtypes}, {numbers}"
    for f in chosen:
        for instruction in wanted:
            pattern = re.compile(r"(\.\w+)*\.".join(map(re.escape, instruction.split("."))) + r"(\.|$)")
            assert any(map(pattern.match, code[f.arch, f.symbol])), f"{f} has no {instruction}"
