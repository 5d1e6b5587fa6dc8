"""Packages that need no compiler (tests/wheels.py): their names and pins, what they may need, and what import says."""

from __future__ import annotations

import importlib.machinery
import os
import re
import runpy
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import sepconv_ext
from sepconv_ext import _fit

ROOT = Path(__file__).resolve().parent.parent
WHEELS = runpy.run_path(str(ROOT / "tests" / "wheels.py"))
SUFFIX = importlib.machinery.EXTENSION_SUFFIXES[0]


# --- names and pins ---


def test_labels() -> None:
    labels = WHEELS["labels"]
    assert labels("2.14.1", "13.0") == {"cpu": "torch2.14.cpu", "cuda": "torch2.14.cu130"}
    assert labels("2.13.0+cpu", None) == {"cpu": "torch2.13.cpu"}


def test_both_kinds_are_one_way_but_for_a_knob() -> None:
    """The same command; CUDA is required for one, and the architectures are the caller's."""
    environ = {"TORCH_CUDA_ARCH_LIST": "9.0a", "SEPCONV_CUDA": "0"}
    assert WHEELS["environment_of"]("cuda", environ) == {"TORCH_CUDA_ARCH_LIST": "9.0a", "SEPCONV_CUDA": "1"}
    assert WHEELS["environment_of"]("cpu", environ) == {"TORCH_CUDA_ARCH_LIST": "9.0a", "SEPCONV_CUDA": "0"}


def test_make_builds_wheels_for_all_architectures() -> None:
    """Where `make build` builds for the GPUs of the machine."""
    rule = subprocess.run(["make", "-n", "wheels"], cwd=ROOT, text=True, capture_output=True, check=True)
    assert 'tests/wheels.py build --policy "manylinux_2_28"' in rule.stdout
    assert re.search(r"(?m)^wheels: export TORCH_CUDA_ARCH_LIST := \$\(WHEEL_ARCHS\)$", (ROOT / "Makefile").read_text())


def test_the_metadata_name_the_release_of_torch(tmp_path: Path) -> None:
    command = WHEELS["command_of"]("torch9.8.cpu", tmp_path, tmp_path / "out")
    egg_info = command[: command.index("build")]  # the rest compiles
    environ = {**os.environ, "SEPCONV_CUDA": "0"}
    subprocess.run(egg_info, cwd=ROOT, env=environ, check=True, capture_output=True)
    (text,) = (path.read_text() for path in tmp_path.glob("*.egg-info/PKG-INFO"))
    assert f"\nVersion: {sepconv_ext.__version__}+torch9.8.cpu\n" in text
    release = torch.__version__.partition("+")[0]
    assert f"\nRequires-Dist: torch~={release}\n" in text


# --- what a wheel may need of a system ---


def test_versions_of_libraries_are_compared_as_numbers() -> None:
    newest = WHEELS["NEWEST"]["manylinux_2_28"]
    newer = ("GLIBC_2.29", "GLIBC_2.34", "GLIBCXX_3.4.29", "CXXABI_1.3.13", "GCC_12.0.0")
    older = ("GLIBC_2.28", "GLIBC_2.3", "GLIBC_2.2.5", "GLIBCXX_3.4.9", "CXXABI_1.3.11", "GOMP_4.0", "GLIBC_PRIVATE")
    assert [v for v in (*newer, *older) if WHEELS["is_newer"](v, newest)] == list(newer)


def test_auditwheels_verdict_is_that_of_the_symbols(tmp_path: Path) -> None:
    """On a wheel of this build: it gets the policy's name, or the error lists what is too new."""
    pytest.importorskip("auditwheel", reason="auditwheel is not installed")
    name, version = "sepconv_ext", sepconv_ext.__version__
    tags = f"cp{sys.version_info.major}{sys.version_info.minor}"
    wheel = tmp_path / f"{name}-{version}-{tags}-{tags}-linux_{os.uname().machine}.whl"
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(wheel, "w") as files:
        files.write(sepconv_ext._C.__file__, f"{name}/_C{SUFFIX}")
        files.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        tag = wheel.stem.split("-", 2)[2]
        files.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: {tag}\n")
        record = "".join(f"{file},,\n" for file in (*files.namelist(), f"{info}/RECORD"))
        files.writestr(f"{info}/RECORD", record)
    newer = WHEELS["newer_symbols"](wheel, "manylinux_2_28")
    if newer:
        with pytest.raises(SystemExit) as error:
            WHEELS["repaired"](wheel, tmp_path / "out", "manylinux_2_28")
        assert "too-recent versioned symbols" in str(error.value)
        assert all(f"  {symbol}\n" in str(error.value) for symbol in newer)
        assert "manylinux_2_28" in str(error.value) and "MANYLINUX=" in str(error.value)
    else:
        made = WHEELS["repaired"](wheel, tmp_path / "out", "manylinux_2_28")
        assert "manylinux_2_28" in made.name


