"""Tries the patterns on a graph until none applies."""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch import Tensor, fx

from . import nodes
from .actions import Rewriter, from_functional_batch_norm, from_split
from .capture import Program
from .match import match
from .patterns import ACTIVATIONS, LAYERS, NOTHING, RULES

__all__ = ["remove_unread", "rewrite"]

Change = Callable[[Rewriter, fx.Node], object]


def rewrite(program: Program) -> Rewriter:
    """Applies all patterns to a program."""
    rewriter = Rewriter(program)
    everywhere = lambda change: _everywhere(rewriter, change)  # noqa: E731
    for pattern in NOTHING:
        everywhere(lambda r, node, pattern=pattern: (match(program, pattern, node) or {}).get("x"))
    everywhere(_without_conversion)
    _fold_constants(program)
    for pattern, name in ACTIVATIONS:
        everywhere(_spelled(pattern, name))
    everywhere(_item)
    everywhere(lambda r, node: LAYERS[node.target](r, node) if node.target in LAYERS else None)
    changed = True
    while changed:
        changed = False
        for rule in RULES:
            changed |= everywhere(_by_rule(rule))
    return rewriter


def _everywhere(rewriter: Rewriter, change: Change) -> bool:
    """Puts what `change` returns in the place of each node, unless it returns None. Whether it returned anything."""
    changed = False
    for node in list(rewriter.program.graph.nodes):
        if node.op != "call_function" or (not node.users):
            continue
        instead = change(rewriter, node)
        if isinstance(instead, fx.Node) and instead is not node:
            node.replace_all_uses_with(instead)
            changed = True
    if changed:
        remove_unread(rewriter.program.graph)
    return changed


def _spelled(pattern: object, name: str) -> Change:
    def change(rewriter: Rewriter, node: fx.Node) -> fx.Node | None:
        found = match(rewriter.program, pattern, node)
        if found is None or not isinstance(found["x"], fx.Node):
            return None
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return None
        return rewriter.call(node, nodes.activate, found["x"], name)

    return change


def _by_rule(rule) -> Change:
    def change(rewriter: Rewriter, node: fx.Node) -> fx.Node | None:
        found = match(rewriter.program, rule.pattern, node)
        return None if found is None else rule.act(rewriter, node, found)

    return change


def _without_conversion(rewriter: Rewriter, node: fx.Node) -> object:
    """x.to(...) that leaves the dtype and the device what they were."""
    if node.target not in (torch.ops.aten.to.dtype, torch.ops.aten.to.device, torch.ops.aten._to_copy.default):
        return None
    source = node.args[0]
    before, after = source.meta.get("val"), node.meta.get("val")
    if not (isinstance(before, Tensor) and isinstance(after, Tensor)):
        return None
    same = before.dtype == after.dtype and before.device == after.device
    return source if same else None


def _item(rewriter: Rewriter, node: fx.Node) -> object:
    if node.target is not operator.getitem or not isinstance(node.args[0], fx.Node):
        return None
    return from_functional_batch_norm(rewriter, node) or from_split(rewriter, node)


def _fold_constants(program: Program) -> None:
    """What is made of constants alone is one; floating-point ones are computed in float64."""
    for node in list(program.graph.nodes):
        if node.op != "call_function" or not isinstance(node.meta.get("val"), Tensor):
            continue
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()) or "empty" in str(node.target):
            continue
        if any(program.constant(source) is None for source in node.all_input_nodes):
            continue
        value = node.meta["val"]
        if not node.all_input_nodes and value.numel() > 1 << 20:
            continue
        args, kwargs = fx.map_arg((node.args, node.kwargs), program.constant)
        try:
            with torch.no_grad():
                made = node.target(*args, **kwargs)
        except (RuntimeError, TypeError, NotImplementedError):  # no float64 kernel: it is computed at each call
            continue
        hint = next((source.target for source in node.all_input_nodes), node.name)
        constant = program.add_constant(made, value.dtype, f"{hint}_{node.name}")
        node.replace_all_uses_with(constant)
    remove_unread(program.graph)


def remove_unread(graph: fx.Graph) -> None:
    """Erases the calls that nobody reads; the checks that torch.export adds are such calls too."""
    for node in reversed(list(graph.nodes)):
        if node.op in ("call_function", "get_attr") and not node.users:
            graph.erase_node(node)
