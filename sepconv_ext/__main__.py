"""`python -m sepconv_ext info`: what this build is, what it runs on, and whether it computes right. Needs no GPU.

The block is to be pasted into bug reports.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Sequence

import torch

import sepconv_ext
from sepconv_ext import selfcheck

Facts = dict[str, dict[str, str]]


def _listed(values: Sequence[str]) -> str:
    return ", ".join(values) if values else "none"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _driver() -> str:
    """Of NVIDIA's GPUs, as the kernel module says."""
    try:
        with open("/proc/driver/nvidia/version") as lines:
            return next(lines).partition(":")[2].strip()
    except (OSError, StopIteration):
        return "none"


def _cuda_devices() -> dict[str, str]:
    if not torch.cuda.is_available():
        return {"cuda": "no CUDA device is visible to torch"}
    devices = {}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices[f"cuda:{index}"] = (
            f"{properties.name}, sm_{properties.major}{properties.minor}, {properties.multi_processor_count} "
            f"multiprocessors, {properties.total_memory / 2**30:.0f} GiB"
        )
    return devices


def facts() -> Facts:
    """Everything that `info` prints, by section."""
    build = sepconv_ext._C.build_info()
    cuda = f"yes, toolkit {build['cuda_version']}" if build["cuda"] else "no"
    strict = sepconv_ext._C.strict()
    return {
        "versions": {
            "sepconv_ext": sepconv_ext.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "torch's CUDA": torch.version.cuda or "none",
            "NVIDIA driver": _driver(),
            "C library": " ".join(platform.libc_ver()).strip() or "unknown",
            "system": platform.platform(),
        },
        "build": {
            "compiler": build["compiler"],
            "built for torch": build["torch_version"],
            "debug": "yes" if build["debug"] else "no",
            "CUDA kernels": cuda,
            "CUDA architectures": _listed(build["cuda_archs"]),
            "CPU instruction sets": _listed(build["cpu_isas"]),
        },
        "running": {
            "cpu": f"{_processor()}, {torch.get_num_threads()} threads, {build['cpu_isa']} kernels",
            **_cuda_devices(),
            "strict mode": "on: a fallback to ATen is an error" if strict else "off (SEPCONV_STRICT=1 turns it on)",
        },
    }


def render(sections: Facts) -> str:
    """The sections as aligned plain text."""
    width = max(len(name) for section in sections.values() for name in section)
    lines = []
    for title, section in sections.items():
        lines += [title, *(f"  {name.ljust(width)}  {value}" for name, value in section.items())]
    return "\n".join(lines)


def show(sections: Facts) -> None:
    """Prints the sections: as a rich table where rich is installed, as plain text elsewhere."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(render(sections))
        return
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for title, section in sections.items():
        table.add_row(f"[bold]{title}[/bold]", "")
        for name, value in section.items():
            table.add_row(f"  {name}", value)
    Console().print(table, highlight=False, soft_wrap=False)


CHECK = "check: one call of each kernel family against its reference"


def checks() -> tuple[dict[str, str], bool]:
    """What the checks found, by family, and whether all of them passed."""
    outcomes = list(selfcheck.run(cuda=sepconv_ext.has_cuda() and torch.cuda.is_available()))
    found = {o.name: f"{'ok' if o.passed else 'WRONG'}: {o.text}" for o in outcomes}
    return found, all(o.passed for o in outcomes)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m sepconv_ext", description=sepconv_ext.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    info = commands.add_parser(
        "info", help="versions, build, devices, and a check of each kernel family; 1 if one fails"
    )
    info.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    options = parser.parse_args(arguments)
    found, passed = checks()
    if options.json:
        print(json.dumps({**facts(), "check": found}, indent=2))
    else:
        show({**facts(), CHECK: found})
    return 0 if passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
