"""The walls of the architecture: rules about which file may hold what, read off the sources.

Comments and string literals are blanked first (line numbers stay): to talk about a rule does not break it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CPP = sorted(path for path in (ROOT / "csrc").rglob("*") if path.suffix in {".cpp", ".h", ".cu", ".cuh"})
CORE = [path for path in CPP if ROOT / "csrc" / "core" in path.parents]
CUDA = [path for path in CPP if ROOT / "csrc" / "cuda" in path.parents]
CPU = [path for path in CPP if ROOT / "csrc" / "cpu" in path.parents]
KERNELS = [path for path in CUDA if path.suffix in {".cu", ".cuh"}]
PYTHON = sorted((ROOT / "sepconv_ext").rglob("*.py"))

_NOT_CODE = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"', re.DOTALL)


def code_of(path: Path, keep_strings: bool = False) -> str:
    def blank(match: re.Match) -> str:
        if keep_strings and match[0].startswith('"'):
            return match[0]
        return re.sub(r"[^\n]", " ", match[0])

    return _NOT_CODE.sub(blank, path.read_text())


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def found(pattern: str, paths: list[Path], allowed: dict[str, str] | None = None, **options) -> list[str]:
    """Every match as "file:line: text", but for the files in `allowed` (each with the reason why)."""
    hits = []
    for path in paths:
        if name_of(path) in (allowed or {}):
            continue
        code = code_of(path, **options)
        for match in re.finditer(pattern, code):
            line = code.count("\n", 0, match.start()) + 1
            hits.append(f"{name_of(path)}:{line}: {path.read_text().splitlines()[line - 1].strip()}")
    return hits


def test_the_sources_are_seen():
    assert CUDA and CPU and KERNELS and PYTHON


# --- every source has a room, and is named from csrc ---

ROOMS = {
    "core": "plain numbers, without torch: shapes, activations, layouts, words",
    "ops": "what torch sees: the op table, checks, the way of a call, derivatives",
    "cpu": "the CPU's bindings, plan and run",
    "cpu/layout": "copies between channels_last and planes",
    "cpu/simd": "vectors, instruction sets and scratch memory",
    "cpu/depthwise": "one input channel a group",
    "cpu/pointwise": "1x1: matrix products",
    "cpu/grouped": "any groups",
    "cpu/separable": "depthwise and 1x1 in one pass",
    "cpu/spatial": "a vertical and a horizontal filter in one pass",
    "cpu/sequences": "causal: from a state, packed side by side, decoding",
    "cpu/network": "whole networks: programs of steps over one arena",
    "cpu/borders": "reflected, replicated and circular borders",
    "cuda": "the GPU's bindings, plan and run",
    "cuda/device": "what kernels share: launch(), PTX, copies, sums",
    "cuda/depthwise": "one input channel a group; its folders are by method",
    "cuda/depthwise/nhwc": "channels_last",
    "cuda/depthwise/nchw": "planes",
    "cuda/depthwise/large": "large kernels",
    "cuda/depthwise/toeplitz": "large kernels on tensor cores",
    "cuda/pointwise": "1x1: matrix products",
    "cuda/grouped": "any groups",
    "cuda/separable": "depthwise and 1x1 in one kernel",
    "cuda/sequences": "causal: from a state, packed side by side, decoding",
    "cuda/spatial": "a vertical and a horizontal filter in one kernel",
    "cuda/borders": "reflected, replicated and circular borders",
}


def test_every_source_is_in_a_room():
    """A source anywhere else is in no list of this file, of setup.py or of the emulator."""
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    homeless = [name_of(path) for path in sources if folder_of(path) not in ROOMS or path not in CPP]
    assert not homeless, f"name the room in ROOMS, or use one of these: {', '.join(ROOMS)}"
    empty = [room for room in ROOMS if room not in map(folder_of, sources)]
    assert not empty


def folder_of(path: Path) -> str:
    return path.parent.relative_to(ROOT / "csrc").as_posix().removeprefix(".")


def test_includes_start_at_csrc():
    emulator = {"ptx_emulated.h": "what ptx.cuh becomes under the emulator"}
    hits = []
    for path in CPP:
        code = re.sub(r"//[^\n]*", "", path.read_text())
        names = re.findall(r'(?m)^\s*#\s*(?:include|define SEPCONV_KERNELS)\s+"([^"]+)"', code)
        hits += [f"{name_of(path)}: {n}" for n in names if n not in emulator and not (ROOT / "csrc" / n).is_file()]
        own = re.findall(r'define SEPCONV_KERNELS\s+"([^"]+)"', code)
        hits += [f"{name_of(path)} reads {n} again" for n in own if ROOT / "csrc" / n != path]
    assert not hits


# --- what a room may see ---


def test_kernels_see_no_torch():
    bindings = {f"csrc/{name}/bindings.cpp": f"the {name} dispatch key" for name in ("cpu", "cuda")}
    bindings["csrc/cpu/packed_bindings.cpp"] = "the packed products' dispatch key"
    bindings["csrc/cpu/separable/inverted_residual_bindings.cpp"] = "the dispatch key of one op, whose weights it packs"
    bindings["csrc/cuda/separable/inverted_residual_bindings.cpp"] = "the dispatch key of one op"
    bindings["csrc/cpu/sequences/bindings.cpp"] = "the causal ops' dispatch key"
    bindings["csrc/cuda/sequences/bindings.cpp"] = "the causal ops' dispatch key"
    bindings["csrc/cpu/network/bindings.cpp"] = "the programs' dispatch key"
    torch_headers = r"#\s*include\s*[<\"](torch|ATen|c10|pybind11|Python\.h)\b"
    assert not found(torch_headers, CUDA + CPU, bindings, keep_strings=True)
    assert not found(torch_headers, CORE, keep_strings=True)
    assert not found(r"\b(at|c10|torch)::", CORE + CUDA + CPU, bindings)


def test_inline_assembly_has_its_homes():
    homes = {
        "csrc/cuda/device/ptx.cuh": "PTX",
        "csrc/cpu/pointwise/product_chain_simd.h": "sums that GCC does not keep in AVX2's registers",
    }
    assert not found(r"\b(asm|__asm__)\b", CPP, homes)


def test_kernels_start_through_launch():
    assert not found(r"<<<", CPP)
    launch = {"csrc/cuda/device/common.cuh": "launch() itself"}
    assert not found(r"\bcuda(LaunchKernel\w*|FuncSetAttribute)\b", CPP, launch)


def test_shared_memory_is_taken_through_the_macros():
    assert not found(r"\b__shared__\b", CPP, {"csrc/cuda/device/common.cuh": "the macros themselves"})


def test_no_foreign_device_libraries():
    driver = {"csrc/cuda/device/tensor_map.cpp": "the driver's types; it finds its one function through the runtime"}
    assert not found(r"#\s*include\s*<(cub|cooperative_groups|cuda|thrust|cute|cutlass)[/.]", CUDA, driver)
    assert not found(r"\b(cub|cooperative_groups|thrust)::", CUDA)
    assert not found(r"(?<![\w:])cuda::(std|ptx|atomic|barrier|pipeline)", CUDA)


def test_arithmetic_does_not_ask_for_the_architecture():
    assert not found(r"\b__CUDA_ARCH\w*", CPP, {"csrc/cuda/device/ptx.cuh": "instructions that some GPUs lack"})


# --- what keeps kernels deterministic, and runnable under the emulator ---


def test_warp_intrinsics_name_their_mask():
    old = r"\b__(shfl|shfl_up|shfl_down|shfl_xor|ballot|any|all|activemask)\s*\("
    assert not found(old, KERNELS)
    mask = r"(0x[0-9a-fA-F]+u?|\w*[mM]ask\w*|kFullWarp|kAllLanes)"
    assert not found(r"\b__\w+_sync\s*\((?!\s*" + mask + r"\s*[,)])", KERNELS)


def test_no_block_waits_for_another_and_no_atomics():
    assert not found(r"\b(atomic\w+|__nanosleep|__threadfence\w*|(?<!asm )volatile)\b", KERNELS)
    assert not found(r"\b(atom|red)\.", KERNELS, keep_strings=True)


def test_block_sizes_are_multiples_of_a_warp():
    hits = []
    for path in KERNELS:
        constants = re.findall(r"\bconstexpr\s+\w+\s+(k\w*Threads)\s*=\s*(\d+)\s*[;,]", code_of(path))
        bounds = re.findall(r"(__launch_bounds__)\s*\(\s*(\d+)", code_of(path))
        hits += [f"{name_of(path)}: {name} = {n}" for name, n in constants + bounds if int(n) % 32]
    assert not hits


def bodies(code: str) -> Iterator[tuple[str, str, bool]]:
    """(name, body, is a kernel) of each __global__ or __device__ function of a source without comments."""
    arguments = r"\((?:[^(){};]|\([^(){};]*\))*\)"
    pattern = r"\b(__global__|__device__)\b[^;{}]*?\b(\w+)\s*" + arguments + r"\s*(?:const\s*)?\{"
    for match in re.finditer(pattern, code):
        yield match[2], block_at(code, match.end() - 1), match[1] == "__global__"


def block_at(code: str, start: int) -> str:
    """The text from the brace at `start` to the one that closes it."""
    depth = 0
    for i in range(start, len(code)):
        depth += {"{": 1, "}": -1}.get(code[i], 0)
        if depth == 0:
            return code[start : i + 1]
    raise AssertionError("braces do not balance")


def without_lambdas(body: str) -> str:
    """A lambda's `return` leaves the lambda only."""
    start = re.compile(r"\[[&=\w,\s]*\]\s*(?:\([^()]*\)\s*)?(?:mutable\s*)?(?:->\s*[\w:<>]+\s*)?\{")
    while match := start.search(body):
        block = block_at(body, match.end() - 1)
        body = body[: match.start()] + " lambda " + body[match.end() - 1 + len(block) :]
    return body


