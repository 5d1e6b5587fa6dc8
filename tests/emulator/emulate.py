"""Compiles the CUDA kernels for the emulator, and runs them.

    python tests/emulator/emulate.py                                   compile everything, print the runners' paths
    python tests/emulator/emulate.py run [--race] map=... dtype=... N=...   compile what is stale, then run one case

Two builds of the same sources: `asan` (AddressSanitizer, UndefinedBehaviorSanitizer, uninitialised registers filled
with a pattern) and `race` (every memory access calls the race detector). Objects are kept in .emulator-cache/ under
the hash of everything that went into them, so nothing is compiled twice and nothing stale is ever run.
"""

from __future__ import annotations

import bisect
import fcntl
import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CSRC = ROOT / "csrc"  # every include starts there
KERNELS = CSRC / "cuda"
PLAN = tuple(sorted(KERNELS.rglob("plan*.cpp")))
CACHE = Path(os.environ.get("SEPCONV_EMULATOR_CACHE", ROOT / ".emulator-cache"))
JOBS = int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))
# Copied once: cases run in threads, and pytest writes the environment at each test, between two names of a copy.
ENVIRONMENT = dict(os.environ)

RUNTIME_CORE = ("fiber", "machine", "shared_memory", "synchronise", "race", "async_copy", "bulk_copy", "matrix")
RUNTIME = (*RUNTIME_CORE, "tensor", "reference", "sequences", "case")
COMMON = ("-std=c++20", "-O1", "-g1", "-fno-strict-aliasing", "-Wall", "-Wno-unknown-pragmas")
# Instrumentation is for the kernels; the emulator's own code only needs to know which build it is part of.
BUILDS = {
    "asan": {
        "define": "-DEMULATOR_ASAN",
        "kernel": (
            "-fsanitize=address,undefined",
            "-fno-sanitize=vptr,null,object-size",
            "-fno-sanitize-recover=undefined",
            "-ftrivial-auto-var-init=pattern",
        ),
        "link": ("-fsanitize=address,undefined",),
    },
    "race": {
        "define": "-DEMULATOR_RACE",
        "kernel": ("-fsanitize=thread", "-fno-threadsafe-statics"),
        "link": (),
    },
}


class CompileError(RuntimeError):
    """The compiler's own words."""


@functools.cache
def cuda_include() -> Path | None:
    """The directory with cuda_fp16.h: of a toolkit, or of the nvidia packages that a CUDA build of torch brings."""
    candidates = [Path(os.environ[v]) / "include" for v in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(v)]
    candidates.append(Path("/usr/local/cuda/include"))
    if nvcc := shutil.which("nvcc"):
        candidates.append(Path(nvcc).resolve().parent.parent / "include")
    for folder in map(Path, sys.path):
        candidates += [*sorted(folder.glob("nvidia/cu*/include")), folder / "nvidia/cuda_runtime/include"]
    for path in candidates:
        if (path / "cuda_fp16.h").is_file() and (path / "crt" / "host_defines.h").is_file():
            return path
    return None


@functools.cache
def why_not() -> str | None:
    """None where the emulator can be built here, else what is missing."""
    if cuda_include() is None:
        return "no CUDA headers (cuda_fp16.h) found: set CUDA_HOME, or install a CUDA build of torch"
    gxx = compiler()
    if shutil.which(gxx) is None:
        return f"no C++ compiler ({gxx})"
    probe = """
        #include <sanitizer/asan_interface.h>
        #include <bit>
        int main() { return std::bit_cast<int>(0.0f); }
    """
    known = CACHE / f"works-{hashlib.sha256(f'{gxx} {compiler_version()} {probe}'.encode()).hexdigest()[:20]}"
    if known.exists():
        return None
    command = [gxx, "-x", "c++", "-std=c++20", "-fsanitize=address,undefined", "-ftrivial-auto-var-init=pattern"]
    done = subprocess.run([*command, "-", "-o", os.devnull], input=probe, text=True, capture_output=True)
    if done.returncode != 0:
        return f"{gxx} cannot build C++20 with AddressSanitizer (g++ 12 can)"
    CACHE.mkdir(parents=True, exist_ok=True)
    known.touch()
    return None


