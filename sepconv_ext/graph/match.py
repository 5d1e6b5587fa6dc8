"""A small language for what to look for in a graph: `relu(x)` is a call of relu with anything as its argument.

    x = Any("x")                         anything; the same thing wherever the same name stands
    silu = Op(aten.silu.default)         a node that calls one of these
    silu(x)                              a pattern; arguments that are left out match anything
    x * 2, 6                             numbers match themselves, and constants that hold nothing else
    Constant("scale")                    a tensor that is known while the network is frozen

A call inside a pattern must have no other reader than its pattern, unless it is written `shared(call)`: what a rule
takes away must not be needed elsewhere.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache

import torch
from torch import fx

from .capture import Program

__all__ = ["Any", "Call", "Constant", "Match", "Op", "arguments", "match", "shared"]

Match = dict[str, object]


@dataclass(frozen=True)
class Any:
    name: str


@dataclass(frozen=True)
class Constant(Any):
    pass


@dataclass(frozen=True)
class Call:
    """A node that calls one of `targets`; with a name, the match holds the node under it."""

    targets: tuple[Callable, ...]
    positional: tuple[object, ...] = ()
    named: Mapping[str, object] = field(default_factory=dict)
    name: str = ""
    commutes: bool = False
    is_shared: bool = False
    condition: Callable[[Program, fx.Node], bool] | None = None

    def __hash__(self) -> int:
        return id(self)

    def as_(self, name: str) -> Call:
        return replace(self, name=name)

    def where(self, condition: Callable[[Program, fx.Node], bool]) -> Call:
        """Only nodes of which `condition(program, node)` is true."""
        return replace(self, condition=condition)


class Op:
    """Makes patterns: `Op(aten.add.Tensor, commutes=True)(x, y)`."""

    def __init__(self, *targets: Callable, commutes: bool = False) -> None:
        self.targets, self.commutes = targets, commutes

    def __call__(self, *positional: object, **named: object) -> Call:
        return Call(self.targets, positional, named, commutes=self.commutes)


def shared(call: Call) -> Call:
    """The call may have other readers too."""
    return replace(call, is_shared=True)


def match(program: Program, pattern: object, node: object, found: Match | None = None) -> Match | None:
    """What the pattern's names stand for if `node` is what it describes, else None."""
    return _match(program, pattern, node, dict(found or {}), is_root=True)


def _match(program: Program, pattern: object, node: object, found: Match, is_root: bool = False) -> Match | None:
    if isinstance(pattern, Any):
        if isinstance(pattern, Constant) and program.constant(node) is None and not isinstance(node, (int, float)):
            return None
        if pattern.name in found and found[pattern.name] is not node:
            return None
        return found | {pattern.name: node}
    if not isinstance(pattern, Call):
        return found if _equals(program, pattern, node) else None
    if not isinstance(node, fx.Node) or node.op != "call_function" or node.target not in pattern.targets:
        return None
    if not (is_root or pattern.is_shared or len(node.users) == 1):
        return None
    if pattern.condition is not None and not pattern.condition(program, node):
        return None
    given = arguments(node)
    orders = [pattern.positional, pattern.positional[::-1]] if pattern.commutes else [pattern.positional]
    for positional in orders:
        result: Match | None = found | ({pattern.name: node} if pattern.name else {})
        parts = [
            *zip(positional, given.values(), strict=False),
            *((part, given.get(name)) for name, part in pattern.named.items()),
        ]
        for part, value in parts:
            result = _match(program, part, value, result)
            if result is None:
                break
        if result is not None:
            return result
    return None


def _equals(program: Program, expected: object, value: object) -> bool:
    if isinstance(expected, (list, tuple)):
        same_length = isinstance(value, (list, tuple)) and len(value) == len(expected)
        return same_length and all(_equals(program, e, v) for e, v in zip(expected, value, strict=True))
    tensor = program.constant(value)
    if tensor is not None:
        if tensor.numel() != 1 or not isinstance(expected, (int, float)):
            return False
        return abs(tensor.item() - expected) <= 1e-6 * abs(expected)
    if isinstance(expected, float) and isinstance(value, (int, float)):
        return abs(value - expected) <= 1e-6 * abs(expected)
    return type(value) is not fx.Node and value == expected


def arguments(node: fx.Node) -> dict[str, object]:
    """All arguments of a call by name, in order, defaults filled in."""
    names, defaults = _signature(node.target)
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    return {name: given.get(name, defaults.get(name)) for name in names}


@cache
def _signature(target: Callable) -> tuple[tuple[str, ...], dict[str, object]]:
    if isinstance(target, torch._ops.OpOverload):
        described = target._schema.arguments
        return tuple(a.name for a in described), {a.name: a.default_value for a in described if a.has_default_value()}
    try:
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):
        return (), {}
    return tuple(p.name for p in parameters), {p.name: p.default for p in parameters if p.default is not p.empty}
