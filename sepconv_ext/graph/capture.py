"""From a module to a graph of aten ops, by torch.export: sizes stay symbols wherever the model lets them."""

from __future__ import annotations

import contextlib
import inspect
import math
import operator
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind, OutputKind
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from .signature import Input, Signature

if TYPE_CHECKING:
    import sympy  # half a second, which only a capture takes

__all__ = ["Program", "Uncapturable", "capture"]

_CONSTANT_KINDS = ("inputs_to_parameters", "inputs_to_buffers", "inputs_to_lifted_tensor_constants")


class Uncapturable(Exception):
    """Why a module has no graph that could be frozen."""


class _Aliased(Uncapturable):
    """It writes to memory that is read in several ways."""


@dataclass
class Program:
    """A graph of a network, and the tensors that it is made with.

    Attributes:
        graph: its `get_attr` nodes name constants; sizes of all tensors stand in `node.meta["val"]`.
        constants: by name. What was computed from the model's own tensors is kept in float64 until it is packed.
        dtypes: what each constant is rounded to then.
        signature: the arguments that it takes, a placeholder for each leaf of them.
        out_spec: how the model's results nest.
        contiguous_outputs: for each result, whether the model itself gives an image in torch's default layout.
        example: the size that each symbol has in the example that the user gave.
    """

    graph: fx.Graph
    constants: dict[str, Tensor]
    dtypes: dict[str, torch.dtype]
    signature: Signature
    out_spec: pytree.TreeSpec
    contiguous_outputs: list[bool] = field(default_factory=list)
    example: dict[sympy.Symbol, sympy.Integer] = field(default_factory=dict)

    def sizes(self, value: Tensor) -> list[int]:
        """The sizes that a value of `node.meta["val"]` has for the example."""
        return [n if isinstance(n, int) else self._size(n) for n in value.shape]

    def _size(self, size: torch.SymInt) -> int:
        known = size.node.expr.xreplace(self.example)
        return int(known) if known.is_number else int(size)

    def constant(self, node: object) -> Tensor | None:
        """The tensor of a node that is a constant; floating-point ones in float64."""
        if not isinstance(node, fx.Node) or node.op != "get_attr":
            return None
        tensor = self.constants[node.target]
        return tensor.double() if tensor.is_floating_point() else tensor

    def add_constant(self, tensor: Tensor, dtype: torch.dtype, hint: str) -> fx.Node:
        """A node for a new constant, at the graph's start."""
        name, count = hint, 0
        while name in self.constants:
            count += 1
            name = f"{hint}_{count}"
        self.constants[name], self.dtypes[name] = tensor, dtype
        with self.graph.inserting_before(next(iter(self.graph.nodes))):
            node = self.graph.create_node("get_attr", name)
        node.meta["val"] = torch.empty(tensor.shape, dtype=dtype, device="meta")
        return node


def capture(model: nn.Module, arguments: tuple, dynamic_batch: bool = True) -> Program:
    """The graph of a model in eval(). Raises Uncapturable with torch.export's own words."""
    problem, names, flat = None, _names(model), pytree.tree_leaves((arguments, {}))
    for example, spatial in _examples(arguments, dynamic_batch):
        sizes = pytree.tree_map(partial(_dynamic_sizes, batch=dynamic_batch, spatial=spatial), example)
        star = next((i for i, name in enumerate(names) if name.startswith("*")), len(sizes))
        sizes = sizes if star >= len(sizes) else (*sizes[:star], sizes[star:])  # as torch.export nests *args
        try:
            limit = _FewConditions() if spatial else contextlib.nullcontext()
            with torch.no_grad(), limit, torch.fx.experimental._config.patch(backed_size_oblivious=True):
                exported = torch.export.export(model, example, dynamic_shapes=sizes, strict=False)
        except Exception as error:
            problem = problem or error
            continue
        if branch := _branch_on_one(exported):
            problem = problem or Uncapturable(f"its forward asks whether sizes are 1 ({branch})")
            continue
        try:
            program = _program(exported, names)
        except _Aliased:
            program = _program(exported.run_decompositions({}), names)
        try:
            program.signature.check(flat)
        except RuntimeError as error:  # the model goes another way, or takes a number of images for given
            problem = problem or error
            continue
        if example is not arguments and not _goes_the_same_way(model, exported, arguments):
            problem = problem or Uncapturable("its forward goes another way for larger examples")
            continue
        program.example = _sizes_of(program, flat)
        if dynamic_batch:
            _decide_about_no_images(model, exported, arguments, program.signature)
        return program
    raise Uncapturable(f"{type(problem).__name__}: {_first_line(problem)}")


