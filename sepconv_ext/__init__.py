"""Fast grouped convolution for PyTorch: depthwise, pointwise and grouped, forward and gradients, on CPU and CUDA."""

import torch  # before _C, which links to its libraries

from ._fit import why_it_does_not_fit, why_it_does_not_load

try:
    from . import _C
except ImportError as error:
    raise ImportError(why_it_does_not_load(str(error), torch.__version__, torch.version.cuda)) from error
if (_misfit := why_it_does_not_fit(_C.build_info()["torch_version"], torch.__version__)) is not None:
    raise ImportError(_misfit)

# The ops' Python half (fake kernels, flop formulas, shardings, decompositions) registers itself on import; the rest is
# the public face.
from . import _sharding, causal_conv1d, decompositions, factorize, functional, nn, ops, packed, program  # noqa: F401
from .convert import convert_, revert_
from .cost import cost
from .functional import explain
from .graph import autotune, freeze
from .version import __version__

__all__ = [
    "__version__",
    "autotune",
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
