"""Builds sepconv_ext._C: the CPU part always, the CUDA part where torch is a CUDA build and nvcc fits it.

A GPU is not needed to build. Knobs (environment): SEPCONV_CUDA=0|1 (off, required), TORCH_CUDA_ARCH_LIST
("9.0 12.0+PTX", or "native": the GPUs in this machine), CUDA_HOME, MAX_JOBS, DEBUG=1.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from setuptools import setup

DEFAULT_ARCHS = ["8.0+PTX", "8.6", "8.9", "9.0a", "10.0", "12.0+PTX"]
NO_GPU = ["9.0a"]  # "native" where there is no GPU: one architecture, so that a development build is short


def run(*command):
    """(exit status, everything printed); (None, reason) where the command cannot be started."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except OSError as error:
        return None, str(error)
    return done.returncode, done.stdout.strip()


def find_cuda_home(environ):
    """The toolkit's folder or None: the one that the environment names, else the one that nvcc says it is in.
    torch takes the folder above the nvcc on the PATH: wrong where that nvcc is a script that calls another."""
    named = environ.get("CUDA_HOME") or environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc", path=environ.get("PATH"))
    if not named and nvcc:
        top = re.search(r"(?m)^#\$ TOP=(.+)$", run(nvcc, "--dryrun", "-E", "-x", "cu", os.devnull)[1])
        home = os.path.realpath(top[1].strip() if top else os.path.join(os.path.realpath(nvcc), "../.."))
        named = home if os.path.exists(os.path.join(home, "bin", "nvcc")) else None
    return named or ("/usr/local/cuda" if os.path.exists("/usr/local/cuda/bin/nvcc") else None)


def why_no_cuda(home, torch_version, torch_cuda):
    """None where the CUDA part can be built; else (what is wrong, what to install)."""
    if torch_cuda is None:
        return f"torch {torch_version} is a build without CUDA", "a CUDA build of torch"
    major = torch_cuda.split(".")[0]
    toolkit = f"the CUDA toolkit {torch_cuda} (any {major}.x), and let CUDA_HOME name its folder"
    if home is None:
        return "there is no nvcc (in CUDA_HOME, on the PATH, in /usr/local/cuda)", toolkit
    nvcc = os.path.join(home, "bin", "nvcc")
    release = re.search(r"release ((\d+)\.\d+)", run(nvcc, "--version")[1])
    if release is None:
        return f"{nvcc} does not run", toolkit
    if release[2] != major:
        return f"{nvcc} is of CUDA {release[1]}, while torch {torch_version} is of CUDA {torch_cuda}", toolkit
    # Preprocessing an empty file runs the toolkit's own check of the host compiler.
    host = ["-ccbin", os.environ["CC"]] if os.environ.get("CC") else []
    status, output = run(nvcc, *host, "-E", "-x", "cu", os.devnull)
    if status != 0:
        return f"{nvcc} fails: {output[-200:]}", "a host compiler that it supports (CC and CXX name it)"
    return None