def _examples(arguments: tuple, dynamic_batch: bool) -> Iterator[tuple[tuple, bool]]:
    """What to capture with, best first, and whether height and width may change.

    torch.export takes some sizes of 1 for constants, also those inside the network. So it is shown two images instead
    of one, and small ones larger, in both directions by the same factor. Any number of images comes before any size.
    """
    leaves = [leaf for leaf in pytree.tree_leaves(arguments) if isinstance(leaf, Tensor) and leaf.dim()]
    several = arguments
    if dynamic_batch and leaves and leaves[0].shape[0] == 1:
        several = pytree.tree_map(lambda leaf: _grown(leaf, (0,), 2) if _is_one(leaf) else leaf, arguments)
    sides = [n for leaf in leaves if leaf.dim() == 4 for n in leaf.shape[2:] if n]
    factor = 1 << max(0, math.ceil(math.log2(_LARGE / min(sides, default=_LARGE))))
    if factor > 1:
        large = pytree.tree_map(lambda leaf: _grown(leaf, (2, 3), factor) if _is_image(leaf) else leaf, several)
        yield large, True
    for example in (several, arguments) if several is not arguments else (arguments,):
        yield example, True
        yield example, False


_LARGE = 224  # pixels a side, which no usual network makes one pixel of


def _is_one(leaf: object) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == 1


def _is_image(leaf: object) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() == 4


def _grown(tensor: Tensor, dims: Sequence[int], factor: int) -> Tensor:
    """Memory of the tensor's kind and format, larger in some dimensions; nobody reads what is in it."""
    size = [n * factor if dim in dims else n for dim, n in enumerate(tensor.shape)]
    last = tensor.dim() == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)
    format = torch.channels_last if last else torch.contiguous_format
    return torch.empty(size, dtype=tensor.dtype, device=tensor.device, memory_format=format)


def _sizes_of(program: Program, flat: Sequence) -> dict[sympy.Symbol, sympy.Integer]:
    """What each symbol among the sizes of the graph's inputs is for these tensors."""
    from sympy import Integer

    inputs = [node for node in program.graph.nodes if node.op == "placeholder"]
    pairs = (
        pair
        for node, leaf in zip(inputs, flat, strict=True)
        if isinstance(leaf, Tensor)
        for pair in zip(node.meta["val"].shape, leaf.shape, strict=True)
    )
    return {n.node.expr: Integer(size) for n, size in pairs if isinstance(n, torch.SymInt) and n.node.expr.is_symbol}


class _FewConditions(TorchFunctionMode):
    """Ends a capture whose sizes hang together in too many ways, as where attention cuts images into windows.

    torch.export would go on for minutes, and the result would hardly take other sizes.
    """

    most = 64  # conditions: edgenext has 11, mobilevit 43
    longest = 32  # operations in one: mobilevit and swin go beyond

    def __init__(self) -> None:
        super().__init__()
        self.shapes: object = None
        self.seen = 0

    def __torch_function__(self, function: Callable, types: object, args: tuple = (), kwargs: dict | None = None):
        if self.shapes is None:
            sizes = [n for arg in args if isinstance(arg, Tensor) for n in arg.shape]
            self.shapes = next((n.node.shape_env for n in sizes if isinstance(n, torch.SymInt)), None)
        else:
            guards = self.shapes.guards
            new, self.seen = guards[self.seen :], len(guards)
            if len(guards) > self.most or any(guard.expr.count_ops() > self.longest for guard in new):
                raise Uncapturable("its sizes depend on each other in too many ways")
        return function(*args, **(kwargs or {}))


