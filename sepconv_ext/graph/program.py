"""Which nodes of a network become one call of the op `program`, and the text and the constants of that call.

The steps stand in csrc/cpu/network/steps.cpp. Values are images whose channels are dense, or matrices [N, C]; a matrix
is an image of one pixel, so that what only turns one into the other is no step at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from . import nodes
from .actions import same_number, same_size, size_of
from .capture import Program
from .match import arguments

__all__ = ["Part", "parts", "write"]

aten, ours = torch.ops.aten, torch.ops.sepconv_ext

MOST_READS = 8  # values that a step may read
LINE = 16  # constants begin at multiples of so many: a cache line


@dataclass
class Part:
    """Nodes that become one call.

    Attributes:
        inputs: what they read from outside.
        outputs: those of them that somebody reads outside.
    """

    nodes: list[fx.Node]
    inputs: list[fx.Node] = field(default_factory=list)
    outputs: list[fx.Node] = field(default_factory=list)


# --- which nodes ---


def parts(program: Program) -> tuple[list[Part], list[fx.Node]]:
    """The largest parts of a network that the op can take, and all nodes in an order that has each part in one place.

    A part is connected, and no way leads out of it and back into it: along each way, nodes that can be taken and nodes
    that cannot alternate in levels, and a part has nodes of one level.
    """
    order = {node: i for i, node in enumerate(program.graph.nodes)}
    if not is_float32_on_cpu(program):
        return [], list(order)
    taken = {node for node in program.graph.nodes if _can_take(program, node)}
    level: dict[fx.Node, int] = {}
    for node in program.graph.nodes:
        before = [level[source] + ((source in taken) != (node in taken)) for source in _sources(node)]
        level[node] = max(before, default=int(node in taken))
    found = [Part(members) for members in _connected(taken, level)]
    for part in found:
        members = set(part.nodes)
        sources = (source for node in part.nodes for source in _sources(node) if source not in members)
        part.inputs = list(dict.fromkeys(sources))
        part.outputs = [node for node in part.nodes if any(user not in members for user in node.users)]
    by_level = sorted(order, key=lambda node: (node.op == "output", level[node], order[node]))
    return [part for part in found if _is_worth_it(part)], by_level


def is_float32_on_cpu(program: Program) -> bool:
    inputs = [node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"]
    tensors = [value for value in inputs if isinstance(value, Tensor)] + list(program.constants.values())
    return all(tensor.device == torch.device("cpu") for tensor in tensors)


def _can_take(program: Program, node: fx.Node) -> bool:
    if node.op != "call_function" or node.target not in STEPS:
        return False
    values = [node, *_sources(node)]
    return all(_is_value(value) for value in values) and STEPS[node.target].fits(program, node, arguments(node))


def _is_value(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dtype == torch.float32 and value.dim() in (2, 4)


def _sources(node: fx.Node) -> list[fx.Node]:
    """The nodes that are read, but for constants."""
    return [source for source in node.all_input_nodes if source.op != "get_attr"]


def _connected(taken: set[fx.Node], level: dict[fx.Node, int]) -> Iterator[list[fx.Node]]:
    """The nodes of one level that hang together, in the graph's order."""
    of: dict[fx.Node, list[fx.Node]] = {}
    for node in level:
        if node not in taken:
            continue
        of[node] = [node]
        for source in _sources(node):
            if source in taken and level[source] == level[node] and of[source] is not of[node]:
                joined = of[source] + of[node]
                for member in joined:
                    of[member] = joined
    order = {node: i for i, node in enumerate(level)}
    seen = {id(members): members for members in of.values()}
    return (sorted(members, key=order.__getitem__) for members in seen.values())


def _is_worth_it(part: Part) -> bool:
    """A call for one layer alone has nothing over that layer's own op, unless that is a product."""
    kinds = [STEPS[node.target].kind(node) for node in part.nodes]
    weighty = sum(kind in ("product", "conv", "depthwise", "grouped") for kind in kinds)
    return "product" in kinds or (weighty > 0 and len([kind for kind in kinds if kind]) > 1)


# --- their text ---


def write(program: Program, part: Part) -> tuple[str, Tensor, list[tuple[fx.Node, int]]]:
    """The text of a part, its constants, and for each of its outputs which result it is.

    Two outputs may be one result: an image of one pixel, and the matrix of the same numbers.
    """
    writer = Writer(program, set(part.nodes))
    for node in part.inputs:
        writer.values[node] = writer.line("input", rank_of(node))
    for node in part.nodes:
        writer.values[node] = STEPS[node.target].write(writer, node, arguments(node))
    results: dict[int, int] = {}
    returned, where = [], []
    inputs = {writer.values[node] for node in part.inputs}
    for node in part.outputs:
        value = writer.values[node]
        if value in inputs:
            value = writer.line("activate", value, act="identity")
        if value not in results:
            results[value] = len(results)
            returned.append(f"%{value} {rank_of(node)}")
        where.append((node, results[value]))
    code = "\n".join([*writer.lines, f"return {' '.join(returned)}"])
    return code, torch.cat(writer.pieces) if writer.pieces else torch.zeros(0), where


