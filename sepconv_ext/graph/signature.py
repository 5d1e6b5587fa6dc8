"""What a captured network takes: which arguments, and of which sizes."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = ["Input", "Signature"]


@dataclass(frozen=True)
class Input:
    """One input of a captured graph: a tensor with sizes in these ranges (lowest, highest); or a plain value."""

    name: str
    sizes: tuple[tuple[int, float], ...] | None = None
    value: object = None

    def of_at_least_one(self) -> Input:
        """The same, without an empty batch."""
        if not self.sizes or self.sizes[0][0] >= 1 or self.sizes[0][1] < 1:
            return self
        (_, highest), *others = self.sizes
        return replace(self, sizes=((1, highest), *others))

    def check(self, value: object) -> None:
        if self.sizes is None:
            if value != self.value:
                raise ValueError(f"{self.name} was {self.value!r} when the network was frozen, but is {value!r}")
            return
        if not isinstance(value, Tensor):
            raise TypeError(f"{self.name} must be a Tensor, but is a {type(value).__name__}")
        size = value.shape
        inside = (low <= n <= high for n, (low, high) in zip(size, self.sizes, strict=False))
        if len(size) != len(self.sizes) or not all(inside):
            wanted = ", ".join(_in_words(*ends) for ends in self.sizes)
            raise RuntimeError(f"{self.name} must have size [{wanted}], but has {list(size)}")


@dataclass
class Signature:
    """The arguments of a captured network.

    Attributes:
        in_spec: how they nest.
        inputs: one for each leaf of them.
        guards: conditions of the model's own on their sizes, as Python expressions of `L`.
        names: of the forward's positional parameters, which `L` holds; a last one with a star takes all the rest.
    """

    in_spec: pytree.TreeSpec
    inputs: list[Input] = field(default_factory=list)
    guards: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)

    def flat(self, args: tuple, kwargs: dict) -> list:
        """The leaves. TypeError for arguments that nest in another way than the example's."""
        flat, spec = pytree.tree_flatten((args, kwargs))
        if spec != self.in_spec:
            raise TypeError(
                f"the frozen network takes its arguments as the example had them, {self.in_spec}, but got {spec}"
            )
        return flat

    def check(self, flat: Sequence) -> None:
        """Raises an error that names the argument, where a leaf is none that the network takes."""
        for input, value in zip(self.inputs, flat, strict=True):
            input.check(value)
        broken = self.broken(flat) if self.guards else ()
        if broken:
            sizes = [
                f"{input.name} has size {list(value.shape)}"
                for input, value in zip(self.inputs, flat, strict=True)
                if isinstance(value, Tensor)
            ]
            raise RuntimeError(
                f"sizes must satisfy {_as_written(broken[0])}, as the example's do, but {', '.join(sizes)}: the model "
                "takes another way through its forward there, so freeze it with an example of that size"
            )

    def broken(self, flat: Sequence) -> list[str]:
        """The conditions that do not hold: the model's own branches would not go as they went on the example."""
        args, _ = pytree.tree_unflatten(list(flat), self.in_spec)
        known = {name: args[i] for i, name in enumerate(self.names) if i < len(args)}
        known |= {name[1:]: args[i:] for i, name in enumerate(self.names) if name[0] == "*" and name[1] != "*"}
        scope = {"L": known, "math": math, "torch": torch}
        return [guard for guard in self.guards if not eval(guard, scope)]


def _in_words(low: int, high: float) -> str:
    if low == high:
        return str(low)
    if high == math.inf:
        return f"at least {low}" if low else "any"
    return f"{low} to {int(high)}"


def _as_written(guard: str) -> str:
    """x.shape[2] > 8 of L['x'].size()[2] > 8."""
    return re.sub(r"L\['(\w+)'\]", r"\1", guard).replace(".size()", ".shape")