def _branch_on_one(exported: torch.export.ExportedProgram) -> str | None:
    """Where the model itself, and not torch, asks whether some expression of sizes is 1. `_conditions` cannot tell."""
    values = (node.meta.get("val") for node in exported.graph.nodes if node.op == "placeholder")
    sizes = (n for value in values if isinstance(value, Tensor) for n in value.shape)
    shapes = next((n.node.shape_env for n in sizes if isinstance(n, torch.SymInt)), None)
    for guard in shapes.guards if shapes is not None else ():
        # The innermost one outside of the symbols' own machinery. A torch that does not tell it: as if the model asked.
        frame = getattr(getattr(guard, "sloc", None), "framework_loc", None)
        if 1 in guard.expr.args and not getattr(frame, "filename", "").startswith(_NOT_THE_MODEL):
            return f"{guard.expr}, {frame}"
    return None


_NOT_THE_MODEL = (str(Path(torch.__file__).parent), str(Path(__file__).parent.parent))


def _goes_the_same_way(model: nn.Module, exported: torch.export.ExportedProgram, arguments: tuple) -> bool:
    """Whether what was captured with a larger example computes what the model does of the user's own.

    Branches that are settled by sizes above 1 leave no condition behind.
    """
    leaves = iter(pytree.tree_leaves((arguments, {})))
    tensors = {**exported.state_dict, **exported.constants}
    values = [
        next(leaves) if spec.kind is InputKind.USER_INPUT else tensors[spec.target]
        for spec in exported.graph_signature.input_specs
    ]
    with torch.no_grad():
        captured = pytree.tree_leaves(fx.Interpreter(exported.graph_module).run(*values))
        own = pytree.tree_leaves(model(*arguments))
    return len(captured) == len(own) and all(map(_is_close, captured, own))


_BATCH = re.compile(r"L(\['\w+'\]|\[\d+\])+\.size\(\)\[0\]")


def _decide_about_no_images(
    model: nn.Module, exported: torch.export.ExportedProgram, arguments: tuple, signature: Signature
) -> None:
    """Whether the network takes an empty batch. torch.export has asked itself whether sizes are 0, or has not, when it
    captured: only the model can say what it does."""

    def without_images(leaf: object) -> object:
        return leaf.new_empty((0, *leaf.shape[1:])) if isinstance(leaf, Tensor) and leaf.dim() else leaf

    empty = pytree.tree_map(without_images, arguments)
    try:
        same = _goes_the_same_way(model, exported, empty)
    except Exception:  # it has no answer for none, as a view of [0, -1]
        same = False
    if not same:
        signature.inputs = [input.of_at_least_one() for input in signature.inputs]
        return
    broken = signature.broken(pytree.tree_leaves((empty, {})))
    for i, guard in enumerate(signature.guards):
        batch = _BATCH.search(guard)
        if guard in broken and batch is not None:
            signature.guards[i] = f"({guard}) or {batch[0]} == 0"


def _is_close(a: object, b: object) -> bool:
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return a == b
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-3, atol=1e-5, equal_nan=True)


def _dynamic_sizes(leaf: object, batch: bool, spatial: bool) -> dict | None:
    """Which sizes of an example may change: the first, and an image's height and width."""
    if not isinstance(leaf, Tensor):
        return None
    dims = ([0] if batch else []) + (list(range(2, leaf.dim())) if spatial else [])
    return {dim: torch.export.Dim.AUTO for dim in dims if dim < leaf.dim()}


