"""Fixtures: the device (CPU always, CUDA where there is one), and SEPCONV_STRICT off at the start of every test."""

from __future__ import annotations

import os
from collections.abc import Iterator

# Before torch brings its thread pool: a waiting thread sleeps. Thousands of tiny parallel regions cost minutes when
# threads spin on a machine that is busy with something else.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("SEPCONV_POISON_SCRATCH", "1")  # a number that a kernel forgets is NaN

import pytest
import torch

import sepconv_ext


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cuda: needs a CUDA device and a build with CUDA kernels")
    config.addinivalue_line("markers", "xdist_group: the tests of a group run in one process")


def _no_cuda_reason() -> str | None:
    if not sepconv_ext.has_cuda():
        return "this build has no CUDA kernels"
    return None if torch.cuda.is_available() else "no CUDA device is visible to torch"


@pytest.hookimpl(tryfirst=True)  # before xdist looks for the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = _no_cuda_reason()
    for item in items:
        if item.get_closest_marker("emulated"):  # in one process each: they share compilations and use all cores
            item.add_marker(pytest.mark.xdist_group("ptx" if item.path.stem == "test_ptx" else "emulated"))
        if reason is not None and item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_collection_finish(session: pytest.Session) -> None:
    """In several processes, each would compile and run all of the emulated cases, without a word."""
    if session.config.getoption("loadgroup", False):
        for item in session.items:
            if item.get_closest_marker("xdist_group") and "@" not in item.nodeid.rpartition("]")[2]:
                raise pytest.UsageError(f"pytest {pytest.__version__} and this pytest-xdist do not group tests")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """One of the CPU's instruction sets, for one test; the best one is what every other test runs."""
    if request.param not in sepconv_ext._C.build_info()["cpu_isas"]:
        pytest.skip(f"this binary holds no {request.param} kernels")
    try:
        best = sepconv_ext._C.set_cpu_isa(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    yield request.param
    sepconv_ext._C.set_cpu_isa(best)


@pytest.fixture(autouse=True)
def _known_state():
    """Each test starts not strict, from one seed, with full float32 products on a GPU and all threads of the CPU."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    sepconv_ext._C.set_strict(False)
    torch.set_float32_matmul_precision("highest")
    with torch.backends.cudnn.flags(enabled=None, benchmark=None, deterministic=None, allow_tf32=False):
        yield
    torch.set_num_threads(threads)
