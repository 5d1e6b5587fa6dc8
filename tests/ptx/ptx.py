"""Compiles the CUDA kernels to PTX with nvcc, and runs that PTX on the CPU (README.md).

    python tests/ptx/ptx.py run [--arch 80|90a|100|120] [--counts] map=...   one case, as emulate.py takes it
    python tests/ptx/ptx.py opcodes                                          what occurs in the PTX, and how often

PTX_ONLY=grouped,sum_partials compiles these .cu files only. What nvcc and g++ made is kept in .emulator-cache/ under
the hash of everything that went into it.
"""

from __future__ import annotations

import collections
import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "emulator"))
import emulate  # noqa: E402

ARCHITECTURES = ("80", "90a")
NEWER = ("100", "120")  # run where they are asked for
CACHE = emulate.CACHE / "ptx"
MACHINE = sorted(path for path in HERE.glob("*.cpp") if path.stem not in ("runtime", "text"))
# Host code of the emulator and of the package, which the race build has as it is wanted here.
TENSOR_MAP = emulate.KERNELS / "device" / "tensor_map.cpp"
SHARED = (*emulate.PLAN, emulate.KERNELS / "run.cpp", TENSOR_MAP)
SHARED += tuple(emulate.HERE / f"{name}.cpp" for name in ("tensor", "reference", "sequences", "case", "runner"))


@functools.cache
def nvcc() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    found = (shutil.which("nvcc", path=str(Path(home) / "bin")) for home in homes if home)
    return next(filter(None, found), None) or shutil.which("nvcc")


@functools.cache
def why_not() -> str | None:
    """None where PTX can be made and run here, else what is missing."""
    if nvcc() is None:
        return "no nvcc to compile the kernels to PTX with: set CUDA_HOME"
    return emulate.why_not()


@functools.cache
def nvcc_version() -> str:
    return subprocess.run([nvcc(), "--version"], capture_output=True, text=True).stdout


