"""From nodes to ops: which op computes each node, in which memory layout, from which packed weights.

One layout for the whole network: images are channels_last, converted where they come in and where they go out. A
convolution that reads what is not known to be channels_last has a conversion put before it, which costs nothing where
the memory is in order already.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn

from .. import functional
from ..decompositions import ACTIVATIONS
from . import nodes
from .actions import NCHW, NHWC, size_of
from .capture import Program, Uncapturable
from .match import arguments, match
from .patterns import BLOCK, PAIR
from .program import Part, is_float32_on_cpu, packed, parts, write

__all__ = ["Lowered", "lower"]

aten, ours = torch.ops.aten, torch.ops.sepconv_ext

# Read any memory; with these in their places a network does not care how its images lie.
_ANY_LAYOUT = {aten.view.default: aten.reshape.default, aten._unsafe_view.default: aten.reshape.default}
# Their results lie as their input does.
_SLICES = (aten.slice.Tensor, aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default, operator.getitem)
# These may write their result where their first argument was, if nobody reads that any more.
_IN_PLACE = {
    getattr(aten, name).default: getattr(aten, name + "_").default
    for name in ("relu", "hardtanh", "leaky_relu", "gelu", "silu", "hardswish", "sigmoid", "tanh", "hardsigmoid")
} | {aten.add.Tensor: aten.add_.Tensor, aten.mul.Tensor: aten.mul_.Tensor}


@dataclass
class Lowered:
    """The network as a module, and what became of each node that computes products.

    Attributes:
        module: an fx.GraphModule whose buffers are the packed constants.
        ops: by node of the rewritten program, the op that computes it.
        chains: (depthwise, pointwise) and (expand, depthwise, project) nodes that are one op.
        programs: the text of each run of nodes that is one call of the op `program`, with its nodes.
    """

    module: fx.GraphModule
    ops: dict[fx.Node, str] = field(default_factory=dict)
    chains: list[tuple[fx.Node, ...]] = field(default_factory=list)
    programs: list[tuple[str, Part]] = field(default_factory=list)


def lower(program: Program) -> Lowered:
    return _Lowering(program).run()


class _Lowering:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.graph = fx.Graph()
        self.root = nn.Module()
        self.new: dict[fx.Node, object] = {}  # by node of the program
        self.buffers: dict[tuple, fx.Node] = {}
        self.channels_last: set[fx.Node] = set()  # new nodes
        self.values: dict[fx.Node, object] = {}  # what a new node's value looks like
        self.ops: dict[fx.Node, str] = {}
        self.programs: list[tuple[str, Part]] = []
        self.lowerings: dict[Callable, Callable[[fx.Node, dict], fx.Node]] = {
            nodes.convolution: self._convolution,
            nodes.linear: self._linear,
            nodes.affine: self._affine,
            nodes.channel_norm: self._channel_norm,
            nodes.activate: lambda node, a: self._activate(self._of(a["input"]), a["activation"]),
            nodes.channel_shuffle: self._channel_shuffle,
            nodes.channels: self._channels,
        }

    def run(self) -> Lowered:
        found, order = parts(self.program)
        first = {part.nodes[0]: part for part in found}
        in_parts = {node for part in found for node in part.nodes}
        chains = {chain[-1]: chain for chain in _chains(self.program, in_parts)}
        inside = in_parts | {node for chain in chains.values() for node in chain[:-1]}
        for node in order:
            if node in first:
                self._part(first[node])
            if node.op == "get_attr" or node in inside:
                continue
            if node.op == "placeholder":
                self.new[node] = self.graph.placeholder(node.target)
            elif node.op == "output":
                self.graph.output(self._outputs(node))
                continue
            elif node in chains:
                self.new[node] = (self._pair if len(chains[node]) == 2 else self._block)(*chains[node])
            elif node.target in self.lowerings:
                self.new[node] = self.lowerings[node.target](node, arguments(node))
            else:
                self.new[node] = self._other(node)
            self.values[self.new[node]] = node.meta.get("val")
        _write_in_place(self.graph, self.values)
        self.graph.lint()
        module = fx.GraphModule(self.root, self.graph, "Network")
        return Lowered(module, self.ops, list(chains.values()), self.programs)

    # --- pieces ---

    def _call(self, target: Callable, *args: object, **kwargs: object) -> fx.Node:
        return self.graph.call_function(target, args, kwargs)

    def _of(self, node: object) -> object:
        """The new value of a node; a constant as a buffer."""
        if not isinstance(node, fx.Node):
            return node
        return self._buffer(node) if node.op == "get_attr" else self.new[node]

    def _buffer(self, node: fx.Node, how: str = "", pack: Callable[[Tensor], Tensor] = lambda t: t) -> fx.Node:
        """A constant as the network keeps it, rounded once."""
        key = (node.target, how)
        if key not in self.buffers:
            constant = self.program.constants[node.target]
            tensor = pack(constant.to(self.program.dtypes[node.target]))
            name = f"{node.target}_{how}" if how else node.target
            self.root.register_buffer(name, tensor.detach().clone())
            self.buffers[key] = self.graph.get_attr(name)
        return self.buffers[key]

    def _image(self, node: fx.Node) -> fx.Node:
        """The new value of an image, channels_last."""
        image = self._of(node)
        if image not in self.channels_last:
            image = self._call(aten.contiguous.default, image, memory_format=torch.channels_last)
            self.channels_last.add(image)
            self.values[image] = node.meta.get("val")
            if node.op != "get_attr":
                self.new[node] = image  # whoever reads it from now on reads it like this
        return image

    def _outputs(self, node: fx.Node) -> object:
        """Results lie in memory as the model's own do."""
        results = list(node.args[0])
        for i, (result, contiguous) in enumerate(zip(results, self.program.contiguous_outputs, strict=True)):
            value = self._of(result)
            image = isinstance(result, fx.Node) and result.op != "get_attr" and contiguous
            results[i] = self._call(aten.contiguous.default, value) if image else value
        return tuple(results)

    def _activate(self, input: fx.Node, activation: str) -> fx.Node:
        if activation == "identity":
            return input
        op, *more = ACTIVATIONS[activation]
        result = self._call(op, input, *more)
        self.values[result] = self.values.get(input)
        if input in self.channels_last:
            self.channels_last.add(result)
        return result

    def _finish(self, result: fx.Node, node: fx.Node, residual: fx.Node | None, activation: str) -> fx.Node:
        """Adds the residual and applies the activation in passes of their own."""
        self.values[result] = node.meta.get("val")
        if residual is not None:
            summed = self._call(aten.add.Tensor, result, residual)
            self.values[summed] = node.meta.get("val")
            if result in self.channels_last:
                self.channels_last.add(summed)
            result = summed
        return self._activate(result, activation)

    # --- nodes ---

    def _part(self, part: Part) -> None:
        """One call of the op `program`: it takes images as they lie, and gives them channels_last."""
        code, constants, results = write(self.program, part)
        name = f"constants_{len(self.programs)}"
        self.root.register_buffer(name, constants)
        inputs = [self._of(node) for node in part.inputs]
        call = self._call(ours.program.default, inputs, self.graph.get_attr(name), code)
        tensors: dict[int, fx.Node] = {}
        for node, index in results:
            if index in tensors:  # the same numbers with another rank
                size = [-1, *map(int, size_of(node)[1:])]
                self.new[node] = self._call(aten.reshape.default, tensors[index], size)
            else:
                self.new[node] = tensors[index] = self._call(operator.getitem, call, index)
            self.values[self.new[node]] = node.meta.get("val")
            if _is_image(node):
                self.channels_last.add(self.new[node])
        for node in part.nodes:
            if node.target in (nodes.convolution, nodes.linear):
                self.ops[node] = "program"
        self.programs.append((code, part))

    def _convolution(self, node: fx.Node, a: dict) -> fx.Node:
        input = self._image(a["input"])
        residual = None if a["residual"] is None else self._image(a["residual"])
        if residual is not None and _adds_residual(self.program, a):
            result = self._call(
                *(ours.conv2d_residual.default, input, self._filters(a["weight"], a["groups"]), self._of(a["bias"])),
                *(residual, a["stride"], a["padding"], a["dilation"], a["groups"], a["activation"]),
            )
            self.ops[node] = "conv2d_residual"
            self.channels_last.add(result)
            return result
        fused = "identity" if residual is not None else a["activation"]
        result = self._call(
            *(ours.conv2d.default, input, self._filters(a["weight"], a["groups"]), self._of(a["bias"]), a["stride"]),
            *(a["padding"], a["dilation"], a["groups"], fused, a["padding_mode"]),
        )
        self.ops[node] = "conv2d"
        self.channels_last.add(result)
        return self._finish(result, node, residual, "identity" if residual is None else a["activation"])

    def _filters(self, weight: fx.Node, groups: int) -> fx.Node:
        """Dense and grouped filters lie as torch's channels_last convolution reads them."""
        _, per_group, R, S = self.program.constants[weight.target].shape
        if per_group == 1 or R * S == 1:
            return self._buffer(weight)
        return self._buffer(weight, "nhwc", lambda t: t.contiguous(memory_format=torch.channels_last))

    def _pair(self, depthwise: fx.Node, pointwise: fx.Node) -> fx.Node:
        first, second = arguments(depthwise), arguments(pointwise)
        residual = None if second["residual"] is None else self._image(second["residual"])
        fused = "identity" if residual is not None else second["activation"]
        result = self._call(
            *(ours.separable_conv2d.default, self._image(first["input"]), self._of(first["weight"])),
            *(self._of(first["bias"]), self._of(second["weight"]), self._of(second["bias"])),
            *(first["stride"], first["padding"], first["dilation"], first["activation"], fused),
        )
        self.ops[depthwise] = self.ops[pointwise] = "separable_conv2d"
        self.channels_last.add(result)
        return self._finish(result, pointwise, residual, "identity" if residual is None else second["activation"])

    def _block(self, expand: fx.Node, depthwise: fx.Node, project: fx.Node) -> fx.Node:
        first, second, third = (arguments(node) for node in (expand, depthwise, project))
        own = third["residual"] is first["input"]  # else what is added comes from elsewhere, by itself
        residual = None if own or third["residual"] is None else self._image(third["residual"])
        fused = "identity" if residual is not None else third["activation"]
        weights = [self._of(a[part]) for a in (first, second, third) for part in ("weight", "bias")]
        result = self._call(
            *(ours.inverted_residual.default, self._image(first["input"]), *weights, None, None, None, None),
            *(second["stride"], second["padding"], second["dilation"], first["activation"], second["activation"]),
            *("identity", "sigmoid", fused, own),
        )
        self.ops |= dict.fromkeys((expand, depthwise, project), "inverted_residual")
        self.channels_last.add(result)
        return self._finish(result, project, residual, "identity" if residual is None else third["activation"])

    def _linear(self, node: fx.Node, a: dict) -> fx.Node:
        rows = self._linear_of_rows(node, a)
        if rows is not None:
            return rows
        result = self._call(aten.linear.default, self._of(a["input"]), self._of(a["weight"]), self._of(a["bias"]))
        residual = None if a["residual"] is None else self._of(a["residual"])
        return self._finish(result, node, residual, a["activation"])

    def _linear_of_rows(self, node: fx.Node, a: dict) -> fx.Node | None:
        """Of tokens [N, ..., C], each an image of one pixel: a product here, with its activation in registers."""
        weight, size = a["weight"], size_of(node)
        inner, values = size[1:-1], (node, a["input"])
        is_float32 = all(value.meta["val"].dtype == torch.float32 for value in values)
        is_static = all(isinstance(length, int) for length in inner)
        if weight.op != "get_attr" or len(size) < 3 or not is_static or not is_float32:
            return None
        if not is_float32_on_cpu(self.program):
            return None
        K, C = self.program.constants[weight.target].shape
        input = self._call(aten.reshape.default, self._of(a["input"]), [-1, C, 1, 1])
        fused = "identity" if a["residual"] is not None else a["activation"]
        result = self._call(
            *(ours.packed_pointwise.default, input, self._buffer(weight, "panels", packed), self._of(a["bias"]), None),
            *(K, [1, 1], fused),
        )
        result = self._call(aten.reshape.default, result, [-1, *inner, K])
        self.ops[node] = "packed_pointwise"
        residual = None if a["residual"] is None else self._of(a["residual"])
        return self._finish(result, node, residual, "identity" if residual is None else a["activation"])

    def _affine(self, node: fx.Node, a: dict) -> fx.Node:
        source, dim, rank = a["input"], a["dim"], len(size_of(node))
        norm = arguments(source) if source.target is nodes.channel_norm and len(source.users) == 1 else None
        if norm is not None and norm["dim"] == dim:
            return self._layer_norm(norm["input"], dim, norm["eps"], self._of(a["scale"]), self._of(a["shift"]))
        tail = [1] * (rank - 1 - dim)
        how = "" if not tail else f"by{len(tail)}"
        scale, shift = (self._buffer(a[name], how, lambda t: t.reshape(-1, *tail)) for name in ("scale", "shift"))
        input = self._of(source)
        result = self._call(aten.addcmul.default, shift, input, scale)
        if input in self.channels_last:
            self.channels_last.add(result)
        return result

    def _channel_shuffle(self, node: fx.Node, a: dict) -> fx.Node:
        result = self._call(aten.channel_shuffle.default, self._image(a["input"]), a["groups"])
        self.channels_last.add(result)
        return result

    def _channels(self, node: fx.Node, a: dict) -> fx.Node:
        input = self._of(a["input"])
        result = self._call(aten.slice.Tensor, input, 1, a["begin"], a["end"])
        if input in self.channels_last:
            self.channels_last.add(result)
        return result

    def _channel_norm(self, node: fx.Node, a: dict) -> fx.Node | None:
        (reader, *others) = node.users
        if not others and reader.target is nodes.affine and arguments(reader)["dim"] == a["dim"]:
            return None  # done by the scale and shift
        return self._layer_norm(a["input"], a["dim"], a["eps"], None, None)

    def _layer_norm(self, input: fx.Node, dim: int, eps: float, scale: object, shift: object) -> fx.Node:
        channels = int(size_of(input)[dim])
        if dim == len(size_of(input)) - 1:
            return self._call(aten.layer_norm.default, self._of(input), [channels], scale, shift, eps)
        pixels = self._call(aten.permute.default, self._image(input), NHWC)
        result = self._call(aten.layer_norm.default, pixels, [channels], scale, shift, eps)
        result = self._call(aten.permute.default, result, NCHW)
        self.channels_last.add(result)
        return result

    def _other(self, node: fx.Node) -> fx.Node:
        if node.target is aten.as_strided.default:
            raise Uncapturable("its forward reads memory by as_strided")
        args, kwargs = fx.map_arg((node.args, node.kwargs), self._of)
        result = self._call(_ANY_LAYOUT.get(node.target, node.target), *args, **kwargs)
        schema = getattr(node.target, "_schema", None)
        is_view = schema is not None and any(r.alias_info is not None for r in schema.returns)
        images = [n for n in node.all_input_nodes if _is_image(n)]
        lie = bool(images) and all(self._of(n) in self.channels_last for n in images)
        if node.target is operator.getitem:
            lie = self._of(node.args[0]) in self.channels_last
        if lie and (_is_image(node) or node.target in _SLICES) and (not is_view or node.target in _SLICES):
            self.channels_last.add(result)
        return result


