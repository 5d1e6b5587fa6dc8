"""What the rules of patterns.py do to a graph.

Each takes (rewriter, node, match) and returns what stands for the node from now on, or None where it cannot be done.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from .. import functional
from . import nodes
from .capture import Program
from .match import Match, arguments

__all__ = ["Rewriter", "path_of", "size_of"]

NHWC, NCHW = [0, 2, 3, 1], [0, 3, 1, 2]


def size_of(node: fx.Node) -> torch.Size | None:
    value = node.meta.get("val")
    return value.shape if isinstance(value, Tensor) else None


def path_of(node: fx.Node) -> str:
    """The name of the module whose forward called this node."""
    modules = node.meta.get("nn_module_stack")
    return next(reversed(modules.values()))[0] if modules else ""


def is_depthwise(program: Program, node: fx.Node) -> bool:
    a = arguments(node)
    return a["groups"] == size_of(a["input"])[1] and a["groups"] > 1


def is_pointwise(program: Program, node: fx.Node) -> bool:
    """A 1x1 convolution without padding, of any stride."""
    a = arguments(node)
    taps = program.constants[a["weight"].target].shape[2:]
    return a["groups"] == 1 and tuple(taps) == (1, 1) and not any(a["padding"])


def is_projection(program: Program, node: fx.Node) -> bool:
    """A 1x1 convolution to fewer channels."""
    K, C = program.constants[arguments(node)["weight"].target].shape[:2]
    return is_pointwise(program, node) and K < C


def same_number(m: int | torch.SymInt, n: int | torch.SymInt) -> bool:
    """They are the same for every size of input that the graph takes."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # brings sympy: half a second

    return statically_known_true(m == n)


def same_size(a: fx.Node, b: object) -> bool:
    if not isinstance(b, fx.Node):
        return False
    sizes = size_of(a), size_of(b)
    if None in sizes or len(sizes[0]) != len(sizes[1]):
        return False
    return all(same_number(m, n) for m, n in zip(*sizes, strict=True))


@dataclass
class Rewriter:
    """A program while it is rewritten, and what was done to it.

    Attributes:
        folded: (module, what it was) of everything that is part of a product's weight and bias now.

    What a product does besides stands in its `meta["parts"]`: "batch norm", "relu", "residual", ...
    """

    program: Program
    folded: list[tuple[str, str]] = field(default_factory=list)

    def call(
        self, at: fx.Node, target: Callable, *args: object, like: fx.Node | None = None, **kwargs: object
    ) -> fx.Node:
        """A new node right before `at`; its size and origin are those of `like`, or of `at`."""
        graph, like = self.program.graph, like or at
        with graph.inserting_before(at):
            node = graph.call_function(target, args, kwargs)
        node.meta = dict(like.meta)
        return node

    def permuted(self, at: fx.Node, input: fx.Node, dims: list[int]) -> fx.Node:
        node = self.call(at, torch.ops.aten.permute.default, input, dims, like=input)
        node.meta["val"] = input.meta["val"].permute(dims)
        return node

    def changed(self, at: fx.Node, product: fx.Node, parts: tuple[str, ...] = (), **changes: object) -> fx.Node:
        """The product again, with other arguments, at `at`."""
        node = self.call(at, product.target, like=product, **(arguments(product) | changes))
        node.meta["parts"] = (*product.meta.get("parts", ()), *parts)
        return node

    def constant(self, tensor: Tensor, like: fx.Node, hint: str) -> fx.Node:
        return self.program.add_constant(tensor, like.meta["val"].dtype, hint)

    def fold(self, at: fx.Node, product: fx.Node, scale: Tensor | None, shift: Tensor | None, parts: tuple[str, ...]):
        """The product with its outputs scaled and shifted: both [K], in float64."""
        a = arguments(product)
        weight, bias = self.program.constant(a["weight"]), self.program.constant(a["bias"])
        if weight is None or (a["bias"] is not None and bias is None):
            return None
        K, hint = weight.shape[0], a["weight"].target
        bias = weight.new_zeros(K) if bias is None else bias
        changes = {}
        if scale is not None:
            weight, bias = weight * scale.reshape(-1, *[1] * (weight.dim() - 1)), bias * scale
            changes["weight"] = self.constant(weight, a["weight"], hint)
        if shift is not None:
            bias = bias + shift
        changes["bias"] = self.constant(bias, a["weight"], f"{hint.removesuffix('_weight')}_bias")
        return self.changed(at, product, parts, **changes)