def _first_line(error: Exception | None) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")


def _program(exported: torch.export.ExportedProgram, names: list[str]) -> Program:
    signature = exported.graph_signature
    kinds = {spec.kind for spec in signature.output_specs}
    if kinds - {OutputKind.USER_OUTPUT}:
        raise Uncapturable("its forward writes to its own buffers or to its input")
    graph = fx.Graph()
    graph.output(_copied(graph, exported.graph_module, {}))
    tensors = {**exported.state_dict, **exported.constants}
    where = {key: target for kind in _CONSTANT_KINDS for key, target in getattr(signature, kind).items()}
    guards, torchs = _conditions(exported)
    program = Program(
        *(graph, {}, {}, Signature(exported.call_spec.in_spec, [], guards, names)),
        out_spec=exported.call_spec.out_spec,
        contiguous_outputs=[_is_contiguous_image(result) for result in next(iter(reversed(graph.nodes))).args[0]],
    )
    for node in list(graph.nodes):
        if node.op == "placeholder" and node.target in where:
            _to_constant(program, node, where[node.target], tensors[where[node.target]])
        elif node.op == "placeholder":
            program.signature.inputs.append(_input(node, exported, torchs))
        elif node.op == "get_attr":
            raise Uncapturable("its forward has control flow that depends on values (a branch or loop as an op)")
    _remove_mutation(program)
    return program


def _copied(graph: fx.Graph, module: fx.GraphModule, known: dict[fx.Node, fx.Node]) -> object:
    """Appends a module's graph, without its end, and returns that. Regions that have no influence here become plain
    calls: those that switch gradients on or off, and those that switch autocast off."""
    for node in module.graph.nodes:
        if node in known:
            continue
        if node.op == "output":
            return fx.map_arg(node.args[0], known.__getitem__)
        is_body = node.op == "get_attr" and isinstance(getattr(module, node.target, None), fx.GraphModule)
        if is_body and all(_region(user) is not None for user in node.users):
            continue  # it is put where it is called
        inside = _region(node)
        if inside is not None:
            body = getattr(module, inside[0].target)
            inputs = (n for n in body.graph.nodes if n.op == "placeholder")
            given = dict(zip(inputs, (known[operand] for operand in inside[1:]), strict=True))
            known[node] = _copied(graph, body, given)
        elif node.target is operator.getitem and isinstance(known[node.args[0]], (tuple, list)):
            known[node] = known[node.args[0]][node.args[1]]
        else:
            known[node] = graph.node_copy(node, known.__getitem__)
    raise AssertionError("a graph without an end")


def _region(node: fx.Node) -> tuple | None:
    """The body and the operands of a region without influence."""
    if node.target is torch.ops.higher_order.wrap_with_set_grad_enabled:
        return node.args[1:]
    if node.target is torch.ops.higher_order.wrap_with_autocast and not node.args[2]:
        return node.args[4:]
    return None


_ONE = re.compile(r" (!=|>) 1$")


def _conditions(exported: torch.export.ExportedProgram) -> tuple[list[str], list[str]]:
    """What the model's own branches demand of the inputs' sizes; and what torch does besides.

    That is whether a size is 1: it decides nothing but memory layouts and broadcasting, which each op finds out itself.
    """
    if not hasattr(exported, "_guards_code"):
        raise Uncapturable(f"torch {torch.__version__} does not tell for which sizes its graph holds")
    guards = [guard for guard in exported._guards_code if not guard.startswith("1 < ")]  # not empty
    return [guard for guard in guards if not _ONE.search(guard)], [guard for guard in guards if _ONE.search(guard)]


def _names(model: nn.Module) -> list[str]:
    parameters = inspect.signature(model.forward).parameters.values()
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    return [stars.get(parameter.kind, "") + parameter.name for parameter in parameters]


