"""What the inverted residual blocks of torchvision and timm are made of, read by the names of their layers.

Their forward is known by their class; a class of another name, or a layer that is none of the known ones, is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from .fold import Stage, own_hooks

__all__ = ["Parts", "read_block"]

_ACTIVATIONS: dict[str, str] = {
    "Identity": "identity",
    "ReLU": "relu",
    "ReLU6": "relu6",
    "GELU": "gelu",
    "SiLU": "silu",
    "Swish": "silu",
    "Hardswish": "hardswish",
    "HardSwish": "hardswish",
    "Sigmoid": "sigmoid",
    "Hardsigmoid": "hardsigmoid",
    "HardSigmoid": "hardsigmoid",
    "Tanh": "tanh",
}


# (module, class): of torchvision, which has other blocks of these names.
_TORCHVISION = (("mobilenetv2", "InvertedResidual"), ("mobilenetv3", "InvertedResidual"), ("efficientnet", "MBConv"))


@dataclass
class Parts:
    """A block's layers, and what its forward does besides; `expand`, `squeeze` and `excite` may be None."""

    expand: Stage | None
    depthwise: Stage
    project: Stage
    squeeze: nn.Conv2d | None
    excite: nn.Conv2d | None
    squeeze_activation: str
    gate: str
    residual: bool
    drop_path: float


def read_block(block: nn.Module) -> Parts:
    """The parts of a block of torchvision.models or timm; ValueError where it is none, or not of these parts."""
    module, name = type(block).__module__, type(block).__name__
    if module.startswith("torchvision.models.") and (module.rpartition(".")[2], name) in _TORCHVISION:
        return _checked(block, _of_torchvision(block))
    if module.endswith("efficientnet_blocks") and name in ("InvertedResidual", "DepthwiseSeparableConv"):
        return _checked(block, _of_timm(block, name == "InvertedResidual"))
    raise ValueError(
        "block must be an InvertedResidual or MBConv of torchvision, or an InvertedResidual or DepthwiseSeparableConv "
        f"of timm, but is {module}.{name}"
    )


def _activation(layer: nn.Module | None) -> str:
    if layer is None:
        return "identity"
    name = type(layer).__name__
    if name not in _ACTIVATIONS or (name == "GELU" and getattr(layer, "approximate", "none") != "none"):
        raise ValueError(f"block has an activation that is none of this package's: {layer}")
    return _ACTIVATIONS[name]


def _of_torchvision(block: Any) -> Parts:
    layers: list[nn.Module] = []
    gate = None
    for layer in block.conv if hasattr(block, "conv") else block.block:
        if hasattr(layer, "fc1"):
            gate = layer
        else:
            layers += layer if isinstance(layer, nn.Sequential) else [layer]
    stages: list[Stage] = []
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            stages.append(Stage(layer))
        elif isinstance(layer, nn.modules.batchnorm._NormBase) and stages:
            stages[-1].norm = layer
        elif stages:
            stages[-1].activation = _activation(layer)
    if len(stages) not in (2, 3):
        raise ValueError(f"block must have 2 or 3 convolutions in a row, but has {len(stages)}")
    expand = stages.pop(0) if len(stages) == 3 else None
    depthwise, project = stages
    depth = getattr(block, "stochastic_depth", None)
    if depth is not None and depth.p and depth.mode != "row":
        raise ValueError(f"block must drop paths by row, but its stochastic depth's mode is {depth.mode!r}")
    squeeze, excite = getattr(gate, "fc1", None), getattr(gate, "fc2", None)
    names = [_activation(getattr(gate, name, None)) for name in ("activation", "scale_activation")]
    path = 0.0 if depth is None else depth.p
    return Parts(expand, depthwise, project, squeeze, excite, names[0], names[1], block.use_res_connect, path)


