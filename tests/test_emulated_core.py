"""The emulator itself: does it report each kind of fault, in each of its builds? (tests/emulator/selftest.cu)"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from test_emulated import emulate
from test_emulated import pytestmark as emulator_marks

pytestmark = emulator_marks

# fault -> what the asan and the race build must say; None where that build cannot see it.
FAULTS = {
    "input overrun": ("heap-buffer-overflow", None),
    "output overrun": ("heap-buffer-overflow", None),
    "forgotten output": ("the sum is wrong", "the sum is wrong"),
    "early exit": ("deadlock: 95 of 96 threads", "deadlock: 95 of 96 threads"),
    "divergent barrier": ("divergent barrier|deadlock", "divergent barrier|deadlock"),
    "divergent warp": ("deadlock(?s:.*)48 threads", "deadlock(?s:.*)48 threads"),
    "lane outside of the mask": ("shuffles from lane (?:1[6-9]|2[0-3]), which is not in the mask", "not in the mask"),
    "own lane missing": ("not in its own mask", "not in its own mask"),
    "missing syncwarp": (None, "read of uninitialised bytes|read-after-write race"),
    "write after read": (None, "write-after-read race|read-after-write race"),
    "wrong shuffle": ("the sum is wrong", "the sum is wrong"),
    "shared overrun": ("out of bounds for type", "read of uninitialised bytes"),
    "shared overread": ("out of bounds for type", "read of uninitialised bytes"),
    "missing barrier": (None, "read of uninitialised bytes|read-after-write race"),
    "uninitialised register": ("the sum is wrong", None),
    "blocks share an output": ("the sum is wrong", "write-write race at byte 0 of an output"),
    "odd block": ("not a multiple of 32", "not a multiple of 32"),
    "misaligned copy": ("not a multiple of 16", "not a multiple of 16"),
    "copy not waited for": ("use-after-poison", "still writing"),
    "copy without barrier": (None, "read-after-write race|still writing|read of uninitialised"),
    "thread ends in flight": ("ends while its cp.async", "ends while its cp.async"),
    "bytes that never come": ("deadlock(?s:.*)phase of an mbarrier", "deadlock(?s:.*)phase of an mbarrier"),
    "mbarrier without fence": ("no fence stands", "no fence stands"),
    "mbarrier without syncwarp": (None, "read-after-write race|read of uninitialised|nobody has initialised"),
    "box not waited for": ("use-after-poison", "still writing"),
    "box that another waits for": (None, "bulk copy whose arrival it has not waited for"),
    "wrong parity": ("use-after-poison", "still writing"),
    "box over what is read": (None, "write-after-read race|still writing"),
    "box without fence": ("no fence.proxy.async", "no fence.proxy.async"),
    "block ends before a box": ("ends while bulk copies", "ends while bulk copies"),
    "dynamic overrun": ("use-after-poison", None),
    "misaligned vector": ("misaligned address", None),
}


@pytest.fixture(scope="module")
def programs() -> dict[str, Path]:
    sources = [emulate.HERE / "selftest.cu", *(emulate.HERE / f"{name}.cpp" for name in emulate.RUNTIME_CORE)]
    return {
        build: emulate.link([emulate.compile_object(source, build) for source in sources], build, "selftest")
        for build in emulate.BUILDS
    }


@pytest.mark.parametrize("build", emulate.BUILDS)
@pytest.mark.parametrize("seed", range(8))
def test_a_sound_kernel_is_right(programs: dict[str, Path], build: str, seed: int) -> None:
    assert emulate.run(programs[build], ["none", str(seed)]).stdout == "right\n"


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_reported(programs: dict[str, Path], fault: str) -> None:
    for build, expected in zip(emulate.BUILDS, FAULTS[fault], strict=True):
        if expected is None:
            continue
        for seed in range(4):
            output = emulate.run(programs[build], [fault, str(seed)]).stdout
            assert re.search(expected, output), f"{build} build, seed {seed}: {output[:2000]}"


def test_a_report_names_block_thread_and_line(programs: dict[str, Path]) -> None:
    """Of the emulator's own reports and of the sanitizers'."""
    for fault in ("own lane missing", "shared overrun"):
        output = emulate.run(programs["asan"], [fault, "0"]).stdout
        assert re.search(r"block \(\d, 0, 0\) thread \(\d+, 0, 0\): .*selftest\.cu:\d+", output, re.DOTALL), output
