"""A frozen network's shortest way to its program."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from .. import _C

__all__ = ["DirectCall"]


@dataclass(frozen=True)
class DirectCall:
    """A network that is one program and nothing else, called without Python's way to an op, which takes 3 us.

    Attributes:
        code: the program.
        constants: the buffer's name.
        results: for each result of the network, which of the program's it is, and whether it is made contiguous.
    """

    code: str
    constants: str
    results: tuple[tuple[int, bool], ...]

    @classmethod
    def of(cls, graph: fx.Graph) -> DirectCall | None:
        """None if the graph has anything else in it."""
        calls = [node for node in graph.nodes if node.target is torch.ops.sepconv_ext.program.default]
        if len(calls) != 1 or calls[0].args[0] != graph.find_nodes(op="placeholder"):
            return None
        call = calls[0]
        results = []
        for node in graph.output_node().args[0]:
            contiguous = isinstance(node, fx.Node) and node.target is torch.ops.aten.contiguous.default
            item = node.args[0] if contiguous else node
            if not isinstance(item, fx.Node) or item.target is not operator.getitem or item.args[0] is not call:
                return None
            results.append((item.args[1], contiguous))
        return cls(call.args[2], call.args[1].target, tuple(results))

    def can(self, inputs: Sequence[object]) -> bool:
        """Whether nothing looks on that wants to see Python call the op: a tensor's own class, a mode, or a tracer."""
        if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
            return False
        if torch._C._len_torch_function_stack() > 0:
            return False
        return all(type(value) is Tensor for value in inputs)

    def __call__(self, network: nn.Module, inputs: Sequence[Tensor]) -> list[Tensor]:
        given = _C.run_program(inputs, network._buffers[self.constants], self.code)
        return [given[i].contiguous() if contiguous else given[i] for i, contiguous in self.results]