def compiler() -> str:
    return os.environ.get("EMULATOR_CXX", "g++")


@functools.cache
def compiler_version() -> str:
    return subprocess.run([compiler(), "--version"], capture_output=True, text=True).stdout


def doors() -> list[str]:
    """Every launch_* function that csrc/cuda/launch.h declares."""
    text = re.sub(r"//[^\n]*", "", (KERNELS / "launch.h").read_text())
    return re.findall(r"\bcudaError_t\s+(launch_\w+)\s*\(", text)


def kernels() -> list[tuple[Path, str]]:
    """Every __global__ function: its file and its name."""
    bounds = r"__launch_bounds__\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)"  # brackets inside them up to two deep
    pattern = rf"__global__\s+void\s+(?:{bounds}\s*)?(\w+)\s*\("
    return [(path, name) for path in kernel_sources() for name in re.findall(pattern, path.read_text())]


def kernel_sources() -> list[Path]:
    """Every .cu file; EMULATOR_ONLY=grouped,sum_partials narrows the list while working on a kernel."""
    only = os.environ.get("EMULATOR_ONLY")
    return sorted(p for p in KERNELS.rglob("*.cu") if not only or p.stem in only.split(","))


def _closure(source: Path, text: str, folders: Sequence[Path]) -> dict[Path, bytes]:
    """The quoted includes of a source, and theirs, with their contents."""
    found: dict[Path, bytes] = {}

    def visit(folder: Path, content: str) -> None:
        for name in re.findall(r'^\s*#\s*include\s+"([^"]+)"', content, re.MULTILINE):
            for base in (folder, *folders):
                path = (base / name).resolve()
                if path.is_file():
                    if path not in found:
                        found[path] = path.read_bytes()
                        visit(path.parent, found[path].decode())
                    break

    visit(source.parent, text)
    return found


def _key(parts: Iterable[str], closure: Mapping[Path, bytes]) -> str:
    digest = hashlib.sha256()
    for part in (compiler_version(), *parts):
        digest.update(part.encode() + b"\0")
    for path in sorted(closure):
        digest.update(closure[path] + b"\0")
    return digest.hexdigest()[:20]


def flags_of(build: str, kernel: bool) -> list[str]:
    if build == "host":
        return list(COMMON)
    own = [*COMMON, BUILDS[build]["define"]]
    return [*own, *BUILDS[build]["kernel"], "-include", "emulator.h"] if kernel else own


@functools.cache
def precompiled(build: str) -> Path:
    """A folder with emulator.h as the compiler has read it, 0.7 s less for each kernel: searched first, g++ takes it
    for the file, unless it does not fit."""
    flags = flags_of(build, kernel=True)[:-2]
    closure = _closure(HERE / "emulator.h", (HERE / "emulator.h").read_text(), [HERE, CSRC])
    folder = CACHE / build / f"header-{_key((*flags, str(cuda_include())), closure)}"
    target = folder / "emulator.h.gch"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            part = folder / "part"
            command = [compiler(), "-x", "c++-header", *flags, f"-I{HERE}", f"-I{CSRC}", f"-I{cuda_include()}"]
            done = subprocess.run([*command, "-o", str(part), str(HERE / "emulator.h")], text=True, capture_output=True)
            if done.returncode:
                raise CompileError(f"emulator.h ({build}):\n{done.stderr}")
            part.replace(target)
    return folder


