"""Fast grouped convolution for PyTorch: depthwise, pointwise and grouped, forward and gradients, on CPU and CUDA."""

import torch  # noqa: F401  (its libraries must be loaded before _C, which links to them)

try:
    from . import _C
except ImportError as error:
    raise ImportError(
        "sepconv_ext._C, the compiled part, is not built or does not fit the installed torch. In the folder of the "
        "sources, `pip install --no-build-isolation -e .` builds it (docs/install.md)."
    ) from error

# The ops' Python half (fake kernels, flop formulas, shardings, decompositions) registers itself on import; the rest is
# the public face.
from . import _sharding, causal_conv1d, decompositions, factorize, functional, nn, ops, packed, program  # noqa: F401
from .convert import convert_, revert_
from .cost import cost
from .functional import explain
from .graph import freeze
from .version import __version__

__all__ = [
    "__version__",
    "causal_conv1d",
    "convert_",
    "cost",
    "decompositions",
    "explain",
    "factorize",
    "freeze",
    "functional",
    "has_cuda",
    "kernel_counts",
    "nn",
    "ops",
    "reset_kernel_counts",
    "revert_",
]


def has_cuda() -> bool:
    """True if this build holds the CUDA kernels (whether or not there is a GPU in the machine)."""
    return _C.build_info()["cuda"]


def kernel_counts() -> dict[str, int]:
    """How often each kernel ran in this process since the last reset; ``"aten"`` counts the calls that torch made."""
    return _C.kernel_counts()


def reset_kernel_counts() -> None:
    """Sets every count of `kernel_counts` to zero."""
    _C.reset_kernel_counts()
