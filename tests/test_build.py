"""The build's decisions (setup.py's functions; nothing is built), the binary's own facts, and packaging."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

import sepconv_ext

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def setup_py():
    spec = importlib.util.spec_from_file_location("sepconv_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)  # defines functions only: main() runs under __main__
    return module


def write_script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return path


def fake_toolkit(home: Path, release: str = "13.0", host_ok: bool = True) -> Path:
    """A toolkit whose nvcc answers as the real one: --version, --dryrun (on stderr), a preprocessor run."""
    write_script(
        home / "bin" / "nvcc",
        f"""
case "$*" in
  *--version*) echo "Cuda compilation tools, release {release}, V{release}.88" ;;
  *--dryrun*) echo '#$ _HERE_={home}/bin' >&2; echo '#$ TOP={home}/bin/..' >&2 ;;
  *) {"exit 0" if host_ok else "echo 'error: unsupported GNU version' >&2; exit 1"} ;;
esac
""",
    )
    return home


# --- where the toolkit is ---


@pytest.mark.parametrize("name", ["CUDA_HOME", "CUDA_PATH"])
def test_environment_names_the_toolkit_first(setup_py, tmp_path, name):
    fake_toolkit(tmp_path / "on_path")
    environ = {name: "/somewhere/else", "PATH": f"{tmp_path}/on_path/bin:{os.defpath}"}
    assert setup_py.find_cuda_home(environ) == "/somewhere/else"


def test_nvcc_wrapper_outside_the_toolkit(setup_py, tmp_path):
    home = fake_toolkit(tmp_path / "toolkits" / "cuda-13.0")
    wrapper = write_script(tmp_path / "local" / "bin" / "nvcc", f'exec {home}/bin/nvcc "$@"\n')
    found = setup_py.find_cuda_home({"PATH": f"{wrapper.parent}:{os.defpath}"})
    assert found == str(home.resolve())


def test_nvcc_link_and_silent_dry_run(setup_py, tmp_path):
    """An nvcc that prints no TOP is followed through its links."""
    home = tmp_path / "cuda"
    write_script(home / "bin" / "nvcc", "exit 0\n")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").symlink_to(home / "bin" / "nvcc")
    assert setup_py.find_cuda_home({"PATH": f"{tmp_path}/bin:{os.defpath}"}) == str(home.resolve())


def test_no_nvcc_on_the_path_means_the_usual_place_or_none(setup_py, tmp_path):
    usual = "/usr/local/cuda" if os.path.exists("/usr/local/cuda/bin/nvcc") else None
    assert setup_py.find_cuda_home({"PATH": str(tmp_path)}) == usual


# --- SEPCONV_CUDA ---


def choose(setup_py, home: Path | None, wanted: str = "", torch_cuda: str | None = "13.0"):
    environ = {"SEPCONV_CUDA": wanted, "PATH": os.defpath, "CUDA_HOME": str(home or "/nonexistent")}
    return setup_py.choose_cuda_home(environ, "2.14.1", torch_cuda)


def test_a_fitting_toolkit_is_used(setup_py, tmp_path):
    home, message = choose(setup_py, fake_toolkit(tmp_path, "13.2"))  # torch is of 13.0
    assert home == str(tmp_path)
    assert "CUDA" in message and "\n" not in message


def test_off_means_off(setup_py, tmp_path):
    assert choose(setup_py, fake_toolkit(tmp_path), "0") == (None, "CPU only: SEPCONV_CUDA=0")


@pytest.mark.parametrize(
    ("toolkit", "torch_cuda", "problem", "remedy"),
    [
        ({}, None, "torch 2.14.1 is a build without CUDA", "a CUDA build of torch"),
        (None, "13.0", "/nonexistent/bin/nvcc does not run", "the CUDA toolkit 13.0 (any 13.x)"),
        ({"release": "12.6"}, "13.0", "CUDA 12.6, while torch 2.14.1 is of CUDA 13.0", "(any 13.x)"),
        ({"host_ok": False}, "13.0", "unsupported GNU version", "a host compiler that it supports"),
    ],
    ids=["cpu-torch", "no-nvcc", "mismatch", "host-compiler"],
)
def test_a_problem_is_one_line_or_an_error(setup_py, tmp_path, toolkit, torch_cuda, problem, remedy):
    home = None if toolkit is None else fake_toolkit(tmp_path, **toolkit)
    found, message = choose(setup_py, home, torch_cuda=torch_cuda)
    assert found is None
    assert message.startswith("CPU only: ") and problem in message and "\n" not in message
    with pytest.raises(SystemExit, match=r"SEPCONV_CUDA=1, but .*\. Install .*\.$") as error:
        choose(setup_py, home, "1", torch_cuda)
    assert problem in str(error.value) and remedy in str(error.value)


def test_unknown_value_of_the_knob(setup_py):
    with pytest.raises(SystemExit, match="SEPCONV_CUDA must be 0, 1 or unset, got 'yes'"):
        choose(setup_py, None, "yes")


# --- architectures ---

CUDA_13 = [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]


def test_default_architectures_follow_the_toolkit(setup_py):
    assert setup_py.choose_archs(None, CUDA_13) == ["8.0+PTX", "8.6", "8.9", "9.0a", "10.0", "12.0+PTX"]
    assert setup_py.choose_archs("", CUDA_13[:-2]) == ["8.0+PTX", "8.6", "8.9", "9.0a"]


@pytest.mark.parametrize(
    ("setting", "archs"),
    [
        ("9.0", ["9.0a"]),
        ("9.0a", ["9.0a"]),
        ("8.0;9.0+PTX", ["8.0", "9.0a+PTX"]),
        ("8.0 8.6, 9.0 9.0a", ["8.0", "8.6", "9.0a"]),
    ],
)
def test_architectures_by_name(setup_py, setting, archs):
    assert setup_py.choose_archs(setting, CUDA_13) == archs


def test_native_architectures(setup_py):
    assert setup_py.choose_archs("native", CUDA_13, [(9, 0), (9, 0)]) == ["9.0a"]
    assert setup_py.choose_archs("native", CUDA_13, [(8, 7)]) == ["8.6+PTX"]  # the nearest that nvcc knows
    assert setup_py.choose_archs("native", CUDA_13) == ["9.0a"]  # no GPU in the machine


@pytest.mark.parametrize("setting", ["13.7", "Hopper", "9"])
def test_unknown_architecture(setup_py, setting):
    with pytest.raises(SystemExit, match=f"ARCH_LIST names '{setting}'; nvcc and kernels are for 7.5 8.0 8.6"):
        setup_py.choose_archs(setting, CUDA_13)


def test_gencode(setup_py):
    assert setup_py.gencode(["8.0", "9.0a+PTX", "12.0+PTX"]) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_120,code=sm_120",
        "-gencode=arch=compute_90,code=compute_90",
        "-gencode=arch=compute_120,code=compute_120",
    ]


# --- the binary ---


def test_build_info():
    info = sepconv_ext._C.build_info()
    assert info["compiler"] and info["debug"] in (False, True)
    assert info["torch_version"].split(".")[:2] == torch.__version__.split(".")[:2]
    assert info["cpu_isa"] in info["cpu_isas"]
    assert "baseline" in info["cpu_isas"]
    assert info["cuda"] == sepconv_ext.has_cuda()
    if info["cuda"]:
        assert torch.version.cuda is not None
        assert info["cuda_version"].split(".")[0] == torch.version.cuda.split(".")[0]
        assert info["cuda_archs"]
        assert all(re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", arch) for arch in info["cuda_archs"])
    else:
        assert info["cuda_version"] is None and info["cuda_archs"] == []


def test_cpu_torch_means_cpu_build():
    if torch.version.cuda is not None:
        pytest.skip("this torch is a CUDA build")
    assert not sepconv_ext.has_cuda()


def test_import_compiles_nothing_and_needs_no_gpu():
    """With no compiler on the PATH and every GPU hidden; torch's compiling machinery is not even loaded."""
    code = (
        "import sys, sepconv_ext\n"
        "assert 'torch.utils.cpp_extension' not in sys.modules\n"
        "import torch\n"
        "assert not torch.cuda.is_initialized()\n"
        "print(sepconv_ext.__version__)"
    )
    environ = dict(os.environ, PATH="/nonexistent", CUDA_VISIBLE_DEVICES="", PYTHONPATH=str(ROOT))
    done = subprocess.run([sys.executable, "-c", code], env=environ, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == sepconv_ext.__version__


# --- packaging ---


def test_version_stands_in_one_place():
    version = re.search(r'__version__ = "(.+)"', (ROOT / "sepconv_ext" / "version.py").read_text())[1]
    assert sepconv_ext.__version__ == version
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text()
    for name in ("pyproject.toml", "setup.py"):
        assert version not in (ROOT / name).read_text(), f"{name} repeats the version"


def test_lint_tools_have_one_version():
    """pip's and pre-commit's; and each extra is one line, as the Makefile reads it."""
    extras = dict(re.findall(r"^(\w+) = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
    assert {"test", "bench", "lint"} <= set(extras)
    tools = re.findall(r'"(\S+==\S+)"', extras["lint"])
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    in_hooks = [tool for tool in tools if not tool.startswith("mypy==")]  # its hook is the environment's, with torch
    assert len(tools) == 3 and all(f'["{tool}"]' in hooks for tool in in_hooks)


def test_setup_py_stays_short():
    assert len((ROOT / "setup.py").read_text().splitlines()) < 150


def test_sources_without_a_build_say_how_to_build(tmp_path):
    shutil.copytree(ROOT / "sepconv_ext", tmp_path / "sepconv_ext", ignore=shutil.ignore_patterns("_C*.so"))
    command = [sys.executable, "-c", "import sepconv_ext"]
    failed = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True, env={**os.environ, "PYTHONPATH": ""})
    assert failed.returncode != 0
    assert "pip install --no-build-isolation -e ." in failed.stderr.strip().splitlines()[-1]


def test_types_are_shipped():
    assert (Path(sepconv_ext.__file__).parent / "py.typed").exists()


def test_the_stub_names_what_the_compiled_part_has():
    stub = ast.parse((ROOT / "sepconv_ext" / "_C.pyi").read_text())
    named = {node.name for node in stub.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    assert {name for name in named if name[0] != "_"} == {name for name in dir(sepconv_ext._C) if name[0] != "_"}
    (explanation,) = (node for node in stub.body if getattr(node, "name", "") == "Explanation")
    fields = {name for name in vars(sepconv_ext._C.Explanation) if name[0] != "_"}
    assert {node.name for node in explanation.body if isinstance(node, ast.FunctionDef)} == fields


def test_a_source_distribution_is_whole(tmp_path):
    """All that git holds is in it, so that its tests find what they read."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, text=True, capture_output=True)
    if tracked.returncode != 0:
        pytest.skip("not a clone")
    command = [sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", tmp_path, "sdist", "--dist-dir"]
    environment = {**os.environ, "SEPCONV_CUDA": "0"}
    subprocess.run([*command, tmp_path], cwd=ROOT, check=True, capture_output=True, env=environment)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        held = {name.partition("/")[2] for name in tar.getnames()}
    git_and_its_host = {".gitignore", ".github/workflows/ci.yml"}
    files = {name for name in tracked.stdout.split() if (ROOT / name).exists()}
    assert files - held == git_and_its_host