def _is_contiguous_image(result: object) -> bool:
    value = result.meta.get("val") if isinstance(result, fx.Node) else None
    return isinstance(value, Tensor) and value.dim() >= 4 and value.is_contiguous()


def _to_constant(program: Program, node: fx.Node, target: str, tensor: Tensor) -> None:
    name = re.sub(r"\W", "_", target)
    if name not in program.constants:
        program.constants[name], program.dtypes[name] = tensor.detach(), tensor.dtype
    with program.graph.inserting_before(node):
        constant = program.graph.create_node("get_attr", name)
    constant.meta = node.meta
    node.replace_all_uses_with(constant)
    program.graph.erase_node(node)


def _input(node: fx.Node, exported: torch.export.ExportedProgram, torchs: list[str]) -> Input:
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        arguments = [spec.arg for spec in exported.graph_signature.input_specs if spec.arg.name == node.target]
        return Input(node.target, value=getattr(arguments[0], "value", value))
    ranges = [_range(n, exported.range_constraints) for n in value.shape]
    for dim, (low, high) in enumerate(ranges):  # where torch asks, the least size comes of that; guards say the model's
        if low < high and any(f".size()[{dim}]" in guard for guard in torchs):
            ranges[dim] = 0, high
    return Input(node.target, tuple(ranges))


def _range(size: int | torch.SymInt, ranges: dict) -> tuple[int, float]:
    """torch.export may start from 2 on, since it tells a size of 1 apart; the graph itself does not mind."""
    from torch.utils._sympy.numbers import int_oo

    if isinstance(size, int):
        return size, size
    known = ranges.get(size.node.expr)
    if known is None:
        return 0, math.inf
    highest = math.inf if known.upper == int_oo else int(known.upper)
    return (0 if known.lower <= 2 else int(known.lower)), highest


# --- in-place ops become plain ones ---


def _remove_mutation(program: Program) -> None:
    """relu_(x) is relu(x), and whoever read x behind it reads that.

    Raises _Aliased where somebody reads the same memory in another way (a view of it). torch.export's own
    functionalisation sees those too, but takes several times as long as the rest of the capture.
    """
    graph = program.graph
    order = {node: i for i, node in enumerate(graph.nodes)}
    memory: dict[fx.Node, fx.Node] = {}  # the node that made the memory that a node's tensor lies in
    for node in list(graph.nodes):
        memory[node] = node
        schema = getattr(node.target, "_schema", None)
        if node.op != "call_function" or schema is None:
            if node.op == "call_function" and node.args and isinstance(node.args[0], fx.Node):  # getitem
                memory[node] = memory[node.args[0]]
            continue
        if not schema.is_mutable:
            first = node.args[0] if node.args else None
            if isinstance(first, fx.Node) and (_may_view(schema) or node.target is torch.ops.aten.dropout.default):
                memory[node] = memory[first]
            continue
        plain = _plain(node.target)
        written = node.args[0]
        if plain is None:
            raise Uncapturable(f"its forward writes in place by {node.target}")
        if written.op == "get_attr":
            raise Uncapturable(f"its forward writes to its own {written.target}")
        for reader in memory:
            others = reader is not written and memory[reader] is memory[written]
            if others and any(order[user] > order[node] for user in reader.users):
                raise _Aliased(f"its forward writes by {node.target} to memory of which it also reads views")
        node.target = plain
        for user in [user for user in written.users if order[user] > order[node]]:
            user.replace_input_with(written, node)


def _may_view(schema: torch.FunctionSchema) -> bool:
    return any(result.alias_info is not None for result in schema.returns)


def _plain(op: torch._ops.OpOverload) -> torch._ops.OpOverload | None:
    """aten.relu.default of aten.relu_.default."""
    name = op._schema.name.split("::")[1]
    if not name.endswith("_") or op.namespace != "aten":
        return None
    packet = getattr(torch.ops.aten, name[:-1], None)
    return getattr(packet, op._overloadname, None) if packet is not None else None