def compile_object(
    source: Path, build: str, text: str | None = None, headers: Mapping[str, str] | None = None, check: bool = False
) -> Path:
    """The object file of one source. `text` replaces what stands in it and `headers` what stands in headers, by
    their path below csrc (for planted faults); `check` looks for errors only and returns no file."""
    content = source.read_text() if text is None else text
    kernel = source.suffix == ".cu"
    folders = [HERE, CSRC]
    closure = _closure(source, content + ('\n#include "emulator.h"' if kernel else ""), folders)
    if not kernel and not any(b"EMULATOR_" in part for part in (content.encode(), *closure.values())):
        build = "host"  # the same in every build
    flags = flags_of(build, kernel)
    key = _key((*flags, source.name, str(cuda_include()), content, *(headers or {}).values()), closure)
    target = CACHE / build / f"{source.stem}-{key}.o"
    if target.exists() and not check:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_suffix(f".{os.getpid()}.part")
    if headers:
        folder = CACHE / "headers" / key
        folder.mkdir(parents=True, exist_ok=True)
        for name, header in headers.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(header)
        folders.insert(0, folder)
    if kernel and not headers:  # which emulator.h may include
        folders.insert(0, precompiled(build))
    command = [compiler(), "-x", "c++", *flags, *(f"-I{f}" for f in folders), f"-I{cuda_include()}"]
    command += ["-fsyntax-only", "-Werror=vla"] if check else ["-c", "-o", str(part)]
    if text is None:
        done = subprocess.run([*command, str(source)], text=True, capture_output=True)
    else:  # from standard input, under the source's own name
        command += ["-"] if check else ["-w", "-"]  # -w would let variable-length arrays pass
        done = subprocess.run(command, input=f'#line 1 "{source}"\n{text}', text=True, capture_output=True)
    if done.returncode:
        raise CompileError(f"{source.name} ({build}):\n{done.stderr}")
    if not check:
        part.replace(target)
    return target


def sources() -> list[Path]:
    """All that a runner is linked from."""
    return [*kernel_sources(), *PLAN, KERNELS / "run.cpp", *(HERE / f"{name}.cpp" for name in (*RUNTIME, "runner"))]


def link(objects: Iterable[Path], build: str, name: str = "runner") -> Path:
    objects = sorted(objects)
    digest = hashlib.sha256(" ".join(o.name for o in objects).encode()).hexdigest()[:20]
    target = CACHE / build / f"{name}-{digest}"
    if not target.exists():
        part = target.with_suffix(f".{os.getpid()}.part")
        command = [compiler(), *BUILDS[build]["link"], *map(str, objects), "-o", str(part)]
        if os.environ.get("EMULATOR_ONLY"):
            command += ["-no-pie", "-Wl,--unresolved-symbols=ignore-all"]
        done = subprocess.run(command, text=True, capture_output=True)
        if done.returncode:
            raise CompileError(f"link ({build}):\n{done.stderr}")
        part.replace(target)
    return target


def runners(
    builds: Sequence[str] = tuple(BUILDS), progress: Callable[[str], None] = lambda text: None
) -> dict[str, Path]:
    """Builds what is missing, on MAX_JOBS cores; returns the path of each build's runner."""
    todo = sorted(
        ((s, b) for b in builds for s in sources()), key=lambda t: (t[0].suffix == ".cu", -t[0].stat().st_size)
    )
    with ThreadPoolExecutor(JOBS) as pool:
        objects = []
        for (source, build), compiled in zip(todo, pool.map(lambda t: compile_object(*t), todo), strict=True):
            objects.append(compiled)
            progress(f"{len(objects)}/{len(todo)} {source.name} ({build})")
    return {b: link([o for o, (_, of) in zip(objects, todo, strict=True) if of == b], b) for b in builds}


@dataclass(frozen=True)
class Planned:
    """What the plan says of a case, as explain() does."""

    kernel: str
    tile: dict[str, int]  # what is not 1
    reason: str


@functools.cache
def planner() -> Path:
    """Compiles the plan alone, in a few seconds, once."""
    parts = (*PLAN, HERE / "tensor.cpp", HERE / "case.cpp", HERE / "planner.cpp")
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / "planner.lock", "w") as lock, ThreadPoolExecutor(JOBS) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)  # processes that collect tests at the same time: one compiles
        return link(pool.map(lambda p: compile_object(p, "race"), parts), "race", "planner")


def ask_plan(lines: Iterable[str]) -> str:
    """What planner.cpp answers to these lines."""
    asked = "".join(f"{line}\n" for line in lines)
    return subprocess.run([str(planner())], input=asked, text=True, capture_output=True, check=True).stdout


def _planned(line: str) -> Planned:
    kernel, tile, reason = line.split("\t")
    return Planned(kernel, {k: int(v) for k, v in re.findall(r"(\w+) (\d+)", tile)}, reason)