# --- aten's layers as nodes ---


def _pair(values: object) -> list[int]:
    values = [values] if isinstance(values, int) else list(values)
    return [values[0], values[-1]]


def _convolution(r: Rewriter, node: fx.Node, input, weight, bias, stride, padding, dilation, groups, mode="zeros"):
    """None for what is no convolution of images, or one by weights that the network computes."""
    if r.program.constant(weight) is None or (bias is not None and r.program.constant(bias) is None):
        return None
    if len(size_of(input)) != 4 or len(size_of(weight)) != 4 or not size_of(input)[1]:
        return None
    padding = list(padding) if len(padding) == 4 else _pair(padding)
    stride, dilation = _pair(stride), _pair(dilation)
    return r.call(node, nodes.convolution, input, weight, bias, stride, padding, dilation, groups, mode)


def from_conv2d(r: Rewriter, node: fx.Node) -> fx.Node | None:
    a = arguments(node)
    padding = a["padding"]
    if isinstance(padding, str):
        padding = functional._padding(padding, size_of(a["weight"]), _pair(a["stride"]), _pair(a["dilation"]))
    return _convolution(r, node, a["input"], a["weight"], a["bias"], a["stride"], padding, a["dilation"], a["groups"])


def from_convolution(r: Rewriter, node: fx.Node) -> fx.Node | None:
    a = arguments(node)
    if a["transposed"]:
        return None
    return _convolution(
        r, node, a["input"], a["weight"], a["bias"], a["stride"], a["padding"], a["dilation"], a["groups"]
    )


def from_our_conv2d(r: Rewriter, node: fx.Node) -> fx.Node | None:
    a = arguments(node)
    conv = _convolution(
        *(r, node, a["input"], a["weight"], a["bias"], a["stride"]),
        *(a["padding"], a["dilation"], a["groups"], a["padding_mode"]),
    )
    return _activated(r, node, conv, a["activation"])


def from_our_separable_conv2d(r: Rewriter, node: fx.Node) -> fx.Node | None:
    a = arguments(node)
    if len(size_of(a["input"])) != 4:
        return None
    weights = [a[f"{stage}_{part}"] for stage in ("depthwise", "pointwise") for part in ("weight", "bias")]
    if any(weight is not None and r.program.constant(weight) is None for weight in weights):
        return None
    groups, place = size_of(a["input"])[1], (a["stride"], a["padding"], a["dilation"])
    depthwise = _stage(r, node, a["input"], *weights[:2], *place, groups)
    depthwise = _activated(r, node, depthwise, a["depthwise_activation"])
    pointwise = r.call(node, nodes.convolution, depthwise, *weights[2:])
    return _activated(r, node, pointwise, a["pointwise_activation"])