BARRIER = r"__syncthreads|__syncwarp|__\w+_sync|\w*barrier\w*wait\w*|\w*cluster_sync\w*"


def returns_before_a_barrier(code: str, shared_code: str = "") -> list[str]:
    functions = list(bodies(shared_code)) + list(bodies(code))
    waiting: set[str] = set()  # functions that reach a barrier themselves or through another
    while True:
        call = r"\b(?:" + "|".join([BARRIER, *map(re.escape, sorted(waiting))]) + r")\s*(?:<[^;{}]*?>)?\s*\("
        more = {name for name, body, _ in functions if re.search(call, body)} - waiting
        if not more:
            break
        waiting |= more
    early = []
    for name, body, is_kernel in bodies(code):
        body = without_lambdas(body)
        barriers = [match.start() for match in re.finditer(call, body)]
        first_return = re.search(r"\breturn\s*;", body)
        if is_kernel and barriers and first_return and first_return.start() < barriers[-1]:
            early.append(name)
    return early


@pytest.mark.parametrize("path", [path for path in KERNELS if path.suffix == ".cu"], ids=name_of)
def test_no_return_before_a_barrier(path):
    assert not returns_before_a_barrier(code_of(path), code_of(ROOT / "csrc" / "cuda" / "device" / "common.cuh"))