# --- what import says ---


def fake_package(folder: Path, compiled: bool, pin: str | None) -> None:
    """What __init__ runs before it needs the rest, beside a torch that is another one and holds no libraries."""
    package = folder / "sepconv_ext"
    package.mkdir()
    for name in ("__init__.py", "_fit.py"):
        (package / name).write_text((ROOT / "sepconv_ext" / name).read_text())
    if compiled:
        (package / f"_C{SUFFIX}").symlink_to(sepconv_ext._C.__file__)
    (folder / "torch.py").write_text("__version__ = '1.2.3+cpu'\nclass version:\n    cuda = None\n")
    if pin:
        info = folder / "sepconv_ext-0.1.0.dist-info"
        info.mkdir()
        text = f"Metadata-Version: 2.1\nName: sepconv_ext\nVersion: 0.1.0\nRequires-Dist: torch~={pin}\n"
        (info / "METADATA").write_text(text)


@pytest.mark.parametrize(
    ("compiled", "pin", "said"),
    [
        (
            True,
            "2.14.1",
            r'built for torch 2\.14\.1, but torch 1\.2\.3\+cpu is installed.*pip install "torch==2\.14\.\*"',
        ),
        (True, None, r"does not fit torch 1\.2\.3\+cpu \(.*\.so.*\)"),
        (False, "2.14.1", r"the compiled part, is not built.*pip install --no-build-isolation -e"),
    ],
    ids=["another-torch", "unknown", "not-built"],
)
def test_import_beside_another_torch(tmp_path: Path, compiled: bool, pin: str | None, said: str) -> None:
    fake_package(tmp_path, compiled, pin)
    environ = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-S", "-c", "import sepconv_ext"]  # nothing of site-packages
    done = subprocess.run(command, cwd=tmp_path, env=environ, text=True, capture_output=True)
    assert done.returncode == 1
    assert re.search(rf"(?m)^ImportError: .*{said}", done.stderr), done.stderr


def test_a_library_of_another_release_is_refused_although_it_loads() -> None:
    assert _fit.why_it_does_not_fit("2.14.1", "2.14.0+cpu") is None
    said = _fit.why_it_does_not_fit("2.14.1", "2.15.0")
    assert said is not None and "built for torch 2.14.1, but torch 2.15.0 is installed" in said


@pytest.mark.parametrize(("cuda", "found"), [(None, "without CUDA"), ("12.8", "with CUDA 12.8")])
def test_a_cuda_wheel_beside_another_cuda(monkeypatch: pytest.MonkeyPatch, cuda: str | None, found: str) -> None:
    monkeypatch.setattr(_fit, "_pinned_torch", lambda: "2.14.1")
    said = _fit.why_it_does_not_load("libcudart.so.13: cannot open shared object file", "2.14.0+cu128", cuda)
    assert f"torch 2.14.0+cu128 is a build {found} (libcudart.so.13: cannot" in said
    other = _fit.why_it_does_not_load("/opt/cuda/_C.so: undefined symbol: f", "2.14.0", cuda)
    assert "does not fit torch 2.14.0" in other


# --- the workflow ---


def test_the_workflow_calls_what_make_has() -> None:
    workflow = ROOT / ".github" / "workflows" / "ci.yml"
    if not workflow.exists():
        pytest.skip("not a clone")
    text = workflow.read_text()
    lines = re.findall(r"(?m)^ +(?:- run: )?make (.*)$", text)
    called = {word for line in lines for word in line.split() if re.fullmatch(r"[a-z-]+", word)}
    rules = set(re.findall(r"(?m)^([a-z-]+):", (ROOT / "Makefile").read_text()))
    assert {"lint", "docs", "test", "test-all", "wheels", "wheel-test"} <= called
    assert called <= rules, called - rules


def test_the_workflows_actions_run_on_node_24() -> None:
    """GitHub's runners took Node 20 out in 2026; by the actions' own pages, these releases have the newer one."""
    workflow = ROOT / ".github" / "workflows" / "ci.yml"
    if not workflow.exists():
        pytest.skip("not a clone")
    first = {"checkout": 5, "setup-python": 6, "upload-artifact": 6, "download-artifact": 7}
    used = re.findall(r"uses: actions/([a-z-]+)@v(\d+)$", workflow.read_text(), re.MULTILINE)
    assert {name for name, _ in used} == set(first)
    assert all(int(release) >= first[name] for name, release in used), used