def rank_of(node: fx.Node) -> str:
    return "image" if len(size_of(node)) == 4 else "matrix"


class Writer:
    """Lines and constants while they are gathered.

    Attributes:
        values: the number of each node's value.
    """

    def __init__(self, program: Program, members: set[fx.Node]) -> None:
        self.program = program
        self.members = members
        self.values: dict[fx.Node, int] = {}
        self.lines: list[str] = []
        self.pieces: list[Tensor] = []
        self.offsets: dict[tuple[str, str], int] = {}
        self.end = 0

    def line(self, kind: str, *operands: object, **fields: object) -> int:
        words = [f"%{operand}" if isinstance(operand, int) else str(operand) for operand in operands]
        words += [f"{name}={value}" for name, value in fields.items() if value is not None]
        number = len(self.lines)
        self.lines.append(" ".join([f"%{number} =", kind, *words]))
        return number

    def constant(
        self, node: fx.Node | None, how: str = "", pack: Callable[[Tensor], Tensor] = lambda t: t
    ) -> int | None:
        """The offset of a constant, packed, rounded once; None for None."""
        if node is None:
            return None
        key = (node.target, how)
        if key not in self.offsets:
            constant = self.program.constants[node.target].to(self.program.dtypes[node.target])
            flat = pack(constant).reshape(-1).to(torch.float32)
            self.offsets[key] = self.end
            self.pieces.append(torch.nn.functional.pad(flat, (0, -flat.numel() % LINE)))
            self.end += self.pieces[-1].numel()
        return self.offsets[key]


def packed(weight: Tensor) -> Tensor:
    """[K, C, R, S] as the panels of a product over windows [R, S, C]."""
    K = weight.shape[0]
    matrix = weight.permute(0, 2, 3, 1).reshape(K, -1) if weight.dim() == 4 else weight
    return ours.pack_pointwise(matrix[:, :, None, None])


def packed_taps(weight: Tensor) -> Tensor:
    """[C, C / groups, R, S] as [ceil(C / 16), R, S, C / groups, 16] (csrc/cpu/depthwise/depthwise_rows.h)."""
    C, *per_output = weight.shape
    padded = torch.nn.functional.pad(weight, (0, 0, 0, 0, 0, 0, 0, -C % 16))
    return padded.reshape(-1, 16, *per_output).permute(0, 3, 4, 2, 1)


def act(name: str) -> str | None:
    return None if name == "identity" else name


def by(numbers: object) -> str | None:
    """3x3; None for what is so unless it is said."""
    return None if set(numbers) == {1} else "x".join(map(str, numbers))


def sides(padding: object) -> str | None:
    """Top, bottom, left, right."""
    padding = list(padding)
    four = padding if len(padding) == 4 else [padding[0], padding[0], padding[-1], padding[-1]]
    return "x".join(map(str, four)) if any(four) else None


# --- the steps ---


class _Step:
    """What a target becomes. `kind` names the step that it costs, "" for what costs none."""

    def kind(self, node: fx.Node) -> str:
        return "pixels"

    def fits(self, program: Program, node: fx.Node, a: dict) -> bool:
        return True

    def write(self, w: Writer, node: fx.Node, a: dict) -> int:
        raise NotImplementedError


class _Convolution(_Step):
    def kind(self, node: fx.Node) -> str:
        a = arguments(node)
        if a["groups"] > 1:
            return "depthwise" if size_of(a["weight"])[1] == 1 else "grouped"
        taps = [int(n) for n in size_of(a["weight"])[2:]]
        return "product" if taps == [1, 1] and not any(a["padding"]) else "conv"

    def fits(self, program: Program, node: fx.Node, a: dict) -> bool:
        K, per_group = (int(n) for n in size_of(a["weight"])[:2])
        as_many = per_group * a["groups"] == K and (per_group in (1, 2, 4, 8) or per_group % 16 == 0)
        residual = a["residual"] is None or same_size(node, a["residual"])
        return a["padding_mode"] == "zeros" and (a["groups"] == 1 or as_many) and residual

    def write(self, w: Writer, node: fx.Node, a: dict) -> int:
        kind, weight, value = self.kind(node), a["weight"], w.values[a["input"]]
        common = dict(
            bias=w.constant(a["bias"]),
            kernel=by(size_of(weight)[2:]),
            stride=by(a["stride"]),
            dilation=by(a["dilation"]),
            padding=sides(a["padding"]),
        )
        residual = None if a["residual"] is None else w.values[a["residual"]]
        activation = act(a["activation"])
        if kind in ("depthwise", "grouped"):
            common["weight"] = w.constant(weight, "taps", packed_taps)
            groups = a["groups"] if kind == "grouped" else None
            result = w.line(kind, value, groups=groups, **common, act=activation if residual is None else None)
            return result if residual is None else w.line("add", result, residual, act=activation)
        K = size_of(weight)[0]
        added = None if residual is None else f"%{residual}"
        return w.line(
            kind, value, weight=w.constant(weight, "panels", packed), **common, K=K, residual=added, act=activation
        )