def from_our_inverted_residual(r: Rewriter, node: fx.Node) -> fx.Node | None:
    """The stages one by one: together again they are where a plan has one kernel for them."""
    a = arguments(node)
    names = ("expand", "depthwise", "squeeze", "excite", "project")
    weights = (a[f"{name}_{part}"] for name in names for part in ("weight", "bias"))
    if len(size_of(a["input"])) != 4 or any(w is not None and r.program.constant(w) is None for w in weights):
        return None

    def stage(image: fx.Node, name: str, activation: str, *place: object) -> fx.Node:
        conv = _stage(r, node, image, a[f"{name}_weight"], a[f"{name}_bias"], *place)
        return _activated(r, node, conv, activation)

    image = a["input"]
    if a["expand_weight"] is not None:
        image = stage(image, "expand", a["expand_activation"])
    place = (a["stride"], a["padding"], a["dilation"], size_of(a["depthwise_weight"])[0])
    image = stage(image, "depthwise", a["depthwise_activation"], *place)
    if a["squeeze_weight"] is not None:
        mean = r.call(node, torch.ops.aten.mean.dim, image, [2, 3], True)
        mean.meta["val"] = image.meta["val"].new_empty((*size_of(image)[:2], 1, 1))
        excited = stage(stage(mean, "squeeze", a["squeeze_activation"]), "excite", "identity")
        hard = a["gate"] == "hardsigmoid"
        gate = r.call(node, torch.ops.aten.hardsigmoid.default, excited, like=excited) if hard else None
        gate = gate or _activated(r, node, excited, "sigmoid")
        image = r.call(node, torch.ops.aten.mul.Tensor, image, gate, like=image)
    image = stage(image, "project", "identity")
    if a["residual"]:
        image = r.call(node, torch.ops.aten.add.Tensor, image, a["input"], like=image)
    return _activated(r, node, image, a["project_activation"])


def _stage(r: Rewriter, at: fx.Node, image: fx.Node, weight: fx.Node, bias: fx.Node | None, *place) -> fx.Node:
    """A convolution whose value is none of the graph that is rewritten. `place`: stride to groups; default: a 1x1's."""
    stride, padding, dilation, groups = place or ((1, 1), (0, 0), (1, 1), 1)
    conv = _convolution(r, at, image, weight, bias, stride, padding, dilation, groups)
    sides, (K, _, *taps), (N, _, *size) = _sides(padding), size_of(weight), size_of(image)
    outputs = [
        (n + sides[2 * i] + sides[2 * i + 1] - _pair(dilation)[i] * (taps[i] - 1) - 1) // _pair(stride)[i] + 1
        for i, n in enumerate(size)
    ]
    conv.meta["val"] = image.meta["val"].new_empty((N, K, *outputs))
    return conv


def _sides(padding: list[int]) -> list[int]:
    """Top, bottom, left, right."""
    return list(padding) if len(padding) == 4 else [padding[0], padding[0], padding[-1], padding[-1]]


def _activated(r: Rewriter, at: fx.Node, product: fx.Node | None, activation: str) -> fx.Node | None:
    if product is None or activation == "identity":
        return product
    return r.call(at, nodes.activate, product, activation, like=product)


def from_linear(r: Rewriter, node: fx.Node) -> fx.Node | None:
    a = arguments(node)
    constants = [a["weight"]] + ([a["bias"]] if a["bias"] is not None else [])
    if any(r.program.constant(c) is None for c in constants) or len(size_of(a["weight"])) != 2:
        return None
    return r.call(node, nodes.linear, a["input"], a["weight"], a["bias"])


def from_batch_norm(r: Rewriter, node: fx.Node) -> fx.Node | None:
    a = arguments(node)
    mean, variance = r.program.constant(a["running_mean"]), r.program.constant(a["running_var"])
    if a["training"] or mean is None or variance is None:
        return None
    scale = torch.rsqrt(variance + a["eps"])
    shift = torch.zeros_like(mean)
    for name in ("weight", "bias"):
        if a[name] is not None and r.program.constant(a[name]) is None:
            return None
    if a["weight"] is not None:
        scale = scale * r.program.constant(a["weight"])
    shift = -mean * scale
    if a["bias"] is not None:
        shift = shift + r.program.constant(a["bias"])
    hint = a["running_mean"].target.removesuffix("_running_mean")
    made = [
        r.constant(tensor, a["running_mean"], f"{hint}_{what}") for tensor, what in ((scale, "scale"), (shift, "shift"))
    ]
    return _named(r.call(node, nodes.affine, a["input"], *made, 1), "batch norm")


