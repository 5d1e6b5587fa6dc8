"""The ops on DTensors: the placements that they take and give are those of torch's own convolution.

On each dimension of a mesh the images of a batch may be sharded, or everything may be replicated; DTensor brings what
comes otherwise to one of the two. A gradient by the weight is then a sum over the shards.

Nobody waits for torch.distributed.tensor who does not use it: the strategies are registered as soon as it is imported.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from itertools import zip_longest
from types import ModuleType
from typing import Any

import torch

_DTENSOR = "torch.distributed.tensor"

# What each op's results and tensor arguments are where a batch is sharded: "b"atched images, a "r"eplicated filter, or
# the "s"um over the shards.
_ROLES = {
    "conv2d": ("b", "brr"),
    "conv2d_residual": ("b", "brrb"),
    "conv2d_grad_input": ("b", "br"),
    "conv2d_grad_weight": ("s", "bb"),
    "conv2d_both_grads": ("bs", "bbr"),
    "separable_conv2d": ("b", "brrrr"),
    "separable_conv2d_training": ("bb", "brrrr"),
    "spatial_separable_conv2d": ("b", "brr"),
    "inverted_residual": ("b", "brrrrrrrrrr"),
    "causal_conv1d": ("b", "brrbb"),
    "causal_conv1d_grad_input": ("bb", "brb"),
    "causal_conv1d_grad_weight": ("s", "bbbb"),
    "causal_conv1d_update": ("b", "bbrrbb"),
}
# Where an op's stride stands, which has an entry for each spatial dimension; the ops without one are for images.
_STRIDE = {
    "conv2d": 3, "conv2d_residual": 4, "conv2d_grad_input": 4, "conv2d_grad_weight": 4, "conv2d_both_grads": 3,
}  # fmt: skip
_FOR_SEQUENCES = {name for name in _ROLES if name.startswith("causal_conv1d")}
# Which argument an op changes: a copy in another placement would be changed in its stead. And which one names rows of
# it, that may lie in any shard.
_CHANGED, _ROWS = {"causal_conv1d_update": 1}, {"causal_conv1d_update": 5}
# Sizes that an op is told of its result, and the strides: a shard's own are smaller.
_SIZES = {"conv2d_grad_input": (2, 3)}


def register_strategies() -> None:
    """Tells DTensor how the ops are sharded."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
    from torch.distributed.tensor._op_schema import RuntimeSchemaInfo
    from torch.distributed.tensor.experimental import register_sharding

    sharded = {"b": Shard(0), "r": Replicate(), "s": Partial()}
    propagator = DTensor._op_dispatcher.sharding_propagator

    def keeping(changed: int, placements: Sequence, replicated: tuple, batched: tuple, by_rows: bool) -> tuple:
        """The one of both that leaves the argument where it is, on every dimension of the mesh."""
        for choice in (replicated,) if by_rows else (replicated, batched):
            if all(p == choice[1][changed] for p in placements):
                return choice
        wanted = "replicated" if by_rows else "replicated or sharded by its batch"
        raise RuntimeError(f"state is changed in place: it must be {wanted}, but is placed as {tuple(placements)}")

    def register(name: str, results: str, tensors: str, stride: int | None) -> None:
        op = getattr(torch.ops.sepconv_ext, name).default

        def strategies(*arguments: Any) -> Sequence[tuple[list, list]]:
            dims = 1 if name in _FOR_SEQUENCES else 2 if stride is None else len(arguments[stride])
            given = [role if a is not None else None for role, a in zip_longest(tensors, arguments)]

            def placed(placement: dict) -> tuple[list, list]:
                return [placement[role] for role in results], [placement.get(role) for role in given]

            replicated = placed(dict.fromkeys("brs", Replicate()))
            has_batch = len(arguments[0].shape) == dims + 2
            if name in _CHANGED:
                changed, by_rows = _CHANGED[name], arguments[_ROWS[name]] is not None
                return [keeping(changed, arguments[changed].placements, replicated, placed(sharded), by_rows)]
            return [replicated, placed(sharded)] if has_batch else [replicated]

        register_sharding(op)(strategies)
        # A result's size depends on all the other arguments, not only on those that are single numbers.
        propagator.op_to_schema_info[op] = RuntimeSchemaInfo(len(tensors), needs_pytree=True)

    for name, (results, tensors) in _ROLES.items():
        register(name, results, tensors, _STRIDE.get(name))
    for name, places in _SIZES.items():
        propagator.op_to_shape_and_stride_idx[getattr(torch.ops.sepconv_ext, name).default] = places


class _AfterImport(MetaPathFinder):
    """Lets the other finders find torch.distributed.tensor, and registers the strategies once it is there."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name != _DTENSOR:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            register_strategies()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if _DTENSOR in sys.modules:
    register_strategies()
else:
    sys.meta_path.insert(0, _AfterImport())