def choose_cuda_home(environ, torch_version, torch_cuda):
    """(the toolkit's folder or None, a line that says why); SystemExit where SEPCONV_CUDA=1 cannot be had."""
    wanted = environ.get("SEPCONV_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"sepconv_ext: SEPCONV_CUDA must be 0, 1 or unset, got {wanted!r}")
    if wanted == "0":
        return None, "CPU only: SEPCONV_CUDA=0"
    problem = why_no_cuda(home := find_cuda_home(environ), torch_version, torch_cuda)
    if problem and wanted == "1":
        raise SystemExit(f"sepconv_ext: SEPCONV_CUDA=1, but {problem[0]}. Install {problem[1]}.")
    return (None, f"CPU only: {problem[0]}") if problem else (home, f"CPU and CUDA (toolkit: {home})")


def choose_archs(setting, supported, gpus=()):
    """The architectures to compile for. `supported` by nvcc and `gpus` in this machine are given as (8, 6).
    Hopper is always built as 9.0a: that runs on every 9.0 GPU, and some kernels need its instructions."""
    names = [name for name in DEFAULT_ARCHS if tuple(map(int, re.findall(r"\d+", name))) in supported]
    if setting == "native":
        best = {gpu: max((arch for arch in supported if arch <= gpu), default=gpu) for gpu in gpus}
        names = [f"{x}.{y}" + ("" if (x, y) == gpu else "+PTX") for gpu, (x, y) in best.items()] or NO_GPU
    elif setting:
        names = re.split(r"[;, ]+", setting.strip("; "))
    for name in names:
        match = re.fullmatch(r"(\d+)\.(\d)[af]?(\+PTX)?", name)
        if match is None or (int(match[1]), int(match[2])) not in supported:
            raise SystemExit(f"sepconv_ext: TORCH_CUDA_ARCH_LIST names {name!r}; nvcc and kernels are for "
                             + " ".join(f"{x}.{y}" for x, y in sorted(supported)))
    return list(dict.fromkeys(re.sub(r"^9\.0a?", "9.0a", name) for name in names))


def gencode(archs):
    """nvcc's flags: machine code for each, PTX where one says so (9.0's, as 9.0a's is not portable)."""
    numbers = [arch.replace(".", "").partition("+") for arch in archs]
    portable = [number.rstrip("af") for number, _, ptx in numbers if ptx]
    return [f"-gencode=arch=compute_{number},code=sm_{number}" for number, _, _ in numbers] + \
        [f"-gencode=arch=compute_{number},code=compute_{number}" for number in portable]


def main():
    os.environ["PATH"] = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"  # where its ninja is
    os.environ.setdefault("MAX_JOBS", str(len(os.sched_getaffinity(0))))
    home, message = choose_cuda_home(os.environ, torch.__version__, torch.version.cuda)
    if home:
        os.environ["CUDA_HOME"] = home  # before torch makes its own guess
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension
    debug = os.environ.get("DEBUG", "0") not in ("", "0")
    macros = [("SEPCONV_DEBUG", str(int(debug))), ("AT_PER_OPERATOR_HEADERS", None)]  # not ATen whole: a shorter build
    sources = [path for path in sorted(Path("csrc").rglob("*.c*[pu]")) if home or path.parts[1] != "cuda"]
    include = [f"-I{Path('csrc').absolute()}"]  # every include starts there
    cxx = "-std=c++20 -ffp-contract=fast -fno-math-errno -fvisibility=hidden -fopenmp -Wall -Wextra".split() + include
    cxx += ["-O0", "-g"] if debug else ["-O3", "-g0"]
    nvcc = f"-std=c++20 -O{1 if debug else 3} -lineinfo -Xfatbin=-compress-all -Xcompiler=-fvisibility=hidden".split()
    if home:
        listed = run(f"{home}/bin/nvcc", "--list-gpu-arch")[1]
        supported = [(int(x), int(y)) for x, y in re.findall(r"compute_(\d+)(\d)\b", listed) if int(x) >= 8]  # cp.async
        gpus = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
        archs = choose_archs(os.environ.get("TORCH_CUDA_ARCH_LIST"), supported, gpus)
        message += ", for " + " ".join(archs)
        macros += [("SEPCONV_WITH_CUDA", "1"), ("SEPCONV_CUDA_ARCHS", '"' + " ".join(archs) + '"')]
        names = ("HALF_OPERATORS", "HALF_CONVERSIONS", "HALF2_OPERATORS", "BFLOAT16_CONVERSIONS")  # torch has none
        nvcc += include + gencode(archs) + [f"-U__CUDA_NO_{name}__" for name in names]
    print("sepconv_ext:", message, flush=True)
    # What sees torch (tests/test_walls.py) or, in host code, the headers of a toolkit. The rest sees neither: kernels.
    seeing = [path for path in map(str, sources) if re.search(r"csrc/ops/|bindings\.cpp$|csrc/cuda/.*\.cpp$", path)]
    kernels = [path for path in map(str, sources) if path not in seeing]
    kind = CUDAExtension if home else CppExtension
    extension = kind("sepconv_ext._C", seeing, define_macros=macros, extra_link_args=["-fopenmp"])
    system = [flag for folder in extension.include_dirs for flag in ("-isystem", folder)]  # these give no warnings
    extension.include_dirs, extension.extra_compile_args = [], {"cxx": cxx + system, "nvcc": []}
    class Build(BuildExtension):
        def build_extension(self, ext):  # kernels first, without an environment's folders: once for all of them
            folders, self.compiler.include_dirs = self.compiler.include_dirs, []
            ext.extra_objects = self.compiler.compile(kernels, "build/kernels", extra_postargs=dict(cxx=cxx, nvcc=nvcc))
            self.compiler.include_dirs = folders
            super().build_extension(ext)
        def run(self):  # the other objects of one torch do not fit another
            self.build_temp = f"build/{sys.implementation.cache_tag}-torch-{torch.__version__}"
            if self.inplace:
                self.run_command("egg_info")  # where torch.compile finds the entry point of its backend
            super().run()
    setup(license="BSD-3-Clause", install_requires=[f"torch~={torch.__version__.partition('+')[0]}"],
          ext_modules=[extension], cmdclass={"build_ext": Build})


if __name__ == "__main__":
    main()