def plans(cases: Sequence[Sequence[str]]) -> list[Planned]:
    """The plan of each case."""
    return [_planned(line) for line in ask_plan(" ".join(case) for case in cases).splitlines()]


def alternatives(case: Sequence[str]) -> list[Planned]:
    """Each kernel that can run a case, with the cuts that make sense; the plan's own choice is the first."""
    return [_planned(line) for line in ask_plan([" ".join([*case, "alternatives=1"])]).splitlines() if line]


def tuning() -> dict[int, dict[str, float]]:
    """The plan's table (csrc/cuda/tuning.h): its numbers for each architecture; 0 has the defaults."""
    rows = [line.split() for line in ask_plan(["tuning"]).splitlines()]
    return {int(row[0]): {k: float(v) for k, _, v in (word.partition("=") for word in row[1:])} for row in rows}


def planned_kernels(cases: Sequence[Sequence[str]]) -> list[str]:
    """The name of the kernel that the plan takes for each case."""
    return [planned.kernel for planned in plans(cases)]


def run(
    runner: Path, arguments: Sequence[str], timeout: float = 300, variables: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """One case in a process of its own, standard error merged into the output."""
    environment = {
        **ENVIRONMENT,
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:handle_segv=1:exitcode=99:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=0",
        "EMULATOR_SECONDS": str(int(timeout) + 5),
        **(variables or {}),
    }
    return subprocess.run(
        [str(runner), *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout, env=environment,
    )  # fmt: skip


def command(build: str, arguments: Sequence[str]) -> str:
    """The line that repeats a run by hand."""
    race = " --race" if build == "race" else ""
    return f"{Path(sys.executable).name} tests/emulator/emulate.py run{race} {' '.join(arguments)}"


@functools.cache
def symbols(runner: Path) -> tuple[list[int], list[tuple[int, str]]]:
    """Functions of a runner by address: their beginnings, and (end, demangled name) of each."""
    table = subprocess.run(["nm", "-CS", "--defined-only", str(runner)], capture_output=True, text=True, check=True)
    found = []
    for line in table.stdout.splitlines():
        fields = line.split(" ", 3)
        if len(fields) == 4 and fields[2] in "tTwW":
            found.append((int(fields[0], 16), int(fields[0], 16) + int(fields[1], 16), fields[3]))
    found.sort()
    return [f[0] for f in found], [(f[1], f[2]) for f in found]


def function_at(runner: Path, address: int) -> str | None:
    begins, rest = symbols(runner)
    i = bisect.bisect_right(begins, address) - 1
    return rest[i][1] if i >= 0 and address < rest[i][0] else None


def launched(runner: Path, output: str) -> set[tuple[str, tuple[str, ...]]]:
    """Of every launch: the kernel with its template arguments, and the launch_* functions on the call stack."""
    found = set()
    for line in re.findall(r"^launch: (.*)$", output, re.MULTILINE):
        kernel, *frames = (function_at(runner, int(word, 16)) for word in line.split())
        if kernel is None:
            raise RuntimeError(f"no symbol for the kernel in: {line}")
        passed = [re.match(r"sepconv::cuda::(launch_\w+)\(", frame or "") for frame in frames]
        found.add((kernel, tuple(door.group(1) for door in passed if door)))
    return found


def plain_name(symbol: str) -> str:
    """gather_kernel of "void sepconv::cuda::(anonymous namespace)::gather_kernel<float, 1>(...)"."""
    return re.search(r"(\w+)\s*(?:<|\()", symbol.replace("(anonymous namespace)::", "")).group(1)


def door_source(door: str) -> Path | None:
    """The .cu file that defines a launch_* function."""
    found = (p for p in kernel_sources() if re.search(rf"^cudaError_t {door}\(", p.read_text(), re.MULTILINE))
    return next(found, None)


def main(arguments: list[str]) -> int:
    if reason := why_not():
        print(reason)
        return 2
    if not arguments:
        for build, path in runners().items():
            print(build, path)
        return 0
    if arguments[0] != "run":
        print(__doc__)
        return 2
    build = "race" if "--race" in arguments else "asan"
    done = run(runners([build])[build], [a for a in arguments[1:] if a != "--race"])
    print(done.stdout, end="")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
