"""What the rewriter looks for, as data. To teach it something new, add a line here.

The language stands in match.py, the nodes that patterns lead to in nodes.py, what a rule does in actions.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from . import actions as do
from . import nodes
from .match import Any, Call, Constant, Op, shared

aten = torch.ops.aten
x, y, dim = Any("x"), Any("y"), Any("dim")
scale, shift, constant = Constant("scale"), Constant("shift"), Constant("constant")

# --- aten's words ---

mul = Op(aten.mul.Tensor, aten.mul.Scalar, commutes=True)
div = Op(aten.div.Tensor, aten.div.Scalar)
relu6 = Op(aten.relu6.default)
hardtanh = Op(aten.hardtanh.default, aten.clamp.default)
clamp_min = Op(aten.clamp_min.default)
sigmoid = Op(aten.sigmoid.default)
hardsigmoid = Op(aten.hardsigmoid.default)
erf = Op(aten.erf.default)
cat = Op(aten.cat.default)
permute = Op(aten.permute.default)
transpose = Op(aten.transpose.int)
reshape = Op(aten.view.default, aten.reshape.default)


def add(a: object, b: object) -> Call:
    return Op(aten.add.Tensor, aten.add.Scalar, commutes=True)(a, b, alpha=1)


def sub(a: object, b: object) -> Call:
    return Op(aten.sub.Tensor, aten.sub.Scalar)(a, b, alpha=1)


def clamped(a: object) -> tuple[Call, ...]:
    """The spellings of relu6."""
    return hardtanh(a, 0, 6), relu6(a)


# --- activations, however they are written ---

# The longer spellings first: their parts are activations themselves.
ACTIVATIONS: tuple[tuple[object, str], ...] = (
    *((div(mul(x, spelling), 6), "hardswish") for spelling in clamped(add(x, 3))),
    *((mul(x, div(spelling, 6)), "hardswish") for spelling in clamped(add(x, 3))),
    *((mul(mul(x, spelling), 1 / 6), "hardswish") for spelling in clamped(add(x, 3))),
    (mul(x, hardsigmoid(x)), "hardswish"),
    (Op(aten.hardswish.default)(x), "hardswish"),
    (mul(mul(x, 0.5), add(erf(div(x, math.sqrt(2))), 1)), "gelu"),
    (mul(mul(x, add(erf(div(x, math.sqrt(2))), 1)), 0.5), "gelu"),
    (Op(aten.gelu.default)(x, approximate="none"), "gelu"),
    (mul(x, sigmoid(x)), "silu"),
    (Op(aten.silu.default)(x), "silu"),
    (Op(aten.relu.default)(x), "relu"),
    (clamp_min(x, 0), "relu"),
    (Op(aten.clamp.default)(x, 0, None), "relu"),
    *((spelling, "relu6") for spelling in clamped(x)),
    (Op(aten.leaky_relu.default)(x, 0.01), "leaky_relu"),
    (sigmoid(x), "sigmoid"),
    (Op(aten.tanh.default)(x), "tanh"),
)

# --- what does nothing in inference, once the memory layout is the rewriter's own affair ---

NOTHING = (
    Op(aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default)(x, train=False),
    Op(aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default)(x),
    Op(aten.clone.default, aten.contiguous.default)(x),
)

# --- aten's layers as nodes ---

LAYERS: dict[Callable, Callable] = {
    aten.conv2d.default: do.from_conv2d,
    aten.conv2d.padding: do.from_conv2d,
    aten.convolution.default: do.from_convolution,
    torch.ops.sepconv_ext.conv2d.default: do.from_our_conv2d,
    torch.ops.sepconv_ext.separable_conv2d.default: do.from_our_separable_conv2d,
    torch.ops.sepconv_ext.inverted_residual.default: do.from_our_inverted_residual,
    aten.linear.default: do.from_linear,
    aten.batch_norm.default: do.from_batch_norm,
    aten.layer_norm.default: do.from_layer_norm,
    aten.channel_shuffle.default: do.from_channel_shuffle,
    aten.slice.Tensor: do.from_slice,
}

# --- rules on nodes ---

convolution, linear = Op(nodes.convolution), Op(nodes.linear)
product = Op(nodes.convolution, nodes.linear)
affine, channel_norm, activate = Op(nodes.affine), Op(nodes.channel_norm), Op(nodes.activate)
# A product behind which nothing has been put yet.
bare = product(residual=None, activation="identity").as_("product")
nhwc = permute(x, [0, 2, 3, 1])


@dataclass(frozen=True)
class Rule:
    """`act(rewriter, node, match)` returns what stands for the node from now on, or None where it cannot be done."""

    what: str
    pattern: object
    act: Callable


RULES = (
    Rule("a norm behind a product", affine(bare, scale, shift, dim), do.fold_behind),
    Rule(
        "a norm before products",
        product(shared(affine(x, scale, shift, dim)).as_("norm")).as_("product"),
        do.fold_before,
    ),
    Rule("a factor behind a product", mul(bare, constant), do.fold_factor),
    Rule("a quotient behind a product", div(bare, constant), do.fold_quotient),
    Rule("a constant added to a product", add(bare, constant), do.fold_term),
    Rule("a constant taken from a product", sub(bare, constant), do.fold_difference),
    Rule(
        "an activation behind a product",
        activate(product(activation="identity").as_("product"), Any("name")),
        do.put_activation,
    ),
    Rule("a residual", add(bare, y), do.put_residual),
    Rule("a norm behind a concatenation", affine(cat(Any("parts"), 1), scale, shift, 1), do.split_norm),
    Rule("an activation behind a concatenation", activate(cat(Any("parts"), 1), Any("name")), do.split_activation),
    # A pixel's channels, in the last dimension: what is done to them can be done where they are.
    Rule("two permutes", permute(shared(permute(x, Any("first"))), Any("second")), do.join_permutes),
    Rule("Linear over channels", linear(shared(nhwc)).as_("product"), do.sink_linear),
    Rule("LayerNorm over channels", channel_norm(shared(nhwc), Any("eps"), 3), do.sink_norm),
    Rule("scale of channels", affine(shared(nhwc), scale, shift, 3), do.sink_affine),
    Rule("activation of channels", activate(shared(nhwc), Any("name")), do.sink_activation),
    Rule("sum of channels", add(shared(nhwc), shared(permute(y, [0, 2, 3, 1]))), do.sink_sum),
    Rule(
        "channel shuffle",
        reshape(transpose(reshape(x, Any("split")).as_("split_node"), 1, 2), Any("joined")),
        do.shuffle,
    ),
)

# --- two or three products as one op, where the plan has a kernel for them ---

PAIR = convolution(
    convolution(residual=None).where(do.is_depthwise).as_("depthwise"),
).where(do.is_pointwise)

BLOCK = convolution(
    convolution(
        convolution(residual=None).where(do.is_pointwise).as_("expand"),
        residual=None,
    )
    .where(do.is_depthwise)
    .as_("depthwise"),
).where(do.is_pointwise)

# --- blocks, as they are reported ---

_expand = convolution().where(do.is_pointwise).as_("expand")
_depthwise = shared(convolution(_expand).where(do.is_depthwise).as_("depthwise"))
BLOCKS = (
    ("expand, depthwise, project", convolution(_depthwise).where(do.is_projection).as_("project")),
    (
        "expand, depthwise, squeeze-and-excitation, project",
        convolution(mul(_depthwise, Any("gate"))).where(do.is_projection).as_("project"),
    ),
)