def _of_timm(block: Any, expands: bool) -> Parts:
    for name, what in (("conv_s2d", "space to depth"), ("aa", "blur behind the depthwise convolution")):
        if not isinstance(getattr(block, name, None), (type(None), nn.Identity)):
            raise ValueError(f"block has a {what}, which this class has not: {getattr(block, name)}")

    def stage(conv: str, norm: str) -> Stage:
        layer = getattr(block, norm)
        if not isinstance(getattr(layer, "drop", None), (type(None), nn.Identity)):
            raise ValueError(f"block has a drop inside of its norm: {layer.drop}")
        return Stage(getattr(block, conv), layer, _activation(getattr(layer, "act", None)))

    names = ("conv_pw", "conv_dw", "conv_pwl") if expands else ("conv_dw", "conv_pw")
    *first, depthwise, project = (stage(name, f"bn{i}") for i, name in enumerate(names, 1))
    se = None if isinstance(block.se, nn.Identity) else block.se
    if se is not None and type(se).__name__ != "SqueezeExcite":
        raise ValueError(f"block must have a SqueezeExcite of timm, but has {type(se).__name__}")
    path = getattr(block.drop_path, "drop_prob", 0.0) or 0.0
    if path and not block.drop_path.scale_by_keep:
        raise ValueError("block must scale what its drop_path keeps, but scale_by_keep is False")
    squeeze, excite = getattr(se, "conv_reduce", None), getattr(se, "conv_expand", None)
    inside = [_activation(getattr(se, name, None)) for name in ("act1", "gate")]
    expand = first[0] if first else None
    return Parts(expand, depthwise, project, squeeze, excite, inside[0], inside[1], block.has_skip, path)


def _checked(block: nn.Module, parts: Parts) -> Parts:
    """What one class with one norm and one activation can say of them."""
    stages = [stage for stage in (parts.expand, parts.depthwise, parts.project) if stage is not None]
    for stage in stages:
        if type(stage.conv).__name__ != "Conv2d" or stage.conv.padding_mode != "zeros":
            raise ValueError(f"block must have convolutions that are nn.Conv2d with zeros around, but has {stage.conv}")
        if not isinstance(stage.norm, nn.BatchNorm2d) or stage.norm.running_mean is None or not stage.norm.affine:
            raise ValueError(f"block must have a BatchNorm2d behind each convolution, but has {stage.norm}")
        if stage.conv.bias is not None:
            raise ValueError(f"block must have no bias before a norm, but has {stage.conv}")
    for layer in block.modules():
        if own_hooks(layer):
            raise ValueError(f"block must have no hooks, which nobody would call any more, but has some on {layer}")
    if parts.expand is not None and parts.expand.conv.in_channels == parts.expand.conv.out_channels:
        raise ValueError(f"block must have no 1x1 convolution first or one that expands, but has {parts.expand.conv}")
    conv = parts.depthwise.conv
    if conv.groups != conv.in_channels or conv.out_channels != conv.in_channels:
        raise ValueError(f"block must have a depthwise convolution, but has {conv}")
    for stage in stages:
        if stage.conv is not conv and (stage.conv.kernel_size != (1, 1) or stage.conv.groups != 1):
            raise ValueError(f"block must have 1x1 convolutions around the depthwise one, but has {stage.conv}")
    if parts.expand is not None and parts.expand.activation != parts.depthwise.activation:
        raise ValueError(
            "block must have one activation behind its first two convolutions, but has "
            f"{parts.expand.activation} and {parts.depthwise.activation}"
        )
    if parts.squeeze is None:
        parts.squeeze_activation, parts.gate = "relu", "sigmoid"
    elif parts.gate not in ("sigmoid", "hardsigmoid"):
        raise ValueError(f"block must have a gate of sigmoid or hardsigmoid, but has {parts.gate}")
    if parts.residual and parts.project.activation != "identity":
        raise ValueError(
            f"block must have no activation between its last norm and the sum, but has {parts.project.activation}"
        )
    parts.drop_path = parts.drop_path if parts.residual else 0.0
    return parts
