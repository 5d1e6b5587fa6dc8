"""What a record says of the machine: versions, commit, device, and the two rates that the floor is made of."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

import sepconv_ext

from .timing import Clock, threads

ROOT = Path(__file__).resolve().parents[1]
DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}

PACKAGES = ("torch", "torchvision", "timm", "numpy", "onnx", "onnxruntime", "openvino", "sepconv_ext")


def describe(device: torch.device) -> dict:
    """Everything about the machine and the software that a figure may depend on."""
    facts = {
        "device": device_name(device),
        "device_type": device.type,
        "processor": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "commit": _git("rev-parse", "HEAD"),
        "commit_is_clean": _git("status", "--porcelain", "--untracked-files=no") == "",
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None,
        "onednn": torch.backends.mkldnn.is_available(),
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "tf32": {
            "cudnn": torch.backends.cudnn.allow_tf32,
            "matmul": torch.backends.cuda.matmul.allow_tf32,
        },
        "build": _build_info(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts["gpu"] = {
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": getattr(properties, "L2_cache_size", None),
        }
    return facts


def copy_bandwidth(device: torch.device, clock: Clock, thread_count: int) -> dict[int, float]:
    """Bytes/s (read and written bytes both count) of copies, by the bytes that the copy touches.

    On a GPU one size, far beyond L2. On a CPU several: what fits in the last cache is not bound by memory."""
    sizes = [1 << 31] if device.type == "cuda" else [1 << shift for shift in (22, 24, 26, 28)]
    result = {}
    with threads(thread_count):
        for size in sizes:
            source = torch.ones(size // 8, device=device)
            target = torch.empty_like(source)
            timing = clock.measure({"copy": lambda i, a=source, b=target: b.copy_(a)}, 1, 0.1, 5)
            result[size] = size / min(timing.samples["copy"])
    return result


def matmul_rate(device: torch.device, clock: Clock, thread_count: int, dtype: torch.dtype) -> float:
    """Operations/s of a large square matrix product of that dtype, under the TF32 flags in force."""
    half = dtype in (torch.float16, torch.bfloat16)
    side = (8192 if half else 4096) if device.type == "cuda" else 1024
    with threads(thread_count):
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        timing = clock.measure({"matmul": lambda i: a @ b}, 1, 0.2, 3)
    return 2 * side**3 / min(timing.samples["matmul"])


def bandwidth_for(table: dict[int, float], touched: int) -> float:
    """The bandwidth to hold a working set of ``touched`` bytes against: that of the largest copy no larger than it, so
    that the floor is never set too high."""
    sizes = sorted(table)
    fitting = [size for size in sizes if size <= touched] or sizes[:1]
    return table[fitting[-1]]


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def default_threads(device: torch.device) -> list[int]:
    """1 and all on a CPU; on a GPU whatever is set, since the host only launches."""
    return [torch.get_num_threads()] if device.type == "cuda" else sorted({1, torch.get_num_threads()})


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _build_info() -> dict:
    info = dict(sepconv_ext._C.build_info())
    return {key: value if isinstance(value, (bool, list, type(None))) else str(value) for key, value in info.items()}
