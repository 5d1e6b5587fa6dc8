"""Whole networks: captured by torch.export, rewritten by patterns, laid out, packed and frozen; and torch.compile's."""

from importlib import metadata

from .choice import autotune
from .freeze import Frozen, FrozenParts, freeze

__all__ = ["Frozen", "FrozenParts", "autotune", "freeze"]


def _register_backend() -> None:
    """Tells torch.compile of the backend, where no installed package does: torch finds its entry point by itself.

    torch._dynamo takes a second to import, which is why an installed package leaves that to torch."""
    try:
        points = metadata.distribution("sepconv_ext").entry_points
    except metadata.PackageNotFoundError:
        points = metadata.EntryPoints()
    if not any(point.group == "torch_dynamo_backends" for point in points):
        from torch._dynamo.backends.registry import register_backend

        from .backend import compile_graph

        register_backend(compile_graph, name="sepconv_ext")


_register_backend()
