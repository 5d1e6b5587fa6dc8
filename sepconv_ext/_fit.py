"""What to say where the compiled part does not fit the torch that is installed."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path

__all__ = ["why_it_does_not_fit", "why_it_does_not_load"]

_BUILD = "In the folder of the sources, `pip install --no-build-isolation -e .` builds it (docs/install.md)."


def minor_release(version: str) -> list[str]:
    """2.14.1+cpu is of 2.14."""
    return version.partition("+")[0].split(".")[:2]


def why_it_does_not_fit(built_with: str, installed: str) -> str | None:
    """For a compiled part that was loaded; None where both are of one minor release, whose binaries fit each other."""
    if minor_release(built_with) == minor_release(installed):
        return None
    return _another_torch(f"torch {built_with}", ".".join((*minor_release(built_with), "*")), installed)


def why_it_does_not_load(error: str, installed: str, cuda: str | None) -> str:
    """For one that could not be loaded: it is missing, or of another torch, or of another CUDA."""
    if not any(Path(__file__).parent.glob("_C*.so")):
        return f"sepconv_ext._C, the compiled part, is not built. {_BUILD}"
    pinned = _pinned_torch()
    if pinned is not None and minor_release(pinned) != minor_release(installed):
        return _another_torch(f"torch {pinned}", ".".join((*minor_release(pinned), "*")), installed)
    if re.search(r"lib\w*cuda\w*\.so", error):  # of torch's CUDA build, or of the toolkit
        found = "without CUDA" if cuda is None else f"with CUDA {cuda}"
        return (
            f"sepconv_ext._C is built with CUDA kernels and lacks a library, while torch {installed} is a build "
            f"{found} ({error}). Install a torch of the CUDA version that the wheel's name tells, or a CPU wheel."
        )
    return f"sepconv_ext._C, the compiled part, does not fit torch {installed} ({error}). {_BUILD}"


def _another_torch(built_with: str, fitting: str, installed: str) -> str:
    return (
        f"sepconv_ext is built for {built_with}, but torch {installed} is installed. "
        f'`pip install "torch=={fitting}"` brings one that fits. {_BUILD}'
    )


def _pinned_torch() -> str | None:
    """The release that the installed package's requirements name: setup.py takes it from the torch it builds with."""
    try:
        requirements = importlib.metadata.requires("sepconv_ext") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    found = [text.partition("~=")[2] for text in requirements if text.startswith("torch~=")]
    return found[0].partition(";")[0].strip() if found else None