def test_the_barrier_check_can_fail():
    helper = "template <class T> __device__ T total(T v) { __syncthreads(); return v; }\n"
    early = "__global__ void __launch_bounds__(128) k(int n) { if (threadIdx.x >= n) return; total<int>(n); }"
    late = "__global__ void k(int n) { total(n); auto f = [&] { if (x) return; }; if (n) return; f(); }"
    assert returns_before_a_barrier(helper + early) == ["k"]
    assert returns_before_a_barrier(helper + late) == []
    inside = "__global__ void k(int n) { auto f = [&](int i) { if (i) return; }; __syncthreads(); f(n); }"
    assert returns_before_a_barrier(inside) == []


def test_kernels_begin_with_the_wait_for_earlier_ones():
    """launch() may let a kernel begin before the one before it has ended."""
    kernels = [
        (name_of(path), name, body) for path in KERNELS for name, body, kernel in bodies(code_of(path)) if kernel
    ]
    assert len(kernels) == sum(code_of(path).count("__global__") for path in KERNELS) > 30
    first = re.compile(r"\{\s*wait_for_earlier_kernels\(\);")
    assert not [f"{file}: {name}" for file, name, body in kernels if not first.match(body)]


# --- who decides, and who checks ---


def test_a_kernel_without_a_door_is_an_error():
    """From a plan to its kernel no `default:` computes: it would take the place of what was forgotten."""
    names = ("run.cpp", "bindings.cpp", "packed_bindings.cpp")
    assert not found(r"\bdefault:(?!\s*no_door\b)", [path for path in CPU + CUDA if path.name in names])


