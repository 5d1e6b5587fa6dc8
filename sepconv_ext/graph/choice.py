"""`autotune`: under torch.compile, the choice between an op of this package and torch's own is left to measurement.

The plan's choices on a GPU were made by predictions and by measurements on a few machines. With this knob Inductor
calls both, the op and what it is in terms of aten (decompositions.py), on tensors of the call's sizes when it compiles,
and keeps the faster one for the machine at hand: its `register_custom_op_autotuning`, which torch has since 2.13.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor

from ..decompositions import TABLE

__all__ = ["autotune"]

_OPS = ("conv2d", "conv2d_grad_input", "conv2d_grad_weight")


def autotune(on: bool = True, devices: Collection[str] = ("cuda",)) -> None:
    """From now on torch.compile measures, for each convolution and each of its two gradients, this package's op against
    aten's and takes the faster.

    Args:
        on: False restores what stood before: ops of this package in a graph stay. Default True.
        devices: the types of devices on which it is done. Default ``("cuda",)``.

    Raises:
        RuntimeError: a torch without ``register_custom_op_autotuning``.

    It holds for compiled models that were converted, and for ``backend="sepconv_ext"``, whose plan proposes the calls.
    A graph with symbolic sizes keeps the ops, since one size does not speak for the others. Inductor keeps its choices
    in its caches: call this before the first compilation, and `torch.compiler.reset()` to compile anew.
    """
    ops = [getattr(torch.ops.sepconv_ext, name).default for name in _OPS]
    from torch._inductor.lowering import user_lowerings

    for op in ops:
        user_lowerings.pop(op, None)
    if not on:
        return
    try:
        from torch._inductor.kernel.custom_op import CustomOpConfig, register_custom_op_autotuning
    except ImportError as error:
        raise RuntimeError(f"autotune needs torch 2.13 or newer, but torch is {torch.__version__}") from error

    def choices_of(op: torch._ops.OpOverload) -> Callable[[dict[str, Tensor]], list]:
        def choices(tensors: dict[str, Tensor]) -> list:
            """What stands beside the op itself, which is always one of the choices."""
            fixed = all(isinstance(n, int) for t in tensors.values() for n in (*t.shape, *t.stride()))
            measured = all(t.device.type in devices for t in tensors.values())
            return [CustomOpConfig(TABLE[op])] if fixed and measured else []

        return choices

    for op in ops:
        register_custom_op_autotuning(op, config_generator=choices_of(op))