def from_functional_batch_norm(r: Rewriter, node: fx.Node) -> fx.Node | None:
    """What torch.export's functionalisation makes of a batch norm: (output, mean, rstd)."""
    source, index = node.args
    a = source.target is torch.ops.aten._native_batch_norm_legit_no_training.default and index == 0
    if not a:
        return None
    given = arguments(source)
    plain = r.call(
        *(node, torch.ops.aten.batch_norm.default, given["input"], given["weight"], given["bias"]),
        *(given["running_mean"], given["running_var"], False, given["momentum"], given["eps"], False),
    )
    return from_batch_norm(r, plain)


def from_layer_norm(r: Rewriter, node: fx.Node) -> fx.Node | None:
    a = arguments(node)
    if len(a["normalized_shape"]) != 1 or len(size_of(a["input"])) < 2:
        return None
    given = [a[name] for name in ("weight", "bias")]
    if any(c is not None and r.program.constant(c) is None for c in given):
        return None
    dim = len(size_of(node)) - 1
    norm = r.call(node, nodes.channel_norm, a["input"], a["eps"], dim)
    if given == [None, None]:
        return norm
    (known,) = [c for c in given if c is not None][:1]
    defaults = (torch.ones, torch.zeros)
    made = [
        c
        if c is not None
        else r.constant(default(size_of(known), dtype=torch.float64), known, f"{known.target}_default")
        for c, default in zip(given, defaults, strict=True)
    ]
    return _named(r.call(node, nodes.affine, norm, *made, dim), "layer norm's scale and shift")


def from_slice(r: Rewriter, node: fx.Node) -> fx.Node | None:
    a = arguments(node)
    if a["step"] != 1:
        return None
    if same_size(node, a["input"] if "input" in a else a["self"]):
        return node.args[0]
    return _channels(r, node, node.args[0], a["start"] or 0) if a["dim"] == 1 else None


def from_split(r: Rewriter, node: fx.Node) -> fx.Node | None:
    """One of the pieces that an image is split into, by channels."""
    source, index = node.args
    if source.target not in _SPLITS or arguments(source)["dim"] != 1 or not isinstance(index, int) or index < 0:
        return None
    before = [piece.shape[1] for piece in source.meta["val"][:index]]
    return _channels(r, node, source.args[0], sum(before)) if all(isinstance(n, int) for n in before) else None


_SPLITS = tuple(
    getattr(getattr(torch.ops.aten, name), overload)
    for name, overload in (
        *(("chunk", "default"), ("split", "Tensor"), ("split", "sizes"), ("split_with_sizes", "default")),
        *(("unsafe_chunk", "default"), ("unsafe_split", "Tensor"), ("unsafe_split_with_sizes", "default")),
    )
)


def _channels(r: Rewriter, node: fx.Node, image: fx.Node, begin: object) -> fx.Node | None:
    sizes = size_of(image), size_of(node)
    if None in sizes or len(sizes[0]) != 4 or not all(isinstance(size[1], int) for size in sizes):
        return None
    if not isinstance(begin, int):
        return None
    first = begin + sizes[0][1] if begin < 0 else begin
    return r.call(node, nodes.channels, image, first, first + sizes[1][1])


def from_channel_shuffle(r: Rewriter, node: fx.Node) -> fx.Node | None:
    return r.call(node, nodes.channel_shuffle, *node.args)


def _named(node: fx.Node, what: str) -> fx.Node:
    node.meta["what"] = what
    return node


# --- rules ---


def channel_dim(product: fx.Node) -> int:
    return 1 if product.target is nodes.convolution else len(size_of(product)) - 1


def fold_behind(r: Rewriter, node: fx.Node, m: Match) -> fx.Node | None:
    product = m["product"]
    if m["dim"] != channel_dim(product):
        return None
    what = node.meta.get("what", "scale and shift")
    folded = r.fold(node, product, r.program.constant(m["scale"]), r.program.constant(m["shift"]), (what,))
    if folded is not None:
        r.folded.append((path_of(node), what))
    return folded