def test_devices_are_chosen_by_dispatch():
    allowed = {
        "csrc/ops/library.cpp": "explain() tells which plan a device has; it runs nothing",
        "csrc/ops/aten_route.cpp": "addresses without memory, for ATen, are the CPU's",
    }
    assert not found(r"\bis_(cuda|cpu)\s*\(", CPP, allowed)
    graph = {
        "sepconv_ext/graph/backend.py": "which layout Inductor is handed; the ops choose their kernels by dispatch",
        "sepconv_ext/volumes.py": "sums over planes, which win on a CPU; it composes ops and runs no kernel itself",
    }
    assert not found(r"\.is_(cuda|cpu)\b|\.device\.type\s*==", PYTHON, graph)


def test_arguments_are_validated_in_one_place():
    allowed = {
        "csrc/ops/checks.cpp": "the place",
        "csrc/ops/checks.h": "its helpers",
        "csrc/ops/checks_causal.cpp": "the place, for the causal ops",
        "csrc/ops/checks_program.cpp": "the place, for programs",
        "csrc/ops/runtime.cpp": "SEPCONV_STRICT's own error",
        "csrc/cuda/bindings.cpp": "a launch that fails",
        "csrc/ops/library.cpp": "explain()'s word for a map, which no op takes",
        "csrc/ops/functional.cpp": "one value or a pair, which an op's list no longer tells",
    }
    assert not found(r"\bTORCH_CHECK\w*\s*\(", CPP, allowed)


def test_ops_and_functional_validate_nothing_that_cpp_validates():
    assert not found(r"(?m)^\s*raise\b", [ROOT / "sepconv_ext" / "ops.py"])
    # Padding as a text, one value for two, a sequence as a row, and the promise of a 1x1 kernel never reach C++, which
    # knows one conv2d.
    resolvers = ("def _whole", "def _entries", "def _padding", "def pointwise_conv2d")
    text = (ROOT / "sepconv_ext" / "functional.py").read_text()
    functions = re.split(r"(?m)^(?=def )", text)
    assert not [f for f in functions if re.search(r"(?m)^\s*raise\b", f) and not f.startswith(resolvers)]


# --- sizes ---


def test_lines_fit_in_120_columns():
    """Comments too, which clang-format breaks; Python's lines are ruff's matter."""
    paths = [*CPP, *(path for path in (ROOT / "tests").rglob("*") if path.suffix in {".cpp", ".h", ".cu"})]
    lines = [(path, number, line) for path in paths for number, line in enumerate(path.read_text().splitlines(), 1)]
    assert not [f"{name_of(path)}:{number}" for path, number, line in lines if len(line) > 120]


@pytest.mark.parametrize("path", CPU + CUDA, ids=name_of)
def test_kernel_files_stay_readable(path):
    lines = path.read_text().splitlines()
    assert len(lines) < 400
    header = path.with_suffix(".h")
    first = lines[0] if not header.exists() else header.read_text()
    assert first.startswith("//"), "a file, or its header, begins with what it does"