def _is_image(node: fx.Node) -> bool:
    size = size_of(node)
    return size is not None and len(size) == 4


def _chains(program: Program, taken: set[fx.Node]) -> list[tuple[fx.Node, ...]]:
    """Blocks, and of what they leave the pairs, for which the plan has one kernel, at the example's size.

    A block is (expand, depthwise, project), a pair (depthwise, 1x1). None has a node of those `taken`."""
    found: list[tuple[fx.Node, ...]] = []
    taken = set(taken)
    for pattern, names, plan in (
        (BLOCK, ("expand", "depthwise"), _plan_of_block),
        (PAIR, ("depthwise",), _plan_of_pair),
    ):
        for node in program.graph.nodes:
            match_ = match(program, pattern, node)
            if match_ is None:
                continue
            chain = (*(match_[name] for name in names), node)
            products = [arguments(member) for member in chain]
            *_, depthwise, last = products
            strided = [a for a in products if a is not depthwise and set(a["stride"]) != {1}]
            if taken & set(chain) or strided or depthwise["padding_mode"] != "zeros" or last["residual"] in chain:
                continue
            if plan(program, *products).kernel != "composite":
                found.append(chain)
                taken |= set(chain)
    return found


def _adds_residual(program: Program, product: dict) -> bool:
    """Whether the plan has a kernel that adds the residual itself, at the example's size."""
    if product["padding_mode"] != "zeros":
        return False
    return functional.explain(
        *(_example(program, product), _made(program, product["weight"]), _made(program, product["bias"])),
        *(product["stride"], product["padding"], product["dilation"], product["groups"], product["activation"]),
        residual=True,
    ).adds_residual