class _Linear(_Step):
    def kind(self, node: fx.Node) -> str:
        return "product"

    def fits(self, program: Program, node: fx.Node, a: dict) -> bool:
        return len(size_of(node)) == 2 and (a["residual"] is None or same_size(node, a["residual"]))

    def write(self, w: Writer, node: fx.Node, a: dict) -> int:
        weight, residual = a["weight"], a["residual"]
        return w.line(
            *("product", w.values[a["input"]]),
            weight=w.constant(weight, "panels", packed),
            bias=w.constant(a["bias"]),
            K=size_of(weight)[0],
            residual=None if residual is None else f"%{w.values[residual]}",
            act=act(a["activation"]),
        )


class _Affine(_Step):
    def fits(self, program: Program, node: fx.Node, a: dict) -> bool:
        return a["dim"] == 1

    def write(self, w: Writer, node: fx.Node, a: dict) -> int:
        scale, shift, source = w.constant(a["scale"]), w.constant(a["shift"]), a["input"]
        if source in w.members and source.target is nodes.channel_norm and _is_finished_by_affine(source):
            norm = arguments(source)
            return w.line("layer_norm", w.values[norm["input"]], weight=scale, bias=shift, eps=repr(norm["eps"]))
        return w.line("affine", w.values[source], weight=scale, bias=shift)


def _is_finished_by_affine(norm: fx.Node) -> bool:
    (reader, *others) = norm.users
    return not others and reader.target is nodes.affine and arguments(reader)["dim"] == 1


class _ChannelNorm(_Step):
    def fits(self, program: Program, node: fx.Node, a: dict) -> bool:
        return a["dim"] == 1

    def write(self, w: Writer, node: fx.Node, a: dict) -> int:
        (reader, *_) = node.users
        if reader in w.members and _is_finished_by_affine(node):
            return -1  # the scale and shift does it
        return w.line("layer_norm", w.values[a["input"]], eps=repr(a["eps"]))


class _Activate(_Step):
    def write(self, w: Writer, node: fx.Node, a: dict) -> int:
        return w.line("activate", w.values[a["input"]], act=a["activation"])


class _HardSigmoid(_Step):
    def write(self, w: Writer, node: fx.Node, a: dict) -> int:
        return w.line("clamp", w.values[node.args[0]], factor=repr(1 / 6), shift="0.5", low="0", high="1")