def _key(*parts: str, files: Mapping[Path, bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() + b"\0")
    for path in sorted(files):
        digest.update(path.name.encode() + files[path] + b"\0")
    return digest.hexdigest()[:20]


@dataclass(frozen=True)
class Compiled:
    """What nvcc made of one .cu file: the host's object, and the PTX of each architecture."""

    object: Path
    ptx: dict[str, Path]


def together(arch: str) -> tuple[str, ...]:
    """The architectures that are compiled with one, in one run of nvcc."""
    return NEWER if arch in NEWER else ARCHITECTURES


def compile_kernels(source: Path, architectures: Sequence[str] = ARCHITECTURES) -> Compiled:
    """One run of nvcc gives all: entries have names that differ from run to run."""
    flags = ["-std=c++20", "-O3", "-Xcompiler=-O0"]
    flags += [f"-gencode=arch=compute_{arch},code=compute_{arch}" for arch in architectures]
    files = {source: source.read_bytes(), **emulate._closure(source, source.read_text(), [emulate.CSRC])}
    folder = CACHE / f"{source.stem}-{_key(nvcc_version(), *flags, files=files)}"
    made = Compiled(folder / f"{source.stem}.o", {arch: folder / f"{source.stem}.{arch}.ptx" for arch in architectures})
    if folder.exists():
        return made
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        target = Path(scratch) / "made"
        kept = Path(scratch) / "kept"
        target.mkdir()
        kept.mkdir()
        command = [nvcc(), *flags, f"-I{emulate.CSRC}", "--keep", "--keep-dir", str(kept)]
        command += ["-c", "-o", str(target / made.object.name), str(source)]
        done = subprocess.run(command, text=True, capture_output=True, cwd=scratch)
        if done.returncode:
            raise emulate.CompileError(f"{source.name}:\n{done.stderr}")
        for arch in architectures:
            name = f"{source.stem}.compute_{arch}.ptx" if len(architectures) > 1 else f"{source.stem}.ptx"
            shutil.copy(kept / name, target / made.ptx[arch].name)
        try:
            target.rename(folder)
        except OSError:  # another process was faster
            if not folder.exists():
                raise
    return made


def compile_machine(source: Path) -> Path:
    flags = ["-std=c++20", "-O2", "-g1", "-Wall", "-Wextra", "-ffp-contract=off", "-frounding-math", "-DEMULATOR_RACE"]
    folders = [HERE, emulate.HERE, emulate.CSRC]
    files = {source: source.read_bytes(), **emulate._closure(source, source.read_text(), folders)}
    target = CACHE / f"{source.stem}-{_key(emulate.compiler_version(), *flags, files=files)}.o"
    if not target.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        part = target.with_suffix(f".{os.getpid()}.part")
        command = [emulate.compiler(), *flags, *(f"-I{f}" for f in folders), f"-I{emulate.cuda_include()}"]
        done = subprocess.run([*command, "-c", "-o", str(part), str(source)], text=True, capture_output=True)
        if done.returncode:
            raise emulate.CompileError(f"{source.name}:\n{done.stderr}")
        part.replace(target)
    return target


def link(objects: Iterable[Path], name: str) -> Path:
    objects = sorted(objects)
    target = CACHE / f"{name}-{_key(*map(str, objects), files={})}"
    if not target.exists():
        part = target.with_suffix(f".{os.getpid()}.part")
        # Doors whose kernels are not compiled stay open: nobody may call them.
        command = [emulate.compiler(), "-no-pie", "-Wl,--unresolved-symbols=ignore-all", *map(str, objects)]
        done = subprocess.run([*command, "-o", str(part)], text=True, capture_output=True)
        if done.returncode:
            raise emulate.CompileError(f"link ({name}):\n{done.stderr}")
        part.replace(target)
    return target


def kernel_sources() -> list[Path]:
    only = os.environ.get("PTX_ONLY")
    return sorted(p for p in emulate.KERNELS.rglob("*.cu") if not only or p.stem in only.split(","))


def for_arch(arguments: Sequence[str], arch: str) -> list[str]:
    """A case, planned for a GPU of this architecture where it does not name one itself."""
    named = any(a.startswith("sm=") for a in arguments)
    return [*arguments, *([] if named else [f"sm={re.search('[0-9]+', arch)[0]}"])]


@dataclass(frozen=True)
class Runner:
    program: Path
    ptx: dict[str, dict[str, Path]]  # by architecture, by the name of the .cu file

    def run(
        self,
        arguments: Sequence[str],
        arch: str,
        counts: bool = False,
        lines: bool = False,
        replaced: Mapping[str, Path] | None = None,
        timeout: float = 120,
        dry: bool = False,
    ) -> subprocess.CompletedProcess[str]:
        """One case. `replaced`: other PTX for some of the files (planted faults); `lines`: print which lines ran;
        `dry`: print what would be launched, and fail."""
        files = {**self.ptx[arch], **(replaced or {})}
        # Launches that begin early, as far as the architecture has them: what a kernel must wait for is seen.
        variables = {"PTX_FILES": ":".join(map(str, files.values())), "SEPCONV_CUDA_PDL": "1"}
        variables |= {"PTX_DRY": "1"} if dry else {}
        variables |= {"PTX_REWRITES": "1"} if "infinite=1" in arguments else {}  # memory.cpp
        variables |= {"PTX_COUNTS": "1"} if counts else {}
        variables |= {"PTX_LINES": "1"} if lines else {}
        return emulate.run(self.program, for_arch(arguments, arch), timeout=timeout, variables=variables)


def runner(sources: Sequence[Path], architectures: Sequence[str] = ARCHITECTURES) -> Runner:
    """Builds what is missing, for the kernels of these files."""
    with ThreadPoolExecutor(emulate.JOBS) as pool:
        shared = pool.map(lambda p: emulate.compile_object(p, "race"), SHARED)
        machine = pool.map(compile_machine, [*MACHINE, HERE / "runtime.cpp"])
        compiled = dict(zip(sources, pool.map(lambda p: compile_kernels(p, architectures), sources), strict=True))
        objects = [*shared, *machine, *(c.object for c in compiled.values())]
    ptx = {arch: {s.stem: c.ptx[arch] for s, c in compiled.items()} for arch in architectures}
    return Runner(link(objects, "runner"), ptx)


def launched(output: str) -> set[tuple[str, str]]:
    """The kernels that a run has launched: .cu file, without the ending, and __global__ function."""
    found = set()
    for entry in re.findall(r"^entry: (\S+)$", output, re.MULTILINE):
        # namespace {anonymous} in the file of that name, the length of the kernel's name, the name
        file, length = (parts := re.search(r"_GLOBAL__N__[0-9a-f]+_\d+_(\w+?)_cu_[0-9a-f]{8}(\d+)", entry)).groups()
        found.add((file, entry[parts.end() : parts.end() + int(length)]))
    return found


def opcodes(text: str) -> collections.Counter[str]:
    """The opcodes of a PTX file, those of inline assembly too."""
    plain = re.sub(r"//[^\n]*", "", text)
    pattern = r"(?:^|[;{}:)])\s*(?:@!?[%\w]+\s+)?([a-z][a-z0-9_]*(?:\.[\w:]+)*)(?=[\s;])"
    return collections.Counter(re.findall(pattern, plain))


def command(arch: str, arguments: Sequence[str]) -> str:
    """The line that repeats a run by hand."""
    return f"{Path(sys.executable).name} tests/ptx/ptx.py run --arch {arch} {' '.join(arguments)}"


def main(arguments: list[str]) -> int:
    if reason := why_not():
        print(reason)
        return 2
    if arguments[:1] == ["opcodes"]:
        for arch in ARCHITECTURES:
            found: collections.Counter[str] = collections.Counter()
            for source in kernel_sources():
                found += opcodes(compile_kernels(source).ptx[arch].read_text())
            print(f"{arch}: {len(found)} opcodes")
            for opcode, times in found.most_common():
                print(f"{times:8} {opcode}")
        return 0
    if arguments[:1] != ["run"]:
        print(__doc__)
        return 2
    rest = arguments[1:]
    arch = rest.pop(rest.index("--arch") + 1) if "--arch" in rest else "90a"
    case = [a for a in rest if not a.startswith("--")]
    used = runner(kernel_sources(), together(arch))
    done = used.run(case, arch, counts="--counts" in rest)
    print(done.stdout, end="")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