def _plan_of_pair(program: Program, first: dict, second: dict):
    return functional.explain_separable(
        *(_example(program, first), _made(program, first["weight"]), _made(program, second["weight"])),
        *(_made(program, first["bias"]), _made(program, second["bias"])),
        *(first["stride"], first["padding"], first["dilation"]),
    )


def _plan_of_block(program: Program, first: dict, second: dict, third: dict):
    weights = [_made(program, a[part]) for a in (first, second, third) for part in ("weight", "bias")]
    place = (second["stride"], second["padding"], second["dilation"])
    residual = third["residual"] is first["input"]
    return functional.explain_inverted_residual(_example(program, first), *weights, *place, residual)


def _example(program: Program, product: dict) -> Tensor:
    """Memory as a product's input lies in it."""
    value, device = product["input"].meta["val"], program.constants[product["weight"].target].device
    return torch.empty(program.sizes(value), dtype=value.dtype, device=device, memory_format=torch.channels_last)


def _made(program: Program, node: fx.Node | None) -> Tensor | None:
    return None if node is None else program.constants[node.target].to(program.dtypes[node.target])


def _write_in_place(graph: fx.Graph, values: dict[fx.Node, object]) -> None:
    """relu(x) becomes relu_(x) where x is memory of the network's own that nobody reads any more."""
    order = {node: i for i, node in enumerate(graph.nodes)}

    def may_write(node: fx.Node, input: object) -> bool:
        if not isinstance(input, fx.Node) or not _owns_memory(input) or node.args.count(input) != 1:
            return False
        if any(order[user] > order[node] or not _owns_memory(user) for user in input.users):
            return False
        before, after = values.get(input), values.get(node)
        if not (isinstance(before, Tensor) and isinstance(after, Tensor)) or before.dtype != after.dtype:
            return False
        same_rank = len(before.shape) == len(after.shape)
        return same_rank and all(str(m) == str(n) for m, n in zip(before.shape, after.shape, strict=True))

    for node in graph.nodes:
        if node.target not in _IN_PLACE:
            continue
        commutes = node.target in (aten.add.Tensor, aten.mul.Tensor) and not node.kwargs and len(node.args) == 2
        if commutes and not may_write(node, node.args[0]) and may_write(node, node.args[1]):
            node.args = node.args[::-1]
        if may_write(node, node.args[0]):
            node.target = _IN_PLACE[node.target]


def _owns_memory(node: fx.Node) -> bool:
    """Whether an op's result is fresh memory."""
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None or node.target in (aten.dropout.default, aten.expand.default):
        return False
    if schema.is_mutable:  # written in place by this very pass: the memory was the network's own
        return True
    return all(result.alias_info is None for result in schema.returns) and len(schema.returns) == 1