class _Binary(_Step):
    """Of values of one size; or a factor for each channel of an image."""

    def __init__(self, name: str) -> None:
        self.name = name

    def _gate(self, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
        """(image, gate) of a product with one number a channel."""
        first, second = node.args[:2]
        if self.name != "mul":
            return None
        for image, gate in ((first, second), (second, first)):
            if len(size_of(image)) != 4 or len(size_of(gate)) != 4 or not same_size(node, image):
                continue
            if list(size_of(gate)[1:]) == [size_of(image)[1], 1, 1] and same_batch(image, gate):
                return image, gate
        return None

    def fits(self, program: Program, node: fx.Node, a: dict) -> bool:
        operands = node.args[:2]
        if not all(isinstance(operand, fx.Node) and operand.op != "get_attr" for operand in operands):
            return False
        if a.get("alpha", 1) != 1:
            return False
        return all(same_size(node, operand) for operand in operands) or self._gate(node) is not None

    def write(self, w: Writer, node: fx.Node, a: dict) -> int:
        if all(same_size(node, operand) for operand in node.args[:2]):
            return w.line(self.name, *(w.values[operand] for operand in node.args[:2]))
        return w.line("gate", *(w.values[operand] for operand in self._gate(node)))


def same_batch(a: fx.Node, b: fx.Node) -> bool:
    return same_number(size_of(a)[0], size_of(b)[0])


class _Mean(_Step):
    """Over all pixels of an image."""

    def fits(self, program: Program, node: fx.Node, a: dict) -> bool:
        if len(size_of(node.args[0])) != 4:
            return False
        if node.target is aten.adaptive_avg_pool2d.default:
            return all(n == 1 for n in a["output_size"])
        return a["dtype"] is None and a["dim"] is not None and sorted(d % 4 for d in a["dim"]) == [2, 3]

    def write(self, w: Writer, node: fx.Node, a: dict) -> int:
        return w.line("mean", w.values[node.args[0]])


class _SamePixels(_Step):
    """An image of one pixel becomes a matrix, or the other way round."""

    def kind(self, node: fx.Node) -> str:
        return ""

    def fits(self, program: Program, node: fx.Node, a: dict) -> bool:
        before, after = size_of(node.args[0]), size_of(node)
        one_pixel = all(list(size[2:]) in ([], [1, 1]) for size in (before, after))
        return one_pixel and before[1] == after[1] and isinstance(after[1], int) and same_batch(node.args[0], node)

    def write(self, w: Writer, node: fx.Node, a: dict) -> int:
        return w.values[node.args[0]]


class _Channels(_Step):
    def write(self, w: Writer, node: fx.Node, a: dict) -> int:
        return w.line("slice", w.values[a["input"]], begin=a["begin"], K=a["end"] - a["begin"])


class _Concatenation(_Step):
    def fits(self, program: Program, node: fx.Node, a: dict) -> bool:
        parts = a["tensors"]
        return a["dim"] == 1 and all(part.op != "get_attr" for part in parts)

    def write(self, w: Writer, node: fx.Node, a: dict) -> int:
        if _is_shuffled(w, node):
            return -1  # the shuffle does it
        values = [w.values[part] for part in a["tensors"]]
        while len(values) > MOST_READS:
            values = [w.line("concat", *values[:MOST_READS]), *values[MOST_READS:]]
        return w.line("concat", *values)


def _is_shuffled(w: Writer, node: fx.Node) -> bool:
    """Whether a concatenation is only read by a shuffle that takes its parts in turns."""
    (reader, *others) = node.users
    if others or reader not in w.members or reader.target is not nodes.channel_shuffle:
        return False
    parts = arguments(node)["tensors"]
    return len(parts) == arguments(reader)["groups"] and len({size_of(part)[1] for part in parts}) == 1


class _Shuffle(_Step):
    def fits(self, program: Program, node: fx.Node, a: dict) -> bool:
        return 1 < a["groups"] <= MOST_READS

    def write(self, w: Writer, node: fx.Node, a: dict) -> int:
        source, groups = a["input"], a["groups"]
        if source in w.members and source.target is aten.cat.default and _is_shuffled(w, source):
            return w.line("interleave", *(w.values[part] for part in arguments(source)["tensors"]))
        K = size_of(node)[1] // groups
        return w.line("interleave", *(w.line("slice", w.values[source], begin=i * K, K=K) for i in range(groups)))


class _Pool(_Step):
    def fits(self, program: Program, node: fx.Node, a: dict) -> bool:
        if len(size_of(node)) != 4 or a.get("divisor_override") is not None:
            return False
        if a["ceil_mode"] and a.get("count_include_pad"):
            return False
        return all(isinstance(n, int) for name in ("kernel_size", "stride", "padding") for n in a[name])

    def write(self, w: Writer, node: fx.Node, a: dict) -> int:
        kernel = _pair(a["kernel_size"])
        name = "max_pool"
        if node.target is aten.avg_pool2d.default:
            name = "padded_mean_pool" if a["count_include_pad"] else "mean_pool"
        return w.line(
            *(name, w.values[node.args[0]]),
            kernel=by(kernel),
            stride=by(_pair(a["stride"]) if a["stride"] else kernel),
            dilation=by(_pair(a.get("dilation") or [1])),
            padding=sides(_pair(a["padding"])),
            ceil=1 if a["ceil_mode"] else None,
        )


def _pair(numbers: object) -> list[int]:
    numbers = [numbers] if isinstance(numbers, int) else list(numbers)
    return [numbers[0], numbers[-1]]


STEPS: dict[Callable, _Step] = {
    nodes.convolution: _Convolution(),
    nodes.linear: _Linear(),
    nodes.affine: _Affine(),
    nodes.channel_norm: _ChannelNorm(),
    nodes.activate: _Activate(),
    aten.hardsigmoid.default: _HardSigmoid(),
    aten.add.Tensor: _Binary("add"),
    aten.mul.Tensor: _Binary("mul"),
    aten.mean.dim: _Mean(),
    aten.adaptive_avg_pool2d.default: _Mean(),
    aten.view.default: _SamePixels(),
    aten.reshape.default: _SamePixels(),
    aten.flatten.using_ints: _SamePixels(),
    aten.cat.default: _Concatenation(),
    nodes.channels: _Channels(),
    nodes.channel_shuffle: _Shuffle(),
    aten.max_pool2d.default: _Pool(),
    aten.avg_pool2d.default: _Pool(),
}