def fold_before(r: Rewriter, node: fx.Node, m: Match) -> fx.Node | None:
    """conv(x * scale + shift): only where nothing but products reads the norm, and no zeros stand around it."""
    norm, a = m["norm"], arguments(node)
    scale, shift = r.program.constant(m["scale"]), r.program.constant(m["shift"])
    if any(user.target is not node.target or arguments(user)["input"] is not norm for user in norm.users):
        return None
    convolutions = node.target is nodes.convolution
    if m["dim"] != (1 if convolutions else len(size_of(norm)) - 1):
        return None
    if convolutions and any(any(arguments(user)["padding"]) for user in norm.users) and bool(shift.any()):
        return None
    weight = r.program.constant(a["weight"])
    groups, K = a.get("groups", 1), weight.shape[0]
    tail = [1] * (weight.dim() - 2)
    by_group = [t.reshape(groups, 1, -1).expand(groups, K // groups, -1).reshape(K, -1, *tail) for t in (scale, shift)]
    moved = (weight * by_group[1]).flatten(1).sum(1)
    what = norm.meta.get("what", "scale and shift")
    folded = r.fold(node, node, None, moved, (what,))
    if len(norm.users) == 2:  # this product and its copy: the last one that reads the norm
        r.folded.append((path_of(norm), what))
    changes = dict(input=m["x"], weight=r.constant(weight * by_group[0], a["weight"], a["weight"].target))
    result = r.changed(node, folded, **changes)
    r.program.graph.erase_node(folded)
    return result


def _per_channel(r: Rewriter, product: fx.Node, constant: object) -> Tensor | None:
    """A number, or a constant that broadcasts along all dimensions but the product's channels, as [K]."""
    K = size_of(arguments(product)["weight"])[0]
    tensor = r.program.constant(constant)
    if tensor is None:
        return torch.full([K], constant, dtype=torch.float64) if isinstance(constant, (int, float)) else None
    rank = len(size_of(product))
    if tensor.dim() > rank or not tensor.is_floating_point():
        return None
    size = [1] * (rank - tensor.dim()) + list(tensor.shape)
    if any(n != 1 for d, n in enumerate(size) if d != channel_dim(product)) or size[channel_dim(product)] not in (1, K):
        return None
    return tensor.reshape(-1).expand(K)


def _fold_constant(r: Rewriter, node: fx.Node, m: Match, how: Callable) -> fx.Node | None:
    product = m["product"]
    values = _per_channel(r, product, m["constant"])
    if values is None or node.meta["val"].dtype != product.meta["val"].dtype:
        return None
    folded = r.fold(node, product, *how(values), ("constant",))
    if folded is not None and isinstance(m["constant"], fx.Node):
        r.folded.append((path_of(node) or m["constant"].target, "constant"))
    return folded


def fold_factor(r: Rewriter, node: fx.Node, m: Match) -> fx.Node | None:
    return _fold_constant(r, node, m, lambda values: (values, None))


def fold_quotient(r: Rewriter, node: fx.Node, m: Match) -> fx.Node | None:
    return _fold_constant(r, node, m, lambda values: (1 / values, None))


def fold_term(r: Rewriter, node: fx.Node, m: Match) -> fx.Node | None:
    return _fold_constant(r, node, m, lambda values: (None, values))


def fold_difference(r: Rewriter, node: fx.Node, m: Match) -> fx.Node | None:
    return _fold_constant(r, node, m, lambda values: (None, -values))


def put_activation(r: Rewriter, node: fx.Node, m: Match) -> fx.Node:
    return r.changed(node, m["product"], (m["name"],), activation=m["name"])


def put_residual(r: Rewriter, node: fx.Node, m: Match) -> fx.Node | None:
    """The later of two products takes the other's output: it is the one at the end of the longer branch."""
    product, other = m["product"], m["y"]
    if not same_size(product, other) or r.program.constant(other) is not None:
        return None
    if node.meta["val"].dtype != product.meta["val"].dtype or other.meta["val"].dtype != product.meta["val"].dtype:
        return None
    if _is_bare(other) and other > product:
        product, other = other, product
    return r.changed(node, product, ("residual",), residual=other)


def _is_bare(node: fx.Node) -> bool:
    if node.target not in (nodes.convolution, nodes.linear) or len(node.users) != 1:
        return False
    a = arguments(node)
    return a["residual"] is None and a["activation"] == "identity"


def split_norm(r: Rewriter, node: fx.Node, m: Match) -> fx.Node | None:
    """norm(cat(a, b)) is cat(norm(a), norm(b)), which folds into each."""
    parts = m["parts"]
    if not all(_is_bare(part) and channel_dim(part) == 1 for part in parts):
        return None
    widths = [size_of(arguments(part)["weight"])[0] for part in parts]
    what = node.meta.get("what", "scale and shift")
    pieces = [r.program.constant(m[name]).split(widths) for name in ("scale", "shift")]
    folded = [r.fold(node, part, *pair, (what,)) for part, *pair in zip(parts, *pieces, strict=True)]
    r.folded.append((path_of(node), what))
    return r.call(node, torch.ops.aten.cat.default, folded, 1)


def split_activation(r: Rewriter, node: fx.Node, m: Match) -> fx.Node | None:
    parts = m["parts"]
    products = (nodes.convolution, nodes.linear)
    if not all(part.target in products and len(part.users) == 1 for part in parts):
        return None
    if any(arguments(part)["activation"] != "identity" for part in parts):
        return None
    done = [r.changed(node, part, (m["name"],), activation=m["name"]) for part in parts]
    return r.call(node, torch.ops.aten.cat.default, done, 1)


def join_permutes(r: Rewriter, node: fx.Node, m: Match) -> fx.Node:
    together = [m["first"][dim] for dim in m["second"]]
    if together == sorted(together):
        return m["x"]
    return r.permuted(node, m["x"], together)


def _sunk(r: Rewriter, node: fx.Node, planes: fx.Node) -> fx.Node:
    """What stands for a node [N, H, W, C], from its value as [N, C, H, W]."""
    planes.meta["val"] = node.meta["val"].permute(NCHW)
    return r.permuted(node, planes, NHWC)


def sink_linear(r: Rewriter, node: fx.Node, m: Match) -> fx.Node | None:
    a = arguments(node)
    if a["residual"] is not None:
        return None
    weight = r.program.constant(a["weight"])
    filters = r.constant(weight[:, :, None, None], a["weight"], a["weight"].target)
    planes = r.call(*(node, nodes.convolution, m["x"], filters, a["bias"]), like=node, activation=a["activation"])
    planes.meta["parts"] = node.meta.get("parts", ())
    return _sunk(r, node, planes)


def sink_norm(r: Rewriter, node: fx.Node, m: Match) -> fx.Node:
    return _sunk(r, node, r.call(node, nodes.channel_norm, m["x"], m["eps"], 1))


def sink_affine(r: Rewriter, node: fx.Node, m: Match) -> fx.Node:
    return _sunk(r, node, r.call(node, nodes.affine, m["x"], m["scale"], m["shift"], 1))


def sink_activation(r: Rewriter, node: fx.Node, m: Match) -> fx.Node:
    return _sunk(r, node, r.call(node, nodes.activate, m["x"], m["name"]))


def sink_sum(r: Rewriter, node: fx.Node, m: Match) -> fx.Node:
    return _sunk(r, node, r.call(node, torch.ops.aten.add.Tensor, m["x"], m["y"]))


def shuffle(r: Rewriter, node: fx.Node, m: Match) -> fx.Node | None:
    """[N, groups, C / groups, H, W] with its second and third dimension exchanged."""
    split, x = size_of(m["split_node"]), m["x"]
    if len(split) != 5 or not same_size(x, node) or not isinstance(split[1], int):
        return None
    if not isinstance(split[2], int) or split[1] * split[2] != size_of(x)[1]:
        return None
    ends = [(split[0], size_of(x)[0]), (split[3], size_of(x)[2]), (split[4], size_of(x)[3])]
    if not all(same_number(m, n) for m, n in ends):
        return None
    return r.call(node, nodes.channel_shuffle, x, split[1])
